//! `hook check`: the checks of pre-start and advice, each with a fix.

use std::collections::BTreeMap;

use anstyle::{AnsiColor, Style};
use pinfold_core::cli::terminal::{coloured, print, print_json};
use pinfold_core::cli::{Output, print_error};
use pinfold_core::state::Store;
use pinfold_core::vm::VmConf;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Exit, Host, printable};
use serde::{Serialize, Serializer};
use serde_json::json;

use crate::checks::finding::{Finding, KEYS, Level};
use crate::checks::shared_readings::SharedReadings;
use crate::checks::{advice, cluster, required, script};
use crate::choice;
use crate::own_steps::TOOL;
use crate::settings::{self, Loaded};
use crate::state::reservation::Reservation;

/// The options of `hook check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    vmid: Option<VmId>,
}

/// The findings of a VM.
#[derive(Debug, Serialize)]
struct Checked {
    /// Where its settings come from, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// What was read of VMID.conf, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    read: Option<Read>,
    #[serde(serialize_with = "with_keys")]
    findings: Vec<Finding>,
}

/// Findings with their keys.
pub(super) fn keyed(findings: &[Finding]) -> serde_json::Value {
    with_keys(findings, serde_json::value::Serializer).unwrap_or_default()
}

fn with_keys<S: Serializer>(findings: &[Finding], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Keyed<'a> {
        key: String,
        #[serde(flatten)]
        finding: &'a Finding,
    }
    let keyed = findings.iter().map(|finding| Keyed {
        key: finding.key(),
        finding,
    });
    serializer.collect_seq(keyed)
}

/// What was read of VMID.conf, as Proxmox VE and QEMU take it.
#[derive(Debug, Serialize)]
struct Read {
    /// The vCPUs that the VM starts with.
    vcpus: u32,
    /// The threads of each core of the guest.
    threads: usize,
    affinity: Option<String>,
    hookscript: Option<String>,
    template: bool,
    hugepages: Option<String>,
    /// The functions of the host that the VM gets as a whole.
    pci: Vec<String>,
    lock: Option<String>,
}

impl Checked {
    fn has(&self, is: impl Fn(&Finding) -> bool) -> bool {
        self.findings.iter().any(is)
    }

    fn count(&self, level: Level) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    }
}

/// The exit codes of the command.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0   no check reports an error
  1   a check reports an error
  2   the command line is wrong
  3   something could not be checked: not root, or a file cannot be read";

/// Runs the command: for one VM, or for all that use hook.
///
/// # Errors
/// If the result cannot be written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    let (around, reservations) = (SharedReadings::new(&root), reservations(&root));
    let vmids = match args.vmid {
        Some(vmid) => vec![vmid],
        None => match managed_vms(&around) {
            Ok(vmids) => vmids,
            Err(error) => {
                print_error(TOOL, &error.into());
                return Ok(Exit::Unknown);
            }
        },
    };
    let checked: BTreeMap<u32, Checked> = vmids
        .into_iter()
        .map(|vmid| (vmid.into(), check(&around, &reservations, vmid)))
        .collect();
    let count = |level| {
        checked
            .values()
            .map(|checked| checked.count(level))
            .sum::<usize>()
    };
    let errors = count(Level::Error);
    if output.json {
        let json = json!({"vms": checked, "errors": errors, "warnings": count(Level::Warn)});
        print_json(&json)?;
    } else if checked.is_empty() {
        print("no VM has settings or uses hook as its hookscript\n")?;
    } else {
        let least = if output.quiet { Level::Warn } else { Level::Ok };
        let texts = checked
            .iter()
            .map(|(vmid, checked)| to_text(*vmid, checked, least));
        print(&coloured(&texts.collect::<String>()))?;
    }
    let any = |is: fn(&Finding) -> bool| checked.values().any(|checked| checked.has(is));
    Ok(
        if any(|finding| finding.level == Level::Error && !finding.unread) {
            Exit::Failed
        } else if any(|finding| finding.unread) {
            Exit::Unknown
        } else {
            Exit::Success
        },
    )
}

/// The VMs with settings of their own, or with hook as their hookscript.
pub(super) fn managed_vms(around: &SharedReadings<'_>) -> pinfold_core::Result<Vec<VmId>> {
    let root = around.root;
    let mut vmids = settings::vms_with_own_file(root)?;
    for (vmid, conf) in around.vms()? {
        if conf.as_ref().is_ok_and(calls_hook) {
            vmids.push(*vmid);
        }
    }
    // The cluster's settings are for whichever node has the VM.
    vmids.retain(|vmid| vm::check_exists(root, *vmid).is_ok() || !vm::is_elsewhere(root, *vmid));
    vmids.sort_unstable();
    vmids.dedup();
    Ok(vmids)
}

fn calls_hook(conf: &VmConf) -> bool {
    !conf.template
        && conf
            .hookscript
            .as_deref()
            .is_some_and(|volume| volume.rsplit('/').next() == Some("hook"))
}

/// All findings of a VM as text, for a report.
pub(super) fn text(root: &Host, vmid: VmId) -> String {
    let checked = check(&SharedReadings::new(root), &reservations(root), vmid);
    to_text(vmid.into(), &checked, Level::Ok)
}

/// The warnings and errors of a VM.
pub(super) fn faults(root: &Host, vmid: VmId) -> Vec<Finding> {
    let checked = check(&SharedReadings::new(root), &reservations(root), vmid);
    let mut findings = checked.findings;
    findings.retain(|finding| finding.level > Level::Ok);
    findings
}

/// The reservations of all VMs, and the finding if they cannot be read, or not all of it.
fn reservations(root: &Host) -> (BTreeMap<u32, Reservation>, Option<Finding>) {
    match Store::<Reservation>::peek(root) {
        Ok(state) => {
            let state = state.unwrap_or_default();
            let newer = state.newer.summary().map(|summary| {
                let fix = "install that version again; it restores the rest";
                Finding::warn("state", summary, fix)
            });
            (state.reservations, newer)
        }
        Err(error) => {
            let finding = if error.is_denied() {
                Finding {
                    unread: true,
                    ..Finding::warn(
                        "state",
                        error.to_string(),
                        "only root can read the reservations",
                    )
                }
            } else {
                Finding::of_error("state", &error)
            };
            (BTreeMap::new(), Some(finding))
        }
    }
}

/// All findings of a VM. What cannot be read is a finding too.
fn check(
    around: &SharedReadings<'_>,
    (reservations, unread): &(BTreeMap<u32, Reservation>, Option<Finding>),
    vmid: VmId,
) -> Checked {
    let root = around.root;
    let unlisted;
    let conf = match around.vms().ok().and_then(|vms| vms.get(&vmid)) {
        Some(conf) => conf,
        None => {
            unlisted = vm::conf(root, vmid);
            &unlisted
        }
    };
    let conf = match conf {
        Ok(conf) => conf,
        Err(error) => {
            let left = settings::own_file(root, vmid);
            let gone = vm::check_exists(root, vmid).is_err();
            let finding = match left.filter(|_| gone) {
                Some(file) => {
                    let file = file.display();
                    Finding::warn(
                        "settings",
                        format!("{file} is for a VM that does not exist"),
                        format!("rm {file}"),
                    )
                }
                None => Finding::of_error("VM", error),
            };
            return Checked {
                source: None,
                read: None,
                findings: vec![finding],
            };
        }
    };
    let mut findings = script::findings(root, vmid, conf);
    findings.extend(cluster::findings(root, vmid, conf));
    let (read, found) = read(root, vmid, conf);
    findings.extend(found);
    let settings = match settings::load_on(
        root,
        &around.cpus,
        vmid,
        conf.threads_per_core(),
        &choice::cells(conf),
    ) {
        Ok(Loaded::Fenced(settings)) => settings,
        Ok(Loaded::Unfenced {
            settings,
            why,
            is_lack,
        }) => {
            let what = format!("VM {vmid} starts without isolated CPUs: {why}");
            findings.push(if is_lack {
                Finding::warn("settings", what, "")
            } else {
                Finding::ok("settings", what)
            });
            return Checked {
                source: Some(settings.source),
                read: Some(read),
                findings,
            };
        }
        Err(error) => {
            findings.push(Finding::of_error("settings", &error));
            return Checked {
                source: None,
                read: Some(read),
                findings,
            };
        }
    };
    let before_required = findings.len();
    match required::findings(around, vmid, conf, &settings) {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(Finding::unread("host", &error)),
    }
    match advice::interference(around, vmid, conf, &settings.isolated) {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(Finding::unread("host", &error)),
    }
    findings.extend(unread.clone());
    findings.push(
        required::overlap(root, reservations, vmid, &settings)
            .unwrap_or_else(|error| Finding::unread("isolated", &error)),
    );
    let is_wrong = |finding: &Finding| finding.check == "isolated" && finding.level == Level::Error;
    // No method isolates CPUs that cannot be had.
    if !findings[before_required..].iter().any(is_wrong) {
        // For its next start: while it runs, the reservation has its method.
        let method =
            required::isolation(root, &around.siblings, reservations, vmid, &settings, None);
        findings.push(match method {
            Ok((_, Some(note))) => Finding::ok("method", note),
            Ok((_, None)) => Finding::ok("method", "supported by this kernel"),
            Err(error) => Finding::of_error("method", &error),
        });
    }
    if !settings.required {
        for finding in &mut findings[before_required..] {
            finding.stops_no_start();
        }
    }
    match advice::findings(around, vmid, conf, &settings) {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(Finding::unread("host", &error)),
    }
    findings.extend(unknown_keys(&settings.ignore));
    findings.retain(|finding| {
        finding.level != Level::Warn || !settings.ignore.contains(&finding.key())
    });
    Checked {
        source: Some(settings.source),
        read: Some(read),
        findings,
    }
}

/// That `ignore` has keys that no finding has.
fn unknown_keys(ignore: &[String]) -> Option<Finding> {
    let is_unknown = |key: &&String| !KEYS.contains(&key.as_str());
    let unknown: Vec<&str> = ignore
        .iter()
        .filter(is_unknown)
        .map(String::as_str)
        .collect();
    if unknown.is_empty() {
        return None;
    }
    Some(Finding::warn(
        "settings",
        format!(
            "ignore has {}, which is not the key of a finding",
            unknown.join(", ")
        ),
        format!("the keys are {}", KEYS.join(", ")),
    ))
}

/// What was read of VMID.conf, and warnings of what Proxmox VE ignores in it and of what keeps the
/// VM from starting so.
fn read(root: &Host, vmid: VmId, conf: &VmConf) -> (Read, Vec<Finding>) {
    const CHECK: &str = "VMID.conf";
    let file = root.path(vm::conf_file(vmid));
    let fix = format!("correct or remove it in {}", file.display());
    let ignored = conf.passed_over.iter().map(|passed_over| {
        let what = format!("{passed_over}; Proxmox VE ignores it");
        Finding::warn(CHECK, what, fix.clone())
    });
    let mut findings: Vec<_> = ignored.collect();
    let mut contradictions = conf.contradictions();
    let functions = match pci_reset::passed_through(root, vmid, conf) {
        Ok(found) => {
            contradictions.extend(found.refusals);
            found.functions
        }
        Err(error) => {
            findings.push(Finding::error(CHECK, error.to_string(), ""));
            Vec::new()
        }
    };
    findings.extend(
        contradictions
            .iter()
            .map(|contradiction| Finding::warn(CHECK, contradiction.to_string(), "")),
    );
    let read = Read {
        vcpus: conf.vcpus(),
        threads: conf.threads_per_core(),
        affinity: conf.affinity.as_ref().map(ToString::to_string),
        hookscript: conf.hookscript.clone(),
        template: conf.template,
        hugepages: conf.hugepages.clone(),
        pci: functions.iter().map(ToString::to_string).collect(),
        lock: conf.lock.clone(),
    };
    (read, findings)
}

/// The findings that are at least as severe as `least`.
fn to_text(vmid: u32, checked: &Checked, least: Level) -> String {
    let by = checked
        .source
        .as_ref()
        .map(|source| format!(", by {}", printable(source)))
        .unwrap_or_default();
    let mut text = format!("VM {vmid}{by}\n");
    let width = checked
        .findings
        .iter()
        .map(|finding| finding.check.len())
        .max()
        .unwrap_or(0);
    for Finding {
        level,
        check,
        what,
        fix,
        ..
    } in checked
        .findings
        .iter()
        .filter(|finding| finding.level >= least)
    {
        let (word, colour) = match level {
            Level::Ok => ("ok", AnsiColor::Green),
            Level::Warn => ("warn", AnsiColor::Yellow),
            Level::Error => ("error", AnsiColor::Red),
        };
        let style = Style::new().fg_color(Some(colour.into()));
        text += &format!(
            "  {style}{word:<5}{style:#}  {check:<width$}  {}\n",
            printable(what)
        );
        if !fix.is_empty() {
            text += &format!("         {:width$}  fix: {}\n", "", printable(fix));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::state::reservation::Phase;

    const CONF: &str = "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\n\
                        hookscript: local:snippets/hook\nmemory: 4096\ncpu: EPYC-v4";
    const HOOK: &str = "var/lib/vz/snippets/hook";
    const RECOVER: &str = "etc/systemd/system/multi-user.target.wants/pinfold-recover.path";

    fn check_one(root: &Host, vmid: VmId) -> Checked {
        check(&SharedReadings::new(root), &reservations(root), vmid)
    }

    fn vmid() -> VmId {
        "100".parse().unwrap()
    }

    /// A host and a VM 100 without faults.
    fn host_of(machine: &str, settings: &str) -> MadeUpHost {
        let host = MadeUpHost::new(machine);
        host.conf(100, CONF);
        host.settings(100, settings);
        host.file(HOOK, "#!/bin/sh\n# pinfold hook stub");
        host.file(RECOVER, "");
        host.mode(HOOK, 0o755);
        host
    }

    fn host() -> MadeUpHost {
        host_of("5900x", "layout = \"5900x\"")
    }

    /// Warnings and errors: `warn affinity: what => fix`.
    fn faults(host: &MadeUpHost) -> Vec<String> {
        let findings = check_one(&host.root, vmid())
            .findings
            .into_iter()
            .filter(|finding| finding.level > Level::Ok);
        let show = |Finding {
                        level,
                        check,
                        what,
                        fix,
                        ..
                    }: Finding| {
            format!(
                "{} {check}: {what} => {fix}",
                format!("{level:?}").to_lowercase()
            )
        };
        findings
            .map(show)
            .map(|text| {
                text.replace(
                    &format!("{}/", host.root.path("").display()).replace("//", "/"),
                    "/",
                )
            })
            .collect()
    }

    #[test]
    fn an_irqbalance_that_bans_the_isolated_cpus_is_fine() {
        let host = host();
        host.thread(900, 900, "irqbalance", "0-23", 0);
        let warned = |environ: &str| {
            host.file("proc/900/environ", environ);
            !faults(&host).is_empty()
        };
        for (environ, expected) in [
            ("A=b\0IRQBALANCE_BANNED_CPULIST=6-11,18-23\0", false),
            ("IRQBALANCE_BANNED_CPULIST=5-23\0", false),
            ("IRQBALANCE_BANNED_CPUS=fc0fc0\0", false),
            (
                "IRQBALANCE_BANNED_CPULIST=6-11\0IRQBALANCE_BANNED_CPUS=fc0fc0\0",
                true,
            ),
            ("IRQBALANCE_BANNED_CPULIST=all\0", true),
            ("XIRQBALANCE_BANNED_CPULIST=6-11,18-23\0", true),
            ("", true),
        ] {
            assert_eq!(warned(environ), expected, "{environ:?}");
        }
    }

    #[test]
    fn without_faults_each_check_reports_ok() {
        let host = host();
        assert_eq!(faults(&host), [""; 0]);
        let checked = check_one(&host.root, vmid());
        let checks: Vec<&str> = checked
            .findings
            .iter()
            .map(|finding| finding.check)
            .collect();
        assert_eq!(
            checks,
            [
                "hookscript",
                "isolated",
                "pins",
                "governor",
                "affinity",
                "other VMs",
                "irqbalance",
                "SMT",
                "isolated",
                "method",
                "command line",
                "containers",
                "profiles",
                "recover",
                "L3",
                "NUMA",
                "vCPUs",
                "guest cores",
                "kinds",
                "hugepages",
                "helpers"
            ]
        );
        let text = to_text(100, &checked, Level::Ok);
        assert!(
            text.contains("isolated      CPU 6-11,18-23, leaves CPU 0-5,12-17 for housekeeping\n"),
            "{text}"
        );
    }

    /// A host with one fault each, and the finding.
    #[test]
    fn vcpus_far_from_their_memory_are_found() {
        let host = MadeUpHost::new("epyc2x7313");
        let cells = "cores: 8\nmemory: 4096\nnuma: 1\n\
                     numa0: cpus=0-3,hostnodes=0,memory=2048,policy=bind\n\
                     numa1: cpus=4-7,hostnodes=1,memory=2048,policy=bind\n";
        let numa = |conf: &str, pins: &str| {
            host.conf(100, conf);
            let isolated = "isolated = \"8-11,16-19,40-43,48-51\"";
            host.settings(100, &format!("{isolated}\npins = \"{pins}\""));
            let findings = check_one(&host.root, vmid()).findings;
            let found = findings.iter().find(|finding| finding.check == "NUMA");
            found.unwrap().what.clone()
        };
        let right = numa(cells, "8,9,10,11,16,17,18,19");
        assert_eq!(right, "CPUs on node 0-1; memory is bound to node 0-1");
        assert_eq!(
            numa(cells, "16,17,18,19,8,9,10,11"),
            "vCPUs 0-7 are on other nodes than their memory"
        );
        assert_eq!(
            numa(cells, "8,9,10,16,11,17,18,19"),
            "vCPUs 3-4 are on other nodes than their memory"
        );
        assert_eq!(
            numa(&cells.replace("hostnodes=1", "hostnodes=5"), "auto"),
            "memory is bound to node 5; this host has node 0-1"
        );
        // vCPUs that no node is bound to are placed beside those of the cells.
        let more = cells.replace("cores: 8", "cores: 10\nvcpus: 8\nhotplug: cpu");
        assert_eq!(
            numa(&more, "auto"),
            "CPUs on node 0-1; memory is bound to node 0-1"
        );
    }

    #[test]
    fn each_fault_is_found_with_its_fix() {
        type Arrange = fn(&MadeUpHost);
        let cases: [(Arrange, &str); 32] = [
            (
                |h| h.conf(100, &CONF.replace("hookscript", "#")),
                "warn hookscript: not set: Proxmox VE does not call hook for this VM => hook install 100",
            ),
            (
                |h| std::fs::remove_file(h.root.path(HOOK)).unwrap(),
                "error hookscript: /var/lib/vz/snippets/hook: No such file or directory => \
                 hook install 100",
            ),
            (
                |h| h.mode(HOOK, 0o644),
                "error hookscript: /var/lib/vz/snippets/hook: not executable => chmod 0755 /var/lib/vz/snippets/hook",
            ),
            (
                |h| h.settings(100, "layout = 5"),
                "error settings: /etc/pinfold/100.toml: ",
            ),
            (
                |h| {
                    h.settings(
                        100,
                        "isolated = \"6-11,18-23\"\npins = \"6,18,7,19,8,20,9,21,10,22,11,23\"\nmin_housekeeping = 13",
                    )
                },
                "error isolated: 6-11,18-23 leaves 12 housekeeping CPUs, fewer than \
                 min_housekeeping = 13 => isolate fewer",
            ),
            (
                |h| h.file("sys/devices/system/cpu/online", "0-10,12-23"),
                "error isolated: CPU 11: offline; online are 0-10,12-23 => ",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\nemulator = \"5-6\""),
                "error emulator: CPU 6 is isolated => give emulator threads housekeeping CPUs",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\niothreads = \"24\""),
                "error iothreads: CPU 24: no such CPU; this host has 0-23 => ",
            ),
            (
                |h| {
                    h.conf(100, &CONF.replace("12", "14").replace("cores=6", "cores=7"));
                },
                "error pins: the VM has 14 vCPUs but only 12 pins => add pins or remove vCPUs",
            ),
            (
                |h| std::fs::remove_file(h.root.path("sys/fs/cgroup/cgroup.controllers")).unwrap(),
                "error method: /sys/fs/cgroup/cgroup.controllers: no unified cgroup hierarchy \
                 (v2) here; boot without systemd.unified_cgroup_hierarchy=0 => ",
            ),
            (
                |h| {
                    let policy = "sys/devices/system/cpu/cpufreq/policy6";
                    for (file, text) in [
                        ("related_cpus", "6"),
                        ("scaling_governor", "x"),
                        ("scaling_available_governors", "x y"),
                    ] {
                        h.file(&format!("{policy}/{file}"), text);
                    }
                },
                "error governor: no \"performance\" for CPU 6 => available: x, y",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\naffinity: 0-3")),
                "warn affinity: VM 100: `affinity: 0-3` is also set; the pins take precedence => \
                 remove it: qm set 100 --delete affinity",
            ),
            (
                |h| h.conf(101, "affinity: 8-9"),
                "warn other VMs: VM 101 has `affinity: 8-9`, and all of these CPUs are isolated: \
                 it cannot start while VM 100 runs => use other CPUs: qm set 101 --affinity LIST",
            ),
            (
                |h| h.thread(900, 900, "irqbalance", "0-23", 0),
                "warn irqbalance: irqbalance (process 900) moves IRQs back within 10 s => \
                 stop it, or set IRQBALANCE_BANNED_CPULIST=6-11,18-23",
            ),
            (
                |h| {
                    h.file(
                        "proc/cmdline",
                        "quiet isolcpus=managed_irq,domain,6-11,18-23",
                    )
                },
                "warn command line: isolcpus=managed_irq,domain,6-11,18-23 isolates these CPUs \
                 even while the VM does not run => remove it: hook isolates them while the VM runs",
            ),
            (
                |h| h.file("proc/cmdline", "nohz_full=6-11 quiet"),
                "warn command line: nohz_full=6-11 includes only some of the isolated CPUs, so \
                 vCPUs behave differently => set nohz_full=6-11,18-23, or remove it; see docs/noise.md",
            ),
            (
                |h| h.file("proc/cmdline", "isolcpus=nohz,managed_irq,6-11"),
                "warn command line: isolcpus=nohz,managed_irq,6-11 includes only some of the isolated CPUs, so vCPUs \
                 behave differently => set isolcpus=nohz,managed_irq,6-11,18-23, or remove it; see docs/noise.md",
            ),
            (
                |h| h.file("proc/cmdline", "rcu_nocbs=1"),
                "warn command line: rcu_nocbs=1 includes only some of the isolated CPUs, so vCPUs \
                 behave differently => set rcu_nocbs=6-11,18-23, or remove it; see docs/noise.md",
            ),
            (
                |h| {
                    h.conf(100, &CONF.replace("12", "4").replace("cores=6", "cores=2"));
                    h.settings(100, "isolated = \"5-6,17-18\"\npins = \"5,17,6,18\"");
                },
                "warn L3: CPU 5-6,17-18 is split across llc:0, llc:1: vCPUs share caches with the \
                 host => 1 would be enough; `hook layout` shows which CPUs share one",
            ),
            (
                |h| {
                    h.conf(100, "cores: 1\nhookscript: local:snippets/hook");
                    h.settings(100, "isolated = \"6\"\npins = [6]");
                },
                "warn SMT: CPU 6 does not include all SMT siblings: what runs on them slows the \
                 VM's cores => isolate whole cores; `hook layout` shows them",
            ),
            (
                |h| {
                    h.conf(100, &CONF.replace("12", "10").replace("cores=6", "cores=5"));
                },
                "warn vCPUs: 10, but 12 pins: CPU 11,23 is isolated but unused => \
                 give the VM more cores, or isolate fewer CPUs",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\nfoo: x\u{1b}")),
                "warn VMID.conf: line 6: `foo: x\\u{1b}`: unknown setting; \
                 Proxmox VE ignores it => correct or remove it in /etc/pve/qemu-server/100.conf",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\nhugepages: 2")),
                "warn VMID.conf: Proxmox VE refuses to start: hugepages needs `numa: 1` => ",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\nhostpci0: 0b:07")),
                "warn VMID.conf: Proxmox VE refuses to start: hostpci0: no device 0000:0b:07 on this host => ",
            ),
            (
                |h| h.conf(100, &CONF.replace("args", "#")),
                "warn guest cores: vCPUs 0 and 1, 2 and 3, … are threads of one core, but the \
                 guest sees each as a core of its own => \
                 qm set 100 --args '-smp 12,sockets=1,cores=6,threads=2,maxcpus=12'",
            ),
            (
                |h| {
                    let pins = "6,6,6,6,7,7,7,7,8,9,10,11";
                    h.settings(
                        100,
                        &format!("isolated = \"6-11,18-23\"\npins = \"{pins}\""),
                    );
                },
                "warn pins: vCPUs 0-3 share CPU 6, 4-7 share CPU 7 => give each vCPU a CPU of its own, or write \
                 pins = \"auto\"",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\nidle_vm = 100"),
                "error idle_vm: VM 100 is this VM itself => name another one",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\nidle_vm = 777"),
                "warn idle_vm: VM 777: no such VM on this node: there is no /etc/pve/qemu-server/777.conf => \
                 `qm list` shows the VMs of this node",
            ),
            (
                |h| {
                    let text = "layout = \"5900x\"\nchain = [\"local:snippets/gone.pl\"]";
                    h.settings(100, text);
                },
                "error chain: local:snippets/gone.pl: /var/lib/vz/snippets/gone.pl: No such file or directory => \
                 correct or remove it in chain",
            ),
            (
                |h| h.settings(100, "isolated = \"6-11,18-23\"\npins = \"6-11,18-23\""),
                "warn guest cores: the guest sees vCPUs 0-1, 2-3, … as threads of one core each, \
                 but 6 of these are on several host cores => \
                 put the threads of a core next to each other: pins = \
                 \"6,18,7,19,8,20,9,21,10,22,11,23\"",
            ),
            (
                |h| {
                    h.vm(102, &[6]);
                    h.reserve(102, Phase::Isolated, "isolated = \"6\"\npins = [6]");
                },
                "error isolated: CPU 6 is isolated for VM 102, which runs => stop it or choose others",
            ),
            (
                |h| {
                    h.vm(102, &[]);
                    h.reserve(102, Phase::Isolated, "isolated = \"0\"\npins = [0]");
                    h.mode("run/pinfold/state.json", 0o644);
                },
                "error state: ",
            ),
        ];
        let mut wrong = Vec::new();
        for (arrange, fault) in cases {
            let host = host();
            arrange(&host);
            let faults = faults(&host);
            let open_ended = |found: &String| fault.ends_with(": ") && found.starts_with(fault);
            match faults.as_slice() {
                [found] if found == fault || open_ended(found) => {}
                _ => wrong.push((fault, faults)),
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Reports from the field: a host, and what `hook check` has to report.
    #[test]
    fn findings_from_the_field() {
        type Arrange = fn(&MadeUpHost);
        let boot_display: Arrange = |h| {
            for (function, vga) in [("0", "1"), ("1", "0")] {
                let folder = format!("sys/bus/pci/devices/0000:0b:00.{function}");
                h.file(&format!("{folder}/class"), "0x030000");
                h.file(&format!("{folder}/boot_vga"), vga);
            }
            h.conf(100, &format!("{CONF}\nhostpci0: 0000:0b:00"));
            h.settings(100, "layout = \"5900x\"\nreset_pci = true");
        };
        let cases: [(Arrange, &str); 22] = [
            (
                |h| {
                    h.conf(
                        100,
                        &CONF.replace("local:snippets/hook", "nas:snippets/gpu.pl"),
                    )
                },
                "warn hookscript: nas:snippets/gpu.pl is not hook: nothing is isolated for this VM => let hook run it too: hook install 100",
            ),
            (
                |h| {
                    h.file("var/lib/vz/snippets/exec-cmds", "#!/bin/bash");
                    h.mode("var/lib/vz/snippets/exec-cmds", 0o755);
                    h.conf(100, &CONF.replace("snippets/hook", "snippets/exec-cmds"));
                },
                "warn hookscript: /var/lib/vz/snippets/exec-cmds is not hook: nothing is isolated for this VM => let hook run it too: hook install 100",
            ),
            (
                boot_display,
                "warn reset_pci: PCI 0000:0b:00.0 is not reset: it is the boot display => \
                 write reset_pci = false, or only the others: reset_pci = [\"0000:0b:00.1\"]",
            ),
            (
                |h| {
                    h.file("sys/bus/pci/devices/0000:0b:00.0/class", "0x030000");
                    h.settings(100, "layout = \"5900x\"\nreset_pci = [\"0000:c5:00\"]");
                },
                "warn reset_pci: PCI 0000:c5:00.0: no such device on this host => correct the address; `pci-reset --list` shows all devices",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\nhugepages: 1024")),
                "warn VMID.conf: Proxmox VE refuses to start: hugepages needs `numa: 1` => ",
            ),
            (
                |h| {
                    h.conf(
                        100,
                        &format!("{CONF}\nnuma0: cpus=0-11,hostnodes=0,memory=4096,policy=bind"),
                    )
                },
                "warn numa: numa0 has no effect without `numa: 1`: no memory is bound to a node => qm set 100 --numa 1",
            ),
            (
                |h| h.file("proc/cmdline", "isolcpus=managed_irq,domain,6-N"),
                "warn command line: isolcpus=managed_irq,domain,6-N isolates these CPUs even while the VM does not run, \
                 and takes CPU 12-17 from the host too => remove it: hook isolates them while the VM runs",
            ),
            (
                |h| {
                    h.file(
                        "proc/cmdline",
                        "nohz_full=6-11,18-N rcu_nocbs=all irqaffinity=0-15",
                    )
                },
                "warn command line: irqaffinity=0-15 puts new IRQs on CPU 6-11, which are isolated => \
                 set irqaffinity=0-5,12-17, or remove it",
            ),
            (
                |h| h.file("proc/cmdline", "nohz_full=x"),
                "warn command line: nohz_full=x contains CPUs that the kernel cannot parse => correct or remove it",
            ),
            (
                |h| h.file("etc/pve/lxc/201.conf", "lxc.cgroup2.cpuset.cpus: 8-11"),
                "warn containers: container 201 is pinned to CPU 8-11, and all of these are isolated => \
                 give it others: lxc.cgroup2.cpuset.cpus in its settings",
            ),
            (
                |h| h.thread(900, 900, "tuned", "0-23", 0),
                "warn profiles: tuned (process 900) may overwrite the isolated CPUs' governors and masks => \
                 systemctl disable --now tuned; hook sets the governor while the VM runs",
            ),
            (
                |h| h.thread(900, 900, "power-profiles-", "0-23", 0),
                "warn profiles: power-profiles-daemon (process 900) may overwrite the isolated CPUs' governors and masks => \
                 systemctl disable --now power-profiles-daemon; hook sets the governor while the VM runs",
            ),
            (
                |h| h.conf(100, &CONF.replace("EPYC-v4", "host")),
                "warn topoext: the CPU model has no topoext, so that a guest on AMD does not see which vCPUs share a core => add ",
            ),
            (
                |h| {
                    h.conf(
                        100,
                        "cores: 12\nhotplug: disk,cpu\nargs: -device ivshmem\nhookscript: local:snippets/hook",
                    );
                },
                "warn guest cores: vCPUs 0 and 1, 2 and 3, … are threads of one core, but the guest sees each as a core of its own => \
                 qm set 100 --args '-device ivshmem -smp 12,sockets=1,cores=6,threads=2,maxcpus=12' --hotplug disk",
            ),
            (
                |h| h.file("sys/module/spl/parameters/spl_taskq_thread_bind", "1"),
                "warn zfs: spl_taskq_thread_bind=1 binds threads of ZFS to CPUs, CPU 6-11,18-23 among them; they cannot be moved => write ",
            ),
            (
                |h| std::fs::remove_file(h.root.path(RECOVER)).unwrap(),
                "warn recover: pinfold-recover.path is not enabled: CPUs of a VM that is killed stay isolated until hook runs again => \
                 systemctl enable --now pinfold-recover.path",
            ),
            (
                |h| {
                    h.file(
                        "etc/pve/storage.cfg",
                        "dir: local\n\tpath /var/lib/vz\n\tcontent iso,backup\n",
                    );
                },
                "warn storage: storage local does not allow snippets => pvesm set local --content iso,backup,snippets",
            ),
            (
                |h| h.mode(HOOK, 0o777),
                "warn hookscript: /var/lib/vz/snippets/hook: group or others can write it, and root runs it => \
                 chown root: /var/lib/vz/snippets/hook && chmod 0755 /var/lib/vz/snippets/hook",
            ),
            (
                |h| h.file(HOOK, "x pinfold hook 0.0.1"),
                "warn hookscript: /var/lib/vz/snippets/hook is hook 0.0.1, and this is ",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\npinning: 1")),
                "warn pinning: VM 100: `pinning: 1` is also set; the pins take precedence => remove it: qm set 100 --delete pinning",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\nignore = [\"smp\"]"),
                "warn settings: ignore has smp, which is not the key of a finding => the keys are affinity, ",
            ),
            (
                |h| {
                    h.conf(100, "cores: 4\nhookscript: local:snippets/hook");
                    h.settings(
                        100,
                        "isolated = \"5-6,17-18,7,19,8,20\"\npins = \"5,6,7,8\"",
                    );
                },
                "warn L3: CPU 5-8,17-20 is split across llc:0, llc:1: vCPUs share caches with the host => \
                 1 would be enough; `hook layout` shows which CPUs share one",
            ),
        ];
        let mut wrong = Vec::new();
        for (arrange, fault) in cases {
            let host = host();
            arrange(&host);
            let faults = faults(&host);
            if !faults.iter().any(|found| found.starts_with(fault)) || faults.len() != 1 {
                wrong.push((fault, faults));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn vcache_is_compared_only_with_vcache() {
        let host = host_of("9950x3d", "isolated = \"1-7,17-23\"\npins = \"auto\"");
        host.conf(100, "cores: 8\nhookscript: local:snippets/hook");
        assert_eq!(faults(&host), [""; 0]);
    }

    #[test]
    fn huge_pages_that_proxmox_ve_has_to_make() {
        let host = host_of("epyc2x7313", "isolated = \"4-7,36-39\"\npins = \"auto\"");
        host.conf(
            100,
            "cores: 4\nhugepages: 1024\nnuma: 1\nmemory: 20480\nhookscript: local:snippets/hook",
        );
        for node in [0, 1] {
            for file in ["nr_hugepages", "free_hugepages"] {
                let folder = "hugepages/hugepages-1048576kB";
                host.file(
                    &format!("sys/devices/system/node/node{node}/{folder}/{file}"),
                    "10",
                );
            }
        }
        let fault = "warn hugepages: node 0: 10 of 20 1G pages are free; Proxmox VE has to make 10 at the start => \
                     reserve them at boot, as with hugepagesz=1G hugepages=N, while memory is not fragmented";
        assert_eq!(faults(&host), [fault]);
    }

    #[test]
    fn what_a_real_time_policy_starves_is_reported() {
        let host = host();
        let settings = |pins: &str| {
            let text = format!("isolated = \"6,18\"\npins = {pins}\nvcpu_policy = \"fifo:1\"");
            host.settings(100, &text);
        };
        let found = || -> Vec<String> {
            let mut faults = faults(&host);
            faults.retain(|fault| fault.contains("vcpu_policy"));
            faults
        };
        host.conf(100, "cores: 2\nhookscript: local:snippets/hook");
        settings("\"6,18\"");
        let starves = "warn vcpu_policy: fifo:1: while a vCPU computes, the kernel threads of its CPU (ksoftirqd, \
                       kworker, RCU callbacks) wait";
        let kinder = "kernel options rcu_nocbs=6,18 and nohz_full=6,18 leave them less to do; `hook jitter VMID --fifo` measures, before the VM starts";
        assert_eq!(
            found(),
            [format!(
                "{starves}; they get 50 of 1000 ms at once, and the vCPU waits that long => {kinder}"
            )]
        );
        host.file("proc/sys/kernel/sched_rt_period_us", "1000000");
        host.file("proc/sys/kernel/sched_rt_runtime_us", "-1");
        assert_eq!(
            found(),
            [format!(
                "{starves} without end, since kernel.sched_rt_runtime_us is -1: RCU stalls, and the host may hang => \
                 sysctl kernel.sched_rt_runtime_us=950000"
            )]
        );
        settings("\"6,6\"");
        let shared = "warn vcpu_policy: fifo:1: one of vCPUs 0-1, which share CPU 6, keeps the others from running => \
                      give each vCPU a CPU of its own, or leave vcpu_policy out";
        assert_eq!(found(), [shared]);
    }

    #[test]
    fn warnings_are_muted_by_their_keys_and_errors_are_not() {
        let host = host();
        host.conf(100, "cores: 1\nhookscript: local:snippets/hook");
        let settings = "isolated = \"6\"\npins = [6]";
        host.settings(100, settings);
        assert_eq!(faults(&host).len(), 1);
        host.settings(100, &format!("{settings}\nignore = [\"smt\"]"));
        assert_eq!(faults(&host), [""; 0]);
        host.conf(100, "cores: 2\nhookscript: local:snippets/hook");
        host.settings(100, &format!("{settings}\nignore = [\"smt\", \"pins\"]"));
        assert_eq!(faults(&host).len(), 1, "an error stays");
        for finding in check_one(&host.root, vmid()).findings {
            assert!(KEYS.contains(&finding.key().as_str()), "{}", finding.key());
        }
    }

    #[test]
    fn settings_that_fit_the_host_have_no_faults() {
        for (number, arrange) in ([
            |h| h.file("proc/cmdline", "nohz_full=6-11,18-23 rcu_nocbs=6-11,18-23"),
            |h| h.file("proc/cmdline", "isolcpus=managed_irq,6-11,18-23"),
            |h| h.conf(101, "affinity: 0-9"),
            |h| {
                h.conf(
                    100,
                    &CONF.replace("local:snippets/hook", "nas:snippets/hook"),
                )
            },
            |h| {
                h.settings(
                    100,
                    "layout = \"5900x\"\nemulator = \"0-5\"\niothreads = \"4\"",
                )
            },
            |h| {
                h.file(
                    "sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages",
                    "4",
                )
            },
        ] as [fn(&MadeUpHost); 6])
            .into_iter()
            .enumerate()
        {
            let host = host();
            arrange(&host);
            assert_eq!(faults(&host), [""; 0], "case {number}");
        }
    }

    #[test]
    fn huge_pages_belong_on_the_nodes_of_the_cpus() {
        let settings = "isolated = \"1,3,5,7,9,11,13,15\"\npins = \"1,9,3,11,5,13,7,15\"";
        let host = host_of("two-sockets", settings);
        host.conf(
            100,
            &format!(
                "{}\nnuma: 1\nhugepages: 1024",
                CONF.replace("12", "8").replace("cores=6", "cores=4")
            ),
        );
        let pages = |node, count| {
            let path = format!(
                "sys/devices/system/node/node{node}/hugepages/hugepages-1048576kB/nr_hugepages"
            );
            host.file(&path, count);
        };
        pages(0, "8");
        pages(1, "0");
        let fault = "warn hugepages: all on node 0, but the isolated CPUs are on node 1 => reserve them there, in \
                     /sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages";
        assert_eq!(faults(&host), [fault]);
        pages(1, "8");
        assert_eq!(faults(&host), [""; 0]);
    }

    #[test]
    fn helpers_go_with_the_emulator_threads() {
        let host = host();
        let reported = || check_one(&host.root, vmid()).findings.pop().unwrap().what;
        assert_eq!(reported(), "none");
        host.conf(100, &format!("{CONF}\ntpmstate0: local:x"));
        assert_eq!(
            reported(),
            "swtpm goes with the emulator threads to the housekeeping CPUs"
        );
        host.conf(
            100,
            &format!("{CONF}\ntpmstate0: local:x\nvirtiofs0: share"),
        );
        host.settings(100, "layout = \"5900x\"\nemulator = \"0-1\"");
        assert_eq!(
            reported(),
            "swtpm and virtiofsd go with the emulator threads to CPU 0-1"
        );
    }

    #[test]
    fn without_a_number_all_vms_that_use_hook() {
        let host = host();
        host.conf(101, "cores: 1");
        host.conf(102, "hookscript: local:snippets/hook");
        host.conf(103, "hookscript: local:snippets/hook\ntemplate: 1");
        host.conf(104, "hookscript: local:snippets/other.pl");
        host.settings(999, "isolated = \"6\"");
        host.settings(998, "isolated = \"6\"");
        host.file("etc/pve/nodes/other/qemu-server/998.conf", "");
        host.file("etc/pinfold/default.toml", "");
        let ours: Vec<u32> = managed_vms(&SharedReadings::new(&host.root))
            .unwrap()
            .into_iter()
            .map(u32::from)
            .collect();
        assert_eq!(ours, [100, 102, 999]);
        let gone = check_one(&host.root, "999".parse().unwrap());
        let file = host.root.path("etc/pinfold/999.toml").display().to_string();
        let fault = Finding::warn(
            "settings",
            format!("{file} is for a VM that does not exist"),
            format!("rm {file}"),
        );
        assert_eq!(gone.findings, [fault]);
        assert_eq!(
            check_one(&host.root, "997".parse().unwrap()).findings[0].level,
            Level::Error
        );
    }

    #[test]
    fn the_host_is_read_once_for_all_vms() {
        let host = MadeUpHost::new("5900x");
        let ids = [100, 101].map(|vmid| VmId::try_from(vmid).unwrap());
        for vmid in ids {
            host.conf(vmid.into(), CONF);
            host.settings(vmid.into(), "isolated = \"llc:1\"\npins = \"auto\"");
        }
        host.conf(103, "affinity: 6-7");
        host.thread(900, 900, "irqbalance", "0-23", 0);
        let around = SharedReadings::new(&host.root);
        let state = reservations(&host.root);
        let first = check(&around, &state, ids[0]).findings;
        let of = |check: &str| {
            let finding = first.iter().find(|finding| finding.check == check);
            finding.unwrap().clone()
        };
        assert!(of("other VMs").what.contains("VM 103"));
        assert!(of("irqbalance").what.contains("process 900"));
        // None of these is looked at again.
        for gone in ["proc/900", "etc/pve/qemu-server/103.conf"] {
            let path = host.root.path(gone);
            std::fs::remove_dir_all(&path)
                .or_else(|_| std::fs::remove_file(path))
                .unwrap();
        }
        for cpu in 0..24 {
            let cache = format!("sys/devices/system/cpu/cpu{cpu}/cache");
            std::fs::remove_dir_all(host.root.path(cache)).unwrap();
        }
        let second = check(&around, &state, ids[1]).findings;
        for check in ["other VMs", "irqbalance", "L3"] {
            let wanted = of(check).what;
            assert!(
                second.iter().any(|finding| finding.check == check
                    && finding.what.replace("101", "100") == wanted),
                "{wanted}: {second:?}"
            );
        }
    }
}

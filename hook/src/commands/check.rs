//! `hook check`: the checks of pre-start and advice, each with a fix.

use std::collections::BTreeMap;

use anstyle::{AnsiColor, Style};
use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{coloured, print};
use pinfold_core::state::Store;
use pinfold_core::vm::VmConf;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Exit, Host, printable};
use serde::Serialize;
use serde_json::json;

use crate::checks::finding::{Finding, Level};
use crate::checks::{advice, required};
use crate::settings;
use crate::state::reservation::Reservation;

/// The options of `hook check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    vmid: Option<VmId>,
}

/// The folders of settings, the cluster's first.
const SETTINGS: [&str; 2] = ["etc/pve/pinfold", "etc/pinfold"];

/// The findings of a VM.
#[derive(Debug, Serialize)]
struct Checked {
    /// Where its settings come from, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// What was read of VMID.conf, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    read: Option<Read>,
    findings: Vec<Finding>,
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
    fn count(&self, level: Level) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    }
}

/// Runs the command: for one VM, or for all that use hook. Exits with 1 if anything is an error.
///
/// # Errors
/// If /etc/pve cannot be listed, or the result cannot be written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    let vmids = match args.vmid {
        Some(vmid) => vec![vmid],
        None => managed_vms(&root)?,
    };
    let checked: BTreeMap<u32, Checked> = vmids
        .into_iter()
        .map(|vmid| (vmid.into(), check(&root, vmid)))
        .collect();
    let count = |level| {
        checked
            .values()
            .map(|checked| checked.count(level))
            .sum::<usize>()
    };
    let errors = count(Level::Error);
    let text = if output.json {
        let json = json!({"vms": checked, "errors": errors, "warnings": count(Level::Warn)});
        format!("{json:#}\n")
    } else if checked.is_empty() {
        "no VM has settings or uses hook as its hookscript\n".to_owned()
    } else {
        let least = if output.quiet { Level::Warn } else { Level::Ok };
        let texts = checked
            .iter()
            .map(|(vmid, checked)| to_text(*vmid, checked, least));
        coloured(&texts.collect::<String>())
    };
    print(&text)?;
    Ok(if errors == 0 {
        Exit::Success
    } else {
        Exit::Failed
    })
}

/// The VMs with settings of their own, or with hook as their hookscript.
fn managed_vms(root: &Host) -> pinfold_core::Result<Vec<VmId>> {
    let mut vmids = Vec::new();
    for (folder, end) in SETTINGS
        .map(|folder| (folder, ".toml"))
        .into_iter()
        .chain([("etc/pve/qemu-server", ".conf")])
    {
        let names = match root.names(folder) {
            Err(error) if error.is_gone() => continue,
            names => names?,
        };
        let ids = names
            .iter()
            .filter_map(|name| name.strip_suffix(end)?.parse::<VmId>().ok());
        vmids.extend(ids.filter(|vmid| {
            end == ".toml" || vm::conf(root, *vmid).is_ok_and(|conf| calls_hook(&conf))
        }));
    }
    // The cluster's settings are for whichever node has the VM.
    vmids.retain(|vmid| vm::check_exists(root, *vmid).is_ok() || !is_elsewhere(root, *vmid));
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

/// Whether another node of the cluster has the VM.
fn is_elsewhere(root: &Host, vmid: VmId) -> bool {
    let nodes = root.names("etc/pve/nodes").unwrap_or_default();
    nodes
        .iter()
        .any(|node| root.exists(format!("etc/pve/nodes/{node}/qemu-server/{vmid}.conf")))
}

/// All findings of a VM. What cannot be read is a finding too.
fn check(root: &Host, vmid: VmId) -> Checked {
    let told = |check, error: &dyn std::fmt::Display| Finding::error(check, error.to_string(), "");
    let conf = match vm::conf(root, vmid) {
        Ok(conf) => conf,
        Err(error) => {
            let left = SETTINGS
                .map(|folder| format!("{folder}/{vmid}.toml"))
                .into_iter()
                .find(|file| root.exists(file));
            let gone = vm::check_exists(root, vmid).is_err();
            let finding = match left.filter(|_| gone) {
                Some(file) => {
                    let file = root.path(file).display().to_string();
                    Finding::warn(
                        "settings",
                        format!("{file} is for a VM that does not exist"),
                        format!("rm {file}"),
                    )
                }
                None => told("VM", &error),
            };
            return Checked {
                source: None,
                read: None,
                findings: vec![finding],
            };
        }
    };
    let mut findings = vec![advice::hookscript(root, vmid, &conf)];
    let (read, found) = read(root, vmid, &conf);
    findings.extend(found);
    let settings = match settings::load(root, vmid, conf.threads_per_core()) {
        Ok(settings) => settings,
        Err(error) => {
            findings.push(told("settings", &error));
            return Checked {
                source: None,
                read: Some(read),
                findings,
            };
        }
    };
    match required::findings(root, vmid, &conf, &settings) {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(told("host", &error)),
    }
    let reservations = match Store::<Reservation>::peek(root) {
        Ok(state) => state.unwrap_or_default().0,
        Err(error) => {
            findings.push(match error.is_denied() {
                true => Finding::warn(
                    "state",
                    error.to_string(),
                    "only root can read the reservations",
                ),
                false => told("state", &error),
            });
            BTreeMap::new()
        }
    };
    findings.push(required::overlap(&reservations, vmid, &settings));
    // For its next start: while it runs, the reservation has its method.
    findings.push(
        match required::isolation(root, &reservations, vmid, &settings, None) {
            Ok((_, Some(note))) => Finding::ok("method", note),
            Ok((_, None)) => Finding::ok("method", "supported by this kernel"),
            Err(error) => Finding::error("method", error.to_string(), ""),
        },
    );
    match advice::findings(root, vmid, &conf, &settings) {
        Ok(found) => findings.extend(found),
        Err(error) => findings.push(told("host", &error)),
    }
    Checked {
        source: Some(settings.source),
        read: Some(read),
        findings,
    }
}

/// What was read of VMID.conf, and warnings of what Proxmox VE ignores in it and of what keeps the
/// VM from starting so.
fn read(root: &Host, vmid: VmId, conf: &VmConf) -> (Read, Vec<Finding>) {
    const CHECK: &str = "VMID.conf";
    let file = root.path(format!("etc/pve/qemu-server/{vmid}.conf"));
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
    use std::os::unix::fs::PermissionsExt;

    const CONF: &str = "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\nhookscript: local:snippets/hook\nmemory: 4096";
    const HOOK: &str = "var/lib/vz/snippets/hook";

    fn vmid() -> VmId {
        "100".parse().unwrap()
    }

    fn mode(host: &MadeUpHost, path: &str, mode: u32) {
        std::fs::set_permissions(host.root.path(path), std::fs::Permissions::from_mode(mode))
            .unwrap();
    }

    /// A host and a VM 100 without faults.
    fn host_of(machine: &str, settings: &str) -> MadeUpHost {
        let host = MadeUpHost::new(machine);
        host.conf(100, CONF);
        host.settings(100, settings);
        host.file(HOOK, "");
        mode(&host, HOOK, 0o755);
        host
    }

    fn host() -> MadeUpHost {
        host_of("5900x", "layout = \"5900x\"")
    }

    /// Warnings and errors: `warn affinity: what => fix`.
    fn faults(host: &MadeUpHost) -> Vec<String> {
        let findings = check(&host.root, vmid())
            .findings
            .into_iter()
            .filter(|finding| finding.level > Level::Ok);
        let show = |Finding {
                        level,
                        check,
                        what,
                        fix,
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
        let checked = check(&host.root, vmid());
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
                "L3",
                "vCPUs",
                "guest cores",
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
    fn each_fault_is_found_with_its_fix() {
        type Arrange = fn(&MadeUpHost);
        let cases: [(Arrange, &str); 27] = [
            (
                |h| h.conf(100, &CONF.replace("hookscript", "#")),
                "warn hookscript: not set: Proxmox VE does not call hook for this VM => qm set 100 --hookscript local:snippets/hook",
            ),
            (
                |h| std::fs::remove_file(h.root.path(HOOK)).unwrap(),
                "error hookscript: /var/lib/vz/snippets/hook: No such file or directory => copy hook there: install -m 0755 $(command -v hook) /var/lib/vz/snippets/hook",
            ),
            (
                |h| mode(h, HOOK, 0o644),
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
                "error isolated: 6-11,18-23 leaves 12 housekeeping CPUs, fewer than min_housekeeping = 13 => isolate fewer",
            ),
            (
                |h| h.file("sys/devices/system/cpu/online", "0-10,12-23"),
                "error isolated: CPU 11: offline; online are 0-10,12-23 => ",
            ),
            (
                |h| h.settings(100, "layout = \"5900x\"\nemulator = \"5-6\""),
                "error emulator: CPU 6 is isolated => emulator threads belong on others",
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
                "error method: /sys/fs/cgroup/cgroup.controllers: no unified cgroup hierarchy (v2) here; boot without systemd.unified_cgroup_hierarchy=0 => ",
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
                "error governor: no \"performance\" for CPU 6 => there is x, y",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\naffinity: 0-3")),
                "warn affinity: VM 100: `affinity: 0-3` is also set; the pins take precedence => remove it: qm set 100 --delete affinity",
            ),
            (
                |h| h.conf(101, "affinity: 8-9"),
                "warn other VMs: VM 101 has `affinity: 8-9`, and all of these CPUs are isolated: it cannot start while VM 100 runs => use other CPUs: qm set 101 --affinity LIST",
            ),
            (
                |h| h.thread(900, 900, "irqbalance", "0-23", 0),
                "warn irqbalance: irqbalance (process 900) moves IRQs back within 10 s => stop it, or set IRQBALANCE_BANNED_CPULIST=6-11,18-23",
            ),
            (
                |h| {
                    h.file(
                        "proc/cmdline",
                        "quiet isolcpus=managed_irq,domain,6-11,18-23",
                    )
                },
                "warn command line: isolcpus=managed_irq,domain,6-11,18-23 isolates these CPUs even while the VM does not run => remove it: hook isolates them while the VM runs",
            ),
            (
                |h| h.file("proc/cmdline", "nohz_full=6-11 quiet"),
                "warn command line: nohz_full=6-11 includes only some of the isolated CPUs, so vCPUs behave differently => set nohz_full=6-11,18-23, or remove it",
            ),
            (
                |h| h.file("proc/cmdline", "rcu_nocbs=1"),
                "warn command line: rcu_nocbs=1 includes only some of the isolated CPUs, so vCPUs behave differently => set rcu_nocbs=6-11,18-23, or remove it",
            ),
            (
                |h| {
                    h.conf(100, &CONF.replace("12", "4").replace("cores=6", "cores=2"));
                    h.settings(100, "isolated = \"5-6,17-18\"\npins = \"5,17,6,18\"");
                },
                "warn L3: CPU 5-6,17-18 is split across llc:0, llc:1: vCPUs share caches with the host => 1 would be enough; `hook layout` shows which CPUs share one",
            ),
            (
                |h| {
                    h.conf(100, "cores: 1\nhookscript: local:snippets/hook");
                    h.settings(100, "isolated = \"6\"\npins = [6]");
                },
                "warn SMT: CPU 6 does not include all SMT siblings: what runs on them slows the VM's cores => isolate whole cores; `hook layout` shows them",
            ),
            (
                |h| {
                    h.conf(100, &CONF.replace("12", "10").replace("cores=6", "cores=5"));
                },
                "warn vCPUs: 10, but 12 pins: CPU 11,23 is isolated but unused => give the VM more cores, or isolate fewer CPUs",
            ),
            (
                |h| h.conf(100, &format!("{CONF}\nfoo: x\u{1b}")),
                "warn VMID.conf: line 5: `foo: x\\u{1b}`: unknown setting; Proxmox VE ignores it => correct or remove it in /etc/pve/qemu-server/100.conf",
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
                "warn guest cores: vCPUs 0 and 1, 2 and 3, … are threads of one core, but the guest sees each as a core of its own => qm set 100 --args '-smp 12,sockets=1,cores=6,threads=2'",
            ),
            (
                |h| h.settings(100, "isolated = \"6-11,18-23\"\npins = \"6-11,18-23\""),
                "warn guest cores: the guest sees vCPUs 0 and 1, 2 and 3, … as threads of one core, but their pins are on two cores => put the threads of a core next to each other: pins = \"6,18,7,19,8,20,9,21,10,22,11,23\"",
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
                    mode(h, "run/pinfold/state.json", 0o644);
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

    #[test]
    fn settings_that_fit_the_host_have_no_faults() {
        for (number, arrange) in ([
            |h| h.file("proc/cmdline", "nohz_full=6-11,18-23 rcu_nocbs=6-11,18-23"),
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
        ] as [fn(&MadeUpHost); 5])
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
        let told = || check(&host.root, vmid()).findings.pop().unwrap().what;
        assert_eq!(told(), "none");
        host.conf(100, &format!("{CONF}\ntpmstate0: local:x"));
        assert_eq!(
            told(),
            "swtpm goes with the emulator threads to the housekeeping CPUs"
        );
        host.conf(
            100,
            &format!("{CONF}\ntpmstate0: local:x\nvirtiofs0: share"),
        );
        host.settings(100, "layout = \"5900x\"\nemulator = \"0-1\"");
        assert_eq!(
            told(),
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
        let ours: Vec<u32> = managed_vms(&host.root)
            .unwrap()
            .into_iter()
            .map(u32::from)
            .collect();
        assert_eq!(ours, [100, 102, 999]);
        let gone = check(&host.root, "999".parse().unwrap());
        let file = host.root.path("etc/pinfold/999.toml").display().to_string();
        let fault = Finding::warn(
            "settings",
            format!("{file} is for a VM that does not exist"),
            format!("rm {file}"),
        );
        assert_eq!(gone.findings, [fault]);
        assert_eq!(
            check(&host.root, "997".parse().unwrap()).findings[0].level,
            Level::Error
        );
    }
}

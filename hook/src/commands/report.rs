//! `hook report`: what a bug report needs, without what is secret or names something of the owner's.

use std::time::Duration;

use anyhow::{anyhow, ensure};
use pinfold_core::cli::terminal::{plain, print, print_json};
use pinfold_core::cli::{Output, in_words};
use pinfold_core::state::store;
use pinfold_core::vm::{self, HostDevices, VmId};
use pinfold_core::{Exit, Host, printable};
use serde::Serialize;
use serde_json::json;

use super::{check, layout, plan, status};
use crate::checks::script;
use crate::exec;
use crate::settings::{self, Loaded};
use crate::snippet;
use crate::state::counters;

/// The options of `hook report`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    vmid: VmId,
}

/// The exit codes of the command.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0   the report is complete
  1   no such VM
  2   the command line is wrong
  64  parts of it could not be read; the rest is printed";

/// How many columns the picture of the host may have.
const COLUMNS: usize = 100;

/// How long journalctl may take, and how many of the last messages are printed.
const JOURNAL_DEADLINE: Duration = Duration::from_secs(10);
const JOURNAL_LINES: &str = "200";

/// Packages that matter, as far as they are installed.
const PACKAGES: [&str; 11] = [
    "irqbalance",
    "libpve-common-perl",
    "pinfold",
    "power-profiles-daemon",
    "proxmox-ve",
    "pve-container",
    "pve-manager",
    "pve-qemu-kvm",
    "qemu-server",
    "systemd",
    "tuned",
];

/// What parameters of the kernel's command line that matter begin with. Others may be secret.
const PARAMETERS: [&str; 39] = [
    "acpi",
    "amd_iommu",
    "amd_pstate",
    "cgroup",
    "clocksource",
    "cpuidle.",
    "default_hugepagesz",
    "hpet",
    "hugepages",
    "hugepagesz",
    "idle",
    "intel_idle.",
    "intel_iommu",
    "intel_pstate",
    "iommu",
    "irqaffinity",
    "isolcpus",
    "kthread_cpus",
    "kvm",
    "managed_irq",
    "maxcpus",
    "mitigations",
    "nmi_watchdog",
    "nohz",
    "nosmt",
    "nowatchdog",
    "nr_cpus",
    "numa",
    "pci",
    "possible_cpus",
    "preempt",
    "processor.",
    "quiet",
    "rcu",
    "skew_tick",
    "systemd.unified_cgroup_hierarchy",
    "threadirqs",
    "tsc",
    "workqueue.",
];

/// A part of the report.
#[derive(Debug, Serialize)]
struct Part {
    part: &'static str,
    /// What was found, or why it could not be.
    text: Option<String>,
    error: Option<String>,
}

/// How a part is read.
type Read = fn(&Host, VmId) -> anyhow::Result<String>;

/// The parts, in order.
const PARTS: [(&str, Read); 11] = [
    ("packages", |root, _| packages(root)),
    ("kernel", |root, _| kernel(root)),
    ("command line", |root, _| {
        Ok(command_line(&root.read("proc/cmdline")?))
    }),
    ("topology", |root, _| topology(root)),
    ("VMID.conf", |root, vmid| Ok(vm::outline(root, vmid)?)),
    ("settings", settings_of),
    ("plan", plan::text),
    ("check", |root, vmid| Ok(check::text(root, vmid))),
    ("status", |root, _| status::text_of(root, COLUMNS)),
    ("last run", last_run),
    ("journal", journal),
];

/// The command's whole run. A part that cannot be read does not stop the others. `version` is that
/// of this program.
///
/// # Errors
/// If there is no such VM, or the result cannot be written.
pub(crate) fn run(args: &Args, output: &Output, version: &str) -> anyhow::Result<Exit> {
    let root = output.root();
    let parts = collect(&root, args.vmid, version)?;
    if output.json {
        print_json(&json!({"vm": args.vmid, "parts": parts}))?;
    } else {
        print(&printable(&to_text(args.vmid, &parts)))?;
    }
    Ok(match parts.iter().any(|part| part.error.is_some()) {
        true => Exit::Partial,
        false => Exit::Success,
    })
}

fn collect(root: &Host, vmid: VmId, version: &str) -> anyhow::Result<Vec<Part>> {
    vm::check_exists(root, vmid)?;
    let hidden = Hidden::of(root, vmid);
    let mut parts = vec![Part {
        part: "hook",
        text: Some(format!(
            "this program: {version}\n{}{}",
            in_storage(root, vmid),
            writer(root)
        )),
        error: None,
    }];
    for (part, read) in PARTS {
        let (text, error) = match read(root, vmid) {
            Ok(text) => (Some(hidden.without(&plain(&text))), None),
            Err(error) => {
                let why = hidden.without(&in_words(&error));
                (None, Some(why.trim_end().to_owned()))
            }
        };
        parts.push(Part { part, text, error });
    }
    Ok(parts)
}

/// As Markdown, which issue trackers show.
fn to_text(vmid: VmId, parts: &[Part]) -> String {
    let mut text = format!("# Pinfold report of VM {vmid}\n");
    for Part {
        part,
        text: found,
        error,
    } in parts
    {
        let body = match (found, error) {
            (_, Some(error)) => format!("(not read: {error})\n"),
            (Some(found), None) if found.is_empty() => "(nothing)\n".to_owned(),
            (Some(found), None) => found.clone(),
            (None, None) => String::new(),
        };
        text += &format!("\n## {part}\n\n```text\n{}\n```\n", body.trim_end());
    }
    text
}

/// The version of the hook that Proxmox VE calls.
fn in_storage(root: &Host, vmid: VmId) -> String {
    let version = vm::conf(root, vmid)
        .ok()
        .and_then(|conf| conf.hookscript)
        .and_then(|volume| vm::snippet(root, &volume))
        .and_then(|(_, path)| script::version(root, &path));
    match version {
        Some(version) => format!("hookscript: {version}\n"),
        None => "hookscript: not hook, or not found\n".to_owned(),
    }
}

/// The version of the hook that wrote the state last.
fn writer(root: &Host) -> String {
    let version = match store::kept(root, store::WRITER) {
        Ok(version) => version.unwrap_or_else(|| "-".to_owned()),
        Err(error) => error.to_string(),
    };
    format!("state written by: {version}\n")
}

fn packages(root: &Host) -> anyhow::Result<String> {
    let (mut text, mut package) = (String::new(), String::new());
    root.for_each_line("var/lib/dpkg/status", |line| {
        if let Some(name) = line.strip_prefix("Package: ") {
            name.clone_into(&mut package);
        } else if let Some(version) = line.strip_prefix("Version: ")
            && PACKAGES.contains(&package.as_str())
        {
            text += &format!("{package} {version}\n");
        }
    })?;
    Ok(text)
}

fn kernel(root: &Host) -> anyhow::Result<String> {
    let mut text = format!("release: {}", root.read("proc/sys/kernel/osrelease")?);
    for (name, file) in [
        ("version", "proc/sys/kernel/version"),
        ("controllers", "sys/fs/cgroup/cgroup.controllers"),
        ("isolated", "sys/devices/system/cpu/isolated"),
        ("nohz_full", "sys/devices/system/cpu/nohz_full"),
    ] {
        let value = root.read_value(file)?.unwrap_or_else(|| "-".to_owned());
        text += &format!("{name}: {value}\n");
    }
    Ok(text)
}

/// The parameters that matter.
fn command_line(text: &str) -> String {
    let matters =
        |word: &&str| PARAMETERS.iter().any(|start| word.starts_with(start)) && !word.contains('/');
    let (shown, others): (Vec<_>, Vec<_>) = text.split_ascii_whitespace().partition(matters);
    let others = others.len();
    format!("{}\n({others} others left out)\n", shown.join(" "))
}

fn topology(root: &Host) -> anyhow::Result<String> {
    let mut model = None;
    let read = root.for_each_line("proc/cpuinfo", |line| {
        if let Some((_, name)) = line
            .split_once(':')
            .filter(|_| line.starts_with("model name"))
        {
            model.get_or_insert_with(|| name.trim().to_owned());
        }
    });
    let model = read.ok().and(model).unwrap_or_else(|| "-".to_owned());
    Ok(format!("model: {model}\n{}", layout::text(root)?))
}

/// The settings as they are written, in JSON, which has no comments.
fn settings_of(root: &Host, vmid: VmId) -> anyhow::Result<String> {
    let Some((path, text)) = settings::find(root, vmid)? else {
        return Ok("no settings file\n".to_owned());
    };
    let table = text.parse::<toml::Table>();
    // The whole error quotes the line.
    let table = table.map_err(|error| anyhow!("{path}: {}", error.message()))?;
    Ok(format!(
        "{path}:\n{}\n",
        serde_json::to_string_pretty(&table)?
    ))
}

/// What its vCPUs had in its last run that ended with pre-stop.
fn last_run(root: &Host, vmid: VmId) -> anyhow::Result<String> {
    let counters = counters::all(root)?.remove(&vmid.into());
    Ok(counters.map_or_else(String::new, |it| it.to_line(vmid) + "\n"))
}

fn journal(root: &Host, vmid: VmId) -> anyhow::Result<String> {
    ensure!(root.is_live(), "the journal is not read under --sysroot");
    let vm = format!("VMID={vmid}");
    let arguments = [
        "--quiet",
        "--no-pager",
        "--no-hostname",
        "--output=short-iso",
        "--identifier=pinfold",
        "--lines",
        JOURNAL_LINES,
        &vm,
    ];
    Ok(exec::run("journalctl", &arguments, JOURNAL_DEADLINE)?)
}

/// Paths that are the same on every host, or begin so, without their first slash.
const PUBLIC: [&str; 10] = [
    "dev/",
    "etc/pinfold/",
    "init.scope",
    "proc/",
    "qemu",
    "run/pinfold/",
    "sys/",
    "system.slice",
    "user.slice",
    "usr/",
];

/// What is taken out of all texts.
struct Hidden {
    /// The folder of the host's files, if that is not `/`.
    sysroot: Option<String>,
    /// Words, each with what stands for it; the longest first.
    words: Vec<(String, &'static str)>,
}

impl Hidden {
    fn of(root: &Host, vmid: VmId) -> Self {
        let mut words = Vec::new();
        let mut scripts: Vec<String> = Vec::new();
        if let Ok(conf) = vm::conf(root, vmid) {
            // The administrator's own model, by `cpu:`.
            let model = conf.cpu.iter().flat_map(|cpu| cpu.split([',', '=']));
            let custom = model.filter(|word| word.starts_with("custom-"));
            words.extend(custom.map(|model| (model.to_owned(), "(model)")));
            for hostpci in conf.hostpci {
                if let HostDevices::Mapping(id) = hostpci.devices {
                    words.push((id, "(mapping)"));
                }
            }
            words.extend(conf.args.map(|args| (args, "(args)")));
        }
        if let Ok(Loaded::Fenced(settings) | Loaded::Unfenced { settings, .. }) =
            settings::load(root, vmid, 1, &[])
        {
            scripts.extend(settings.chain);
        }
        for storage in vm::storages(root).unwrap_or_default() {
            words.push((storage.id, "(storage)"));
        }
        for guest in vm::guests(root) {
            words.extend(guest.name.map(|name| (name, "(name)")));
            words.extend(guest.node.map(|name| (name, "(node)")));
            scripts.extend(guest.hookscript);
        }
        for volume in scripts {
            let name = volume.rsplit('/').next().unwrap_or(&volume);
            if name != snippet::NAME {
                words.push((name.to_owned(), "(script)"));
            }
        }
        words.extend(vm::node(root).map(|name| (name, "(node)")));
        if let Ok(name) = root.read("proc/sys/kernel/hostname") {
            words.push((name.trim().to_owned(), "(host)"));
        }
        // Numbers and very short words name nothing, and are part of much else.
        words.retain(|(word, _)| {
            word != vm::LOCAL && word.len() > 2 && word.parse::<u64>().is_err()
        });
        words.sort_by_key(|(word, _)| std::cmp::Reverse(word.len()));
        words.dedup();
        Self {
            sysroot: (!root.is_live()).then(|| root.path("").display().to_string()),
            words,
        }
    }

    fn without(&self, text: &str) -> String {
        let text = match &self.sysroot {
            Some(folder) => text.replace(folder.trim_end_matches('/'), ""),
            None => text.to_owned(),
        };
        let lines = text.lines().map(|line| {
            let mut line = without_quotes(line);
            for (word, instead) in &self.words {
                line = replace_word(&line, word, instead);
            }
            without_paths(&line) + "\n"
        });
        lines.collect()
    }
}

/// Without lines of a settings file, which its parser's errors draw, and without what is quoted of VMID.conf, and of `args` that are to be set.
fn without_quotes(line: &str) -> String {
    let drawn = line
        .trim_start()
        .trim_start_matches(|c: char| c.is_ascii_digit());
    if drawn.trim_start().starts_with('|') {
        return "(left out)".to_owned();
    }
    let line = match (line.find('`'), line.rfind("; Proxmox VE ignores it")) {
        (Some(begin), Some(end)) if begin < end => {
            format!("{}(left out){}", &line[..begin], &line[end..])
        }
        _ => line.to_owned(),
    };
    match line.split_once(" --args ") {
        Some((before, _)) => format!("{before} --args (left out)"),
        None => line,
    }
}

/// Replaces a word where it is not part of another one.
fn replace_word(text: &str, word: &str, instead: &str) -> String {
    let is_part = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let (mut replaced, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(word) {
        let (before, after) = (&rest[..at], &rest[at + word.len()..]);
        // A number may follow or precede it in the name of a unit or file.
        let is_whole = !before.ends_with(is_part) && !after.starts_with(is_part);
        replaced += before;
        replaced += if is_whole { instead } else { word };
        rest = after;
    }
    replaced + rest
}

/// Replaces absolute paths that are not the same on every host.
fn without_paths(line: &str) -> String {
    let ends = |c: char| c.is_whitespace() || "`'\"()[]{},;:".contains(c);
    line.split_inclusive(ends)
        .map(|word| {
            let (path, end) = match word.char_indices().next_back() {
                Some((at, last)) if ends(last) => word.split_at(at),
                _ => (word, ""),
            };
            let (before, path) = path.split_at(path.find('/').unwrap_or(path.len()));
            let is_path = path.len() > 1 && (before.is_empty() || before.ends_with('='));
            let is_public = is_path
                && PUBLIC.iter().any(|start| {
                    path[1..].starts_with(start) || &path[1..] == start.trim_end_matches('/')
                });
            let is_public = is_public || is_shared(path);
            match is_path && !is_public {
                true => format!("{before}(path){end}"),
                false => word.to_owned(),
            }
        })
        .collect()
}

/// Whether a path is that of settings in the folder of the cluster.
fn is_shared(path: &str) -> bool {
    path.trim_start_matches('/')
        .strip_prefix(vm::SHARED_FOLDER)
        .is_some_and(|rest| rest.starts_with("/pinfold/") || rest.starts_with("/local/pinfold/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;

    fn report(host: &MadeUpHost) -> Vec<Part> {
        collect(
            &host.root,
            100.try_into().unwrap(),
            "0.1.0 (commit 1a2b3c, release build)",
        )
        .unwrap()
    }

    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[6, 18]);
        host.conf(
            100,
            "#password hunter2\nname: hunter2\ncores: 2\nfoo hunter2\nargs: -fw_cfg hunter2\n\
             hookscript: local:snippets/hook\nsshkeys: hunter2\ncipassword: hunter2\n\
             cpu: custom-hunter2-model\nhostpci0: mapping=hunter2-gpu,pcie=1",
        );
        host.conf(
            101,
            "name: hunter2-mail\ncores: 2\nhookscript: hunter2:snippets/hunter2.pl",
        );
        let script = "var/lib/vz/snippets/hunter2.sh";
        host.file(script, "#!/bin/sh");
        host.mode(script, 0o755);
        host.file("proc/sys/kernel/hostname", "hunter2host");
        // Names are taken out wherever they are.
        host.file("proc/sys/kernel/version", "#1 of hunter2host, hunter2-mail");
        host.file(
            "proc/cmdline",
            "root=/dev/hunter2 luks=hunter2 pci=/hunter2 isolcpus=6-7 quiet",
        );
        host.settings(
            100,
            "# of hunter2\nisolated = \"6,18\"\npins = \"auto\"\nemulator = \"0-3\"\n\
             chain = [\"local:snippets/hunter2.sh\"]",
        );
        host.file(
            "var/lib/dpkg/status",
            "Package: bash\nVersion: 5\n\nPackage: qemu-server\nStatus: install ok installed\nVersion: 9.2.6\n",
        );
        host
    }

    #[test]
    fn nothing_secret_is_in_it() {
        let host = host();
        let parts = report(&host);
        let text = to_text(100.try_into().unwrap(), &parts);
        assert!(!text.contains("hunter2"), "{text}");
        let folder = host.root.path("").display().to_string();
        assert!(!text.contains(folder.trim_end_matches('/')), "{text}");
        for shown in [
            "this program: 0.1.0 (commit 1a2b3c, release build)\n",
            "state written by: -\n",
            "## packages\n\n```text\nqemu-server 9.2.6\n```\n",
            "release: 6.1.0-44-amd64\nversion: #1 of (host), (name)\n",
            "isolcpus=6-7 quiet\n(3 others left out)\n",
            "model: -\nSELECTOR",
            "cores: 2\nargs: (2 other words left out)\nhookscript: local:snippets/hook\n\
             cpu: (model)\nhostpci0: pcie=1,(1 more)\n(4 other lines left out)\n",
            "\"local:snippets/(script)\"",
            "/etc/pinfold/100.toml:\n",
            "  \"isolated\": \"6,18\",\n",
            "VM 100 runs and will have CPU 6,18",
            "VM 100, by /etc/pinfold/100.toml\n",
            "no CPU is isolated\n",
            "(not read: the journal is not read under --sysroot)\n",
        ] {
            assert!(text.contains(shown), "{shown}\n{text}");
        }
    }

    #[test]
    fn a_part_that_fails_loses_no_other() {
        let host = host();
        host.settings(100, "isolated = 7\n# of hunter2");
        let parts = report(&host);
        let failed: Vec<&str> = (parts.iter().filter(|part| part.error.is_some()))
            .map(|part| part.part)
            .collect();
        assert_eq!(failed, ["plan", "journal"], "{parts:#?}");
        assert!(
            parts
                .iter()
                .any(|part| part.part == "status" && part.text.is_some())
        );
    }

    #[test]
    fn paths_and_names_of_others_are_replaced() {
        let hidden = Hidden {
            sysroot: None,
            words: vec![("mail".into(), "(name)"), ("pve1".into(), "(node)")],
        };
        for (line, shown) in [
            ("VM mail has CPU 3", "VM (name) has CPU 3"),
            ("mailman e-mail mail.", "mailman e-mail (name)."),
            ("pve1.example.org", "(node).example.org"),
            ("rm /srv/vm/disk.raw; x", "rm (path); x"),
            ("file=/root/x y", "file=(path) y"),
            ("/etc/pinfold/100.toml: pins", "/etc/pinfold/100.toml: pins"),
            ("names from /proc", "names from /proc"),
            ("/etc/pve/pinfold/100.toml", "/etc/pve/pinfold/100.toml"),
            ("/etc/pve/nodes/a/x", "(path)"),
            ("0-5/7 and/or / 3", "0-5/7 and/or / 3"),
            ("local:snippets/hook", "local:snippets/hook"),
            (
                "line 3: `cipassword: x`: bad `x`; Proxmox VE ignores it",
                "line 3: (left out); Proxmox VE ignores it",
            ),
            ("qm set 100 --args '-smp 4'", "qm set 100 --args (left out)"),
        ] {
            assert_eq!(hidden.without(line), format!("{shown}\n"), "{line}");
        }
    }
}

//! The examples of docs/json.md, on a made-up host. hook is its program; the tools are links to this test, which calls
//! their libraries by the name that it is called by, since cargo builds no programs of other crates for a test.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;

use pinfold_core::testutils::{MadeUpHost, machine};

/// VM 100 is fenced, and its QEMU has ended.
const STATE: &str = include_str!("../../core/tests/frozen/68c7916/state/hotplug-isolated.json");
const JSON: &str = include_str!("../../docs/json.md");

/// A tool's main, which gets the commit of its program.
type Main = fn(Option<&str>) -> ExitCode;

/// The tools by name.
const TOOLS: [(&str, Main); 7] = [
    ("cg-slice", cg_slice::main),
    ("cpu-hotplug", cpu_hotplug::main),
    ("governor", governor::main),
    ("pci-reset", pci_reset::main),
    ("pin-irqs", pin_irqs::main),
    ("pin-kthreads", pin_kthreads::main),
    ("pin-vcpu", pin_vcpu::main),
];

/// The verbs that print no JSON.
const WITHOUT_JSON: [&str; 2] = ["help", "__complete"];

fn host() -> MadeUpHost {
    let host = MadeUpHost::new("5900x");
    let fenced = machine::text("5900x") + "\n" + include_str!("hosts/fenced.txt");
    machine::expand(&fenced, &host.root.path(""));
    for cpu in 1..24 {
        host.file(&format!("sys/devices/system/cpu/cpu{cpu}/online"), "1");
    }
    host.conf(100, "cores: 12\nhookscript: local:snippets/hook");
    host.conf(102, "cores: 2");
    // Its vCPUs share a CPU.
    host.vm(101, &[2, 2]);
    host.conf(101, "cores: 2\nhookscript: local:snippets/hook");
    for vcpu in [10_100, 10_101] {
        let file = format!("proc/101/task/{vcpu}/schedstat");
        host.file(&file, "21000000 5000000 7");
    }
    for (file, text) in [
        (
            "etc/pinfold/101.toml",
            "isolated = \"2-3\"\npins = \"auto\"",
        ),
        (
            "etc/pve/storage.cfg",
            "dir: local\n\tpath /var/lib/vz\n\tcontent iso,snippets",
        ),
        ("var/lib/vz/snippets/hook", "#!/bin/sh\n# pinfold hook stub"),
        ("usr/sbin/hook", "#!/bin/sh\n# pinfold hook stub"),
        (
            "proc/softirqs",
            "CPU0 CPU1 CPU2\n TIMER: 1 2 3\n RCU: 1 2 3",
        ),
        ("proc/irq/24/effective_affinity_list", "7"),
        ("proc/version", "Linux version 6.12.0"),
    ] {
        host.file(file, text);
    }
    for (file, mode) in [
        ("etc/pinfold/101.toml", 0o644),
        ("var/lib/vz/snippets/hook", 0o755),
        ("usr/sbin/hook", 0o755),
    ] {
        fs::set_permissions(host.root.path(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    let policy = "sys/devices/system/cpu/cpufreq/policy0";
    for (name, text) in [
        ("affected_cpus", "0"),
        ("related_cpus", "0"),
        ("scaling_governor", "powersave"),
        ("scaling_available_governors", "performance powersave"),
    ] {
        host.file(&format!("{policy}/{name}"), text);
    }
    let device = "sys/bus/pci/devices/0000:0b:00.0";
    for (name, text) in [
        ("vendor", "0x10de"),
        ("device", "0x2204"),
        ("class", "0x030000"),
        ("remove", ""),
    ] {
        host.file(&format!("{device}/{name}"), text);
    }
    let run = host.root.path("run/pinfold");
    fs::create_dir_all(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
    let state = run.join("state.json");
    fs::write(&state, STATE).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o600)).unwrap();
    host
}

/// Every tool and every verb of hook has an example, and each example names its version.
fn all_have_an_example() {
    use clap::CommandFactory;
    let commands: Vec<&str> = JSON
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .collect();
    let is_shown = |start: &str| commands.iter().any(|line| line.starts_with(start));
    for (tool, _) in TOOLS {
        assert!(is_shown(&format!("{tool} ")), "{tool}: no example");
    }
    let hook = hook::Args::command();
    for verb in hook.get_subcommands().map(clap::Command::get_name) {
        let example = is_shown(&format!("hook {verb} "));
        assert_eq!(example, !WITHOUT_JSON.contains(&verb), "hook {verb}");
    }
    for line in &commands {
        assert!(line.contains(" --json"), "{line}");
    }
    let versions = JSON.matches("\"version\": 1").count();
    assert!(versions >= commands.len(), "{versions} versions");
}

fn main() -> ExitCode {
    let called = env::args().next().unwrap_or_default();
    let name = Path::new(&called).file_name();
    if let Some((_, tool)) = TOOLS.iter().find(|(tool, _)| name == Some(tool.as_ref())) {
        return tool(None);
    }
    let (folder, host) = (tempfile::tempdir().unwrap(), host());
    symlink(host.root.path(""), folder.path().join("host")).unwrap();
    let document = format!("{}/../docs/json.md", env!("CARGO_MANIFEST_DIR"));
    let cases = trycmd::TestCases::new();
    for (tool, _) in TOOLS {
        let link = folder.path().join(tool);
        symlink(env::current_exe().unwrap(), &link).unwrap();
        cases.register_bin(tool, link);
    }
    // The examples name the host by a relative path.
    env::set_current_dir(folder.path()).unwrap();
    cases.case(document);
    cases.run();
    all_have_an_example();
    ExitCode::SUCCESS
}

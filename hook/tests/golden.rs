//! hook's verbs that look at the machine, on the captured machines of core's tests. A case is a
//! file; the machines are folders beside one another, each with VMs.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A saved state.
const STATE: &str = include_str!("../../core/tests/frozen/68c7916/state/hotplug-isolated.json");

/// VMID.conf by VM: without SMT, with it, with more vCPUs than any domain has, and one that hook
/// fences already.
const VMS: [(&str, &str); 5] = [
    ("100", "cores: 4\n"),
    (
        "101",
        "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\nhookscript: local:snippets/hook\n",
    ),
    ("102", "cores: 64\nsockets: 16\n"),
    ("103", "cores: 2\n"),
    ("104", "cores: 16\nvcpus: 2\n"),
];

/// A 5900X while CPUs are isolated for VM 100, whose QEMU has ended.
fn fenced_host(root: &Path) {
    let machines = machine::all();
    let (_, machine) = machines.iter().find(|(name, _)| name == "5900x").unwrap();
    machine::expand(
        &format!("{machine}\n{}", include_str!("hosts/fenced.txt")),
        root,
    );
    for cpu in 1..24 {
        let file = root.join(format!("sys/devices/system/cpu/cpu{cpu}/online"));
        fs::write(file, "1\n").unwrap();
    }
    let conf = "cores: 10\naffinity: 0-3\nhookscript: nas:snippets/hook\n";
    let confs = root.join("etc/pve/qemu-server");
    fs::create_dir_all(&confs).unwrap();
    fs::write(confs.join("100.conf"), conf).unwrap();
    fs::write(confs.join("101.conf"), "cores: 13\n").unwrap();
    let run = root.join("run/pinfold");
    fs::create_dir_all(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
    let state = run.join("state.json");
    fs::write(&state, STATE).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The same on a host of their own: one with lines that Proxmox VE ignores, and one that QEMU
/// refuses to start.
const DOUBTFUL: [(&str, &str); 2] = [
    (
        "100",
        "cores : 12\nhostpci0: 0b:00.0,foo=1\nfoo: bar\nhookscript: /root/hook\n[x]\ncores: 4\n",
    ),
    (
        "101",
        "cores: 12\nhotplug: cpu\nargs: -smp 12,sockets=1,cores=6,threads=2\nhostpci0: 7f:00\naffinity: 3,0-1\n",
    ),
];

#[test]
fn golden() {
    let folder = tempfile::tempdir().unwrap();
    let host = |name: &str, text: &str, vms: &[(&str, &str)]| {
        let root = folder.path().join(name);
        machine::expand(text, &root);
        let confs = root.join("etc/pve/qemu-server");
        fs::create_dir_all(&confs).unwrap();
        for (id, conf) in vms {
            fs::write(confs.join(format!("{id}.conf")), conf).unwrap();
        }
    };
    for (name, text) in machine::all() {
        host(&name, &text, &VMS);
        match name.as_str() {
            "5900x" => host("doubtful", &text, &DOUBTFUL),
            // Cases run side by side: those that write settings have a host of their own.
            "7950x3d" => host("written", &text, &VMS),
            _ => {}
        }
    }
    fenced_host(&folder.path().join("fenced"));
    // Cases name machines by relative paths. This is the one test of its process.
    std::env::set_current_dir(folder.path()).unwrap();
    let cases = |files: &str| format!("{}/tests/{files}", env!("CARGO_MANIFEST_DIR"));
    trycmd::TestCases::new()
        .case(cases("layout/*.trycmd"))
        .case(cases("cmd/*.trycmd"))
        .case(cases("init/*.trycmd"))
        .case(cases("check/*.trycmd"));
}

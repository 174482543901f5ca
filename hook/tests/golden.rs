//! hook's verbs that look at the machine, on the captured machines of core's tests. A case is a
//! file; the machines are folders beside one another, each with VMs.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pinfold_core::testutils::{machine, vm_conf};

mod hosts;

/// A saved state.
const STATE: &str = include_str!("../../core/tests/frozen/68c7916/state/hotplug-isolated.json");

/// VMID.conf by VM: without SMT, with it, with more vCPUs than any domain has, and one that hook
/// fences already.
const VMS: [(u32, &str); 5] = [
    (100, "cores: 4\n"),
    (
        101,
        "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\nhookscript: local:snippets/hook\n",
    ),
    (102, "cores: 64\nsockets: 16\n"),
    (103, "cores: 2\n"),
    (104, "cores: 16\nvcpus: 2\n"),
];

/// A 5900X while CPUs are isolated for VM 100, whose QEMU has ended.
fn fenced_host(root: &Path) {
    let machine = machine::text("5900x") + "\n" + include_str!("hosts/fenced.txt");
    machine::expand(&machine, root);
    put_online(root, 24);
    let conf = "cores: 10\naffinity: 0-3\nhookscript: nas:snippets/hook\n";
    vm_conf(root, 100, conf);
    vm_conf(root, 101, "cores: 13\n");
    let run = root.join("run/pinfold");
    fs::create_dir_all(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
    let state = run.join("state.json");
    fs::write(&state, STATE).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o600)).unwrap();
}

fn put_online(root: &Path, cpus: usize) {
    for cpu in 1..cpus {
        let file = root.join(format!("sys/devices/system/cpu/cpu{cpu}/online"));
        fs::write(file, "1\n").unwrap();
    }
}

/// What `hook check` reads of every host.
fn make_bootable(root: &Path, cpus: usize) {
    put_online(root, cpus);
    for (path, text) in [
        ("proc/cmdline", "quiet\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory\n"),
        (
            "var/lib/vz/snippets/hook",
            "#!/bin/sh\n# pinfold hook stub\n",
        ),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let hook = root.join("var/lib/vz/snippets/hook");
    fs::set_permissions(hook, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A node of a cluster of three. VM 100 has hook in a storage that they share, VM 101 in that of each
/// node, VM 102 in one that a node does not have; 102 and 103 are started by high availability.
fn clustered_host(root: &Path) {
    machine::expand(&machine::text("5900x"), root);
    make_bootable(root, 24);
    let stub = "#!/bin/sh\n# pinfold hook stub\n";
    let settings = "isolated = \"llc:1\"\npins = \"auto\"\n";
    for (path, text) in [
        (
            "etc/pve/.members",
            r#"{"nodename": "pve1", "cluster": {"quorate": 1}, "nodelist": {"pve1": {}, "pve2": {}, "pve3": {}}}"#,
        ),
        ("etc/pve/nodes/pve1/lrm_status", ""),
        (
            "etc/pve/storage.cfg",
            "nfs: nas\n\tcontent snippets\n\ndir: own\n\tpath /srv\n\tcontent snippets\n\tnodes pve1,pve2\n",
        ),
        (
            "etc/pve/ha/resources.cfg",
            "vm: 102\n\tstate started\n\nvm: 103\n",
        ),
        ("mnt/pve/nas/snippets/hook", stub),
        ("srv/snippets/hook", stub),
        ("etc/pve/pinfold/100.toml", settings),
        ("etc/pinfold/101.toml", settings),
        ("etc/pve/pinfold/102.toml", settings),
        ("etc/pinfold/103.toml", settings),
        ("etc/pve/nodes/pve2/pinfold/103.toml", settings),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let mode = if text == stub { 0o755 } else { 0o644 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::symlink("nodes/pve1", root.join("etc/pve/local")).unwrap();
    for (vmid, storage) in [(100, "nas"), (101, "local"), (102, "own"), (103, "nas")] {
        let conf = format!("cores: 6\nhookscript: {storage}:snippets/hook\n");
        vm_conf(root, vmid, &conf);
    }
}

/// The same on a host of their own: one with lines that Proxmox VE ignores, and one that QEMU
/// refuses to start.
const DOUBTFUL: [(u32, &str); 2] = [
    (
        100,
        "cores : 12\nhostpci0: 0b:00.0,foo=1\nfoo: bar\nhookscript: /root/hook\n[x]\ncores: 4\n",
    ),
    (
        101,
        "cores: 12\nhotplug: cpu\nargs: -smp 12,sockets=1,cores=6,threads=2\nhostpci0: 7f:00\naffinity: 3,0-1\n",
    ),
];

#[test]
fn golden() {
    let folder = tempfile::tempdir().unwrap();
    let host = |name: &str, text: &str, vms: &[(u32, &str)]| {
        let root = folder.path().join(name);
        machine::expand(text, &root);
        for (id, conf) in vms {
            vm_conf(&root, *id, conf);
        }
    };
    for (name, text) in machine::all() {
        host(&name, &text, &VMS);
        match name.as_str() {
            "5900x" => host("doubtful", &text, &DOUBTFUL),
            // Cases run side by side: those that write settings have a host of their own.
            "7950x3d" => {
                host("written", &text, &VMS);
                make_bootable(&folder.path().join("written"), 32);
            }
            _ => {}
        }
    }
    fenced_host(&folder.path().join("fenced"));
    clustered_host(&folder.path().join("cluster"));
    for drawn in hosts::DRAWN {
        drawn.make(&folder.path().join(format!("drawn-{}", drawn.machine)));
    }
    // Cases name machines by relative paths. This is the one test of its process.
    std::env::set_current_dir(folder.path()).unwrap();
    let cases = |files: &str| format!("{}/tests/{files}", env!("CARGO_MANIFEST_DIR"));
    trycmd::TestCases::new()
        .case(cases("layout/*.trycmd"))
        .case(cases("map/*.trycmd"))
        .case(cases("cmd/*.trycmd"))
        .case(cases("init/*.trycmd"))
        .case(cases("check/*.trycmd"));
}

//! hook's verbs that look at the machine, on the captured machines of core's tests. A case is a
//! file; the machines are folders beside one another, each with VMs.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

use std::fs;

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

#[test]
fn golden() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in machine::all() {
        let root = folder.path().join(name);
        machine::expand(&text, &root);
        let confs = root.join("etc/pve/qemu-server");
        fs::create_dir_all(&confs).unwrap();
        for (id, conf) in VMS {
            fs::write(confs.join(format!("{id}.conf")), conf).unwrap();
        }
    }
    // Cases name machines by relative paths. This is the one test of its process.
    std::env::set_current_dir(folder.path()).unwrap();
    trycmd::TestCases::new()
        .case(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/layout/*.trycmd"
        ))
        .case(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/init/*.trycmd"));
}

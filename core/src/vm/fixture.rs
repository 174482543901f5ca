//! A made-up Proxmox VE host for tests.

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use crate::sys::pci::PciSelector;
use crate::sysroot::Sysroot;

/// A host with VM 100 running as process 4711, VM 102 stopped, and container 101.
pub(super) fn host() -> (tempfile::TempDir, Sysroot) {
    let dir = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| write(dir.path(), path, text);
    write("etc/pve/qemu-server/100.conf", "cores: 2\n");
    write("etc/pve/qemu-server/102.conf", "cores: x\n");
    write("etc/pve/lxc/101.conf", "");
    write("run/qemu-server/100.pid", "4711\n");
    write(
        "proc/4711/cmdline",
        "/usr/bin/kvm\0-id\0VM\0-smp\0cpus=2,threads=2\0-pidfile\0/var/run/qemu-server/100.pid\0",
    );
    thread(dir.path(), 4711, 4711, "kvm", "0-5");
    thread(dir.path(), 4711, 4712, "CPU 0/KVM", "6");
    thread(dir.path(), 4711, 4713, "CPU 1/KVM", "0-23");
    write(
        "proc/4711/task/4714/comm",
        "a thread that went while being read\n",
    );
    write("proc/900/cmdline", "/bin/bash\0");
    thread(dir.path(), 900, 900, "bash", "0-23");
    let root = Sysroot::new(dir.path());
    (dir, root)
}

pub(super) fn write(base: &Path, path: &str, text: &str) {
    let path = base.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

pub(super) fn thread(base: &Path, pid: i32, tid: i32, name: &str, allowed: &str) {
    let stat = format!(
        "{tid} ({name}) S 1 0 0 0 -1 64 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 18446744073709551615 0 0 0 0 0 0 0 \
         2147483647 0 0 0 0 17 9 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    );
    write(base, &format!("proc/{pid}/task/{tid}/stat"), &stat);
    write(
        base,
        &format!("proc/{pid}/task/{tid}/status"),
        &format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n"),
    );
    if pid == tid {
        write(base, &format!("proc/{pid}/stat"), &stat);
    }
}

pub(super) fn any_selector() -> impl Strategy<Value = PciSelector> {
    (any::<u32>(), any::<u8>(), 0..32u8, prop::option::of(0..8u8)).prop_map(
        |(domain, bus, device, function)| PciSelector {
            domain,
            bus,
            device,
            function,
        },
    )
}

pub(super) fn joined(selectors: &[PciSelector]) -> String {
    selectors
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(";")
}

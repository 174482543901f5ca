//! A made-up Proxmox VE host for tests.

use proptest::prelude::*;

use crate::sys::pci::PciSelector;
use crate::sysroot::Sysroot;
use crate::testutils::{container_conf, thread, vm_conf, write};

/// A host with VM 100 running as process 4711, VM 102 stopped, and container 101.
pub(super) fn host() -> (tempfile::TempDir, Sysroot) {
    let dir = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| write(dir.path(), path, text);
    vm_conf(dir.path(), 100, "cores: 2\n");
    vm_conf(dir.path(), 102, "cores: x\n");
    container_conf(dir.path(), 101, "");
    write("run/qemu-server/100.pid", "4711\n");
    write(
        "proc/4711/cmdline",
        "/usr/bin/kvm\0-id\0VM\0-smp\0cpus=2,threads=2\0-pidfile\0/var/run/qemu-server/100.pid\0",
    );
    thread(dir.path(), 4711, 4711, "kvm", "0-5", 0);
    thread(dir.path(), 4711, 4712, "CPU 0/KVM", "6", 0);
    thread(dir.path(), 4711, 4713, "CPU 1/KVM", "0-23", 0);
    write(
        "proc/4711/task/4714/comm",
        "a thread that went while being read\n",
    );
    write("proc/900/cmdline", "/bin/bash\0");
    thread(dir.path(), 900, 900, "bash", "0-23", 0);
    let root = Sysroot::new(dir.path());
    (dir, root)
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

//! Where Proxmox VE keeps the files of running VMs.

use crate::vm::id::VmId;

/// Pid files and sockets; /var/run is a link to /run.
const RUN: &str = "run/qemu-server";

/// The path of a VM's pid file, below the root.
pub fn pid_file(vmid: VmId) -> String {
    format!("{RUN}/{vmid}.pid")
}

/// The path of a VM's QMP socket on the host, if QEMU's command line does not name one.
pub(in crate::vm) fn monitor(vmid: VmId) -> String {
    format!("/{RUN}/{vmid}.qmp")
}

/// The path of the file with reserved PCI devices, below the root.
pub(super) fn pci_claims() -> String {
    format!("{RUN}/pci-id-reservations")
}

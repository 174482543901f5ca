//! Virtual machines: their QEMU processes, threads and settings.

mod cmdline;
#[cfg(test)]
mod fixture;
mod guest_topology;
mod id;
mod proxmox;
mod qemu;
pub mod qmp;
mod threads;

pub use guest_topology::SmpError;
pub use id::VmId;
pub use proxmox::conf::{
    Contradiction, HostDevices, HostPci, NumaNode, PassedOver, VmConf, all, check_exists, conf,
    is_container,
};
pub use proxmox::mapping::{parse_pci_mapping, pci_mapping};
pub use proxmox::reservations::{PciClaim, PciHolder, parse_pci_claims, pci_claims};
pub use proxmox::run::pid_file;
pub use qemu::{Qemu, Status, by_pid, find, require_running, status};
pub use threads::{QemuThread, Role, Threads, role_by_name, threads};

//! Virtual machines: their QEMU processes, threads and settings.

mod cmdline;
#[cfg(test)]
mod fixture;
mod guest_topology;
mod id;
pub mod proxmox;
mod qemu;
pub mod qmp;
mod threads;

pub use id::VmId;
pub use proxmox::conf::{all, check_exists, conf, is_container};
pub use proxmox::mapping::pci_mapping;
pub use proxmox::reservations::pci_reservations;
pub use proxmox::run::pid_file;
pub use qemu::{Lookup, Qemu, by_pid, find, look_up, running};
pub use threads::{QemuThread, Role, Threads, role_by_name, threads};

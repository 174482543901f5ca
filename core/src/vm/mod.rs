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
pub use proxmox::cluster::{Guest, guests, is_highly_available, lacks_quorum, node, other_nodes};
pub use proxmox::conf::{
    Contradiction, HostDevices, HostPci, NumaNode, PassedOver, VmConf, all, check_exists, conf,
    conf_from, is_container, is_elsewhere,
};
pub use proxmox::container::{Container, pinned_containers, running_containers};
pub use proxmox::cpu_models::cpu_model_flags;
pub use proxmox::huge_pages::{HugePages, LARGE, SMALL, huge_pages, refused_huge_pages};
pub use proxmox::mapping::{parse_pci_mapping, pci_mapping};
pub use proxmox::outline::outline;
pub use proxmox::paths::{NODE_FOLDER, SHARED_FOLDER, SLICE, conf_file, node_folder, scope_unit};
pub use proxmox::reservations::{PciClaim, PciHolder, parse_pci_claims, pci_claims};
pub use proxmox::storage::{LOCAL, Storage, snippet, storages};
pub use qemu::{Qemu, Status, by_pid, find, require_running, status};
pub use threads::{QemuThread, Role, Threads, role_by_name, threads};

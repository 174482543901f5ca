//! Where Proxmox VE keeps what belongs to VMs.

use crate::vm::id::VmId;

/// The folder that all nodes of a cluster share, below the root.
pub const SHARED_FOLDER: &str = "etc/pve";

/// The folder of this node in it.
pub const NODE_FOLDER: &str = "etc/pve/local";

/// The folder of a node, below the root.
pub fn node_folder(node: &str) -> String {
    format!("{NODES}/{node}")
}

/// The state of the cluster, as pmxcfs has it.
pub(super) const MEMBERS: &str = "etc/pve/.members";

/// The guests that high availability starts, on whichever node.
pub(super) const HA_RESOURCES: &str = "etc/pve/ha/resources.cfg";

/// The slice in which VMs' scopes are started.
pub const SLICE: &str = "qemu.slice";

/// VMs' settings.
pub(super) const CONFS: &str = "etc/pve/qemu-server";

/// The storages of the cluster.
pub(super) const STORAGES: &str = "etc/pve/storage.cfg";

/// The custom CPU models of the cluster.
pub(super) const CPU_MODELS: &str = "etc/pve/virtual-guest/cpu-models.conf";

/// Containers' settings.
pub(super) const CONTAINERS: &str = "etc/pve/lxc";

/// The nodes of the cluster, each with a folder.
pub(super) const NODES: &str = "etc/pve/nodes";

/// Pid files and sockets; /var/run is a link to /run.
const RUN: &str = "run/qemu-server";

/// The folder of the storage `local`.
pub(super) const LOCAL_STORAGE: &str = "var/lib/vz";

/// The path of a VM's settings, below the root.
pub fn conf_file(vmid: VmId) -> String {
    format!("{CONFS}/{vmid}.conf")
}

/// The path of a VM's settings if another node has it.
pub(super) fn conf_file_on(node: &str, vmid: VmId) -> String {
    format!("{NODES}/{node}/qemu-server/{vmid}.conf")
}

/// The path of a container's settings, below the root.
pub(super) fn container_conf_file(vmid: VmId) -> String {
    format!("{CONTAINERS}/{vmid}.conf")
}

/// The cgroups of a container that have a cpuset of their own, the outer one first. pvestatd sets
/// both.
pub(super) fn container_cgroups(vmid: VmId) -> [String; 2] {
    [format!("lxc/{vmid}"), format!("lxc/{vmid}/ns")]
}

/// The systemd unit of a VM.
pub fn scope_unit(vmid: VmId) -> String {
    format!("{vmid}.scope")
}

/// The path of a VM's pid file, below the root.
pub(in crate::vm) fn pid_file(vmid: VmId) -> String {
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

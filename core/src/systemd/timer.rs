//! The transient timer that has hook look for new threads of a VM.

use crate::sysroot::Sysroot;

/// The name of its units, without their kind.
pub(crate) fn unit(vmid: u32) -> String {
    format!("pinfold-threads-{vmid}")
}

/// Whether it is there: systemd keeps a file of each transient unit.
pub(crate) fn is_there(root: &Sysroot, vmid: u32) -> bool {
    root.exists(format!("run/systemd/transient/{}.timer", unit(vmid)))
}

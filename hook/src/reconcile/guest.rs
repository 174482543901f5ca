//! A running VM, as one run of hook knows it: looked up once and handed on.

use std::collections::BTreeMap;

use pinfold_core::sys::{cgroup, task};
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{Host, Result};

use crate::state::reservation::{JITTER, Reservation};

/// The process that has a reservation's CPUs, if it runs: the VM's QEMU, or `hook jitter`, which
/// stands for one.
///
/// # Errors
/// As [`vm::find`].
pub(super) fn find(root: &Host, vmid: VmId, reservation: &Reservation) -> Result<Option<Qemu>> {
    if vmid.get() != JITTER {
        return vm::find(root, vmid);
    }
    let own = reservation.qemu;
    let own = own.filter(|task| task::check_start(root, task).is_ok());
    Ok(own.map(|task| Qemu::stand_in(task, BTreeMap::new())))
}

/// A running VM with what hook keeps of it.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub vmid: VmId,
    pub qemu: Qemu,
    /// The cgroup its QEMU was in when the run began.
    pub cgroup: String,
    pub reservation: Reservation,
}

impl Guest {
    /// A VM's QEMU with its cgroup.
    ///
    /// # Errors
    /// One that [is gone](pinfold_core::Error::is_gone) if QEMU has ended.
    pub(super) fn new(
        root: &Host,
        vmid: VmId,
        qemu: Qemu,
        reservation: Reservation,
    ) -> Result<Self> {
        let cgroup = cgroup::of_process(root, qemu.id.pid)?;
        Ok(Self {
            vmid,
            qemu,
            cgroup,
            reservation,
        })
    }

    /// The scope it runs in, below the root of the tree.
    ///
    /// # Errors
    /// If it is not in a scope of its own.
    pub(super) fn scope(&self) -> Result<String> {
        cg_slice::scope_of(self.vmid, &self.cgroup)
    }
}

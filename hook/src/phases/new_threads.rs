//! Threads of a fenced VM that have started since post-start.

use std::time::Duration;

use pinfold_core::knob::ABSENT;
use pinfold_core::state::store::Store;
use pinfold_core::sys::task;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Exit, Knob};

use crate::reconcile::thread_timer;
use crate::state::reservation::{Phase, Reservation};

use super::run::Run;
use super::thread_timer::waits_for_cont;

impl Run<'_> {
    /// Pins threads of a fenced VM that have started since post-start, if there are any: vCPUs, and
    /// what is on isolated CPUs. Called by a timer, which ends here when a guest that waited runs.
    pub(crate) fn pin_new(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let Some(state) = Store::<Reservation>::peek(&self.root)? else {
            return Ok(self.report.finish());
        };
        let is_fenced = |reservation: &&Reservation| {
            reservation.phase == Phase::Isolated && reservation.is_alive(&self.root, vmid)
        };
        let (Some(reservation), Some(qemu)) = (
            state.reservations.get(&vmid.into()).filter(is_fenced),
            vm::find(&self.root, vmid)?,
        ) else {
            return Ok(self.report.finish());
        };
        // A guest that runs is not to be disturbed by QEMU's monitor.
        let plugs_vcpus = self.plugs_vcpus(vmid);
        let deadline = Duration::from_secs(reservation.settings.deadlines.qmp);
        let runs = !plugs_vcpus && !waits_for_cont(&vm::threads(&self.root, &qemu, deadline)?);
        let isolated = &reservation.settings.isolated;
        let is_new = |task: &task::Task| {
            let is_vcpu = matches!(vm::role_by_name(&task.name), vm::Role::Vcpu(_));
            let is_inside =
                || task::affinity(&self.root, &task.id).is_ok_and(|cpus| cpus.intersects(isolated));
            !state.baseline.has(&Knob::Thread(task.id)) && (is_vcpu || is_inside())
        };
        if task::tasks(&self.root, qemu.id.pid)?.iter().any(is_new) {
            self.fence_vm(vmid, Some(&qemu))?;
        }
        if runs && let Some(timer) = thread_timer(&self.root, vmid)? {
            let done = pinfold_core::apply_one(&self.root, timer.want(ABSENT));
            self.report.changes(&[done]);
        }
        Ok(self.report.finish())
    }
}

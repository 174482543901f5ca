//! What a VM's vCPUs had of their CPUs: read in pre-stop, reported in post-stop.

use std::time::Duration;

use pinfold_core::state::store::Store;
use pinfold_core::systemd::journal::Priority;
use pinfold_core::vm::VmId;

use crate::state::counters::{self, Counters};
use crate::state::reservation::Reservation;
use crate::strays::{Class, pinned_inside, strays};

use super::run::Run;

/// How long another hook is waited for. Nothing depends on the counters, so a phase does not wait
/// for them as long as for its own work.
const LOCK: Duration = Duration::from_secs(1);

impl Run<'_> {
    /// Reads and saves the counters of a VM that is about to stop, if it is fenced. What fails is not
    /// reported: they are lost then, as they are if a guest powers itself off.
    pub(super) fn save_counters(&self, vmid: VmId) {
        let _ = self.try_save_counters(vmid);
    }

    fn try_save_counters(&self, vmid: VmId) -> anyhow::Result<()> {
        let fenced = |reservation: &Reservation| reservation.is_fenced();
        let Some(reservation) = self.peek(vmid)?.filter(fenced) else {
            return Ok(());
        };
        let Some(qemu) = reservation
            .qemu
            .filter(|_| reservation.is_alive(&self.root, vmid))
        else {
            return Ok(());
        };
        let Some(mut counters) = Counters::read(&self.root, &qemu)? else {
            return Ok(());
        };
        let store = Store::<Reservation>::open(&self.root, LOCK)?;
        let own = &reservation.settings.isolated;
        let pinned = pinned_inside(&self.root, &store.baseline, &qemu, own)?;
        counters.strays = strays(&self.root, own, &pinned, &store.baseline)
            .ok()
            .map(|strays| {
                let of_class = strays.iter().filter(|it| it.class == Class::Stray);
                of_class.count()
            });
        counters::keep(&store, vmid, counters)?;
        Ok(())
    }

    /// Reports the counters of a VM that has stopped, once, in the task log and the journal.
    pub(super) fn report_counters(&mut self, vmid: VmId) {
        let Ok(mut all) = counters::all(&self.root) else {
            return;
        };
        let Some(counters) = all.remove(&vmid.into()).filter(|it| !it.reported) else {
            return;
        };
        let line = counters.to_line(vmid);
        let reported = Store::<Reservation>::open(&self.root, LOCK).and_then(|store| {
            let reported = true;
            let counters = Counters {
                reported,
                ..counters
            };
            counters::keep(&store, vmid, counters)
        });
        // Otherwise it would be reported again after a run without pre-stop.
        if reported.is_ok() {
            self.report.line(&line);
            self.journal(Priority::Notice, vmid, &line);
        }
    }
}

//! The fence of a VM whose reservation is in the store.

use anyhow::bail;
use pinfold_core::knob::UNMOVABLE_IRQ;
use pinfold_core::state::store::Store;
use pinfold_core::systemd::journal::Priority;
use pinfold_core::vm::{Qemu, VmId};

use crate::reconcile::{Reconcile, Refused};
use crate::state::reservation::{Phase, Reservation};
use crate::state::step_times;

use super::run::Run;

impl Run<'_> {
    /// Isolates the CPUs of a VM that has a reservation with its QEMU in the store. If something
    /// fails that the fence depends on, everything that was done is undone, and the VM keeps running
    /// on any CPUs; after any other failure it keeps its fence.
    pub(super) fn fence(
        &mut self,
        store: &mut Store<Reservation>,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> anyhow::Result<()> {
        let earlier = self.report.steps().len();
        let earlier_failures = self.report.failures();
        let earlier_notes = self.report.notes().len();
        let anew = store
            .reservations
            .get(&vmid.into())
            .is_some_and(|claim| claim.phase == Phase::Isolating);
        let fenced = Reconcile::new(&self.root, store, self.report).and_then(|mut reconcile| {
            reconcile.isolate(vmid, qemu)?;
            Ok((reconcile.is_broken(), reconcile.take_refused()))
        });
        if self.root.dry_run() {
            return Ok(fenced.map(drop)?);
        }
        let failed = self.report.failures() - earlier_failures;
        let kept = fenced.and_then(|(broken, refused)| {
            if !broken && let Some(reservation) = store.reservations.get_mut(&vmid.into()) {
                reservation.phase = Phase::Isolated;
                reservation.failed = failed;
                store.save()?;
            }
            Ok((!broken).then_some(refused))
        });
        let refused = match kept {
            Ok(Some(refused)) => refused,
            undone => {
                if let Err(cause) = undone {
                    self.report.error(&cause.to_string());
                }
                let why = self.first_note(earlier_notes);
                let unfenced = format!("VM {vmid} runs without isolated CPUs");
                self.journal(Priority::Error, vmid, &format!("{unfenced}: {why}"));
                self.give_back(store, &[vmid], Some(vmid), qemu.map(|qemu| qemu.id))?;
                self.report.finish();
                bail!("{unfenced}: all changes have been undone");
            }
        };
        self.name_refused(vmid, &refused);
        if failed > 0 {
            let what = format!("VM {vmid} has its CPUs, but {}", failures(failed));
            let why = self.first_note(earlier_notes);
            self.journal(Priority::Warning, vmid, &format!("{what}: {why}"));
            self.report
                .note(&format!("{what}; `hook {vmid} post-start` tries again"));
        }
        if anew && let Err(error) = step_times::keep(store, vmid, &self.report.seconds()[earlier..])
        {
            // The VM has its CPUs; only `hook plan` will not know how long it took.
            self.report.note(&error.to_string());
        }
        Ok(())
    }

    /// Names IRQs that the kernel did not move: all in the journal, and in the log those that are
    /// not among the ones that it never moves, of which every host has some.
    fn name_refused(&mut self, vmid: VmId, refused: &Refused) {
        for (why, irqs) in refused {
            let irqs: Vec<&str> = irqs.iter().map(String::as_str).collect();
            let what = format!("VM {vmid}: not moved: {}: {why}", irqs.join(", "));
            self.journal(Priority::Notice, vmid, &what);
            if why != UNMOVABLE_IRQ {
                self.report.note(&what);
            }
        }
    }
}

/// So many failures, in words.
pub(crate) fn failures(count: usize) -> String {
    match count {
        1 => "one change failed".to_owned(),
        count => format!("{count} changes failed"),
    }
}

//! What a killed hook or an ended VM has left.

use std::time::Duration;

use pinfold_core::Exit;
use pinfold_core::state::store::{self, Store};
use pinfold_core::systemd::journal::Priority;
use pinfold_core::vm::{self, VmId};

use crate::own_steps::remove_dead_traces;
use crate::settings::Deadlines;
use crate::state::reservation::{Phase, Reservation};

use super::run::Run;

impl Run<'_> {
    /// Drops the reservations of VMs that have stopped, and settles the host for the remaining VMs.
    pub(crate) fn recover(&mut self) -> anyhow::Result<Exit> {
        let deadlines = Deadlines::default();
        if let Err(error) = remove_dead_traces(&self.root, self.report) {
            self.report.error(&error.to_string());
        }
        if Store::<Reservation>::peek(&self.root)?.is_none() {
            return Ok(self.report.finish());
        }
        let mut store = self.open(&deadlines)?;
        let mut dead = self.drop_dead(&mut store, None)?;
        // Under the lock no other hook runs: the hook of a half isolated VM was killed.
        let half: Vec<VmId> = (store.reservations.iter())
            .filter(|(_, reservation)| reservation.phase == Phase::Isolating)
            .filter_map(|(id, _)| VmId::try_from(*id).ok())
            .collect();
        for vmid in &half {
            let fenced = match vm::find(&self.root, *vmid) {
                Ok(None) => Ok(()),
                Ok(Some(qemu)) => {
                    let note = format!("VM {vmid}: completing an interrupted post-start");
                    self.report.note(&note);
                    self.journal(Priority::Notice, *vmid, &note);
                    self.fence(&mut store, *vmid, Some(&qemu))
                }
                Err(error) => Err(error.into()),
            };
            // The others have theirs all the same.
            if let Err(error) = fenced {
                self.report.error(&format!("{error:#}"));
            }
        }
        if dead.is_empty() && half.is_empty() {
            self.give_back(&mut store, &[], None, None)?;
        }
        // The path unit does not see a pid file that is removed while its service runs.
        loop {
            let mut since = self.drop_dead(&mut store, None)?;
            // One with an idle VM stays in the state, and below --sysroot no process is known that
            // starts it.
            since.retain(|(vmid, ..)| dead.iter().all(|(known, ..)| known != vmid));
            if since.is_empty() {
                break;
            }
            dead.extend(since);
        }
        self.start_idle(store, &dead)?;
        Ok(self.report.finish())
    }

    /// Removes a state that cannot be trusted.
    pub(crate) fn discard(&mut self) -> anyhow::Result<Exit> {
        if store::discard(&self.root, Duration::from_secs(Deadlines::default().lock))? {
            self.report
                .note("removed the saved state; the host stays as it is now until the next boot");
        }
        Ok(self.report.finish())
    }
}

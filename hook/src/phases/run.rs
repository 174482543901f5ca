//! One call of hook: the host, the output, and what every phase reads or reports.

use std::time::Duration;

use nix::unistd::Pid;
use pinfold_core::state::store::Store;
use pinfold_core::sys::task;
use pinfold_core::systemd::journal::{Entry, Priority};
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Report, TaskId};

use crate::settings::{self, Deadlines};
use crate::state::reservation::Reservation;

/// One call of hook.
pub(crate) struct Run<'a> {
    /// The host.
    pub root: Host,
    /// The output for results.
    pub report: &'a mut Report,
    /// The node that the VM is migrated from, if it is.
    pub migrated_from: Option<String>,
}

impl Run<'_> {
    /// A VM's settings at Proxmox VE.
    pub(super) fn conf(&self, vmid: VmId) -> pinfold_core::Result<VmConf> {
        match &self.migrated_from {
            Some(source) => vm::conf_from(&self.root, vmid, source),
            None => vm::conf(&self.root, vmid),
        }
    }

    /// A VM's reservation, read without the lock.
    pub(super) fn peek(&self, vmid: VmId) -> anyhow::Result<Option<Reservation>> {
        Ok(Store::<Reservation>::peek(&self.root)?
            .and_then(|mut state| state.reservations.remove(&vmid.into())))
    }

    /// A VM's deadlines, as they were at its pre-start.
    pub(super) fn deadlines(&self, vmid: VmId) -> anyhow::Result<Deadlines> {
        Ok(match self.peek(vmid)? {
            Some(reservation) => reservation.settings.deadlines,
            None => settings::deadlines(&self.root, vmid),
        })
    }

    /// Makes later calls to systemd keep these deadlines.
    pub(super) fn use_deadlines(&mut self, deadlines: &Deadlines) {
        self.root = self.root.clone().with_session(deadlines.systemd_session());
    }

    pub(super) fn open(&mut self, deadlines: &Deadlines) -> anyhow::Result<Store<Reservation>> {
        let report = &mut *self.report;
        let deadline = Duration::from_secs(deadlines.lock);
        Ok(Store::open_telling(&self.root, deadline, |holder| {
            report.note(&format!("waiting for the lock, which {holder} holds"));
        })?)
    }

    /// A line in the journal beside the task log, which is seldom read once a VM runs.
    pub(super) fn journal(&mut self, priority: Priority, vmid: VmId, message: &str) {
        let entry = Entry {
            priority,
            vmid: Some(vmid.into()),
            message,
        };
        if let Err(error) = self.root.journal(&entry) {
            self.report.note(&error.to_string());
        }
    }

    /// The CPUs that the VM has if it runs and is fenced.
    pub(super) fn isolated_already(&self, vmid: VmId) -> anyhow::Result<Option<CpuSet>> {
        let fenced = |reservation: &Reservation| {
            reservation.is_fenced() && reservation.is_alive(&self.root, vmid)
        };
        Ok(self
            .peek(vmid)?
            .filter(fenced)
            .map(|reservation| reservation.settings.isolated))
    }

    /// The first that was reported after so many notes.
    pub(super) fn first_note(&self, earlier: usize) -> String {
        self.report
            .notes()
            .get(earlier)
            .cloned()
            .unwrap_or_default()
    }
}

/// A process by pid and start time, so that a reused pid is not mistaken for it.
pub(super) fn process(root: &Host, pid: Pid) -> Option<TaskId> {
    task::task(root, pid.as_raw(), pid.as_raw())
        .ok()
        .map(|task| task.id)
}

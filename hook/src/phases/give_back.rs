//! Releases what stopped VMs had, and sets the host as the remaining VMs need it.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::unistd::Pid;
use pinfold_core::state::store::Store;
use pinfold_core::systemd::journal::Priority;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Host, TaskId};

use crate::own_steps;
use crate::reconcile::Reconcile;
use crate::settings::Deadlines;
use crate::state::reservation::{Backup, Phase, Reservation, is_in_backup, owner};

use super::run::{Run, process};

/// A reservation as it was, with its VM.
pub(super) type Dropped = (VmId, Reservation);

impl Run<'_> {
    /// Drops a VM's reservation, settles the host for the remaining VMs, and starts its idle VM. If
    /// the VM `has_stopped` for a backup and comes back, the state keeps that, and the idle VM is not
    /// started.
    pub(super) fn release(
        &mut self,
        vmid: VmId,
        deadlines: &Deadlines,
        has_stopped: bool,
    ) -> anyhow::Result<()> {
        let mut store = self.open(deadlines)?;
        // Under the lock: recover may have begun with it before.
        if let Some(reservation) = store.reservations.get_mut(&vmid.into())
            && has_stopped
            && reservation.has_run()
        {
            let comes_back =
                reservation.backup != Some(Backup::Started) && is_in_backup(&self.root, vmid);
            reservation.backup = comes_back.then_some(Backup::ComesBack);
        }
        let mut dropped = self.release_dead(&mut store, Some(vmid));
        dropped.extend(self.give_back(&mut store, &[vmid], Some(vmid), own_process(&self.root))?);
        for reservation in dropped
            .iter()
            .filter(|(id, reservation)| *id == vmid && reservation.is_fenced())
        {
            self.report.line(&format!(
                "CPU {} released by VM {vmid}",
                reservation.1.settings.isolated
            ));
        }
        self.start_idle(store, &dropped)
    }

    /// Before a VM is isolated: releases what others have left, and what the VM itself had if its
    /// QEMU has ended without post-stop. CPUs can be offline since then, if a hook was killed.
    pub(super) fn release_earlier(&mut self, store: &mut Store<Reservation>, vmid: VmId) {
        let own = store.reservations.get(&vmid.into());
        let is_earlier = own.is_some_and(|own| own.qemu.is_some());
        self.release_dead(store, (!is_earlier).then_some(vmid));
    }

    /// Releases what VMs have left that have stopped, except `but`, before a phase does its own
    /// work. Failures there are reported, and do not count as failures of the phase.
    pub(super) fn release_dead(
        &mut self,
        store: &mut Store<Reservation>,
        but: Option<VmId>,
    ) -> Vec<Dropped> {
        let earlier = self.report.failures();
        let dropped = self.drop_dead(store, but).unwrap_or_else(|error| {
            self.report.error(&format!("{error:#}"));
            Vec::new()
        });
        self.report.leave_out_failures(earlier);
        dropped
    }

    /// Drops the reservations of VMs that have stopped, except that of `but`, which is in a phase.
    pub(super) fn drop_dead(
        &mut self,
        store: &mut Store<Reservation>,
        but: Option<VmId>,
    ) -> anyhow::Result<Vec<Dropped>> {
        let (mut dead, mut notes) = (Vec::new(), Vec::new());
        for (id, reservation) in &mut store.reservations {
            let vmid = VmId::try_from(*id)?;
            if reservation.is_alive(&self.root, vmid)
                || (but == Some(vmid) && reservation.phase >= Phase::Unfenced)
            {
                continue;
            }
            let owner = owner(*id);
            let note = match reservation.phase {
                Phase::Unfenced => None,
                Phase::Starting if reservation.qemu.is_none() => {
                    Some(format!("{owner} was not started; releasing its CPUs"))
                }
                // Its post-stop may still come: systemd sees QEMU end as soon as Proxmox VE does.
                Phase::Starting | Phase::Isolating | Phase::Isolated => {
                    Some(format!("{owner} has ended; releasing its CPUs"))
                }
                Phase::Idle if reservation.comes_back() => {
                    Some(format!("VM {vmid} was not started again after its backup"))
                }
                Phase::Leaving | Phase::Idle => {
                    Some(format!("{owner}: completing an interrupted post-stop"))
                }
            };
            notes.extend(note.map(|note| (vmid, note)));
            if reservation.has_run() {
                let comes_back =
                    reservation.backup != Some(Backup::Started) && is_in_backup(&self.root, vmid);
                reservation.backup = comes_back.then_some(Backup::ComesBack);
            }
            dead.push(vmid);
        }
        for (vmid, note) in notes {
            self.report.note(&note);
            self.journal(Priority::Notice, vmid, &note);
        }
        if dead.is_empty() {
            Ok(Vec::new())
        } else {
            self.give_back(store, &dead, None, own_process(&self.root))
        }
    }

    /// Drops the reservations of VMs that are `gone`, settles the host for the others, and returns
    /// the dropped ones. In a phase of the VM `own`, what fails for others is reported and does not
    /// count. One with devices to be reset or an idle VM to be started stays in the state until then
    /// ([`start_idle`](Self::start_idle)); once the process `until` has ended, any hook may do it.
    pub(super) fn give_back(
        &mut self,
        store: &mut Store<Reservation>,
        gone: &[VmId],
        own: Option<VmId>,
        until: Option<TaskId>,
    ) -> anyhow::Result<Vec<Dropped>> {
        let mut dropped = Vec::new();
        for vmid in gone {
            if let Some(reservation) = store.reservations.get_mut(&(*vmid).into()) {
                reservation.resets_owed |= reservation.has_run()
                    && reservation.phase != Phase::Idle
                    && reservation.settings.listed_resets(false).next().is_some();
                dropped.push((*vmid, reservation.clone()));
                reservation.phase = Phase::Leaving;
            }
        }
        if !dropped.is_empty()
            && let Err(error) = store.save()
        {
            // A full disk must not keep hook from releasing CPUs.
            self.report.note(&error.to_string());
        }
        let scopes = store.reservations.iter().filter_map(|(id, reservation)| {
            let vmid = VmId::try_from(*id).ok()?;
            Some((vm::scope_unit(vmid), reservation.scope.clone()?))
        });
        let root = self.root.clone().with_scopes(scopes.collect());
        let mut reconcile = Reconcile::new(&root, store, self.report)?.for_vm(own);
        reconcile.settle();
        for vmid in gone {
            reconcile.undo_vm(*vmid);
        }
        reconcile.forget(until)?;
        self.name_newer(store, gone);
        Ok(dropped)
    }

    /// Reports what these VMs, or the host after the last fence, are not given back because only a
    /// later version of hook knows it.
    fn name_newer(&mut self, store: &Store<Reservation>, gone: &[VmId]) {
        for vmid in gone {
            let names = store.newer.of_vm((*vmid).into());
            if !names.is_empty() {
                self.report.left(&format!(
                    "VM {vmid}: a later version of hook has saved data unknown to this one: {}",
                    names.join(", ")
                ));
            }
        }
        let of_host = store.newer.of_host();
        if !of_host.is_empty() && !store.reservations.values().any(Reservation::is_fenced) {
            self.report.left(&format!(
                "not restored, since only a later version of hook knows it: {}; `hook recover` \
                 of that version restores it, `hook recover --discard` abandons it",
                of_host.join("; ")
            ));
        }
    }

    /// Resets the devices of VMs that are gone, as far as their settings ask for it, and starts the
    /// idle VMs that were stopped for them; without the lock, because that runs their own hook.
    pub(super) fn start_idle(
        &mut self,
        store: Store<Reservation>,
        dropped: &[Dropped],
    ) -> anyhow::Result<()> {
        drop(store);
        self.reset_owed(dropped)?;
        let owed = || {
            dropped.iter().filter(|(_, reservation)| {
                reservation.idle_vm_stopped && reservation.backup != Some(Backup::ComesBack)
            })
        };
        for (_, Reservation { settings, .. }) in owed() {
            let Some(idle) = settings.idle_vm else {
                continue;
            };
            let deadline = Duration::from_secs(settings.deadlines.idle_vm);
            // Tried once: hook cannot repair what keeps it from starting.
            if let Err(error) = own_steps::start_idle_vm(&self.root, self.report, idle, deadline) {
                self.report.error(&format!("{error:#}"));
            }
        }
        let Some((_, last)) = owed().next_back() else {
            return Ok(());
        };
        let mut store = self.open(&last.settings.deadlines)?;
        for (vmid, _) in owed() {
            if store
                .reservations
                .get(&(*vmid).into())
                .is_some_and(|reservation| reservation.phase == Phase::Idle)
            {
                store.reservations.remove(&(*vmid).into());
            }
        }
        store.save()?;
        Ok(())
    }

    /// Resets the devices of VMs that have ended. What was tried is not tried again.
    fn reset_owed(&mut self, dropped: &[Dropped]) -> anyhow::Result<()> {
        let owed: BTreeMap<VmId, &Reservation> = dropped
            .iter()
            .filter(|(_, reservation)| reservation.resets_owed)
            .map(|(vmid, reservation)| (*vmid, reservation))
            .collect();
        for (vmid, reservation) in &owed {
            // One that runs on without its CPUs keeps its devices.
            if vm::find(&self.root, *vmid).is_ok_and(|qemu| qemu.is_some()) {
                continue;
            }
            let conf = vm::conf(&self.root, *vmid).unwrap_or_default();
            let reset = self.reset_devices(*vmid, &conf, &reservation.settings, false);
            if let Err(error) = reset {
                self.report.error(&format!("{error:#}"));
            }
        }
        let Some(last) = owed.values().next_back() else {
            return Ok(());
        };
        let mut store = self.open(&last.settings.deadlines)?;
        for vmid in owed.keys() {
            let id = (*vmid).into();
            let Some(reservation) = store.reservations.get_mut(&id) else {
                continue;
            };
            // A new start has a reservation of its own.
            if reservation.phase == Phase::Idle {
                reservation.resets_owed = false;
                if !reservation.is_owed() {
                    store.reservations.remove(&id);
                }
            }
        }
        store.save()?;
        Ok(())
    }
}

fn own_process(root: &Host) -> Option<TaskId> {
    process(root, Pid::this())
}

//! After QEMU has started. The order of the steps is in reconcile/order.rs.

use std::time::Duration;

use pinfold_core::state::store::Store;
use pinfold_core::systemd::ScopeProperties;
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Exit};

use crate::checks::required;
use crate::choice;
use crate::state::reservation::{Backup, Phase, Reservation};

use super::offer::{Offer, has_idle_vm_to_restart};
use super::run::Run;
use super::thread_timer::waits_for_cont;

impl Run<'_> {
    /// After QEMU has started: isolates its CPUs. On a VM that is isolated already it repairs what
    /// has changed and pins new threads.
    pub(crate) fn post_start(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let qemu = vm::require_running(&self.root, vmid)?;
        self.fence_vm(vmid, Some(&qemu))?;
        let failed = self.report.failures() > 0;
        let exit = self.report.finish();
        // It has its fence, so some were done in any case.
        Ok(if failed { Exit::Partial } else { exit })
    }

    /// What post-start does, without finishing the report. Only a plan may be made without a QEMU.
    /// Returns the VM's isolated CPUs.
    ///
    /// A QEMU that waits (`prelaunch`, for a backup; `inmigrate`) is fenced as one that runs: Proxmox
    /// VE lets its guest run later without calling hook.
    pub(crate) fn fence_vm(&mut self, vmid: VmId, qemu: Option<&Qemu>) -> anyhow::Result<CpuSet> {
        let task = qemu.map(|qemu| qemu.id);
        let deadlines = self.deadlines(vmid)?;
        self.use_deadlines(&deadlines);
        let mut store = self.open(&deadlines)?;
        self.release_earlier(&mut store, vmid);
        let Some(mut reservation) = self.claim(&store, vmid, qemu)? else {
            return Ok(CpuSet::new());
        };
        reservation.qemu = task;
        if reservation.phase == Phase::Unfenced {
            store.reservations.insert(vmid.into(), reservation);
            store.save()?;
            return Ok(CpuSet::new());
        }
        let mut waits = false;
        if let Some(qemu) = qemu {
            let threads = vm::threads(
                &self.root,
                qemu,
                Duration::from_secs(reservation.settings.deadlines.qmp),
            )?;
            waits = waits_for_cont(&threads);
            // VMID.conf may have changed since pre-start read it, or lack what QEMU was started with.
            let cells = vm::conf(&self.root, vmid).map(|conf| choice::cells(&conf));
            reservation.settings.fit_guest(
                &self.root,
                qemu.threads_per_core,
                &cells.unwrap_or_default(),
            )?;
            let vcpus = threads.vcpus();
            // Of a VM that is fenced already, vCPUs that were plugged in beyond its pins do not take
            // the pins of the others: the step `pins` reports them.
            if reservation.phase != Phase::Isolated {
                required::pins_suffice(&reservation.settings, vcpus.len(), vcpus.last())?;
            }
        }
        if reservation.phase == Phase::Starting {
            reservation.phase = Phase::Isolating;
        }
        // None while the VM is out of its scope.
        match ScopeProperties::of(&self.root, &vm::scope_unit(vmid)) {
            Ok(None) => {}
            Ok(found) => reservation.scope = found,
            // It gets a scope without them, if it is ever put back into one.
            Err(error) => self.report.note(&error.to_string()),
        }
        let isolated = reservation.settings.isolated.clone();
        store.reservations.insert(vmid.into(), reservation);
        store.save()?;

        self.report
            .line(&format!("isolating CPU {isolated} for VM {vmid}"));
        self.fence(&mut store, vmid, qemu)?;
        if waits || self.plugs_vcpus(vmid) {
            self.look_for_threads(vmid);
        }
        Ok(isolated)
    }

    /// What pre-start has reserved for the VM. If pre-start did not run, did nothing, or was for an
    /// earlier QEMU, its checks are made now. Nothing for a template, or without settings.
    fn claim(
        &mut self,
        store: &Store<Reservation>,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> anyhow::Result<Option<Reservation>> {
        let known = store.reservations.get(&vmid.into());
        if let Some(reserved) = known {
            let is_its_own = match reserved.qemu {
                None => true,
                Some(earlier) => reserved.is_claim() && qemu.is_some_and(|qemu| qemu.id == earlier),
            };
            // Why it has no CPUs, if it has none, was reported by pre-start.
            if is_its_own && (reserved.is_claim() || reserved.phase == Phase::Unfenced) {
                return Ok(Some(reserved.clone()));
            }
        }
        let conf = self.conf(vmid)?;
        if conf.template {
            self.report.line(&format!(
                "VM {vmid} is a template: its guest does not run, nothing is isolated"
            ));
            return Ok(None);
        }
        let is_in_backup = conf.is_in_backup();
        let offer = self.offer(store, vmid, &conf, qemu, is_in_backup)?;
        if let Offer::Unfenced { why, is_lack, .. } = &offer {
            self.without_cpus(vmid, "runs", why, *is_lack);
        }
        let mut reservation = offer.reservation();
        if let Some(reservation) = &mut reservation {
            reservation.idle_vm_stopped = has_idle_vm_to_restart(store, vmid);
            reservation.backup = is_in_backup.then_some(Backup::Started);
        }
        Ok(reservation)
    }
}

//! Before QEMU is started.

use std::time::Duration;

use anyhow::{bail, ensure};
use nix::unistd::Pid;
use pinfold_core::Exit;
use pinfold_core::knob::PRESENT;
use pinfold_core::state::store::Store;
use pinfold_core::vm::{self, VmConf, VmId};

use crate::choice;
use crate::own_steps;
use crate::reconcile::Reconcile;
use crate::settings::{self, Loaded, Method};
use crate::state::reservation::{Backup, Isolation, Reservation};

use super::offer::{Offer, has_idle_vm_to_restart};
use super::run::{Run, process};

impl Run<'_> {
    /// Before QEMU is started: checks everything that could fail later, because only this phase can
    /// stop the start. Then does what has to be done before QEMU takes its devices and memory.
    pub(crate) fn pre_start(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let conf = self.conf(vmid)?;
        if conf.template {
            self.report.line(&format!(
                "VM {vmid} is a template, which is started for a backup only; nothing to do"
            ));
            return Ok(self.report.finish());
        }
        let comes_back = conf.is_in_backup() && self.comes_back(vmid);
        if conf.is_in_backup() && !comes_back {
            self.report.line(&format!(
                "VM {vmid} was not running and is started only for a backup; nothing to prepare"
            ));
            if let Err(error) = self.delegate_for_backup(vmid, &conf) {
                self.report.note(&format!("{error:#}"));
            }
            self.report.finish();
            return Ok(Exit::Success);
        }
        if let Some(isolated) = self.isolated_already(vmid)? {
            self.report.line(&format!(
                "VM {vmid} runs and has CPU {isolated} already; nothing to do"
            ));
            return Ok(self.report.finish());
        }
        // Proxmox VE would refuse only after this phase, when the idle VM has been stopped for nothing.
        if let Some(why) = vm::refused_huge_pages(&self.root, &conf) {
            bail!("VM {vmid}: {why}");
        }
        let deadlines = settings::deadlines(&self.root, vmid);
        self.use_deadlines(&deadlines);
        let mut store = self.open(&deadlines)?;
        self.release_earlier(&mut store, vmid);
        // A QEMU that runs has a scope already, which is too late for what pre-start prepares.
        let running = vm::find(&self.root, vmid)?;
        // Under the lock: the kernel does not report the core and cache of a CPU that another hook
        // has taken offline.
        let offer = self.offer(&store, vmid, &conf, running.as_ref(), comes_back)?;
        if let Offer::Fence { warnings, .. } = &offer {
            for warning in warnings {
                self.report.note(warning);
            }
        }
        let reservation = self.reserve(store, vmid, &offer)?;
        // Without the lock: stopping the idle VM runs its own hook.
        let prepared = self.prepare(vmid, &conf, reservation.as_ref());
        match prepared {
            // The guest ran until the backup began: starting without isolated CPUs is better than
            // not at all.
            Err(error) if comes_back => self.report.note(&format!("{error:#}")),
            Err(error) => {
                // No post-stop follows a start that this phase aborts. The reason for the abort is
                // what is reported.
                if let Some(reservation) = &reservation
                    && let Err(error) = self.release(vmid, &reservation.settings.deadlines, false)
                {
                    self.report
                        .error(&format!("taking back the reservation: {error:#}"));
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        match offer {
            Offer::Fence { settings, .. } => self.report.line(&format!(
                "CPU {} reserved for VM {vmid}, from {}",
                settings.isolated, settings.source
            )),
            Offer::Unfenced { why, is_lack, .. } => {
                self.without_cpus(vmid, "starts", &why, is_lack);
            }
        }
        // Failures that do not stop the start have been reported.
        self.report.leave_out_failures(0);
        Ok(self.report.finish())
    }

    /// The one thing that post-start cannot do for a VM that is started for its backup, if that is
    /// fenced by partition: a scope is delegated when it is made. Refuses nothing.
    fn delegate_for_backup(&mut self, vmid: VmId, conf: &VmConf) -> anyhow::Result<()> {
        let loaded = settings::load(
            &self.root,
            vmid,
            conf.threads_per_core(),
            &choice::cells(conf),
        );
        let Ok(Loaded::Fenced(settings)) = loaded else {
            return Ok(());
        };
        if settings.method == Method::Hotplug {
            return Ok(());
        }
        self.use_deadlines(&settings.deadlines);
        let mut store = self.open(&settings.deadlines)?;
        let offer = self.offer(&store, vmid, conf, None, true)?;
        let Some(mut reservation) = offer.reservation() else {
            return Ok(());
        };
        if !reservation.is_claim() || reservation.isolation != Isolation::Partition {
            return Ok(());
        }
        reservation.starter = process(&self.root, Pid::parent());
        reservation.backup = Some(Backup::Started);
        store.newer.forget_vm(vmid.into());
        store.reservations.insert(vmid.into(), reservation);
        store.save()?;
        drop(store);
        self.delegate(vmid)
    }

    /// Whether the VM ran until it was stopped for a backup. A state that cannot be read is for the
    /// VM's next start.
    fn comes_back(&mut self, vmid: VmId) -> bool {
        match self.peek(vmid) {
            Ok(reservation) => reservation.is_some_and(|earlier| earlier.comes_back()),
            Err(error) => {
                self.report.note(&error.to_string());
                false
            }
        }
    }

    fn reserve(
        &mut self,
        mut store: Store<Reservation>,
        vmid: VmId,
        offer: &Offer,
    ) -> anyhow::Result<Option<Reservation>> {
        let Some(mut reservation) = offer.reservation() else {
            return Ok(None);
        };
        reservation.starter = process(&self.root, Pid::parent());
        if let Some(idle) = reservation.settings.idle_vm {
            reservation.idle_vm_stopped =
                has_idle_vm_to_restart(&store, vmid) || own_steps::idle_vm_runs(&self.root, idle)?;
        }
        reservation.resets_owed =
            (store.reservations.get(&vmid.into())).is_some_and(|earlier| earlier.resets_owed);
        store.newer.forget_vm(vmid.into());
        store.reservations.insert(vmid.into(), reservation.clone());
        store.save()?;
        if reservation.is_claim() && reservation.settings.halt_poll_ns.is_some() {
            let root = self.root.clone();
            let set = Reconcile::new(&root, &mut store, self.report)
                .and_then(|reconcile| reconcile.for_vm(Some(vmid)).set_halt_polling());
            if let Err(error) = set {
                self.report.note(&error.to_string());
            }
        }
        Ok(Some(reservation))
    }

    fn prepare(
        &mut self,
        vmid: VmId,
        conf: &VmConf,
        reservation: Option<&Reservation>,
    ) -> anyhow::Result<()> {
        let Some(reservation) = reservation else {
            return Ok(());
        };
        let settings = &reservation.settings;
        if reservation.is_claim() && reservation.isolation == Isolation::Partition {
            self.delegate(vmid)?;
        }
        if let Some(idle) = settings.idle_vm {
            own_steps::stop_idle_vm(
                &self.root,
                self.report,
                idle,
                Duration::from_secs(settings.deadlines.idle_vm),
            )?;
        }
        // Those of its last run, whose hook was killed.
        if reservation.resets_owed
            && let Err(error) = self.reset_devices(vmid, conf, settings, false)
        {
            self.report.note(&format!("{error:#}"));
        }
        self.reset_devices(vmid, conf, settings, true)?;
        let deadline = Duration::from_secs(settings.deadlines.caches);
        let huge = vm::huge_pages(&self.root, conf);
        own_steps::tidy_caches(
            &self.root,
            self.report,
            &huge,
            settings.tidy_caches,
            deadline,
        );
        Ok(())
    }

    /// Has systemd leave alone what is made within the VM's scope.
    pub(super) fn delegate(&mut self, vmid: VmId) -> anyhow::Result<()> {
        self.report.step("delegation");
        let earlier = self.report.failures();
        let change = cg_slice::partition::delegation(&self.root, vmid, PRESENT)?;
        self.report.changes(&pinfold_core::apply(
            &self.root,
            change.into_iter().collect(),
        ));
        ensure!(
            self.report.failures() == earlier,
            "without delegation systemd would remove the partition"
        );
        Ok(())
    }
}

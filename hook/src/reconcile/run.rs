//! One run over the host: what all steps know, the baseline, and how a change is made.

use std::collections::BTreeMap;

use pinfold_core::knob::Value;
use pinfold_core::state::{Pending, Store};
use pinfold_core::sys::cpufreq::Policy;
use pinfold_core::sys::{cgroup, cpu, task};
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{Change, CpuSet, Host, Knob, Outcome, Report, Result, Setting, TaskId};

use super::guest::Guest;
use super::kernel_masks::KernelMasks;
use crate::state::reservation::{Isolation, Phase, Reservation};

/// One run over the host, under the store's lock.
pub(crate) struct Reconcile<'a> {
    pub(super) root: &'a Host,
    pub(super) store: &'a mut Store<Reservation>,
    pub(super) report: &'a mut Report,
    pub(super) present: CpuSet,
    /// The CPUs that partitions left to everything else when this run began, if there were any.
    pub(super) unpartitioned: Option<CpuSet>,
    pub(super) host_irqs: pin_irqs::Irqs,
    pub(super) host_kthreads: pin_kthreads::Threads,
    /// VMs that were looked up in this run; none for one that does not run.
    guests: BTreeMap<VmId, Option<Guest>>,
    pub(super) readings: Readings,
    /// Governors and the statistics interval while they are being set.
    pub(super) pending: Option<Pending>,
}

/// What was read of the host. It is valid until something is changed.
#[derive(Debug, Default)]
pub(super) struct Readings {
    pub irqs: Option<Vec<Setting>>,
    pub kthreads: Option<Vec<Setting>>,
    pub slices: Option<Vec<Setting>>,
    pub tasks: Option<Vec<Setting>>,
    pub policies: Option<Vec<Policy>>,
}

impl<'a> Reconcile<'a> {
    /// A run. Detects first which knobs another process has set since hook did.
    ///
    /// # Errors
    /// If the host's CPUs cannot be read.
    pub(crate) fn new(
        root: &'a Host,
        store: &'a mut Store<Reservation>,
        report: &'a mut Report,
    ) -> Result<Self> {
        let present = cpu::present(root)?;
        let partitioned = cgroup::isolated(root)?.unwrap_or_default();
        let unpartitioned = &present - &partitioned;
        let kernel_masks = KernelMasks::on(root, store, &unpartitioned)?;
        if store.baseline.detect_foreign(root, |knob, given, found| {
            kernel_masks.explains(knob, given, found)
        }) {
            store.save()?;
        }
        let unpartitioned = (!partitioned.is_empty()).then_some(unpartitioned);
        Ok(Self {
            root,
            store,
            report,
            present,
            unpartitioned,
            host_irqs: pin_irqs::Irqs::default(),
            host_kthreads: pin_kthreads::Threads::default(),
            guests: BTreeMap::new(),
            readings: Readings::default(),
            pending: None,
        })
    }

    /// The isolated CPUs of all fenced VMs.
    pub(super) fn isolated(&self) -> CpuSet {
        self.fenced().fold(CpuSet::new(), |all, (_, reservation)| {
            &all | &reservation.settings.isolated
        })
    }

    pub(super) fn fenced(&self) -> impl Iterator<Item = (&u32, &Reservation)> {
        self.store
            .reservations
            .iter()
            .filter(|(_, reservation)| reservation.is_fenced())
    }

    pub(super) fn housekeeping(&self) -> CpuSet {
        &self.present - &self.isolated()
    }

    /// The CPU mask wanted, from the earlier one; `before` is empty if none was set.
    pub(super) fn narrowed(&self) -> impl Fn(&Knob, &Value) -> Value + use<> {
        let fence = (!self.isolated().is_empty()).then(|| self.housekeeping());
        move |_, before| match (&fence, before.cpus()) {
            (Some(fence), Some(cpus)) => cpus.narrow_to(fence).into(),
            _ => before.clone(),
        }
    }

    /// Whether a method is in use: by a VM, or by what one has left in the baseline.
    pub(super) fn uses(&self, isolation: Isolation, leaves: impl Fn(&Knob) -> bool) -> bool {
        self.store
            .reservations
            .values()
            .any(|reservation| reservation.isolation == isolation)
            || self.store.baseline.knobs().any(|(knob, ..)| leaves(knob))
    }

    /// A VM that this run is for, with the QEMU that the caller has found.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub(super) fn introduce(
        &mut self,
        vmid: VmId,
        qemu: Option<&Qemu>,
        reservation: &Reservation,
    ) -> Result<Option<Guest>> {
        let Some(qemu) = qemu else {
            return Ok(None);
        };
        let guest = Guest::new(self.root, vmid, qemu.clone(), reservation.clone())?;
        self.guests.insert(vmid, Some(guest.clone()));
        Ok(Some(guest))
    }

    /// A VM with a reservation, looked up once per run; none if it does not run.
    pub(super) fn guest(&mut self, vmid: VmId) -> Result<Option<Guest>> {
        if let Some(known) = self.guests.get(&vmid) {
            return Ok(known.clone());
        }
        let mut guest = None;
        if let Some(reservation) = self.store.reservations.get(&vmid.into())
            && let Some(qemu) = vm::find(self.root, vmid)?
        {
            guest = match Guest::new(self.root, vmid, qemu, reservation.clone()) {
                Err(error) if error.is_gone() => None,
                found => Some(found?),
            };
        }
        self.guests.insert(vmid, guest.clone());
        Ok(guest)
    }

    /// Runs a step; a failure is reported and does not stop the others.
    pub(super) fn attempt(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = step(self) {
            self.report.error(&error.to_string());
        }
    }

    /// Steps of a plan that need the VM's threads, without a QEMU.
    pub(super) fn leave_open(&mut self, steps: &[&'static str]) {
        for step in steps {
            self.report.unknown_step(step, "its QEMU is needed");
        }
    }

    /// Step 0: the value of every knob that will be changed, on disk before the first change: these
    /// `objects`, and those that both methods change.
    pub(super) fn remember(
        &mut self,
        mut objects: Vec<Setting>,
        isolated: &CpuSet,
        guest: Option<&Guest>,
    ) -> Result<()> {
        objects.extend(pin_irqs::default_mask(self.root)?);
        objects.extend(self.irq_objects()?);
        objects.extend(self.kthread_objects()?);
        objects.extend(self.tuning_objects(isolated)?);
        if let Some(guest) = guest {
            objects.extend(self.vm_threads(guest.vmid, &guest.qemu)?);
        }
        self.adopt(&objects);
        self.store.save()
    }

    /// Takes objects into the baseline.
    pub(super) fn adopt(&mut self, objects: &[Setting]) {
        let kthreadd = self
            .store
            .baseline
            .first_from(&KTHREADD)
            .filter(|knob| is_kthreadd(knob))
            .cloned();
        for object in objects {
            let before = self.value_before(object, kthreadd.as_ref());
            self.store.baseline.adopt(object, &before);
        }
    }

    /// An object's value before the first fence. One that was created during a fence inherited the
    /// default of its kind, which was narrowed then: it gets that default's earlier value.
    fn value_before(&self, object: &Setting, kthreadd: Option<&Knob>) -> Value {
        // A partition itself narrows what is in the VM's slice.
        if matches!(object.knob, Knob::Thread(_))
            && self.unpartitioned.is_some()
            && self.unpartitioned.as_ref() == object.found.cpus()
        {
            return Value::from(&self.present);
        }
        let vm_slice;
        let default = match &object.knob {
            Knob::Irq(_) => Some(&Knob::DefaultIrq),
            Knob::Kthread(_) => kthreadd,
            // A VM that starts while another is fenced.
            Knob::Thread(_) => {
                vm_slice = Knob::UnitCpus(cg_slice::VM_SLICE.to_owned());
                Some(&vm_slice)
            }
            _ => None,
        };
        let baseline = &self.store.baseline;
        let inherited = default
            .filter(|default| baseline.values_set(default).contains(&object.found))
            .and_then(|default| baseline.before(default));
        match inherited {
            Some(before) if before.is_unset() => Value::from(&self.present),
            Some(before) => before.clone(),
            None => object.found.clone(),
        }
    }

    /// Sets objects to what `wanted` makes of their earlier values, and reports how many.
    pub(super) fn set(
        &mut self,
        step: &'static str,
        objects: Vec<Setting>,
        wanted: impl Fn(&Knob, &Value) -> Value,
    ) -> Result<()> {
        let changed = self.change(step, objects, wanted)?;
        self.sum_up(step, changed);
        Ok(())
    }

    pub(super) fn sum_up(&mut self, step: &'static str, changed: usize) {
        if changed > 0 {
            self.report.summary(&format!("{step}: {changed} changed"));
        }
    }

    /// As [`set`](Self::set), but returns how many instead of reporting it.
    pub(super) fn change(
        &mut self,
        step: &'static str,
        objects: Vec<Setting>,
        wanted: impl Fn(&Knob, &Value) -> Value,
    ) -> Result<usize> {
        self.adopt(&objects);
        let plan = self.store.baseline.plan(objects, wanted);
        let mut changed = 0;
        let report = &mut *self.report;
        let all = plan
            .iter()
            .filter(|planned| planned.skip_reason.is_none() && !planned.change.is_noop())
            .count();
        self.store.carry_out(plan, |done| {
            changed += usize::from(done.outcome == Outcome::Changed);
            if matches!(done.change.knob, Knob::CpuOnline(_)) && done.outcome == Outcome::Changed {
                // Each takes the kernel some time.
                report.progress(step, changed, all);
            }
            report.changes(std::slice::from_ref(done));
        })?;
        if changed > 0 {
            self.readings = Readings::default();
        }
        Ok(changed)
    }

    /// Makes and reports a change that the baseline is not needed to undo. Returns whether it was
    /// made.
    pub(super) fn make(&mut self, change: Change) -> bool {
        let done = pinfold_core::apply_one(self.root, change);
        let made = done.outcome == Outcome::Changed;
        self.report.changes(&[done]);
        if made {
            self.readings = Readings::default();
        }
        made
    }

    /// After [`settle`](Self::settle): drops the reservations that are leaving. One with an idle VM
    /// to be started stays, for the process `until` or, once that has ended, for any hook.
    /// With the last fence the baseline is dropped, except values that could not be restored.
    ///
    /// # Errors
    /// If the state cannot be saved.
    pub(crate) fn forget(&mut self, until: Option<TaskId>) -> Result<()> {
        self.store
            .reservations
            .retain(|_, left| left.phase != Phase::Leaving || left.idle_vm_stopped);
        for left in self
            .store
            .reservations
            .values_mut()
            .filter(|left| left.phase == Phase::Leaving)
        {
            (left.phase, left.starter) = (Phase::Idle, until);
        }
        if self.isolated().is_empty() {
            let knobs: Vec<(Knob, Value)> = self
                .store
                .baseline
                .knobs()
                .map(|(knob, _, before)| (knob.clone(), before.clone()))
                .collect();
            let failed = self.report.failures() > 0;
            for (knob, before) in knobs {
                let back = || {
                    knob.read(self.root)
                        .map_or(true, |found| found.is_none_or(|found| found == before))
                };
                if !failed || back() {
                    self.store.baseline.forget(&knob);
                }
            }
        }
        self.store.save()
    }
}

/// Ordered before kthreadd's knob and after those of other kinds.
const KTHREADD: Knob = Knob::Kthread(TaskId {
    pid: task::KTHREADD,
    tid: 0,
    start: 0,
});

fn is_kthreadd(knob: &Knob) -> bool {
    matches!(knob, Knob::Kthread(task) if task.pid == task::KTHREADD)
}

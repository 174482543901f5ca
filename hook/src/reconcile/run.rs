//! One run over the host: what all steps know, the baseline, and how a change is made.

use std::collections::{BTreeMap, BTreeSet};

use pinfold_core::knob::Value;
use pinfold_core::state::{Pending, Store};
use pinfold_core::sys::cpufreq::Policy;
use pinfold_core::sys::{cgroup, cpu, task};
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{Applied, Change, CpuSet, Host, Knob, Outcome, Report, Result, Setting, TaskId};

use super::apart::{Apart, Housekeeping};
use super::changed_by_kernel::ChangedByKernel;
use super::guest::{Guest, find};
use crate::state::reservation::{Isolation, Phase, Reservation};

/// The step of governor and statistics interval, as programs know it.
pub(super) const TUNING: &str = "pace";

/// What the kernel answered for IRQs that it did not move, with these IRQs.
pub(crate) type Refused = BTreeMap<String, BTreeSet<String>>;

/// One run over the host, under the store's lock.
pub(crate) struct Reconcile<'a> {
    pub(super) root: &'a Host,
    pub(super) store: &'a mut Store<Reservation>,
    pub(super) report: &'a mut Report,
    pub(super) present: CpuSet,
    /// CPUs that others keep for themselves, when this run began.
    pub(super) apart: Apart,
    /// The CPUs that VMs' partitions left to everything else when this run began, if there were any.
    unpartitioned: Option<CpuSet>,
    pub(super) host_irqs: pin_irqs::Irqs,
    pub(super) host_kthreads: pin_kthreads::Threads,
    /// VMs that were looked up in this run; none for one that does not run.
    guests: BTreeMap<VmId, Option<Guest>>,
    pub(super) readings: Readings,
    /// Governors and the statistics interval while they are being set.
    pub(super) pending: Option<Pending>,
    /// The VM that this run is for. What fails for another VM is reported and does not count.
    subject: Option<VmId>,
    /// What the fence that is being made depends on; none while nothing is fenced anew.
    pub(super) foundation: Option<Foundation>,
    /// Whether something of it failed.
    pub(super) broken: bool,
    /// IRQs that the kernel did not move, by its answer.
    pub(super) refused: Refused,
    /// Steps that are skipped, because the earlier values of what they change could not be read.
    unread: BTreeSet<&'static str>,
    /// The failures in the report when this run began, and those of this run that do not count.
    earlier_failures: usize,
    left_out: usize,
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

impl Readings {
    /// Of the kinds that the state has most of: they are compared with it first, and then set.
    /// What cannot be read now is read again, and the failure reported, by the step that sets it.
    fn of_saved(
        root: &Host,
        store: &Store<Reservation>,
        irqs: &mut pin_irqs::Irqs,
        kthreads: &mut pin_kthreads::Threads,
    ) -> Self {
        let has = |is: fn(&Knob) -> bool| store.baseline.knobs().any(|(knob, ..)| is(knob));
        let (has_irqs, has_kthreads) = (
            has(|knob| matches!(knob, Knob::Irq(_))),
            has(|knob| matches!(knob, Knob::Kthread(_))),
        );
        Self {
            irqs: has_irqs.then(|| irqs.settings(root).ok()).flatten(),
            kthreads: has_kthreads.then(|| kthreads.settings(root).ok()).flatten(),
            ..Self::default()
        }
    }

    fn by_knob(&self) -> BTreeMap<&Knob, &Value> {
        let all = self.irqs.iter().chain(&self.kthreads).flatten();
        all.map(|object| (&object.knob, &object.found)).collect()
    }
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
        let earlier_failures = report.failures();
        let present = cpu::present(root)?;
        let partitioned = cgroup::isolated(root)?.unwrap_or_default();
        let apart = Apart::on(root, store)?;
        let changed_by_kernel =
            ChangedByKernel::on(root, store, &present, &partitioned, &apart.at_boot)?;
        let (mut host_irqs, mut host_kthreads) = Default::default();
        let readings = Readings::of_saved(root, store, &mut host_irqs, &mut host_kthreads);
        let known = readings.by_knob();
        let read = |knob: &Knob| match known.get(knob) {
            Some(found) => Ok(Some((*found).clone())),
            None => knob.read(root),
        };
        let is_kernels =
            |knob: &Knob, given: &_, found: &_| changed_by_kernel.explains(knob, given, found);
        if store.baseline.detect_foreign(read, is_kernels) {
            store.save()?;
        }
        let of_vms = &(&partitioned - &apart.at_boot) - &apart.partitions;
        let unpartitioned = (!of_vms.is_empty()).then(|| &present - &of_vms);
        Ok(Self {
            root,
            store,
            report,
            present,
            apart,
            unpartitioned,
            host_irqs,
            host_kthreads,
            guests: BTreeMap::new(),
            readings,
            pending: None,
            subject: None,
            foundation: None,
            broken: false,
            refused: BTreeMap::new(),
            unread: BTreeSet::new(),
            earlier_failures,
            left_out: 0,
        })
    }

    /// The same, for a phase of this VM.
    pub(crate) fn for_vm(mut self, vmid: Option<VmId>) -> Self {
        self.subject = vmid;
        self
    }

    /// Whether this run is for this VM.
    pub(super) fn is_for(&self, vmid: VmId) -> bool {
        self.subject == Some(vmid)
    }

    /// Whether something failed that the fence being made depends on.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// IRQs that the kernel did not move.
    pub(crate) fn take_refused(&mut self) -> Refused {
        std::mem::take(&mut self.refused)
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

    pub(super) fn housekeeping(&self) -> Housekeeping {
        self.apart.housekeeping(&self.present - &self.isolated())
    }

    /// The CPUs that a thread has that has asked for none, while no VM is fenced.
    fn common(&self) -> CpuSet {
        &self.present - &self.apart.at_boot
    }

    /// The CPU mask wanted, from the earlier one; `before` is empty if none was set.
    pub(super) fn narrowed(&self) -> impl Fn(&Knob, &Value) -> Value + use<> {
        let left = (!self.isolated().is_empty()).then(|| self.housekeeping());
        move |_, before| match (&left, before.cpus()) {
            (Some(left), Some(unset)) if unset.is_empty() => left.shared.clone().into(),
            (Some(left), Some(cpus)) => left.narrow(cpus).into(),
            _ => before.clone(),
        }
    }

    /// Whether a method is in use: by a VM, or by what one has left in the baseline.
    pub(super) fn uses(&self, isolation: Isolation, leaves: impl Fn(&Knob) -> bool) -> bool {
        self.store
            .reservations
            .values()
            .any(|reservation| reservation.is_fenced() && reservation.isolation == isolation)
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
        self.subject = Some(vmid);
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
            && let Some(qemu) = find(self.root, vmid, reservation)?
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

    /// As [`attempt`](Self::attempt), for a step that only concerns the VM `vmid`: if this run is
    /// for another one, a failure does not count.
    pub(super) fn attempt_for(&mut self, vmid: VmId, step: impl FnOnce(&mut Self) -> Result<()>) {
        let earlier = self.report.failures();
        self.attempt(step);
        if self.subject.is_some_and(|subject| subject != vmid) {
            self.left_out += self.report.leave_out_failures(earlier);
        }
    }

    /// As [`attempt`](Self::attempt), for a step with a name: skipped if the earlier values of what
    /// it changes are unknown.
    pub(super) fn part(&mut self, name: &'static str, step: impl FnOnce(&mut Self) -> Result<()>) {
        if !self.unread.contains(name) {
            self.attempt(step);
        }
    }

    /// What there is to remember for a step; if that cannot be read, the step is skipped.
    pub(super) fn readable(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Self) -> Result<Vec<Setting>>,
    ) -> Vec<Setting> {
        read(self).unwrap_or_else(|error| {
            self.report.error(&format!("{name}: skipped: {error}"));
            self.unread.insert(name);
            Vec::new()
        })
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
        objects.extend(self.readable("irqs", |this| {
            let mut all: Vec<Setting> = pin_irqs::default_mask(this.root)?.into_iter().collect();
            all.extend(this.irq_objects()?);
            all.extend(this.queues(isolated)?);
            Ok(all)
        }));
        objects.extend(self.readable("kthreads", Self::kthread_objects));
        objects.extend(self.readable(TUNING, |this| this.tuning_to_remember(isolated)));
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
        if let (Knob::Thread(_), Some(left), Some(found)) =
            (&object.knob, &self.unpartitioned, object.found.cpus())
        {
            for all in [&self.present, &self.common()] {
                if *found == all & left {
                    return Value::from(all);
                }
            }
        }
        let vm_slice;
        let default = match &object.knob {
            Knob::Irq(_) => Some(&Knob::DefaultIrq),
            Knob::Kthread(_) => kthreadd,
            // A VM that starts while another is fenced.
            Knob::Thread(_) => {
                vm_slice = Knob::UnitCpus(vm::SLICE.to_owned());
                Some(&vm_slice)
            }
            _ => None,
        };
        let baseline = &self.store.baseline;
        let was_set = |default: &Knob, found: &Value| {
            let common = self.common();
            let values = baseline.values_set(default);
            // A thread never has what `isolcpus=` takes from all.
            let is_common = |value: &Value| match (value.cpus(), found.cpus()) {
                (Some(value), Some(found)) => !value.is_empty() && *found == value & &common,
                _ => false,
            };
            let is_thread = matches!(object.knob, Knob::Thread(_));
            values.contains(found) || (is_thread && values.iter().any(is_common))
        };
        let inherited = default
            .filter(|default| was_set(default, &object.found))
            .and_then(|default| baseline.before(default));
        match inherited {
            Some(before) if before.is_unset() => match object.found.cpus() {
                Some(found) if !found.intersects(&self.apart.at_boot) => self.common().into(),
                _ => Value::from(&self.present),
            },
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
        let (foundation, broken) = (&self.foundation, &mut self.broken);
        let refused = &mut self.refused;
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
            *broken |= breaks(foundation.as_ref(), done);
            note_refusal(refused, done);
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
        self.broken |= breaks(self.foundation.as_ref(), &done);
        self.report.changes(&[done]);
        if made {
            self.readings = Readings::default();
        }
        made
    }

    /// After [`settle`](Self::settle): drops the reservations that are leaving. One with devices
    /// to be reset or an idle VM to be started stays, for the process `until` or, once that has ended,
    /// for any hook; and one that comes back from a backup.
    /// With the last fence the baseline is dropped, except values that could not be restored.
    ///
    /// # Errors
    /// If the state cannot be saved.
    pub(crate) fn forget(&mut self, until: Option<TaskId>) -> Result<()> {
        self.store
            .reservations
            .retain(|_, left| left.phase != Phase::Leaving || left.is_owed());
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
            let failed = self.report.failures() + self.left_out > self.earlier_failures;
            let unmoved = !self.refused.is_empty();
            // A VM that starts has it before it is fenced.
            let is_for_a_start = self.halt_polling_asked().is_some();
            for (knob, before) in knobs {
                if is_for_a_start && knob == Knob::HaltPolling {
                    continue;
                }
                let back = || {
                    knob.read(self.root)
                        .map_or(true, |found| found.is_none_or(|found| found == before))
                };
                // An IRQ that was moved and that the kernel does not move back.
                let set = self.store.baseline.values_set(&knob);
                let stuck = unmoved
                    && matches!(knob, Knob::Irq(_))
                    && set.iter().any(|value| *value != before)
                    && !back();
                if stuck {
                    self.report.note(&format!(
                        "{knob}: not moved back to {before}; `hook recover` tries again"
                    ));
                } else if !failed || back() {
                    self.store.baseline.forget(&knob);
                }
            }
        }
        self.store.save()
    }
}

/// What a fence cannot do without: its CPUs, the cgroups that keep others off them or its own, and
/// the pins of the vCPUs.
#[derive(Debug, Clone)]
pub(super) struct Foundation {
    /// The VM's CPUs.
    pub isolated: CpuSet,
    /// The VM's QEMU.
    pub qemu: Option<TaskId>,
    /// The threads that are to run on the VM's CPUs, as far as they are known by now.
    pub inside: BTreeSet<TaskId>,
}

impl Foundation {
    fn includes(&self, knob: &Knob) -> bool {
        match knob {
            Knob::CpuOnline(cpu) => self.isolated.contains(*cpu),
            Knob::UnitCpus(_)
            | Knob::CgroupCpus(_)
            | Knob::Cgroup(_)
            | Knob::ThreadedCgroup(_)
            | Knob::ChildCpusets(_)
            | Knob::ExclusiveCpus(_)
            | Knob::Partition(_)
            | Knob::Delegation(_) => true,
            Knob::CgroupOf(task) => self.qemu == Some(*task),
            Knob::CgroupOfThread(task) | Knob::Thread(task) => self.inside.contains(task),
            Knob::Irq(_)
            | Knob::DefaultIrq
            | Knob::QueueCpus(_)
            | Knob::Workqueues
            | Knob::Kthread(_)
            | Knob::ThreadPolicy(_)
            | Knob::Governor(_)
            | Knob::EnergyPreference(_)
            | Knob::WakeupLatency(_)
            | Knob::HaltPolling
            | Knob::UnitOverrides
            | Knob::ContainerCpus(_)
            | Knob::Sysctl(_)
            | Knob::Trigger(_)
            | Knob::NodeCompaction(_)
            | Knob::PciFunction(_)
            | Knob::PciDriver(_)
            | Knob::PciResetMethod(_)
            | Knob::PciReset(_)
            | Knob::ThreadTimer(_)
            | Knob::Trace(_) => false,
        }
    }
}

/// Whether this outcome means that the fence cannot be had.
fn breaks(foundation: Option<&Foundation>, done: &Applied) -> bool {
    matches!(done.outcome, Outcome::Failed(_) | Outcome::Refused(_))
        && foundation.is_some_and(|foundation| foundation.includes(&done.change.knob))
}

fn note_refusal(refused: &mut Refused, done: &Applied) {
    if let (Knob::Irq(_), Outcome::Refused(why)) = (&done.change.knob, &done.outcome) {
        let labels = refused.entry(why.clone()).or_default();
        labels.insert(done.change.label.to_string());
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

//! One run over the host: what is known to all steps, the baseline, and how a change is made.

use pinfold_core::state::Store;
use pinfold_core::sys::{cgroup, cpu, task};
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{Change, CpuSet, Host, Knob, Outcome, Report, Result, Setting, TaskId};

use super::kernel_masks::KernelMasks;
use crate::state::reservation::{Isolation, Phase, Reservation};

/// One run over the host, under the store's lock.
pub(crate) struct Reconcile<'a> {
    pub(super) root: &'a Host,
    pub(super) store: &'a mut Store<Reservation>,
    pub(super) report: &'a mut Report,
    pub(super) present: CpuSet,
    /// What partitions left to all others when this run began, where there were any.
    pub(super) unpartitioned: Option<String>,
    pub(super) host_irqs: pin_irqs::Irqs,
}

impl<'a> Reconcile<'a> {
    /// A run; looks first which knobs somebody else has set since ours.
    ///
    /// # Errors
    /// Where the host's CPUs cannot be read.
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
        let unpartitioned = (!partitioned.is_empty()).then(|| unpartitioned.to_string());
        Ok(Self {
            root,
            store,
            report,
            present,
            unpartitioned,
            host_irqs: pin_irqs::Irqs::default(),
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

    /// What a CPU mask should be, by what it was before; `before` is empty where none was set.
    pub(super) fn narrowed(&self) -> impl Fn(&Knob, &str) -> String + use<> {
        let fence = (!self.isolated().is_empty()).then(|| self.housekeeping());
        move |_, before| match (&fence, CpuSet::from_kernel_list(before)) {
            (Some(fence), Ok(cpus)) => cpus.narrow_to(fence).to_string(),
            _ => before.to_owned(),
        }
    }

    /// Whether there is anything of a method: a VM, or what one has left in the baseline.
    pub(super) fn uses(&self, isolation: Isolation, leaves: impl Fn(&Knob) -> bool) -> bool {
        self.store
            .reservations
            .values()
            .any(|reservation| reservation.isolation == isolation)
            || self.store.baseline.knobs().any(|(knob, ..)| leaves(knob))
    }

    /// A step whose failure is told and stops nothing else.
    pub(super) fn attempt(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = step(self) {
            self.report.error(&error.to_string());
        }
    }

    /// Steps of a plan that need the VM's threads, without a QEMU.
    pub(super) fn leave_open(&mut self, steps: &[&'static str]) {
        steps
            .iter()
            .for_each(|step| self.report.unknown_step(step, "its QEMU is needed"));
    }

    /// Step 0: the value of every knob that will be touched, on disk before the first touch: these
    /// `objects`, and those that are touched whatever the method.
    pub(super) fn remember(
        &mut self,
        mut objects: Vec<Setting>,
        isolated: &CpuSet,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> Result<()> {
        objects.extend(pin_irqs::default_mask(self.root)?);
        objects.extend(self.host_irqs.settings(self.root)?);
        objects.extend(pin_kthreads::settings(self.root)?.movable);
        objects.extend(self.tuning_objects(isolated)?);
        if let Some(qemu) = qemu {
            objects.extend(self.vm_threads(vmid, qemu)?);
        }
        for object in objects {
            self.adopt(&object);
        }
        self.store.save()
    }

    /// Takes an object into the baseline. One born while the fence stood has what its kind's
    /// default was narrowed to when it was born: it gets what the default was before.
    pub(super) fn adopt(&mut self, object: &Setting) {
        let baseline = &mut self.store.baseline;
        let default = match &object.knob {
            Knob::Irq(_) => Some(Knob::DefaultIrq),
            Knob::Kthread(_) => baseline
                .knobs()
                .map(|(knob, ..)| knob)
                .find(|knob| is_kthreadd(knob))
                .cloned(),
            // A VM that starts while another is fenced.
            Knob::Thread(_) => Some(Knob::UnitCpus(cg_slice::VM_SLICE.to_owned())),
            _ => None,
        };
        // A partition narrows what is in the VM's slice by itself.
        if matches!(object.knob, Knob::Thread(_))
            && self.unpartitioned.as_ref() == Some(&object.found)
        {
            return baseline.adopt(object, &self.present.to_string());
        }
        let inherited = default
            .filter(|default| baseline.values_set(default).contains(&object.found))
            .and_then(|default| baseline.before(&default).map(str::to_owned))
            .map(|before| {
                if before.is_empty() {
                    self.present.to_string()
                } else {
                    before
                }
            });
        baseline.adopt(object, inherited.as_deref().unwrap_or(&object.found));
    }

    /// Sets objects to what `wanted` makes of their values from before, and says how many.
    pub(super) fn set(
        &mut self,
        step: &'static str,
        objects: Vec<Setting>,
        wanted: impl Fn(&Knob, &str) -> String,
    ) -> Result<()> {
        let changed = self.change(step, objects, wanted)?;
        self.sum_up(step, changed);
        Ok(())
    }

    pub(super) fn sum_up(&mut self, step: &'static str, changed: usize) {
        if changed > 0 {
            self.report.summary(&format!("{step}: {changed} set"));
        }
    }

    /// As [`set`](Self::set), but for saying how many.
    pub(super) fn change(
        &mut self,
        step: &'static str,
        objects: Vec<Setting>,
        wanted: impl Fn(&Knob, &str) -> String,
    ) -> Result<usize> {
        for object in &objects {
            self.adopt(object);
        }
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
                // Each takes the kernel a while.
                report.progress(step, changed, all);
            }
            report.changes(std::slice::from_ref(done));
        })?;
        Ok(changed)
    }

    /// Makes a change whose way back does not lie in the baseline, and tells it; says whether it
    /// was made.
    pub(super) fn make(&mut self, change: Change) -> bool {
        let done = pinfold_core::apply_one(self.root, change);
        let made = done.outcome == Outcome::Changed;
        self.report.changes(&[done]);
        made
    }

    /// After [`settle`](Self::settle): drops the reservations that are leaving, but those whose
    /// idle VM is yet to be started, which is nobody else's to do while the process `until` lives;
    /// and with no fence left the baseline, but for what could not be put back.
    ///
    /// # Errors
    /// Where the state cannot be saved.
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
            let knobs: Vec<(Knob, String)> = self
                .store
                .baseline
                .knobs()
                .map(|(knob, _, before)| (knob.clone(), before.to_owned()))
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

fn is_kthreadd(knob: &Knob) -> bool {
    matches!(knob, Knob::Kthread(task) if task.pid == task::KTHREADD)
}

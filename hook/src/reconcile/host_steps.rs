//! The steps that both methods have: IRQs, kthreads, governor and statistics interval.

use std::collections::BTreeMap;

use pinfold_core::knob::Value;
use pinfold_core::sys::cpufreq::{self, Policy};
use pinfold_core::sys::task;
use pinfold_core::{CpuSet, Knob, Outcome, Result, Setting};

use super::run::{Readings, Reconcile};
use crate::state::reservation::Reservation;
use crate::steps;

/// The step of governor and statistics interval, as programs know it.
const TUNING: &str = "pace";
/// The same in a task log.
const TUNING_LABEL: &str = "tuning";
/// What it sets.
const TUNED: &str = "governor, stat_interval";

impl Reconcile<'_> {
    /// Step 3, and again at the end.
    pub(super) fn irqs(&mut self) -> Result<()> {
        self.report.step("irqs");
        // The default first: an IRQ that appears now gets the default or is among the others.
        let default: Vec<Setting> = pin_irqs::default_mask(self.root)?.into_iter().collect();
        let wanted = self.narrowed();
        let mut changed = self.change("irqs", default, &wanted)?;
        let irqs = self.irq_objects()?;
        changed += self.change("irqs", irqs, &wanted)?;
        self.sum_up("irqs", changed);
        Ok(())
    }

    /// Step 3, and again at the end.
    pub(super) fn kthreads(&mut self) -> Result<()> {
        // kthreadd first, then all, as above.
        let mut changed = self.kthreadd()?;
        let kthreads = self.kthread_objects()?;
        changed += self.change("kthreads", kthreads, self.narrowed())?;
        self.sum_up("kthreads", changed);
        Ok(())
    }

    /// Only kthreadd, as a step of its own.
    pub(super) fn kthreadd_first(&mut self) -> Result<()> {
        let changed = self.kthreadd()?;
        self.sum_up("kthreads", changed);
        Ok(())
    }

    fn kthreadd(&mut self) -> Result<usize> {
        self.report.step("kthreads");
        let kthreadd = task::task(self.root, task::KTHREADD, task::KTHREADD)?.id;
        let found = task::affinity(self.root, &kthreadd)?;
        self.change(
            "kthreads",
            vec![Setting::new(
                Knob::Kthread(kthreadd),
                "kthread 2 (kthreadd)",
                found,
            )],
            self.narrowed(),
        )
    }

    /// Step 5: governor and statistics interval.
    pub(super) fn tuning(&mut self) -> Result<()> {
        self.report.labelled_step(TUNING, TUNING_LABEL);
        let objects = self.tuning_objects(&self.isolated())?;
        let wanted = self.tuning_wanted()?;
        let changed = self.change(TUNING, objects, wanted)?;
        self.sum_up(TUNED, changed);
        Ok(())
    }

    /// Starts [`tuning`](Self::tuning), which mostly waits for the kernel, while other steps run.
    /// The values before are on disk when this returns.
    pub(super) fn start_tuning(&mut self) -> Result<()> {
        let objects = self.tuning_objects(&self.isolated())?;
        let wanted = self.tuning_wanted()?;
        self.adopt(&objects);
        let plan = self.store.baseline.plan(objects, wanted);
        self.pending = Some(self.store.start(plan)?);
        self.readings = Readings::default();
        Ok(())
    }

    /// Waits for what [`start_tuning`](Self::start_tuning) started, and reports it as a step.
    pub(super) fn finish_tuning(&mut self) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        self.report.labelled_step(TUNING, TUNING_LABEL);
        let mut changed = 0;
        let report = &mut *self.report;
        self.store.finish(pending, |done| {
            changed += usize::from(done.outcome == Outcome::Changed);
            report.changes(std::slice::from_ref(done));
        });
        self.readings = Readings::default();
        self.sum_up(TUNED, changed);
    }

    /// The governor that a policy's VM asks for, and the longest interval of all VMs.
    fn tuning_wanted(&mut self) -> Result<impl Fn(&Knob, &Value) -> Value + use<>> {
        let fenced: Vec<Reservation> = self
            .fenced()
            .map(|(_, reservation)| reservation.clone())
            .collect();
        let cpus_of: BTreeMap<String, CpuSet> = self
            .policies()?
            .iter()
            .map(|policy| (policy.name.clone(), policy.cpus.clone()))
            .collect();
        Ok(move |knob: &Knob, before: &Value| {
            let wanted = match knob {
                Knob::Governor(name) => fenced
                    .iter()
                    .filter(|vm| {
                        cpus_of
                            .get(name)
                            .is_some_and(|cpus| cpus.intersects(&vm.settings.isolated))
                    })
                    .find_map(|vm| vm.settings.governor.clone()),
                _ => fenced
                    .iter()
                    .filter_map(|vm| vm.settings.stat_interval)
                    .max()
                    .map(|seconds| seconds.to_string()),
            };
            wanted.map_or_else(|| before.clone(), Value::Text)
        })
    }

    pub(super) fn tuning_objects(&mut self, isolated: &CpuSet) -> Result<Vec<Setting>> {
        let policies = self.policies()?;
        let baseline = &self.store.baseline;
        let governed = |name: &str| baseline.has(&Knob::Governor(name.to_owned()));
        let mut objects = governor::settings(&policies, |policy| {
            policy.cpus.intersects(isolated) || governed(&policy.name)
        });
        objects.extend(steps::stat_interval(self.root)?);
        Ok(objects)
    }

    fn policies(&mut self) -> Result<Vec<Policy>> {
        match &self.readings.policies {
            Some(policies) => Ok(policies.clone()),
            None => {
                let policies = cpufreq::policies(self.root)?;
                self.readings.policies = Some(policies.clone());
                Ok(policies)
            }
        }
    }

    pub(super) fn irq_objects(&mut self) -> Result<Vec<Setting>> {
        match &self.readings.irqs {
            Some(objects) => Ok(objects.clone()),
            None => {
                let objects = self.host_irqs.settings(self.root)?;
                self.readings.irqs = Some(objects.clone());
                Ok(objects)
            }
        }
    }

    pub(super) fn kthread_objects(&mut self) -> Result<Vec<Setting>> {
        match &self.readings.kthreads {
            Some(objects) => Ok(objects.clone()),
            None => {
                let objects = self.host_kthreads.settings(self.root)?;
                self.readings.kthreads = Some(objects.clone());
                Ok(objects)
            }
        }
    }
}

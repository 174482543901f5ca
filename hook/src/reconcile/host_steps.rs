//! The steps that both methods have: IRQs, kthreads, governor and statistics interval.

use std::collections::BTreeMap;

use pinfold_core::knob::Value;
use pinfold_core::sys::cpufreq::{self, Policy};
use pinfold_core::sys::task;
use pinfold_core::{CpuSet, Knob, Outcome, Result, Setting};

use super::run::{Readings, Reconcile, TUNING};
use crate::own_steps;
use crate::settings::Settings;
use crate::state::reservation::Reservation;

/// The same in a task log.
const TUNING_LABEL: &str = "tuning";
/// What it sets.
const TUNED: &str = "governor, stat_interval";

/// What VMs ask of a cpufreq policy.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    governor: Option<String>,
    preference: Option<String>,
}

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
        let queues = self.queues(&self.isolated())?;
        changed += self.change("irqs", queues, &wanted)?;
        self.sum_up("irqs", changed);
        Ok(())
    }

    /// The network queues with isolated CPUs, and those that hook has changed. One that is off meanwhile
    /// stays so: its interface may be a new one of this name.
    pub(super) fn queues(&self, isolated: &CpuSet) -> Result<Vec<Setting>> {
        let mut queues = pin_irqs::queues(self.root)?;
        queues.retain(|queue| {
            let is_isolated = |found: &CpuSet| found.intersects(isolated);
            queue.found.cpus().is_some_and(is_isolated) || self.store.baseline.has(&queue.knob)
        });
        Ok(queues)
    }

    /// Step 3, and again at the end.
    pub(super) fn kthreads(&mut self) -> Result<()> {
        // kthreadd first, then all, as above.
        let of_kthreadd = self.kthreadd()?;
        let kthreads = self.kthread_objects()?;
        let mut changed = of_kthreadd + self.change("kthreads", kthreads, self.narrowed())?;
        if of_kthreadd > 0 {
            // One that kthreadd was making then has the earlier CPUs, and was not listed yet.
            let newborns = self.host_kthreads.newborns(self.root)?;
            changed += self.change("kthreads", newborns, self.narrowed())?;
        }
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

    /// The reset methods of PCI functions that an interrupted hook has set.
    pub(super) fn reset_methods(&mut self) -> Result<()> {
        let objects = self.saved_objects(|knob| matches!(knob, Knob::PciResetMethod(_)))?;
        if objects.is_empty() {
            return Ok(());
        }
        self.report.step("pci");
        self.set("pci", objects, |_, before| before.clone())
    }

    /// The objects of the baseline that are still there, with what they have now.
    pub(super) fn saved_objects(&self, is_chosen: impl Fn(&Knob) -> bool) -> Result<Vec<Setting>> {
        let mut objects = Vec::new();
        for (knob, label, _) in self.store.baseline.knobs() {
            if is_chosen(knob)
                && let Some(found) = knob.read(self.root)?
            {
                objects.push(Setting::new(knob.clone(), label, found));
            }
        }
        Ok(objects)
    }

    /// Step 5: governor, wake-up latency and statistics interval.
    pub(super) fn tuning(&mut self) -> Result<()> {
        self.report.labelled_step(TUNING, TUNING_LABEL);
        let objects = self.tuning_objects(&self.isolated())?;
        let wanted = self.tuning_wanted()?;
        let changed = self.change(TUNING, objects, wanted)?;
        let changed = changed + self.set_preferences()?;
        self.sum_up(TUNED, changed);
        Ok(())
    }

    /// After the governors, which change them: the energy preferences of the baseline become what the
    /// VMs ask for, else go back to what they were, except where a VM asks for a governor, which
    /// brings its preference with it. What the kernel has made of these is noted as ours.
    fn set_preferences(&mut self) -> Result<usize> {
        let asked = self.asked();
        let is_governed = |policy: &Policy| asked(policy).governor.is_some();
        for object in self.preferences(is_governed)? {
            self.store.baseline.learn(&object);
        }
        let (mut objects, mut wanted) = (Vec::new(), BTreeMap::new());
        for policy in self.policies()? {
            let knob = Knob::EnergyPreference(policy.name.clone());
            if !self.store.baseline.has(&knob) {
                continue;
            }
            let preference = asked(&policy).preference;
            if preference.is_none() && is_governed(&policy) {
                continue;
            }
            wanted.extend(preference.map(|name| (knob, Value::text(name))));
            // A value that the kernel does not report is none that it had before.
            let found = Value::text(policy.preference.clone().unwrap_or_default());
            objects.push(governor::preference(&policy, found));
        }
        self.change(TUNING, objects, |knob, before| {
            wanted.get(knob).unwrap_or(before).clone()
        })
    }

    /// The energy preferences of the policies that `is_chosen` selects, as far as they are known.
    fn preferences(&mut self, is_chosen: impl Fn(&Policy) -> bool) -> Result<Vec<Setting>> {
        Ok(governor::preferences(&self.policies()?, is_chosen))
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
        self.attempt(|this| this.set_preferences().map(|more| changed += more));
        self.sum_up(TUNED, changed);
    }

    /// What VMs ask of a policy. One with CPUs of a VM is that VM's; the others get what is asked of
    /// housekeeping CPUs by the VM with the lowest number that asks, except those of CPUs that others
    /// keep for themselves.
    fn asked(&self) -> impl Fn(&Policy) -> Asked + use<> {
        let fenced: Vec<Settings> = self.fenced().map(|(_, vm)| vm.settings.clone()).collect();
        let common = self.housekeeping().common;
        move |policy| {
            let is_owner = |vm: &&Settings| vm.isolated.intersects(&policy.cpus);
            let owners: Vec<&Settings> = fenced.iter().filter(is_owner).collect();
            if owners.is_empty() && policy.cpus.intersects(&common) {
                let all = || fenced.iter();
                return Asked {
                    governor: all().find_map(|vm| vm.housekeeping_governor.clone()),
                    preference: all().find_map(|vm| vm.housekeeping_energy_preference.clone()),
                };
            }
            Asked {
                governor: owners.iter().find_map(|vm| vm.governor.clone()),
                preference: owners.iter().find_map(|vm| vm.energy_preference.clone()),
            }
        }
    }

    /// The governor that is asked of a policy, and the longest interval of all VMs.
    fn tuning_wanted(&mut self) -> Result<impl Fn(&Knob, &Value) -> Value + use<>> {
        let fenced: Vec<Reservation> = self
            .fenced()
            .map(|(_, reservation)| reservation.clone())
            .collect();
        let asked = self.asked();
        let halt_polling = self.halt_polling_asked();
        let governors: BTreeMap<String, Option<String>> = (self.policies()?.iter())
            .map(|policy| (policy.name.clone(), asked(policy).governor))
            .collect();
        Ok(move |knob: &Knob, before: &Value| {
            let wanted = match knob {
                Knob::Governor(name) => governors.get(name).cloned().flatten().map(Value::Text),
                Knob::WakeupLatency(cpu) => fenced
                    .iter()
                    .filter(|vm| vm.settings.isolated.contains(*cpu))
                    .find_map(|vm| vm.settings.max_latency_us)
                    .map(governor::latency),
                Knob::HaltPolling => halt_polling.map(|ns| Value::text(ns.to_string())),
                _ => fenced
                    .iter()
                    .filter_map(|vm| vm.settings.stat_interval)
                    .max()
                    .map(|seconds| Value::Text(seconds.to_string())),
            };
            wanted.unwrap_or_else(|| before.clone())
        })
    }

    /// What is remembered before the first change: what [`tuning`](Self::tuning) sets, and what the
    /// kernel changes with it.
    pub(super) fn tuning_to_remember(&mut self, isolated: &CpuSet) -> Result<Vec<Setting>> {
        let mut all = self.tuning_objects(isolated)?;
        let asked = self.asked();
        all.extend(self.preferences(|policy| {
            policy.cpus.intersects(isolated) || asked(policy) != Asked::default()
        })?);
        Ok(all)
    }

    fn tuning_objects(&mut self, isolated: &CpuSet) -> Result<Vec<Setting>> {
        let policies = self.policies()?;
        let asked = self.asked();
        let baseline = &self.store.baseline;
        let governed = |name: &str| baseline.has(&Knob::Governor(name.to_owned()));
        let mut objects = governor::settings(&policies, |policy| {
            policy.cpus.intersects(isolated)
                || asked(policy).governor.is_some()
                || governed(&policy.name)
        });
        objects.extend(own_steps::stat_interval(self.root)?);
        objects.extend(governor::latencies(self.root, &self.limited())?);
        objects.extend(self.halt_polling_object()?);
        Ok(objects)
    }

    /// The longest polling that a VM which starts or runs asks for.
    pub(super) fn halt_polling_asked(&self) -> Option<u32> {
        let claims = self.store.reservations.values().filter(|vm| vm.is_claim());
        claims.filter_map(|vm| vm.settings.halt_poll_ns).max()
    }

    fn halt_polling_object(&self) -> Result<Option<Setting>> {
        let is_ours = self.store.baseline.has(&Knob::HaltPolling);
        match is_ours || self.halt_polling_asked().is_some() {
            true => own_steps::halt_polling(self.root),
            false => Ok(None),
        }
    }

    /// For pre-start: on Linux 5.9 to 6.1 a VM keeps what is set when KVM makes it
    /// (virt/kvm/kvm_main.c, `kvm_create_vm`).
    ///
    /// # Errors
    /// If it cannot be read, or the state cannot be saved.
    pub(crate) fn set_halt_polling(&mut self) -> Result<()> {
        let object = self.halt_polling_object()?;
        self.report.labelled_step(TUNING, TUNING_LABEL);
        let asked = self.halt_polling_asked();
        let changed = self.change(TUNING, object.into_iter().collect(), |_, before| {
            asked.map_or_else(|| before.clone(), |ns| Value::text(ns.to_string()))
        })?;
        self.sum_up("halt_poll_ns", changed);
        Ok(())
    }

    /// The CPUs whose wake-up latency hook sets, or has set.
    fn limited(&self) -> CpuSet {
        let before = self.store.baseline.knobs();
        let mut cpus: CpuSet = before
            .filter_map(|(knob, ..)| governor::cpu_of(knob))
            .collect();
        for (_, vm) in self.fenced() {
            if vm.settings.max_latency_us.is_some() {
                cpus = &cpus | &vm.settings.isolated;
            }
        }
        cpus
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

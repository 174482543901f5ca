//! From (baseline, reservations) to what every knob should hold, and the steps that bring it there.
//!
//! Every phase changes the set of reservations and then comes here. A knob's wanted value is
//! computed from its value before the first touch: CPUs held to the housekeeping CPUs while any VM
//! is fenced, the old value when none is. So isolating, releasing, mending after a crash and a
//! second VM are one computation.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pinfold_core::knob::ABSENT;
use pinfold_core::store::Store;
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{
    Change, CpuSet, Error, Knob, Object, Outcome, Report, Result, Sysroot, TaskId, cgroup, cpu,
    cpufreq, irq, process, vm,
};

use crate::by_kernel::ByKernel;
use crate::reservation::{Isolation, Phase, Reservation};
use crate::steps;

/// One run over the host, under the store's lock.
pub(crate) struct Reconcile<'a> {
    root: &'a Sysroot,
    store: &'a mut Store<Reservation>,
    report: &'a mut Report,
    present: CpuSet,
    /// What partitions left to all others when this run began, where there were any.
    left: Option<String>,
}

impl<'a> Reconcile<'a> {
    /// A run; looks first which knobs somebody else has set since ours.
    ///
    /// # Errors
    /// Where the host's CPUs cannot be read.
    pub(crate) fn new(
        root: &'a Sysroot,
        store: &'a mut Store<Reservation>,
        report: &'a mut Report,
    ) -> Result<Self> {
        let present = cpu::present(root)?;
        let partitioned = cgroup::isolated(root)?.unwrap_or_default();
        let left = &present - &partitioned;
        let by_kernel = ByKernel::on(root, store, &left)?;
        if store.baseline.look(root, |knob, given, found| {
            by_kernel.has_set(knob, given, found)
        }) {
            store.save()?;
        }
        let left = (!partitioned.is_empty()).then(|| left.to_string());
        Ok(Self {
            root,
            store,
            report,
            present,
            left,
        })
    }

    /// The isolated CPUs of all fenced VMs.
    fn isolated(&self) -> CpuSet {
        self.fenced().fold(CpuSet::new(), |all, (_, reservation)| {
            &all | &reservation.settings.isolated
        })
    }

    fn fenced(&self) -> impl Iterator<Item = (&u32, &Reservation)> {
        self.store
            .reservations
            .iter()
            .filter(|(_, reservation)| reservation.is_fenced())
    }

    fn housekeeping(&self) -> CpuSet {
        &self.present - &self.isolated()
    }

    /// What a CPU mask should be, by what it was before; `before` is empty where none was set.
    fn held(&self) -> impl Fn(&Knob, &str) -> String + use<> {
        let fence = (!self.isolated().is_empty()).then(|| self.housekeeping());
        move |_, before| match (&fence, CpuSet::from_kernel_list(before)) {
            (Some(fence), Ok(cpus)) => cpus.held_to(fence).to_string(),
            _ => before.to_owned(),
        }
    }

    /// Fences a VM's CPUs in the documented order (docs/design.md, "The order"). The reservation is
    /// in the store, with its QEMU; without one, which only a plan may be, what its threads need is
    /// left open. Afterwards the caller looks at the report: any failure means that the VM is to be
    /// released.
    ///
    /// # Errors
    /// Where the host cannot be read or the state cannot be saved; what was done so far is in the
    /// baseline.
    pub(crate) fn isolate(&mut self, vmid: VmId, qemu: Option<&Qemu>) -> Result<()> {
        let Some(reservation) = self.store.reservations.get(&vmid.into()).cloned() else {
            return Ok(());
        };
        let isolated = reservation.settings.isolated.clone();
        let first_time = reservation.phase == Phase::Isolating;
        self.report.step("baseline");
        if reservation.isolation == Isolation::Partition {
            return self.isolate_by_partition(&isolated, vmid, qemu);
        }
        let slices = self.slice_objects()?;
        let mut objects = slices.clone();
        objects.push(cg_slice::overrides(self.root)?);
        objects.extend(cpu_hotplug::objects(self.root, &isolated)?);
        objects.extend(self.task_objects()?);
        self.remember(objects, &isolated, vmid, qemu)?;
        if !first_time {
            // Its vCPUs run there: taking the CPUs offline now would break their pins.
            self.settle();
            return Ok(());
        }
        self.slices(slices)?;
        self.tasks()?;
        self.online("offline", &isolated, "0")?;
        self.irqs()?;
        self.kthreads()?;
        // Those too that a killed run of another VM's hook left offline.
        self.online("online", &self.online_before(), "1")?;
        self.pace()?;
        match qemu {
            Some(qemu) => {
                self.decouple(vmid, qemu)?;
                self.pins(vmid, qemu)?;
            }
            None => self.leave_open(&["decouple", "pins"]),
        }
        self.all_pins(Some(vmid))?;
        // Coming online, CPUs have got back some of what was thrown off them.
        self.irqs()?;
        self.kthreads()
    }

    /// The same by a cpuset partition: one write keeps tasks, kernel threads and unbound workqueues
    /// off.
    fn isolate_by_partition(
        &mut self,
        isolated: &CpuSet,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> Result<()> {
        self.remember(Vec::new(), isolated, vmid, qemu)?;
        // Before the kernel does it: only what is set by hand is handed on to new kernel threads
        // (Linux 6.12; 7.0 needs it no more).
        let changed = self.kthreadd()?;
        self.sum_up("kthreads", changed);
        match qemu {
            Some(qemu) => {
                self.exclusive()?;
                self.partition(vmid, qemu)?;
                self.pins(vmid, qemu)?;
            }
            None => self.leave_open(&["exclusive", "partition", "pins"]),
        }
        self.all_pins(Some(vmid))?;
        self.irqs()?;
        self.kthreads()?;
        self.pace()
    }

    /// Steps of a plan that need the VM's threads, without a QEMU.
    fn leave_open(&mut self, steps: &[&'static str]) {
        steps
            .iter()
            .for_each(|step| self.report.unknown_step(step, "its QEMU is needed"));
    }

    /// Brings everything to what the reservations ask for, CPUs that a killed run left offline
    /// first; after the last reservation that is what was before the first. What fails is told and
    /// stops nothing else.
    pub(crate) fn settle(&mut self) {
        if self.uses(Isolation::Partition, |knob| {
            matches!(knob, Knob::ExclusiveCpus(_))
        }) {
            self.attempt(Self::undo_partitions);
            self.attempt(Self::exclusive);
            self.attempt(Self::tasks);
        }
        if self.uses(Isolation::Hotplug, |knob| {
            matches!(knob, Knob::UnitCpus(_) | Knob::CpuOnline(_))
        }) {
            self.attempt(|this| this.online("online", &this.online_before(), "1"));
            self.attempt(|this| this.slice_objects().and_then(|slices| this.slices(slices)));
            self.attempt(Self::tasks);
        }
        self.attempt(Self::irqs);
        self.attempt(Self::kthreads);
        self.attempt(Self::pace);
        self.attempt(|this| this.all_pins(None));
    }

    /// Whether there is anything of a method: a VM, or what one has left in the baseline.
    fn uses(&self, isolation: Isolation, leaves: impl Fn(&Knob) -> bool) -> bool {
        self.store
            .reservations
            .values()
            .any(|reservation| reservation.isolation == isolation)
            || self.store.baseline.knobs().any(|(knob, ..)| leaves(knob))
    }

    /// The CPUs of the baseline that were online before.
    fn online_before(&self) -> CpuSet {
        let online = |(knob, _, before): (&Knob, &str, &str)| match knob {
            Knob::CpuOnline(cpu) if before == "1" => Some(*cpu),
            _ => None,
        };
        self.store.baseline.knobs().filter_map(online).collect()
    }

    /// A step whose failure is told and stops nothing else.
    fn attempt(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = step(self) {
            self.report.error(&error.to_string());
        }
    }

    /// Step 0: the value of every knob that will be touched, on disk before the first touch: these
    /// `objects`, and those that are touched whatever the method.
    fn remember(
        &mut self,
        mut objects: Vec<Object>,
        isolated: &CpuSet,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> Result<()> {
        objects.extend(pin_irqs::objects(self.root)?);
        objects.extend(pin_kthreads::objects(self.root)?.movable);
        objects.extend(self.pace_objects(isolated)?);
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
    fn adopt(&mut self, object: &Object) {
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
        if matches!(object.knob, Knob::Thread(_)) && self.left.as_ref() == Some(&object.found) {
            return baseline.adopt(object, &self.present.to_string());
        }
        let inherited = default
            .filter(|default| baseline.set(default).contains(&object.found))
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
    fn set(
        &mut self,
        step: &'static str,
        objects: Vec<Object>,
        wanted: impl Fn(&Knob, &str) -> String,
    ) -> Result<()> {
        let changed = self.change(step, objects, wanted)?;
        self.sum_up(step, changed);
        Ok(())
    }

    fn sum_up(&mut self, step: &'static str, changed: usize) {
        if changed > 0 {
            self.report.summary(&format!("{step}: {changed} set"));
        }
    }

    /// As [`set`](Self::set), but for saying how many.
    fn change(
        &mut self,
        step: &'static str,
        objects: Vec<Object>,
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
            .filter(|planned| planned.left.is_none() && !planned.change.is_noop())
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
    fn make(&mut self, change: Change) -> bool {
        let done = pinfold_core::apply_one(self.root, change);
        let made = done.outcome == Outcome::Changed;
        self.report.changes(&[done]);
        made
    }

    /// Step 1: everything but the fenced VMs off their CPUs, as far as cgroups reach.
    fn slices(&mut self, mut objects: Vec<Object>) -> Result<()> {
        self.report.step("slices");
        let wanted = self.held();
        if self.isolated().is_empty() {
            // Back in the other order: with its last unit the controller goes, and all must be wide
            // by then.
            objects.reverse();
        }
        self.set("slices", objects, wanted)?;
        if !self.isolated().is_empty() {
            return Ok(());
        }
        // All units that are ours have their old values back; what set-property has left behind
        // goes.
        let baseline = &self.store.baseline;
        let units: Vec<String> = (baseline.knobs())
            .filter(|(knob, ..)| !baseline.is_foreign(knob))
            .filter_map(|(knob, ..)| {
                if let Knob::UnitCpus(unit) = knob {
                    Some(unit.clone())
                } else {
                    None
                }
            })
            .collect();
        let before = baseline
            .before(&Knob::UnitOverrides)
            .unwrap_or_default()
            .to_owned();
        let change = cg_slice::plan_overrides(cg_slice::overrides(self.root)?, &before, &units);
        if !change.is_noop() {
            self.make(change);
        }
        Ok(())
    }

    fn slice_objects(&self) -> Result<Vec<Object>> {
        let mut objects = cg_slice::objects(self.root, Vec::new())?;
        if self.root.exists(cgroup::path(cg_slice::VM_SLICE)) {
            objects.extend(cg_slice::objects(
                self.root,
                vec![cg_slice::VM_SLICE.to_owned()],
            )?);
        }
        Ok(objects)
    }

    /// User threads with a mask of their own (taskset, `affinity:`), where the kernel forgets it in
    /// step 1. Where it keeps it, what a thread has asked for while CPUs were fenced cannot be
    /// read: it is the kernel's to give back. There the threads of VMs that ended their fence and
    /// run on are left, whose masks are ours.
    fn tasks(&mut self) -> Result<()> {
        self.report.step("tasks");
        let objects = self.task_objects()?;
        let wanted = self.held();
        self.set("tasks", objects, wanted)
    }

    /// Threads of the baseline, but for those of fenced VMs.
    fn freed_objects(&self) -> Result<Vec<Object>> {
        let mut fenced = Vec::new();
        for (id, _) in self.fenced() {
            let vmid = VmId::try_from(*id)?;
            match vm::find(self.root, vmid)?.map(|qemu| cg_slice::processes(self.root, vmid, &qemu))
            {
                Some(Err(error)) if error.is_gone() => {}
                Some(processes) => fenced.extend(processes?),
                None => {}
            }
        }
        let mut objects = Vec::new();
        for (knob, label, _) in self.store.baseline.knobs() {
            if matches!(knob, Knob::Thread(task) if !fenced.contains(&task.pid))
                && let Some(found) = knob.read(self.root)?
            {
                objects.push(Object::new(knob.clone(), label, found));
            }
        }
        Ok(objects)
    }

    fn task_objects(&self) -> Result<Vec<Object>> {
        if process::keeps_requested_cpus(self.root)? {
            return self.freed_objects();
        }
        let fenced: Vec<i32> = self
            .fenced()
            .filter_map(|(_, reservation)| Some(reservation.qemu?.pid))
            .collect();
        let online = cpu::online(self.root)?;
        let mut objects = Vec::new();
        for pid in process::user_pids(self.root)? {
            let beside_qemu = || {
                cgroup::of_process(self.root, pid)
                    .is_ok_and(|path| path.contains(cg_slice::DECOUPLED))
            };
            if fenced.contains(&pid) || (!fenced.is_empty() && beside_qemu()) {
                continue;
            }
            let tasks = match process::tasks(self.root, pid) {
                Err(error) if error.is_gone() => continue,
                tasks => tasks?,
            };
            if tasks.first().is_none_or(|task| task.kernel) {
                continue;
            }
            let mut effective = None;
            for task in tasks {
                let knob = Knob::Thread(task.id);
                let known = self.store.baseline.has(&knob);
                let cpus = match process::affinity(self.root, &task.id) {
                    Err(error) if error.is_gone() => continue,
                    cpus => cpus?,
                };
                if !known && cpus == online {
                    continue;
                }
                if !known
                    && effective
                        .get_or_insert_with(|| effective_cpus(self.root, pid))
                        .as_ref()
                        == Some(&cpus)
                {
                    continue;
                }
                objects.push(Object::new(
                    knob,
                    format!("thread {} ({})", task.id.tid, task.name),
                    cpus.to_string(),
                ));
            }
        }
        Ok(objects)
    }

    /// Steps 2 and 4.
    fn online(&mut self, step: &'static str, cpus: &CpuSet, state: &str) -> Result<()> {
        if cpus.is_empty() {
            return Ok(());
        }
        self.report.step(step);
        if state == "0" {
            for note in cpu_hotplug::check_offline(self.root, cpus)? {
                self.report.detail(&note);
            }
        }
        let objects = cpu_hotplug::objects(self.root, cpus)?;
        // A CPU that the admin had taken offline stays so.
        self.set(step, objects, |_, before| {
            if before == "0" {
                before.to_owned()
            } else {
                state.to_owned()
            }
        })
    }

    /// Step 3, and again at the end.
    fn irqs(&mut self) -> Result<()> {
        self.report.step("irqs");
        // The default first, then all: what is born between starts with the one or is seen with the
        // others.
        let default: Vec<Object> = irq::default_mask(self.root)?.into_iter().collect();
        let wanted = self.held();
        let mut changed = self.change("irqs", default, &wanted)?;
        changed += self.change("irqs", pin_irqs::objects(self.root)?, &wanted)?;
        self.sum_up("irqs", changed);
        Ok(())
    }

    /// Step 3, and again at the end.
    fn kthreads(&mut self) -> Result<()> {
        // kthreadd first, then all, as above.
        let mut changed = self.kthreadd()?;
        changed += self.change(
            "kthreads",
            pin_kthreads::objects(self.root)?.movable,
            self.held(),
        )?;
        self.sum_up("kthreads", changed);
        Ok(())
    }

    fn kthreadd(&mut self) -> Result<usize> {
        self.report.step("kthreads");
        let kthreadd = process::task(self.root, process::KTHREADD, process::KTHREADD)?.id;
        let found = process::affinity(self.root, &kthreadd)?.to_string();
        self.change(
            "kthreads",
            vec![Object::new(
                Knob::Kthread(kthreadd),
                "kthread 2 (kthreadd)",
                found,
            )],
            self.held(),
        )
    }

    /// The way down to partitions: what is over the scopes of these VMs has their CPUs exclusively.
    fn exclusive(&mut self) -> Result<()> {
        self.report.step("exclusive");
        let mut given: BTreeMap<Knob, CpuSet> = BTreeMap::new();
        for (id, reservation) in self
            .fenced()
            .filter(|(_, fenced)| fenced.isolation == Isolation::Partition)
        {
            let vmid = VmId::try_from(*id)?;
            let Some(qemu) = vm::find(self.root, vmid)? else {
                continue;
            };
            let scope = cg_slice::scope(self.root, vmid, &qemu)?;
            for above in cgroup::with_ancestors(&scope).filter(|above| *above != scope) {
                let cpus = given
                    .entry(Knob::ExclusiveCpus(above.to_owned()))
                    .or_default();
                *cpus = &*cpus | &reservation.settings.isolated;
            }
        }
        let known = self.store.baseline.knobs().map(|(knob, ..)| knob);
        let knobs: BTreeSet<Knob> = known
            .filter(|knob| matches!(knob, Knob::ExclusiveCpus(_)))
            .chain(given.keys())
            .cloned()
            .collect();
        let mut objects = Vec::new();
        for knob in knobs {
            objects.extend(
                knob.read(self.root)?
                    .map(|found| Object::new(knob.clone(), knob.to_string(), found)),
            );
        }
        self.set("exclusive", objects, |knob, before| {
            match (given.get(knob), CpuSet::from_kernel_list(before)) {
                (Some(cpus), Ok(before)) => (&before | cpus).to_string(),
                _ => before.to_owned(),
            }
        })
    }

    /// A VM's partition, made and looked at.
    fn partition(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("partition");
        let Some(reservation) = self.store.reservations.get(&vmid.into()) else {
            return Ok(());
        };
        let isolated = reservation.settings.isolated.clone();
        let scope = cg_slice::scope(self.root, vmid, qemu)?;
        cg_slice::partition::check_delegated(self.root, vmid)?;
        let mut made = 0;
        for change in cg_slice::partition::plan_vcpus(self.root, &scope, &isolated)? {
            made += usize::from(self.make(change));
            if self.report.failures() > 0 {
                return Ok(());
            }
        }
        let now = cgroup::isolated(self.root)?.unwrap_or_default();
        if !isolated.is_subset(&now) && !self.root.is_for_looking() {
            let why = format!("the kernel took it and isolates CPU {now} only");
            return Err(Error::unusable(format!("partition of CPU {isolated}"), why));
        }
        self.sum_up("partition", made);
        Ok(())
    }

    /// Takes their partitions from VMs that leave and run on, as after a step that failed.
    fn undo_partitions(&mut self) -> Result<()> {
        self.report.step("partition");
        let leaving = |(_, reservation): &(&u32, &Reservation)| {
            reservation.phase == Phase::Leaving && reservation.isolation == Isolation::Partition
        };
        let ids: Vec<u32> = self
            .store
            .reservations
            .iter()
            .filter(leaving)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(qemu) = vm::find(self.root, VmId::try_from(id)?)? else {
                continue;
            };
            let scope = cgroup::of_process(self.root, qemu.id.pid)?;
            for change in cg_slice::partition::plan_undo_vcpus(self.root, &scope, qemu.id.pid)? {
                self.make(change);
            }
        }
        Ok(())
    }

    /// Step 5: governor and statistics interval.
    fn pace(&mut self) -> Result<()> {
        self.report.step("pace");
        let objects = self.pace_objects(&self.isolated())?;
        let fenced: Vec<Reservation> = self
            .fenced()
            .map(|(_, reservation)| reservation.clone())
            .collect();
        let policies = cpufreq::policies(self.root)?;
        self.set("pace", objects, move |knob, before| {
            let asked = match knob {
                Knob::Governor(name) => {
                    let policy = policies.iter().find(|policy| policy.name == *name);
                    let of = |reservation: &&Reservation| {
                        policy.is_some_and(|policy| {
                            policy.cpus.intersects(&reservation.settings.isolated)
                        })
                    };
                    fenced
                        .iter()
                        .filter(of)
                        .find_map(|reservation| reservation.settings.governor.clone())
                }
                _ => fenced
                    .iter()
                    .filter_map(|reservation| reservation.settings.stat_interval)
                    .max()
                    .map(|s| s.to_string()),
            };
            asked.unwrap_or_else(|| before.to_owned())
        })
    }

    fn pace_objects(&self, isolated: &CpuSet) -> Result<Vec<Object>> {
        let baseline = &self.store.baseline;
        let governed = |name: &str| baseline.has(&Knob::Governor(name.to_owned()));
        let mut objects: Vec<Object> = cpufreq::policies(self.root)?
            .into_iter()
            .filter(|policy| policy.cpus.intersects(isolated) || governed(&policy.name))
            .map(|policy| policy.object())
            .collect();
        objects.extend(steps::stat_interval(self.root)?);
        Ok(objects)
    }

    /// Step 6.
    fn decouple(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("decouple");
        let mut changes = Vec::new();
        if self.fenced().count() > 1 {
            // Outside the slice nothing else holds a thread off the others' CPUs until it is
            // pinned. What CPUs it has asked for itself cannot be read, and since Linux 6.2 is kept
            // wherever it goes.
            let asked = |(object, cpus): (Object, String)| {
                Object {
                    found: String::new(),
                    ..object
                }
                .want(cpus)
            };
            changes.extend(self.kept_off_others(vmid, qemu)?.into_iter().map(asked));
        }
        changes.extend(cg_slice::plan_decouple(self.root, vmid)?);
        let mut changed = 0;
        for change in changes {
            changed += usize::from(self.make(change));
        }
        self.sum_up("decouple", changed);
        Ok(())
    }

    /// A VM's threads, each with the CPUs it has less those of other VMs.
    fn kept_off_others(&self, vmid: VmId, qemu: &Qemu) -> Result<Vec<(Object, String)>> {
        let mut fence = self.housekeeping();
        if let Some(own) = self.store.reservations.get(&vmid.into()) {
            fence = &fence | &own.settings.isolated;
        }
        let kept = |object: Object| {
            let cpus = CpuSet::from_kernel_list(&object.found)
                .map_or_else(|_| fence.clone(), |it| it.held_to(&fence));
            (object, cpus.to_string())
        };
        Ok(self.vm_threads(vmid, qemu)?.into_iter().map(kept).collect())
    }

    /// Step 7: the VM's own threads.
    fn pins(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("pins");
        let Some(reservation) = self.store.reservations.get(&vmid.into()).cloned() else {
            return Ok(());
        };
        let threads = vm::threads(
            self.root,
            qemu,
            Duration::from_secs(reservation.settings.deadlines.qmp),
        )?;
        for note in &threads.notes {
            self.report.note(note);
        }
        let mut threads = threads.threads;
        // vCPUs first, in their order.
        threads.sort_by(|a, b| (&a.role, a.id.tid).cmp(&(&b.role, b.id.tid)));
        let housekeeping = self.housekeeping();
        let mut wanted = BTreeMap::new();
        let mut objects = Vec::new();
        for thread in threads {
            let cpus = self.cpus_for(&reservation, &thread.role, &housekeeping)?;
            let object = pin_vcpu::object(&thread);
            wanted.insert(object.knob.clone(), cpus.to_string());
            objects.push(object);
        }
        if reservation.isolation == Isolation::Partition {
            self.place(
                &cg_slice::scope(self.root, vmid, qemu)?,
                &reservation,
                &objects,
                &wanted,
            )?;
        }
        // Its helpers (swtpm, virtiofsd) came along out of the slice, and belong with the emulator.
        let beside = self
            .cpus_for(&reservation, &vm::Role::Emulator, &housekeeping)?
            .to_string();
        for pid in cg_slice::processes(self.root, vmid, qemu)?
            .into_iter()
            .skip(1)
        {
            for object in self.thread_objects(pid)? {
                wanted.insert(object.knob.clone(), beside.clone());
                objects.push(object);
            }
        }
        self.pin(objects, wanted)
    }

    /// Sets threads to the CPUs listed for each.
    fn pin(&mut self, objects: Vec<Object>, wanted: BTreeMap<Knob, String>) -> Result<()> {
        self.set("pins", objects, move |knob, before| {
            wanted
                .get(knob)
                .cloned()
                .unwrap_or_else(|| before.to_owned())
        })
    }

    /// Threads to the side of the partition that has the CPUs they are to have.
    fn place(
        &mut self,
        scope: &str,
        reservation: &Reservation,
        threads: &[Object],
        wanted: &BTreeMap<Knob, String>,
    ) -> Result<()> {
        let vcpus = cg_slice::partition::vcpu_cgroup(scope);
        for Object { knob, label, .. } in threads {
            let Knob::Thread(task) = knob else { continue };
            let inside = (wanted
                .get(knob)
                .and_then(|list| CpuSet::from_kernel_list(list).ok()))
            .is_some_and(|cpus| cpus.is_subset(&reservation.settings.isolated));
            let cgroup = if inside { &vcpus } else { scope };
            if let Some(change) =
                cg_slice::partition::to_cgroup(self.root, *task, label.clone(), cgroup)?
                && !change.is_noop()
            {
                self.make(change);
            }
        }
        Ok(())
    }

    /// The threads of all processes of a VM.
    fn vm_threads(&self, vmid: VmId, qemu: &Qemu) -> Result<Vec<Object>> {
        let mut objects = Vec::new();
        for pid in cg_slice::processes(self.root, vmid, qemu)? {
            objects.extend(self.thread_objects(pid)?);
        }
        Ok(objects)
    }

    /// A process's threads with the CPUs they may run on; those that end meanwhile are left out.
    /// None of a kernel thread, which may be in a VM's cgroup too (kvm-nx-lpage-recovery on Linux
    /// 6.1): it has a step of its own.
    fn thread_objects(&self, pid: i32) -> Result<Vec<Object>> {
        let tasks = match process::tasks(self.root, pid) {
            Err(error) if error.is_gone() => return Ok(Vec::new()),
            tasks => tasks?,
        };
        let mut objects = Vec::with_capacity(tasks.len());
        for task in tasks.into_iter().filter(|task| !task.kernel) {
            match process::affinity(self.root, &task.id) {
                Ok(cpus) => objects.push(Object::new(
                    Knob::Thread(task.id),
                    format!("thread {} ({})", task.id.tid, task.name),
                    cpus.to_string(),
                )),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(objects)
    }

    fn cpus_for(
        &self,
        reservation: &Reservation,
        role: &vm::Role,
        housekeeping: &CpuSet,
    ) -> Result<CpuSet> {
        let settings = &reservation.settings;
        // What the settings say, less what another VM has fenced off since.
        let aside = |cpus: &CpuSet| cpus.held_to(housekeeping);
        let emulator = || {
            settings
                .emulator
                .as_ref()
                .map_or_else(|| housekeeping.clone(), aside)
        };
        Ok(match role {
            vm::Role::Vcpu(vcpu) => reservation.pin(*vcpu).cloned().ok_or_else(|| {
                Error::unusable(
                    format!("vCPU {vcpu}"),
                    format!("{} has no pin for it", settings.source),
                )
            })?,
            vm::Role::Iothread(id) => {
                let named = settings.iothread.get(id).or(settings.iothreads.as_ref());
                named.map_or_else(emulator, |cpus| {
                    if cpus.is_subset(&settings.isolated) {
                        cpus.clone()
                    } else {
                        aside(cpus)
                    }
                })
            }
            vm::Role::Emulator => emulator(),
        })
    }

    /// The threads of all fenced VMs: one's emulator threads may stand where another's vCPUs go, or
    /// may come back. Those of a VM whose hook was killed half way are kept off the others' CPUs;
    /// the rest is for its own hook, or recover. Not those of `pinned`, which have been.
    fn all_pins(&mut self, pinned: Option<VmId>) -> Result<()> {
        let fenced: Vec<(VmId, Phase, Isolation)> = self
            .fenced()
            .filter_map(|(id, claim)| {
                Some((VmId::try_from(*id).ok()?, claim.phase, claim.isolation))
            })
            .filter(|(id, ..)| Some(*id) != pinned)
            .collect();
        for (vmid, phase, isolation) in fenced {
            let Some(qemu) = vm::find(self.root, vmid)? else {
                continue;
            };
            let pinned = match phase {
                Phase::Isolated => self.pins(vmid, &qemu),
                Phase::Isolating if isolation == Isolation::Hotplug => {
                    self.kept_off_others(vmid, &qemu).and_then(|kept| {
                        let each = kept
                            .into_iter()
                            .map(|(object, cpus)| (object.clone(), (object.knob, cpus)));
                        let (objects, wanted) = each.unzip();
                        self.pin(objects, wanted)
                    })
                }
                _ => Ok(()),
            };
            match pinned {
                Err(error) if error.is_gone() => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Takes what a VM has outside its slice back: one that runs to its scope, with its threads on
    /// the CPUs they had; of one that is gone the empty cgroup. What fails is told.
    pub(crate) fn undo_vm(&mut self, vmid: VmId) {
        self.attempt(|this| {
            match vm::find(this.root, vmid)? {
                Some(qemu) => this.couple(vmid, &qemu)?,
                None => this.remove_cgroup(vmid),
            }
            if let Some(change) =
                cg_slice::partition::delegation(this.root, vmid, ABSENT)?.filter(|it| !it.is_noop())
            {
                this.report.step("delegation");
                this.make(change);
            }
            Ok(())
        });
    }

    fn couple(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("couple");
        let decoupled = cgroup::of_process(self.root, qemu.id.pid)?.trim_start_matches('/')
            == cg_slice::decoupled_cgroup(vmid);
        // A hook may have been killed when the cgroup was made and the VM not yet moved there.
        let changes = match decoupled {
            true => cg_slice::plan_couple(self.root, vmid)?,
            false => cg_slice::plan_remove(self.root, vmid),
        };
        for change in changes {
            self.make(change);
        }
        let mut objects = self.vm_threads(vmid, qemu)?;
        objects.retain(|object| self.store.baseline.has(&object.knob));
        // While another VM is fenced, this one is held off its CPUs as everybody is.
        let wanted = self.held();
        self.set("pins", objects, wanted)
    }

    fn remove_cgroup(&mut self, vmid: VmId) {
        self.report.step("cgroup");
        for change in cg_slice::plan_remove(self.root, vmid) {
            self.make(change);
        }
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

/// The CPUs that a process's cgroup allows.
fn effective_cpus(root: &Sysroot, pid: i32) -> Option<CpuSet> {
    let mut cgroup = cgroup::of_process(root, pid).ok()?;
    loop {
        // A cgroup without the controller has its parent's CPUs.
        if let Ok(Some(list)) = root.read_value(cgroup::file(&cgroup, "cpuset.cpus.effective")) {
            return CpuSet::from_kernel_list(&list).ok();
        }
        cgroup.truncate(cgroup.rfind('/').filter(|_| cgroup.len() > 1)?);
    }
}

fn is_kthreadd(knob: &Knob) -> bool {
    matches!(knob, Knob::Kthread(task) if task.pid == process::KTHREADD)
}

//! The steps of the method `hotplug`: slices, tasks, CPUs offline and online, the VM out of its
//! slice and back.

use pinfold_core::knob::Value;
use pinfold_core::sys::task::{self, Allowed, Processes};
use pinfold_core::sys::{cgroup, cpu};
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{CpuSet, Host, Knob, Result, Setting, TaskId, vm};

use super::guest::Guest;
use super::run::Reconcile;

/// The step of user threads with a mask of their own.
pub(super) const TASKS: &str = "tasks";

impl Reconcile<'_> {
    /// Step 0 of this method, see [`remember`](Self::remember).
    pub(super) fn remember_for_hotplug(
        &mut self,
        isolated: &CpuSet,
        guest: Option<&Guest>,
    ) -> Result<()> {
        let mut objects = self.slice_objects()?;
        objects.push(cg_slice::overrides(self.root)?);
        objects.extend(cpu_hotplug::settings(self.root, isolated)?);
        objects.extend(self.readable(TASKS, Self::task_objects));
        self.remember(objects, isolated, guest)
    }

    /// Step 1: keeps everything but the fenced VMs off their CPUs, as far as cgroups reach.
    pub(super) fn slices(&mut self) -> Result<()> {
        let mut objects = self.slice_objects()?;
        self.report.step("slices");
        let wanted = self.narrowed();
        if !self.isolated().is_empty() {
            return self.set("slices", objects, wanted);
        }
        // Back in the other order: with its last unit the controller goes, and all must be wide by
        // then.
        objects.reverse();
        self.set("slices", objects, wanted)?;
        self.remove_overrides()
    }

    /// Removes what set-property has left behind, when all units that hook changed have their old
    /// values back.
    fn remove_overrides(&mut self) -> Result<()> {
        let baseline = &self.store.baseline;
        let mut units = Vec::new();
        for (knob, ..) in baseline.knobs() {
            if let Knob::UnitCpus(unit) = knob
                && !baseline.is_foreign(knob)
            {
                units.push(unit.clone());
            }
        }
        let before = baseline.before(&Knob::UnitOverrides);
        let change = cg_slice::plan_overrides(cg_slice::overrides(self.root)?, before, &units);
        if !change.is_noop() {
            self.make(change);
        }
        Ok(())
    }

    fn slice_objects(&mut self) -> Result<Vec<Setting>> {
        if let Some(objects) = &self.readings.slices {
            return Ok(objects.clone());
        }
        let mut objects = cg_slice::settings(self.root, Vec::new())?;
        if self.root.exists(cgroup::path(vm::SLICE)) {
            let vms = vec![vm::SLICE.to_owned()];
            objects.extend(cg_slice::settings(self.root, vms)?);
        }
        self.readings.slices = Some(objects.clone());
        Ok(objects)
    }

    /// User threads with a mask of their own (taskset, `affinity:`), if the kernel forgets it in
    /// step 1. If it keeps it (Linux 6.2), what a thread asks for while CPUs are fenced cannot be
    /// read, and the kernel gives it back; then only the threads of VMs that ended their fence and
    /// keep running are set, because hook set their masks.
    pub(super) fn tasks(&mut self) -> Result<()> {
        self.report.step(TASKS);
        let objects = self.task_objects()?;
        let wanted = self.narrowed();
        self.set(TASKS, objects, wanted)
    }

    fn task_objects(&mut self) -> Result<Vec<Setting>> {
        if let Some(objects) = &self.readings.tasks {
            return Ok(objects.clone());
        }
        let objects = if task::keeps_requested_cpus(self.root)? {
            self.freed_threads()?
        } else {
            self.threads_with_masks()?
        };
        self.readings.tasks = Some(objects.clone());
        Ok(objects)
    }

    /// Threads of the baseline, except those of fenced VMs.
    fn freed_threads(&mut self) -> Result<Vec<Setting>> {
        let fenced: Vec<u32> = self.fenced().map(|(id, _)| *id).collect();
        let mut in_vms = Vec::new();
        for id in fenced {
            let vmid = VmId::try_from(id)?;
            // A VM that cannot be looked up is not the one of this run; its threads are not
            // changed, since they are in the baseline with the CPUs that they had.
            self.attempt_for(vmid, |this| {
                let Some(guest) = this.guest(vmid)? else {
                    return Ok(());
                };
                match cg_slice::processes(this.root, guest.vmid, &guest.qemu) {
                    Err(error) if error.is_gone() => {}
                    processes => in_vms.extend(processes?),
                }
                Ok(())
            });
        }
        let mut objects = Vec::new();
        for (knob, label, _) in self.store.baseline.knobs() {
            if matches!(knob, Knob::Thread(task) if !in_vms.contains(&task.pid))
                && let Some(found) = knob.read(self.root)?
            {
                objects.push(Setting::new(knob.clone(), label, found));
            }
        }
        Ok(objects)
    }

    /// User threads with a mask other than that of their cgroup.
    fn threads_with_masks(&self) -> Result<Vec<Setting>> {
        let fenced: Vec<i32> = self
            .fenced()
            .filter_map(|(_, reservation)| Some(reservation.qemu?.pid))
            .collect();
        let online = cpu::online(self.root)?;
        let allowed = Allowed::among(self.root, &online)?;
        let processes = Processes::read(self.root)?;
        let mut objects = Vec::new();
        for pid in processes.user_pids() {
            let beside_qemu = || {
                cgroup::of_process(self.root, pid)
                    .is_ok_and(|path| path.contains(cg_slice::DECOUPLED))
            };
            if fenced.contains(&pid) || (!fenced.is_empty() && beside_qemu()) {
                continue;
            }
            let tids = match processes.tids(self.root, pid) {
                Err(error) if error.is_gone() => continue,
                tids => tids?,
            };
            let mut effective = None;
            for tid in tids {
                // Most threads may run anywhere, and one call shows it.
                if !self.may_be_known(pid, tid) && allowed.by_call(tid).as_ref() == Some(&online) {
                    continue;
                }
                let task = match task::task(self.root, pid, tid) {
                    Err(error) if error.is_gone() => continue,
                    task => task?,
                };
                if task.kernel {
                    break;
                }
                let knob = Knob::Thread(task.id);
                let known = self.store.baseline.has(&knob);
                let cpus = match task::affinity(self.root, &task.id) {
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
                objects.push(Setting::new(
                    knob,
                    format!("thread {} ({})", task.id.tid, task.name),
                    cpus,
                ));
            }
        }
        Ok(objects)
    }

    /// Whether a thread with these ids, started at any time, is in the baseline.
    fn may_be_known(&self, pid: i32, tid: i32) -> bool {
        let first = Knob::Thread(TaskId { pid, tid, start: 0 });
        let next = self.store.baseline.first_from(&first);
        matches!(next, Some(Knob::Thread(task)) if (task.pid, task.tid) == (pid, tid))
    }

    /// Step 2.
    pub(super) fn offline(&mut self, cpus: &CpuSet) -> Result<()> {
        self.set_online("offline", cpus, false)
    }

    /// Step 4: all CPUs of the baseline that were online before.
    pub(super) fn online(&mut self) -> Result<()> {
        self.set_online("online", &self.online_before(), true)
    }

    fn set_online(&mut self, step: &'static str, cpus: &CpuSet, online: bool) -> Result<()> {
        if cpus.is_empty() {
            return Ok(());
        }
        self.report.step(step);
        if !online {
            cpu_hotplug::check_possible(self.root, cpus)?;
            let mut notes = cpu_hotplug::check_partitions(self.root, cpus, false)?;
            // These take a look at every thread.
            if self.report.shows_details() {
                notes.extend(cpu_hotplug::bound_tasks(self.root, cpus)?);
            }
            for note in notes {
                self.report.detail(&note);
            }
        }
        let objects = cpu_hotplug::settings(self.root, cpus)?;
        // A CPU that the admin had taken offline stays offline.
        self.set(step, objects, |_, before| {
            if *before == Value::Online(false) {
                before.clone()
            } else {
                Value::Online(online)
            }
        })
    }

    fn online_before(&self) -> CpuSet {
        let mut cpus = CpuSet::new();
        for (knob, _, before) in self.store.baseline.knobs() {
            if let Knob::CpuOnline(cpu) = knob
                && *before == Value::Online(true)
            {
                cpus.insert(*cpu);
            }
        }
        cpus
    }

    /// Step 6.
    pub(super) fn decouple(&mut self, guest: &Guest) -> Result<()> {
        self.report.step("decouple");
        let mut changes = Vec::new();
        if self.fenced().count() > 1 {
            // Outside the slice nothing else keeps a thread off the others' CPUs until it is
            // pinned. The CPUs it asked for cannot be read, and since Linux 6.2 they are kept
            // wherever it goes.
            for (object, cpus) in self.kept_off_others(guest)? {
                let unknown = Setting {
                    found: CpuSet::new().into(),
                    ..object
                };
                changes.push(unknown.want(cpus));
            }
        }
        changes.extend(cg_slice::plan_decouple(self.root, guest.vmid, &guest.qemu)?);
        let mut changed = 0;
        for change in changes {
            changed += usize::from(self.make(change));
        }
        self.sum_up("decouple", changed);
        Ok(())
    }

    /// Undoes step 6; of a VM that has stopped the empty cgroup is removed.
    pub(super) fn couple_or_remove(&mut self, vmid: VmId) -> Result<()> {
        let qemu = match self.guest(vmid)? {
            Some(guest) => Some(guest.qemu),
            // It may run without a reservation.
            None => vm::find(self.root, vmid)?,
        };
        if let Some(qemu) = qemu {
            match self.couple(vmid, &qemu) {
                // It has ended meanwhile.
                Err(error) if error.is_gone() => {}
                coupled => return coupled,
            }
        }
        self.report.step("cgroup");
        for change in cg_slice::plan_remove(self.root, vmid) {
            self.make(change);
        }
        Ok(())
    }

    fn couple(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("couple");
        let cgroup = cgroup::of_process(self.root, qemu.id.pid)?;
        // A hook may have been killed after it made the cgroup and before it moved the VM there.
        let changes = if cgroup.trim_start_matches('/') == cg_slice::decoupled_cgroup(vmid) {
            cg_slice::plan_couple(self.root, vmid, qemu)?
        } else {
            cg_slice::plan_remove(self.root, vmid)
        };
        for change in changes {
            self.make(change);
        }
        let mut objects = self.vm_threads(vmid, qemu)?;
        objects.retain(|object| self.store.baseline.has(&object.knob));
        // While another VM is fenced, this one is kept off its CPUs like everything else.
        let wanted = self.narrowed();
        self.set("pins", objects, wanted)
    }
}

/// The CPUs that a process's cgroup allows.
pub(super) fn effective_cpus(root: &Host, pid: i32) -> Option<CpuSet> {
    let mut cgroup = cgroup::of_process(root, pid).ok()?;
    loop {
        // A cgroup without the controller has its parent's CPUs.
        if let Ok(Some(list)) = root.read_value(cgroup::file(&cgroup, "cpuset.cpus.effective")) {
            return CpuSet::from_kernel_list(&list).ok();
        }
        cgroup.truncate(cgroup.rfind('/').filter(|_| cgroup.len() > 1)?);
    }
}

//! The steps of the method `hotplug`: slices, tasks, CPUs offline and online, the VM out of its
//! slice and back.

use pinfold_core::sys::{cgroup, cpu, task};
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{CpuSet, Host, Knob, Result, Setting, vm};

use super::run::Reconcile;

impl Reconcile<'_> {
    /// Step 1: everything but the fenced VMs off their CPUs, as far as cgroups reach.
    pub(super) fn slices(&mut self, mut objects: Vec<Setting>) -> Result<()> {
        self.report.step("slices");
        let wanted = self.narrowed();
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

    pub(super) fn slice_objects(&self) -> Result<Vec<Setting>> {
        let mut objects = cg_slice::settings(self.root, Vec::new())?;
        if self.root.exists(cgroup::path(cg_slice::VM_SLICE)) {
            objects.extend(cg_slice::settings(
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
    pub(super) fn tasks(&mut self) -> Result<()> {
        self.report.step("tasks");
        let objects = self.task_objects()?;
        let wanted = self.narrowed();
        self.set("tasks", objects, wanted)
    }

    /// Threads of the baseline, but for those of fenced VMs.
    pub(super) fn freed_objects(&self) -> Result<Vec<Setting>> {
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
                objects.push(Setting::new(knob.clone(), label, found));
            }
        }
        Ok(objects)
    }

    pub(super) fn task_objects(&self) -> Result<Vec<Setting>> {
        if task::keeps_requested_cpus(self.root)? {
            return self.freed_objects();
        }
        let fenced: Vec<i32> = self
            .fenced()
            .filter_map(|(_, reservation)| Some(reservation.qemu?.pid))
            .collect();
        let online = cpu::online(self.root)?;
        let mut objects = Vec::new();
        for pid in task::user_pids(self.root)? {
            let beside_qemu = || {
                cgroup::of_process(self.root, pid)
                    .is_ok_and(|path| path.contains(cg_slice::DECOUPLED))
            };
            if fenced.contains(&pid) || (!fenced.is_empty() && beside_qemu()) {
                continue;
            }
            let tasks = match task::tasks(self.root, pid) {
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
                    cpus.to_string(),
                ));
            }
        }
        Ok(objects)
    }

    /// Steps 2 and 4.
    pub(super) fn online(&mut self, step: &'static str, cpus: &CpuSet, state: &str) -> Result<()> {
        if cpus.is_empty() {
            return Ok(());
        }
        self.report.step(step);
        if state == "0" {
            for note in cpu_hotplug::check_offline(self.root, cpus)? {
                self.report.detail(&note);
            }
        }
        let objects = cpu_hotplug::settings(self.root, cpus)?;
        // A CPU that the admin had taken offline stays so.
        self.set(step, objects, |_, before| {
            if before == "0" {
                before.to_owned()
            } else {
                state.to_owned()
            }
        })
    }

    /// The CPUs of the baseline that were online before.
    pub(super) fn online_before(&self) -> CpuSet {
        let online = |(knob, _, before): (&Knob, &str, &str)| match knob {
            Knob::CpuOnline(cpu) if before == "1" => Some(*cpu),
            _ => None,
        };
        self.store.baseline.knobs().filter_map(online).collect()
    }

    /// Step 6.
    pub(super) fn decouple(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("decouple");
        let mut changes = Vec::new();
        if self.fenced().count() > 1 {
            // Outside the slice nothing else holds a thread off the others' CPUs until it is
            // pinned. What CPUs it has asked for itself cannot be read, and since Linux 6.2 is kept
            // wherever it goes.
            let asked = |(object, cpus): (Setting, String)| {
                Setting {
                    found: String::new(),
                    ..object
                }
                .want(cpus)
            };
            changes.extend(self.kept_off_others(vmid, qemu)?.into_iter().map(asked));
        }
        changes.extend(cg_slice::plan_decouple(self.root, vmid, qemu)?);
        let mut changed = 0;
        for change in changes {
            changed += usize::from(self.make(change));
        }
        self.sum_up("decouple", changed);
        Ok(())
    }

    pub(super) fn couple(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("couple");
        let decoupled = cgroup::of_process(self.root, qemu.id.pid)?.trim_start_matches('/')
            == cg_slice::decoupled_cgroup(vmid);
        // A hook may have been killed when the cgroup was made and the VM not yet moved there.
        let changes = match decoupled {
            true => cg_slice::plan_couple(self.root, vmid, qemu)?,
            false => cg_slice::plan_remove(self.root, vmid),
        };
        for change in changes {
            self.make(change);
        }
        let mut objects = self.vm_threads(vmid, qemu)?;
        objects.retain(|object| self.store.baseline.has(&object.knob));
        // While another VM is fenced, this one is held off its CPUs as everybody is.
        let wanted = self.narrowed();
        self.set("pins", objects, wanted)
    }

    pub(super) fn remove_cgroup(&mut self, vmid: VmId) {
        self.report.step("cgroup");
        for change in cg_slice::plan_remove(self.root, vmid) {
            self.make(change);
        }
    }
}

/// The CPUs that a process's cgroup allows.
fn effective_cpus(root: &Host, pid: i32) -> Option<CpuSet> {
    let mut cgroup = cgroup::of_process(root, pid).ok()?;
    loop {
        // A cgroup without the controller has its parent's CPUs.
        if let Ok(Some(list)) = root.read_value(cgroup::file(&cgroup, "cpuset.cpus.effective")) {
            return CpuSet::from_kernel_list(&list).ok();
        }
        cgroup.truncate(cgroup.rfind('/').filter(|_| cgroup.len() > 1)?);
    }
}

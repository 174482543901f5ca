//! The threads of VMs: which CPUs each is to have, and their pins.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pinfold_core::knob::{ABSENT, PRESENT, Value};
use pinfold_core::sys::task;
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Host, Knob, Result, Setting};

use super::apart::Housekeeping;
use super::guest::Guest;
use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// A VM's threads, each with the CPUs it has except those of other VMs.
    pub(super) fn kept_off_others(&self, guest: &Guest) -> Result<Vec<(Setting, CpuSet)>> {
        let fence = &self.housekeeping().all | &guest.reservation.settings.isolated;
        let mut threads = Vec::new();
        for object in self.vm_threads(guest.vmid, &guest.qemu)? {
            let cpus = match object.found.cpus() {
                Some(cpus) => cpus.narrow_to(&fence),
                None => fence.clone(),
            };
            threads.push((object, cpus));
        }
        Ok(threads)
    }

    /// Step 7: the VM's own threads. A vCPU without a pin, which was plugged in, is reported.
    pub(super) fn pins(&mut self, guest: &Guest) -> Result<()> {
        let without_pin = self.pin_all(guest)?;
        if !without_pin.is_empty() {
            self.report.note(&format!(
                "VM {}: no pin for vCPU {without_pin} in {}; using the host's CPUs",
                guest.vmid, guest.reservation.settings.source
            ));
        }
        Ok(())
    }

    /// Sets all threads of a VM; returns the vCPUs without a pin, which are with its emulator
    /// threads.
    fn pin_all(&mut self, guest: &Guest) -> Result<CpuSet> {
        self.report.step("pins");
        let reservation = &guest.reservation;
        let deadline = Duration::from_secs(reservation.settings.deadlines.qmp);
        let threads = vm::threads(self.root, &guest.qemu, deadline)?;
        for note in &threads.notes {
            self.report.note(note);
        }
        let mut threads = threads.threads;
        // vCPUs first, in their order.
        threads.sort_by(|a, b| (&a.role, a.id.tid).cmp(&(&b.role, b.id.tid)));
        let housekeeping = self.housekeeping();
        let mut wanted = BTreeMap::new();
        let mut objects = Vec::new();
        let without_pin = threads
            .iter()
            .filter_map(|thread| match thread.role {
                vm::Role::Vcpu(vcpu) if reservation.pin(vcpu).is_none() => Some(vcpu),
                vm::Role::Vcpu(_) | vm::Role::Iothread(_) | vm::Role::Emulator => None,
            })
            .collect();
        let mut policies = Vec::new();
        for thread in threads {
            match self.policy_of(reservation, &thread) {
                Ok(policy) => policies.extend(policy),
                Err(error) => self.report.error(&format!("vcpu_policy: {error}")),
            }
            let object = pin_vcpu::setting(&thread);
            let cpus = cpus_for(reservation, &thread.role, &housekeeping);
            self.depend_on(&object.knob, &cpus);
            wanted.insert(object.knob.clone(), cpus);
            objects.push(object);
        }
        if reservation.isolation == Isolation::Partition {
            self.place(guest, &objects, &wanted)?;
        }
        // Its helpers (swtpm, virtiofsd) left the slice with it and go with the emulator threads.
        let beside = cpus_for(reservation, &vm::Role::Emulator, &housekeeping);
        let processes = cg_slice::processes(self.root, guest.vmid, &guest.qemu)?;
        for pid in processes.into_iter().skip(1) {
            for object in self.thread_objects(pid)? {
                wanted.insert(object.knob.clone(), beside.clone());
                objects.push(object);
            }
        }
        let mut known: BTreeSet<Knob> = objects.iter().map(|object| object.knob.clone()).collect();
        self.pin(objects, wanted)?;
        self.pin_newborns(guest, &housekeeping, &mut known)?;
        // After the pins: a real-time thread must not run on other CPUs.
        if self.is_broken() {
            policies.clear();
        }
        let wanted = reservation.settings.vcpu_policy;
        let changed = self.change("pins", policies, |_, before| match wanted {
            Some(policy) => Value::text(policy.to_string()),
            None => before.clone(),
        })?;
        self.sum_up("vcpu_policy", changed);
        Ok(without_pin)
    }

    /// A thread's policy, if the VM's settings give it one: those of vCPUs with a pin.
    fn policy_of(&self, vm: &Reservation, thread: &vm::QemuThread) -> Result<Option<Setting>> {
        match thread.role {
            vm::Role::Vcpu(vcpu) if vm.settings.vcpu_policy.is_some() && vm.pin(vcpu).is_some() => {
                pin_vcpu::policy_setting(self.root, thread)
            }
            vm::Role::Vcpu(_) | vm::Role::Iothread(_) | vm::Role::Emulator => Ok(None),
        }
    }

    /// The policies of threads that run on and whose VM is not fenced any more.
    pub(super) fn policies_of_unfenced(&mut self) -> Result<()> {
        let qemus: BTreeSet<i32> = self
            .fenced()
            .filter(|(_, vm)| vm.phase == Phase::Isolated)
            .filter_map(|(_, vm)| vm.qemu.map(|qemu| qemu.pid))
            .collect();
        let is_left =
            |knob: &Knob| matches!(knob, Knob::ThreadPolicy(task) if !qemus.contains(&task.pid));
        let objects = self.saved_objects(is_left)?;
        if objects.is_empty() {
            return Ok(());
        }
        self.report.step("pins");
        let changed = self.change("pins", objects, |_, before| before.clone())?;
        self.sum_up("vcpu_policy", changed);
        Ok(())
    }

    /// Threads that were made while others were being pinned have the CPUs that their maker had:
    /// looked for until there are no new ones.
    fn pin_newborns(
        &mut self,
        guest: &Guest,
        housekeeping: &Housekeeping,
        known: &mut BTreeSet<Knob>,
    ) -> Result<()> {
        for _ in 0..NEWBORN_ROUNDS {
            if self.root.dry_run() {
                return Ok(());
            }
            let mut objects = self.vm_threads(guest.vmid, &guest.qemu)?;
            objects.retain(|object| known.insert(object.knob.clone()));
            if objects.is_empty() {
                return Ok(());
            }
            let mut wanted = BTreeMap::new();
            for object in &objects {
                let Knob::Thread(task) = object.knob else {
                    continue;
                };
                let role = match task::task(self.root, task.pid, task.tid) {
                    Ok(thread) if task.pid == guest.qemu.id.pid => vm::role_by_name(&thread.name),
                    _ => vm::Role::Emulator,
                };
                let cpus = cpus_for(&guest.reservation, &role, housekeeping);
                self.depend_on(&object.knob, &cpus);
                wanted.insert(object.knob.clone(), cpus);
            }
            if guest.reservation.isolation == Isolation::Partition {
                self.place(guest, &objects, &wanted)?;
            }
            self.pin(objects, wanted)?;
        }
        Ok(())
    }

    /// Ends the timer that looks for new threads, if there is one.
    pub(super) fn stop_looking_for_threads(&mut self, vmid: VmId) -> Result<()> {
        if let Some(timer) = thread_timer(self.root, vmid)?
            && timer.found == PRESENT
        {
            self.report.step("pins");
            self.make(timer.want(ABSENT));
        }
        Ok(())
    }

    /// Notes a thread that is to run on the VM's CPUs: the fence that is being made depends on it.
    fn depend_on(&mut self, knob: &Knob, cpus: &CpuSet) {
        if let (Some(foundation), Knob::Thread(task)) = (&mut self.foundation, knob)
            && cpus.is_subset(&foundation.isolated)
        {
            foundation.inside.insert(*task);
        }
    }

    /// Sets threads to the CPUs listed for each.
    pub(super) fn pin(
        &mut self,
        objects: Vec<Setting>,
        wanted: BTreeMap<Knob, CpuSet>,
    ) -> Result<()> {
        self.set("pins", objects, move |knob, before| {
            match wanted.get(knob) {
                Some(cpus) => cpus.into(),
                None => before.clone(),
            }
        })
    }

    /// Moves threads into or out of the partition, by the CPUs they are to have.
    fn place(
        &mut self,
        guest: &Guest,
        threads: &[Setting],
        wanted: &BTreeMap<Knob, CpuSet>,
    ) -> Result<()> {
        let scope = guest.scope()?;
        let vcpus = cg_slice::partition::vcpu_cgroup(&scope);
        let isolated = &guest.reservation.settings.isolated;
        for Setting { knob, label, .. } in threads {
            let Knob::Thread(task) = knob else { continue };
            let inside = wanted
                .get(knob)
                .is_some_and(|cpus| cpus.is_subset(isolated));
            let cgroup = if inside { &vcpus } else { &scope };
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
    pub(super) fn vm_threads(&self, vmid: VmId, qemu: &Qemu) -> Result<Vec<Setting>> {
        let mut objects = Vec::new();
        for pid in cg_slice::processes(self.root, vmid, qemu)? {
            objects.extend(self.thread_objects(pid)?);
        }
        Ok(objects)
    }

    /// A process's threads with the CPUs they may run on; those that end meanwhile are left out.
    /// None of a kernel thread, which may be in a VM's cgroup too (kvm-nx-lpage-recovery on Linux
    /// 6.1): it has a step of its own.
    pub(super) fn thread_objects(&self, pid: i32) -> Result<Vec<Setting>> {
        let tasks = match task::tasks(self.root, pid) {
            Err(error) if error.is_gone() => return Ok(Vec::new()),
            tasks => tasks?,
        };
        let mut objects = Vec::with_capacity(tasks.len());
        for task in tasks.into_iter().filter(|task| !task.kernel) {
            match task::affinity(self.root, &task.id) {
                Ok(cpus) => objects.push(Setting::new(
                    Knob::Thread(task.id),
                    format!("thread {} ({})", task.id.tid, task.name),
                    cpus,
                )),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(objects)
    }

    /// The threads of all fenced VMs except `pinned`: the emulator threads of one may be on CPUs
    /// for the vCPUs of another, or may return there. The threads of a VM with an interrupted hook
    /// are only kept off the CPUs of others; the rest is for its own hook, or recover.
    /// A failure is reported; it counts if the run is for that VM.
    pub(super) fn all_pins(&mut self, pinned: Option<VmId>) {
        let fenced: Vec<u32> = self.fenced().map(|(id, _)| *id).collect();
        for vmid in fenced.into_iter().filter_map(|id| VmId::try_from(id).ok()) {
            if Some(vmid) == pinned {
                continue;
            }
            self.attempt_for(vmid, |this| match this.guest(vmid)? {
                None => Ok(()),
                Some(guest) => match this.pin_again(&guest) {
                    Err(error) if error.is_gone() => Ok(()),
                    other => other,
                },
            });
        }
    }

    fn pin_again(&mut self, guest: &Guest) -> Result<()> {
        let Reservation {
            phase, isolation, ..
        } = guest.reservation;
        if phase == Phase::Isolated {
            return self.pin_all(guest).map(drop);
        }
        if phase != Phase::Isolating || isolation != Isolation::Hotplug {
            return Ok(());
        }
        let mut objects = Vec::new();
        let mut wanted = BTreeMap::new();
        for (object, cpus) in self.kept_off_others(guest)? {
            wanted.insert(object.knob.clone(), cpus);
            objects.push(object);
        }
        self.pin(objects, wanted)
    }
}

/// How often new threads of a VM are looked for after others were pinned.
const NEWBORN_ROUNDS: usize = 10;

/// The timer that looks for new threads of a VM.
///
/// # Errors
/// If it cannot be found out whether there is one.
pub(crate) fn thread_timer(root: &Host, vmid: VmId) -> Result<Option<Setting>> {
    let knob = Knob::ThreadTimer(vmid.into());
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

/// The CPUs of a VM's thread by its role. A vCPU without a pin has those of emulator threads.
fn cpus_for(reservation: &Reservation, role: &vm::Role, housekeeping: &Housekeeping) -> CpuSet {
    let settings = &reservation.settings;
    // Another VM may have isolated some of them since.
    let emulator = match &settings.emulator {
        Some(cpus) => housekeeping.narrow(cpus),
        None => settings.near.narrow_to(&housekeeping.common),
    };
    match role {
        vm::Role::Vcpu(vcpu) => reservation.pin(*vcpu).cloned().unwrap_or(emulator),
        vm::Role::Iothread(id) => match settings.iothread.get(id).or(settings.iothreads.as_ref()) {
            Some(cpus) if cpus.is_subset(&settings.isolated) => cpus.clone(),
            Some(cpus) => housekeeping.narrow(cpus),
            None => emulator,
        },
        vm::Role::Emulator => emulator,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use pinfold_core::state::Store;
    use pinfold_core::{Report, Verbosity};

    #[test]
    fn threads_that_were_born_meanwhile_are_pinned_by_their_role() {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[3, 3]);
        // The vCPU 1 and a helper thread are new; no thread can be pinned here, and what each was to
        // get is in the notes.
        host.thread(100, 10009, "worker", "6", 0);
        host.reserve(
            100,
            Phase::Isolated,
            "isolated = \"6,18\"\npins = \"6,18\"\n",
        );
        let mut store: Store<Reservation> =
            Store::open(&host.root, Duration::from_secs(1)).unwrap();
        let mut report = Report::new("hook", Verbosity::Quiet, false);
        let mut run = Reconcile::new(&host.root, &mut store, &mut report).unwrap();
        let guest = run.guest(VmId::try_from(100).unwrap()).unwrap().unwrap();
        let threads = run.vm_threads(guest.vmid, &guest.qemu).unwrap();
        let mut known: BTreeSet<Knob> = threads.into_iter().map(|it| it.knob).collect();
        assert_eq!(known.len(), 4);
        known.retain(
            |knob| !matches!(knob, Knob::Thread(task) if [10001, 10009].contains(&task.tid)),
        );
        let housekeeping = run.housekeeping();
        run.pin_newborns(&guest, &housekeeping, &mut known).unwrap();
        assert_eq!(known.len(), 4);
        let notes: Vec<_> = report
            .notes()
            .iter()
            .map(|note| note.rsplit_once(": ").map_or("", |(what, _)| what))
            .collect();
        assert_eq!(
            notes,
            [
                "thread 10001 (CPU 1/KVM): set to 18",
                "thread 10009 (worker): set to 0-5,7-17,19-23"
            ]
        );
    }
}

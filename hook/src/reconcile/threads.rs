//! The threads of VMs: which CPUs each is to have, and their pins.

use std::collections::BTreeMap;
use std::time::Duration;

use pinfold_core::sys::task;
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Error, Knob, Result, Setting};

use super::guest::Guest;
use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// A VM's threads, each with the CPUs it has except those of other VMs.
    pub(super) fn kept_off_others(&self, guest: &Guest) -> Result<Vec<(Setting, CpuSet)>> {
        let fence = &self.housekeeping() | &guest.reservation.settings.isolated;
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

    /// Step 7: the VM's own threads.
    pub(super) fn pins(&mut self, guest: &Guest) -> Result<()> {
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
        for thread in threads {
            let cpus = cpus_for(reservation, &thread.role, &housekeeping)?;
            let object = pin_vcpu::setting(&thread);
            wanted.insert(object.knob.clone(), cpus);
            objects.push(object);
        }
        if reservation.isolation == Isolation::Partition {
            self.place(guest, &objects, &wanted)?;
        }
        // Its helpers (swtpm, virtiofsd) left the slice with it and go with the emulator threads.
        let beside = cpus_for(reservation, &vm::Role::Emulator, &housekeeping)?;
        let processes = cg_slice::processes(self.root, guest.vmid, &guest.qemu)?;
        for pid in processes.into_iter().skip(1) {
            for object in self.thread_objects(pid)? {
                wanted.insert(object.knob.clone(), beside.clone());
                objects.push(object);
            }
        }
        self.pin(objects, wanted)
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
    pub(super) fn all_pins(&mut self, pinned: Option<VmId>) -> Result<()> {
        let fenced: Vec<u32> = self.fenced().map(|(id, _)| *id).collect();
        for id in fenced {
            let vmid = VmId::try_from(id)?;
            if Some(vmid) == pinned {
                continue;
            }
            let Some(guest) = self.guest(vmid)? else {
                continue;
            };
            match self.pin_again(&guest) {
                Err(error) if error.is_gone() => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn pin_again(&mut self, guest: &Guest) -> Result<()> {
        let Reservation {
            phase, isolation, ..
        } = guest.reservation;
        if phase == Phase::Isolated {
            return self.pins(guest);
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

/// The CPUs of a VM's thread by its role.
fn cpus_for(reservation: &Reservation, role: &vm::Role, housekeeping: &CpuSet) -> Result<CpuSet> {
    let settings = &reservation.settings;
    // Another VM may have fenced some of them since.
    let aside = |cpus: &CpuSet| cpus.narrow_to(housekeeping);
    let emulator = match &settings.emulator {
        Some(cpus) => aside(cpus),
        None => housekeeping.clone(),
    };
    Ok(match role {
        vm::Role::Vcpu(vcpu) => reservation.pin(*vcpu).cloned().ok_or_else(|| {
            let why = format!("{} has no pin for it", settings.source);
            Error::unusable(format!("vCPU {vcpu}"), why)
        })?,
        vm::Role::Iothread(id) => match settings.iothread.get(id).or(settings.iothreads.as_ref()) {
            Some(cpus) if cpus.is_subset(&settings.isolated) => cpus.clone(),
            Some(cpus) => aside(cpus),
            None => emulator,
        },
        vm::Role::Emulator => emulator,
    })
}

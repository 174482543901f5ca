//! The threads of VMs: which CPUs each is to have, and their pins.

use std::collections::BTreeMap;
use std::time::Duration;

use pinfold_core::sys::task;
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Error, Knob, Result, Setting};

use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// A VM's threads, each with the CPUs it has less those of other VMs.
    pub(super) fn kept_off_others(
        &self,
        vmid: VmId,
        qemu: &Qemu,
    ) -> Result<Vec<(Setting, String)>> {
        let mut fence = self.housekeeping();
        if let Some(own) = self.store.reservations.get(&vmid.into()) {
            fence = &fence | &own.settings.isolated;
        }
        let kept = |object: Setting| {
            let cpus = CpuSet::from_kernel_list(&object.found)
                .map_or_else(|_| fence.clone(), |it| it.narrow_to(&fence));
            (object, cpus.to_string())
        };
        Ok(self.vm_threads(vmid, qemu)?.into_iter().map(kept).collect())
    }

    /// Step 7: the VM's own threads.
    pub(super) fn pins(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
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
            let object = pin_vcpu::setting(&thread);
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
    pub(super) fn pin(
        &mut self,
        objects: Vec<Setting>,
        wanted: BTreeMap<Knob, String>,
    ) -> Result<()> {
        self.set("pins", objects, move |knob, before| {
            wanted
                .get(knob)
                .cloned()
                .unwrap_or_else(|| before.to_owned())
        })
    }

    /// Threads to the side of the partition that has the CPUs they are to have.
    pub(super) fn place(
        &mut self,
        scope: &str,
        reservation: &Reservation,
        threads: &[Setting],
        wanted: &BTreeMap<Knob, String>,
    ) -> Result<()> {
        let vcpus = cg_slice::partition::vcpu_cgroup(scope);
        for Setting { knob, label, .. } in threads {
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
                    cpus.to_string(),
                )),
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(objects)
    }

    pub(super) fn cpus_for(
        &self,
        reservation: &Reservation,
        role: &vm::Role,
        housekeeping: &CpuSet,
    ) -> Result<CpuSet> {
        let settings = &reservation.settings;
        // What the settings say, less what another VM has fenced off since.
        let aside = |cpus: &CpuSet| cpus.narrow_to(housekeeping);
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
    pub(super) fn all_pins(&mut self, pinned: Option<VmId>) -> Result<()> {
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
}

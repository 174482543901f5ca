//! The documented order (docs/design.md, "The order"), to be read top to bottom.

use pinfold_core::knob::ABSENT;
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{CpuSet, Knob, Result, vm};

use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase};

impl Reconcile<'_> {
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
        objects.extend(cpu_hotplug::settings(self.root, &isolated)?);
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
        self.tuning()?;
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
    pub(super) fn isolate_by_partition(
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
        self.tuning()
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
        self.attempt(Self::tuning);
        self.attempt(|this| this.all_pins(None));
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
}

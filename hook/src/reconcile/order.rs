//! The documented order (docs/design.md, "The order"), to be read top to bottom: isolate, settle,
//! undo.

use std::collections::BTreeSet;

use pinfold_core::knob::ABSENT;
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{CpuSet, Knob, Result};

use super::containers::CONTAINERS;
use super::guest::Guest;
use super::hotplug::TASKS;
use super::run::{Foundation, Reconcile, TUNING};
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// Isolates a VM's CPUs. Its reservation is in the store with its QEMU; only a plan may be made
    /// without a QEMU, and leaves open what needs the VM's threads. If something fails that the
    /// fence depends on, the run ends at once and [is broken](Self::is_broken): the VM has to be
    /// released then. Any other failure is reported and the rest is made.
    ///
    /// # Errors
    /// If the host cannot be read or the state cannot be saved; what was done so far is in the
    /// baseline, and the VM has to be released.
    pub(crate) fn isolate(&mut self, vmid: VmId, qemu: Option<&Qemu>) -> Result<()> {
        let Some(reservation) = self.store.reservations.get(&vmid.into()).cloned() else {
            return Ok(());
        };
        let guest = self.introduce(vmid, qemu, &reservation)?;
        self.part(TASKS, Self::hold_boot_masks);
        self.report.step("baseline");
        match reservation.isolation {
            Isolation::Hotplug => self.isolate_by_hotplug(vmid, &reservation, guest.as_ref()),
            Isolation::Partition => {
                let isolated = self.isolate_by_partition(vmid, &reservation, guest.as_ref());
                // Whether it failed or not: nothing may be undone while something is being changed.
                self.finish_tuning();
                isolated
            }
        }
    }

    fn isolate_by_hotplug(
        &mut self,
        vmid: VmId,
        reservation: &Reservation,
        guest: Option<&Guest>,
    ) -> Result<()> {
        let isolated = &reservation.settings.isolated;
        self.remember_for_hotplug(isolated, guest)?;
        if reservation.phase != Phase::Isolating {
            // Its vCPUs run there: taking the CPUs offline now would break their pins.
            self.settle();
            return Ok(());
        }
        self.found(isolated, guest);
        // What a killed run has set: its vCPUs leave their CPUs now.
        self.attempt(Self::policies_of_unfenced);
        self.slices()?;
        if self.is_broken() {
            return Ok(());
        }
        self.part(TASKS, Self::tasks);
        self.offline(isolated)?;
        if self.is_broken() {
            return Ok(());
        }
        self.part("irqs", Self::irqs);
        self.part("kthreads", Self::kthreads);
        // Also those that an interrupted run of another VM's hook left offline.
        self.online()?;
        if self.is_broken() {
            return Ok(());
        }
        self.part(TUNING, Self::tuning);
        match guest {
            Some(guest) => {
                self.decouple(guest)?;
                self.pins(guest)?;
            }
            None => self.leave_open(&["decouple", "pins"]),
        }
        if self.is_broken() {
            return Ok(());
        }
        self.all_pins(Some(vmid));
        self.part(CONTAINERS, Self::containers);
        // When a CPU comes online, some masks include it again.
        self.part("irqs", Self::irqs);
        self.part("kthreads", Self::kthreads);
        Ok(())
    }

    /// Notes what the fence of this run depends on, before anything is changed.
    fn found(&mut self, isolated: &CpuSet, guest: Option<&Guest>) {
        self.foundation = Some(Foundation {
            isolated: isolated.clone(),
            qemu: guest.map(|guest| guest.qemu.id),
            inside: BTreeSet::new(),
        });
    }

    /// One write to a cpuset partition keeps tasks, kernel threads and unbound workqueues off.
    fn isolate_by_partition(
        &mut self,
        vmid: VmId,
        reservation: &Reservation,
        guest: Option<&Guest>,
    ) -> Result<()> {
        let isolated = &reservation.settings.isolated;
        self.remember(Vec::new(), isolated, guest)?;
        // The governors wait for the kernel while the other steps run; `isolate` joins them.
        self.part(TUNING, Self::start_tuning);
        // Before the kernel does it: new kernel threads inherit only what is set by hand (Linux
        // 6.12; 7.0 does not need it).
        self.part("kthreads", Self::kthreadd_first);
        if reservation.phase == Phase::Isolating {
            self.found(isolated, guest);
        }
        match guest {
            Some(guest) => {
                self.exclusive()?;
                if !self.is_broken() {
                    self.partition(guest)?;
                }
                if !self.is_broken() {
                    self.pins(guest)?;
                }
            }
            None => self.leave_open(&["exclusive", "partition", "pins"]),
        }
        if self.is_broken() {
            return Ok(());
        }
        self.all_pins(Some(vmid));
        self.part(CONTAINERS, Self::containers);
        self.part("irqs", Self::irqs);
        self.part("kthreads", Self::kthreads);
        Ok(())
    }

    /// Brings everything to what the reservations ask for, CPUs that an interrupted run left
    /// offline first; after the last reservation that is the state before the first. A failure is
    /// reported and does not stop the other steps.
    pub(crate) fn settle(&mut self) {
        // A real-time thread must not run on other CPUs than its own.
        self.attempt(Self::policies_of_unfenced);
        if self.uses(Isolation::Partition, is_exclusive) {
            self.attempt(Self::undo_partitions);
            self.attempt(Self::exclusive);
            self.attempt(Self::tasks);
        }
        if self.uses(Isolation::Hotplug, is_slice_or_cpu) {
            self.attempt(Self::online);
            self.attempt(Self::slices);
            self.attempt(Self::tasks);
        }
        self.attempt(Self::containers);
        self.attempt(Self::irqs);
        self.attempt(Self::kthreads);
        self.attempt(Self::tuning);
        self.attempt(Self::reset_methods);
        self.all_pins(None);
    }

    /// Takes back what a VM has outside its slice. A VM that runs goes back to its scope, its
    /// threads to the CPUs they had; of a VM that has stopped the empty cgroup is removed. A failure
    /// is reported.
    pub(crate) fn undo_vm(&mut self, vmid: VmId) {
        self.attempt_for(vmid, |this| this.couple_or_remove(vmid));
        self.attempt_for(vmid, |this| this.delegate(vmid, ABSENT));
        self.attempt_for(vmid, |this| this.stop_looking_for_threads(vmid));
    }
}

fn is_exclusive(knob: &Knob) -> bool {
    matches!(knob, Knob::ExclusiveCpus(_))
}

fn is_slice_or_cpu(knob: &Knob) -> bool {
    matches!(knob, Knob::UnitCpus(_) | Knob::CpuOnline(_))
}

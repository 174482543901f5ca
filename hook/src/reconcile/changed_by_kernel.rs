//! Masks that no program has set: the kernel and its drivers change them, as partitions, cpusets
//! and CPUs come and go.
//!
//! A run that completes a killed one distinguishes them from what another program has set since.

use std::collections::BTreeSet;

use pinfold_core::knob::Value;
use pinfold_core::state::Store;
use pinfold_core::sys::cpu;
use pinfold_core::{CpuSet, Host, Knob, Result};

use crate::state::reservation::{Isolation, Phase, Reservation};

/// What masks the kernel makes of those it is given, now.
pub(crate) struct ChangedByKernel {
    present: CpuSet,
    /// What partitions leave to all others now: without the CPUs of `isolcpus=`, as unbound
    /// workqueues have it, and with them, as kernel threads do.
    unpartitioned: [CpuSet; 2],
    /// Those of VMs, which may be gone by now, each with its VM.
    partitions: Vec<CpuSet>,
    /// The CPUs that narrowed slices allow their threads.
    narrowed: Vec<CpuSet>,
    online: CpuSet,
    /// Whether a run was killed before it had noted what the kernel made of its changes.
    interrupted: bool,
}

impl ChangedByKernel {
    /// From the CPUs of the host, those that are isolated now, those of them that are so since
    /// the boot, and from the changes in the store.
    ///
    /// # Errors
    /// If the host's CPUs cannot be read.
    pub(crate) fn on(
        root: &Host,
        store: &Store<Reservation>,
        present: &CpuSet,
        isolated: &CpuSet,
        at_boot: &CpuSet,
    ) -> Result<Self> {
        let partitions = store
            .reservations
            .values()
            .filter(|it| it.isolation == Isolation::Partition);
        let partitions = partitions.map(|it| it.settings.isolated.clone()).collect();
        let is_cgroup = |knob: &Knob| {
            matches!(
                knob,
                Knob::UnitCpus(_) | Knob::CgroupCpus(_) | Knob::ContainerCpus(_)
            )
        };
        let cgroups = store
            .baseline
            .knobs()
            .map(|(knob, ..)| knob)
            .filter(|knob| is_cgroup(knob));
        // Nearly all of them are the same.
        let narrowed: BTreeSet<&CpuSet> = cgroups
            .flat_map(|knob| store.baseline.values_set(knob))
            .filter_map(Value::cpus)
            .filter(|cpus| !cpus.is_empty())
            .collect();
        let narrowed = narrowed.into_iter().cloned().collect();
        Ok(Self {
            unpartitioned: [
                present - &(isolated | at_boot),
                present - &(isolated - at_boot),
            ],
            present: present.clone(),
            partitions,
            narrowed,
            online: cpu::online(root)?,
            interrupted: store
                .reservations
                .values()
                .any(|it| it.phase == Phase::Isolating),
        })
    }

    /// Whether the kernel changed a mask from `given` to `found`. Partitions leave a kernel thread
    /// the rest of what was set by hand, or else all CPUs outside of them; a cgroup does the same
    /// with its threads, with what is online. A driver that spreads its IRQs again as CPUs come and
    /// go (virtio_net, `virtnet_cpu_online`) sets one to what is online, and so does RCU with its
    /// expedited workers (`rcutree_affinity_setting`), of what was set by hand the last time.
    /// A network queue keeps only what was online when it was set, and virtio_net spreads its queues
    /// to send by with the IRQs.
    pub(crate) fn explains(&self, knob: &Knob, given: &Value, found: &Value) -> bool {
        // With a governor, and as CPUs come and go.
        if matches!(knob, Knob::EnergyPreference(_)) {
            return self.interrupted;
        }
        let (Some(given), Some(found)) = (given.cpus(), found.cpus()) else {
            return false;
        };
        // Where CPUs can be added, a mask may name some that are not there.
        let (given, found) = (&(given & &self.present), &(found & &self.present));
        let is_left_of = |cpus: &CpuSet| found == cpus || *found == cpus.narrow_to(&self.online);
        let share_of = |cpus: &CpuSet| is_left_of(&given.narrow_to(cpus)) || is_left_of(cpus);
        let left: Vec<CpuSet> = self
            .unpartitioned
            .iter()
            .filter_map(|unpartitioned| self.left_at_last(unpartitioned, found))
            .collect();
        match knob {
            Knob::Workqueues => left.iter().any(share_of),
            Knob::Kthread(_) if left.iter().any(share_of) => true,
            Knob::Thread(_)
                if left
                    .iter()
                    .chain(&self.partitions)
                    .chain(&self.narrowed)
                    .any(share_of) =>
            {
                true
            }
            Knob::Irq(_) | Knob::Kthread(_) | Knob::Thread(_) => {
                *found == given.narrow_to(&self.online)
            }
            Knob::QueueCpus(_) => *found == given & &self.online,
            _ => false,
        }
    }

    /// What partitions left to all others when the kernel last set this mask, if it did: it does
    /// not for each one that goes, so that any partition outside of the mask may have been there.
    /// `None` if no VM has one.
    fn left_at_last(&self, unpartitioned: &CpuSet, mask: &CpuSet) -> Option<CpuSet> {
        let (there, gone): (Vec<_>, Vec<_>) = self
            .partitions
            .iter()
            .partition(|cpus| !cpus.intersects(mask));
        let left = gone
            .into_iter()
            .fold(unpartitioned.clone(), |all, cpus| &all | cpus);
        let left = there.into_iter().fold(left, |all, cpus| &all - cpus);
        (!self.partitions.is_empty() && mask.is_subset(unpartitioned)).then_some(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::TaskId;

    #[test]
    fn masks_changed_by_the_kernel_are_distinguished_from_set_ones() {
        let kthread = Knob::Kthread(TaskId {
            pid: 9,
            tid: 9,
            start: 1,
        });
        let vcpu = Knob::Thread(TaskId {
            pid: 8,
            tid: 9,
            start: 1,
        });
        let rps = Knob::QueueCpus("enp6s0/rx-0".into());
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        // Of two partitions one, 6-9, is there; the other, 18, has gone with its VM.
        let kernel = ChangedByKernel {
            present: set("0-23"),
            unpartitioned: [set("0-2,4-5,10-23"), set("0-5,10-23")],
            partitions: vec![set("6-9"), set("18")],
            narrowed: vec![set("0-3"), set("16-18")],
            online: set("0-17,19-23"),
            interrupted: false,
        };
        for (knob, before, found, kernels) in [
            (&kthread, "0-3,8", "0-3", true),
            // No program had set it (an IRQ's thread): the kernel gives it all.
            (&kthread, "2", "0-5,10-23", true),
            (&kthread, "7", "0-5,10-23", true),
            (&kthread, "0-23", "0-5", false),
            // From before the other one went.
            (&kthread, "0-23", "0-5,10-17,19-23", true),
            (&kthread, "0-8", "0-5", true),
            (&Knob::Workqueues, "0-23", "0-5,10-17,19-23", true),
            // What still is there the kernel would not give it.
            (&kthread, "0-23", "0-9,18", false),
            // RCU's, when CPU 18 went offline.
            (&kthread, "16-23", "16-17,19-23", true),
            (&kthread, "3", "0-23", false),
            (&kthread, "0-23", "0-23", false),
            (&kthread, "0-23", "6,18", false),
            (&Knob::Workqueues, "0-23", "0-5,10-23", true),
            // Without what the command line isolates, and with CPUs that are not there.
            (&Knob::Workqueues, "0-2,4-23", "0-2,4-5,10-23", true),
            (&kthread, "0-47", "0-5,10-47", true),
            (&kthread, "0-47", "0-7,10-47", false),
            // Moved into the partition and not pinned yet, when hook was killed.
            (&vcpu, "0-23", "6-9", true),
            (&vcpu, "0-7", "6-7", true),
            (&vcpu, "0-23", "0-5,10-23", true),
            // In a slice that was narrowed.
            (&vcpu, "2-9", "2-3", true),
            (&vcpu, "0-23", "7", false),
            // CPU 18 is offline.
            (&vcpu, "10-20", "10-17,19-20", true),
            (&vcpu, "10-20", "16-17", true),
            (&vcpu, "10-20", "10-16", false),
            (&Knob::Irq(4), "0-23", "0-5,10-23", false),
            (&Knob::Irq(4), "0-23", "0-17,19-23", true),
            (&Knob::Irq(4), "16-19", "16-17,19", true),
            (&Knob::Irq(4), "16-19", "16", false),
            (&rps, "16-19", "16-17,19", true),
            (&rps, "18", "0-17,19-23", false),
        ] {
            assert_eq!(
                kernel.explains(knob, &set(before).into(), &set(found).into()),
                kernels,
                "{knob:?} {before} {found}"
            );
        }
        let kernel = ChangedByKernel {
            present: set("0-23"),
            unpartitioned: [set("0-23"), set("0-23")],
            partitions: Vec::new(),
            narrowed: Vec::new(),
            online: set("0-23"),
            interrupted: false,
        };
        assert!(!kernel.explains(&kthread, &set("0-23").into(), &set("0-5,10-23").into()));
    }
}

//! Masks that nobody has set: the kernel and its drivers change them by themselves, as partitions, cpusets and CPUs come and go.
//!
//! A run that mends what a killed one has left tells them from what somebody else has set meanwhile.

use pinfold_core::store::Store;
use pinfold_core::{CpuSet, Knob, Result, Sysroot, cpu};

use crate::reservation::{Isolation, Reservation};

/// What masks the kernel makes of those it is given, now.
pub(crate) struct ByKernel {
    /// Where there are VMs with partitions: what these leave to all others.
    left: Option<CpuSet>,
    /// What cgroups hold their threads to: partitions, and slices that were narrowed.
    cgroups: Vec<CpuSet>,
    online: CpuSet,
}

impl ByKernel {
    /// As the host is, whose partitions have `left` this to all others, and as the store says it was changed.
    ///
    /// # Errors
    /// Where the host's CPUs cannot be read.
    pub(crate) fn on(root: &Sysroot, store: &Store<Reservation>, left: &CpuSet) -> Result<Self> {
        let partitions = || {
            let all = store.reservations.values();
            all.filter(|it| it.isolation == Isolation::Partition).map(|it| it.settings.isolated.clone())
        };
        let left = partitions().next().map(|_| left.clone());
        let is_cgroup = |knob: &Knob| matches!(knob, Knob::UnitCpus(_) | Knob::CgroupCpus(_));
        let narrowed = (store.baseline.knobs().map(|(knob, ..)| knob))
            .filter(|knob| is_cgroup(knob))
            .filter_map(|knob| CpuSet::from_kernel_list(store.baseline.last(knob)?).ok())
            .filter(|cpus| !cpus.is_empty());
        let mut cgroups: Vec<CpuSet> = partitions().chain(narrowed).collect();
        // Nearly all of them are the same.
        cgroups.dedup();
        Ok(Self { left, cgroups, online: cpu::online(root)? })
    }

    /// Whether a mask is the kernel's doing. Partitions leave a kernel thread what is left of what was set by hand, else all that
    /// is left; a cgroup does so with its threads. A driver that spreads its IRQs anew as CPUs come and go (virtio_net,
    /// `virtnet_cpu_online`) gives one what is online.
    pub(crate) fn has_set(&self, knob: &Knob, before: &str, found: &str) -> bool {
        let (Ok(before), Ok(found)) = (CpuSet::from_kernel_list(before), CpuSet::from_kernel_list(found)) else {
            return false;
        };
        let share_of = |cpus: &CpuSet| found == before.held_to(cpus) || found == *cpus;
        match knob {
            Knob::Kthread(_) | Knob::Workqueues => self.left.as_ref().is_some_and(share_of),
            Knob::Thread(_) => self.left.iter().chain(&self.cgroups).any(share_of),
            Knob::Irq(_) => found == before.held_to(&self.online),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::TaskId;

    #[test]
    fn what_the_kernel_does_to_masks_is_told_from_what_people_do() {
        let kthread = Knob::Kthread(TaskId { pid: 9, tid: 9, start: 1 });
        let vcpu = Knob::Thread(TaskId { pid: 8, tid: 9, start: 1 });
        let set = |list: &str| list.parse::<CpuSet>().unwrap();
        let kernel = ByKernel {
            left: Some(set("0-5,10-23")),
            cgroups: vec![set("6,18"), set("0-3")],
            online: set("0-17,19-23"),
        };
        for (knob, before, found, kernels) in [
            (&kthread, "0-3,8", "0-3", true),
            // It had been set by nobody (an IRQ's thread): the kernel gives it all.
            (&kthread, "2", "0-5,10-23", true),
            (&kthread, "7", "0-5,10-23", true),
            (&kthread, "0-23", "0-5", false),
            (&kthread, "0-23", "0-23", false),
            (&kthread, "0-23", "6,18", false),
            (&Knob::Workqueues, "0-23", "0-5,10-23", true),
            // Moved into the partition and not pinned yet, when hook was killed.
            (&vcpu, "0-23", "6,18", true),
            (&vcpu, "0-7", "6", true),
            (&vcpu, "0-23", "0-5,10-23", true),
            // In a slice that was narrowed.
            (&vcpu, "2-9", "2-3", true),
            (&vcpu, "0-23", "7", false),
            (&Knob::Irq(4), "0-23", "0-5,10-23", false),
            (&Knob::Irq(4), "0-23", "0-17,19-23", true),
            (&Knob::Irq(4), "16-19", "16-17,19", true),
            (&Knob::Irq(4), "16-19", "16", false),
        ] {
            assert_eq!(kernel.has_set(knob, before, found), kernels, "{knob:?} {before} {found}");
        }
        let kernel = ByKernel { left: None, cgroups: Vec::new(), online: set("0-23") };
        assert!(!kernel.has_set(&kthread, "0-23", "0-5,10-23"));
    }
}

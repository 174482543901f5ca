//! CPUs that others keep for themselves: those of `isolcpus=` and of partitions that are not hook's.

use pinfold_core::state::Store;
use pinfold_core::sys::{cgroup, cpu};
use pinfold_core::{CpuSet, Host, Result};

use crate::state::reservation::{Isolation, Reservation};

/// CPUs that others keep for themselves.
#[derive(Debug, Clone, Default)]
pub(super) struct Apart {
    /// Isolated on the kernel's command line.
    pub at_boot: CpuSet,
    /// In partitions that no VM of hook's has.
    pub partitions: CpuSet,
}

impl Apart {
    /// From the host; what VMs in the store have as partitions is theirs.
    ///
    /// # Errors
    /// If the host cannot be read.
    pub(super) fn on(root: &Host, store: &Store<Reservation>) -> Result<Self> {
        let mut partitions = cgroup::partitioned(root)?;
        if let Some(isolated) = cgroup::isolated(root)? {
            partitions = &partitions | &isolated;
        }
        for it in store.reservations.values() {
            if it.isolation == Isolation::Partition {
                partitions = &partitions - &it.settings.isolated;
            }
        }
        // The kernel lists these as isolated too.
        let at_boot = cpu::isolated_at_boot(root)?;
        Ok(Self {
            partitions: &partitions - &at_boot,
            at_boot,
        })
    }

    /// The CPUs that are no VM's, by who may use them.
    pub(super) fn housekeeping(&self, all: CpuSet) -> Housekeeping {
        let rest = |less: &CpuSet, all: &CpuSet| match all - less {
            rest if rest.is_empty() => all.clone(),
            rest => rest,
        };
        let shared = rest(&self.partitions, &all);
        let common = rest(&self.at_boot, &shared);
        Housekeeping {
            all,
            shared,
            common,
        }
    }
}

/// The CPUs that are no VM's.
#[derive(Debug, Clone)]
pub(super) struct Housekeeping {
    /// All of them.
    pub all: CpuSet,
    /// Without the partitions of others. A cgroup with their CPUs would end these, since siblings
    /// exclude each other; of `isolcpus=` it may have CPUs, for threads that are meant to be there.
    pub shared: CpuSet,
    /// What is for everybody: without `isolcpus=` as well.
    pub common: CpuSet,
}

impl Housekeeping {
    /// What is left of a mask, never more than it had; if nothing is, the common CPUs.
    pub(super) fn narrow(&self, cpus: &CpuSet) -> CpuSet {
        match cpus.intersects(&self.all) {
            true => cpus.narrow_to(&self.all),
            false => self.common.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::reconcile::Reconcile;
    use crate::state::reservation::Phase;
    use pinfold_core::{Knob, Report, Verbosity};
    use std::time::Duration;

    fn set(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn what_others_have_is_kept_and_nobody_is_widened_onto_it() {
        let apart = Apart {
            at_boot: set("2,14"),
            partitions: set("3,15"),
        };
        let cpus = apart.housekeeping(set("0-5,12-17"));
        assert_eq!(cpus.shared, set("0-2,4-5,12-14,16-17"));
        assert_eq!(cpus.common, set("0-1,4-5,12-13,16-17"));
        for (before, after) in [
            ("0-23", "0-5,12-17"),
            ("0-47", "0-5,12-17"),
            ("0-1,4-23", "0-1,4-5,12-17"),
            ("2", "2"),
            ("6-7", "0-1,4-5,12-13,16-17"),
        ] {
            assert_eq!(cpus.narrow(&set(before)), set(after), "{before}");
        }
    }

    #[test]
    fn a_partition_of_a_vm_is_not_foreign() {
        let host = MadeUpHost::new("5900x");
        for (file, content) in [
            ("sys/devices/system/cpu/isolated", "2,14\n"),
            ("sys/devices/system/cpu/possible", "0-47\n"),
            // Linux 6.12 lists those of the boot as well.
            ("sys/fs/cgroup/cpuset.cpus.isolated", "2-3,6,14-15,18\n"),
            ("sys/fs/cgroup/admin.slice/cpuset.cpus.partition", "root\n"),
            ("sys/fs/cgroup/admin.slice/cpuset.cpus.effective", "4\n"),
        ] {
            host.file(file, content);
        }
        host.reserve(
            100,
            Phase::Isolated,
            "isolated = \"6,18\"\npins = \"6,18\"\n",
        );
        let mut store: Store<Reservation> =
            Store::open(&host.root, Duration::from_secs(1)).unwrap();
        for vm in store.reservations.values_mut() {
            vm.isolation = Isolation::Partition;
        }
        let apart = Apart::on(&host.root, &store).unwrap();
        assert_eq!(apart.at_boot, set("2,14"));
        assert_eq!(apart.partitions, set("3-4,15"));
    }

    /// As on AM4 boards: 32 possible CPUs, of which 24 are present. Masks name all of them.
    #[test]
    fn possible_cpus_that_are_not_present_confuse_no_comparison() {
        const WORKQUEUES: &str = "sys/devices/virtual/workqueue/cpumask";
        let before = [
            (WORKQUEUES, "ffffffff"),
            ("proc/irq/default_smp_affinity", "ffffffff"),
            ("proc/irq/24/smp_affinity_list", "0-31"),
        ];
        let meanwhile = ["00fbffbf", "00fbffbf", "0-5,7-17,19-23"];
        for isolation in [Isolation::Hotplug, Isolation::Partition] {
            let host = MadeUpHost::new("5900x");
            host.file("sys/devices/system/cpu/possible", "0-31");
            for (file, value) in before {
                host.file(file, value);
            }
            for (tid, name) in [(2, "kthreadd"), (3, "kswapd0")] {
                host.thread(tid, tid, name, "0-31", 0x0020_0000);
            }
            host.vm(100, &[6, 18]);
            host.reserve(
                100,
                Phase::Isolated,
                "isolated = \"6,18\"\npins = \"6,18\"\n",
            );
            if isolation == Isolation::Partition {
                host.file("sys/fs/cgroup/cpuset.cpus.isolated", "6,18");
            }
            let files = || before.map(|(file, _)| host.root.read_value(file).unwrap().unwrap());
            // Kernel threads cannot be pinned here; what they were to get is in the notes.
            let run = |phase: Phase| {
                let mut store: Store<Reservation> =
                    Store::open(&host.root, Duration::from_secs(1)).unwrap();
                let vm = store.reservations.get_mut(&100).unwrap();
                (vm.phase, vm.isolation) = (phase, isolation);
                let mut report = Report::new("hook", Verbosity::Quiet, false);
                let mut run = Reconcile::new(&host.root, &mut store, &mut report).unwrap();
                let knobs: Vec<Knob> = run.store.baseline.knobs().map(|it| it.0.clone()).collect();
                let foreign: Vec<_> = knobs
                    .into_iter()
                    .filter(|knob| run.store.baseline.is_foreign(knob))
                    .collect();
                run.settle();
                run.forget(None).unwrap();
                (foreign, report.notes().to_vec())
            };
            let (foreign, notes) = run(Phase::Isolated);
            assert_eq!(foreign, []);
            assert_eq!(files(), meanwhile, "{isolation:?}");
            for kthread in ["kthread 2 (kthreadd)", "kthread 3 (kswapd0)"] {
                let set = format!("{kthread}: set to 0-5,7-17,19-23: ");
                assert!(notes.iter().any(|it| it.starts_with(&set)), "{notes:#?}");
            }
            if isolation == Isolation::Partition {
                // What the kernel leaves, of all possible ones.
                host.file(WORKQUEUES, "fffbffbf");
                host.thread(3, 3, "kswapd0", "0-5,7-17,19-31", 0x0020_0000);
            }
            let (foreign, _) = run(Phase::Isolated);
            assert_eq!(foreign, [], "{isolation:?}");
            assert_eq!(files(), meanwhile, "{isolation:?}");
            let (foreign, _) = run(Phase::Leaving);
            assert_eq!(foreign, [], "{isolation:?}");
            assert_eq!(files(), before.map(|(_, value)| value), "{isolation:?}");
        }
    }

    #[test]
    fn a_host_with_nothing_else_left_uses_what_there_is() {
        let apart = Apart {
            at_boot: set("0-5"),
            partitions: CpuSet::new(),
        };
        assert_eq!(apart.housekeeping(set("0-3")).common, set("0-3"));
    }
}

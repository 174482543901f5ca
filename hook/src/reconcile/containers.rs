//! The CPUs of containers, which pvestatd chooses.
//!
//! Proxmox VE gives a container as many CPUs as its `cores:` has, from those of the root cgroup. What
//! of them is isolated the kernel takes away by either method, so that the container would have
//! fewer. It gets others meanwhile, and its own afterwards. What the settings pin a container to is
//! left alone: the kernel narrows that, and widens it again.

use std::collections::BTreeMap;

use pinfold_core::{CpuSet, Knob, Result, Setting, vm};

use super::run::Reconcile;

/// The step, as programs know it.
pub(super) const CONTAINERS: &str = "containers";

impl Reconcile<'_> {
    /// Moves the sets of containers off isolated CPUs, and gives back those that were moved.
    pub(super) fn containers(&mut self) -> Result<()> {
        let isolated = self.isolated();
        let is_own = |knob: &Knob| matches!(knob, Knob::ContainerCpus(_));
        if isolated.is_empty() && !self.store.baseline.knobs().any(|(knob, ..)| is_own(knob)) {
            return Ok(());
        }
        let mut load = Load::default();
        let mut objects = Vec::new();
        for container in vm::running_containers(self.root) {
            for (depth, path) in container.cgroups.into_iter().enumerate() {
                let label = format!("container {} (/{path})", container.vmid);
                let knob = Knob::ContainerCpus(path);
                // Without the cpuset controller there is no file.
                let Some(found) = knob.read(self.root)? else {
                    continue;
                };
                let Some(cpus) = found.cpus().filter(|cpus| !cpus.is_empty()).cloned() else {
                    continue;
                };
                if depth == 0 {
                    load.add(&cpus);
                }
                // pvestatd spreads containers at any time; what it has chosen is what they are to have.
                if self.store.baseline.is_foreign(&knob) {
                    self.store.baseline.forget(&knob);
                }
                let is_moved = self.store.baseline.has(&knob);
                if is_moved || (!container.is_pinned && cpus.intersects(&isolated)) {
                    objects.push((container.vmid, Setting::new(knob, label, found)));
                }
            }
        }
        if objects.is_empty() {
            return Ok(());
        }
        self.report.step(CONTAINERS);
        let common = self.housekeeping().common;
        let mut chosen: BTreeMap<(vm::VmId, CpuSet), CpuSet> = BTreeMap::new();
        let mut wanted = BTreeMap::new();
        for (vmid, object) in &objects {
            let baseline = &self.store.baseline;
            let before = baseline.before(&object.knob).unwrap_or(&object.found);
            let Some(before) = before.cpus() else {
                continue;
            };
            let now = baseline.last(&object.knob).and_then(|last| last.cpus());
            // The cgroups of a container have the same CPUs, before and now.
            let cpus = chosen
                .entry((*vmid, before.clone()))
                .or_insert_with(|| load.choose(before, now, &isolated, &common));
            wanted.insert(object.knob.clone(), cpus.clone());
        }
        let objects = objects.into_iter().map(|(_, object)| object).collect();
        self.set(CONTAINERS, objects, |knob, before| {
            wanted.get(knob).map_or_else(|| before.clone(), Into::into)
        })
    }
}

/// How many containers have each CPU.
#[derive(Debug, Default)]
struct Load(BTreeMap<usize, usize>);

impl Load {
    fn add(&mut self, cpus: &CpuSet) {
        for cpu in cpus.iter() {
            *self.0.entry(cpu).or_default() += 1;
        }
    }

    /// As many CPUs as a container had, without isolated ones: those that stay, then the common ones
    /// that fewest containers have. What was chosen `now` stays as long as it serves.
    fn choose(
        &mut self,
        before: &CpuSet,
        now: Option<&CpuSet>,
        isolated: &CpuSet,
        common: &CpuSet,
    ) -> CpuSet {
        if !before.intersects(isolated) {
            return before.clone();
        }
        let mut chosen = before - isolated;
        let room = &chosen | common;
        let count = before.len().min(room.len());
        if let Some(now) = now
            && now.len() == count
            && now.is_subset(&room)
            && chosen.is_subset(now)
        {
            return now.clone();
        }
        let mut others: Vec<usize> = (common - &chosen).iter().collect();
        others.sort_by_key(|cpu| (self.0.get(cpu).copied().unwrap_or_default(), *cpu));
        let missing = count - chosen.len();
        let added: CpuSet = others.into_iter().take(missing).collect();
        self.add(&added);
        chosen = &chosen | &added;
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::state::reservation::{Phase, Reservation};
    use pinfold_core::state::Store;
    use pinfold_core::{Report, Verbosity, testutils};
    use std::fs;
    use std::time::Duration;

    const SETTINGS: &str = "isolated = \"6-11,18-23\"\npins = \"6-11,18-23\"\n";

    fn set(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    #[test]
    fn as_many_cpus_as_before() {
        for (before, now, chosen) in [
            ("3,15", "", "3,15"),
            // The least used: 0 and 1 have two containers each, 2 has one.
            ("6,18", "", "3-4"),
            ("2,6", "", "2-3"),
            ("2,6", "2,5", "2,5"),
            // What was chosen for another set of VMs does not serve.
            ("2,6", "3,5", "2-3"),
            ("2,6", "2,7", "2-3"),
            ("0-23", "", "0-5,12-17"),
            ("0-11", "", "0-5,12-17"),
            ("0-23", "0-5,12-17", "0-5,12-17"),
        ] {
            let mut load = Load::default();
            load.add(&set("0-1"));
            load.add(&set("0-2"));
            let now = (!now.is_empty()).then(|| set(now));
            let (isolated, common) = (set("6-11,18-23"), set("0-5,12-17"));
            assert_eq!(
                load.choose(&set(before), now.as_ref(), &isolated, &common),
                set(chosen),
                "{before}"
            );
        }
        // The next container gets others.
        let mut load = Load::default();
        let mut next = || load.choose(&set("6"), None, &set("6"), &set("0-2"));
        assert_eq!(
            [next(), next(), next(), next()],
            ["0", "1", "2", "0"].map(set)
        );
    }

    /// A host with VM 100, and containers: with `cores: 2`, pinned by its settings, without
    /// `cores:`, and with other CPUs.
    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[6]);
        host.reserve(100, Phase::Isolated, SETTINGS);
        for (vmid, settings, cpus) in [
            (101, "cores: 2", "6,18"),
            (102, "lxc.cgroup2.cpuset.cpus: 6-7", "6-7"),
            (103, "hostname: x", "0-23"),
            (104, "cores: 2", "0-1"),
        ] {
            testutils::container_conf(&host.root.path(""), vmid, settings);
            give(&host, vmid, cpus);
        }
        host
    }

    fn give(host: &MadeUpHost, vmid: u32, cpus: &str) {
        for folder in ["", "/ns"] {
            host.file(
                &format!("sys/fs/cgroup/lxc/{vmid}{folder}/cpuset.cpus"),
                cpus,
            );
        }
    }

    /// The sets of all containers, the outer one and that within.
    fn sets(host: &MadeUpHost) -> [String; 4] {
        [101, 102, 103, 104].map(|vmid| {
            let read = |folder| {
                let file = format!("sys/fs/cgroup/lxc/{vmid}{folder}/cpuset.cpus");
                host.root.read_value(file).unwrap().unwrap()
            };
            assert_eq!(read(""), read("/ns"), "{vmid}");
            read("")
        })
    }

    /// A run that only has this step; how many it changed.
    fn run(host: &MadeUpHost, edit: impl FnOnce(&mut Store<Reservation>)) -> usize {
        let mut store: Store<Reservation> =
            Store::open(&host.root, Duration::from_secs(1)).unwrap();
        edit(&mut store);
        let mut report = Report::new("hook", Verbosity::Quiet, false);
        let before = host.snapshot();
        let mut run = Reconcile::new(&host.root, &mut store, &mut report).unwrap();
        run.containers().unwrap();
        run.forget(None).unwrap();
        drop(store);
        assert_eq!(report.failures(), 0, "{:?}", report.notes());
        let after = host.snapshot();
        let changed = after.iter().filter(|file| !before.contains(file));
        changed.filter(|(path, _)| path.contains("/lxc/")).count()
    }

    fn leave(store: &mut Store<Reservation>) {
        store.reservations.get_mut(&100).unwrap().phase = Phase::Leaving;
    }

    const BEFORE: [&str; 4] = ["6,18", "6-7", "0-23", "0-1"];
    const MEANWHILE: [&str; 4] = ["2-3", "6-7", "0-5,12-17", "0-1"];

    #[test]
    fn sets_are_moved_once_and_given_back_exactly() {
        let host = host();
        assert_eq!(run(&host, |_| {}), 4);
        assert_eq!(sets(&host), MEANWHILE);
        assert_eq!(run(&host, |_| {}), 0, "once more changes nothing");
        assert_eq!(run(&host, leave), 4);
        assert_eq!(sets(&host), BEFORE);
        assert_eq!(
            Store::<Reservation>::peek(&host.root)
                .unwrap()
                .map(|store| store.baseline.knobs().count()),
            None
        );
    }

    #[test]
    fn they_are_part_of_settling() {
        let host = host();
        let settle = |edit: fn(&mut Store<Reservation>)| {
            let mut store: Store<Reservation> =
                Store::open(&host.root, Duration::from_secs(1)).unwrap();
            edit(&mut store);
            // Kernel threads cannot be pinned on a made-up host.
            let mut report = Report::new("hook", Verbosity::Quiet, false);
            let mut run = Reconcile::new(&host.root, &mut store, &mut report).unwrap();
            run.settle();
            run.forget(None).unwrap();
        };
        settle(|_| {});
        assert_eq!(sets(&host), MEANWHILE);
        settle(leave);
        assert_eq!(sets(&host), BEFORE);
    }

    #[test]
    fn a_killed_run_is_completed() {
        let host = host();
        run(&host, |_| {});
        // It had moved one cgroup, and saved the values of all before it did.
        give(&host, 103, "0-23");
        host.file("sys/fs/cgroup/lxc/101/ns/cpuset.cpus", "6,18");
        assert_eq!(run(&host, leave), 1);
        assert_eq!(sets(&host), BEFORE);
    }

    #[test]
    fn what_pvestatd_has_chosen_since_counts() {
        let host = host();
        run(&host, |_| {});
        // It spreads over isolated CPUs by hotplug, and takes the first CPUs of a set.
        give(&host, 101, "3,19");
        give(&host, 103, "4-5");
        assert_eq!(run(&host, |_| {}), 2);
        assert_eq!(sets(&host), ["2-3", "6-7", "4-5", "0-1"]);
        run(&host, leave);
        assert_eq!(sets(&host), ["3,19", "6-7", "4-5", "0-1"]);
    }

    #[test]
    fn a_container_that_ended_is_forgotten() {
        let host = host();
        run(&host, |_| {});
        fs::remove_dir_all(host.root.path("sys/fs/cgroup/lxc/101")).unwrap();
        assert_eq!(run(&host, leave), 2);
        assert!(Store::<Reservation>::peek(&host.root).unwrap().is_none());
    }
}

//! A fence around hook itself: its threads stand for the vCPUs of a VM.
//!
//! It is the fence that a VM would have by partition, made and undone by the same steps and kept in
//! the same state, so that any hook restores the host if this one is killed. The lock is held until
//! it has gone: no other hook runs meanwhile, and a VM that starts waits for its end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::unistd::Pid;
use pinfold_core::knob::Value;
use pinfold_core::state::store::Store;
use pinfold_core::sys::cgroup;
use pinfold_core::systemd::ScopeProperties;
use pinfold_core::vm::{self, Qemu, VmConf, VmId};
use pinfold_core::{CpuSet, Knob, Setting, TaskId};

use crate::checks::required;
use crate::reconcile::Reconcile;
use crate::settings::Settings;
use crate::state::reservation::{Isolation, JITTER, Phase, Reservation};
use crate::strays::{Class, pinned_inside, strays};

use super::run::{Run, process};

/// What systemd starts when the scope has ended: hook may have been killed.
const RECOVER: &str = "pinfold-recover.service";

/// How often the scope is looked for that systemd removes when it is empty.
const GONE_INTERVAL: Duration = Duration::from_millis(20);

impl Run<'_> {
    /// Isolates the CPUs of these settings by partition for threads of this process, the first one
    /// for the first pin and so on; then does some work, which gets the number of strays, and
    /// returns the CPUs to the host. What could not be restored is in the report.
    ///
    /// # Errors
    /// If the CPUs cannot be isolated; everything has been undone then.
    pub(crate) fn within_fence<T>(
        &mut self,
        settings: Settings,
        threads: &[i32],
        work: impl FnOnce(usize) -> T,
    ) -> anyhow::Result<T> {
        let vmid = VmId::try_from(JITTER)?;
        let own = process(&self.root, Pid::this()).context("this process is not in /proc")?;
        let home = cgroup::of_process(&self.root, own.pid)?;
        let deadlines = settings.deadlines;
        self.use_deadlines(&deadlines);
        ensure!(
            vm::check_exists(&self.root, vmid).is_err(),
            "VM {vmid} exists, and this number is used for the fence of hook jitter"
        );
        let mut store = self.open(&deadlines)?;
        self.release_dead(&mut store, None);
        ensure!(
            !store.reservations.contains_key(&JITTER),
            "what an earlier hook jitter left could not be restored; see `hook recover`"
        );
        let warnings = required::before_start(&self.root, vmid, &VmConf::default(), &settings)?;
        required::no_overlap(&self.root, &store.reservations, vmid, &settings)?;
        let known = Default::default();
        required::isolation(
            &self.root,
            &known,
            &store.reservations,
            vmid,
            &settings,
            None,
        )?;
        for warning in warnings {
            self.report.note(&warning);
        }
        self.report
            .line(&format!("isolating CPU {}", settings.isolated));
        let mut reservation = Reservation::new(Phase::Starting, Isolation::Partition, settings);
        reservation.qemu = Some(own);
        store.reservations.insert(JITTER, reservation);
        store.save()?;
        let worked = self.enter(&mut store, vmid, own, &home, threads).map(work);
        if let Err(error) = self.leave(&mut store, vmid, own, &home) {
            self.report.error(&format!("{error:#}"));
        }
        worked
    }

    /// Makes the scope and the fence. Returns how many strays there are.
    fn enter(
        &mut self,
        store: &mut Store<Reservation>,
        vmid: VmId,
        own: TaskId,
        home: &str,
        threads: &[i32],
    ) -> anyhow::Result<usize> {
        let earlier = self.report.notes().len();
        self.delegate(vmid)?;
        let scope = ScopeProperties {
            description: Some("hook jitter".into()),
            on_success: vec![RECOVER.into()],
            ..ScopeProperties::default()
        };
        let scopes = [(vm::scope_unit(vmid), scope)].into_iter().collect();
        let root = self.root.clone().with_scopes(scopes);
        self.report.step("scope");
        let failures = self.report.failures();
        let moved = pinfold_core::apply(
            &root,
            vec![
                Setting::new(Knob::CgroupOf(own), "hook jitter", Value::text(home))
                    .want(Value::text(format!("/{}", cg_slice::usual_scope(vmid)))),
            ],
        );
        self.report.changes(&moved);
        ensure!(
            self.report.failures() == failures,
            "no CPUs can be isolated without a scope"
        );
        let reserved = |store: &mut Store<Reservation>, phase| {
            if let Some(reservation) = store.reservations.get_mut(&JITTER) {
                reservation.phase = phase;
            }
            store.save()
        };
        reserved(store, Phase::Isolating)?;
        let vcpus: BTreeMap<i32, usize> = threads.iter().copied().zip(0..).collect();
        let stand_in = Qemu::stand_in(own, vcpus);
        let mut reconcile = Reconcile::new(&self.root, store, self.report)?;
        reconcile
            .isolate(vmid, Some(&stand_in))
            .context("not isolated")?;
        let is_broken = reconcile.is_broken();
        ensure!(!is_broken, "not isolated: {}", self.first_note(earlier));
        reserved(store, Phase::Isolated)?;
        Ok(self.strays_inside(store, own)?)
    }

    fn strays_inside(
        &self,
        store: &Store<Reservation>,
        own: TaskId,
    ) -> pinfold_core::Result<usize> {
        let isolated = match store.reservations.get(&JITTER) {
            Some(reservation) => reservation.settings.isolated.clone(),
            None => CpuSet::new(),
        };
        let pinned = pinned_inside(&self.root, &store.baseline, &own, &isolated)?;
        let all = strays(&self.root, &isolated, &pinned, &store.baseline)?;
        Ok(all.iter().filter(|it| it.class == Class::Stray).count())
    }

    /// Returns the CPUs to the host, and this process to the cgroup in which it was.
    fn leave(
        &mut self,
        store: &mut Store<Reservation>,
        vmid: VmId,
        own: TaskId,
        home: &str,
    ) -> anyhow::Result<()> {
        self.give_back(store, &[vmid], Some(vmid), None)?;
        let scope = cg_slice::usual_scope(vmid);
        let now = cgroup::of_process(&self.root, own.pid)?;
        if now.trim_start_matches('/') != scope || !self.root.exists(cgroup::path(home)) {
            return Ok(());
        }
        self.report.step("scope");
        let back = Setting::new(Knob::CgroupOf(own), "hook jitter", Value::text(now));
        let moved = pinfold_core::apply(&self.root, vec![back.want(Value::text(home))]);
        self.report.changes(&moved);
        let until = Instant::now() + self.root.systemd().timeouts().call;
        while self.root.exists(cgroup::path(&scope)) && Instant::now() < until {
            std::thread::sleep(GONE_INTERVAL);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::settings;
    use pinfold_core::{Exit, Report, Verbosity};

    const SETTINGS: &str = "isolated = \"6,18\"\npins = \"6,18\"\nmethod = \"partition\"\n\
                            governor = \"keep\"\n";
    const STATE: &str = "run/pinfold/state.json";

    /// A host with partitions, and this process in a session.
    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        let own = Pid::this().as_raw();
        host.thread(own, own, "hook", "0-23", 0);
        host.file("sys/fs/cgroup/cpuset.cpus.isolated", "");
        host.file("sys/fs/cgroup/qemu.slice/cpuset.cpus.exclusive", "");
        host.file("proc/sys/kernel/osrelease", "6.12.0");
        host
    }

    fn run<T>(host: &MadeUpHost, act: impl FnOnce(&mut Run<'_>) -> T) -> (T, Vec<String>) {
        let mut report = Report::new("hook", Verbosity::Normal, true);
        let mut run = Run {
            root: host.root.clone(),
            report: &mut report,
            migrated_from: None,
        };
        let done = act(&mut run);
        (done, report.notes().to_vec())
    }

    fn fence(host: &MadeUpHost) -> (Result<(), String>, Vec<String>) {
        let settings = settings::resolve(&host.root, SETTINGS, "test", 1).unwrap();
        let (fenced, notes) = run(host, |run| {
            run.within_fence(settings, &[7, 8], |_| {
                panic!("nothing can be isolated on a made-up host")
            })
        });
        (fenced.map_err(|error| format!("{error:#}")), notes)
    }

    /// Of what a fence changes, what is there.
    fn changed(host: &MadeUpHost) -> Vec<(String, String)> {
        let mut files = host.snapshot();
        files.retain(|(path, _)| !path.contains("/run/pinfold") && !path.ends_with("/run"));
        files
    }

    #[test]
    fn what_fails_leaves_nothing() {
        let host = host();
        host.file("run/systemd/system/x.conf", "");
        let before = changed(&host);
        let (fenced, notes) = fence(&host);
        assert_eq!(
            fenced.unwrap_err(),
            "no CPUs can be isolated without a scope"
        );
        assert!(
            notes[0].contains("scopes can be made on the running host only"),
            "{notes:?}"
        );
        let mut after = changed(&host);
        after.retain(|file| !before.contains(file));
        assert_eq!(after, [], "written");
        assert_eq!(changed(&host).len(), before.len(), "removed");
        assert!(!host.root.exists(STATE));

        // In a scope, of which systemd does not know.
        let scope = format!("qemu.slice/{JITTER}.scope");
        let own = Pid::this().as_raw();
        host.file(&format!("sys/fs/cgroup/{scope}/cgroup.procs"), "");
        host.file(&format!("proc/{own}/cgroup"), &format!("0::/{scope}"));
        let (fenced, notes) = fence(&host);
        let why = fenced.unwrap_err();
        assert!(why.starts_with("not isolated: "), "{why}: {notes:?}");
        let read = |file: &str| host.root.read_value(file).unwrap().unwrap();
        assert_eq!(read("proc/sys/vm/stat_interval"), "1");
        assert_eq!(read("sys/fs/cgroup/qemu.slice/cpuset.cpus.exclusive"), "");
        assert_eq!(read("proc/irq/24/smp_affinity_list"), "0-23");
    }

    /// The state of a `hook jitter` that was killed inside, whose process had this start time.
    fn killed(host: &MadeUpHost, start: u64) {
        let settings = settings::resolve(&host.root, SETTINGS, "test", 1).unwrap();
        let mut store: Store<Reservation> =
            Store::open(&host.root, Duration::from_secs(1)).unwrap();
        let pid = Pid::this().as_raw();
        let own = process(&host.root, Pid::this()).unwrap();
        let reservation = Reservation {
            qemu: Some(TaskId {
                start: own.start + start,
                ..TaskId {
                    pid,
                    tid: pid,
                    start: 0,
                }
            }),
            ..Reservation::new(Phase::Isolated, Isolation::Partition, settings)
        };
        store.reservations.insert(JITTER, reservation);
        let interval = Knob::Sysctl("vm/stat_interval".into());
        let found = interval.read(&host.root).unwrap().unwrap();
        let plan = store.baseline.plan(
            vec![Setting::new(interval, "vm.stat_interval", found)],
            |_, _| Value::text("120"),
        );
        store.carry_out(plan, |_| {}).unwrap();
        store.save().unwrap();
    }

    #[test]
    fn a_killed_one_is_undone_by_any_hook() {
        let host = host();
        let interval = || {
            let value = host.root.read_value("proc/sys/vm/stat_interval");
            value.unwrap().unwrap()
        };
        killed(&host, 1);
        assert_eq!(interval(), "120");
        let (exit, notes) = run(&host, |run| run.recover());
        assert_eq!(exit.unwrap(), Exit::Success, "{notes:?}");
        assert_eq!(notes, ["hook jitter has ended; releasing its CPUs"]);
        assert_eq!(interval(), "1");
        assert!(!host.root.exists(STATE));

        // Also by the next of its own, before anything else.
        killed(&host, 1);
        let (_, notes) = fence(&host);
        assert!(notes[0].starts_with("hook jitter has ended"), "{notes:?}");
        assert_eq!(interval(), "1");
        assert!(!host.root.exists(STATE));
    }

    #[test]
    fn a_vm_that_wants_its_cpus_gets_an_answer() {
        let host = host();
        killed(&host, 0);
        host.settings(100, SETTINGS);
        host.conf(100, "cores: 2");
        let (ended, _) = run(&host, |run| run.pre_start(VmId::try_from(100).unwrap()));
        let why = format!("{:#}", ended.unwrap_err());
        assert!(
            why.contains("CPU 6,18 is isolated for hook jitter, which runs"),
            "{why}"
        );
        // As long as it runs it has the lock, which a VM waits for.
        let lock = Store::<Reservation>::open(&host.root, Duration::from_secs(1)).unwrap();
        host.settings(100, &format!("{SETTINGS}[deadlines]\nlock = 0\n"));
        let (ended, _) = run(&host, |run| run.pre_start(VmId::try_from(100).unwrap()));
        let why = format!("{:#}", ended.unwrap_err());
        assert!(why.contains("has held it for 0 s"), "{why}");
        drop(lock);
    }

    #[test]
    fn its_number_is_not_taken_from_a_vm() {
        let host = host();
        host.conf(JITTER, "cores: 2");
        let (fenced, _) = fence(&host);
        let why = fenced.unwrap_err();
        assert!(why.starts_with("VM 999999999 exists"), "{why}");
    }
}

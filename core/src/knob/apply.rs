//! Applies changes: the only caller of [`super::write`].

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::change::{Applied, Change, Outcome};
use super::knobs::Knob;
use super::value::ABSENT;
use super::write::{self, Answer};
use crate::error::{is_gone, os_text};
use crate::host::Host;
use crate::sys::irq;

/// Applies one change. Everything that Pinfold writes to a kernel goes through here. In a
/// [dry run](Host::dry_run) nothing is written, and the change is planned.
///
/// The caller must have saved the values to restore ([`crate::state`]).
pub fn apply_one(host: &Host, change: Change) -> Applied {
    let outcome = if change.is_noop() {
        Outcome::Already
    } else if host.dry_run() {
        change
            .knob
            .known_refusal(host)
            .map_or(Outcome::Planned, Outcome::Refused)
    } else {
        match write::write(&change.knob, host, &change.wanted) {
            Ok(Answer::Taken(Some(kept))) if kept != change.wanted.to_string() => {
                Outcome::Failed(format!(
                    "the kernel accepted the value but kept {}",
                    if kept.is_empty() { "nothing" } else { &kept }
                ))
            }
            Ok(Answer::Taken(_)) => Outcome::Changed,
            Ok(Answer::Refused(why)) => Outcome::Refused(why),
            Err(error) if is_gone(&error) && has_gone(host, &change) => Outcome::Gone,
            // A file that goes with a controller or a driver stands for a value, too.
            Err(error) if is_gone(&error) && holds(host, &change) => Outcome::Changed,
            Err(error) => Outcome::Failed(why(&change.knob, &error)),
        }
    };
    Applied { change, outcome }
}

/// Applies changes in order; one that fails does not stop the others.
pub fn apply(host: &Host, changes: Vec<Change>) -> Vec<Applied> {
    let mut dones = Vec::with_capacity(changes.len());
    apply_each(host, changes, |done| dones.push(done));
    dones
}

/// As [`apply()`]; calls `on_done` after each. Neighbouring changes that mostly wait for the kernel
/// ([`Knob::waits`]) are made at the same time and reported in order.
pub(crate) fn apply_each(
    host: &Host,
    changes: impl IntoIterator<Item = Change>,
    mut on_done: impl FnMut(Applied),
) {
    let waits = |change: &Change| change.knob.waits() && !change.is_noop() && !host.dry_run();
    let mut changes = changes.into_iter().peekable();
    while let Some(change) = changes.next() {
        if !waits(&change) {
            on_done(apply_one(host, change));
            continue;
        }
        let mut group = vec![change];
        group.extend(std::iter::from_fn(|| changes.next_if(waits)));
        for done in apply_together(host, &group) {
            on_done(done);
        }
    }
}

impl Knob {
    /// Why the kernel would refuse a write, if that is known without trying.
    fn known_refusal(&self, host: &Host) -> Option<String> {
        if let Self::Irq(number) = self
            && irq::is_unmovable(host, *number).unwrap_or(false)
        {
            return Some(write::UNMOVABLE_IRQ.into());
        }
        None
    }

    /// Whether a write does little but wait for the kernel, so that several can wait at the same
    /// time. For a governor that is an RCU grace period, tens of milliseconds for each policy
    /// (kernel/sched/cpufreq_schedutil.c, `sugov_stop`).
    fn waits(&self) -> bool {
        match self {
            Self::Governor(_) => true,
            Self::Irq(_)
            | Self::DefaultIrq
            | Self::QueueCpus(_)
            | Self::Workqueues
            | Self::Kthread(_)
            | Self::Thread(_)
            | Self::ThreadPolicy(_)
            | Self::CpuOnline(_)
            | Self::EnergyPreference(_)
            | Self::WakeupLatency(_)
            | Self::HaltPolling
            | Self::UnitCpus(_)
            | Self::UnitOverrides
            | Self::CgroupCpus(_)
            | Self::ContainerCpus(_)
            | Self::Cgroup(_)
            | Self::CgroupOf(_)
            | Self::CgroupOfThread(_)
            | Self::ThreadedCgroup(_)
            | Self::ChildCpusets(_)
            | Self::ExclusiveCpus(_)
            | Self::Partition(_)
            | Self::Delegation(_)
            | Self::ThreadTimer(_)
            | Self::Sysctl(_)
            | Self::Trigger(_)
            | Self::NodeCompaction(_)
            | Self::PciFunction(_)
            | Self::PciDriver(_)
            | Self::PciResetMethod(_)
            | Self::PciReset(_)
            | Self::Trace(_) => false,
        }
    }
}

/// How many changes are made at the same time. Waits for the kernel's grace periods overlap however
/// many they are, but each thread costs more than the write that it makes.
const WORKERS: usize = 8;

fn apply_together(host: &Host, changes: &[Change]) -> Vec<Applied> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut dones = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(change) = changes.get(index) else {
                return dones;
            };
            dones.push((index, apply_one(host, change.clone())));
        }
    };
    let mut dones = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..WORKERS.min(changes.len()))
            .filter_map(|_| {
                std::thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, work)
                    .ok()
            })
            .collect();
        // This thread works too: alone, if no other could be started.
        let mut dones = work();
        for helper in helpers {
            match helper.join() {
                Ok(others) => dones.extend(others),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        dones
    });
    dones.sort_by_key(|(index, _)| *index);
    dones.into_iter().map(|(_, done)| done).collect()
}

/// Enough for one write and its error.
const STACK: usize = 128 * 1024;

/// Whether the object is gone. The kernel may return the same error for other reasons; then the
/// object is still there. An object that was to be made cannot be gone.
fn has_gone(host: &Host, change: &Change) -> bool {
    let is_there = || {
        change
            .knob
            .read(host)
            .map_or(true, |found| found.is_some_and(|found| found != ABSENT))
    };
    change.found != ABSENT && !must_exist(&change.knob) && !is_there()
}

/// Whether the knob has the wanted value by itself: systemd switches the cpuset controller off after the
/// last unit that used it, and without it no CPUs are exclusive.
fn holds(host: &Host, change: &Change) -> bool {
    let found = change.knob.read(host);
    found.is_ok_and(|found| found.as_ref() == Some(&change.wanted))
}

/// Whether the object does not come and go by itself, so that a missing file is an error.
fn must_exist(knob: &Knob) -> bool {
    match knob {
        Knob::DefaultIrq
        | Knob::Workqueues
        | Knob::Sysctl(_)
        | Knob::Trigger(_)
        | Knob::NodeCompaction(_)
        | Knob::PciDriver(_)
        | Knob::PciReset(_) => true,
        Knob::Irq(_)
        | Knob::QueueCpus(_)
        | Knob::PciResetMethod(_)
        | Knob::Kthread(_)
        | Knob::Thread(_)
        | Knob::ThreadPolicy(_)
        | Knob::CpuOnline(_)
        | Knob::Governor(_)
        | Knob::EnergyPreference(_)
        | Knob::WakeupLatency(_)
        | Knob::HaltPolling
        | Knob::UnitCpus(_)
        | Knob::UnitOverrides
        | Knob::CgroupCpus(_)
        | Knob::ContainerCpus(_)
        | Knob::Cgroup(_)
        | Knob::CgroupOf(_)
        | Knob::CgroupOfThread(_)
        | Knob::ThreadedCgroup(_)
        | Knob::ChildCpusets(_)
        | Knob::ExclusiveCpus(_)
        | Knob::Partition(_)
        | Knob::Delegation(_)
        | Knob::ThreadTimer(_)
        | Knob::PciFunction(_)
        | Knob::Trace(_) => false,
    }
}

/// The text of a system error, with the next step if one is known.
fn why(knob: &Knob, error: &io::Error) -> String {
    let text = os_text(error);
    let code = error.raw_os_error();
    if matches!(code, Some(nix::libc::EPERM | nix::libc::EACCES))
        && !nix::unistd::geteuid().is_root()
    {
        return format!("{text}; this needs root");
    }
    match knob {
        Knob::Thread(_) if code == Some(nix::libc::EINVAL) => {
            format!("{text}; its cgroup allows none of these CPUs, or none of them is online")
        }
        Knob::CgroupCpus(_) if code == Some(nix::libc::EBUSY) => {
            format!("{text}; a process in it would be left without a CPU")
        }
        Knob::PciResetMethod(_) if code == Some(nix::libc::EINVAL) => {
            format!("{text}; `pci-reset --list` lists the methods that the device has")
        }
        Knob::Trace(_) if code == Some(nix::libc::ENOENT) => {
            format!("{text}; without tracefs: mount -t tracefs tracefs /sys/kernel/tracing")
        }
        Knob::Irq(_)
        | Knob::DefaultIrq
        | Knob::QueueCpus(_)
        | Knob::Workqueues
        | Knob::Kthread(_)
        | Knob::Thread(_)
        | Knob::ThreadPolicy(_)
        | Knob::CpuOnline(_)
        | Knob::Governor(_)
        | Knob::EnergyPreference(_)
        | Knob::WakeupLatency(_)
        | Knob::HaltPolling
        | Knob::UnitCpus(_)
        | Knob::UnitOverrides
        | Knob::CgroupCpus(_)
        | Knob::ContainerCpus(_)
        | Knob::Cgroup(_)
        | Knob::CgroupOf(_)
        | Knob::CgroupOfThread(_)
        | Knob::ThreadedCgroup(_)
        | Knob::ChildCpusets(_)
        | Knob::ExclusiveCpus(_)
        | Knob::Partition(_)
        | Knob::Delegation(_)
        | Knob::ThreadTimer(_)
        | Knob::Sysctl(_)
        | Knob::Trigger(_)
        | Knob::NodeCompaction(_)
        | Knob::PciFunction(_)
        | Knob::PciDriver(_)
        | Knob::PciResetMethod(_)
        | Knob::PciReset(_)
        | Knob::Trace(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knob::Setting;
    use std::fs;

    fn tree() -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let irq = dir.path().join("proc/irq/24");
        fs::create_dir_all(&irq).unwrap();
        fs::write(irq.join("smp_affinity_list"), "0-23\n").unwrap();
        let host = Host::new(dir.path());
        (dir, host)
    }

    fn change(knob: Knob, found: &str, wanted: &str) -> Change {
        let label = knob.to_string();
        let (found, wanted) = (knob.parse(found).unwrap(), knob.parse(wanted).unwrap());
        Setting::new(knob, label, found).want(wanted)
    }

    #[test]
    fn a_change_is_made_once_and_reads_back() {
        let (_dir, host) = tree();
        let wanted = change(Knob::Irq(24), "0-23", "0-5");
        let done = apply(&host, vec![wanted]);
        assert_eq!(done[0].outcome, Outcome::Changed);
        assert_eq!(done[0].to_string(), "IRQ 24: 0-23 -> 0-5");
        assert_eq!(
            Knob::Irq(24).read(&host).unwrap().unwrap().to_string(),
            "0-5"
        );
        let again = apply(&host, vec![change(Knob::Irq(24), "0-5", "0-5")]);
        assert_eq!(again[0].outcome, Outcome::Already);
    }

    #[test]
    fn queued_changes_are_reported_in_their_order() {
        let (dir, host) = tree();
        let policy = |n: usize| {
            dir.path()
                .join(format!("sys/devices/system/cpu/cpufreq/policy{n}"))
        };
        for n in (0..100).filter(|n| *n != 70) {
            fs::create_dir_all(policy(n)).unwrap();
            fs::write(policy(n).join("scaling_governor"), "schedutil\n").unwrap();
        }
        let mut changes: Vec<Change> = (0..100)
            .map(|n| {
                change(
                    Knob::Governor(format!("policy{n}")),
                    "schedutil",
                    "performance",
                )
            })
            .collect();
        changes.insert(50, change(Knob::Irq(24), "0-23", "0-5"));
        let done = apply(&host, changes.clone());
        assert_eq!(
            done.iter()
                .map(|done| done.change.clone())
                .collect::<Vec<_>>(),
            changes
        );
        let changed = |done: &Applied| done.outcome == Outcome::Changed;
        assert!(
            done.iter()
                .enumerate()
                .all(|(n, done)| changed(done) != (n == 71)),
            "{done:?}"
        );
        assert_eq!(done[71].outcome, Outcome::Gone);
        assert_eq!(
            fs::read_to_string(policy(99).join("scaling_governor")).unwrap(),
            "performance"
        );
    }

    #[test]
    fn on_a_host_for_dry_run_changes_are_planned() {
        let (_dir, host) = tree();
        let host = host.for_dry_run();
        assert_eq!(
            apply_one(&host, change(Knob::Irq(24), "0-23", "0-5")).outcome,
            Outcome::Planned
        );
        assert_eq!(
            apply_one(&host, change(Knob::Irq(24), "0-5", "0-5")).outcome,
            Outcome::Already
        );
        assert_eq!(
            Knob::Irq(24).read(&host).unwrap().unwrap().to_string(),
            "0-23"
        );
        // What is not movable is reported without a write, if it can be known.
        let file = host.path("proc/irq/24/smp_affinity_list");
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        let refused = apply_one(&host, change(Knob::Irq(24), "0-23", "0-5"));
        assert!(matches!(refused.outcome, Outcome::Refused(_)), "{refused}");
    }

    #[test]
    fn what_went_is_gone_and_what_must_be_there_failed() {
        let (_dir, host) = tree();
        let done = apply(
            &host,
            vec![
                change(Knob::Irq(99), "0-23", "0-5"),
                change(Knob::DefaultIrq, "0-23", "0-5"),
                change(Knob::Irq(24), "0-23", "3"),
            ],
        );
        assert_eq!(done[0].outcome, Outcome::Gone);
        let made = apply_one(
            &host,
            change(Knob::Cgroup("no/a".into()), "absent", "present"),
        );
        assert!(
            made.to_string()
                .ends_with("set to present: No such file or directory"),
            "{made}"
        );
        assert_eq!(
            done[1].to_string(),
            "default IRQ mask: set to 0-5: No such file or directory"
        );
        assert_eq!(
            done[2].outcome,
            Outcome::Changed,
            "a failure does not stop the rest"
        );
    }

    #[test]
    fn a_file_that_went_with_its_controller_is_unset() {
        let (dir, host) = tree();
        let slice = dir.path().join("sys/fs/cgroup/qemu.slice");
        std::fs::create_dir_all(slice).unwrap();
        let knob = || Knob::ExclusiveCpus("qemu.slice".into());
        let unset = apply_one(&host, change(knob(), "6-7", ""));
        assert_eq!(unset.outcome, Outcome::Changed);
        let set = apply_one(&host, change(knob(), "", "6-7"));
        assert!(matches!(set.outcome, Outcome::Failed(_)), "{set}");
    }

    #[test]
    fn unset_values_have_a_word() {
        assert_eq!(
            change(Knob::UnitCpus("system.slice".into()), "", "0-5").to_string(),
            "system.slice: unset -> 0-5"
        );
        assert_eq!(
            change(Knob::CpuOnline(6), "1", "0").to_string(),
            "CPU 6: online -> offline"
        );
        assert_eq!(
            change(Knob::Trigger("vm/drop_caches".into()), "", "3").to_string(),
            "vm.drop_caches: 3"
        );
    }
}

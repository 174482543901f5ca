//! A mutation is data: what is wanted, computed first, and the one place that carries it out.

use std::fmt;
use std::io;

use serde::Serialize;

use crate::error::{is_gone, os_text};
use crate::knob::{ABSENT, Answer, Knob};
use crate::sysroot::Sysroot;

/// A knob as it was found on the host: what a tool lists, and what a change is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// What would be set.
    pub knob: Knob,
    /// Its name for people: `IRQ 24 (nvme0q1)`.
    pub label: String,
    /// What it holds, in the knob's canonical form.
    pub found: String,
}

impl Object {
    /// A knob with its label and value.
    pub fn new(knob: Knob, label: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            knob,
            label: label.into(),
            found: found.into(),
        }
    }

    /// The change that brings the object to `wanted`.
    pub fn want(self, wanted: impl Into<String>) -> Change {
        Change {
            knob: self.knob,
            label: self.label,
            found: self.found,
            wanted: wanted.into(),
        }
    }
}

/// One thing to be set: the object, the value found and the value wanted. Where they are equal
/// there is nothing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What is set.
    pub knob: Knob,
    /// Its name for people.
    pub label: String,
    /// What it holds.
    pub found: String,
    /// What it shall hold.
    pub wanted: String,
}

impl Change {
    /// Whether there is nothing to do.
    pub fn is_noop(&self) -> bool {
        self.found == self.wanted
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.knob {
            Knob::Trigger(_) => write!(f, "{}: {}", self.label, self.wanted),
            knob => write!(
                f,
                "{}: {} -> {}",
                self.label,
                shown(knob, &self.found),
                shown(knob, &self.wanted)
            ),
        }
    }
}

/// A knob's value in words, where it has some.
fn shown<'a>(knob: &Knob, value: &'a str) -> &'a str {
    match (knob, value) {
        (_, "") => "unset",
        (Knob::CpuOnline(_), "0") => "offline",
        (Knob::CpuOnline(_), "1") => "online",
        _ => value,
    }
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "message")]
pub enum Outcome {
    /// Dry run: it would be made.
    Planned,
    /// Made.
    Changed,
    /// There was nothing to do.
    Already,
    /// The object vanished meanwhile: a thread ended, a device went.
    Gone,
    /// Never allowed by the kernel, which is no failure: a managed IRQ, a per-CPU kthread.
    Refused(String),
    /// It belongs to somebody else by now, and was left as it is.
    Left(String),
    /// Tried and failed, in the system's words.
    Failed(String),
}

/// A change and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// The change.
    pub change: Change,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change {
            label,
            found,
            wanted,
            knob,
        } = &self.change;
        match &self.outcome {
            Outcome::Planned | Outcome::Changed => self.change.fmt(f),
            Outcome::Already => write!(f, "{label}: already {}", shown(knob, found)),
            Outcome::Gone => write!(f, "{label}: gone"),
            Outcome::Refused(why) => write!(f, "{label}: refused: {why}"),
            Outcome::Left(why) => write!(f, "{label}: left as it is: {why}"),
            Outcome::Failed(why) => write!(f, "{label}: set to {}: {why}", shown(knob, wanted)),
        }
    }
}

/// Carries out one change. Everything that Pinfold writes to a kernel goes through here. On a root
/// that is [for looking](Sysroot::for_looking) nothing is written, and what would be is planned.
///
/// The caller has saved what must come back before ([`crate::state::save`], [`crate::state::store`]).
pub fn apply_one(root: &Sysroot, change: Change) -> Done {
    let outcome = if change.is_noop() {
        Outcome::Already
    } else if root.is_for_looking() {
        change
            .knob
            .known_refusal(root)
            .map_or(Outcome::Planned, Outcome::Refused)
    } else {
        match change.knob.write(root, &change.wanted) {
            Ok(Answer::Taken(Some(kept))) if kept != change.wanted => Outcome::Failed(format!(
                "the kernel took the value and kept {}",
                if kept.is_empty() { "nothing" } else { &kept }
            )),
            Ok(Answer::Taken(_)) => Outcome::Changed,
            Ok(Answer::Refused(why)) => Outcome::Refused(why),
            Err(error) if is_gone(&error) && has_gone(root, &change) => Outcome::Gone,
            Err(error) => Outcome::Failed(why(&change.knob, &error)),
        }
    };
    Done { change, outcome }
}

/// Carries out changes in their order; one that fails does not stop the others.
pub fn apply(root: &Sysroot, changes: Vec<Change>) -> Vec<Done> {
    let mut dones = Vec::with_capacity(changes.len());
    apply_each(root, changes, |done| dones.push(done));
    dones
}

/// As [`apply()`], each told to `told` as it is done. Of neighbours that have the kernel wait
/// ([`Knob::waits`]) all wait at the same time, and are told in their order.
pub(crate) fn apply_each(root: &Sysroot, changes: Vec<Change>, mut told: impl FnMut(Done)) {
    let waits =
        |change: &Change| change.knob.waits() && !change.is_noop() && !root.is_for_looking();
    for group in changes.chunk_by(|a, b| waits(a) && waits(b)) {
        match group {
            [change] => told(apply_one(root, change.clone())),
            group => group
                .chunks(SIDE_BY_SIDE)
                .flat_map(|some| apply_together(root, some))
                .for_each(&mut told),
        }
    }
}

/// How many wait at the same time.
const SIDE_BY_SIDE: usize = 64;

fn apply_together(root: &Sysroot, changes: &[Change]) -> Vec<Done> {
    std::thread::scope(|scope| {
        let start = |change: &Change| {
            let own = change.clone();
            std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, move || apply_one(root, own))
                .ok()
        };
        let running: Vec<_> = changes
            .iter()
            .map(|change| (change, start(change)))
            .collect();
        let ended = running.into_iter().map(|(change, thread)| {
            match thread.map(std::thread::ScopedJoinHandle::join) {
                Some(Ok(done)) => done,
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                // No thread to be had: here, then.
                None => apply_one(root, change.clone()),
            }
        });
        ended.collect()
    })
}

/// For one write; what it says of a failure is short.
const STACK: usize = 128 * 1024;

/// The kernel may answer so for other reasons too; then the object is still there. What was to be
/// made cannot have gone.
fn has_gone(root: &Sysroot, change: &Change) -> bool {
    let is_there = || {
        change
            .knob
            .read(root)
            .map_or(true, |found| found.is_some_and(|found| found != ABSENT))
    };
    change.found != ABSENT && !must_exist(&change.knob) && !is_there()
}

/// Objects that do not come and go by themselves: when their file is missing, that is an error.
fn must_exist(knob: &Knob) -> bool {
    matches!(
        knob,
        Knob::DefaultIrq
            | Knob::Workqueues
            | Knob::Sysctl(_)
            | Knob::Trigger(_)
            | Knob::PciDriver(_)
    )
}

/// The system's words, and the next step where one is known.
fn why(knob: &Knob, error: &io::Error) -> String {
    let text = os_text(error);
    match (knob, error.raw_os_error()) {
        (_, Some(nix::libc::EPERM | nix::libc::EACCES)) if !nix::unistd::geteuid().is_root() => {
            format!("{text}; this needs root")
        }
        (Knob::Thread(_), Some(nix::libc::EINVAL)) => {
            format!("{text}; its cgroup allows none of these CPUs, or none of them is online")
        }
        (Knob::CgroupCpus(_), Some(nix::libc::EBUSY)) => {
            format!("{text}; a process in it would be left without a CPU")
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree() -> (tempfile::TempDir, Sysroot) {
        let dir = tempfile::tempdir().unwrap();
        let irq = dir.path().join("proc/irq/24");
        fs::create_dir_all(&irq).unwrap();
        fs::write(irq.join("smp_affinity_list"), "0-23\n").unwrap();
        let root = Sysroot::new(dir.path());
        (dir, root)
    }

    fn change(knob: Knob, found: &str, wanted: &str) -> Change {
        let label = knob.to_string();
        Object::new(knob, label, found).want(wanted)
    }

    #[test]
    fn a_change_is_made_once_and_reads_back() {
        let (_dir, root) = tree();
        let wanted = change(Knob::Irq(24), "0-23", "0-5");
        let done = apply(&root, vec![wanted]);
        assert_eq!(done[0].outcome, Outcome::Changed);
        assert_eq!(done[0].to_string(), "IRQ 24: 0-23 -> 0-5");
        assert_eq!(Knob::Irq(24).read(&root).unwrap().unwrap(), "0-5");
        let again = apply(&root, vec![change(Knob::Irq(24), "0-5", "0-5")]);
        assert_eq!(again[0].outcome, Outcome::Already);
    }

    #[test]
    fn those_that_wait_are_told_in_their_order() {
        let (dir, root) = tree();
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
        let done = apply(&root, changes.clone());
        assert_eq!(
            done.iter()
                .map(|done| done.change.clone())
                .collect::<Vec<_>>(),
            changes
        );
        let changed = |done: &Done| done.outcome == Outcome::Changed;
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
    fn on_a_root_for_looking_changes_are_planned() {
        let (_dir, root) = tree();
        let root = root.for_looking();
        assert_eq!(
            apply_one(&root, change(Knob::Irq(24), "0-23", "0-5")).outcome,
            Outcome::Planned
        );
        assert_eq!(
            apply_one(&root, change(Knob::Irq(24), "0-5", "0-5")).outcome,
            Outcome::Already
        );
        assert_eq!(Knob::Irq(24).read(&root).unwrap().unwrap(), "0-23");
        // What the kernel holds is told without trying, where it can be.
        let file = root.path("proc/irq/24/smp_affinity_list");
        fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        let refused = apply_one(&root, change(Knob::Irq(24), "0-23", "0-5"));
        assert!(matches!(refused.outcome, Outcome::Refused(_)), "{refused}");
    }

    #[test]
    fn what_went_is_gone_and_what_must_be_there_failed() {
        let (_dir, root) = tree();
        let done = apply(
            &root,
            vec![
                change(Knob::Irq(99), "0-23", "0-5"),
                change(Knob::DefaultIrq, "0-23", "0-5"),
                change(Knob::Irq(24), "0-23", "3"),
            ],
        );
        assert_eq!(done[0].outcome, Outcome::Gone);
        let made = apply_one(
            &root,
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

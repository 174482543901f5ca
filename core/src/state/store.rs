//! What hook keeps under /run/pinfold: reservations and one baseline, behind one lock.
//!
//! The *baseline* has, for every knob that was ever touched, the value before the first touch and
//! the values set since. It is on disk before the write that it covers, so that after a run that
//! was killed at any point the next one can restore the host. It is in /run: a boot clears it, as
//! it does the kernel's own state.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::host::Host;
use crate::knob::{Applied, Outcome, apply_each};
use crate::sys::locks;
use crate::sysroot::Sysroot;

use super::baseline::{Baseline, Planned};
use super::newer::Newer;
use super::replace::replace;
use super::state_file::{State, write_text};

/// The folder, below the sysroot.
const FOLDER: &str = "run/pinfold";
/// The file with the state, in it.
const STATE: &str = "state.json";
/// The file beside it with the version of the hook that wrote it, for reports. Not in the state,
/// since earlier versions refuse a state with a field that they do not know.
pub const WRITER: &str = "writer";
/// How often a lock that another process holds is tried again.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// The state, under its lock or for reading only. `R` is what is kept per VM, by its number.
#[derive(Debug)]
pub struct Store<R> {
    root: Host,
    folder: PathBuf,
    _lock: Option<Flock<File>>,
    /// Whether it was noted who writes the state.
    is_signed: Cell<bool>,
    /// What is kept per VM.
    pub reservations: BTreeMap<u32, R>,
    /// The earlier values of every touched knob.
    pub baseline: Baseline,
    /// What a later version of the program keeps in the state, and this one does not know.
    pub newer: Newer,
}

impl<R: Serialize + DeserializeOwned> Store<R> {
    /// Takes the lock, waiting for another hook to end, and reads the state; empty if there is
    /// none. On a host that is [for a dry run](Host::for_dry_run) no lock is taken, and nothing is
    /// ever saved.
    ///
    /// # Errors
    /// [`Error::Unusable`] if the lock cannot be taken in time, other users can write to the
    /// folder, or the state file cannot be trusted; the text names what to do.
    pub fn open(root: &Host, deadline: Duration) -> Result<Self> {
        Self::open_telling(root, deadline, |_| {})
    }

    /// As [`open`](Self::open); calls `on_wait` once with who holds the lock, if it has to be waited
    /// for.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_telling(
        root: &Host,
        deadline: Duration,
        on_wait: impl FnMut(&str),
    ) -> Result<Self> {
        let folder = root.path(FOLDER);
        let lock = if root.dry_run() {
            None
        } else {
            if let Err(source) = DirBuilder::new().mode(0o700).create(&folder)
                && source.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(Error::io(folder, "make the folder", source));
            }
            check_private(&folder)?;
            Some(take_lock(root, &folder, deadline, on_wait)?)
        };
        let state = read_state::<R>(&folder)?;
        Ok(Self {
            root: root.clone(),
            folder,
            _lock: lock,
            is_signed: Cell::new(false),
            reservations: state.reservations,
            baseline: state.baseline,
            newer: state.newer,
        })
    }

    /// The root it was opened on.
    pub fn root(&self) -> &Host {
        &self.root
    }

    /// Reads the state without the lock, for display only; `None` if there is none.
    ///
    /// # Errors
    /// As [`open`](Self::open), without the lock.
    pub fn peek(root: &Sysroot) -> Result<Option<State<R>>> {
        let folder = root.path(FOLDER);
        match fs::symlink_metadata(folder.join(STATE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::io(folder, "list", source)),
            Ok(_) => read_state(&folder).map(Some),
        }
    }

    /// Writes the state, whole or not at all. With no reservation and no baseline left the file
    /// goes, unless a later version of the program could restore something from it.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn save(&self) -> Result<()> {
        if self.root.dry_run() {
            return Ok(());
        }
        let path = self.folder.join(STATE);
        if self.reservations.is_empty()
            && self.baseline.entries.is_empty()
            && !self.newer.has_values()
        {
            return match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(Error::io(path, "remove", source))
                }
                _ => Ok(()),
            };
        }
        if !self.is_signed.replace(true) {
            // Nothing depends on it.
            let _ = self.keep(WRITER, env!("CARGO_PKG_VERSION"));
        }
        replace(&path, |out| {
            Ok(write_text(
                out,
                &self.reservations,
                &self.baseline,
                &self.newer,
            )?)
        })
        .map_err(|source| Error::io(path, "save", source))
    }

    /// Writes another file of hook's beside the state, whole or not at all; nothing that undo
    /// depends on.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn keep(&self, name: &str, text: &str) -> Result<()> {
        if self.root.dry_run() {
            Ok(())
        } else {
            let path = self.folder.join(name);
            replace(&path, |out| out.write_all(text.as_bytes()))
                .map_err(|source| Error::io(path, "save", source))
        }
    }

    /// Saves the state, then makes the planned changes one by one and calls `on_done` after each.
    ///
    /// # Errors
    /// If the state cannot be saved; nothing has been changed then.
    pub fn carry_out(
        &mut self,
        plan: Vec<Planned>,
        mut on_done: impl FnMut(&Applied),
    ) -> Result<()> {
        self.save_before(&plan)?;
        make(&self.root, plan, |done| {
            self.baseline.settle(&done);
            on_done(&done);
        });
        Ok(())
    }

    /// Saves the state, then makes the planned changes while the caller goes on, which has to
    /// [finish](Self::finish) them. In a dry run they are planned at once.
    ///
    /// # Errors
    /// If the state cannot be saved; nothing has been changed then.
    pub fn start(&mut self, plan: Vec<Planned>) -> Result<Pending> {
        self.save_before(&plan)?;
        if !self.root.dry_run() {
            let (host, own) = (self.root.clone(), plan.clone());
            let thread = std::thread::Builder::new().spawn(move || made(&host, own));
            if let Ok(thread) = thread {
                return Ok(Pending(Progress::Running(thread)));
            }
        }
        Ok(Pending(Progress::Ended(made(&self.root, plan))))
    }

    /// Waits for changes that were [started](Self::start) and calls `on_done` for each, in order.
    pub fn finish(&mut self, pending: Pending, mut on_done: impl FnMut(&Applied)) {
        let dones = match pending.0 {
            Progress::Ended(dones) => dones,
            Progress::Running(thread) => match thread.join() {
                Ok(dones) => dones,
                Err(panic) => std::panic::resume_unwind(panic),
            },
        };
        for done in dones {
            self.baseline.settle(&done);
            on_done(&done);
        }
    }

    /// Saves the state if a change sets a value that is not in it yet. What only goes back to its
    /// value from before is there already, so that a full disk does not stop it.
    fn save_before(&self, plan: &[Planned]) -> Result<()> {
        let is_new = |Planned {
                          change,
                          skip_reason,
                      }: &Planned| {
            skip_reason.is_none()
                && !change.is_noop()
                && self.baseline.before(&change.knob) != Some(&change.wanted)
        };
        if plan.iter().any(is_new) {
            self.save()?;
        }
        Ok(())
    }
}

/// Changes that are being made ([`Store::start`]).
#[derive(Debug)]
#[must_use = "changes that were started have to be finished"]
pub struct Pending(Progress);

#[derive(Debug)]
enum Progress {
    Running(JoinHandle<Vec<Applied>>),
    Ended(Vec<Applied>),
}

fn made(host: &Host, plan: Vec<Planned>) -> Vec<Applied> {
    let mut dones = Vec::with_capacity(plan.len());
    make(host, plan, |done| dones.push(done));
    dones
}

/// Makes planned changes in order; skipped ones are only reported.
fn make(host: &Host, plan: Vec<Planned>, mut on_done: impl FnMut(Applied)) {
    let mut plan = plan.into_iter().peekable();
    while let Some(Planned {
        change,
        skip_reason,
    }) = plan.next()
    {
        if let Some(why) = skip_reason {
            let outcome = Outcome::Foreign(why);
            on_done(Applied { change, outcome });
            continue;
        }
        let following = || plan.next_if(|next| next.skip_reason.is_none());
        let following = std::iter::from_fn(following).map(|next| next.change);
        apply_each(host, std::iter::once(change).chain(following), &mut on_done);
    }
}

/// Reads a file that [`Store::keep`] wrote; `None` if there is none.
///
/// # Errors
/// If it cannot be read, or other users can write to it.
pub fn kept(root: &Sysroot, name: &str) -> Result<Option<String>> {
    read_own(&root.path(FOLDER).join(name))
}

/// Removes a state that cannot be read, under the lock; what it covered is not put back.
///
/// # Errors
/// If the lock cannot be taken or the file cannot be removed.
pub fn discard(root: &Sysroot, deadline: Duration) -> Result<bool> {
    let folder = root.path(FOLDER);
    if !folder.exists() {
        return Ok(false);
    }
    check_private(&folder)?;
    let _lock = take_lock(root, &folder, deadline, |_| {})?;
    let path = folder.join(STATE);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::io(path, "remove", source)),
    }
}

/// The folder must be a real one, this user's, and closed to others: who can write the state can
/// write to the kernel.
fn check_private(folder: &Path) -> Result<()> {
    let meta =
        fs::symlink_metadata(folder).map_err(|source| Error::io(folder, "examine", source))?;
    let fault = if !meta.is_dir() {
        "it is not a folder"
    } else if meta.uid() != nix::unistd::geteuid().as_raw() {
        "it belongs to another user"
    } else if meta.mode() & 0o077 != 0 {
        "other users can read or change it"
    } else {
        return Ok(());
    };
    let why = format!("{fault}; find out what made it, then remove it and run `hook recover`");
    Err(Error::unusable(folder.display().to_string(), why))
}

fn take_lock(
    root: &Sysroot,
    folder: &Path,
    deadline: Duration,
    mut on_wait: impl FnMut(&str),
) -> Result<Flock<File>> {
    let path = folder.join("lock");
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(&path);
    let mut file = open.map_err(|source| Error::io(&path, "open", source))?;
    let until = Instant::now() + deadline;
    let mut waits = false;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < until => {
                if !waits {
                    on_wait(&lock_holder(root, &back));
                    waits = true;
                }
                file = back;
            }
            Err((back, nix::errno::Errno::EWOULDBLOCK)) => {
                let why = format!(
                    "{} has held it for {} s; see `ps -C hook`",
                    lock_holder(root, &back),
                    deadline.as_secs()
                );
                return Err(Error::unusable(path.display().to_string(), why));
            }
            Err((_, errno)) => return Err(Error::io(path, "lock", errno.into())),
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
}

/// Who holds the lock, as far as the kernel shows it: `process 4711 (hook 101 post-start)`.
fn lock_holder(root: &Sysroot, file: &File) -> String {
    let holder = file
        .metadata()
        .ok()
        .and_then(|meta| locks::holder(root, &meta).ok().flatten());
    let Some(pid) = holder else {
        return "another hook".to_owned();
    };
    let line = root
        .read(format!("proc/{pid}/cmdline"))
        .unwrap_or_default()
        .replace('\0', " ");
    match line.trim_end() {
        "" => format!("process {pid}"),
        line => format!("process {pid} ({line})"),
    }
}

fn read_state<R: Serialize + DeserializeOwned>(folder: &Path) -> Result<State<R>> {
    let path = folder.join(STATE);
    let bad = |why: String| {
        let why = format!(
            "{why}; it cannot be trusted. `hook recover --discard` removes it and leaves the host as it is now"
        );
        Error::unusable(path.display().to_string(), why)
    };
    match read_own(&path) {
        Ok(None) => Ok(State::default()),
        Ok(Some(text)) => State::parse(&text).map_err(bad),
        Err(Error::Malformed { why, .. }) => Err(bad(why)),
        Err(error) => Err(error),
    }
}

/// Reads a file of the folder; `None` if there is none. [`Error::Malformed`] is one that
/// other users can write to.
fn read_own(path: &Path) -> Result<Option<String>> {
    let bad = |why: &str| Error::malformed(path.display().to_string(), why);
    match OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
    {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) if source.raw_os_error() == Some(nix::libc::ELOOP) => {
            Err(bad("it is a symbolic link"))
        }
        Err(source) => Err(Error::io(path, "read", source)),
        Ok(mut file) => {
            let meta = file
                .metadata()
                .map_err(|source| Error::io(path, "examine", source))?;
            if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
                return Err(bad("other users can read or change it"));
            }
            let mut text = String::new();
            io::Read::read_to_string(&mut file, &mut text)
                .map_err(|source| Error::io(path, "read", source))?;
            Ok(Some(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuset::CpuSet;
    use crate::knob::{self, Knob, Setting, apply_one};
    use proptest::prelude::*;

    fn cpus(list: &str) -> knob::Value {
        CpuSet::from_kernel_list(list).unwrap().into()
    }

    const SOON: Duration = Duration::from_secs(5);

    fn host() -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        for irq in [1, 2] {
            let folder = dir.path().join(format!("proc/irq/{irq}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("smp_affinity_list"), "0-3\n").unwrap();
        }
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn objects(root: &Host) -> Vec<Setting> {
        [1, 2]
            .map(|irq| {
                Setting::new(
                    Knob::Irq(irq),
                    format!("IRQ {irq}"),
                    Knob::Irq(irq).read(root).unwrap().unwrap(),
                )
            })
            .into()
    }

    fn set(store: &mut Store<String>, root: &Host, value: Option<&str>) -> Vec<String> {
        let _ = store
            .baseline
            .detect_foreign(|knob| knob.read(root), |_, _, _| false);
        let plan = store.baseline.plan(objects(root), |_, before| {
            value.map_or_else(|| before.clone(), cpus)
        });
        let mut report = Vec::new();
        store
            .carry_out(plan, |done| report.push(done.to_string()))
            .unwrap();
        store.save().unwrap();
        report
    }

    #[test]
    fn started_changes_are_on_disk_before_and_reported_when_finished() {
        let (dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        store.reservations.insert(100, "a".into());
        let plan = store.baseline.plan(objects(&root), |_, _| cpus("0"));
        let pending = store.start(plan).unwrap();
        let on_disk = fs::read_to_string(dir.path().join("run/pinfold/state.json")).unwrap();
        let saved = State::<String>::parse(&on_disk).unwrap();
        assert_eq!(saved.baseline.before(&Knob::Irq(1)), Some(&cpus("0-3")));
        let mut reported = Vec::new();
        store.finish(pending, |done| reported.push(done.to_string()));
        assert_eq!(reported, ["IRQ 1: 0-3 -> 0", "IRQ 2: 0-3 -> 0"]);
        assert_eq!(Knob::Irq(2).read(&root).unwrap().unwrap(), cpus("0"));

        // A failed write is reported too, with its object.
        fs::remove_dir_all(dir.path().join("proc/irq/2")).unwrap();
        let missing = Setting::new(Knob::DefaultIrq, "default IRQ mask", cpus("0-3"));
        let plan = store.baseline.plan(vec![missing], |_, _| cpus("0"));
        let pending = store.start(plan).unwrap();
        let mut failed = 0;
        store.finish(pending, |done| {
            failed += usize::from(matches!(done.outcome, Outcome::Failed(_)));
        });
        assert_eq!(failed, 1);
    }

    #[test]
    fn the_baseline_comes_back_across_runs() {
        let (_dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        store.reservations.insert(100, "a".into());
        assert_eq!(
            set(&mut store, &root, Some("0")),
            ["IRQ 1: 0-3 -> 0", "IRQ 2: 0-3 -> 0"]
        );
        drop(store);
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(store.reservations[&100], "a");
        assert_eq!(set(&mut store, &root, Some("1"))[0], "IRQ 1: 0 -> 1");
        assert_eq!(
            set(&mut store, &root, None),
            ["IRQ 1: 1 -> 0-3", "IRQ 2: 1 -> 0-3"]
        );
        store.reservations.clear();
        store.baseline.forget(&Knob::Irq(1));
        store.baseline.forget(&Knob::Irq(2));
        store.save().unwrap();
        assert!(!root.exists("run/pinfold/state.json"));
    }

    #[test]
    fn on_a_root_for_dry_run_each_step_sees_what_the_one_before_would_set() {
        let (dir, root) = host();
        let root = root.for_dry_run();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        store.reservations.insert(100, "a".into());
        assert_eq!(
            set(&mut store, &root, Some("0")),
            ["IRQ 1: 0-3 -> 0", "IRQ 2: 0-3 -> 0"]
        );
        assert_eq!(set(&mut store, &root, Some("0"))[0], "IRQ 1: already 0");
        assert_eq!(set(&mut store, &root, None)[0], "IRQ 1: 0 -> 0-3");
        store.keep("times.json", "{}").unwrap();
        assert!(!dir.path().join("run/pinfold").exists());
        // Nor does it wait for another hook.
        let root = Host::new(dir.path());
        let _lock = Store::<String>::open(&root, SOON).unwrap();
        Store::<String>::open(&root.for_dry_run(), Duration::ZERO).unwrap();
    }

    #[test]
    fn who_wrote_the_state_is_beside_it() {
        let (dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        store.save().unwrap();
        assert_eq!(kept(&root, WRITER).unwrap(), None);
        store.reservations.insert(100, "a".into());
        store.save().unwrap();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(kept(&root, WRITER).unwrap().unwrap(), version);
        // Fields of the state are what the first version knows.
        let state = fs::read_to_string(dir.path().join("run/pinfold/state.json")).unwrap();
        assert!(!state.contains(version), "{state}");
        // Without it the state is saved all the same.
        fs::remove_file(dir.path().join("run/pinfold/writer")).unwrap();
        fs::create_dir(dir.path().join("run/pinfold/writer")).unwrap();
        drop(store);
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        store.reservations.insert(101, "b".into());
        store.save().unwrap();
        assert_eq!(
            Store::<String>::peek(&root)
                .unwrap()
                .unwrap()
                .reservations
                .len(),
            2
        );
    }

    #[test]
    fn files_beside_the_state_must_be_private() {
        let (dir, root) = host();
        let store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(kept(&root, "times.json").unwrap(), None);
        store.keep("times.json", "a").unwrap();
        store.keep("times.json", "b").unwrap();
        assert_eq!(kept(&root, "times.json").unwrap().unwrap(), "b");
        let path = dir.path().join("run/pinfold/times.json");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        assert!(
            kept(&root, "times.json")
                .unwrap_err()
                .to_string()
                .contains("other users can read or change it")
        );
    }

    #[test]
    fn a_value_that_is_refused_at_the_end_is_still_ours() {
        let (_dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        set(&mut store, &root, Some("0"));
        for (wanted, left) in [("0-3", 2), ("1", 0)] {
            let mut baseline = store.baseline.clone();
            let plan = baseline.plan(objects(&root), |_, _| cpus(wanted));
            let refused = Applied {
                change: plan[0].change.clone(),
                outcome: Outcome::Refused("No space left on device".into()),
            };
            baseline.settle(&refused);
            assert_eq!(baseline.values_set(&Knob::Irq(1)).len(), left, "{wanted}");
        }
    }

    #[test]
    fn what_another_program_set_is_not_changed() {
        let (dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        set(&mut store, &root, Some("0"));
        fs::write(dir.path().join("proc/irq/1/smp_affinity_list"), "2").unwrap();
        assert_eq!(
            set(&mut store, &root, None),
            [
                "IRQ 1: left as it is: something else has set it to 2",
                "IRQ 2: 0 -> 0-3"
            ]
        );
    }

    #[test]
    fn what_the_kernel_changed_is_not_foreign() {
        let (dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        set(&mut store, &root, Some("0"));
        fs::write(dir.path().join("proc/irq/1/smp_affinity_list"), "1-3").unwrap();
        for (made_of, kernels) in [("2", false), ("0-3", true)] {
            let learned = store.baseline.detect_foreign(
                |knob| knob.read(&root),
                |_, given, found| {
                    assert!([cpus("0-3"), cpus("0")].contains(given) && *found == cpus("1-3"));
                    *given == cpus(made_of)
                },
            );
            assert_eq!(store.baseline.is_foreign(&Knob::Irq(1)), !kernels);
            assert_eq!(learned, kernels);
        }
        assert_eq!(store.baseline.last(&Knob::Irq(1)), Some(&cpus("0")));
        // That is known from now on, whatever the kernel would do next.
        assert!(
            !store
                .baseline
                .detect_foreign(|knob| knob.read(&root), |_, _, _| false)
        );
        assert!(!store.baseline.is_foreign(&Knob::Irq(1)));
    }

    #[test]
    fn killed_twice_all_values_are_ours() {
        let (_dir, root) = host();
        for (value, writes) in [("0", 1), ("1", 0), ("2", 0)] {
            let mut store: Store<String> = Store::open(&root, SOON).unwrap();
            let _ = store
                .baseline
                .detect_foreign(|knob| knob.read(&root), |_, _, _| false);
            let plan = store.baseline.plan(objects(&root), |_, _| cpus(value));
            store.save().unwrap();
            // Killed after so many writes.
            for planned in plan.into_iter().take(writes) {
                apply_one(&root, planned.change);
            }
        }
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(
            set(&mut store, &root, None),
            ["IRQ 1: 0 -> 0-3", "IRQ 2: already 0-3"]
        );
    }

    #[test]
    fn what_the_kernel_comes_back_to_is_ours() {
        let (dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        set(&mut store, &root, Some("0-1"));
        // A CPU goes: the value wanted next is already set, and the earlier one returns with the
        // CPU.
        let file = dir.path().join("proc/irq/1/smp_affinity_list");
        fs::write(&file, "0").unwrap();
        let plan = store.baseline.plan(objects(&root), |_, _| cpus("0"));
        assert!(plan[0].change.is_noop());
        store.carry_out(plan, |_| ()).unwrap();
        fs::write(&file, "0-1").unwrap();
        drop(store);
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(set(&mut store, &root, None)[0], "IRQ 1: 0-1 -> 0-3");
    }

    #[test]
    fn what_one_was_born_with_is_ours() {
        let (_dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        for object in &objects(&root) {
            store.baseline.adopt(object, &cpus("0-7"));
        }
        let _plan = store.baseline.plan(objects(&root), |_, _| cpus("0"));
        store.save().unwrap();
        // Killed before the first write.
        drop(store);
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(set(&mut store, &root, None)[0], "IRQ 1: 0-3 -> 0-7");
    }

    #[test]
    fn killed_between_save_and_write_both_values_are_ours() {
        let (_dir, root) = host();
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        let plan = store.baseline.plan(objects(&root), |_, _| cpus("0"));
        store.save().unwrap();
        // Killed after the first of two writes.
        apply_one(&root, plan[0].change.clone());
        drop(store);
        let mut store: Store<String> = Store::open(&root, SOON).unwrap();
        assert_eq!(
            set(&mut store, &root, None),
            ["IRQ 1: 0 -> 0-3", "IRQ 2: already 0-3"]
        );
    }

    #[test]
    fn a_state_that_is_not_ours_is_refused_with_a_way_out() {
        let (dir, root) = host();
        drop(Store::<String>::open(&root, SOON).unwrap());
        let path = dir.path().join("run/pinfold/state.json");
        let refused = |why: &str| {
            let error = Store::<String>::open(&root, SOON).unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains("recover --discard"),
                "{error}"
            );
        };
        for text in [
            "",
            "{",
            "{\"version\":0,\"reservations\":{},\"baseline\":[]}",
            "{\"version\":9,\"reservations\":{}}",
            "{\"version\":9,\"reservations\":{\"0100\":\"\"},\"baseline\":[]}",
            "[]",
        ] {
            let _ = fs::remove_file(&path);
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
            refused("it cannot be trusted");
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, "{}").unwrap();
        refused("other users can read or change it");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        refused("symbolic link");
        assert!(discard(&root, SOON).unwrap());
        Store::<String>::open(&root, SOON).unwrap();
    }

    #[test]
    fn what_would_leave_its_folder_is_refused() {
        for entry in [
            r#""knob":{"governor":"../x"},"before":"x""#,
            r#""knob":{"pci-driver":"0000:01:00.0"},"before":"../x""#,
            r#""knob":{"cgroup-of":{"pid":1,"tid":1,"start":1}},"before":"/x","set":["/../x"]"#,
            r#""knob":{"cgroup-of":{"pid":1,"tid":1,"start":1}},"before":"/x","set":["/y","/z/.."]"#,
        ] {
            let text = format!(
                r#"{{"version":1,"reservations":{{}},"baseline":[{{"label":"",{entry}}}]}}"#
            );
            let why = State::<String>::parse(&text).unwrap_err();
            assert!(why.contains("leaves its folder"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trip(
            reservations: BTreeMap<u32, String>,
            irqs in prop::collection::btree_map(any::<u32>(), (".*", any_cpus()), 0..9),
            cgroups in prop::collection::btree_map("[a-z.é ]{1,9}x(/\\PC{3}y)?", any_cpus(), 0..9),
            tasks in prop::collection::btree_map(any::<(i32, i32, u64)>(), any_cpus(), 0..9),
            sysctls in prop::collection::btree_map("[a-z]{1,9}", ".*", 0..9),
        ) {
            let mut baseline = Baseline::default();
            for (irq, (label, before)) in irqs {
                baseline.adopt(&Setting::new(Knob::Irq(irq), label, before.clone()), &before);
            }
            let cgroups = cgroups.into_iter().map(|(cgroup, before)| (Knob::CgroupCpus(cgroup), before));
            for (cgroup, before) in cgroups.filter(|(cgroup, _)| cgroup.check().is_ok()) {
                baseline.adopt(&Setting::new(cgroup, "", before.clone()), &before);
            }
            for ((pid, tid, start), before) in tasks {
                let knob = Knob::Thread(crate::sys::task::TaskId { pid, tid, start });
                baseline.adopt(&Setting::new(knob, "", before.clone()), &before);
            }
            for (name, before) in sysctls {
                let before = knob::Value::text(before);
                baseline.adopt(&Setting::new(Knob::Sysctl(name), "", before.clone()), &before);
            }
            for entry in baseline.entries.values_mut() {
                entry.note_before();
            }
            let state = State { reservations, baseline, newer: Newer::default() };
            prop_assert_eq!(State::parse(&state.to_text().unwrap()).unwrap(), state);
        }
    }

    fn any_cpus() -> impl Strategy<Value = knob::Value> {
        prop::collection::btree_set(0..=crate::cpuset::MAX_CPU, 0..9)
            .prop_map(|cpus| cpus.into_iter().collect::<CpuSet>().into())
    }

    #[test]
    fn one_hook_at_a_time() {
        let (dir, root) = host();
        let first = Store::<String>::open(&root, SOON).unwrap();
        let error = Store::<String>::open(&root, Duration::from_millis(30))
            .unwrap_err()
            .to_string();
        assert!(error.contains("another hook has held it"), "{error}");
        // As the kernel shows it.
        let meta = fs::metadata(dir.path().join("run/pinfold/lock")).unwrap();
        let (major, minor) = (
            nix::sys::stat::major(meta.dev()),
            nix::sys::stat::minor(meta.dev()),
        );
        let line = format!(
            "1: FLOCK  ADVISORY  WRITE 4711 {major:02x}:{minor:02x}:{} 0 EOF\n",
            meta.ino()
        );
        fs::write(dir.path().join("proc/locks"), line).unwrap();
        fs::create_dir_all(dir.path().join("proc/4711")).unwrap();
        fs::write(
            dir.path().join("proc/4711/cmdline"),
            "hook\x00101\x00post-start\0",
        )
        .unwrap();
        let mut holders = Vec::new();
        let wait = Duration::from_millis(30);
        let on_wait = |holder: &str| holders.push(holder.to_owned());
        Store::<String>::open_telling(&root, wait, on_wait).unwrap_err();
        assert_eq!(holders, ["process 4711 (hook 101 post-start)"]);
        drop(first);
        Store::<String>::open(&root, SOON).unwrap();
    }
}

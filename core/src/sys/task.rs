//! Threads and kernel threads, read from /proc; see proc_pid_stat(5).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::cpu;
use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sysroot::{Sysroot, cpu_list};

/// The pid of kthreadd, the parent of every kernel thread. A new one inherits its CPUs.
pub const KTHREADD: i32 = 2;

/// Process id, thread id and start time, so that a reused id is not mistaken for the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskId {
    /// The process (thread group) id.
    pub pid: i32,
    /// The thread id; equal to `pid` for a process's first thread and for kernel threads.
    pub tid: i32,
    /// Start time in clock ticks since boot: field 22 of /proc/PID/task/TID/stat, see
    /// proc_pid_stat(5).
    pub start: u64,
}

/// One thread as in /proc/PID/task/TID/stat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Pid, thread id and start time, so that a reused id is not mistaken for it.
    pub id: TaskId,
    /// Its name, 15 bytes at most.
    pub name: String,
    /// Whether it is a kernel thread (PF_KTHREAD).
    pub kernel: bool,
    /// Whether the kernel refuses to move it (PF_NO_SETAFFINITY).
    pub bound: bool,
    /// The CPU it ran on last.
    pub last_cpu: usize,
}

/// PF_KTHREAD and PF_NO_SETAFFINITY of include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;
const PF_NO_SETAFFINITY: u32 = 0x0400_0000;

/// Parses a /proc/PID/stat line. `pid` is the process the thread belongs to.
///
/// # Errors
/// [`Error::Malformed`] if the line is not a stat line.
pub fn parse_stat(pid: i32, line: &str) -> Result<Task> {
    parse_fields(pid, line).ok_or_else(|| {
        Error::malformed(
            format!("stat of process {pid}"),
            format!("{:?} is not a stat line", line.trim_end()),
        )
    })
}

/// `TID (NAME) STATE PPID ...`. The name may contain anything, brackets too.
fn parse_fields(pid: i32, line: &str) -> Option<Task> {
    let (tid, rest) = line.split_once(" (")?;
    let (name, fields) = rest.split_at_checked(rest.rfind(')')?)?;
    let tid: i32 = Some(tid)
        .filter(|tid| tid.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|tid| tid.parse().ok())?;
    // Field 3, the state, is the first one here.
    let mut fields = fields.strip_prefix(") ")?.split(' ');
    let flags: u32 = fields.nth(9 - 3)?.parse().ok()?;
    let start = fields.nth(22 - 9 - 1)?.parse().ok()?;
    let last_cpu: i32 = fields.nth(39 - 22 - 1)?.parse().ok()?;
    // Linux 2.6.33 and newer have at least 41 fields.
    fields.nth(41 - 39 - 1)?;
    Some(Task {
        id: TaskId { pid, tid, start },
        name: name.to_owned(),
        kernel: flags & PF_KTHREAD != 0,
        bound: flags & PF_NO_SETAFFINITY != 0,
        last_cpu: usize::try_from(last_cpu).unwrap_or(0),
    })
}

/// One thread.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the thread has ended.
pub fn task(root: &Sysroot, pid: i32, tid: i32) -> Result<Task> {
    parse_stat(
        pid,
        &root.read_record(format!("proc/{pid}/task/{tid}/stat"))?,
    )
}

/// A process's threads; those that end meanwhile are left out.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the process has ended.
pub fn tasks(root: &Sysroot, pid: i32) -> Result<Vec<Task>> {
    tids(root, pid)?
        .into_iter()
        .map(|tid| task(root, pid, tid))
        .filter(|task| !matches!(task, Err(error) if error.is_gone()))
        .collect()
}

/// The ids of all processes, kernel threads included.
///
/// # Errors
/// [`Error::Io`] if /proc cannot be listed.
pub fn pids(root: &Sysroot) -> Result<Vec<i32>> {
    Ok(root
        .names("proc")?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect())
}

/// The ids of all processes but kernel threads; of those too if the kernel does not list them.
///
/// # Errors
/// [`Error::Io`] if /proc cannot be read.
pub fn user_pids(root: &Sysroot) -> Result<Vec<i32>> {
    Ok(Processes::read(root)?.user_pids().collect())
}

/// All processes, of which kernel threads are known without a look at each.
#[derive(Debug)]
pub struct Processes {
    pids: Vec<i32>,
    /// Empty if the kernel does not list them.
    kthreads: BTreeSet<i32>,
}

impl Processes {
    /// Those that are there now.
    ///
    /// # Errors
    /// [`Error::Io`] if /proc cannot be read.
    pub fn read(root: &Sysroot) -> Result<Self> {
        let kthreads = kthread_pids(root)?.into_iter().flatten().collect();
        let pids = pids(root)?;
        Ok(Self { pids, kthreads })
    }

    /// Their ids, kernel threads included.
    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.pids.iter().copied()
    }

    /// Their ids, but those of kernel threads; of those too if the kernel does not list them.
    pub fn user_pids(&self) -> impl Iterator<Item = i32> {
        let is_user = |pid: &i32| !self.kthreads.contains(pid);
        self.pids.iter().copied().filter(is_user)
    }

    /// The ids of a process's threads. A kernel thread has only itself, and its folder is not listed.
    ///
    /// # Errors
    /// One that [is gone](Error::is_gone) if the process has ended.
    pub fn tids(&self, root: &Sysroot, pid: i32) -> Result<Vec<i32>> {
        if self.kthreads.contains(&pid) {
            return Ok(vec![pid]);
        }
        tids(root, pid)
    }
}

/// The ids of a process's threads.
fn tids(root: &Sysroot, pid: i32) -> Result<Vec<i32>> {
    let names = root.names(format!("proc/{pid}/task"))?;
    Ok(names.iter().filter_map(|tid| tid.parse().ok()).collect())
}

/// kthreadd and its children, by one read; `None` if the kernel has no CONFIG_PROC_CHILDREN.
fn kthread_pids(root: &Sysroot) -> Result<Option<Vec<i32>>> {
    match root.read(format!("proc/{KTHREADD}/task/{KTHREADD}/children")) {
        Ok(children) => {
            let children = children
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok());
            Ok(Some(std::iter::once(KTHREADD).chain(children).collect()))
        }
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// All kernel threads, kthreadd included. Those that end meanwhile are left out.
///
/// # Errors
/// [`Error::Io`] if /proc cannot be read, [`Error::Malformed`] if a line of it cannot be parsed.
pub fn kthreads(root: &Sysroot) -> Result<Vec<Task>> {
    kthreads_again(root, &BTreeMap::new())
}

/// As [`kthreads`], but takes threads in `known`, by pid, from there, without reading their files.
///
/// A pid that was reused since is mistaken for the earlier thread. Writes are safe, because they
/// compare start times.
///
/// # Errors
/// As [`kthreads`].
pub fn kthreads_again(root: &Sysroot, known: &BTreeMap<i32, Task>) -> Result<Vec<Task>> {
    let pids = match kthread_pids(root)? {
        Some(kthreads) => kthreads,
        None => pids(root)?,
    };
    let mut kthreads = Vec::with_capacity(pids.len());
    for pid in pids {
        if let Some(task) = known.get(&pid) {
            kthreads.push(task.clone());
            continue;
        }
        match root
            .read_record(format!("proc/{pid}/stat"))
            .and_then(|line| parse_stat(pid, &line))
        {
            Ok(task) if task.kernel => kthreads.push(task),
            Ok(_) => {}
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kthreads)
}

/// Checks that a thread id was not reused: the start time is the same.
///
/// # Errors
/// One that [is gone](Error::is_gone) if it was.
pub fn check_start(root: &Sysroot, task: &TaskId) -> Result<()> {
    let path = stat_path(task);
    if parse_stat(task.pid, &root.read_record(&path)?)?.id.start == task.start {
        Ok(())
    } else {
        Err(Error::io(
            root.path(path),
            "check the start time",
            io::Error::from_raw_os_error(nix::libc::ESRCH),
        ))
    }
}

/// Whether the thread is one that the kernel never lets user space move; no if it is gone.
pub(crate) fn is_bound(root: &Sysroot, task: &TaskId) -> bool {
    let line = root.read_record(stat_path(task));
    line.and_then(|line| parse_stat(task.pid, &line))
        .is_ok_and(|task| task.bound)
}

fn stat_path(task: &TaskId) -> String {
    if task.pid == task.tid {
        format!("proc/{}/stat", task.pid)
    } else {
        format!("proc/{}/task/{}/stat", task.pid, task.tid)
    }
}

/// The CPUs a thread may run on, those that are offline now among them: Cpus_allowed_list of
/// proc_pid_status(5).
///
/// sched_getaffinity(2) leaves the offline ones out, and a value saved from it would take them away
/// from the thread.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the thread has ended.
pub fn affinity(root: &Sysroot, task: &TaskId) -> Result<CpuSet> {
    read_affinity(root, task.pid, task.tid)
}

fn read_affinity(root: &Sysroot, pid: i32, tid: i32) -> Result<CpuSet> {
    let path = format!("proc/{pid}/task/{tid}/status");
    let status = root.read_record(&path)?;
    // It is among the last lines.
    let list = status
        .rsplit('\n')
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    cpu_list(
        &path,
        list.ok_or_else(|| Error::malformed(&path, "it has no Cpus_allowed_list line"))?,
    )
}

/// Reads which of some CPUs threads may run on. Nothing that is saved may come from here: see
/// [`affinity`].
///
/// sched_getaffinity(2) takes a tenth of the time of a status file, but knows online CPUs only. So
/// it is called if all the CPUs in question are online; a captured tree has only the files.
#[derive(Debug)]
pub struct Allowed<'a> {
    root: &'a Sysroot,
    cpus: CpuSet,
    by_call: bool,
}

impl<'a> Allowed<'a> {
    /// Prepares reads that concern these CPUs.
    ///
    /// # Errors
    /// If the list of online CPUs cannot be read.
    pub fn among(root: &'a Sysroot, cpus: &CpuSet) -> Result<Self> {
        let fits = cpus.last() < Some(nix::sched::CpuSet::count());
        let by_call = root.is_live() && fits && cpus.is_subset(&cpu::online(root)?);
        Ok(Self {
            root,
            cpus: cpus.clone(),
            by_call,
        })
    }

    /// Those of the CPUs that a thread may run on.
    ///
    /// # Errors
    /// One that [is gone](Error::is_gone) if the thread has ended.
    pub fn of(&self, pid: i32, tid: i32) -> Result<CpuSet> {
        match self.by_call(tid) {
            Some(cpus) => Ok(cpus),
            None => Ok(&read_affinity(self.root, pid, tid)? & &self.cpus),
        }
    }

    /// The same if one call answers it; `None` if only a file does.
    pub fn by_call(&self, tid: i32) -> Option<CpuSet> {
        if !self.by_call {
            return None;
        }
        // A host with more possible CPUs than nix's set returns EINVAL. For a thread that has
        // ended, the error comes from the file.
        let set = nix::sched::sched_getaffinity(Pid::from_raw(tid)).ok()?;
        let is_set = |cpu: &usize| set.is_set(*cpu).unwrap_or(false);
        Some(self.cpus.iter().filter(is_set).collect())
    }
}

/// Whether the kernel keeps what CPUs a thread has asked for, and gives it those of them that its
/// cgroup allows, whichever these are: Linux 6.2 or newer ("sched: Always preserve the user
/// requested cpumask"). Before, the next change of its cpuset drops a thread's own mask.
///
/// # Errors
/// If the kernel's release cannot be read.
pub fn keeps_requested_cpus(root: &Sysroot) -> Result<bool> {
    let path = "proc/sys/kernel/osrelease";
    let release = root.read_value(path)?.unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor) >= (6, 2)),
        _ => Err(Error::malformed(
            path,
            format!("`{release}` is not a kernel release"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(comm: &str, flags: u32) -> String {
        format!(
            "17 ({comm}) S 2 0 0 0 -1 {flags} 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 18446744073709551615 0 0 0 0 0 0 0 \
             2147483647 0 0 0 0 17 9 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
        )
    }

    #[test]
    fn stat_lines_with_hostile_names() {
        for name in [
            "kcompactd0",
            "a) b (c",
            ") S 2 0",
            "",
            "((",
            "kworker/u48:1-ev",
        ] {
            let task = parse_stat(17, &line(name, 0x0020_8040)).unwrap();
            assert_eq!(
                (task.name.as_str(), task.id.start, task.last_cpu),
                (name, 42, 9)
            );
            assert!(task.kernel && !task.bound);
        }
        assert!(
            parse_stat(17, &line("kworker/3:0", 0x0420_8060))
                .unwrap()
                .bound
        );
        assert!(!parse_stat(17, &line("bash", 0x0040_0000)).unwrap().kernel);
    }

    #[test]
    fn kernels_that_keep_what_a_thread_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let path = dir.path().join("proc/sys/kernel/osrelease");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        for (release, keeps) in [
            ("6.1.0-44-amd64", Some(false)),
            ("5.15.143-1-pve", Some(false)),
            ("6.2.16-3-pve", Some(true)),
            ("6.12.57+deb13-amd64", Some(true)),
            ("7.0-rc1", Some(true)),
            ("6", None),
            ("linux", None),
            ("", None),
        ] {
            std::fs::write(&path, release).unwrap();
            assert_eq!(keeps_requested_cpus(&root).ok(), keeps, "{release}");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        let fields = " 1".repeat(50);
        for text in [
            "",
            "\n",
            "17",
            "17 (bash",
            "17 (bash) S 2",
            ")",
            "x (y) z",
            &"(".repeat(5000),
            "17 (a) é",
        ] {
            assert!(parse_stat(17, text).is_err(), "{text:?}");
        }
        for name in [
            "(a)",
            ")(",
            "17 )",
            "é(a)",
            "17 (a)é",
            "17 (a",
            "17 (a)\u{3000}",
            "-17 (a)",
            " (a)",
            "17(a)",
        ] {
            let text = format!("{name}{fields}");
            assert!(parse_stat(17, &text).is_err(), "{text:?}");
            assert!(parse_stat(17, &format!("{text} (")).is_err(), "{text:?} (");
        }
    }

    proptest! {
        #[test]
        fn any_name_comes_through(name in "(?s).{0,20}|[() \n]{0,15}") {
            prop_assert_eq!(parse_stat(17, &line(&name, 0)).unwrap().name, name);
        }

        #[test]
        fn no_line_panics(line in "([0-9() é\n]|\\PC){0,120}( -?[0-9]{1,20}){0,55}[ )(]*") {
            let _ = parse_stat(17, &line);
        }
    }

    #[test]
    fn own_threads_are_read() {
        let root = Sysroot::default();
        let pid = std::process::id().cast_signed();
        let tasks = tasks(&root, pid).unwrap();
        let main = tasks.iter().find(|task| task.id.tid == pid).unwrap();
        assert!(check_start(&root, &main.id).is_ok());
        let own = affinity(&root, &main.id).unwrap();
        assert!(!own.is_empty());
        let online = cpu::online(&root).unwrap();
        let allowed = Allowed::among(&root, &online).unwrap();
        assert_eq!(allowed.by_call(pid).unwrap(), &own & &online);
        assert_eq!(allowed.of(pid, pid).unwrap(), &own & &online);
        // Where one of the CPUs is offline, only the file has it.
        let mut more = online.clone();
        more.insert(online.last().unwrap() + 1);
        assert_eq!(Allowed::among(&root, &more).unwrap().by_call(pid), None);
        assert!(allowed.of(i32::MAX, i32::MAX).unwrap_err().is_gone());
        let processes = Processes::read(&root).unwrap();
        assert!(processes.pids().any(|it| it == pid));
        assert!(processes.tids(&root, pid).unwrap().contains(&pid));
        let other = TaskId {
            start: main.id.start + 1,
            ..main.id
        };
        assert!(check_start(&root, &other).unwrap_err().is_gone());
    }
}

//! Threads and small files of the running kernel. The lab's own reader: its word must not hang on
//! the product's.

use std::fs;
use std::path::Path;

/// `PF_KTHREAD` of the kernel's `include/linux/sched.h`.
const KTHREAD: u32 = 0x0020_0000;
/// `PF_NO_SETAFFINITY` of the same.
const NO_SETAFFINITY: u32 = 0x0400_0000;

/// One thread.
#[derive(Debug, Clone)]
pub struct Thread {
    /// Its process.
    pub pid: i32,
    /// The thread itself.
    pub tid: i32,
    /// The process's parent.
    pub parent: i32,
    /// Its name.
    pub comm: String,
    /// It is the kernel's.
    pub kernel: bool,
    /// The kernel refuses another affinity for it.
    pub bound: bool,
    /// CPUs it may run on, its cpuset taken into account.
    pub cpus: String,
}

/// All present threads; those that end meanwhile are left out.
pub fn threads() -> Vec<Thread> {
    let mut pids = numbers("/proc");
    pids.sort_unstable();
    let mut threads = Vec::new();
    for pid in pids {
        let Some(leader) = thread(pid, pid) else {
            continue;
        };
        if leader.kernel {
            threads.push(leader);
            continue;
        }
        let mut tids = numbers(&format!("/proc/{pid}/task"));
        tids.sort_unstable();
        threads.extend(tids.into_iter().filter_map(|tid| thread(pid, tid)));
    }
    threads
}

fn thread(pid: i32, tid: i32) -> Option<Thread> {
    let stat = read(format!("/proc/{pid}/task/{tid}/stat"))?;
    let status = read(format!("/proc/{pid}/task/{tid}/status"))?;
    let (comm, parent, flags) = parse_stat(&stat)?;
    let cpus = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(Thread {
        pid,
        tid,
        parent,
        comm: comm.to_owned(),
        kernel: flags & KTHREAD != 0,
        bound: flags & NO_SETAFFINITY != 0,
        cpus: cpus.trim().to_owned(),
    })
}

/// A thread's scheduling policy and real-time priority, as the kernel numbers them.
pub fn policy(pid: i32, tid: i32) -> String {
    let stat = read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    parse_policy(&stat).unwrap_or_default()
}

fn parse_policy(stat: &str) -> Option<String> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(40 - 3);
    let priority = fields.next()?;
    Some(format!("{}:{priority}", fields.next()?))
}

/// Name, parent and flags; a name may contain anything, parentheses too, so the last one ends it.
fn parse_stat(stat: &str) -> Option<(&str, i32, u32)> {
    let (head, rest) = stat.rsplit_once(") ")?;
    let (_, comm) = head.split_once(" (")?;
    let mut fields = rest.split(' ');
    Some((
        comm,
        fields.nth(1)?.parse().ok()?,
        fields.nth(4)?.parse().ok()?,
    ))
}

/// The cgroup of a process, below the root of the unified hierarchy.
pub fn cgroup(pid: i32, tid: i32) -> String {
    let text = read(format!("/proc/{pid}/task/{tid}/cgroup")).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or_default()
        .to_owned()
}

/// A small file's text without the last newline, if it can be read.
pub fn read(path: impl AsRef<Path>) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// The names in a folder, in order; none if it is not there.
pub fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn numbers(folder: &str) -> Vec<i32> {
    names(folder)
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_with_hostile_names() {
        let line = |comm| format!("2 ({comm}) S 7 0 0 0 -1 2129984 0 0");
        for comm in ["kthreadd", "a) b (c", "", "CPU 3/KVM"] {
            assert_eq!(parse_stat(&line(comm)), Some((comm, 7, 2_129_984)));
        }
        for garbage in ["", "2", "2 (x)", "2 (x) S y", "2 (x) S 7 0"] {
            assert_eq!(parse_stat(garbage), None, "{garbage}");
        }
    }

    #[test]
    fn policies() {
        let line = format!("2 (a) b) S{} 1 2 0", " 0".repeat(36));
        assert_eq!(parse_policy(&line).as_deref(), Some("2:1"));
        assert_eq!(parse_policy("2 (x) S 7 0"), None);
    }

    #[test]
    fn we_are_among_the_threads() {
        let own = std::process::id().cast_signed();
        assert!(
            threads()
                .iter()
                .any(|thread| thread.tid == own && !thread.kernel && !thread.cpus.is_empty())
        );
    }
}

//! The cgroup v2 tree; see Documentation/admin-guide/cgroup-v2.rst.
//!
//! Cgroups are named by their path below the root, without a leading slash: `qemu.slice/100.scope`.

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sys::cpu;
use crate::sys::task::TaskId;
use crate::sysroot::{Sysroot, cpu_list};

/// The mount point of the unified hierarchy on every host with systemd.
const ROOT: &str = "sys/fs/cgroup";

/// The type of a cgroup of threads.
pub const THREADED: &str = "threaded";

/// A cgroup's folder, below the sysroot.
pub fn path(cgroup: &str) -> String {
    format!("{ROOT}/{}", cgroup.trim_start_matches('/'))
}

/// A file of a cgroup, below the sysroot.
pub fn file(cgroup: &str, name: &str) -> String {
    format!("{}/{name}", path(cgroup).trim_end_matches('/'))
}

/// Checks that the host has the unified hierarchy with the cpuset controller.
///
/// # Errors
/// [`Error::Unusable`] that names what is missing.
pub fn check_unified(root: &Sysroot) -> Result<()> {
    let controllers = file("", "cgroup.controllers");
    let why = match root.read_value(&controllers)? {
        Some(text) if text.split_whitespace().any(|name| name == "cpuset") => return Ok(()),
        Some(_) => "this kernel has no cpuset controller",
        None => {
            "no unified cgroup hierarchy (v2) here; boot without systemd.unified_cgroup_hierarchy=0"
        }
    };
    Err(Error::unusable(
        root.path(controllers).display().to_string(),
        why,
    ))
}

/// The children of a cgroup, sorted.
///
/// # Errors
/// If the cgroup cannot be listed.
pub fn children(root: &Sysroot, cgroup: &str) -> Result<Vec<String>> {
    let mut names = root.names(path(cgroup))?;
    names.retain(|name| root.path(file(cgroup, name)).is_dir());
    Ok(names)
}

/// The processes in a cgroup.
///
/// # Errors
/// If the cgroup cannot be read.
pub fn processes(root: &Sysroot, cgroup: &str) -> Result<Vec<i32>> {
    let procs = root.read(file(cgroup, "cgroup.procs"))?;
    Ok(procs
        .lines()
        .filter_map(|pid| pid.trim().parse().ok())
        .collect())
}

/// Reads the unified hierarchy's line of /proc/PID/cgroup: `0::/qemu.slice/100.scope`.
fn parse_proc_cgroup(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The cgroup a process is in, with its leading slash.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the process has ended.
pub fn of_process(root: &Sysroot, pid: i32) -> Result<String> {
    read_proc_cgroup(root, format!("proc/{pid}/cgroup"))
}

fn read_proc_cgroup(root: &Sysroot, path: String) -> Result<String> {
    let text = root.read(&path)?;
    let cgroup =
        parse_proc_cgroup(&text).ok_or_else(|| Error::malformed(&path, "it has no 0:: line"))?;
    Ok(cgroup.to_owned())
}

/// The cgroup a thread is in, with its leading slash.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the thread has ended.
pub(crate) fn of_thread(root: &Sysroot, task: &TaskId) -> Result<String> {
    read_proc_cgroup(root, format!("proc/{}/task/{}/cgroup", task.pid, task.tid))
}

/// The threads in a threaded cgroup, of whatever process.
///
/// # Errors
/// If the cgroup cannot be read.
pub fn threads(root: &Sysroot, cgroup: &str) -> Result<Vec<i32>> {
    let threads = root.read(file(cgroup, "cgroup.threads"))?;
    Ok(threads
        .lines()
        .filter_map(|tid| tid.trim().parse().ok())
        .collect())
}

/// A cgroup and those it is in, the top one first, without the root: `a`, `a/b`, `a/b/c`.
pub fn with_ancestors(cgroup: &str) -> impl Iterator<Item = &str> {
    let cgroup = cgroup.trim_start_matches('/');
    cgroup
        .match_indices('/')
        .map(|(end, _)| &cgroup[..end])
        .chain((!cgroup.is_empty()).then_some(cgroup))
}

/// The CPUs in isolated partitions now, those of the boot's isolcpus= too: cpuset.cpus.isolated of
/// the root cgroup. `None` if the kernel is older than 6.8, which has partitions only at the top.
///
/// # Errors
/// If the file cannot be read or understood.
pub fn isolated(root: &Sysroot) -> Result<Option<CpuSet>> {
    let path = file("", "cpuset.cpus.isolated");
    root.read_value(&path)?
        .map(|list| cpu_list(&path, &list))
        .transpose()
}

/// The CPUs of all partitions, isolated ones and others, of whatever cgroup.
///
/// # Errors
/// If the tree cannot be read.
pub fn partitioned(root: &Sysroot) -> Result<CpuSet> {
    let mut cpus = CpuSet::new();
    // A partition takes its CPUs from all cgroups above it. Read only where one has: there are
    // hundreds of cgroups.
    let path = file("", "cpuset.cpus.effective");
    let left = root.read_value(&path)?;
    if let Some(left) = left.map(|list| cpu_list(&path, &list)).transpose()?
        && cpu::online(root)?.is_subset(&left)
    {
        return Ok(cpus);
    }
    add_partitions(root, "", &mut cpus)?;
    Ok(cpus)
}

fn add_partitions(root: &Sysroot, parent: &str, cpus: &mut CpuSet) -> Result<()> {
    let names = match children(root, parent) {
        Err(error) if error.is_gone() => return Ok(()),
        names => names?,
    };
    for name in names {
        let cgroup = format!("{parent}/{name}");
        // Without the controller it has none, nor has what is in it.
        let Some(state) = root.read_value(file(&cgroup, "cpuset.cpus.partition"))? else {
            continue;
        };
        if ["root", "isolated"].contains(&state.as_str()) {
            // The first is there from Linux 6.7 on. What another partition within has is its own.
            for list in ["cpuset.cpus.exclusive.effective", "cpuset.cpus.effective"] {
                let path = file(&cgroup, list);
                if let Some(list) = root.read_value(&path)? {
                    *cpus = &*cpus | &cpu_list(&path, &list)?;
                }
            }
        }
        add_partitions(root, &cgroup, cpus)?;
    }
    Ok(())
}

/// Whether the children of a cgroup have the cpuset controller; `None` if the
/// cgroup does not exist.
pub(crate) fn has_child_cpusets(root: &Sysroot, cgroup: &str) -> Result<Option<bool>> {
    let enabled = root.read_value(file(cgroup, "cgroup.subtree_control"))?;
    Ok(enabled.map(|names| names.split_whitespace().any(|name| name == "cpuset")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_line() {
        assert_eq!(
            parse_proc_cgroup("0::/qemu.slice/100.scope\n"),
            Some("/qemu.slice/100.scope")
        );
        assert_eq!(parse_proc_cgroup("12:cpuset:/a\n0::/b\n"), Some("/b"));
        assert_eq!(parse_proc_cgroup("0::/"), Some("/"));
        assert_eq!(parse_proc_cgroup(""), None);
        assert_eq!(parse_proc_cgroup("1::/x"), None);
    }

    #[test]
    fn partitions_of_any_cgroup() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        for (name, content) in [
            ("a/cpuset.cpus.partition", "member\n"),
            ("a/b/cpuset.cpus.partition", "isolated\n"),
            ("a/b/cpuset.cpus.exclusive.effective", "3,15\n"),
            ("a/b/cpuset.cpus.effective", "3,15\n"),
            // Linux 6.1.
            ("c/cpuset.cpus.partition", "root\n"),
            ("c/cpuset.cpus.effective", "4\n"),
            (
                "d/cpuset.cpus.partition",
                "isolated invalid (Cpu list in cpuset.cpus not exclusive)\n",
            ),
            ("d/cpuset.cpus.effective", "0-23\n"),
            ("e/f/cpuset.cpus.partition", "isolated\n"),
            ("e/f/cpuset.cpus.effective", "5\n"),
        ] {
            let path = dir.path().join("sys/fs/cgroup").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let at_root = |content: &str| {
            let path = dir.path().join("sys/fs/cgroup/cpuset.cpus.effective");
            std::fs::write(path, content).unwrap();
        };
        let cpus = dir.path().join("sys/devices/system/cpu");
        std::fs::create_dir_all(&cpus).unwrap();
        std::fs::write(cpus.join("online"), "0-11,13-15\n").unwrap();
        assert_eq!(partitioned(&root).unwrap().to_string(), "3-4,15");
        at_root("0-2,5-14\n");
        assert_eq!(partitioned(&root).unwrap().to_string(), "3-4,15");
        // No cgroup is read where the root has lost none of the online CPUs.
        at_root("0-15\n");
        assert!(partitioned(&root).unwrap().is_empty());
    }

    #[test]
    fn a_cgroup_and_what_it_is_in() {
        assert_eq!(
            with_ancestors("/a/b/c").collect::<Vec<_>>(),
            ["a", "a/b", "a/b/c"]
        );
        assert_eq!(with_ancestors("a").collect::<Vec<_>>(), ["a"]);
        assert_eq!(with_ancestors("/").count(), 0);
    }

    #[test]
    fn paths() {
        assert_eq!(
            path("/qemu.slice/100.scope"),
            "sys/fs/cgroup/qemu.slice/100.scope"
        );
        assert_eq!(
            file("", "cgroup.controllers"),
            "sys/fs/cgroup/cgroup.controllers"
        );
        assert_eq!(file("/", "cgroup.procs"), "sys/fs/cgroup/cgroup.procs");
    }
}

//! Writes to the cgroup tree.

use std::fs;
use std::io;

use super::file;
use crate::cpuset::CpuSet;
use crate::error::into_io;
use crate::sys::cgroup::{self, THREADED};
use crate::sys::cpu;
use crate::sysroot::Sysroot;

/// Sets cpuset.cpus. The kernel clears it only for a cgroup without processes (ENOSPC): one with
/// processes gets all CPUs instead, which has the same effect until the controller is disabled. Not
/// those of partitions, which a sibling with their CPUs would end.
pub(super) fn set_cpus(root: &Sysroot, cgroup: &str, cpus: &CpuSet) -> io::Result<()> {
    let path = cgroup::file(cgroup, "cpuset.cpus");
    if !cpus.is_empty() {
        return file::write(root, path, &cpus.to_string());
    }
    // An empty write (no byte) would not reach the kernel.
    match file::write(root, &path, "\n") {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOSPC) => {
            let all = cpu::present(root).map_err(into_io)?;
            let shared = &all - &cgroup::partitioned(root).map_err(into_io)?;
            let cpus = if shared.is_empty() { all } else { shared };
            file::write(root, path, &cpus.to_string())
        }
        // Without the controller there is nothing to clear.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes a cgroup or removes it; one that is already as wanted is not an error.
pub(super) fn make_or_remove(root: &Sysroot, cgroup: &str, make: bool) -> io::Result<()> {
    let path = root.path(cgroup::path(cgroup));
    let (done, already) = if make {
        (fs::create_dir(path), io::ErrorKind::AlreadyExists)
    } else {
        (fs::remove_dir(path), io::ErrorKind::NotFound)
    };
    match done {
        Err(error) if error.kind() == already => Ok(()),
        other => other,
    }
}

/// Makes a cgroup for threads, or removes it.
pub(super) fn make_threaded_or_remove(root: &Sysroot, cgroup: &str, make: bool) -> io::Result<()> {
    make_or_remove(root, cgroup, make)?;
    if make {
        file::write(root, cgroup::file(cgroup, "cgroup.type"), THREADED)
    } else {
        Ok(())
    }
}

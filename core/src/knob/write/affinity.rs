//! Thread affinities, by sched_setaffinity(2).

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::answer::Answer;
use crate::cpuset::CpuSet;
use crate::error::into_io;
use crate::sys::cpu;
use crate::sys::task::{self, TaskId};
use crate::sysroot::Sysroot;

/// Pins a kernel thread. No cpuset applies to it, so nothing has to be read back.
pub(super) fn pin_kthread(root: &Sysroot, task: &TaskId, cpus: &CpuSet) -> io::Result<Answer> {
    match set_affinity(root, task, cpus)? {
        Some(refused) => Ok(refused),
        None => Ok(Answer::Taken(None)),
    }
}

/// Pins a user thread. Its cpuset may remove CPUs from the mask, those that are offline until they
/// come online.
pub(super) fn pin_thread(root: &Sysroot, task: &TaskId, cpus: &CpuSet) -> io::Result<Answer> {
    if let Some(refused) = set_affinity(root, task, cpus)? {
        return Ok(refused);
    }
    let kept = task::affinity(root, task).map_err(into_io)?;
    let is_whole = kept == *cpus || kept == cpus & &cpu::online(root).map_err(into_io)?;
    Ok(Answer::Taken((!is_whole).then(|| kept.to_string())))
}

/// Sets a thread's mask, unless the kernel never lets user space move it.
fn set_affinity(root: &Sysroot, task: &TaskId, cpus: &CpuSet) -> io::Result<Option<Answer>> {
    if !root.is_live() {
        return Err(io::Error::other(
            "threads can be pinned on the running host only, not under --sysroot",
        ));
    }
    task::check_start(root, task).map_err(into_io)?;
    match nix::sched::sched_setaffinity(Pid::from_raw(task.tid), &to_nix(cpus)?) {
        // The thread's flag shows whether the kernel ever moves it; without the flag EINVAL is
        // about the CPUs.
        Err(Errno::EINVAL) if task::is_bound(root, task) => Ok(Some(Answer::Refused(
            "the kernel binds this thread itself".into(),
        ))),
        Err(errno) => Err(errno.into()),
        Ok(()) => Ok(None),
    }
}

/// The set as sched_setaffinity(2) takes it.
///
/// # Errors
/// If a CPU does not fit into the nix crate's set of 1024 CPUs.
fn to_nix(cpus: &CpuSet) -> io::Result<nix::sched::CpuSet> {
    let mut set = nix::sched::CpuSet::new();
    for cpu in cpus.iter() {
        set.set(cpu).map_err(|_| {
            let last = nix::sched::CpuSet::count() - 1;
            io::Error::other(format!(
                "CPU {cpu} is beyond {last}, the last that threads can be pinned to"
            ))
        })?;
    }
    Ok(set)
}

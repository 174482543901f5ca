//! Finds the QEMU of a VM.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt;

use super::id::VmId;
use super::proxmox::conf::check_exists;
use super::proxmox::paths;
use super::{cmdline, guest_topology, qmp};
use crate::error::{Error, Result};
use crate::sys::task::{self, TaskId};
use crate::sysroot::Sysroot;

/// A running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// Pid plus start time, so that a reused pid is not mistaken for it.
    pub id: TaskId,
    /// Its VM, if Proxmox VE started it.
    pub vmid: Option<VmId>,
    /// The path of its QMP socket, on the host, if it has one.
    pub monitor: Option<String>,
    /// The threads of each core of its guest.
    pub threads_per_core: usize,
    /// What it reported when it was first queried; an answer takes it a while.
    pub(super) qmp_info: OnceCell<qmp::ThreadRoles>,
}

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vmid {
            Some(vmid) => write!(f, "VM {vmid}"),
            None => write!(f, "QEMU {}", self.id.pid),
        }
    }
}

impl Qemu {
    /// A process that stands for a QEMU, with no monitor: its threads stand for the vCPUs of these
    /// numbers, by thread id, and all others for emulator threads.
    pub fn stand_in(id: TaskId, vcpus: BTreeMap<i32, usize>) -> Self {
        Self {
            id,
            vmid: None,
            monitor: None,
            threads_per_core: 1,
            qmp_info: OnceCell::from(qmp::ThreadRoles {
                vcpus,
                ..qmp::ThreadRoles::default()
            }),
        }
    }
}

/// Whether a VM runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It does.
    Running(Qemu),
    /// It does not, for this reason: no pid file, or a stale one.
    Stopped(String),
}

/// Checks whether a VM runs, as Proxmox VE does (`PVE::QemuServer::Helpers::vm_running_locally`):
/// the process that the pid file names must be a QEMU that was started with that pid file.
///
/// # Errors
/// If /run or /proc cannot be read.
pub fn status(root: &Sysroot, vmid: VmId) -> Result<Status> {
    let file = paths::pid_file(vmid);
    let shown = root.path(&file).display().to_string();
    let stale = |why: String| Ok(Status::Stopped(format!("{shown} is stale: {why}")));
    let text = match root.read_value(&file) {
        // QEMU makes it readable for root only; other users can find the process by its command
        // line.
        Err(error) if error.is_denied() => return by_pid_file(root, vmid, &file, error),
        other => other?,
    };
    let Some(text) = text else {
        return Ok(Status::Stopped(format!("there is no {shown}")));
    };
    let Some(pid) = text.parse::<i32>().ok().filter(|pid| *pid > 0) else {
        return stale(format!("{text:?} is not a process id"));
    };
    let Some((id, args)) = process_with_args(root, pid)? else {
        return stale(format!("process {pid} is gone"));
    };
    if !cmdline::is_qemu(&args) {
        let program = args.first().map_or("a kernel thread", String::as_str);
        return stale(format!("process {pid} is {program}, not QEMU"));
    }
    if !cmdline::options(&args, "pidfile").any(|path| cmdline::in_run(path) == file) {
        return stale(format!("process {pid} is another QEMU"));
    }
    Ok(Status::Running(of_vm(vmid, id, &args)))
}

/// Looks through all processes for the QEMU that was started with this pid file.
fn by_pid_file(root: &Sysroot, vmid: VmId, file: &str, denied: Error) -> Result<Status> {
    for pid in task::pids(root)? {
        if let Some((id, args)) = process_with_args(root, pid)?
            && cmdline::is_qemu(&args)
            && cmdline::options(&args, "pidfile").any(|path| cmdline::in_run(path) == file)
        {
            return Ok(Status::Running(of_vm(vmid, id, &args)));
        }
    }
    Ok(Status::Stopped(denied.to_string()))
}

fn of_vm(vmid: VmId, id: TaskId, args: &[String]) -> Qemu {
    Qemu {
        id,
        vmid: Some(vmid),
        monitor: Some(cmdline::monitor(args).unwrap_or_else(|| paths::monitor(vmid))),
        threads_per_core: guest_topology::threads_per_core(cmdline::options(args, "smp")),
        qmp_info: OnceCell::new(),
    }
}

/// A VM's QEMU; `None` if it does not run.
///
/// # Errors
/// As [`status`].
pub fn find(root: &Sysroot, vmid: VmId) -> Result<Option<Qemu>> {
    Ok(match status(root, vmid)? {
        Status::Running(qemu) => Some(qemu),
        Status::Stopped(_) => None,
    })
}

/// The QEMU of a VM that must run.
///
/// # Errors
/// [`Error::Unusable`] that names the reason if it does not: a container, no such VM, no pid file,
/// a stale one.
pub fn require_running(root: &Sysroot, vmid: VmId) -> Result<Qemu> {
    match status(root, vmid)? {
        Status::Running(qemu) => Ok(qemu),
        Status::Stopped(why) => {
            check_exists(root, vmid)?;
            let why = format!("not running: {why}; qm start {vmid} starts it");
            Err(Error::unusable(format!("VM {vmid}"), why))
        }
    }
}

/// The QEMU with a process id, whoever started it.
///
/// # Errors
/// [`Error::Unusable`] if the process does not exist, or is not a QEMU.
pub fn by_pid(root: &Sysroot, pid: i32) -> Result<Qemu> {
    let unusable = |why: String| Error::unusable(format!("process {pid}"), why);
    let Some((id, args)) = process_with_args(root, pid)? else {
        return Err(unusable("no such process".into()));
    };
    if !cmdline::is_qemu(&args) {
        return Err(unusable(format!(
            "it is {}, not QEMU",
            args.first().map_or("a kernel thread", String::as_str)
        )));
    }
    Ok(Qemu {
        id,
        vmid: None,
        monitor: cmdline::monitor(&args),
        threads_per_core: guest_topology::threads_per_core(cmdline::options(&args, "smp")),
        qmp_info: OnceCell::new(),
    })
}

/// A process and its arguments; `None` if it is gone.
fn process_with_args(root: &Sysroot, pid: i32) -> Result<Option<(TaskId, Vec<String>)>> {
    let read = || -> Result<_> {
        let main = task::task(root, pid, pid)?;
        Ok((
            main.id,
            cmdline::parse_cmdline(&root.read(format!("proc/{pid}/cmdline"))?),
        ))
    };
    match read() {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::fixture::host;
    use crate::vm::threads;
    use std::fs;
    use std::time::Duration;

    fn id(number: u32) -> VmId {
        number.try_into().unwrap()
    }

    #[test]
    fn a_vm_is_found_and_its_threads_have_roles() {
        let (_dir, root) = host();
        let qemu = require_running(&root, id(100)).unwrap();
        assert_eq!(
            (qemu.id.pid, qemu.id.start, qemu.threads_per_core),
            (4711, 42, 2)
        );
        assert_eq!(qemu.monitor.as_deref(), Some("/run/qemu-server/100.qmp"));
        let found = threads(&root, &qemu, Duration::ZERO).unwrap();
        let shown: Vec<_> = found
            .threads
            .iter()
            .map(|thread| format!("{} {} {}", thread.id.tid, thread.role, thread.allowed))
            .collect();
        assert_eq!(
            shown,
            ["4711 emulator 0-5", "4712 vCPU 0 6", "4713 vCPU 1 0-23"]
        );
        assert_eq!(found.vcpus().to_string(), "0-1");
        assert_eq!(
            found.notes,
            [
                "VM 100: its monitor is not queried under --sysroot; using thread names from /proc instead"
            ]
        );
        let other = by_pid(&root, 4711).unwrap();
        assert_eq!(
            (other.id, other.to_string().as_str()),
            (qemu.id, "QEMU 4711")
        );
    }

    #[test]
    fn a_stopped_vm_has_a_reason() {
        let (dir, root) = host();
        let run = dir.path().join("run/qemu-server");
        let shown = run.join("102.pid").display().to_string();
        let why = |pid_file: &str| {
            fs::write(run.join("102.pid"), pid_file).unwrap();
            assert_eq!(find(&root, id(102)).unwrap(), None);
            require_running(&root, id(102)).unwrap_err().to_string()
        };
        for (text, reason) in [
            ("900\n", "process 900 is /bin/bash, not QEMU"),
            ("4711", "process 4711 is another QEMU"),
            ("5555\n", "process 5555 is gone"),
            ("", "\"\" is not a process id"),
            ("-1\n", "\"-1\" is not a process id"),
            ("../1\n", "\"../1\" is not a process id"),
        ] {
            assert_eq!(
                why(text),
                format!("VM 102: not running: {shown} is stale: {reason}; qm start 102 starts it")
            );
        }
        fs::remove_file(run.join("102.pid")).unwrap();
        assert_eq!(
            require_running(&root, id(102)).unwrap_err().to_string(),
            format!("VM 102: not running: there is no {shown}; qm start 102 starts it")
        );
        assert_eq!(
            require_running(&root, id(101)).unwrap_err().to_string(),
            "101: it is a container; only VMs have a QEMU"
        );
        assert_eq!(
            require_running(&root, id(103)).unwrap_err().to_string(),
            format!(
                "VM 103: no such VM on this node: there is no {}",
                dir.path().join("etc/pve/qemu-server/103.conf").display()
            )
        );
        assert_eq!(
            by_pid(&root, 900).unwrap_err().to_string(),
            "process 900: it is /bin/bash, not QEMU"
        );
        assert_eq!(
            by_pid(&root, 5555).unwrap_err().to_string(),
            "process 5555: no such process"
        );
    }

    #[test]
    fn without_the_pid_file_the_process_is_found() {
        let (_dir, root) = host();
        let denied = || {
            Error::io(
                "/run/qemu-server/100.pid",
                "read",
                std::io::ErrorKind::PermissionDenied.into(),
            )
        };
        let found = by_pid_file(&root, id(100), &paths::pid_file(id(100)), denied()).unwrap();
        assert_eq!(found, status(&root, id(100)).unwrap());
        let none = by_pid_file(&root, id(102), &paths::pid_file(id(102)), denied()).unwrap();
        assert_eq!(
            none,
            Status::Stopped("/run/qemu-server/100.pid: read: permission denied".into())
        );
    }
}

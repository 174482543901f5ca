//! The threads of a QEMU and their roles.

use std::fmt;
use std::time::Duration;

use super::qemu::Qemu;
use super::qmp;
use crate::cpuset::{CpuSet, MAX_CPU};
use crate::error::Result;
use crate::sys::task::{self, Task, TaskId};
use crate::sysroot::Sysroot;

/// What a thread of QEMU is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It runs the vCPU of this number.
    Vcpu(usize),
    /// It does the disks' work, by the iothread's id.
    Iothread(String),
    /// Anything else: the main loop, workers, vhost.
    Emulator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(number) => write!(f, "vCPU {number}"),
            Self::Iothread(id) => write!(f, "iothread {id}"),
            Self::Emulator => write!(f, "emulator"),
        }
    }
}

/// A thread of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuThread {
    /// The thread.
    pub id: TaskId,
    /// What it is for.
    pub role: Role,
    /// Its name, 15 bytes at most.
    pub name: String,
    /// The CPUs it may run on.
    pub allowed: CpuSet,
    /// The CPU it ran on last.
    pub last_cpu: usize,
}

/// The threads of a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Threads {
    /// In the order of their ids.
    pub threads: Vec<QemuThread>,
    /// The state of the guest (`running`, `prelaunch`, …), if QEMU reported it.
    pub status: Option<String>,
    /// Remarks for the user: that QEMU could not be asked, and roles are from the threads' names.
    pub notes: Vec<String>,
}

impl Threads {
    /// The numbers of the vCPUs, as a list for people: `0-11`.
    pub fn vcpus(&self) -> CpuSet {
        let number = |thread: &QemuThread| {
            if let Role::Vcpu(number) = thread.role {
                Some(number)
            } else {
                None
            }
        };
        self.threads.iter().filter_map(number).collect()
    }
}

/// The threads of a QEMU with their roles; those that end meanwhile are left out.
///
/// QEMU is asked which thread is which, for at most `budget`; its answer is kept in this [`Qemu`].
/// If it does not answer, vCPUs are found by name; most iothreads are emulator threads then,
/// because the kernel truncates names of over 15 bytes.
///
/// # Errors
/// One that [is gone](crate::Error::is_gone) if QEMU has ended.
pub fn threads(root: &Sysroot, qemu: &Qemu, budget: Duration) -> Result<Threads> {
    let facts = match (qemu.qmp_info.get(), &qemu.monitor) {
        (Some(facts), _) => Ok(facts),
        (None, Some(path)) if root.is_live() => qmp::query(&root.path(path), budget)
            .map(|facts| qemu.qmp_info.get_or_init(|| facts))
            .map_err(|error| error.to_string()),
        (None, Some(_)) => Err("its monitor is not queried under --sysroot".into()),
        (None, None) => Err("it has no QMP monitor".into()),
    };
    task::check_start(root, &qemu.id)?;
    let found = task::tasks(root, qemu.id.pid)?;
    let facts = facts.and_then(|facts| {
        // A QEMU in a container's pid namespace reports ids of other threads on this host.
        let known = facts.vcpus.is_empty()
            || found
                .iter()
                .any(|task| facts.vcpus.contains_key(&task.id.tid));
        if known {
            Ok(facts)
        } else {
            Err("its monitor reports threads of another process".into())
        }
    });
    let role = |task: &Task| match &facts {
        Ok(facts) => role_by_facts(facts, task.id.tid),
        Err(_) => role_by_name(&task.name),
    };
    let mut threads = Vec::with_capacity(found.len());
    for task in found {
        match task::affinity(root, &task.id) {
            Ok(allowed) => {
                threads.push(QemuThread {
                    id: task.id,
                    role: role(&task),
                    name: task.name,
                    allowed,
                    last_cpu: task.last_cpu,
                });
            }
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    let (status, notes) = match facts {
        Ok(facts) => (Some(facts.status.clone()), Vec::new()),
        Err(why) => (
            None,
            vec![format!(
                "{qemu}: {why}; using thread names from /proc instead"
            )],
        ),
    };
    Ok(Threads {
        threads,
        status,
        notes,
    })
}

fn role_by_facts(facts: &qmp::ThreadRoles, tid: i32) -> Role {
    match (facts.vcpus.get(&tid), facts.iothreads.get(&tid)) {
        (Some(number), _) => Role::Vcpu(*number),
        (None, Some(id)) => Role::Iothread(id.clone()),
        (None, None) => Role::Emulator,
    }
}

/// The role of a thread by the name that QEMU gives it: `CPU 3/KVM`, `IO io1`. Names cost QEMU's
/// monitor nothing.
pub fn role_by_name(name: &str) -> Role {
    let number = || {
        let digits = name
            .strip_prefix("CPU ")?
            .strip_suffix("/KVM")
            .or_else(|| name.strip_prefix("CPU ")?.strip_suffix("/TCG"))?;
        let number = digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())?;
        // Anybody may name a thread so, and the numbers become a set.
        number.filter(|number| *number <= MAX_CPU)
    };
    // QEMU's own iothread for the monitor, which QMP does not list either.
    let id = name.strip_prefix("IO ").filter(|id| *id != "mon_iothread");
    match (number(), id) {
        (Some(number), _) => Role::Vcpu(number),
        (None, Some(id)) => Role::Iothread(id.to_owned()),
        (None, None) => Role::Emulator,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_by_name() {
        for (name, role) in [
            ("CPU 0/KVM", Role::Vcpu(0)),
            ("CPU 11/TCG", Role::Vcpu(11)),
            ("IO io1", Role::Iothread("io1".into())),
            ("kvm", Role::Emulator),
            ("IO mon_iothread", Role::Emulator),
            ("vhost-1234", Role::Emulator),
            ("", Role::Emulator),
            ("CPU /KVM", Role::Emulator),
            ("CPU +1/KVM", Role::Emulator),
            ("CPU 1/KVM) S", Role::Emulator),
            ("ALL CPUs/TCG", Role::Emulator),
            ("CPU 99999999999999999999/KVM", Role::Emulator),
        ] {
            assert_eq!(role_by_name(name), role, "{name:?}");
        }
    }
}

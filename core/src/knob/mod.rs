//! The knobs: every kernel value that Pinfold may set, with the one code that reads and the one
//! that writes each.
//!
//! A knob's value is text in one canonical form (CPU sets as lists, whatever the file wants), so
//! that found, wanted and saved values compare as they stand.

pub(crate) mod change;

use std::fmt;
use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sys::{cgroup, cpu, irq, task};
use crate::sysroot::Sysroot;
use crate::systemd;

/// A process or thread that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId {
    /// The process (thread group) id.
    pub pid: i32,
    /// The thread id; equal to `pid` for a process's first thread and for kernel threads.
    pub tid: i32,
    /// Start time in clock ticks since boot: field 22 of /proc/PID/task/TID/stat, see
    /// proc_pid_stat(5).
    pub start: u64,
}

/// One settable value of the kernel or of systemd.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Knob {
    /// An IRQ's CPUs: /proc/irq/N/smp_affinity_list (Documentation/core-api/irq/irq-affinity.rst).
    Irq(u32),
    /// The CPUs that new IRQs start with: /proc/irq/default_smp_affinity.
    DefaultIrq,
    /// The CPUs of all unbound workqueues: /sys/devices/virtual/workqueue/cpumask
    /// (core-api/workqueue.rst).
    Workqueues,
    /// A kernel thread's CPUs, by sched_setaffinity(2).
    Kthread(TaskId),
    /// A user thread's CPUs, by sched_setaffinity(2).
    Thread(TaskId),
    /// `1` where the CPU is online, `0` where not: /sys/devices/system/cpu/cpuN/online
    /// (core-api/cpu_hotplug.rst).
    CpuOnline(usize),
    /// A cpufreq policy's governor, by the policy's folder name, `policy6`
    /// (admin-guide/pm/cpufreq.rst).
    Governor(String),
    /// A systemd unit's AllowedCPUs=, empty where unset; see systemd.resource-control(5). Set at
    /// run time only.
    UnitCpus(String),
    /// The units whose AllowedCPUs= is overridden until the next boot, by name with spaces between:
    /// what `systemctl set-property --runtime` leaves below /run/systemd. Taking a unit out removes
    /// its override.
    UnitOverrides,
    /// cpuset.cpus of a cgroup that is no systemd unit, by its path below the cgroup root
    /// (cgroup-v2.rst).
    CgroupCpus(String),
    /// A cgroup folder: `present` or `absent`.
    Cgroup(String),
    /// The cgroup a process is in, as in /proc/PID/cgroup: `/qemu.slice/100.scope`.
    CgroupOf(TaskId),
    /// The cgroup a thread is in, within the threaded cgroups of its process (cgroup-v2.rst,
    /// "Threads").
    CgroupOfThread(TaskId),
    /// A cgroup that holds threads, not processes: `threaded`, `absent`, or another type as in
    /// cgroup.type. Made and removed as a whole, since a threaded cgroup stays one.
    ThreadedCgroup(String),
    /// Whether the children of a cgroup have the cpuset controller: `present` or `absent` in
    /// cgroup.subtree_control. The root cgroup is the empty path.
    ChildCpusets(String),
    /// cpuset.cpus.exclusive of a cgroup: the CPUs that it may give to a partition below
    /// (cgroup-v2.rst).
    ExclusiveCpus(String),
    /// cpuset.cpus.partition of a cgroup: `member`, `root` or `isolated`, with ` invalid (why)`
    /// where the kernel cannot.
    Partition(String),
    /// Whether hook has systemd delegate the cpuset controller to a scope that is yet to be made:
    /// `present` or `absent`.
    Delegation(String),
    /// A sysctl by its path below /proc/sys: `vm/stat_interval`.
    Sysctl(String),
    /// `1` written to a file below /proc/sys that does something and holds no state:
    /// `vm/compact_memory`.
    Trigger(String),
    /// A PCI function, by its full address: `present`, or `absent` (removed until a rescan).
    PciFunction(String),
    /// The name of the driver a PCI function is bound to, `none` where there is none.
    PciDriver(String),
}

/// The value of a folder or device that is there.
pub const PRESENT: &str = "present";
/// The value of a folder or device that is not there.
pub const ABSENT: &str = "absent";
/// The value of a drop-in that is not there, but its folder is.
const EMPTIED: &str = "emptied";
/// The driver of a PCI function that is bound to none.
pub const NO_DRIVER: &str = "none";

/// Where the unbound workqueues' mask stands.
const WORKQUEUE_MASK: &str = "sys/devices/virtual/workqueue/cpumask";
/// Where the default IRQ mask stands.
const DEFAULT_IRQ_MASK: &str = "proc/irq/default_smp_affinity";

/// Why an IRQ stays where it is.
const HELD_IRQ: &str = "the kernel does not let user space move this IRQ";

/// How the kernel or systemd answered a write.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Taken; what reads back, where it was read.
    Taken(Option<String>),
    /// Never allowed for this object, for the reason given.
    Refused(String),
}

impl Knob {
    /// What the knob holds now in canonical form; `None` where the object is not there (any more).
    ///
    /// # Errors
    /// Any [`Error`] but one that says that the object is gone.
    pub fn read(&self, root: &Sysroot) -> Result<Option<String>> {
        let found = match self {
            Self::Irq(_)
            | Self::CpuOnline(_)
            | Self::Governor(_)
            | Self::Sysctl(_)
            | Self::Partition(_) => {
                return root.read_value(self.file());
            }
            // Without the controller there is no file, which is as good as an empty one.
            Self::CgroupCpus(path) | Self::ExclusiveCpus(path) => {
                match root.read_value(self.file()) {
                    Ok(Some(text)) => {
                        cpu_list(&self.file(), &text).map(|cpus| Some(cpus.to_string()))
                    }
                    Ok(None) => Ok(root.exists(cgroup::path(path)).then(String::new)),
                    Err(error) => Err(error),
                }
            }
            Self::DefaultIrq | Self::Workqueues => root.read_value(self.file()).and_then(|mask| {
                mask.map(|mask| match CpuSet::from_mask(&mask) {
                    Ok(cpus) => Ok(cpus.to_string()),
                    Err(source) => Err(Error::Cpus {
                        object: self.file(),
                        source,
                    }),
                })
                .transpose()
            }),
            Self::Kthread(task) | Self::Thread(task) => task::check_start(root, task)
                .and_then(|()| task::affinity(root, task))
                .map(|cpus| Some(cpus.to_string())),
            Self::UnitCpus(unit) => systemd::allowed_cpus(root, unit),
            Self::UnitOverrides => systemd::overrides(root).map(|units| Some(units.join(" "))),
            Self::Cgroup(path) => Ok(Some(presence(root.exists(cgroup::path(path))))),
            Self::CgroupOf(task) => task::check_start(root, task)
                .and_then(|()| cgroup::of_process(root, task.pid))
                .map(Some),
            Self::CgroupOfThread(task) => task::check_start(root, task)
                .and_then(|()| cgroup::of_thread(root, task))
                .map(Some),
            Self::ThreadedCgroup(path) => match root.exists(cgroup::path(path)) {
                true => root.read_value(cgroup::file(path, "cgroup.type")),
                false => Ok(Some(ABSENT.into())),
            },
            Self::ChildCpusets(path) => {
                cgroup::has_child_cpusets(root, path).map(|has| has.map(presence))
            }
            Self::Delegation(scope) => Ok(Some(
                systemd::is_to_delegate(root, scope).map_or_else(|| EMPTIED.into(), presence),
            )),
            Self::Trigger(_) => Ok(Some(String::new())),
            Self::PciFunction(address) => Ok(Some(presence(root.exists(pci_path(address, ""))))),
            Self::PciDriver(address) => Ok(root.exists(pci_path(address, "")).then(|| {
                root.link_name(pci_path(address, "driver"))
                    .unwrap_or_else(|| NO_DRIVER.into())
            })),
        };
        match found {
            Err(error) if error.is_gone() => Ok(None),
            other => other,
        }
    }

    /// Sets the knob. [`crate::apply()`] is the one caller.
    pub(crate) fn write(&self, root: &Sysroot, value: &str) -> io::Result<Answer> {
        let taken = |()| Answer::Taken(None);
        match self {
            Self::Irq(_) => match root.write_and_read_back(self.file(), value) {
                // Managed queues and timers answer EIO; since Linux 6.13 EPERM (kernel/irq/proc.c).
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(nix::libc::EIO | nix::libc::EPERM)
                    ) =>
                {
                    Ok(Answer::Refused(HELD_IRQ.into()))
                }
                other => other.map(|found| Answer::Taken(Some(found))),
            },
            Self::CpuOnline(_) | Self::Governor(_) | Self::Sysctl(_) | Self::Partition(_) => root
                .write_and_read_back(self.file(), value)
                .map(|found| Answer::Taken(Some(found))),
            Self::CgroupCpus(path) => cgroup::set_cpus(root, path, value).map(taken),
            // An empty write (no byte) would not reach the kernel.
            Self::ExclusiveCpus(_) => root
                .write(self.file(), if value.is_empty() { "\n" } else { value })
                .map(taken),
            Self::DefaultIrq | Self::Workqueues => {
                let mask = CpuSet::from_kernel_list(value)
                    .map_err(io::Error::other)?
                    .to_mask();
                root.write(self.file(), &mask).map(taken)
            }
            Self::Kthread(task) | Self::Thread(task) => self.pin(root, task, value),
            Self::UnitCpus(unit) => systemd::set_allowed_cpus(root, unit, value).map(taken),
            Self::UnitOverrides => systemd::keep_overrides(root, value).map(taken),
            Self::Cgroup(path) => cgroup::make_or_remove(root, path, value == PRESENT).map(taken),
            Self::CgroupOf(task) => {
                task::check_start(root, task).map_err(into_io)?;
                cgroup::move_process(root, task, value).map(taken)
            }
            Self::CgroupOfThread(task) => {
                task::check_start(root, task).map_err(into_io)?;
                root.write(cgroup::file(value, "cgroup.threads"), &task.tid.to_string())
                    .map(taken)
            }
            Self::ThreadedCgroup(path) => {
                cgroup::make_threaded_or_remove(root, path, value != ABSENT).map(taken)
            }
            Self::ChildCpusets(path) => {
                let sign = if value == PRESENT { '+' } else { '-' };
                root.write(
                    cgroup::file(path, "cgroup.subtree_control"),
                    &format!("{sign}cpuset"),
                )
                .map(taken)
            }
            Self::Delegation(scope) => systemd::delegate(root, scope, value == PRESENT).map(taken),
            Self::Trigger(_) => root.write(self.file(), value).map(taken),
            Self::PciFunction(address) if value == ABSENT => {
                root.write(pci_path(address, "remove"), "1").map(taken)
            }
            Self::PciFunction(_) => root.write("sys/bus/pci/rescan", "1").map(taken),
            Self::PciDriver(address) => {
                if root.exists(pci_path(address, "driver")) {
                    root.write(pci_path(address, "driver/unbind"), address)?;
                }
                if value != NO_DRIVER {
                    root.write(format!("sys/bus/pci/drivers/{value}/bind"), address)?;
                }
                Ok(taken(()))
            }
        }
    }

    /// Why the kernel would refuse a write, where that is known without trying.
    pub(crate) fn known_refusal(&self, root: &Sysroot) -> Option<String> {
        let held =
            matches!(self, Self::Irq(number) if irq::is_held(root, *number).unwrap_or(false));
        held.then(|| HELD_IRQ.into())
    }

    fn pin(&self, root: &Sysroot, task: &TaskId, value: &str) -> io::Result<Answer> {
        if !root.is_live() {
            return Err(io::Error::other(
                "threads can be pinned on the running host only, not under --sysroot",
            ));
        }
        let cpus = CpuSet::from_kernel_list(value).map_err(io::Error::other)?;
        task::check_start(root, task).map_err(into_io)?;
        let tid = Pid::from_raw(task.tid);
        match nix::sched::sched_setaffinity(tid, &task::to_nix(&cpus)?) {
            // The kernel's list of those it never moves is the flag; without it EINVAL is about the
            // CPUs.
            Err(Errno::EINVAL) if task::is_bound(root, task) => Ok(Answer::Refused(
                "the kernel binds this thread itself".into(),
            )),
            Err(errno) => Err(errno.into()),
            // A cpuset may take CPUs away from a user thread's mask; kernel threads are in none. Of
            // those that are offline it does so until they come.
            Ok(()) if matches!(self, Self::Thread(_)) => {
                let kept = task::affinity(root, task).map_err(into_io)?;
                let is_whole =
                    kept == cpus || kept == &cpus & &cpu::online(root).map_err(into_io)?;
                Ok(Answer::Taken((!is_whole).then(|| kept.to_string())))
            }
            Ok(()) => Ok(Answer::Taken(None)),
        }
    }

    /// Whether a write does little but wait for the kernel, which waits for others at the same time
    /// too. For a governor that is an RCU grace period, tens of milliseconds for each policy
    /// (kernel/sched/cpufreq_schedutil.c, `sugov_stop`).
    pub(crate) fn waits(&self) -> bool {
        matches!(self, Self::Governor(_))
    }

    /// The file behind the knob, below the root; empty for those that are no file.
    fn file(&self) -> String {
        match self {
            Self::Irq(irq) => format!("proc/irq/{irq}/smp_affinity_list"),
            Self::DefaultIrq => DEFAULT_IRQ_MASK.into(),
            Self::Workqueues => WORKQUEUE_MASK.into(),
            Self::CpuOnline(cpu) => format!("sys/devices/system/cpu/cpu{cpu}/online"),
            Self::Governor(policy) => {
                format!("sys/devices/system/cpu/cpufreq/{policy}/scaling_governor")
            }
            Self::CgroupCpus(path) => cgroup::file(path, "cpuset.cpus"),
            Self::ExclusiveCpus(path) => cgroup::file(path, "cpuset.cpus.exclusive"),
            Self::Partition(path) => cgroup::file(path, "cpuset.cpus.partition"),
            Self::Sysctl(name) | Self::Trigger(name) => format!("proc/sys/{name}"),
            _ => String::new(),
        }
    }

    /// Whether the value is a CPU list.
    pub fn holds_cpus(&self) -> bool {
        matches!(
            self,
            Self::Irq(_)
                | Self::DefaultIrq
                | Self::Workqueues
                | Self::Kthread(_)
                | Self::Thread(_)
                | Self::UnitCpus(_)
                | Self::CgroupCpus(_)
                | Self::ExclusiveCpus(_)
        )
    }

    /// Refuses a knob whose name would leave its folder; for knobs read from saved state.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the knob.
    pub fn check(&self) -> Result<()> {
        let name = match self {
            // The root cgroup.
            Self::ChildCpusets(path) if path.is_empty() => return Ok(()),
            Self::Governor(name)
            | Self::UnitCpus(name)
            | Self::Delegation(name)
            | Self::PciFunction(name)
            | Self::PciDriver(name) => {
                if name.contains('/') {
                    return Err(Error::malformed(
                        format!("{name:?}"),
                        "a name with a slash leaves its folder",
                    ));
                }
                name
            }
            Self::CgroupCpus(name)
            | Self::Cgroup(name)
            | Self::ThreadedCgroup(name)
            | Self::ChildCpusets(name)
            | Self::ExclusiveCpus(name)
            | Self::Partition(name)
            | Self::Sysctl(name)
            | Self::Trigger(name) => name,
            _ => return Ok(()),
        };
        check_path(name)
    }

    /// Refuses a value that becomes a part of a path and would leave its folder; for values read
    /// from saved state.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the value.
    pub fn check_value(&self, value: &str) -> Result<()> {
        match self {
            // The root cgroup is `/`.
            Self::CgroupOf(_) | Self::CgroupOfThread(_)
                if !value.is_empty() && value.trim_start_matches('/').is_empty() =>
            {
                Ok(())
            }
            Self::CgroupOf(_) | Self::CgroupOfThread(_) => {
                check_path(value.trim_start_matches('/'))
            }
            Self::PciDriver(_) if value.contains('/') => Err(Error::malformed(
                format!("{value:?}"),
                "a name with a slash leaves its folder",
            )),
            Self::PciDriver(_) => check_path(value),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Irq(irq) => write!(f, "IRQ {irq}"),
            Self::DefaultIrq => write!(f, "default IRQ mask"),
            Self::Workqueues => write!(f, "unbound workqueues"),
            Self::Kthread(task) => write!(f, "kthread {}", task.tid),
            Self::Thread(task) if task.pid == task.tid => write!(f, "process {}", task.pid),
            Self::Thread(task) => write!(f, "thread {}", task.tid),
            Self::CpuOnline(cpu) => write!(f, "CPU {cpu}"),
            Self::Governor(policy) => write!(f, "{policy}"),
            Self::UnitCpus(unit) => write!(f, "{unit}"),
            Self::UnitOverrides => write!(f, "run-time AllowedCPUs"),
            Self::CgroupCpus(path) | Self::Cgroup(path) | Self::ThreadedCgroup(path) => {
                write!(f, "cgroup /{path}")
            }
            Self::ChildCpusets(path) => write!(f, "cpusets below /{path}"),
            Self::ExclusiveCpus(path) => write!(f, "exclusive CPUs of /{path}"),
            Self::Partition(path) => write!(f, "partition /{path}"),
            Self::Delegation(scope) => write!(f, "delegation to {scope}"),
            Self::CgroupOf(task) => write!(f, "process {}", task.pid),
            Self::CgroupOfThread(task) => write!(f, "thread {}", task.tid),
            Self::Sysctl(name) | Self::Trigger(name) => write!(f, "{}", name.replace('/', ".")),
            Self::PciFunction(address) | Self::PciDriver(address) => write!(f, "PCI {address}"),
        }
    }
}

/// Refuses a path that would leave the folder it is put behind.
fn check_path(path: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && !part.contains(['\0', '\n'])
    };
    if path.split('/').all(plain) {
        Ok(())
    } else {
        Err(Error::malformed(
            format!("{path:?}"),
            "a path that leaves its folder",
        ))
    }
}

fn presence(there: bool) -> String {
    if there { PRESENT.into() } else { ABSENT.into() }
}

fn pci_path(address: &str, file: &str) -> String {
    format!("sys/bus/pci/devices/{address}/{file}")
}

/// Reads a kernel file's CPU list.
pub(crate) fn cpu_list(object: &str, text: &str) -> Result<CpuSet> {
    CpuSet::from_kernel_list(text).map_err(|source| Error::Cpus {
        object: object.to_owned(),
        source,
    })
}

/// The system's error behind ours, for the one place that tells gone, refused and failed apart.
pub(crate) fn into_io(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knobs_survive_json() {
        let task = TaskId {
            pid: 100,
            tid: 101,
            start: 7,
        };
        for knob in [
            Knob::Irq(24),
            Knob::DefaultIrq,
            Knob::Thread(task),
            Knob::Governor("policy6".into()),
            Knob::CgroupCpus("lxc/101".into()),
        ] {
            let json = serde_json::to_string(&knob).unwrap();
            assert_eq!(serde_json::from_str::<Knob>(&json).unwrap(), knob, "{json}");
        }
    }

    #[test]
    fn names_stay_in_their_folders() {
        for knob in [
            Knob::Sysctl("../../etc/passwd".into()),
            Knob::Governor("a/b".into()),
            Knob::CgroupCpus("/lxc".into()),
            Knob::UnitCpus("..".into()),
            Knob::PciFunction(String::new()),
        ] {
            assert!(knob.check().is_err(), "{knob:?}");
        }
        assert!(Knob::CgroupCpus("lxc/101/ns".into()).check().is_ok());
        assert!(Knob::UnitCpus("system.slice".into()).check().is_ok());
    }

    #[test]
    fn values_stay_in_their_folders() {
        let cgroup = Knob::CgroupOf(TaskId {
            pid: 100,
            tid: 100,
            start: 7,
        });
        let driver = Knob::PciDriver("0000:01:00.0".into());
        for (knob, value, good) in [
            (&cgroup, "/qemu.slice/100.scope", true),
            (&cgroup, "qemu-decoupled.slice/100.scope", true),
            (&cgroup, "/", true),
            (&cgroup, "", false),
            (&cgroup, "/../../../tmp/x", false),
            (&cgroup, "/a//b", false),
            (&driver, "nvidia", true),
            (&driver, NO_DRIVER, true),
            (&driver, "", false),
            (&driver, "..", false),
            (&driver, "../../x", false),
            (&Knob::Irq(1), "../x", true),
        ] {
            assert_eq!(knob.check_value(value).is_ok(), good, "{knob:?} {value:?}");
        }
    }
}

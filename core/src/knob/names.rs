//! The names of knobs: labels, files, and the checks of names from saved state.

use std::fmt;

use super::knobs::Knob;
use super::value::Value;
use crate::error::{Error, Result};
use crate::sys::{cgroup, net};

impl Knob {
    /// The file behind the knob, below the root; empty for a knob that is not a single file.
    pub(super) fn path(&self) -> String {
        match self {
            Self::Irq(irq) => format!("proc/irq/{irq}/smp_affinity_list"),
            Self::DefaultIrq => "proc/irq/default_smp_affinity".into(),
            Self::QueueCpus(queue) => net::cpus_file(queue),
            Self::Workqueues => "sys/devices/virtual/workqueue/cpumask".into(),
            Self::CpuOnline(cpu) => format!("sys/devices/system/cpu/cpu{cpu}/online"),
            Self::Governor(policy) => {
                format!("sys/devices/system/cpu/cpufreq/{policy}/scaling_governor")
            }
            Self::EnergyPreference(policy) => {
                format!("sys/devices/system/cpu/cpufreq/{policy}/energy_performance_preference")
            }
            Self::WakeupLatency(cpu) => {
                format!("sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us")
            }
            Self::HaltPolling => "sys/module/kvm/parameters/halt_poll_ns".into(),
            Self::CgroupCpus(path) | Self::ContainerCpus(path) => cgroup::file(path, "cpuset.cpus"),
            Self::ExclusiveCpus(path) => cgroup::file(path, "cpuset.cpus.exclusive"),
            Self::Partition(path) => cgroup::file(path, "cpuset.cpus.partition"),
            Self::ChildCpusets(path) => cgroup::file(path, "cgroup.subtree_control"),
            Self::Sysctl(name) | Self::Trigger(name) => format!("proc/sys/{name}"),
            Self::NodeCompaction(node) => format!("sys/devices/system/node/node{node}/compact"),
            Self::PciResetMethod(address) => pci_path(address, "reset_method"),
            Self::PciReset(address) => pci_path(address, "reset"),
            Self::Kthread(_)
            | Self::Thread(_)
            | Self::ThreadPolicy(_)
            | Self::UnitCpus(_)
            | Self::UnitOverrides
            | Self::Cgroup(_)
            | Self::CgroupOf(_)
            | Self::CgroupOfThread(_)
            | Self::ThreadedCgroup(_)
            | Self::Delegation(_)
            | Self::ThreadTimer(_)
            | Self::PciFunction(_)
            | Self::PciDriver(_)
            | Self::Trace(_) => String::new(),
        }
    }

    /// Refuses a knob with a name that would leave its folder; for knobs read from saved state.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the knob.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Governor(name)
            | Self::EnergyPreference(name)
            | Self::UnitCpus(name)
            | Self::Delegation(name)
            | Self::PciFunction(name)
            | Self::PciDriver(name)
            | Self::PciResetMethod(name)
            | Self::PciReset(name) => check_name(name),
            Self::QueueCpus(queue) => match queue.split_once('/') {
                Some((interface, queue)) => check_name(interface).and(check_name(queue)),
                None => Err(Error::malformed(
                    format!("{queue:?}"),
                    "not a network queue",
                )),
            },
            // The root cgroup.
            Self::ChildCpusets(path) if path.is_empty() => Ok(()),
            Self::CgroupCpus(path)
            | Self::ContainerCpus(path)
            | Self::Cgroup(path)
            | Self::ThreadedCgroup(path)
            | Self::ChildCpusets(path)
            | Self::ExclusiveCpus(path)
            | Self::Partition(path)
            | Self::Sysctl(path)
            | Self::Trigger(path) => check_path(path),
            Self::Irq(_)
            | Self::DefaultIrq
            | Self::Workqueues
            | Self::Kthread(_)
            | Self::Thread(_)
            | Self::ThreadPolicy(_)
            | Self::CpuOnline(_)
            | Self::WakeupLatency(_)
            | Self::HaltPolling
            | Self::NodeCompaction(_)
            | Self::UnitOverrides
            | Self::CgroupOf(_)
            | Self::CgroupOfThread(_)
            | Self::ThreadTimer(_)
            | Self::Trace(_) => Ok(()),
        }
    }

    /// Reads a value from saved state; refuses one that becomes a part of a path and would leave its
    /// folder.
    ///
    /// # Errors
    /// [`Error`] if the text is not a value of this knob, or naming the value that leaves its folder.
    pub(crate) fn parse_checked(&self, text: &str) -> Result<Value> {
        let value = self.parse(text)?;
        self.check_value(&value)?;
        Ok(value)
    }

    fn check_value(&self, value: &Value) -> Result<()> {
        let value = value.as_text().unwrap_or_default();
        match self {
            Self::CgroupOf(_) | Self::CgroupOfThread(_) => {
                let path = value.trim_start_matches('/');
                // The root cgroup is `/`.
                if path.is_empty() && !value.is_empty() {
                    return Ok(());
                }
                check_path(path)
            }
            Self::PciDriver(_) => check_name(value),
            // The units are compared with those found, and do not become a path themselves.
            Self::UnitOverrides => Ok(()),
            Self::Irq(_)
            | Self::DefaultIrq
            | Self::QueueCpus(_)
            | Self::Workqueues
            | Self::Kthread(_)
            | Self::Thread(_)
            | Self::ThreadPolicy(_)
            | Self::CpuOnline(_)
            | Self::Governor(_)
            | Self::EnergyPreference(_)
            | Self::WakeupLatency(_)
            | Self::HaltPolling
            | Self::UnitCpus(_)
            | Self::CgroupCpus(_)
            | Self::ContainerCpus(_)
            | Self::Cgroup(_)
            | Self::ThreadedCgroup(_)
            | Self::ChildCpusets(_)
            | Self::ExclusiveCpus(_)
            | Self::Partition(_)
            | Self::Delegation(_)
            | Self::ThreadTimer(_)
            | Self::Sysctl(_)
            | Self::Trigger(_)
            | Self::NodeCompaction(_)
            | Self::PciFunction(_)
            | Self::PciResetMethod(_)
            | Self::PciReset(_)
            | Self::Trace(_) => Ok(()),
        }
    }
}

/// Refuses a name that is not a single part of a path.
fn check_name(name: &str) -> Result<()> {
    if name.contains('/') {
        return Err(Error::malformed(
            format!("{name:?}"),
            "a name with a slash, which leaves its folder",
        ));
    }
    check_path(name)
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Irq(irq) => write!(f, "IRQ {irq}"),
            Self::DefaultIrq => write!(f, "default IRQ mask"),
            Self::QueueCpus(queue) => write!(f, "queue {}", queue.replace('/', " ")),
            Self::Workqueues => write!(f, "unbound workqueues"),
            Self::Kthread(task) => write!(f, "kthread {}", task.tid),
            Self::Thread(task) if task.pid == task.tid => write!(f, "process {}", task.pid),
            Self::Thread(task) => write!(f, "thread {}", task.tid),
            Self::ThreadPolicy(task) => write!(f, "policy of thread {}", task.tid),
            Self::CpuOnline(cpu) => write!(f, "CPU {cpu}"),
            Self::Governor(policy) => write!(f, "{policy}"),
            Self::EnergyPreference(policy) => write!(f, "energy preference of {policy}"),
            Self::WakeupLatency(cpu) => write!(f, "wake-up latency of CPU {cpu}"),
            Self::HaltPolling => write!(f, "halt_poll_ns"),
            Self::UnitCpus(unit) => write!(f, "{unit}"),
            Self::UnitOverrides => write!(f, "run-time AllowedCPUs"),
            Self::CgroupCpus(path) | Self::Cgroup(path) | Self::ThreadedCgroup(path) => {
                write!(f, "cgroup /{path}")
            }
            Self::ContainerCpus(path) => write!(f, "container /{path}"),
            Self::ChildCpusets(path) => write!(f, "cpusets below /{path}"),
            Self::ExclusiveCpus(path) => write!(f, "exclusive CPUs of /{path}"),
            Self::Partition(path) => write!(f, "partition /{path}"),
            Self::Delegation(scope) => write!(f, "delegation to {scope}"),
            Self::ThreadTimer(vmid) => write!(f, "timer for the threads of VM {vmid}"),
            Self::CgroupOf(task) => write!(f, "process {}", task.pid),
            Self::CgroupOfThread(task) => write!(f, "thread {}", task.tid),
            Self::Sysctl(name) | Self::Trigger(name) => write!(f, "{}", name.replace('/', ".")),
            Self::NodeCompaction(node) => write!(f, "compact memory of node {node}"),
            Self::PciFunction(address) | Self::PciDriver(address) => write!(f, "PCI {address}"),
            Self::PciResetMethod(address) => write!(f, "reset methods of PCI {address}"),
            Self::PciReset(address) => write!(f, "reset PCI {address}"),
            Self::Trace(task) => write!(f, "trace of process {}", task.pid),
        }
    }
}

/// Refuses a path that would leave the folder it is relative to.
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

/// A file of a PCI function.
pub(super) fn pci_path(address: &str, file: &str) -> String {
    format!("sys/bus/pci/devices/{address}/{file}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knob::NO_DRIVER;
    use crate::sys::task::TaskId;

    #[test]
    fn names_stay_in_their_folders() {
        for knob in [
            Knob::Sysctl("../../etc/passwd".into()),
            Knob::Governor("a/b".into()),
            Knob::CgroupCpus("/lxc".into()),
            Knob::ContainerCpus("lxc/../system.slice".into()),
            Knob::UnitCpus("..".into()),
            Knob::PciFunction(String::new()),
            Knob::QueueCpus("../irq/rx-0".into()),
            Knob::QueueCpus("eth0/..".into()),
            Knob::QueueCpus("eth0/rx-0/..".into()),
            Knob::QueueCpus("eth0".into()),
        ] {
            assert!(knob.check().is_err(), "{knob:?}");
        }
        assert!(Knob::ContainerCpus("lxc/101/ns".into()).check().is_ok());
        assert!(Knob::UnitCpus("system.slice".into()).check().is_ok());
        assert!(Knob::QueueCpus("tap100i0/rx-0".into()).check().is_ok());
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
            assert_eq!(
                knob.check_value(&Value::text(value)).is_ok(),
                good,
                "{knob:?} {value:?}"
            );
        }
    }
}

//! Reads the values of knobs.

use super::knobs::{EMPTIED, Knob, NO_DRIVER};
use super::names::pci_path;
use super::value::{ABSENT, Value};
use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::sys::{cgroup, cpufreq, net, sched, task, trace};
use crate::systemd;

impl Knob {
    /// The knob's present value; `None` if the object does not exist (any more).
    ///
    /// # Errors
    /// Any [`Error`] except one that [is gone](Error::is_gone).
    pub fn read(&self, host: &Host) -> Result<Option<Value>> {
        let found = match self {
            Self::Irq(_)
            | Self::CpuOnline(_)
            | Self::ContainerCpus(_)
            | Self::Governor(_)
            | Self::WakeupLatency(_)
            | Self::HaltPolling
            | Self::Sysctl(_)
            | Self::Partition(_)
            | Self::PciResetMethod(_) => self.read_file(host),
            // Without the controller the file does not exist, which is the same as an empty one.
            Self::CgroupCpus(path) | Self::ExclusiveCpus(path) => match self.read_file(host) {
                Ok(None) => Ok(host
                    .exists(cgroup::path(path))
                    .then(|| CpuSet::new().into())),
                other => other,
            },
            // A value that the driver has no name for, or of a CPU that is offline, is unknown.
            Self::EnergyPreference(policy) => {
                cpufreq::preference(host, policy).map(|found| found.map(Value::text))
            }
            Self::QueueCpus(queue) => {
                net::queue_cpus(host, queue).map(|cpus| cpus.map(Value::Cpus))
            }
            Self::DefaultIrq | Self::Workqueues => self.read_mask(host),
            Self::Kthread(task) | Self::Thread(task) => task::check_start(host, task)
                .and_then(|()| task::affinity(host, task))
                .map(|cpus| Some(cpus.into())),
            Self::ThreadPolicy(task) => task::check_start(host, task)
                .and_then(|()| sched::policy(host, task))
                .map(|policy| Some(Value::text(policy.to_string()))),
            Self::UnitCpus(unit) => {
                systemd::allowed_cpus(host.systemd(), host, unit).map(|cpus| cpus.map(Value::Cpus))
            }
            Self::UnitOverrides => {
                systemd::overrides(host).map(|units| Some(Value::text(units.join(" "))))
            }
            Self::Cgroup(path) => Ok(Some(Value::Present(host.exists(cgroup::path(path))))),
            Self::CgroupOf(task) => task::check_start(host, task)
                .and_then(|()| cgroup::of_process(host, task.pid))
                .map(|cgroup| Some(Value::text(cgroup))),
            Self::CgroupOfThread(task) => task::check_start(host, task)
                .and_then(|()| cgroup::of_thread(host, task))
                .map(|cgroup| Some(Value::text(cgroup))),
            Self::ThreadedCgroup(path) => {
                if host.exists(cgroup::path(path)) {
                    host.read_value(cgroup::file(path, "cgroup.type"))
                        .map(|kind| kind.map(Value::text))
                } else {
                    Ok(Some(ABSENT))
                }
            }
            Self::ChildCpusets(path) => {
                cgroup::has_child_cpusets(host, path).map(|has| has.map(Value::Present))
            }
            Self::Delegation(scope) => Ok(Some(
                systemd::drop_ins::is_to_delegate(host, scope)
                    .map_or_else(|| Value::text(EMPTIED), Value::Present),
            )),
            Self::ThreadTimer(vmid) => {
                Ok(Some(Value::Present(systemd::timer::is_there(host, *vmid))))
            }
            Self::Trigger(_) | Self::NodeCompaction(_) | Self::PciReset(_) => {
                Ok(Some(Value::text("")))
            }
            Self::PciFunction(address) => {
                Ok(Some(Value::Present(host.exists(pci_path(address, "")))))
            }
            Self::PciDriver(address) => Ok(host.exists(pci_path(address, "")).then(|| {
                let driver = host.link_name(pci_path(address, "driver"));
                Value::text(driver.unwrap_or_else(|| NO_DRIVER.into()))
            })),
            Self::Trace(task) => trace::cpus(host, task).map(|cpus| Some(cpus.into())),
        };
        match found {
            Err(error) if error.is_gone() => Ok(None),
            other => other,
        }
    }

    /// The value in the knob's file; `None` if the file does not exist.
    fn read_file(&self, host: &Host) -> Result<Option<Value>> {
        let text = host.read_value(self.path())?;
        text.map(|text| self.parse(&text)).transpose()
    }

    /// The CPUs in the knob's file, which is a mask.
    fn read_mask(&self, host: &Host) -> Result<Option<Value>> {
        let Some(mask) = host.read_value(self.path())? else {
            return Ok(None);
        };
        match CpuSet::from_mask(&mask) {
            Ok(cpus) => Ok(Some(cpus.into())),
            Err(source) => Err(Error::Cpus {
                object: self.path(),
                source,
            }),
        }
    }
}

//! What knobs hold.

use super::knobs::{ABSENT, EMPTIED, Knob, NO_DRIVER, PRESENT};
use super::names::pci_path;
use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::sys::{cgroup, task};
use crate::sysroot::cpu_list;
use crate::systemd;

impl Knob {
    /// What the knob holds now in canonical form; `None` where the object is not there (any more).
    ///
    /// # Errors
    /// Any [`Error`] but one that says that the object is gone.
    pub fn read(&self, host: &Host) -> Result<Option<String>> {
        let found = match self {
            Self::Irq(_)
            | Self::CpuOnline(_)
            | Self::Governor(_)
            | Self::Sysctl(_)
            | Self::Partition(_) => {
                return host.read_value(self.path());
            }
            // Without the controller there is no file, which is as good as an empty one.
            Self::CgroupCpus(path) | Self::ExclusiveCpus(path) => {
                match host.read_value(self.path()) {
                    Ok(Some(text)) => {
                        cpu_list(&self.path(), &text).map(|cpus| Some(cpus.to_string()))
                    }
                    Ok(None) => Ok(host.exists(cgroup::path(path)).then(String::new)),
                    Err(error) => Err(error),
                }
            }
            Self::DefaultIrq | Self::Workqueues => host.read_value(self.path()).and_then(|mask| {
                mask.map(|mask| match CpuSet::from_mask(&mask) {
                    Ok(cpus) => Ok(cpus.to_string()),
                    Err(source) => Err(Error::Cpus {
                        object: self.path(),
                        source,
                    }),
                })
                .transpose()
            }),
            Self::Kthread(task) | Self::Thread(task) => task::check_start(host, task)
                .and_then(|()| task::affinity(host, task))
                .map(|cpus| Some(cpus.to_string())),
            Self::UnitCpus(unit) => systemd::allowed_cpus(host.systemd(), host, unit)
                .map(|cpus| cpus.map(|cpus| cpus.to_string())),
            Self::UnitOverrides => systemd::overrides(host).map(|units| Some(units.join(" "))),
            Self::Cgroup(path) => Ok(Some(presence(host.exists(cgroup::path(path))))),
            Self::CgroupOf(task) => task::check_start(host, task)
                .and_then(|()| cgroup::of_process(host, task.pid))
                .map(Some),
            Self::CgroupOfThread(task) => task::check_start(host, task)
                .and_then(|()| cgroup::of_thread(host, task))
                .map(Some),
            Self::ThreadedCgroup(path) => match host.exists(cgroup::path(path)) {
                true => host.read_value(cgroup::file(path, "cgroup.type")),
                false => Ok(Some(ABSENT.into())),
            },
            Self::ChildCpusets(path) => {
                cgroup::has_child_cpusets(host, path).map(|has| has.map(presence))
            }
            Self::Delegation(scope) => Ok(Some(
                systemd::drop_ins::is_to_delegate(host, scope)
                    .map_or_else(|| EMPTIED.into(), presence),
            )),
            Self::Trigger(_) => Ok(Some(String::new())),
            Self::PciFunction(address) => Ok(Some(presence(host.exists(pci_path(address, ""))))),
            Self::PciDriver(address) => Ok(host.exists(pci_path(address, "")).then(|| {
                host.link_name(pci_path(address, "driver"))
                    .unwrap_or_else(|| NO_DRIVER.into())
            })),
        };
        match found {
            Err(error) if error.is_gone() => Ok(None),
            other => other,
        }
    }
}

fn presence(there: bool) -> String {
    if there { PRESENT.into() } else { ABSENT.into() }
}

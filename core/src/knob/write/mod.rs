//! The only code that changes the host: the kernel's files, thread affinities, cgroups and systemd's
//! units. [`apply`](mod@super::apply) is its only caller; clippy's `disallowed-methods` keeps the
//! rest of the workspace from writing.

#![expect(
    clippy::disallowed_methods,
    reason = "the writers of the kernel's values"
)]

mod affinity;
mod answer;
mod cgroup;
mod file;
mod policy;
mod scope;
mod systemd;
mod timer;
mod trace;

use std::io;

pub(super) use answer::Answer;
pub use policy::POLICY_DEADLINE;

use super::knobs::{Knob, NO_DRIVER};
use super::names::pci_path;
use super::value::{ABSENT, PRESENT, Value};
use crate::cpuset::CpuSet;
use crate::error::{into_io, os_text};
use crate::host::Host;
use crate::sys::{cpu, task};

/// Why an IRQ is not moved.
pub const UNMOVABLE_IRQ: &str = "the kernel does not let user space move this IRQ";

/// Sets a knob.
pub(super) fn write(knob: &Knob, host: &Host, value: &Value) -> io::Result<Answer> {
    let taken = |()| Answer::Taken(None);
    match knob {
        Knob::Irq(_) => match file::write_and_read_back(host, knob.path(), &value.to_string()) {
            Err(error) => match irq_refusal(host, knob, &error) {
                Some(why) => Ok(Answer::Refused(why)),
                None => Err(error),
            },
            Ok(kept) if kept != value.to_string() => Ok(Answer::Refused(format!(
                "the kernel accepted the value but kept {kept}"
            ))),
            Ok(_) => Ok(taken(())),
        },
        Knob::CpuOnline(_)
        | Knob::Governor(_)
        | Knob::WakeupLatency(_)
        | Knob::HaltPolling
        | Knob::Sysctl(_)
        | Knob::Partition(_) => file::write_and_read_back(host, knob.path(), &value.to_string())
            .map(|found| Answer::Taken(Some(found))),
        Knob::EnergyPreference(_) => {
            match file::write_and_read_back(host, knob.path(), &value.to_string()) {
                Err(error) => match preference_refusal(&error) {
                    Some(why) => Ok(Answer::Refused(why)),
                    None => Err(error),
                },
                // It stands for another name.
                Ok(_) if value.as_text() == Some("default") => Ok(taken(())),
                other => other.map(|found| Answer::Taken(Some(found))),
            }
        }
        Knob::CgroupCpus(path) | Knob::ContainerCpus(path) => {
            cgroup::set_cpus(host, path, cpus(value)?).map(taken)
        }
        Knob::ExclusiveCpus(_) => {
            let exclusive = cpus(value)?;
            // An empty write (no byte) would not reach the kernel.
            let text = if exclusive.is_empty() {
                "\n".to_owned()
            } else {
                exclusive.to_string()
            };
            file::write(host, knob.path(), &text).map(taken)
        }
        Knob::DefaultIrq | Knob::Workqueues => {
            file::write(host, knob.path(), &cpus(value)?.to_mask()).map(taken)
        }
        Knob::QueueCpus(_) => {
            let wanted = cpus(value)?;
            let kept = file::write_and_read_back(host, knob.path(), &wanted.to_mask())?;
            // It keeps those that are online (net/core/net-sysfs.c, `netdev_rx_queue_set_rps_mask`).
            Ok(match CpuSet::from_mask(&kept) {
                Ok(kept) if kept == *wanted || kept == wanted & &online(host)? => taken(()),
                Ok(kept) => Answer::Taken(Some(kept.to_string())),
                Err(_) => Answer::Taken(Some(kept)),
            })
        }
        Knob::Kthread(task) => affinity::pin_kthread(host, task, cpus(value)?),
        Knob::Thread(task) => affinity::pin_thread(host, task, cpus(value)?),
        Knob::ThreadPolicy(task) => policy::set(host, task, text(value)?),
        Knob::UnitCpus(unit) => systemd::set_allowed_cpus(host, unit, cpus(value)?).map(taken),
        Knob::UnitOverrides => systemd::retain_overrides(host, text(value)?).map(taken),
        Knob::Cgroup(path) => cgroup::make_or_remove(host, path, *value == PRESENT).map(taken),
        Knob::CgroupOf(task) => {
            task::check_start(host, task).map_err(into_io)?;
            scope::move_process(host, task, text(value)?).map(taken)
        }
        Knob::CgroupOfThread(task) => {
            task::check_start(host, task).map_err(into_io)?;
            let threads = crate::sys::cgroup::file(text(value)?, "cgroup.threads");
            file::write(host, threads, &task.tid.to_string()).map(taken)
        }
        Knob::ThreadedCgroup(path) => {
            cgroup::make_threaded_or_remove(host, path, *value != ABSENT).map(taken)
        }
        Knob::ChildCpusets(_) => {
            let sign = if *value == PRESENT { '+' } else { '-' };
            file::write(host, knob.path(), &format!("{sign}cpuset")).map(taken)
        }
        Knob::Delegation(scope) => {
            systemd::write_drop_in(host, scope, *value == PRESENT).map(taken)
        }
        Knob::ThreadTimer(vmid) => timer::start_or_stop(host, *vmid, *value == PRESENT).map(taken),
        Knob::Trigger(_) | Knob::NodeCompaction(_) | Knob::PciReset(_) => {
            file::write(host, knob.path(), text(value)?).map(taken)
        }
        Knob::PciResetMethod(_) => {
            // An empty write (no byte) would not reach the kernel.
            let names = match text(value)? {
                "" => "\n",
                names => names,
            };
            file::write_and_read_back(host, knob.path(), names)
                .map(|found| Answer::Taken(Some(found)))
        }
        Knob::Trace(task) => trace::record(host, task, cpus(value)?).map(taken),
        Knob::PciFunction(address) if *value == ABSENT => {
            file::write(host, pci_path(address, "remove"), "1").map(taken)
        }
        Knob::PciFunction(_) => file::write(host, "sys/bus/pci/rescan", "1").map(taken),
        Knob::PciDriver(address) => {
            let driver = text(value)?;
            if host.exists(pci_path(address, "driver")) {
                file::write(host, pci_path(address, "driver/unbind"), address)?;
            }
            if driver != NO_DRIVER {
                file::write(host, format!("sys/bus/pci/drivers/{driver}/bind"), address)?;
            }
            Ok(taken(()))
        }
    }
}

/// Why an IRQ is not moved, if that is the kernel's answer for this one IRQ. Managed queues and
/// timers return EIO, since Linux 6.13 EPERM (kernel/irq/proc.c); those of Intel VMD EINVAL before
/// Linux 6.11 (its chip cannot set one), ENOSPC stands for no free vector on these CPUs.
fn irq_refusal(host: &Host, knob: &Knob, error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        nix::libc::EIO | nix::libc::EPERM => Some(UNMOVABLE_IRQ.into()),
        nix::libc::EACCES if !nix::unistd::geteuid().is_root() => None,
        // A planted link in the file's place.
        nix::libc::ELOOP => None,
        _ if !host.exists(knob.path()) => None,
        _ => Some(os_text(error)),
    }
}

/// Why an energy preference is not set, if the driver allows it never or not with this governor. Some
/// kernels show `default` and do not take it.
fn preference_refusal(error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        nix::libc::EBUSY => Some("the governor performance allows no other".into()),
        nix::libc::EINVAL => Some(os_text(error)),
        _ => None,
    }
}

/// The CPUs of a value, for a knob with a CPU list.
fn cpus(value: &Value) -> io::Result<&CpuSet> {
    value
        .cpus()
        .ok_or_else(|| io::Error::other(format!("\"{value}\" is not a CPU list")))
}

fn online(host: &Host) -> io::Result<CpuSet> {
    cpu::online(host).map_err(into_io)
}

/// The text of a value, for a knob with text.
fn text(value: &Value) -> io::Result<&str> {
    value
        .as_text()
        .ok_or_else(|| io::Error::other(format!("{value} is not text")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc::{EBUSY, EINVAL, EIO, ELOOP, ENODEV, ENOSPC, EPERM};

    #[test]
    fn whatever_the_kernel_answers_for_an_irq_is_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        crate::testutils::write(dir.path(), "proc/irq/24/smp_affinity_list", "0-5");
        let host = Host::new(dir.path());
        for (irq, code, why) in [
            (24, EIO, Some(UNMOVABLE_IRQ)),
            (24, EPERM, Some(UNMOVABLE_IRQ)),
            // Intel VMD before Linux 6.11, and no free vector.
            (24, EINVAL, Some("Invalid argument")),
            (24, ENOSPC, Some("No space left on device")),
            (24, ELOOP, None),
            // It has gone.
            (25, EINVAL, None),
        ] {
            let error = io::Error::from_raw_os_error(code);
            let found = irq_refusal(&host, &Knob::Irq(irq), &error);
            assert_eq!(found.as_deref(), why, "{irq} {error}");
        }
    }

    #[test]
    fn what_a_driver_refuses_of_an_energy_preference_is_a_refusal() {
        for (code, why) in [
            (EBUSY, Some("the governor performance allows no other")),
            (EINVAL, Some("Invalid argument")),
            (ENODEV, None),
        ] {
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(preference_refusal(&error).as_deref(), why, "{error}");
        }
    }
}

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
mod scope;
mod systemd;

use std::io;

pub(super) use answer::Answer;

use super::knobs::{Knob, NO_DRIVER};
use super::names::pci_path;
use super::value::{ABSENT, PRESENT, Value};
use crate::cpuset::CpuSet;
use crate::error::into_io;
use crate::host::Host;
use crate::sys::task;

/// Why an IRQ is not moved.
pub(super) const UNMOVABLE_IRQ: &str = "the kernel does not let user space move this IRQ";

/// Sets a knob.
pub(super) fn write(knob: &Knob, host: &Host, value: &Value) -> io::Result<Answer> {
    let taken = |()| Answer::Taken(None);
    match knob {
        Knob::Irq(_) => match file::write_and_read_back(host, knob.path(), &value.to_string()) {
            // Managed queues and timers return EIO; since Linux 6.13 EPERM (kernel/irq/proc.c).
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(nix::libc::EIO | nix::libc::EPERM)
                ) =>
            {
                Ok(Answer::Refused(UNMOVABLE_IRQ.into()))
            }
            other => other.map(|found| Answer::Taken(Some(found))),
        },
        Knob::CpuOnline(_) | Knob::Governor(_) | Knob::Sysctl(_) | Knob::Partition(_) => {
            file::write_and_read_back(host, knob.path(), &value.to_string())
                .map(|found| Answer::Taken(Some(found)))
        }
        Knob::CgroupCpus(path) => cgroup::set_cpus(host, path, cpus(value)?).map(taken),
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
        Knob::Kthread(task) => affinity::pin_kthread(host, task, cpus(value)?),
        Knob::Thread(task) => affinity::pin_thread(host, task, cpus(value)?),
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
        Knob::Trigger(_) => file::write(host, knob.path(), text(value)?).map(taken),
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

/// The CPUs of a value, for a knob with a CPU list.
fn cpus(value: &Value) -> io::Result<&CpuSet> {
    value
        .cpus()
        .ok_or_else(|| io::Error::other(format!("\"{value}\" is not a CPU list")))
}

/// The text of a value, for a knob with text.
fn text(value: &Value) -> io::Result<&str> {
    value
        .as_text()
        .ok_or_else(|| io::Error::other(format!("{value} is not a text")))
}

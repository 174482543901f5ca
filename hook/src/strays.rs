//! What can still run on isolated CPUs.

use std::collections::BTreeMap;

use pinfold_core::knob::Value;
use pinfold_core::state::Baseline;
use pinfold_core::sys::{irq, task};
use pinfold_core::{CpuSet, Host, Knob, Result, Setting, TaskId};
use serde::Serialize;

/// Why something can run on an isolated CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Class {
    /// It could be moved elsewhere.
    Stray,
    /// The kernel binds it: per-CPU kthreads, bound workers, older kernels' io_uring threads.
    KernelBound,
    /// An IRQ that user space cannot move.
    ManagedIrq,
    /// An IRQ that has been moved and arrives at its old CPU once more: without interrupt remapping
    /// the kernel moves it then.
    MovingIrq,
}

/// A thread, IRQ or mask that includes an isolated CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Stray {
    /// Why it can.
    pub class: Class,
    /// Its name.
    pub object: String,
    /// The CPUs on which it can.
    pub cpus: CpuSet,
}

/// Lists what can run on `isolated`, except the `pinned` threads of VMs on their own CPUs.
///
/// # Errors
/// If /proc cannot be read. What ends meanwhile is left out.
pub(crate) fn strays(
    root: &Host,
    isolated: &CpuSet,
    pinned: &BTreeMap<TaskId, CpuSet>,
    baseline: &Baseline,
) -> Result<Vec<Stray>> {
    let mut strays = Vec::new();
    let mut see = |class, object: String, cpus: &CpuSet| {
        let cpus = cpus & isolated;
        if !cpus.is_empty() {
            strays.push(Stray {
                class,
                object,
                cpus,
            });
        }
    };
    for pid in task::pids(root)? {
        let tasks = match task::tasks(root, pid) {
            Err(error) if error.is_gone() => continue,
            tasks => tasks?,
        };
        for task in tasks {
            let cpus = match task::affinity(root, &task.id) {
                Err(error) if error.is_gone() => continue,
                cpus => cpus?,
            };
            let class = if task.bound {
                Class::KernelBound
            } else {
                Class::Stray
            };
            let kind = if task.kernel { "kthread" } else { "thread" };
            let cpus = match pinned.get(&task.id) {
                Some(own) => &cpus - own,
                None => cpus,
            };
            see(
                class,
                format!("{kind} {} ({})", task.id.tid, task.name),
                &cpus,
            );
        }
    }
    for Setting { knob, label, found } in pin_irqs::settings(root)? {
        // One that the kernel refused to move has a value from before and none that was set.
        let refused = baseline.has(&knob) && baseline.last(&knob).is_none();
        let class = if refused {
            Class::ManagedIrq
        } else {
            Class::Stray
        };
        let Some(cpus) = found.cpus() else { continue };
        if let (Knob::Irq(number), false) = (&knob, cpus.intersects(isolated)) {
            see(Class::MovingIrq, label, &irq::effective(root, *number)?);
        } else {
            see(class, label, cpus);
        }
    }
    if let Some(Value::Cpus(cpus)) = Knob::Workqueues.read(root)? {
        see(Class::Stray, Knob::Workqueues.to_string(), &cpus);
    }
    strays.sort_by(|a, b| {
        (a.class, a.cpus.first(), &a.object).cmp(&(b.class, b.cpus.first(), &b.object))
    });
    Ok(strays)
}

//! What can still run on isolated CPUs.

use std::collections::BTreeMap;
use std::sync::Arc;

use pinfold_core::knob::Value;
use pinfold_core::state::Baseline;
use pinfold_core::sys::irq;
use pinfold_core::sys::task::{self, Allowed, Processes};
use pinfold_core::{CpuSet, CpuSetPool, Host, Knob, Result, Setting, TaskId};
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
    pub object: Arc<str>,
    /// The CPUs on which it can.
    pub cpus: CpuSet,
}

/// The threads of a VM's QEMU that hook has pinned to CPUs of the VM, with these: its vCPUs.
///
/// # Errors
/// If /proc cannot be read.
pub(crate) fn pinned_inside(
    root: &Host,
    baseline: &Baseline,
    qemu: &TaskId,
    own: &CpuSet,
) -> Result<BTreeMap<TaskId, CpuSet>> {
    let tasks = match task::tasks(root, qemu.pid) {
        Err(error) if error.is_gone() => Vec::new(),
        tasks => tasks?,
    };
    let pinned = tasks.into_iter().filter_map(|task| {
        let last = baseline
            .last(&Knob::Thread(task.id))
            .and_then(Value::cpus)?;
        last.is_subset(own).then(|| (task.id, last.clone()))
    });
    Ok(pinned.collect())
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
    let mut masks = CpuSetPool::default();
    let mut see = |class, object: Arc<str>, cpus: &CpuSet| {
        let cpus = cpus & isolated;
        if !cpus.is_empty() {
            strays.push(Stray {
                class,
                object,
                cpus: masks.share(cpus),
            });
        }
    };
    let allowed = Allowed::among(root, isolated)?;
    let processes = Processes::read(root)?;
    for pid in processes.pids() {
        let tids = match processes.tids(root, pid) {
            Err(error) if error.is_gone() => continue,
            tids => tids?,
        };
        for tid in tids {
            let found = allowed.of(pid, tid).and_then(|cpus| {
                // Few threads may run there: only their names and flags are read.
                let task = (!cpus.is_empty()).then(|| task::task(root, pid, tid));
                Ok((cpus, task.transpose()?))
            });
            let (cpus, task) = match found {
                Err(error) if error.is_gone() => continue,
                Ok((_, None)) => continue,
                Ok((cpus, Some(task))) => (cpus, task),
                Err(error) => return Err(error),
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
                format!("{kind} {} ({})", task.id.tid, task.name).into(),
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
    for Setting { label, found, .. } in pin_irqs::queues(root)? {
        if let Some(cpus) = found.cpus() {
            see(Class::Stray, label, cpus);
        }
    }
    if let Some(Value::Cpus(cpus)) = Knob::Workqueues.read(root)? {
        see(Class::Stray, Knob::Workqueues.to_string().into(), &cpus);
    }
    strays.sort_by(|a, b| {
        (a.class, a.cpus.first(), &a.object).cmp(&(b.class, b.cpus.first(), &b.object))
    });
    Ok(strays)
}

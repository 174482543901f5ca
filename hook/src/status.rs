//! `hook status`: which CPUs are whose, and what may still run on the isolated ones.

use std::collections::BTreeMap;

use pinfold_core::report::{err, out};
use pinfold_core::store::{Baseline, Store};
use pinfold_core::{CpuSet, Exit, Knob, Object, Result, Sysroot, TaskId, process};
use serde::Serialize;
use serde_json::json;

use crate::reservation::{Phase, Reservation};
use crate::settings::Bounds;

/// Why something may run on an isolated CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Class {
    /// It could be elsewhere.
    Stray,
    /// The kernel binds it: per-CPU kthreads, bound workers, older kernels' io_uring threads.
    KernelBound,
    /// An IRQ that the kernel does not let user space move.
    ManagedIrq,
}

/// A thing that may run on an isolated CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Stray {
    /// Why it may.
    pub class: Class,
    /// Its name.
    pub object: String,
    /// Where it may.
    pub cpus: CpuSet,
}

/// Lists what may run on `isolated`, less the QEMU processes in `vms`' own vCPU threads, which belong there.
///
/// # Errors
/// Where /proc cannot be read. Things that go meanwhile are left out.
pub(crate) fn strays(
    root: &Sysroot,
    isolated: &CpuSet,
    pinned: &BTreeMap<TaskId, CpuSet>,
    baseline: &Baseline,
) -> Result<Vec<Stray>> {
    let mut strays = Vec::new();
    let mut see = |class, object: String, cpus: &CpuSet| {
        let cpus = cpus & isolated;
        if !cpus.is_empty() {
            strays.push(Stray { class, object, cpus });
        }
    };
    for pid in process::pids(root)? {
        let tasks = match process::tasks(root, pid) {
            Err(error) if error.is_gone() => continue,
            tasks => tasks?,
        };
        for task in tasks {
            let cpus = match process::affinity(root, &task.id) {
                Err(error) if error.is_gone() => continue,
                cpus => cpus?,
            };
            let class = if task.bound { Class::KernelBound } else { Class::Stray };
            let kind = if task.kernel { "kthread" } else { "thread" };
            let cpus = match pinned.get(&task.id) {
                Some(own) => &cpus - own,
                None => cpus,
            };
            see(class, format!("{kind} {} ({})", task.id.tid, task.name), &cpus);
        }
    }
    for Object { knob, label, found } in pin_irqs::objects(root)? {
        // One that the kernel refused to move has a value from before and none that was set.
        let refused = baseline.has(&knob) && baseline.last(&knob).is_none();
        let class = if refused { Class::ManagedIrq } else { Class::Stray };
        see(class, label, &CpuSet::from_kernel_list(&found).unwrap_or_default());
    }
    if let Some(found) = Knob::Workqueues.read(root)? {
        see(Class::Stray, Knob::Workqueues.to_string(), &CpuSet::from_kernel_list(&found).unwrap_or_default());
    }
    strays.sort_by(|a, b| (a.class, a.cpus.first(), &a.object).cmp(&(b.class, b.cpus.first(), &b.object)));
    Ok(strays)
}

/// The command's whole run. Exit code 1 where something movable was missed, so that monitoring can call it.
///
/// # Errors
/// Where the state or the host cannot be read.
pub(crate) fn run(root: &Sysroot, json: bool) -> anyhow::Result<Exit> {
    let peeked = match Store::<Reservation>::peek(root) {
        Err(error) if error.is_denied() => {
            err(&format!("hook: {error}; the reservations are root's to see\n"));
            return Ok(Exit::Failed);
        }
        peeked => peeked?,
    };
    let (reservations, baseline) = peeked.unwrap_or_default();
    let mut isolated = CpuSet::new();
    let mut pinned = BTreeMap::new();
    for reservation in reservations.values().filter(|reservation| reservation.is_fenced()) {
        isolated = &isolated | &reservation.settings.isolated;
        for task in reservation.qemu.iter().flat_map(|qemu| process::tasks(root, qemu.pid).unwrap_or_default()) {
            // What hook pinned inside the fence is where it belongs: the vCPU threads.
            if let Some(cpus) =
                baseline.last(&Knob::Thread(task.id)).and_then(|last| CpuSet::from_kernel_list(last).ok())
                && cpus.is_subset(&reservation.settings.isolated)
            {
                pinned.insert(task.id, cpus);
            }
        }
    }
    let strays = if isolated.is_empty() { Vec::new() } else { strays(root, &isolated, &pinned, &baseline)? };
    let missed = strays.iter().filter(|stray| stray.class == Class::Stray).count();
    if json {
        let bounds = |r: &Reservation| r.settings.deadlines.bounds(reservations.len() - 1);
        let vms: BTreeMap<String, serde_json::Value> = reservations
            .iter()
            .map(|(id, r)| (id.to_string(), json!({"phase": r.phase, "isolated": r.settings.isolated, "alive": r.is_alive(root), "bounds": bounds(r), "settings": r.settings})))
            .collect();
        out(&format!("{:#}\n", json!({"vms": vms, "isolated": isolated, "strays": strays, "missed": missed})));
    } else {
        out(&text(root, &reservations, &isolated, &strays));
    }
    Ok(if missed == 0 { Exit::Done } else { Exit::Failed })
}

fn text(root: &Sysroot, reservations: &BTreeMap<u32, Reservation>, isolated: &CpuSet, strays: &[Stray]) -> String {
    if reservations.is_empty() {
        return "no CPU is isolated\n".into();
    }
    let mut text = String::new();
    for (id, reservation) in reservations {
        let phase = match reservation.phase {
            Phase::Leaving => "is giving back",
            Phase::Idle => "has its idle VM started and gave back",
            Phase::Starting => "is starting, to have",
            Phase::Isolating => "is being given",
            Phase::Isolated => "has",
        };
        let dead = if reservation.is_alive(root) { "" } else { ", but runs no more: `hook recover` gives them back" };
        text += &format!("VM {id} {phase} CPU {}{dead}\n", reservation.settings.isolated);
        let Bounds { pre_start, post_start, post_stop } = reservation.settings.deadlines.bounds(reservations.len() - 1);
        text += &format!(
            "  whatever hangs, its pre-start ends within {pre_start} s, post-start {post_start} s, post-stop {post_stop} s\n"
        );
    }
    for (class, title) in [
        (Class::Stray, "strays (could be elsewhere)"),
        (Class::ManagedIrq, "IRQs the kernel does not let go"),
        (Class::KernelBound, "threads the kernel binds"),
    ] {
        let of_class: Vec<&Stray> = strays.iter().filter(|stray| stray.class == class).collect();
        text += &format!("{title}: {}\n", of_class.len());
        for cpu in isolated.iter() {
            let on: Vec<&str> = of_class.iter().filter(|s| s.cpus.contains(cpu)).map(|s| s.object.as_str()).collect();
            match class {
                _ if on.is_empty() => {}
                Class::KernelBound => text += &format!("  CPU {cpu}: {}\n", kinds(&on)),
                _ => text += &format!("  CPU {cpu}: {}\n", on.join(", ")),
            }
        }
    }
    text
}

/// What the kernel binds comes in a few kinds, the same on every CPU: `kthread 40 (kworker/6:0-events)` is a kworker.
fn kinds(objects: &[&str]) -> String {
    let mut counts = BTreeMap::new();
    for object in objects {
        let name = object.split_once('(').map_or(*object, |(_, name)| name.trim_end_matches(')'));
        let kind = if name.starts_with("kworker/R-") { "rescuer" } else { name.split('/').next().unwrap_or(name) };
        *counts.entry(kind).or_insert(0) += 1;
    }
    let shown = counts.iter().map(|(kind, count)| match count {
        1 => (*kind).to_owned(),
        _ => format!("{kind} x{count}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}

//! `hook status` for monitoring: Prometheus' text format, and a line as Nagios' plugins print it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use pinfold_core::sys::cgroup;
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Exit, Host, Result};

use crate::state::counters::Counters;
use crate::state::reservation::{Isolation, Reservation};
use crate::state::{counters, step_times};
use crate::strays::{Class, Stray};

/// What `hook status` has found.
pub(super) struct Seen<'a> {
    pub reservations: &'a BTreeMap<u32, Reservation>,
    /// The CPUs of all fenced VMs.
    pub isolated: &'a CpuSet,
    pub strays: &'a [Stray],
}

/// A VM that is fenced, as monitoring sees it.
struct Vm<'a> {
    id: u32,
    reservation: &'a Reservation,
    alive: bool,
    /// Whether the kernel keeps its CPUs isolated; none by hotplug, which has no such state.
    partition_valid: Option<bool>,
}

fn vms<'a>(root: &Host, view: &Seen<'a>) -> Result<Vec<Vm<'a>>> {
    let isolated = cgroup::isolated(root)?.unwrap_or_default();
    let fenced = view.reservations.iter().filter(|(_, it)| it.is_fenced());
    Ok(fenced
        .map(|(id, reservation)| Vm {
            id: *id,
            reservation,
            alive: VmId::try_from(*id).is_ok_and(|vmid| reservation.is_alive(root, vmid)),
            partition_valid: (reservation.isolation == Isolation::Partition)
                .then(|| reservation.settings.isolated.is_subset(&isolated)),
        })
        .collect())
}

/// The strays by class, with those that are none.
fn by_class(view: &Seen<'_>) -> BTreeMap<&'static str, usize> {
    let classes = [
        (Class::Stray, "stray"),
        (Class::ManagedIrq, "managed_irq"),
        (Class::MovingIrq, "moving_irq"),
        (Class::KernelBound, "kernel_bound"),
    ];
    let count = |class| view.strays.iter().filter(|it| it.class == class).count();
    classes
        .map(|(class, name)| (name, count(class)))
        .into_iter()
        .collect()
}

/// A metric: its name, what it is, and its values with their labels.
fn metric(text: &mut String, name: &str, help: &str, values: &[(String, f64)]) {
    if values.is_empty() {
        return;
    }
    // Writing to a String cannot fail.
    let _ = writeln!(text, "# HELP pinfold_{name} {help}");
    let _ = writeln!(text, "# TYPE pinfold_{name} gauge");
    for (labels, value) in values {
        let _ = writeln!(text, "pinfold_{name}{labels} {value}");
    }
}

/// The metrics, for node_exporter's textfile collector.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn metrics(root: &Host, view: &Seen<'_>) -> Result<String> {
    let vms = vms(root, view)?;
    let mut text = String::new();
    let of_vms = |value: fn(&Vm<'_>) -> f64| -> Vec<(String, f64)> {
        let one = |vm: &Vm<'_>| (format!("{{vmid=\"{}\"}}", vm.id), value(vm));
        vms.iter().map(one).collect()
    };
    let count = |number: usize| u32::try_from(number).map_or(f64::INFINITY, f64::from);
    let all = |number: usize| [(String::new(), count(number))];
    metric(&mut text, "vms", "VMs with isolated CPUs.", &all(vms.len()));
    metric(
        &mut text,
        "isolated_cpus",
        "CPUs that are isolated for VMs.",
        &all(view.isolated.len()),
    );
    metric(
        &mut text,
        "vm_cpus",
        "CPUs that are isolated for the VM.",
        &of_vms(|vm| {
            u32::try_from(vm.reservation.settings.isolated.len()).map_or(f64::INFINITY, f64::from)
        }),
    );
    metric(
        &mut text,
        "vm_alive",
        "1 if the VM runs, 0 if it has stopped and its CPUs are not released.",
        &of_vms(|vm| f64::from(u8::from(vm.alive))),
    );
    metric(
        &mut text,
        "vm_failed_changes",
        "Changes that failed when the VM was isolated.",
        &of_vms(|vm| u32::try_from(vm.reservation.failed).map_or(f64::INFINITY, f64::from)),
    );
    let partitions: Vec<(String, f64)> = vms
        .iter()
        .filter_map(|vm| {
            let valid = vm.partition_valid?;
            let labels = format!("{{vmid=\"{}\"}}", vm.id);
            Some((labels, f64::from(u8::from(valid))))
        })
        .collect();
    metric(
        &mut text,
        "vm_partition_valid",
        "1 if the kernel keeps the VM's CPUs isolated.",
        &partitions,
    );
    let strays: Vec<(String, f64)> = by_class(view)
        .into_iter()
        .map(|(class, number)| (format!("{{class=\"{class}\"}}"), count(number)))
        .collect();
    metric(
        &mut text,
        "strays",
        "What can run on isolated CPUs; class stray could be elsewhere.",
        &strays,
    );
    let mut seconds = Vec::new();
    for vm in &vms {
        let steps = VmId::try_from(vm.id).and_then(|vmid| step_times::last(root, vmid));
        for (step, time) in steps.unwrap_or_default() {
            seconds.push((format!("{{vmid=\"{}\",step={step:?}}}", vm.id), time));
        }
    }
    metric(
        &mut text,
        "post_start_step_seconds",
        "How long each step of the VM's last post-start took.",
        &seconds,
    );
    waits(root, &vms, &mut text);
    Ok(text)
}

/// How long vCPUs waited for a CPU: of VMs that run, and of the last runs. What cannot be read is
/// left out.
fn waits(root: &Host, vms: &[Vm<'_>], text: &mut String) {
    let now = vms.iter().filter(|vm| vm.alive).filter_map(|vm| {
        let counters = Counters::read(root, vm.reservation.qemu.as_ref()?);
        Some((vm.id, counters.ok().flatten()?))
    });
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
    let values = |all: Vec<(u32, Counters)>, value: fn(&Counters) -> u64| -> Vec<(String, f64)> {
        let one = |(id, it): (u32, Counters)| (format!("{{vmid=\"{id}\"}}"), seconds(value(&it)));
        all.into_iter().map(one).collect()
    };
    let now: Vec<_> = now.collect();
    let last: Vec<_> = counters::all(root)
        .unwrap_or_default()
        .into_iter()
        .collect();
    metric(
        text,
        "vm_steal_seconds",
        "How long the VM's vCPUs have waited for a CPU since it was started, all together.",
        &values(now, |it| it.steal_ns),
    );
    metric(
        text,
        "vm_last_run_steal_seconds",
        "The same of its last run until pre-stop.",
        &values(last.clone(), |it| it.steal_ns),
    );
    metric(
        text,
        "vm_last_run_longest_steal_seconds",
        "How long the vCPU waited that waited longest.",
        &values(last, |it| it.longest_ns),
    );
}

/// A line with performance data, and Nagios' exit code: 0, 1 for strays and failed changes, 2 for
/// a VM that has stopped and keeps its CPUs or a partition that is not valid.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn nagios(root: &Host, view: &Seen<'_>) -> Result<(String, Exit)> {
    let vms = vms(root, view)?;
    let ids = |is: fn(&&Vm<'_>) -> bool| -> Vec<String> {
        let those = vms.iter().filter(is);
        those.map(|vm| vm.id.to_string()).collect()
    };
    let dead = ids(|vm| !vm.alive);
    let invalid = ids(|vm| vm.partition_valid == Some(false));
    let failed: usize = vms.iter().map(|vm| vm.reservation.failed).sum();
    let strays = by_class(view)["stray"];
    let mut faults = Vec::new();
    if !dead.is_empty() {
        faults.push(format!(
            "VM {} has stopped and keeps its CPUs",
            dead.join(", ")
        ));
    }
    if !invalid.is_empty() {
        faults.push(format!(
            "the partition of VM {} is not valid",
            invalid.join(", ")
        ));
    }
    // 2 is CRITICAL to Nagios.
    let exit = match (faults.is_empty(), strays + failed) {
        (false, _) => Exit::Usage,
        (true, 0) => Exit::Success,
        (true, _) => Exit::Failed,
    };
    if strays > 0 {
        faults.push(format!("strays: {strays}"));
    }
    if failed > 0 {
        faults.push(format!("failed changes: {failed}"));
    }
    let word = match exit {
        Exit::Success => "OK",
        Exit::Failed => "WARNING",
        Exit::Usage | Exit::Unknown | Exit::Partial => "CRITICAL",
    };
    if faults.is_empty() {
        faults.push("no strays".to_owned());
    }
    let text = format!(
        "PINFOLD {word} - {} VMs on {} isolated CPUs; {} | vms={} cpus={} strays={strays};0 failed={failed};0\n",
        vms.len(),
        view.isolated.len(),
        faults.join("; "),
        vms.len(),
        view.isolated.len(),
    );
    Ok((text, exit))
}

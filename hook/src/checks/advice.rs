//! Checks that only warn: `hook check` reports all of them, pre-start what interferes with the VM.

use pinfold_core::sys::cpu;
use pinfold_core::sys::sched::SchedPolicy;
use pinfold_core::vm::{VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;
use super::shared_readings::SharedReadings;
use super::{devices, host, memory, place};
use crate::settings::Settings;
use crate::state::reservation::owner;

/// All advice for a VM with settings.
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn findings(
    around: &SharedReadings<'_>,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let (root, topology) = (around.root, around.cpus.topology()?);
    let mut findings = host::findings(around, vmid, conf, &settings.isolated)?;
    findings.extend(place::findings(around, vmid, conf, settings)?);
    findings.extend(devices::findings(root, vmid, conf, settings)?);
    findings.push(memory::hugepages(root, topology, conf, &settings.isolated)?);
    findings.extend(memory::numa_nodes(vmid, conf));
    findings.extend(memory::size(root, topology, conf, &settings.isolated));
    findings.push(helpers(conf, settings));
    if let Some(policy) = settings.vcpu_policy {
        findings.push(vcpu_policy(root, conf, settings, policy)?);
    }
    Ok(findings)
}

/// What may interfere with the VM while it runs. pre-start reports the warnings, too.
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn interference(
    around: &SharedReadings<'_>,
    vmid: VmId,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Vec<Finding>> {
    let mut findings = vec![match &conf.affinity {
        None => Finding::ok("affinity", "not set, so the pins are the only affinity"),
        Some(affinity) => Finding::warn(
            "affinity",
            format!("VM {vmid}: `affinity: {affinity}` is also set; the pins take precedence"),
            format!("remove it: qm set {vmid} --delete affinity"),
        ),
    }];
    let mut shut_out = Vec::new();
    for (other, conf) in around.vms()? {
        let Some(affinity) = conf.as_ref().ok().and_then(|conf| conf.affinity.as_ref()) else {
            continue;
        };
        if *other != vmid && !affinity.is_empty() && affinity.is_subset(isolated) {
            shut_out.push(Finding::warn(
                "other VMs",
                format!(
                    "VM {other} has `affinity: {affinity}`, and all of these CPUs are isolated: \
                     it cannot start while {} runs",
                    owner(vmid.into())
                ),
                format!("use other CPUs: qm set {other} --affinity LIST"),
            ));
        }
    }
    if shut_out.is_empty() {
        shut_out.push(Finding::ok(
            "other VMs",
            "none is confined to the isolated CPUs by `affinity:`",
        ));
    }
    findings.append(&mut shut_out);
    findings.extend(host::irqbalance(around, isolated)?);
    findings.push(if siblings_inside(around.root, isolated)? {
        Finding::ok("SMT", "whole cores are isolated")
    } else {
        let what = format!(
            "CPU {isolated} does not include all SMT siblings: what runs on them slows the VM's cores"
        );
        Finding::warn("SMT", what, "isolate whole cores; `hook layout` shows them")
    });
    Ok(findings)
}

fn siblings_inside(root: &Host, isolated: &CpuSet) -> Result<bool> {
    for cpu in isolated.iter() {
        if !cpu::siblings(root, cpu)?.is_subset(isolated) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a real-time policy of the vCPUs keeps from running (Documentation/scheduler/sched-rt-group.rst).
fn vcpu_policy(
    root: &Host,
    conf: &VmConf,
    settings: &Settings,
    policy: SchedPolicy,
) -> Result<Finding> {
    const CHECK: &str = "vcpu_policy";
    let number = |name: &str| -> Result<Option<i64>> {
        let text = root.read_value(format!("proc/sys/kernel/{name}"))?;
        Ok(text.and_then(|text| text.parse().ok()))
    };
    let shared = settings.sharing(conf.vcpus() as usize);
    if let Some((cpu, vcpus)) = shared.first_key_value() {
        let what = format!(
            "{policy}: one of vCPUs {vcpus}, which share CPU {cpu}, keeps the others from running"
        );
        return Ok(Finding::warn(
            CHECK,
            what,
            "give each vCPU a CPU of its own, or leave vcpu_policy out",
        ));
    }
    let period = number("sched_rt_period_us")?.unwrap_or(1_000_000);
    let runtime = number("sched_rt_runtime_us")?.unwrap_or(950_000);
    let starved = format!(
        "{policy}: while a vCPU computes, the kernel threads of its CPU (ksoftirqd, kworker, RCU callbacks) wait"
    );
    if runtime < 0 || runtime >= period {
        let what = format!(
            "{starved} without end, since kernel.sched_rt_runtime_us is {runtime}: RCU stalls, and the host may hang"
        );
        return Ok(Finding::warn(
            CHECK,
            what,
            "sysctl kernel.sched_rt_runtime_us=950000",
        ));
    }
    let what = format!(
        "{starved}; they get {} of {} ms at once, and the vCPU waits that long",
        (period - runtime) / 1000,
        period / 1000
    );
    let fix = format!(
        "kernel options rcu_nocbs={0} and nohz_full={0} leave them less to do; `hook jitter VMID --fifo` measures, before the VM starts",
        settings.isolated
    );
    Ok(Finding::warn(CHECK, what, fix))
}

/// The CPUs of the processes beside QEMU.
fn helpers(conf: &VmConf, settings: &Settings) -> Finding {
    let names = [("swtpm", conf.tpm), ("virtiofsd", conf.virtiofs)];
    let names: Vec<&str> = names
        .iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| *name)
        .collect();
    let go = if names.len() > 1 { "go" } else { "goes" };
    let names = names.join(" and ");
    let what = match &settings.emulator {
        _ if names.is_empty() => "none".into(),
        Some(cpus) => format!("{names} {go} with the emulator threads to CPU {cpus}"),
        None => {
            let of = match settings.near.is_empty() {
                true => "",
                false => " of the VM's NUMA nodes",
            };
            format!("{names} {go} with the emulator threads to the housekeeping CPUs{of}")
        }
    };
    Finding::ok("helpers", what)
}

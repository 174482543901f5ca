//! Checks that only warn: `hook check` reports all of them, pre-start what interferes with the VM.

use pinfold_core::sys::cpu;
use pinfold_core::vm::{VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;
use super::shared_readings::SharedReadings;
use super::{devices, host, memory, place};
use crate::settings::Settings;

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
                     it cannot start while VM {vmid} runs"
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

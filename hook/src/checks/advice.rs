//! Checks that only warn: `hook check` reports all of them, pre-start what interferes with the VM.

use std::collections::BTreeSet;

use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;
use super::surroundings::{Balancer, Surroundings};
use super::{devices, host, memory, place};
use crate::settings::Settings;

/// All advice for a VM with settings.
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn findings(
    around: &Surroundings<'_>,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let (root, topology) = (around.root, around.cpus.topology()?);
    let mut findings = host::findings(around, vmid, conf, &settings.isolated)?;
    findings.extend(place::findings(around, vmid, conf, settings)?);
    findings.extend(devices::findings(root, vmid, conf, settings)?);
    findings.push(match hugepages(root, topology, conf, &settings.isolated)? {
        Some(far) => far,
        None => memory::hugepages(root, conf)?,
    });
    findings.extend(memory::numa_nodes(vmid, conf));
    findings.push(helpers(conf, settings));
    Ok(findings)
}

/// What may interfere with the VM while it runs. pre-start reports the warnings, too.
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn interference(
    around: &Surroundings<'_>,
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
    let mut balancers = Vec::new();
    for Balancer { pid, banned } in around.balancers()? {
        balancers.push(if isolated.is_subset(banned) {
            Finding::ok(
                "irqbalance",
                format!("irqbalance (process {pid}) does not use CPU {isolated}"),
            )
        } else {
            Finding::warn(
                "irqbalance",
                format!("irqbalance (process {pid}) moves IRQs back within 10 s"),
                format!("stop it, or set IRQBALANCE_BANNED_CPULIST={isolated}"),
            )
        });
    }
    if balancers.is_empty() {
        balancers.push(Finding::ok("irqbalance", "not running"));
    }
    findings.append(&mut balancers);
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

/// That no huge pages are on the nodes of the isolated CPUs, and some on others
/// (admin-guide/mm/hugetlbpage.rst).
fn hugepages(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Option<Finding>> {
    const CHECK: &str = "hugepages";
    let wanted = vm::huge_pages(root, conf);
    let sizes: BTreeSet<u64> = wanted.iter().map(|pages| pages.kib).collect();
    let Some(largest) = sizes.last() else {
        return Ok(None);
    };
    let nodes = topology.domains(Kind::Node);
    let (mut near, mut far) = (0, Vec::new());
    for node in nodes {
        for size in &sizes {
            let path = format!(
                "sys/devices/system/node/node{}/hugepages/hugepages-{size}kB/nr_hugepages",
                node.number
            );
            let pages: u64 = root
                .read_value(path)?
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            if node.cpus.intersects(isolated) {
                near += pages;
            } else if pages > 0 {
                far.push(format!("node {}", node.number));
            }
        }
    }
    far.dedup();
    let own: Vec<String> = nodes
        .iter()
        .filter(|node| node.cpus.intersects(isolated))
        .map(|node| node.number.to_string())
        .collect();
    if near > 0 || far.is_empty() {
        return Ok(None);
    }
    let what = format!(
        "all on {}, but the isolated CPUs are on node {}",
        far.join(", "),
        own.join(", ")
    );
    let file = format!(
        "/sys/devices/system/node/node{}/hugepages/hugepages-{}kB/nr_hugepages",
        own.join(","),
        largest
    );
    let fix = format!("reserve them there, in {file}");
    Ok(Some(Finding::warn(CHECK, what, fix)))
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

//! Whether the VM's huge pages are there, and its memory is where its settings say.

use std::collections::BTreeSet;

use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::{self, HugePages, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;

const CHECK: &str = "hugepages";

/// That `numaN` has no effect without `numa: 1`.
pub(super) fn numa_nodes(vmid: VmId, conf: &VmConf) -> Option<Finding> {
    if conf.numa || conf.numa_nodes.is_empty() {
        return None;
    }
    let names: Vec<String> = conf
        .numa_nodes
        .iter()
        .map(|node| format!("numa{}", node.index))
        .collect();
    Some(Finding::warn(
        "numa",
        format!(
            "{} has no effect without `numa: 1`: no memory is bound to a node",
            names.join(", ")
        ),
        format!("qm set {vmid} --numa 1"),
    ))
}

/// Whether the nodes of the isolated CPUs have the pages that Proxmox VE asks for.
///
/// It makes what is missing at the start,
/// which fails if memory is fragmented (`hugepages_allocate` in `PVE::QemuServer::Memory`).
///
/// # Errors
/// If sysfs cannot be read.
pub(super) fn hugepages(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Finding> {
    if let Some(far) = on_other_nodes(root, topology, conf, isolated)? {
        return Ok(far);
    }
    if conf.hugepages.is_none() {
        return Ok(Finding::ok(CHECK, "not configured"));
    }
    if !conf.numa {
        return Ok(Finding::ok(
            CHECK,
            "not checked: Proxmox VE refuses them without `numa: 1`",
        ));
    }
    let mut short = Vec::new();
    let mut enough = Vec::new();
    for wanted in vm::huge_pages(root, conf) {
        let HugePages { node, kib, pages } = wanted;
        let (size, unit) = match kib {
            vm::SMALL => ("2M", "2M pages"),
            _ => ("1G", "1G pages"),
        };
        let folder = wanted.folder();
        let mut free: u64 = 0;
        for file in ["nr_hugepages", "free_hugepages"] {
            let text = root.read_value(format!("{folder}/{file}"))?;
            free = text.and_then(|text| text.parse().ok()).unwrap_or(free);
        }
        if free < pages {
            short.push(format!(
                "node {node}: {free} of {pages} {unit} are free; Proxmox VE has to make {} at the start",
                pages - free
            ));
        } else {
            enough.push(format!(
                "node {node}: {free} free pages of {size}, {pages} needed"
            ));
        }
    }
    if short.is_empty() {
        return Ok(Finding::ok(CHECK, enough.join(", ")));
    }
    Ok(Finding::warn(
        CHECK,
        short.join("; "),
        "reserve them at boot, as with hugepagesz=1G hugepages=N, while memory is not fragmented",
    ))
}

/// That no huge pages are on the nodes of the isolated CPUs, and some on others
/// (admin-guide/mm/hugetlbpage.rst).
fn on_other_nodes(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Option<Finding>> {
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

/// Whether a node has so much memory at all; assumed if it is not known.
pub(super) fn has_room(root: &Host, node: usize, mib: u64) -> bool {
    let path = format!("sys/devices/system/node/node{node}/meminfo");
    let text = root.read(path).unwrap_or_default();
    let total = text.lines().find_map(|line| {
        let (_, rest) = line.split_once("MemTotal:")?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    total.is_none_or(|kib| mib * 1024 < kib)
}

/// The size of huge pages, as `hugepages` takes it, of which a node has enough free ones.
pub(super) fn free_pages_for(root: &Host, node: usize, mib: u64) -> Option<&'static str> {
    let is_enough = |kib: u64| {
        let path = format!(
            "sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/free_hugepages"
        );
        let free = root.read_value(path).ok().flatten()?.parse::<u64>().ok()?;
        ((mib * 1024).is_multiple_of(kib) && free * kib >= mib * 1024).then_some(())
    };
    let large = is_enough(vm::LARGE).map(|()| "1024");
    large.or_else(|| is_enough(vm::SMALL).map(|()| "2"))
}

//! Whether the VM's huge pages are there, and its memory is where its settings say.

use std::collections::BTreeSet;

use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::{self, HugePages, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;
use crate::own_steps::RESERVE;

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

/// That memory is more than there is where it should be.
pub(super) fn size(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Option<Finding> {
    let what = too_small_nodes(root, topology, conf, isolated)?;
    let fix = "give the VM less memory, or CPUs and memory of several nodes (numa0, numa1)";
    Some(Finding::warn("memory", what, fix))
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
    Ok(Finding::warn(CHECK, short.join("; "), RESERVE))
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

/// Whether the VM's memory is more than there is where it should be: on the nodes that `numaN` binds
/// it to, or, if nothing is bound, on the one node of its CPUs.
pub(crate) fn too_small_nodes(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Option<String> {
    if topology.domains(Kind::Node).len() < 2 {
        return None;
    }
    let is_short = |nodes: &CpuSet, mib: u64| {
        let of_each: Option<Vec<u64>> = nodes.iter().map(|node| total_mib(root, node)).collect();
        let there: u64 = of_each?.into_iter().sum();
        let word = if nodes.len() == 1 { "node" } else { "nodes" };
        let amount = |mib: u64| format!("{:.1} GiB", mib as f64 / 1024.0);
        (there < mib).then(|| (format!("{word} {nodes}"), amount(there), amount(mib)))
    };
    let bound = conf.numa_nodes.iter().filter(|_| conf.numa);
    let mut is_bound = false;
    for node in bound {
        let (Some(nodes), Some(mib)) = (&node.host_nodes, node.memory) else {
            continue;
        };
        is_bound = true;
        if let Some((nodes, there, wanted)) = is_short(nodes, mib) {
            let numa = format!("numa{}", node.index);
            return Some(format!(
                "{numa} binds {wanted} to NUMA {nodes}, with {there} in all"
            ));
        }
    }
    let nodes = topology.domains(Kind::Node).iter();
    let nodes = nodes.filter(|node| node.cpus.intersects(isolated));
    let nodes: CpuSet = nodes.map(|node| node.number).collect();
    if is_bound || nodes.len() != 1 {
        return None;
    }
    let (nodes, there, wanted) = is_short(&nodes, conf.memory_mib())?;
    Some(format!(
        "NUMA {nodes}, with the VM's CPUs, has {there} of memory in all, the VM {wanted}: a part of it \
         will be on other nodes"
    ))
}

/// The memory of a node; `None` if it is not known.
fn total_mib(root: &Host, node: usize) -> Option<u64> {
    let path = format!("sys/devices/system/node/node{node}/meminfo");
    let text = root.read(path).ok()?;
    let kib = text.lines().find_map(|line| {
        let (_, rest) = line.split_once("MemTotal:")?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    Some(kib? / 1024)
}

/// Whether a node has so much memory at all; assumed if it is not known.
pub(super) fn has_room(root: &Host, node: usize, mib: u64) -> bool {
    total_mib(root, node).is_none_or(|there| mib < there)
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

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::testutils::{machine, write};

    #[test]
    fn memory_that_a_node_does_not_have_is_named() {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&machine::text("two-sockets"), dir.path());
        for node in 0..2 {
            write(
                dir.path(),
                &format!("sys/devices/system/node/node{node}/meminfo"),
                &format!("Node {node} MemTotal:       33554432 kB\n"),
            );
        }
        let root = Host::new(dir.path());
        let topology = Topology::read(&root).unwrap();
        let [near, both] = [&topology.domains(Kind::Node)[1].cpus, &topology.online];
        for (conf, isolated, what) in [
            ("memory: 32768", near, None),
            (
                "memory: 40960",
                near,
                Some(
                    "NUMA node 1, with the VM's CPUs, has 32.0 GiB of memory in all, the VM 40.0 GiB: \
                     a part of it will be on other nodes",
                ),
            ),
            ("memory: 40960", both, None),
            (
                "memory: 40960\nnuma: 1\nnuma0: cpus=0-3,hostnodes=1,memory=40960",
                near,
                Some("numa0 binds 40.0 GiB to NUMA node 1, with 32.0 GiB in all"),
            ),
            (
                "memory: 98304\nnuma: 1\nnuma0: cpus=0-3,hostnodes=0-1,memory=98304",
                both,
                Some("numa0 binds 96.0 GiB to NUMA nodes 0-1, with 64.0 GiB in all"),
            ),
            (
                "memory: 40960\nnuma: 1\nnuma0: cpus=0-3,hostnodes=0-1,memory=40960",
                near,
                None,
            ),
        ] {
            let found = too_small_nodes(&root, &topology, &VmConf::parse(conf), isolated);
            assert_eq!(found.as_deref(), what, "{conf:?} on CPU {isolated}");
        }
    }
}

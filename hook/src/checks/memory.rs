//! Whether the VM's huge pages are there, and its memory is where its settings say.

use pinfold_core::vm::{self, HugePages, VmConf, VmId};
use pinfold_core::{Host, Result};

use super::finding::Finding;

/// The sizes of huge pages in KiB: 2M and 1G.
const SMALL: u64 = 2048;
const LARGE: u64 = 1_048_576;

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

/// Whether the nodes have the pages that Proxmox VE asks for.
///
/// It makes what is missing at the start,
/// which fails if memory is fragmented (`hugepages_allocate` in `PVE::QemuServer::Memory`).
///
/// # Errors
/// If sysfs cannot be read.
pub(super) fn hugepages(root: &Host, conf: &VmConf) -> Result<Finding> {
    const CHECK: &str = "hugepages";
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
            SMALL => ("2M", "2M pages"),
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
    let large = is_enough(LARGE).map(|()| "1024");
    large.or_else(|| is_enough(SMALL).map(|()| "2"))
}

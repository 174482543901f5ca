//! The huge pages that Proxmox VE asks for when a VM starts.

use std::collections::BTreeMap;

use super::conf::{Contradiction, VmConf};
use crate::cpuset::CpuSet;
use crate::sysroot::Sysroot;

/// The smaller size of huge pages, 2M, in KiB.
pub const SMALL: u64 = 2 * 1024;

/// The larger size of huge pages, 1G, in KiB.
pub const LARGE: u64 = 1024 * 1024;

/// Huge pages of one size on one NUMA node of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HugePages {
    /// The node's number.
    pub node: usize,
    /// The size of each in KiB.
    pub kib: u64,
    /// How many.
    pub pages: u64,
}

/// The pages that Proxmox VE asks for, by node and size (`hugepages_topology` in
/// `PVE::QemuServer::Memory`): for each `numaN` on its host node, else for each socket on the node
/// with its number. None if the VM has no `hugepages`, or no `numa: 1`, without which it does not
/// start.
pub fn huge_pages(root: &Sysroot, conf: &VmConf) -> Vec<HugePages> {
    let Some(size) = conf.hugepages.as_deref().filter(|_| conf.numa) else {
        return Vec::new();
    };
    let has_large = has_size(root, LARGE);
    let mut pages: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for (node, mib) in parts(conf) {
        let kib = match size {
            "2" => SMALL,
            "1024" => LARGE,
            _ if has_large && mib.is_multiple_of(1024) => LARGE,
            _ => SMALL,
        };
        let count = mib.saturating_mul(1024).div_ceil(kib);
        let all = pages.entry((node, kib)).or_default();
        *all = all.saturating_add(count);
    }
    let page = |((node, kib), pages)| HugePages { node, kib, pages };
    pages.into_iter().map(page).collect()
}

/// The memory in MiB that is asked for at once, by the host's node.
fn parts(conf: &VmConf) -> Vec<(usize, u64)> {
    if conf.numa_nodes.is_empty() {
        let sockets = conf.sockets.unwrap_or(1).max(1);
        let each = conf.memory_mib() / u64::from(sockets);
        return (0..sockets as usize).map(|node| (node, each)).collect();
    }
    let nodes = conf.numa_nodes.iter();
    nodes
        .filter_map(|node| {
            let host_node = node.host_nodes.as_ref().and_then(CpuSet::first)?;
            Some((host_node, node.memory?))
        })
        .collect()
}

fn has_size(root: &Sysroot, kib: u64) -> bool {
    root.exists(format!("sys/kernel/mm/hugepages/hugepages-{kib}kB"))
}

/// Why Proxmox VE refuses to start the VM with its huge pages, by its own rules (`config` and
/// `hugepages_size` in `PVE::QemuServer::Memory`). That there are too few pages is not among these:
/// Proxmox VE makes them.
pub fn refused_huge_pages(root: &Sysroot, conf: &VmConf) -> Option<String> {
    let size = conf.hugepages.as_deref()?;
    let of_memory = |found: &Contradiction| {
        matches!(
            found,
            Contradiction::HugepagesWithoutNuma
                | Contradiction::HugepagesSize(_)
                | Contradiction::Numa { .. }
        )
    };
    if let Some(found) = conf.contradictions().into_iter().find(of_memory) {
        return Some(found.to_string());
    }
    // With memory hotplug other amounts are asked for.
    let hotplug = conf.hotplug.as_deref().unwrap_or_default();
    if hotplug.split([',', ';', ' ']).any(|part| part == "memory") {
        return None;
    }
    let why = parts(conf).into_iter().find_map(|(node, mib)| {
        let sizes: &[u64] = match size {
            "2" => &[SMALL],
            "1024" => &[LARGE],
            _ => &[LARGE, SMALL],
        };
        let mut sizes = sizes.iter().filter(|kib| has_size(root, **kib)).peekable();
        if sizes.peek().is_none() {
            return Some(format!("this host has no huge pages of {size} MiB"));
        }
        if mib == 0 || !sizes.any(|kib| (mib * 1024).is_multiple_of(*kib)) {
            return Some(format!(
                "{mib} MiB of memory on node {node} are not a multiple of its huge pages"
            ));
        }
        let is_there = root.exists(format!("sys/devices/system/node/node{node}"));
        (!is_there).then(|| format!("this host has no NUMA node {node}"))
    });
    why.map(|why| format!("Proxmox VE refuses to start: {why}"))
}

impl HugePages {
    /// Their memory in KiB.
    pub fn memory(&self) -> u64 {
        self.pages.saturating_mul(self.kib)
    }

    /// The folder that the kernel has for pages of this size on this node, below the root.
    pub fn folder(&self) -> String {
        let Self { node, kib, .. } = self;
        format!("sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_as_proxmox_ve_asks_for_them() {
        let bound = "memory: 5096\nnuma0: cpus=0-3,hostnodes=1,memory=4096,policy=bind\n\
                     numa1: cpus=4-7,hostnodes=0,memory=1000,policy=bind";
        let dir = tempfile::tempdir().unwrap();
        let large = dir
            .path()
            .join("sys/kernel/mm/hugepages/hugepages-1048576kB");
        for (has_large, conf, pages) in [
            (true, "hugepages: 1024\nmemory: 20480", "0/1024=20"),
            (
                true,
                "hugepages: 1024\nmemory: 4096\nsockets: 2",
                "0/1024=2 1/1024=2",
            ),
            (true, "hugepages: 2", "0/2=256"),
            (true, &format!("hugepages: 2\n{bound}"), "0/2=500 1/2=2048"),
            // Of each part the largest size that fits, if the kernel has it.
            (
                true,
                &format!("hugepages: any\n{bound}"),
                "0/2=500 1/1024=4",
            ),
            (
                false,
                &format!("hugepages: any\n{bound}"),
                "0/2=500 1/2=2048",
            ),
            (true, "hugepages: any\nmemory: 1000", "0/2=500"),
            (true, "hugepages: any\nmemory: 2048", "0/1024=2"),
            (true, "memory: 2048", ""),
            (true, "hugepages: 2\nnuma: 0", ""),
        ] {
            match has_large {
                true => std::fs::create_dir_all(&large).unwrap(),
                false => std::fs::remove_dir_all(&large).unwrap(),
            }
            let conf = VmConf::parse(&format!("numa: 1\n{conf}"));
            let shown: Vec<String> = huge_pages(&Sysroot::new(dir.path()), &conf)
                .iter()
                .map(|HugePages { node, kib, pages }| format!("{node}/{}={pages}", kib / 1024))
                .collect();
            assert_eq!(shown.join(" "), pages, "{conf:?}");
        }
    }

    #[test]
    fn refused_as_proxmox_ve_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str| std::fs::create_dir_all(dir.path().join(path)).unwrap();
        make("sys/kernel/mm/hugepages/hugepages-2048kB");
        make("sys/devices/system/node/node0");
        let refused = |conf: &str| {
            let why = refused_huge_pages(&Sysroot::new(dir.path()), &VmConf::parse(conf));
            let why = why.unwrap_or_default();
            why.trim_start_matches("Proxmox VE refuses to start: ")
                .to_owned()
        };
        for (conf, why) in [
            ("memory: 2047", ""),
            ("hugepages: 2\nnuma: 1\nmemory: 2048", ""),
            ("hugepages: any\nnuma: 1\nmemory: 2048", ""),
            ("hugepages: 2\nnuma: 1\nmemory: 99999998", ""),
            ("hugepages: 2\nmemory: 2048", "hugepages needs `numa: 1`"),
            (
                "hugepages: 1024\nnuma: 1\nmemory: 2048",
                "this host has no huge pages of 1024 MiB",
            ),
            (
                "hugepages: any\nnuma: 1\nmemory: 2047",
                "2047 MiB of memory on node 0 are not a multiple of its huge pages",
            ),
            (
                "hugepages: 2\nnuma: 1\nmemory: 2048\nsockets: 2",
                "this host has no NUMA node 1",
            ),
            (
                "hugepages: 2\nnuma: 1\nmemory: 2048\nnuma0: cpus=0,memory=2048",
                "numa0: hugepages needs hostnodes",
            ),
            ("hugepages: 1024\nnuma: 1\nhotplug: disk,memory", ""),
        ] {
            assert_eq!(refused(conf), why, "{conf:?}");
        }
        make("sys/kernel/mm/hugepages/hugepages-1048576kB");
        assert_eq!(refused("hugepages: any\nnuma: 1\nmemory: 1022"), "");
        assert_eq!(
            refused("hugepages: 1024\nnuma: 1\nmemory: 1022"),
            "1022 MiB of memory on node 0 are not a multiple of its huge pages"
        );
    }
}

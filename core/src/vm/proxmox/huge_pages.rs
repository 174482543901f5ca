//! The huge pages that Proxmox VE asks for when a VM starts.

use std::collections::BTreeMap;

use super::conf::VmConf;
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
    let has_large = root.exists(format!("sys/kernel/mm/hugepages/hugepages-{LARGE}kB"));
    let mut parts: Vec<(usize, u64)> = conf
        .numa_nodes
        .iter()
        .filter_map(|node| {
            Some((
                node.host_nodes.as_ref().and_then(CpuSet::first)?,
                node.memory?,
            ))
        })
        .collect();
    if conf.numa_nodes.is_empty() {
        let sockets = conf.sockets.unwrap_or(1).max(1);
        let each = conf.memory_mib() / u64::from(sockets);
        parts = (0..sockets as usize).map(|node| (node, each)).collect();
    }
    let mut pages: BTreeMap<(usize, u64), u64> = BTreeMap::new();
    for (node, mib) in parts {
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
}

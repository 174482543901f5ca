//! What a guest needs of the host.

use pinfold_core::CpuSet;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::VmConf;

/// vCPUs of a guest whose memory is bound to NUMA nodes of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    /// The vCPUs, by number.
    pub vcpus: CpuSet,
    /// The host's NUMA nodes, by number.
    pub nodes: CpuSet,
}

/// What a guest needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Guest {
    /// All vCPUs it can have.
    pub vcpus: usize,
    /// The threads of each of its cores; 1 for a guest without SMT.
    pub threads: usize,
    /// Its NUMA cells with memory bound to the host's nodes.
    pub cells: Vec<Cell>,
    /// The NUMA nodes of the host's devices that it gets.
    pub device_nodes: CpuSet,
}

impl Guest {
    /// A guest by its settings; `device_nodes` are the NUMA nodes of its devices.
    pub(crate) fn new(conf: &VmConf, device_nodes: CpuSet) -> Self {
        Self {
            vcpus: conf.vcpus().max(conf.max_vcpus()) as usize,
            threads: conf.threads_per_core(),
            cells: cells(conf),
            device_nodes,
        }
    }

    /// The host's NUMA nodes that its memory is bound to; none if it is not bound.
    pub(crate) fn memory_nodes(&self) -> CpuSet {
        self.cells
            .iter()
            .flat_map(|cell| cell.nodes.iter())
            .collect()
    }
}

/// The cells of a guest whose memory is bound to nodes of the host, those on the same nodes
/// together. Without `numa: 1` Proxmox VE binds nothing.
pub(crate) fn cells(conf: &VmConf) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for node in conf.numa_nodes.iter().filter(|_| conf.numa) {
        let Some(nodes) = node.host_nodes.as_ref().filter(|nodes| !nodes.is_empty()) else {
            continue;
        };
        match cells.iter_mut().find(|cell| cell.nodes == *nodes) {
            Some(cell) => cell.vcpus = &cell.vcpus | &node.vcpus,
            None => cells.push(Cell {
                vcpus: node.vcpus.clone(),
                nodes: nodes.clone(),
            }),
        }
    }
    cells
}

/// The CPUs of NUMA nodes.
pub(crate) fn cpus_of_nodes(topology: &Topology, nodes: &CpuSet) -> CpuSet {
    topology
        .domains(Kind::Node)
        .iter()
        .filter(|node| nodes.contains(node.number))
        .flat_map(|node| node.cpus.iter())
        .collect()
}

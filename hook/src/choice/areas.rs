//! Where a guest could be: the parts of the machine with one cache and one memory, and groups of
//! neighbouring ones.

use std::cmp::Reverse;
use std::rc::Rc;

use pinfold_core::CpuSet;
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Domain, Kind, Topology};

/// All areas of a machine, and what else a choice needs to know of it: found once for all guests.
#[derive(Debug)]
pub(crate) struct Areas {
    /// The CPUs of the LLC domains with 3D V-Cache.
    pub vcache: CpuSet,
    /// The CPUs that guests may have: whole cores but for that of CPU 0.
    pub(super) usable: CpuSet,
    /// Whether CPU 0 shares a known cache.
    pub(super) shares_cache: bool,
    /// The most threads that a core has.
    pub(super) threads: usize,
    /// By package and node, with all their cores.
    all: Vec<Area>,
}

/// What an LLC domain and a NUMA node have in common.
#[derive(Debug, Clone)]
pub(super) struct Area {
    /// The position of its package among the packages.
    pub package: usize,
    /// The position of its node among the nodes.
    pub node: usize,
    /// The position of its LLC domain among the LLC domains.
    pub llc: usize,
    /// Whether CPU 0, the host's own, shares its cache.
    pub beside_host: bool,
    /// The number of CPUs in the LLC domain.
    pub size: usize,
    /// The cores that a guest may have, the last ones first.
    pub cores: Rc<[CpuSet]>,
    /// Their CPUs.
    cpus: CpuSet,
    /// How many these are.
    pub room: usize,
}

/// Neighbouring areas.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub areas: Vec<&'a Area>,
    /// Its position among parts of a machine that sysfs does not show (the CCDs of Zen 2 have two
    /// LLC domains each): whether it does not begin at a multiple of its size in its node or
    /// package, and how many pairs it splits.
    pub unaligned: (bool, usize),
}

impl Areas {
    pub(crate) fn new(topology: &Topology) -> Self {
        let position = |kind: Kind, cpus: &CpuSet| {
            let domains = topology.domains(kind);
            domains
                .iter()
                .position(|domain: &Domain| domain.cpus.intersects(cpus))
                .unwrap_or(domains.len())
        };
        let mut all = Vec::new();
        for (node, of_node) in topology.domains(Kind::Node).iter().enumerate() {
            for (at, llc) in topology.domains(Kind::Llc).iter().enumerate() {
                let cpus = &llc.cpus & &of_node.cpus;
                if cpus.is_empty() {
                    continue;
                }
                let mut cores: Vec<CpuSet> = topology.cores_of(&cpus).cloned().collect();
                cores.retain(|core| core.is_subset(&cpus));
                cores.reverse();
                let area = Area {
                    package: position(Kind::Package, &cpus),
                    node,
                    llc: at,
                    beside_host: llc.cpus.contains(cpu::BOOT_CPU),
                    size: llc.cpus.len(),
                    cores: Rc::default(),
                    cpus,
                    room: 0,
                };
                all.push(area.with_cores(cores));
            }
        }
        all.sort_by_key(|area| (area.package, area.node));
        let boot = topology.core_of(cpu::BOOT_CPU);
        let boot = boot.and_then(|at| topology.cores.get(at));
        Self {
            vcache: topology.vcache_cpus(),
            usable: &topology.online - boot.unwrap_or(&CpuSet::new()),
            shares_cache: (topology.domains(Kind::Llc).iter())
                .any(|llc| llc.cpus.contains(cpu::BOOT_CPU) && llc.extent.is_cache()),
            threads: topology.cores.iter().map(CpuSet::len).max().unwrap_or(1),
            all,
        }
    }

    /// The areas by package and node, with the whole cores among `usable` in each.
    pub(super) fn among(&self, usable: &CpuSet) -> Vec<Area> {
        self.all.iter().map(|area| area.among(usable)).collect()
    }

    /// The same of an LLC domain, by its position, without areas that have none.
    pub(super) fn of_llc(&self, llc: usize, usable: &CpuSet) -> Vec<Area> {
        let areas = self.all.iter().filter(|area| area.llc == llc);
        let areas = areas.map(|area| area.among(usable));
        areas.filter(|area| area.room > 0).collect()
    }
}

impl Area {
    fn with_cores(&self, cores: Vec<CpuSet>) -> Self {
        let cpus: CpuSet = cores.iter().flat_map(CpuSet::iter).collect();
        Self {
            cores: cores.into(),
            room: cpus.len(),
            cpus,
            ..self.clone()
        }
    }

    /// How many of its CPUs are not among `slow`.
    pub(super) fn cpus_without(&self, slow: &CpuSet) -> usize {
        match slow.is_empty() {
            true => self.room,
            false => (&self.cpus - slow).len(),
        }
    }

    /// The area with the whole cores among `usable` only.
    fn among(&self, usable: &CpuSet) -> Self {
        if self.cpus.is_subset(usable) {
            return self.clone();
        }
        let mut cores = Vec::new();
        if self.cpus.intersects(usable) {
            cores.extend(self.cores.iter().cloned());
            cores.retain(|core| core.is_subset(usable));
        }
        self.with_cores(cores)
    }
}

/// The part of the machine that an area is in, by numbers that no other part has.
pub(super) type PartOf = fn(&Area) -> (usize, usize);

/// The parts in which areas are grouped: nodes, packages, the machine; the narrowest first.
pub(super) const SCOPES: [PartOf; 3] = [
    |area| (area.package, area.node),
    |area| (area.package, 0),
    |_| (0, 0),
];

/// The groups of so many neighbouring areas in each part of the machine.
pub(super) fn neighbours<'a>(
    areas: &'a [Area],
    part: PartOf,
    size: usize,
) -> impl Iterator<Item = Group<'a>> {
    let parts = areas.chunk_by(move |a, b| part(a) == part(b));
    parts.flat_map(move |areas| {
        areas.windows(size).enumerate().map(move |(start, window)| {
            let mut areas: Vec<&Area> = window.iter().collect();
            // What is beside the host is filled last.
            areas.sort_by_key(|area| area.beside_host);
            Group {
                areas,
                unaligned: (start % size != 0, start % 2 + (start + size) % 2),
            }
        })
    })
}

/// All areas of each part of the machine, the ones with most cores first.
pub(super) fn whole_parts<'a>(areas: &'a [Area], part: PartOf) -> impl Iterator<Item = Group<'a>> {
    let parts = areas.chunk_by(move |a, b| part(a) == part(b));
    parts.map(|areas| {
        let mut areas: Vec<&Area> = areas.iter().collect();
        areas.sort_by_key(|area| (area.beside_host, Reverse(area.cores.len())));
        Group {
            areas,
            unaligned: (true, 2),
        }
    })
}

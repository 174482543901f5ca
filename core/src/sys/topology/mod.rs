//! The machine as sysfs tells it: packages, dies, LLC domains, NUMA nodes, cores and their kinds;
//! see Documentation/admin-guide/cputopology.rst and
//! Documentation/ABI/testing/sysfs-devices-system-cpu.
//!
//! Of an offline CPU the kernel tells nothing: its folders `topology` and `cache` go, and every
//! other CPU's lists leave it out. So all sets here but `present` and `offline` are of online CPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::cpuset::CpuSet;
use crate::error::Result;
use crate::sys::cpu;
use crate::sysroot::{Sysroot, cpu_list};

mod cache;

const CPUS: &str = "sys/devices/system/cpu";
const NODES: &str = "sys/devices/system/node";

/// What holds the CPUs of a [`Domain`] together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// One package, that is a socket.
    Package,
    /// One die of a package.
    Die,
    /// Memory that is equally near.
    Node,
    /// A last-level cache.
    Cache {
        /// 3 for an L3.
        level: u32,
        /// Its size in KiB, where the kernel tells it.
        kib: Option<u64>,
    },
}

impl Extent {
    /// The size of the cache in KiB; `None` where it is no cache, or where that is not told.
    pub fn cache_kib(&self) -> Option<u64> {
        if let Self::Cache { kib, .. } = self {
            *kib
        } else {
            None
        }
    }

    /// Whether it is a cache, and no stand-in for one.
    pub fn is_cache(&self) -> bool {
        matches!(self, Self::Cache { .. })
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Package => write!(f, "package"),
            Self::Die => write!(f, "die"),
            Self::Node => write!(f, "NUMA node"),
            Self::Cache { level, kib: None } => write!(f, "L{level}"),
            Self::Cache {
                level,
                kib: Some(kib),
            } if kib % 1024 == 0 => write!(f, "L{level} {}M", kib / 1024),
            Self::Cache {
                level,
                kib: Some(kib),
            } => write!(f, "L{level} {kib}K"),
        }
    }
}

/// A part of the machine that goes by a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its number among its like.
    pub number: usize,
    /// Its online CPUs, by logical number; at least one.
    pub cpus: CpuSet,
    /// What holds them together. For an LLC domain a die or package stands in where no cache is
    /// told.
    pub extent: Extent,
    /// Whether the number is what it would be with all CPUs online: those behind a wholly offline
    /// domain move up.
    pub sure: bool,
}

/// The kinds of domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Packages, that is sockets.
    Package,
    /// Dies, counted over the whole host.
    Die,
    /// What shares a last-level cache.
    Llc,
    /// NUMA nodes that have CPUs.
    Node,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Topology {
    /// The CPUs there are.
    pub present: CpuSet,
    /// Those that are online.
    pub online: CpuSet,
    /// The threads of each core, in the order of their first CPUs.
    pub cores: Vec<CpuSet>,
    /// The fast cores of a hybrid machine; empty where all cores are of one kind.
    pub pcores: CpuSet,
    /// The small cores of a hybrid machine.
    pub ecores: CpuSet,
    packages: Vec<Domain>,
    dies: Vec<Domain>,
    llcs: Vec<Domain>,
    nodes: Vec<Domain>,
}

impl Topology {
    /// Reads the host's.
    ///
    /// # Errors
    /// Where a list of the kernel's cannot be read. What it does not tell at all (in some VMs, on
    /// old kernels) is assumed to be simple: one package, a core per CPU.
    pub fn read(root: &Sysroot) -> Result<Self> {
        let present = cpu::present(root)?;
        let online = &cpu::online(root)? & &present;
        let offline = &present - &online;
        let places = places(root, &online)?;
        let cores = cores(root, &online)?;
        let llcs = llcs(root, &online, &cores, &places.dies)?;
        let nodes = nodes(root, &online)?;
        let (pcores, ecores) = kinds_of_cores(root, &online)?;
        let (packages, dies) = (
            numbered(places.packages, &offline),
            numbered(places.dies, &offline),
        );
        let llcs = numbered(llcs, &offline);
        Ok(Self {
            present,
            online,
            cores,
            pcores,
            ecores,
            packages,
            dies,
            llcs,
            nodes,
        })
    }

    /// The domains of a kind, by number.
    pub fn domains(&self, kind: Kind) -> &[Domain] {
        match kind {
            Kind::Package => &self.packages,
            Kind::Die => &self.dies,
            Kind::Llc => &self.llcs,
            Kind::Node => &self.nodes,
        }
    }

    /// The CPUs that are there and offline; where they belong the kernel does not tell.
    pub fn offline(&self) -> CpuSet {
        &self.present - &self.online
    }

    /// The first thread of each core.
    pub fn first_threads(&self) -> CpuSet {
        self.cores.iter().filter_map(CpuSet::first).collect()
    }

    /// The LLC domains with a larger L3 than others have (3D V-Cache); none where all are alike.
    pub fn vcache(&self) -> Vec<&Domain> {
        // Sizes compare on one level only: what has no L3 at all does not make the others special.
        let size = |domain: &Domain| {
            if let Extent::Cache { level, kib } = domain.extent {
                Some((level, kib?))
            } else {
                None
            }
        };
        let level = self
            .llcs
            .iter()
            .filter_map(size)
            .map(|(level, _)| level)
            .max();
        let sized = || {
            self.llcs
                .iter()
                .filter_map(|llc| Some((llc, size(llc)?)))
                .filter(|(_, size)| Some(size.0) == level)
        };
        let smallest = sized().map(|(_, size)| size).min();
        sized()
            .filter(|(_, size)| Some(*size) > smallest)
            .map(|(llc, _)| llc)
            .collect()
    }
}

/// A domain that has no number yet.
#[derive(Debug)]
struct Found {
    /// The kernel's own number, which may leave gaps, and may not be the only one of its like.
    id: Option<usize>,
    cpus: CpuSet,
    extent: Extent,
}

/// Numbers domains from 0, in the order of the kernel's ids where they tell all of them apart, else
/// of their first CPUs.
fn numbered(mut found: Vec<Found>, offline: &CpuSet) -> Vec<Domain> {
    let ids: BTreeSet<usize> = found.iter().filter_map(|domain| domain.id).collect();
    let told = ids.len() == found.len();
    found.sort_by_key(|domain| (domain.id.filter(|_| told), domain.cpus.first()));
    let smallest = found
        .iter()
        .map(|domain| domain.cpus.len())
        .min()
        .unwrap_or(0);
    let number = |(number, Found { id, cpus, extent })| {
        // A domain that is wholly offline, in front of this one, would have its first CPU there,
        // and hardly be smaller than all that are seen.
        let in_front = offline.iter().any(|cpu| told || Some(cpu) < cpus.first());
        let could_hide = in_front && offline.len() >= smallest;
        let sure = !could_hide || (told && id == Some(number));
        Domain {
            number,
            cpus,
            extent,
            sure,
        }
    };
    found.into_iter().enumerate().map(number).collect()
}

/// A number from a CPU's folder `topology`; `None` where it is not told, for which firmware has -1
/// too.
fn place(root: &Sysroot, cpu: usize, file: &str) -> Result<Option<usize>> {
    let text = root.read_value(format!("{CPUS}/cpu{cpu}/topology/{file}"))?;
    Ok(text.and_then(|text| text.parse().ok()))
}

struct Places {
    packages: Vec<Found>,
    dies: Vec<Found>,
}

fn places(root: &Sysroot, online: &CpuSet) -> Result<Places> {
    let mut packages: BTreeMap<Option<usize>, CpuSet> = BTreeMap::new();
    let mut dies: BTreeMap<(Option<usize>, Option<usize>), CpuSet> = BTreeMap::new();
    for cpu in online.iter() {
        let package = place(root, cpu, "physical_package_id")?;
        let die = place(root, cpu, "die_id")?;
        packages.entry(package).or_default().insert(cpu);
        dies.entry((package, die)).or_default().insert(cpu);
    }
    let packages = packages
        .into_iter()
        .map(|(id, cpus)| Found {
            id,
            cpus,
            extent: Extent::Package,
        })
        .collect();
    let die = |((_, id), cpus): (_, CpuSet)| {
        let extent = if Option::is_some(&id) {
            Extent::Die
        } else {
            Extent::Package
        };
        Found { id, cpus, extent }
    };
    Ok(Places {
        packages,
        dies: dies.into_iter().map(die).collect(),
    })
}

fn cores(root: &Sysroot, online: &CpuSet) -> Result<Vec<CpuSet>> {
    let mut left = online.clone();
    let mut cores = Vec::new();
    while let Some(cpu) = left.first() {
        let own: CpuSet = [cpu].into_iter().collect();
        // A CPU is in one core, whatever a list says: those that another core has are left out.
        let core = &(&cpu::siblings(root, cpu)? & &left) | &own;
        left = &left - &core;
        cores.push(core);
    }
    Ok(cores)
}

/// The LLC domains. Where no cache of more than a core is told, a die stands in, and a package
/// where no dies are told.
fn llcs(root: &Sysroot, online: &CpuSet, cores: &[CpuSet], dies: &[Found]) -> Result<Vec<Found>> {
    const L3: u32 = 3;
    let mut left = online.clone();
    let mut llcs = Vec::new();
    let mut untold = CpuSet::new();
    while let Some(cpu) = left.first() {
        let own: CpuSet = [cpu].into_iter().collect();
        let mut cpus = own.clone();
        match cache::last_level(root, cpu)? {
            Some(cache) => {
                cpus = &(&cache.cpus & &left) | &own;
                // A core's own L2 where there is no L3 says nothing about who shares what.
                if cache.level >= L3
                    || cores.iter().filter(|core| core.intersects(&cpus)).count() > 1
                {
                    let extent = Extent::Cache {
                        level: cache.level,
                        kib: cache.kib,
                    };
                    llcs.push(Found {
                        id: cache.id,
                        cpus: cpus.clone(),
                        extent,
                    });
                } else {
                    untold = &untold | &cpus;
                }
            }
            None => untold.insert(cpu),
        }
        left = &left - &cpus;
    }
    let stand_in = |die: &Found| Found {
        id: None,
        cpus: &die.cpus & &untold,
        extent: die.extent,
    };
    llcs.extend(dies.iter().map(stand_in).filter(|llc| !llc.cpus.is_empty()));
    Ok(llcs)
}

/// The NUMA nodes by the kernel's numbers, which numactl has too; nodes of memory alone are left
/// out.
fn nodes(root: &Sysroot, online: &CpuSet) -> Result<Vec<Domain>> {
    let names = match root.names(NODES) {
        Err(error) if error.is_gone() => Vec::new(),
        names => names?,
    };
    let node = |number, cpus| Domain {
        number,
        cpus,
        extent: Extent::Node,
        sure: true,
    };
    let mut nodes = Vec::new();
    for number in names
        .iter()
        .filter_map(|name| name.strip_prefix("node")?.parse::<usize>().ok())
    {
        let path = format!("{NODES}/node{number}/cpulist");
        let cpus = &cpu_list(&path, &root.read_value(&path)?.unwrap_or_default())? & online;
        if !cpus.is_empty() {
            nodes.push(node(number, cpus));
        }
    }
    if nodes.is_empty() {
        // A kernel without NUMA has one node and no folder for it.
        nodes.push(node(0, online.clone()));
    }
    nodes.sort_by_key(|node| node.number);
    Ok(nodes)
}

/// The fast and the small cores of a hybrid machine, from Intel's two PMUs, else from the CPUs'
/// capacities.
fn kinds_of_cores(root: &Sysroot, online: &CpuSet) -> Result<(CpuSet, CpuSet)> {
    let pmu = |name: &str| -> Result<Option<CpuSet>> {
        let path = format!("sys/devices/{name}/cpus");
        root.read_value(&path)?
            .map(|list| Ok(&cpu_list(&path, &list)? & online))
            .transpose()
    };
    if let Some(pcores) = pmu("cpu_core")? {
        let ecores = pmu("cpu_atom")?.unwrap_or_default();
        // Some parts have a third kind, that of the SoC tile, with a PMU of its own since Linux
        // 6.13.
        let lowest = pmu("cpu_lowpower")?.unwrap_or_default();
        return Ok((pcores, &ecores | &lowest));
    }
    let mut capacities: BTreeMap<u32, CpuSet> = BTreeMap::new();
    for cpu in online.iter() {
        let text = root.read_value(format!("{CPUS}/cpu{cpu}/cpu_capacity"))?;
        let Some(capacity) = text.and_then(|text| text.parse().ok()) else {
            return Ok(Default::default());
        };
        capacities.entry(capacity).or_default().insert(cpu);
    }
    match capacities.pop_first() {
        Some((_, ecores)) if !capacities.is_empty() => Ok((online - &ecores, ecores)),
        _ => Ok(Default::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(id: Option<usize>, cpus: &str) -> Found {
        Found {
            id,
            cpus: cpus.parse().unwrap(),
            extent: Extent::Die,
        }
    }

    /// Number, CPUs, and `?` where the number is not sure.
    fn numbers(found: Vec<Found>, offline: &str) -> Vec<String> {
        let offline = CpuSet::from_kernel_list(offline).unwrap();
        let show = |d: Domain| format!("{}={}{}", d.number, d.cpus, if d.sure { "" } else { "?" });
        numbered(found, &offline).into_iter().map(show).collect()
    }

    #[test]
    fn numbers_start_at_0_and_leave_no_gaps() {
        let (one, two) = (|id| found(id, "0-5"), |id| found(id, "6-11"));
        assert_eq!(numbers(vec![two(None), one(None)], ""), ["0=0-5", "1=6-11"]);
        assert_eq!(
            numbers(vec![one(Some(8)), two(Some(0))], ""),
            ["0=6-11", "1=0-5"],
            "the kernel's order"
        );
        assert_eq!(
            numbers(vec![one(Some(0)), two(Some(0))], ""),
            ["0=0-5", "1=6-11"],
            "ids that tell nothing apart"
        );
        assert_eq!(numbers(vec![], "0-3"), [""; 0]);
    }

    #[test]
    fn a_number_that_may_have_moved_up_is_not_sure() {
        let ends = |first, last| vec![found(first, "0-3"), found(last, "8-11")];
        assert_eq!(numbers(ends(None, None), "4-7"), ["0=0-3", "1=8-11?"]);
        assert_eq!(
            numbers(ends(None, None), "4-6"),
            ["0=0-3", "1=8-11"],
            "three CPUs are no domain here"
        );
        assert_eq!(
            numbers(ends(None, None), "12-15"),
            ["0=0-3", "1=8-11"],
            "those behind move nothing"
        );
        assert_eq!(numbers(ends(Some(0), Some(2)), "4-7"), ["0=0-3", "1=8-11?"]);
        assert_eq!(
            numbers(ends(Some(0), Some(1)), "4-7"),
            ["0=0-3", "1=8-11"],
            "nothing is between 0 and 1"
        );
    }
}

//! The machine by sysfs: packages, dies, LLC domains, NUMA nodes, cores and their kinds;
//! see Documentation/admin-guide/cputopology.rst and
//! Documentation/ABI/testing/sysfs-devices-system-cpu.
//!
//! The kernel reports nothing of an offline CPU: its folders `topology` and `cache` go, and every
//! other CPU's lists leave it out. So all sets here but `present` and `offline` are of online CPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::cpuset::CpuSet;
use crate::error::Result;
use crate::sys::cpu;
use crate::sysroot::{Sysroot, cpu_list};

mod cache;
mod kinds;

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
        /// Its size in KiB, if the kernel reports it.
        kib: Option<u64>,
    },
}

impl Extent {
    /// The size of the cache in KiB; `None` if it is not a cache or has no known size.
    pub fn cache_kib(&self) -> Option<u64> {
        if let Self::Cache { kib, .. } = self {
            *kib
        } else {
            None
        }
    }

    /// Whether it is a cache, and not a stand-in for one.
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
    /// What holds them together. For an LLC domain without a known cache this is a die or a
    /// package.
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
    /// The fast cores of a hybrid machine; empty if all cores are of one kind.
    pub pcores: CpuSet,
    /// The small cores of a hybrid machine.
    pub ecores: CpuSet,
    /// Those of the small cores that are slower than others of them, as of Intel's SoC tile.
    pub slowest: CpuSet,
    /// Whether the CPUs are AMD's; unknown if the kernel does not report the vendor.
    amd: Option<bool>,
    packages: Vec<Domain>,
    dies: Vec<Domain>,
    llcs: Vec<Domain>,
    nodes: Vec<Domain>,
    /// By CPU, the position of its core among the cores.
    core_by_cpu: Vec<Option<usize>>,
    /// By CPU, the position of its LLC domain among those.
    llc_by_cpu: Vec<Option<usize>>,
}

impl Topology {
    /// As [`near`], of the NUMA nodes that were read.
    pub fn near(&self, cpus: &CpuSet) -> CpuSet {
        near_among(self.domains(Kind::Node), &self.online, cpus)
    }

    /// Reads the host's.
    ///
    /// # Errors
    /// If a list of the kernel cannot be read. What it does not report at all (in some VMs, on
    /// old kernels) is assumed to be simple: one package, a core per CPU.
    pub fn read(root: &Sysroot) -> Result<Self> {
        let present = cpu::present(root)?;
        let online = &cpu::online(root)? & &present;
        let offline = &present - &online;
        let places = places(root, &online)?;
        let cores = cores(root, &online)?;
        let llcs = llcs(root, &online, &cores, &places.dies)?;
        let nodes = nodes(root, &online)?;
        let kinds = kinds::of_cores(root, &online, &cores)?;
        let amd = kinds::is_amd(root)?;
        let (packages, dies) = (
            numbered(places.packages, &offline),
            numbered(places.dies, &offline),
        );
        let llcs = numbered(llcs, &offline);
        Ok(Self {
            core_by_cpu: by_cpu(&online, cores.iter()),
            llc_by_cpu: by_cpu(&online, llcs.iter().map(|llc| &llc.cpus)),
            present,
            online,
            cores,
            pcores: kinds.fast,
            ecores: kinds.small,
            slowest: kinds.slowest,
            amd,
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

    /// The CPUs that are present and offline; the kernel does not report where they belong.
    pub fn offline(&self) -> CpuSet {
        &self.present - &self.online
    }

    /// The position of a CPU's core among the cores; `None` if the CPU is not online.
    pub fn core_of(&self, cpu: usize) -> Option<usize> {
        *self.core_by_cpu.get(cpu)?
    }

    /// How slow a core is among the machine's: 0 for fast ones, 1 for small ones, 2 for the slowest.
    pub fn slowness(&self, core: &CpuSet) -> u8 {
        match core.intersects(&self.ecores) {
            false => 0,
            true => 1 + u8::from(core.intersects(&self.slowest)),
        }
    }

    /// The position of a CPU's LLC domain among those; `None` if the CPU is not online.
    pub fn llc_of(&self, cpu: usize) -> Option<usize> {
        *self.llc_by_cpu.get(cpu)?
    }

    /// The cores that have some of these CPUs, in their order.
    pub fn cores_of<'a>(&'a self, cpus: &CpuSet) -> impl Iterator<Item = &'a CpuSet> + use<'a> {
        let at: BTreeSet<usize> = cpus.iter().filter_map(|cpu| self.core_of(cpu)).collect();
        at.into_iter().filter_map(|at| self.cores.get(at))
    }

    /// The LLC domains that have some of these CPUs, in their order.
    pub fn llcs_of<'a>(&'a self, cpus: &CpuSet) -> impl Iterator<Item = &'a Domain> + use<'a> {
        let at: BTreeSet<usize> = cpus.iter().filter_map(|cpu| self.llc_of(cpu)).collect();
        at.into_iter().filter_map(|at| self.llcs.get(at))
    }

    /// The first thread of each core.
    pub fn first_threads(&self) -> CpuSet {
        self.cores.iter().filter_map(CpuSet::first).collect()
    }

    /// Whether the CPUs are AMD's, by /proc/cpuinfo.
    pub fn is_amd(&self) -> bool {
        self.amd == Some(true)
    }

    /// The LLC domains with 3D V-Cache: those of AMD's with an L3 of 64 MiB or more, and 8 MiB or
    /// more for each core. Others of AMD's have 32 MiB at most, and large L3s of others are for
    /// many cores. On a host with one such domain, or several alike, all of them are.
    pub fn vcache(&self) -> Vec<&Domain> {
        const L3: u32 = 3;
        const LEAST_KIB: u64 = 64 * 1024;
        const LEAST_KIB_PER_CORE: u64 = 8 * 1024;
        if self.amd == Some(false) {
            return Vec::new();
        }
        let is_vcache = |llc: &&Domain| {
            let Extent::Cache {
                level: L3,
                kib: Some(kib),
            } = llc.extent
            else {
                return false;
            };
            let cores = self.cores_of(&llc.cpus).count();
            kib >= LEAST_KIB && kib / (cores.max(1) as u64) >= LEAST_KIB_PER_CORE
        };
        self.llcs.iter().filter(is_vcache).collect()
    }

    /// The CPUs of the [LLC domains with 3D V-Cache](Self::vcache).
    pub fn vcache_cpus(&self) -> CpuSet {
        let domains = self.vcache().into_iter();
        domains.flat_map(|llc| llc.cpus.iter()).collect()
    }
}

/// By CPU, the position of the set that has it; no CPU is in two.
fn by_cpu<'a>(online: &CpuSet, sets: impl Iterator<Item = &'a CpuSet>) -> Vec<Option<usize>> {
    let mut positions = vec![None; online.last().map_or(0, |last| last + 1)];
    for (at, set) in sets.enumerate() {
        for cpu in set.iter() {
            if let Some(position) = positions.get_mut(cpu) {
                *position = Some(at);
            }
        }
    }
    positions
}

/// A domain that has no number yet.
#[derive(Debug)]
struct Found {
    /// The kernel's own number, which may leave gaps, and may not be the only one of its like.
    id: Option<usize>,
    cpus: CpuSet,
    extent: Extent,
}

/// Numbers domains from 0, in the order of the kernel's ids if these are all different, otherwise
/// of their first CPUs.
fn numbered(mut found: Vec<Found>, offline: &CpuSet) -> Vec<Domain> {
    let ids: BTreeSet<usize> = found.iter().filter_map(|domain| domain.id).collect();
    let are_distinct = ids.len() == found.len();
    found.sort_by_key(|domain| (domain.id.filter(|_| are_distinct), domain.cpus.first()));
    let smallest = found
        .iter()
        .map(|domain| domain.cpus.len())
        .min()
        .unwrap_or(0);
    let number = |(number, Found { id, cpus, extent })| {
        // A domain that is wholly offline, in front of this one, would have its first CPU there,
        // and hardly be smaller than all that are seen.
        let in_front = offline
            .iter()
            .any(|cpu| are_distinct || Some(cpu) < cpus.first());
        let could_hide = in_front && offline.len() >= smallest;
        let sure = !could_hide || (are_distinct && id == Some(number));
        Domain {
            number,
            cpus,
            extent,
            sure,
        }
    };
    found.into_iter().enumerate().map(number).collect()
}

/// A number from a CPU's folder `topology`; `None` if it is unknown, for which firmware has -1
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
    /// What identifies a package: the kernel's number, or if firmware has none (-1) the first
    /// CPU of the kernel's list, as hwloc and lscpu do.
    #[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
    enum Package {
        Id(usize),
        FirstCpu(Option<usize>),
    }
    let mut packages: BTreeMap<Package, CpuSet> = BTreeMap::new();
    let mut dies: BTreeMap<(Package, Option<usize>), CpuSet> = BTreeMap::new();
    for cpu in online.iter() {
        let package = match place(root, cpu, "physical_package_id")? {
            Some(id) => Package::Id(id),
            None => Package::FirstCpu(package_cpus(root, cpu)?.first()),
        };
        let die = place(root, cpu, "die_id")?;
        packages.entry(package).or_default().insert(cpu);
        dies.entry((package, die)).or_default().insert(cpu);
    }
    let packages = packages
        .into_iter()
        .map(|(package, cpus)| Found {
            id: match package {
                Package::Id(id) => Some(id),
                Package::FirstCpu(_) => None,
            },
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

/// The CPUs of a CPU's package; none if the kernel does not list them.
fn package_cpus(root: &Sysroot, cpu: usize) -> Result<CpuSet> {
    for file in ["package_cpus_list", "core_siblings_list"] {
        let path = format!("{CPUS}/cpu{cpu}/topology/{file}");
        if let Some(list) = root.read_value(&path)? {
            return cpu_list(&path, &list);
        }
    }
    Ok(CpuSet::new())
}

fn cores(root: &Sysroot, online: &CpuSet) -> Result<Vec<CpuSet>> {
    let mut left = online.clone();
    let mut cores = Vec::new();
    while let Some(cpu) = left.first() {
        let own: CpuSet = [cpu].into_iter().collect();
        // A CPU is in one core, whatever a list contains: those that another core has are left out.
        let core = &(&cpu::siblings(root, cpu)? & &left) | &own;
        left = &left - &core;
        cores.push(core);
    }
    Ok(cores)
}

/// The LLC domains. If no cache of more than a core is known, a die is used, and a package
/// if no dies are known.
fn llcs(root: &Sysroot, online: &CpuSet, cores: &[CpuSet], dies: &[Found]) -> Result<Vec<Found>> {
    const L3: u32 = 3;
    let mut left = online.clone();
    let mut llcs = Vec::new();
    let mut unknown = CpuSet::new();
    while let Some(cpu) = left.first() {
        let own: CpuSet = [cpu].into_iter().collect();
        let mut cpus = own.clone();
        match cache::last_level(root, cpu)? {
            Some(cache) => {
                cpus = &(&cache.cpus & &left) | &own;
                // A core's own L2 without an L3 does not show what is shared.
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
                    unknown = &unknown | &cpus;
                }
            }
            None => unknown.insert(cpu),
        }
        left = &left - &cpus;
    }
    let stand_in = |die: &Found| Found {
        id: None,
        cpus: &die.cpus & &unknown,
        extent: die.extent,
    };
    llcs.extend(dies.iter().map(stand_in).filter(|llc| !llc.cpus.is_empty()));
    Ok(llcs)
}

/// The CPUs of the NUMA nodes that have some of these CPUs; none if these nodes are all that have
/// CPUs. Cores and caches are not read.
///
/// # Errors
/// If sysfs cannot be read.
pub fn near(root: &Sysroot, cpus: &CpuSet) -> Result<CpuSet> {
    let online = cpu::online(root)?;
    Ok(near_among(&nodes(root, &online)?, &online, cpus))
}

fn near_among(nodes: &[Domain], online: &CpuSet, cpus: &CpuSet) -> CpuSet {
    let theirs = nodes.iter().filter(|node| node.cpus.intersects(cpus));
    let near: CpuSet = theirs.flat_map(|node| node.cpus.iter()).collect();
    match online.is_subset(&near) {
        true => CpuSet::new(),
        false => near,
    }
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
            "ids that are equal"
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
            "three CPUs are not a domain here"
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

//! Facts about chosen CPUs, computed from the CPUs, and the sentences that report them.

use std::collections::BTreeSet;
use std::fmt;

use pinfold_core::CpuSet;
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Domain, Kind, Topology};

use super::claims::Claim;
use super::filling::in_vcpu_order;
use super::guest::{Guest, cpus_of_nodes};

/// Facts about the CPUs that a guest gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The numbers of their LLC domains.
    pub llcs: CpuSet,
    /// The numbers of their NUMA nodes.
    pub nodes: CpuSet,
    /// The CPUs of these LLC domains.
    pub size: usize,
    /// Whether these are all of them.
    pub has_all: bool,
    /// The cores.
    pub cores: usize,
    /// The cores that run more than one vCPU of a guest without SMT, or more than one guest core.
    pub doubled_cores: usize,
    /// vCPUs, or guest cores, beyond the first on each core.
    pub doubled: usize,
    /// Guest cores whose threads are on several cores.
    pub split: usize,
    /// The small cores' CPUs that vCPUs are pinned to.
    pub on_small: CpuSet,
    /// The vCPUs on them.
    pub small_vcpus: CpuSet,
    /// Further threads of cores with a vCPU: kept empty, so that the vCPU has the core.
    pub empty_threads: CpuSet,
    /// Cores without a vCPU.
    pub idle_cores: CpuSet,
    /// The vCPUs that are not on the NUMA nodes of their memory, if that is bound.
    pub far_vcpus: CpuSet,
    /// Whether CPU 0 shares a cache with them.
    pub beside_host: bool,
    /// Whether CPU 0 is one of them.
    pub has_cpu_0: bool,
    /// Others that use some of them.
    pub shared: Vec<Claim>,
}

impl Facts {
    /// The facts about CPUs of a guest.
    pub(crate) fn of(
        topology: &Topology,
        guest: &Guest,
        isolated: &CpuSet,
        claims: &[Claim],
    ) -> Self {
        let pins = in_vcpu_order(topology, isolated, guest.threads, &guest.cells);
        Self::of_pins(topology, guest, isolated, &pins, claims)
    }

    /// The same with given pins. Of a vCPU that may run on several CPUs the first one counts.
    pub(crate) fn of_pins(
        topology: &Topology,
        guest: &Guest,
        isolated: &CpuSet,
        pins: &[CpuSet],
        claims: &[Claim],
    ) -> Self {
        let order: Vec<usize> = pins
            .iter()
            .take(guest.vcpus)
            .filter_map(CpuSet::first)
            .collect();
        let used: CpuSet = order.iter().copied().collect();
        let nodes = topology.domains(Kind::Node).iter();
        let threads = guest.threads.max(1);
        let mut facts = Self {
            nodes: nodes
                .filter(|node| node.cpus.intersects(isolated))
                .map(|node| node.number)
                .collect(),
            on_small: &used & &topology.ecores,
            has_cpu_0: isolated.contains(cpu::BOOT_CPU),
            shared: claims
                .iter()
                .filter(|claim| claim.cpus.intersects(isolated))
                .map(|claim| claim.among(isolated))
                .collect(),
            ..Self::default()
        };
        facts.small_vcpus = (0..)
            .zip(&order)
            .filter(|(_, cpu)| topology.ecores.contains(**cpu))
            .map(|(vcpu, _)| vcpu)
            .collect();
        for cell in &guest.cells {
            let near = cpus_of_nodes(topology, &cell.nodes);
            let is_far = |vcpu: &usize| order.get(*vcpu).is_some_and(|cpu| !near.contains(*cpu));
            let far: CpuSet = cell.vcpus.iter().filter(is_far).collect();
            facts.far_vcpus = &facts.far_vcpus | &far;
        }
        for llc in topology.llcs_of(isolated) {
            facts.llcs.insert(llc.number);
            facts.size += llc.cpus.len();
            facts.beside_host |= llc.cpus.contains(cpu::BOOT_CPU);
        }
        facts.has_all = topology
            .llcs_of(isolated)
            .all(|llc| llc.cpus.is_subset(isolated));
        for core in topology.cores_of(isolated) {
            let busy = (core & &used).len();
            facts.cores += 1;
            let idle = &(core & isolated) - &used;
            if busy == 0 {
                facts.idle_cores = &facts.idle_cores | &idle;
            } else {
                facts.empty_threads = &facts.empty_threads | &idle;
            }
            let beyond = busy.div_ceil(threads).saturating_sub(1);
            facts.doubled += beyond;
            facts.doubled_cores += usize::from(beyond > 0);
        }
        let core_of = |cpu: &usize| topology.core_of(*cpu);
        facts.split = order
            .chunks(threads)
            .filter(|guest_core| {
                guest_core
                    .iter()
                    .map(core_of)
                    .collect::<BTreeSet<_>>()
                    .len()
                    > 1
            })
            .count();
        facts
    }

    /// The facts as sentences; `room_by_vcache` is the room for the guest in the domains with V-Cache.
    pub(super) fn reasons(
        &self,
        topology: &Topology,
        guest: &Guest,
        room_by_vcache: VcacheRoom,
    ) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let of_vm = |llc: &&Domain| self.llcs.contains(llc.number);
        let llcs: Vec<&Domain> = topology.domains(Kind::Llc).iter().filter(of_vm).collect();
        let cpus: CpuSet = llcs.iter().flat_map(|llc| llc.cpus.iter()).collect();
        let vcache: CpuSet = topology.vcache().iter().map(|llc| llc.number).collect();
        if let Some(first) = llcs.first() {
            let is_alike = llcs.iter().all(|llc| llc.extent == first.extent);
            reasons.push(Reason::Where {
                llcs: self.llcs.clone(),
                extent: is_alike.then(|| match first.extent.is_cache() {
                    true if llcs.len() > 1 => format!("{} each", first.extent),
                    true => first.extent.to_string(),
                    false => "no shared cache known".to_owned(),
                }),
                vcache: !vcache.is_empty() && self.llcs.is_subset(&vcache),
                all: self.has_all,
                cpus,
                cores: self.cores,
            });
        }
        let mut caches: Vec<(String, CpuSet)> = Vec::new();
        for llc in &llcs {
            let mut what = llc.extent.to_string();
            if vcache.contains(llc.number) {
                what += ", V-Cache";
            }
            match caches.iter_mut().find(|(known, _)| *known == what) {
                Some((_, same)) => same.insert(llc.number),
                None => caches.push((what, [llc.number].into_iter().collect())),
            }
        }
        if caches.len() > 1 {
            reasons.push(Reason::Caches(caches));
        }
        if topology.domains(Kind::Node).len() > 1 {
            reasons.push(Reason::Node {
                nodes: self.nodes.clone(),
                memory: guest.memory_nodes(),
                devices: guest.device_nodes.clone(),
            });
        }
        if self.has_cpu_0 {
            reasons.push(Reason::HasCpu0);
        } else if self.beside_host {
            let is_cache =
                |llc: &&Domain| llc.cpus.contains(cpu::BOOT_CPU) && llc.extent.is_cache();
            reasons.push(Reason::BesideHost {
                cache: llcs.iter().any(is_cache),
            });
        }
        if self.doubled > 0 {
            reasons.push(Reason::Doubled {
                cores: self.cores,
                doubled: self.doubled_cores,
                guest_cores: guest.threads > 1,
            });
        } else if guest.threads <= 1 && !self.empty_threads.is_empty() {
            let cores = topology.cores.iter();
            let mut mine = cores.filter(|core| core.intersects(&self.empty_threads));
            let busy = self.cores - topology.cores_of(&self.idle_cores).count();
            let pairs = self.empty_threads.len() == busy && mine.all(|core| core.len() == 2);
            reasons.push(Reason::OwnCores { pairs });
        }
        if !self.on_small.is_empty() {
            reasons.push(Reason::SmallCores {
                vcpus: self.small_vcpus.clone(),
                cpus: self.on_small.clone(),
            });
        }
        if self.split > 0 {
            reasons.push(Reason::Split(self.split));
        }
        if !self.idle_cores.is_empty() {
            reasons.push(Reason::Idle(self.idle_cores.clone()));
        }
        let elsewhere: Vec<&Domain> = topology
            .vcache()
            .into_iter()
            .filter(|_| !self.llcs.intersects(&vcache))
            .collect();
        if let Some(first) = elsewhere.first() {
            reasons.push(Reason::VcacheElsewhere {
                llcs: vcache,
                extent: first.extent.to_string(),
                cpus: elsewhere.iter().flat_map(|llc| llc.cpus.iter()).collect(),
                room: room_by_vcache,
            });
        }
        reasons.extend(self.shared.iter().cloned().map(Reason::Shared));
        reasons
    }
}

/// How a user names the CPUs of the V-Cache with the core of CPU 0.
pub(crate) const WITH_CPU_0: &str = "'vcache,core:0'";

/// The room for a guest in the LLC domains with V-Cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VcacheRoom {
    /// Enough.
    Free,
    /// Enough with these CPUs of others.
    Shared(CpuSet),
    /// Enough with the core of CPU 0.
    WithCpu0,
    /// Not enough.
    TooSmall,
}

/// A sentence about the CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The LLC domains, and how much of them the VM gets.
    Where {
        llcs: CpuSet,
        /// Of each of them, if they are alike.
        extent: Option<String>,
        vcache: bool,
        cpus: CpuSet,
        all: bool,
        cores: usize,
    },
    /// The LLC domains by their caches, if these differ.
    Caches(Vec<(String, CpuSet)>),
    /// The NUMA nodes, on a machine with several, and what of the VM is where.
    Node {
        nodes: CpuSet,
        memory: CpuSet,
        devices: CpuSet,
    },
    /// CPU 0 is in one of the domains, and shares its cache if that is known.
    BesideHost { cache: bool },
    /// CPU 0 is among them.
    HasCpu0,
    /// A core for each vCPU of a guest without SMT, with further threads that stay empty: one of each
    /// core, if they are `pairs`.
    OwnCores { pairs: bool },
    /// Cores with more than one vCPU, or guest core.
    Doubled {
        cores: usize,
        doubled: usize,
        guest_cores: bool,
    },
    /// vCPUs on small cores.
    SmallCores { vcpus: CpuSet, cpus: CpuSet },
    /// Guest cores whose threads are on several cores.
    Split(usize),
    /// Cores without a vCPU.
    Idle(CpuSet),
    /// V-Cache that the VM does not get.
    VcacheElsewhere {
        llcs: CpuSet,
        extent: String,
        cpus: CpuSet,
        /// Whether the VM has room there.
        room: VcacheRoom,
    },
    /// CPUs that others use too.
    Shared(Claim),
    /// CPUs of others in the same domains, which would have been better.
    Beside(Claim),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Where {
                llcs,
                extent,
                vcache,
                cpus,
                all,
                cores,
            } => {
                write!(f, "llc:{llcs} is CPU {cpus}")?;
                if let Some(extent) = extent {
                    write!(f, ", {extent}")?;
                }
                if *vcache {
                    write!(f, ", V-Cache")?;
                }
                let part = if *all { "all" } else { "a part" };
                write!(
                    f,
                    ". The VM gets {part} of it: {}.",
                    counted(*cores, "core")
                )
            }
            Self::Caches(caches) => {
                let each = |(what, llcs): &(String, CpuSet)| format!("llc:{llcs} {what}");
                let caches: Vec<String> = caches.iter().map(each).collect();
                write!(f, "Their caches differ: {}.", caches.join("; "))
            }
            Self::Node {
                nodes,
                memory,
                devices,
            } => {
                let node = |nodes: &CpuSet| match nodes.len() {
                    1 => format!("NUMA node {nodes}"),
                    _ => format!("NUMA nodes {nodes}"),
                };
                write!(f, "They are on {}", node(nodes))?;
                let near: Vec<&str> = [("memory", memory), ("devices", devices)]
                    .into_iter()
                    .filter(|(_, at)| !at.is_empty() && *at == nodes)
                    .map(|(what, _)| what)
                    .collect();
                match near[..] {
                    [] => write!(f, ".")?,
                    _ => write!(f, ", like the VM's {}.", near.join(" and "))?,
                }
                for (what, at) in [("memory", memory), ("devices", devices)] {
                    if !at.is_empty() && at != nodes {
                        let verb = if what == "memory" { "is" } else { "are" };
                        write!(f, " Its {what} {verb} on {}.", node(at))?;
                    }
                }
                Ok(())
            }
            Self::BesideHost { cache } => {
                write!(f, "CPU 0, which stays with the host, is in it too")?;
                match cache {
                    true => write!(f, ": the VM shares the cache with the host."),
                    false => write!(f, "."),
                }
            }
            Self::HasCpu0 => write!(
                f,
                "CPU 0 is among them: timekeeping, IRQs that cannot be moved and the kernel's work for \
                 the boot CPU stay there."
            ),
            Self::OwnCores { pairs } => {
                let others = if *pairs { "second" } else { "other" };
                write!(
                    f,
                    "Each vCPU has a core of its own; the {others} threads stay idle."
                )
            }
            Self::Doubled {
                cores,
                doubled,
                guest_cores,
            } => {
                let of = if *guest_cores { "guest cores" } else { "vCPUs" };
                let verb = if *doubled == 1 { "runs" } else { "run" };
                match (*doubled == *cores, *cores) {
                    (true, 1) => write!(
                        f,
                        "The core runs several {of}, by its second thread: they are slower."
                    ),
                    (true, _) => write!(
                        f,
                        "All {cores} cores run several {of}, by second threads: they are slower."
                    ),
                    (false, _) => write!(
                        f,
                        "{doubled} of the {cores} cores {verb} several {of}, by second threads: these are slower."
                    ),
                }
            }
            Self::SmallCores { vcpus, cpus } => {
                let (word, verb) = match vcpus.len() {
                    1 => ("vCPU", "is"),
                    _ => ("vCPUs", "are"),
                };
                write!(
                    f,
                    "{word} {vcpus} {verb} on small cores (E cores), CPU {cpus}: a slow vCPU delays the others."
                )
            }
            Self::Split(1) => write!(
                f,
                "One of the guest's cores has its threads on several of the host's cores."
            ),
            Self::Split(count) => write!(
                f,
                "{count} of the guest's cores have their threads on several of the host's cores each."
            ),
            Self::Idle(cpus) => write!(f, "CPU {cpus} is isolated but unused."),
            Self::VcacheElsewhere {
                llcs,
                extent,
                cpus,
                room,
            } => {
                write!(f, "llc:{llcs} (CPU {cpus}) has 3D V-Cache, {extent}; ")?;
                match room {
                    VcacheRoom::Free => write!(f, "--vcache chooses there."),
                    VcacheRoom::Shared(shared) => write!(
                        f,
                        "--vcache chooses there, and shares CPU {shared} with others."
                    ),
                    VcacheRoom::WithCpu0 => write!(
                        f,
                        "this VM has room there only with the core of CPU 0, by partition: \
                         --cpus {WITH_CPU_0}."
                    ),
                    VcacheRoom::TooSmall => write!(f, "this VM has no room there."),
                }
            }
            Self::Beside(claim) => write!(f, "Beside them, {claim}."),
            Self::Shared(claim) if claim.exclusive => {
                write!(f, "{claim}: only one of the two VMs can run at a time.")
            }
            Self::Shared(claim) => {
                write!(f, "{claim}, which loses them while this VM runs.")
            }
        }
    }
}

/// An LLC domain that nothing was taken of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PassedOver {
    pub llc: usize,
    pub cpus: CpuSet,
    /// The cores that a VM could have there.
    pub free_cores: usize,
    pub has_cpu_0: bool,
    pub verdict: Verdict,
}

/// Why an LLC domain was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    TooFew,
    Claimed(Vec<Claim>),
    SmallCores,
    /// As many small cores, but slower ones.
    SlowestCores,
    /// Far from the VM's memory, its devices or both.
    Farther {
        memory: bool,
        devices: bool,
    },
    /// Fewer cores than vCPUs, or than guest cores.
    Doubled {
        guest_cores: bool,
    },
    /// In the domain of CPU 0, whose cache it shares if one is known.
    BesideHost {
        cache: bool,
    },
    /// Without V-Cache, which the CPUs that were asked for have.
    NoVcache,
    /// More guest cores with threads on several of the host's.
    Split,
    Larger,
    AsGood,
    /// CPUs that were asked for are worse.
    Better,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooFew => write!(f, "too few CPUs"),
            Self::Claimed(claims) => {
                let claims: Vec<String> = claims.iter().map(ToString::to_string).collect();
                f.write_str(&claims.join(", "))
            }
            Self::SmallCores => write!(f, "includes more small cores"),
            Self::SlowestCores => write!(f, "includes more of the slowest cores"),
            Self::Farther { memory, devices } => {
                let what: Vec<&str> = [(memory, "memory"), (devices, "devices")]
                    .into_iter()
                    .filter(|(is_far, _)| **is_far)
                    .map(|(_, what)| what)
                    .collect();
                write!(f, "farther from the VM's {}", what.join(" and "))
            }
            Self::Doubled { guest_cores: false } => write!(f, "too few cores for one per vCPU"),
            Self::Doubled { guest_cores: true } => {
                write!(f, "too few cores for one per guest core")
            }
            Self::BesideHost { cache: true } => write!(f, "shares its cache with the host"),
            Self::BesideHost { cache: false } => write!(f, "has CPU 0, which stays with the host"),
            Self::NoVcache => write!(f, "without 3D V-Cache"),
            Self::Split => write!(f, "more guest cores would be split over several cores"),
            Self::Larger => write!(f, "larger"),
            Self::Better => write!(f, "would be better"),
            Self::AsGood => write!(f, "equally good"),
        }
    }
}

/// The domains that were passed over, as lines: those with the same reason share one.
pub(crate) fn listed(passed_over: &[PassedOver]) -> Vec<String> {
    let mut by_verdict: Vec<(String, Vec<&PassedOver>)> = Vec::new();
    for one in passed_over {
        let verdict = one.verdict.to_string();
        match by_verdict.iter_mut().find(|(known, _)| *known == verdict) {
            Some((_, same)) => same.push(one),
            None => by_verdict.push((verdict, vec![one])),
        }
    }
    let line = |(verdict, same): (String, Vec<&PassedOver>)| match same[..] {
        [one] => {
            let beside = match one.has_cpu_0 {
                true => " beside that of CPU 0",
                false => "",
            };
            format!(
                "llc:{} (CPU {}, {} free{beside}): {verdict}",
                one.llc,
                one.cpus,
                counted(one.free_cores, "core")
            )
        }
        _ => {
            let numbers: CpuSet = same.iter().map(|one| one.llc).collect();
            let each = match same[0].verdict {
                Verdict::TooFew => " each",
                _ => "",
            };
            format!("llc:{numbers}: {verdict}{each}")
        }
    };
    by_verdict.into_iter().map(line).collect()
}

/// `1 core`, `2 cores`.
pub(crate) fn counted(count: usize, word: &str) -> String {
    match count {
        1 => format!("1 {word}"),
        _ => format!("{count} {word}s"),
    }
}

//! What the names in an expression stand for on a host.

use std::cell::OnceCell;

use super::ast::{Node, Part, Selector, Word};
use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sys::cpu;
use crate::sys::topology::{self, Domain, Kind, Topology};
use crate::sysroot::Sysroot;
use crate::vm::{self, Role, VmId, qmp};

/// How many domains a message lists with their CPUs.
const MAX_LISTED: usize = 8;

/// A host that expressions are resolved on: what was read of it once is kept.
#[derive(Debug)]
pub struct Resolver<'a> {
    root: &'a Sysroot,
    topology: OnceCell<Topology>,
}

impl<'a> Resolver<'a> {
    /// Nothing is read before it is needed.
    pub fn new(root: &'a Sysroot) -> Self {
        Self {
            root,
            topology: OnceCell::new(),
        }
    }

    /// The CPUs that an expression stands for. A plain list is taken as it is, without a look at
    /// the host.
    ///
    /// # Errors
    /// [`Error::Unusable`] if the host lacks something named, with what it has, if a VM does
    /// not run, or if no CPU is left.
    pub fn resolve(&self, expr: &Selector) -> Result<CpuSet> {
        if let Node::Cpus(cpus) = &expr.node {
            return Ok(cpus.clone());
        }
        let cpus = self.cpus(&expr.node)?;
        if cpus.is_empty() {
            return Err(Error::unusable(expr.to_string(), "it selects no CPU"));
        }
        Ok(cpus)
    }

    /// The machine, read once.
    ///
    /// # Errors
    /// As [`Topology::read`].
    pub fn topology(&self) -> Result<&Topology> {
        if let Some(topology) = self.topology.get() {
            return Ok(topology);
        }
        let topology = Topology::read(self.root)?;
        Ok(self.topology.get_or_init(|| topology))
    }

    /// As [`topology::near`], without reading the NUMA nodes again if the machine was read.
    ///
    /// # Errors
    /// As there.
    pub fn near(&self, cpus: &CpuSet) -> Result<CpuSet> {
        match self.topology.get() {
            Some(topology) => Ok(topology.near(cpus)),
            None => topology::near(self.root, cpus),
        }
    }

    fn cpus(&self, node: &Node) -> Result<CpuSet> {
        match node {
            Node::Cpus(cpus) => {
                cpu::check_present(self.root, cpus)?;
                Ok(cpus.clone())
            }
            Node::Parts(part, numbers) => self.parts(*part, numbers),
            Node::Vms(vms) => {
                let mut cpus = CpuSet::new();
                for vmid in vms {
                    cpus = &cpus | &self.vcpus(*vmid)?;
                }
                Ok(cpus)
            }
            Node::Word(word) => self.word(*word),
            Node::Not(node) => Ok(&cpu::present(self.root)? - &self.cpus(node)?),
            Node::Group(node) => self.cpus(node),
            Node::Both(nodes) => self.joined(nodes, |all, node| Ok(&all & &self.cpus(node)?)),
            Node::Any(nodes) => self.joined(nodes, |all, node| match node {
                Node::Not(less) => Ok(&all - &self.cpus(less)?),
                more => Ok(&all | &self.cpus(more)?),
            }),
        }
    }

    fn joined(
        &self,
        nodes: &[Node],
        join: impl Fn(CpuSet, &Node) -> Result<CpuSet>,
    ) -> Result<CpuSet> {
        let Some((first, rest)) = nodes.split_first() else {
            return Ok(CpuSet::new());
        };
        rest.iter().try_fold(self.cpus(first)?, join)
    }

    fn word(&self, word: Word) -> Result<CpuSet> {
        let lacks = |why: String| Err(Error::unusable(word.to_string(), why));
        match word {
            Word::All => cpu::present(self.root),
            Word::Online => cpu::online(self.root),
            Word::Offline => Ok(&cpu::present(self.root)? - &cpu::online(self.root)?),
            Word::FirstThreads => Ok(self.topology()?.first_threads()),
            Word::Vcache => {
                let topology = self.topology()?;
                let cpus = topology.vcache_cpus();
                if cpus.is_empty() {
                    return lacks(format!(
                        "no L3 has 3D V-Cache (AMD, 64M or more, 8M or more per core); {}",
                        there_are(topology, Kind::Llc, true)
                    ));
                }
                Ok(cpus)
            }
            Word::Pcores | Word::Ecores => {
                let topology = self.topology()?;
                let cpus = if word == Word::Pcores {
                    &topology.pcores
                } else {
                    &topology.ecores
                };
                if cpus.is_empty() {
                    return lacks(format!(
                        "all online cores of this host are of one kind{}",
                        but_offline(topology)
                    ));
                }
                Ok(cpus.clone())
            }
        }
    }

    fn parts(&self, part: Part, numbers: &CpuSet) -> Result<CpuSet> {
        let kind = match part {
            Part::Package => Kind::Package,
            Part::Die => Kind::Die,
            Part::Llc => Kind::Llc,
            Part::Node => Kind::Node,
            Part::Core | Part::Smt => return self.cores(part, numbers),
        };
        let topology = self.topology()?;
        let domains: Vec<&Domain> = topology
            .domains(kind)
            .iter()
            .filter(|domain| numbers.contains(domain.number))
            .collect();
        let known = domains.iter().map(|domain| domain.number).collect();
        let unknown = numbers - &known;
        if !unknown.is_empty() {
            // `llc:1,6` may be meant as an LLC domain and a CPU.
            let meant_as_cpus = unknown != *numbers && unknown.is_subset(&topology.present);
            let hint = if meant_as_cpus {
                format!("; for CPU {unknown} write cpu:{unknown}")
            } else {
                String::new()
            };
            let why = format!(
                "no such {}{hint}; {}",
                in_words(kind),
                there_are(topology, kind, false)
            );
            return Err(Error::unusable(format!("{part}:{unknown}"), why));
        }
        if let Some(domain) = domains.iter().find(|domain| !domain.sure) {
            let why = format!(
                "whether this is CPU {} is uncertain: offline CPU {} could form one before it; \
                 bring them online, or write CPUs by number",
                domain.cpus,
                topology.offline()
            );
            return Err(Error::unusable(format!("{part}:{}", domain.number), why));
        }
        Ok(domains
            .iter()
            .flat_map(|domain| domain.cpus.iter())
            .collect())
    }

    fn cores(&self, part: Part, cpus: &CpuSet) -> Result<CpuSet> {
        cpu::check_present(self.root, cpus)?;
        let topology = self.topology()?;
        let offline = cpus - &topology.online;
        if !offline.is_empty() {
            let why = format!(
                "offline, and the kernel does not report its core; online are {}",
                topology.online
            );
            return Err(Error::unusable(format!("{part}:{offline}"), why));
        }
        Ok(topology
            .cores
            .iter()
            .filter(|core| core.intersects(cpus))
            .flat_map(CpuSet::iter)
            .collect())
    }

    /// The CPUs of a VM's vCPU threads now: their masks have CPUs, too, that are offline or could
    /// be plugged in.
    fn vcpus(&self, vmid: VmId) -> Result<CpuSet> {
        let threads = vm::threads(
            self.root,
            &vm::require_running(self.root, vmid)?,
            qmp::DEFAULT_BUDGET,
        )?;
        let vcpus = threads
            .threads
            .iter()
            .filter(|thread| matches!(thread.role, Role::Vcpu(_)));
        let cpus: CpuSet = vcpus.flat_map(|thread| thread.allowed.iter()).collect();
        if cpus.is_empty() {
            let why = format!("its vCPU threads are unknown; see pin-vcpu --list {vmid}");
            return Err(Error::unusable(format!("vm:{vmid}"), why));
        }
        Ok(&cpus & &cpu::online(self.root)?)
    }
}

fn in_words(kind: Kind) -> &'static str {
    match kind {
        Kind::Package => "package",
        Kind::Die => "die",
        Kind::Llc => "LLC domain",
        Kind::Node => "NUMA node with CPUs",
    }
}

/// `this host has llc:0 (CPU 0-5,12-17) and llc:1 (CPU 6-11,18-23)`, and what is offline.
fn there_are(topology: &Topology, kind: Kind, with_extent: bool) -> String {
    let part = match kind {
        Kind::Package => Part::Package,
        Kind::Die => Part::Die,
        Kind::Llc => Part::Llc,
        Kind::Node => Part::Node,
    };
    let domains = topology.domains(kind);
    let one = |domain: &Domain| {
        let extent = if with_extent {
            format!(", {}", domain.extent)
        } else {
            String::new()
        };
        format!("{part}:{} (CPU {}{extent})", domain.number, domain.cpus)
    };
    let all = match domains {
        [] => format!("no {part}"),
        [others @ .., last] if domains.len() <= MAX_LISTED => {
            let before: Vec<String> = others.iter().map(one).collect();
            let and = if before.is_empty() { "" } else { " and " };
            format!("{}{and}{}", before.join(", "), one(last))
        }
        _ => {
            let numbers: CpuSet = domains.iter().map(|domain| domain.number).collect();
            format!("{part}:{numbers}; `hook layout` shows them")
        }
    };
    format!("this host has {all}{}", but_offline(topology))
}

fn but_offline(topology: &Topology) -> String {
    let offline = topology.offline();
    if offline.is_empty() {
        return String::new();
    }
    format!("; CPU {offline} offline, and the kernel does not report where they belong")
}

impl Selector {
    /// The CPUs on this host. For several expressions [`Resolver::resolve`] saves looking again.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub fn resolve(&self, root: &Sysroot) -> Result<CpuSet> {
        Resolver::new(root).resolve(self)
    }
}

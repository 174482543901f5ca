//! What the checks of every VM read of the host, read once for all of them.

use std::cell::OnceCell;

use cg_slice::partition::Siblings;
use pinfold_core::selector::Resolver;
use pinfold_core::sys::cpufreq::{self, Policy};
use pinfold_core::sys::task;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{CpuSet, Host, Result};

use crate::choice::{AllClaims, Areas};
use crate::claims::{self, Vms};

/// The host around the VMs that are checked. Nothing is read before it is needed.
#[derive(Debug)]
pub(crate) struct SharedReadings<'a> {
    pub root: &'a Host,
    /// The host's CPUs, for settings and checks.
    pub cpus: Resolver<'a>,
    /// The cgroups beside those of the VMs.
    pub siblings: Siblings,
    areas: OnceCell<Areas>,
    claims: OnceCell<AllClaims>,
    policies: OnceCell<Vec<Policy>>,
    vms: OnceCell<Vms>,
    pinned_containers: OnceCell<Vec<(VmId, CpuSet)>>,
    balancers: OnceCell<Vec<Balancer>>,
    programs: OnceCell<Vec<Program>>,
}

/// A running program.
#[derive(Debug)]
pub(crate) struct Program {
    pub pid: i32,
    pub name: &'static str,
}

/// A running irqbalance.
#[derive(Debug)]
pub(crate) struct Balancer {
    pub pid: i32,
    /// The CPUs that it does not use.
    pub banned: CpuSet,
}

impl<'a> SharedReadings<'a> {
    pub(crate) fn new(root: &'a Host) -> Self {
        Self {
            root,
            cpus: Resolver::new(root),
            siblings: Siblings::default(),
            areas: OnceCell::new(),
            claims: OnceCell::new(),
            policies: OnceCell::new(),
            vms: OnceCell::new(),
            pinned_containers: OnceCell::new(),
            balancers: OnceCell::new(),
            programs: OnceCell::new(),
        }
    }

    /// The areas of the host that VMs can have.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub(crate) fn areas(&self) -> Result<&Areas> {
        let topology = self.cpus.topology()?;
        Ok(self.areas.get_or_init(|| Areas::new(topology)))
    }

    /// The CPUs that VMs and containers use, or will use when they start. What cannot be read is
    /// left out.
    pub(crate) fn claims(&self) -> &AllClaims {
        self.claims.get_or_init(|| {
            let none = Vms::new();
            let vms = self.vms().unwrap_or(&none);
            let (claims, _) = claims::of_all(self.root, &self.cpus, vms, self.pinned_containers());
            AllClaims::new(&claims)
        })
    }

    /// The VMs of this node with their settings at Proxmox VE.
    ///
    /// # Errors
    /// If the VMs cannot be listed.
    pub(crate) fn vms(&self) -> Result<&Vms> {
        once(&self.vms, || claims::vms(self.root))
    }

    /// The containers that are pinned to CPUs, with these. What cannot be read is left out.
    pub(crate) fn pinned_containers(&self) -> &[(VmId, CpuSet)] {
        let read = || vm::pinned_containers(self.root);
        self.pinned_containers.get_or_init(read)
    }

    /// The cpufreq policies.
    ///
    /// # Errors
    /// If cpufreq cannot be read.
    pub(crate) fn policies(&self) -> Result<&[Policy]> {
        Ok(once(&self.policies, || cpufreq::policies(self.root))?)
    }

    /// The irqbalance processes.
    ///
    /// # Errors
    /// If /proc cannot be listed. Processes that have ended are skipped.
    pub(crate) fn balancers(&self) -> Result<&[Balancer]> {
        let balancers = once(&self.balancers, || {
            let balancers = self.programs()?.iter();
            let balancers = balancers.filter(|program| program.name == IRQBALANCE);
            let balancer = |&Program { pid, .. }: &Program| Balancer {
                pid,
                banned: banned(self.root, pid),
            };
            Ok(balancers.map(balancer).collect())
        })?;
        Ok(balancers)
    }

    /// The programs that set governors and masks of the whole host.
    ///
    /// # Errors
    /// If /proc cannot be listed. Processes that have ended are skipped.
    pub(crate) fn tuners(&self) -> Result<impl Iterator<Item = &Program>> {
        let programs = self.programs()?.iter();
        Ok(programs.filter(|program| program.name != IRQBALANCE))
    }

    /// The running programs that work against hook.
    fn programs(&self) -> Result<&[Program]> {
        let programs = once(&self.programs, || {
            let program = |pid| {
                let comm = self.root.read_value(format!("proc/{pid}/comm"));
                let name = program(comm.ok().flatten()?.as_str())?;
                Some(Program { pid, name })
            };
            let pids = task::user_pids(self.root)?;
            Ok(pids.into_iter().filter_map(program).collect())
        })?;
        Ok(programs)
    }
}

/// The program that moves IRQs.
const IRQBALANCE: &str = "irqbalance";

/// A program that works against hook, by its `comm`, which has 15 bytes.
fn program(comm: &str) -> Option<&'static str> {
    match comm {
        IRQBALANCE => Some(IRQBALANCE),
        "tuned" => Some("tuned"),
        "power-profiles-" => Some("power-profiles-daemon"),
        _ => None,
    }
}

/// What a cell has, from `read` the first time that this succeeds.
fn once<T>(cell: &OnceCell<T>, read: impl FnOnce() -> Result<T>) -> Result<&T> {
    match cell.get() {
        Some(known) => Ok(known),
        None => {
            let found = read()?;
            Ok(cell.get_or_init(|| found))
        }
    }
}

/// The CPUs that an irqbalance does not use, from its environment; none if that cannot be read. See
/// irqbalance(1) and its cputree.c, `setup_banned_cpus`: the list takes precedence.
fn banned(root: &Host, pid: i32) -> CpuSet {
    let environ = root.read(format!("proc/{pid}/environ")).unwrap_or_default();
    let value = |name: &str| {
        environ
            .split('\0')
            .find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    };
    let list = value("IRQBALANCE_BANNED_CPULIST").map(|list| CpuSet::from_kernel_list(list).ok());
    let mask = || value("IRQBALANCE_BANNED_CPUS").map(|mask| CpuSet::from_mask(mask).ok());
    list.or_else(mask).flatten().unwrap_or_default()
}

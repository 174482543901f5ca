//! Other users of CPUs: VMs and containers.

use std::collections::BTreeMap;
use std::fmt;

use pinfold_core::CpuSet;
use pinfold_core::vm::VmId;

/// Another user of CPUs: a VM or a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    Vm(VmId),
    Container(VmId),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vmid) => write!(f, "VM {vmid}"),
            Self::Container(vmid) => write!(f, "container {vmid}"),
        }
    }
}

/// CPUs that another VM or a container uses, or will use when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub owner: Owner,
    pub cpus: CpuSet,
    /// Whether it has them for itself, so that the two cannot run at a time.
    pub exclusive: bool,
}

impl Claim {
    /// The part of the claim that is among some CPUs.
    pub(crate) fn among(&self, cpus: &CpuSet) -> Self {
        Self {
            cpus: &self.cpus & cpus,
            ..self.clone()
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.exclusive {
            "belongs to"
        } else {
            "is used by"
        };
        write!(f, "CPU {} {verb} {}", self.cpus, self.owner)
    }
}

/// The CPUs that are claimed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claimed {
    /// Those that others have for themselves.
    pub exclusive: CpuSet,
    pub all: CpuSet,
}

impl Claimed {
    /// By any of some claims.
    pub(crate) fn by(claims: &[Claim]) -> Self {
        let mut claimed = Self::default();
        for claim in claims {
            claimed.add(claim);
        }
        claimed
    }

    fn add(&mut self, claim: &Claim) {
        self.all = &self.all | &claim.cpus;
        if claim.exclusive {
            self.exclusive = &self.exclusive | &claim.cpus;
        }
    }

    /// How many of some CPUs are.
    pub(super) fn count(&self, cpus: &CpuSet) -> (usize, usize) {
        ((cpus & &self.exclusive).len(), (cpus & &self.all).len())
    }
}

/// The claims of all VMs and containers, joined once: what others than one of them claim is then a
/// matter of a few sets, however many they are.
#[derive(Debug)]
pub(crate) struct AllClaims {
    /// By any owner.
    once: Claimed,
    /// By more than one.
    twice: Claimed,
    by_owner: BTreeMap<Owner, Claimed>,
}

impl AllClaims {
    pub(crate) fn new(claims: &[Claim]) -> Self {
        let mut by_owner: BTreeMap<Owner, Claimed> = BTreeMap::new();
        for claim in claims {
            by_owner.entry(claim.owner).or_default().add(claim);
        }
        let (mut once, mut twice) = (Claimed::default(), Claimed::default());
        for own in by_owner.values() {
            twice = twice.or(&once.both(own));
            once = once.or(own);
        }
        Self {
            once,
            twice,
            by_owner,
        }
    }

    /// What others than one owner claim.
    pub(crate) fn of_others(&self, owner: Owner) -> Claimed {
        match self.by_owner.get(&owner) {
            Some(own) => self.once.but(&own.but(&self.twice)),
            None => self.once.clone(),
        }
    }
}

impl Claimed {
    fn join(&self, other: &Self, join: impl Fn(&CpuSet, &CpuSet) -> CpuSet) -> Self {
        Self {
            exclusive: join(&self.exclusive, &other.exclusive),
            all: join(&self.all, &other.all),
        }
    }

    fn or(&self, other: &Self) -> Self {
        self.join(other, |a, b| a | b)
    }

    fn both(&self, other: &Self) -> Self {
        self.join(other, |a, b| a & b)
    }

    fn but(&self, other: &Self) -> Self {
        self.join(other, |a, b| a - b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn of_others_is_all_without_ones_own(
            claims in prop::collection::vec(
                (100..105u32, any::<bool>(), prop::collection::btree_set(0..70usize, 0..6)),
                0..12,
            ),
        ) {
            let claim = |(id, exclusive, cpus): (u32, bool, std::collections::BTreeSet<usize>)| {
                Claim {
                    owner: Owner::Vm(id.try_into().unwrap()),
                    cpus: cpus.into_iter().collect(),
                    exclusive,
                }
            };
            let claims: Vec<Claim> = claims.into_iter().map(claim).collect();
            let all = AllClaims::new(&claims);
            for id in 100..106u32 {
                let owner = Owner::Vm(id.try_into().unwrap());
                let mut others = claims.clone();
                others.retain(|claim| claim.owner != owner);
                let (found, right) = (all.of_others(owner), Claimed::by(&others));
                prop_assert_eq!(found.exclusive, right.exclusive);
                prop_assert_eq!(found.all, right.all);
            }
        }
    }
}

//! The choice: of all places with room for a guest, the one that an expert would take.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use pinfold_core::CpuSet;
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Kind, Topology};

use super::areas::{Area, Areas, Group, PartOf, SCOPES, neighbours, whole_parts};
use super::claims::{Claim, Claimed};
use super::filling::{fill, in_vcpu_order};
use super::guest::{Cell, Guest, cpus_of_nodes};
use super::outcome::{Facts, PassedOver, Reason, VcacheRoom, Verdict};

/// A request for CPUs: the machine, the guest, and the CPUs that others use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub topology: &'a Topology,
    /// Those of the topology.
    pub areas: &'a Areas,
    pub guest: &'a Guest,
    /// The CPUs of other VMs and of containers.
    pub claimed: &'a Claimed,
    /// The CPUs to choose among; all if none.
    pub within: Option<&'a CpuSet>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The CPUs to isolate: exactly the whole cores that the pins use.
    pub isolated: CpuSet,
    /// The CPU of each vCPU, by its number.
    pub pins: Vec<CpuSet>,
    /// Facts about these CPUs.
    pub facts: Facts,
    /// The same as sentences, in their order.
    pub reasons: Vec<Reason>,
    /// The other LLC domains.
    pub passed_over: Vec<PassedOver>,
}

/// How good a place is, the most important first; less is better (docs/design.md, "What init
/// chooses").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// CPUs of others, first those that they have for themselves.
    shared: (usize, usize),
    /// vCPUs on small cores, and of these on the slowest ones.
    small: usize,
    slowest: usize,
    /// vCPUs on NUMA nodes other than that of their memory.
    far_memory: usize,
    /// NUMA nodes other than those of the guest's devices.
    far_devices: usize,
    nodes: usize,
    /// vCPUs, or guest cores, beyond the first on a core.
    doubled: usize,
    /// Guest cores with threads on several of the host's.
    split: usize,
    llcs: usize,
    beside_host: bool,
    unaligned: (bool, usize),
    /// The CPUs of the LLC domains.
    size: usize,
}

impl Rank {
    /// Whether it has a fast core of its own for each vCPU or guest core, near memory and devices,
    /// and no CPU of others.
    fn has_all(&self) -> bool {
        let Self {
            shared,
            small,
            far_memory,
            far_devices,
            doubled,
            split,
            ..
        } = *self;
        shared == (0, 0) && small + far_memory + far_devices + doubled + split == 0
    }
}

/// CPUs with their rank.
#[derive(Debug, Clone)]
struct Place {
    isolated: CpuSet,
    rank: Rank,
}

/// Chooses CPUs for a guest; `claims` are those that `claimed` is made of.
///
/// # Errors
/// If the machine, or the part of it that is asked for, has too few CPUs.
pub(crate) fn choose(question: &Question<'_>, claims: &[Claim]) -> Result<Choice, NoRoom> {
    match cpus(question) {
        Some(isolated) => Ok(explain(question, claims, isolated, false)),
        None => Err(no_room(question)),
    }
}

/// Facts about the CPUs that [`choose`] would choose, without the claims of others; `None` if the
/// host has no room.
pub(crate) fn best(question: &Question<'_>) -> Option<Facts> {
    let isolated = cpus(question)?;
    let Question {
        topology, guest, ..
    } = question;
    Some(Facts::of(topology, guest, &isolated, &[]))
}

/// The answer for CPUs that were chosen elsewhere, as by `--cpus`.
pub(crate) fn given(question: &Question<'_>, claims: &[Claim], isolated: CpuSet) -> Choice {
    explain(question, claims, isolated, true)
}

fn cpus(question: &Question<'_>) -> Option<CpuSet> {
    by_cells(question).or_else(|| {
        let place = find(question)?;
        Some(evenly(question, &place).unwrap_or(place.isolated))
    })
}

/// As many CPUs of each node of a place on several, so that the guest can have a NUMA cell per node;
/// none if that is worse.
fn evenly(question: &Question<'_>, place: &Place) -> Option<CpuSet> {
    let Question {
        topology, guest, ..
    } = question;
    let nodes = Facts::of(topology, guest, &place.isolated, &[]).nodes;
    let per_node = guest.vcpus.checked_div(nodes.len())?;
    if nodes.len() < 2
        || !guest.cells.is_empty()
        || !guest
            .vcpus
            .is_multiple_of(nodes.len() * guest.threads.max(1))
    {
        return None;
    }
    let cells = nodes.iter().enumerate().map(|(at, node)| Cell {
        vcpus: CpuSet::range(at * per_node, (at + 1) * per_node - 1),
        nodes: [node].into_iter().collect(),
    });
    let isolated = by_cells(&Question {
        guest: &Guest {
            cells: cells.collect(),
            ..(*guest).clone()
        },
        ..*question
    })?;
    let even = rank_of(
        question,
        &isolated,
        &Facts::of(topology, guest, &isolated, &[]),
    );
    let rank = place.rank;
    let is_as_good = even.shared <= rank.shared
        && even.small <= rank.small
        && even.doubled <= rank.doubled
        && even.llcs <= rank.llcs
        && even.beside_host <= rank.beside_host;
    is_as_good.then_some(isolated)
}

/// The host has no room for a guest: the CPUs that it could have, and its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoRoom {
    /// The CPUs that a guest can have: whole cores but for that of CPU 0.
    pub usable: CpuSet,
    /// The guest's vCPUs.
    pub vcpus: usize,
}

fn no_room(question: &Question<'_>) -> NoRoom {
    NoRoom {
        usable: usable(question),
        vcpus: question.guest.vcpus,
    }
}

/// The CPUs that may be chosen: whole cores but for that of CPU 0.
fn usable(question: &Question<'_>) -> CpuSet {
    let usable = &question.areas.usable;
    let Some(within) = question.within else {
        return usable.clone();
    };
    let cores = question.topology.cores_of(&(usable & within));
    cores
        .filter(|core| core.is_subset(within))
        .flat_map(CpuSet::iter)
        .collect()
}

/// The best place in each cell's nodes, if the memory of the guest's cells is bound to different
/// nodes; none if one of them has no room.
fn by_cells(question: &Question<'_>) -> Option<CpuSet> {
    let guest = question.guest;
    if guest.cells.len() < 2 {
        return None;
    }
    let mut all = CpuSet::new();
    let mut bound = CpuSet::new();
    // Those that can be on few nodes choose first.
    let mut cells: Vec<&Cell> = guest.cells.iter().collect();
    cells.sort_by_key(|cell| cell.nodes.len());
    for cell in cells {
        let near = cpus_of_nodes(question.topology, &cell.nodes);
        let vcpus = &(&cell.vcpus & &CpuSet::range(0, guest.vcpus - 1)) - &bound;
        bound = &bound | &vcpus;
        if vcpus.is_empty() {
            continue;
        }
        let within = &(&near & question.within.unwrap_or(&question.topology.online)) - &all;
        let of_cell = Guest {
            vcpus: vcpus.len(),
            threads: guest.threads,
            cells: Vec::new(),
            device_nodes: CpuSet::new(),
        };
        let place = find(&Question {
            guest: &of_cell,
            within: Some(&within),
            ..*question
        })?;
        all = &all | &place.isolated;
    }
    let unbound = guest.vcpus.saturating_sub(bound.len());
    if unbound > 0 {
        let online = question.within.unwrap_or(&question.topology.online);
        let place = find(&Question {
            guest: &Guest {
                vcpus: unbound,
                threads: guest.threads,
                cells: Vec::new(),
                device_nodes: CpuSet::new(),
            },
            within: Some(&(online - &all)),
            ..*question
        })?;
        all = &all | &place.isolated;
    }
    Some(all)
}

/// The best place. CPUs of other VMs are taken only if there is no room without.
fn find(question: &Question<'_>) -> Option<Place> {
    let (usable, claimed) = (usable(question), question.claimed);
    let among = |cpus: &CpuSet| best_of(question, &question.areas.among(cpus));
    among(&(&usable - &claimed.all))
        .or_else(|| among(&(&usable - &claimed.exclusive)))
        .or_else(|| among(&usable))
}

/// The best place in one LLC domain, by its position.
fn find_in_llc(question: &Question<'_>, llc: usize, cpus: &CpuSet) -> Option<Place> {
    best_of(question, &question.areas.of_llc(llc, cpus))
}

/// The best place in the narrowest scope that has one; in a wider one if that has more CPUs near the
/// guest's memory. Of places that are alike it is the first.
fn best_of(question: &Question<'_>, areas: &[Area]) -> Option<Place> {
    let mut best: Option<Place> = None;
    for part in SCOPES {
        let found = with_all(question, areas, part).or_else(|| best_in(question, areas, part));
        best = match (best, found) {
            (Some(best), Some(found)) if best.rank <= found.rank => Some(best),
            (best, found) => found.or(best),
        };
        if best.as_ref().is_some_and(|best| best.rank.far_memory == 0) {
            break;
        }
    }
    best
}

/// What [`best_in`] finds, if that is a place [that has all](Rank::has_all). On a large machine a large
/// guest has room in many groups that are too small for that: no place is looked for in these.
fn with_all(question: &Question<'_>, areas: &[Area], part: PartOf) -> Option<Place> {
    let mut best: Option<Place> = None;
    // What the groups that are too small could have at best.
    let mut best_of_others: Option<Rank> = None;
    for size in 1..=areas.len() {
        let groups = neighbours(areas, part, size);
        for group in groups.filter(|group| has_room(question, group)) {
            let at_best = at_best(question, &group);
            if !at_best.has_all() {
                best_of_others = Some(best_of_others.map_or(at_best, |least| least.min(at_best)));
            } else if best.as_ref().is_none_or(|best| at_best < best.rank) {
                let place = fit(question, &group);
                if best.as_ref().is_none_or(|best| place.rank < best.rank) {
                    best = Some(place);
                }
            }
        }
        let Some(best) = best.as_ref().filter(|best| best.rank.has_all()) else {
            continue;
        };
        // One on fewer nodes is better even if it has not all.
        let is_best = best_of_others.is_none_or(|others| best.rank <= others);
        return is_best.then(|| best.clone());
    }
    None
}

/// The best place in a scope.
fn best_in(question: &Question<'_>, areas: &[Area], part: PartOf) -> Option<Place> {
    let mut best: Option<Place> = None;
    let mut take_better = |groups: &mut dyn Iterator<Item = Group<'_>>| {
        for group in groups.filter(|group| has_room(question, group)) {
            // Most parts of a machine are alike.
            let is_worse = |best: &Place| best.rank <= at_best(question, &group);
            if best.as_ref().is_some_and(is_worse) {
                continue;
            }
            let place = fit(question, &group);
            if best.as_ref().is_none_or(|best| place.rank < best.rank) {
                best = Some(place);
            }
        }
        // More domains are of no use then.
        best.as_ref().is_some_and(|best| best.rank.has_all())
    };
    let is_found = (1..=areas.len()).any(|size| take_better(&mut neighbours(areas, part, size)));
    if !is_found {
        take_better(&mut whole_parts(areas, part));
    }
    best
}

fn has_room(question: &Question<'_>, group: &Group<'_>) -> bool {
    let room: usize = group.areas.iter().map(|area| area.room).sum();
    room >= question.guest.vcpus
}

/// A rank that a place in a group cannot be better than, by what costs little to know.
fn at_best(question: &Question<'_>, group: &Group<'_>) -> Rank {
    let Question {
        topology, guest, ..
    } = question;
    let areas = || group.areas.iter();
    let nodes = topology.domains(Kind::Node);
    let room_near = |near: &CpuSet| -> usize {
        let near = areas().filter(|area| near.contains(nodes[area.node].number));
        near.map(|area| area.room).sum()
    };
    let devices = &guest.device_nodes;
    let is_far = guest.vcpus > 0 && !devices.is_empty() && room_near(devices) == 0;
    let far_memory = guest.cells.iter().map(|cell| {
        let vcpus = cell.vcpus.iter().filter(|vcpu| *vcpu < guest.vcpus);
        vcpus.count().saturating_sub(room_near(&cell.nodes))
    });
    // The same vCPU may be in several.
    let far_memory = far_memory.max().unwrap_or(0);
    let is_split = question.areas.threads < guest.threads;
    let parts = |largest: Option<usize>| guest.vcpus.div_ceil(largest.unwrap_or(1).max(1));
    let cores: usize = areas().map(|area| area.cores.len()).sum();
    let on = |slow: &CpuSet| {
        let others: usize = areas().map(|area| area.cpus_without(slow)).sum();
        guest.vcpus.saturating_sub(others)
    };
    let guest_cores = guest.vcpus.div_ceil(guest.threads.max(1));
    // Small cores come after the second threads of fast ones, so that a place may do with fewer.
    let apart = match topology.ecores.is_empty() {
        true => guest_cores.min(cores),
        false => 0,
    };
    // An LLC domain of several nodes has an area in each.
    let mut cores_of_llc = vec![0; topology.domains(Kind::Llc).len()];
    for area in areas() {
        if let Some(of_llc) = cores_of_llc.get_mut(area.llc) {
            *of_llc += area.cores.len();
        }
    }
    let most_cores = cores_of_llc.into_iter().max().unwrap_or(0);
    Rank {
        shared: (0, 0),
        small: on(&topology.ecores),
        slowest: on(&topology.slowest),
        far_memory,
        far_devices: usize::from(is_far),
        nodes: parts(nodes.iter().map(|node| node.cpus.len()).max()),
        doubled: guest_cores.saturating_sub(cores),
        split: usize::from(is_split) * (guest.vcpus / guest.threads.max(1)),
        llcs: parts(areas().map(|area| area.size).max()).max(apart.div_ceil(most_cores.max(1))),
        ..by_group(group)
    }
}

/// The part of a rank that all places in a group have.
fn by_group(group: &Group<'_>) -> Rank {
    Rank {
        unaligned: group.unaligned,
        beside_host: group.areas.iter().any(|area| area.beside_host),
        size: group.areas.iter().map(|area| area.size).sum(),
        ..Rank::default()
    }
}

/// The cores that a guest fills of a group that [has room](has_room) for it.
fn fit(question: &Question<'_>, group: &Group<'_>) -> Place {
    let Question {
        topology, guest, ..
    } = question;
    let isolated = filled(question, group);
    let facts = Facts::of(topology, guest, &isolated, &[]);
    let Rank {
        beside_host,
        unaligned,
        size,
        ..
    } = by_group(group);
    let rank = Rank {
        beside_host,
        unaligned,
        size,
        ..rank_of(question, &isolated, &facts)
    };
    Place { isolated, rank }
}

/// The cores of a group that a guest fills: first those that no other has.
fn filled(question: &Question<'_>, group: &Group<'_>) -> CpuSet {
    let Question {
        topology,
        guest,
        claimed,
        ..
    } = question;
    let whole =
        |cpus: &CpuSet| -> CpuSet { topology.cores_of(cpus).flat_map(CpuSet::iter).collect() };
    let mut classes: BTreeMap<_, Vec<CpuSet>> = BTreeMap::new();
    for core in group.areas.iter().flat_map(|area| area.cores.iter()) {
        let owners = (
            core.intersects(&claimed.exclusive),
            core.intersects(&claimed.all),
        );
        classes.entry(owners).or_default().push(core.clone());
    }
    let are_several = classes.len() > 1;
    let order = classes
        .into_values()
        .flat_map(|cores| fill(topology, &cores, guest.threads, &guest.cells));
    let used: CpuSet = order.take(guest.vcpus).collect();
    let isolated = whole(&used);
    if !are_several {
        return isolated;
    }
    // The pins may leave a small core idle that was filled before another's fast one.
    let pins = in_vcpu_order(topology, &isolated, guest.threads, &guest.cells);
    let pinned = pins.iter().take(guest.vcpus).flat_map(CpuSet::iter);
    whole(&pinned.collect())
}

/// The part of a rank that CPUs have, whatever group they are of.
fn rank_of(question: &Question<'_>, isolated: &CpuSet, facts: &Facts) -> Rank {
    let Question {
        topology, guest, ..
    } = question;
    let far_devices = match guest.device_nodes.is_empty() {
        true => 0,
        false => (&facts.nodes - &guest.device_nodes).len(),
    };
    Rank {
        shared: question.claimed.count(isolated),
        small: facts.on_small.len(),
        slowest: (&facts.on_small & &topology.slowest).len(),
        far_memory: facts.far_vcpus.len(),
        far_devices,
        nodes: facts.nodes.len(),
        doubled: facts.doubled,
        split: facts.split,
        llcs: facts.llcs.len(),
        beside_host: facts.beside_host,
        unaligned: (false, 0),
        size: facts.size,
    }
}

/// The answer for CPUs: pins, facts and what else there was.
fn explain(question: &Question<'_>, claims: &[Claim], isolated: CpuSet, are_given: bool) -> Choice {
    let Question {
        topology, guest, ..
    } = question;
    let mut pins = in_vcpu_order(topology, &isolated, guest.threads, &guest.cells);
    pins.truncate(guest.vcpus);
    let facts = Facts::of(topology, guest, &isolated, claims);
    let mut reasons = facts.reasons(topology, guest, room_by_vcache(question));
    let is_crowded = facts.doubled + facts.on_small.len() + facts.split > 0;
    if is_crowded || facts.llcs.len() > 1 {
        let llcs = topology.llcs_of(&isolated);
        let there: CpuSet = llcs.flat_map(|llc| llc.cpus.iter()).collect();
        let left = &(&there & &usable(question)) - &isolated;
        let theirs = claims.iter().filter(|claim| claim.cpus.intersects(&left));
        reasons.extend(theirs.map(|claim| Reason::Beside(claim.among(&left))));
    }
    Choice {
        passed_over: passed_over(question, claims, &isolated, &facts, are_given),
        isolated,
        pins,
        facts,
        reasons,
    }
}

/// The room for the guest in the domains with V-Cache.
pub(crate) fn room_by_vcache(question: &Question<'_>) -> VcacheRoom {
    let vcache = &question.areas.vcache;
    let place = find(&Question {
        within: Some(vcache),
        ..*question
    });
    if let Some(place) = place {
        let shared = &place.isolated & &question.claimed.all;
        return match shared.is_empty() {
            true => VcacheRoom::Free,
            false => VcacheRoom::Shared(shared),
        };
    }
    let is_large = vcache.len() >= question.guest.vcpus && vcache != &question.topology.online;
    match vcache.contains(cpu::BOOT_CPU) && is_large {
        true => VcacheRoom::WithCpu0,
        false => VcacheRoom::TooSmall,
    }
}

/// The LLC domains that nothing was taken of, each with the reason.
fn passed_over(
    question: &Question<'_>,
    claims: &[Claim],
    isolated: &CpuSet,
    facts: &Facts,
    are_given: bool,
) -> Vec<PassedOver> {
    let (topology, claimed) = (question.topology, question.claimed);
    let usable = usable(question);
    let best = rank_of(question, isolated, facts);
    // What an LLC domain would be if no other had CPUs there.
    let alone = Question {
        claimed: &Claimed::default(),
        ..*question
    };
    let vcache = &question.areas.vcache;
    let have_vcache = isolated.is_subset(vcache);
    let mut all = Vec::new();
    for (at, llc) in topology.domains(Kind::Llc).iter().enumerate() {
        let of_llc = &usable & &llc.cpus;
        if facts.llcs.contains(llc.number)
            || question
                .within
                .is_some_and(|within| !within.intersects(&llc.cpus))
        {
            continue;
        }
        let free = &of_llc - &claimed.all;
        let theirs = || {
            let theirs = claims.iter().filter(|claim| claim.cpus.intersects(&of_llc));
            Verdict::Claimed(theirs.map(|claim| claim.among(&of_llc)).collect())
        };
        let place = find_in_llc(question, at, &free);
        let would_be = match free == of_llc {
            true => None,
            false => find_in_llc(&alone, at, &of_llc),
        };
        let crowded = |rank: &Rank| (rank.small, rank.doubled, rank.split);
        let verdict = match (place, would_be) {
            (None, Some(_)) => theirs(),
            (None, None) => Verdict::TooFew,
            (Some(place), Some(alone)) if crowded(&alone.rank) < crowded(&place.rank) => theirs(),
            (Some(place), _) => match compared(question, &place.rank, &best, are_given) {
                Verdict::Better if have_vcache && !vcache.intersects(&llc.cpus) => {
                    Verdict::NoVcache
                }
                verdict => verdict,
            },
        };
        all.push(PassedOver {
            llc: llc.number,
            cpus: llc.cpus.clone(),
            free_cores: topology
                .cores_of(&free)
                .filter(|core| core.is_subset(&free))
                .count(),
            has_cpu_0: llc.cpus.contains(cpu::BOOT_CPU),
            verdict,
        });
    }
    all
}

/// Why a place in an LLC domain was passed over for a better one.
fn compared(question: &Question<'_>, rank: &Rank, best: &Rank, are_given: bool) -> Verdict {
    let devices = rank.far_devices > best.far_devices;
    let in_order = [
        (rank.small.cmp(&best.small), Verdict::SmallCores),
        (rank.slowest.cmp(&best.slowest), Verdict::SlowestCores),
        (
            rank.far_memory.cmp(&best.far_memory),
            Verdict::Farther {
                memory: true,
                devices,
            },
        ),
        (
            rank.far_devices.cmp(&best.far_devices),
            Verdict::Farther {
                memory: false,
                devices,
            },
        ),
        (
            rank.doubled.cmp(&best.doubled),
            Verdict::Doubled {
                guest_cores: question.guest.threads > 1,
            },
        ),
        (rank.split.cmp(&best.split), Verdict::Split),
        (
            rank.beside_host.cmp(&best.beside_host),
            Verdict::BesideHost {
                cache: question.areas.shares_cache,
            },
        ),
        (rank.size.cmp(&best.size), Verdict::Larger),
    ];
    for (order, worse) in in_order {
        match order {
            Ordering::Greater => return worse,
            // What hook chooses is worse only for the sake of the whole, as in cells.
            Ordering::Less if are_given => return Verdict::Better,
            _ => {}
        }
    }
    Verdict::AsGood
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use crate::choice::Owner;
    use pinfold_core::Host;
    use pinfold_core::testutils::machine;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    fn topology(name: &str) -> Topology {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&machine::text(name), dir.path());
        Topology::read(&Host::new(dir.path())).unwrap()
    }

    fn guest(vcpus: usize, threads: usize) -> Guest {
        Guest {
            vcpus,
            threads,
            ..Guest::default()
        }
    }

    #[test]
    fn choices() {
        for (name, vcpus, threads, isolated) in [
            ("5900x", 12, 2, "6-11,18-23"),
            ("5900x", 6, 1, "6-11,18-23"),
            ("5900x", 4, 1, "8-11,20-23"),
            ("5900x", 4, 2, "10-11,22-23"),
            ("5900x", 5, 2, "9-11,21-23"),
            // More vCPUs than a domain has cores: a core each, over both.
            ("5900x", 8, 1, "4-11,16-23"),
            ("5900x", 12, 1, "1-11,13-23"),
            // Away from CPU 0's domain, and of pairs of domains, which are a CCD each, as few as can be.
            ("3900", 8, 1, "3-8,10-11,15-20,22-23"),
            ("3960x", 16, 1, "6-20,23,30-44,47"),
            ("7950x3d", 16, 2, "8-15,24-31"),
            ("one-l3", 8, 2, "4-7,12-15"),
            ("one-l3", 14, 1, "1-7,9-15"),
            ("two-sockets", 8, 1, "1,3,5,7,9,11,13,15"),
            ("two-sockets", 10, 1, "1-7,9-15"),
            ("two-sockets", 16, 1, "none"),
            ("epyc-7763", 16, 2, "8-15,72-79"),
            ("epyc-fenced", 16, 2, "8-15,72-79"),
            ("hybrid", 4, 1, "8-15"),
            ("hybrid", 10, 1, "2-15"),
            ("hybrid", 14, 1, "2-15"),
            ("hybrid", 16, 1, "2-15,22-23"),
            ("hybrid", 15, 2, "2-15,23"),
            ("meteor-lake", 2, 1, "4-7"),
            ("meteor-lake", 9, 1, "2-7,9-11"),
            ("meteor-lake", 11, 1, "2-11,13"),
            ("big-little", 4, 1, "4-7"),
            ("big-little", 5, 1, "3-7"),
            ("smt-off", 6, 2, "6-11"),
            ("no-l3", 4, 1, "4-7"),
            ("bare", 3, 1, "1-3"),
            ("bare", 4, 1, "none"),
        ] {
            let topology = topology(name);
            let question = Question {
                topology: &topology,
                areas: &Areas::new(&topology),
                guest: &guest(vcpus, threads),
                claimed: &Claimed::default(),
                within: None,
            };
            let answer = choose(&question, &[]);
            let chosen = answer.map_or("none".to_owned(), |choice| choice.isolated.to_string());
            assert_eq!(
                chosen, isolated,
                "{name}: {vcpus} vCPUs, {threads} threads per core"
            );
        }
    }

    #[test]
    fn others_are_avoided_the_ones_that_share_last() {
        let claim = |id: u32, cpus: &str, exclusive| Claim {
            owner: Owner::Vm(id.try_into().unwrap()),
            cpus: cpus.parse().unwrap(),
            exclusive,
        };
        let topology = topology("5900x");
        for (claims, vcpus, isolated) in [
            (vec![claim(101, "6-11,18-23", true)], 4, "2-5,14-17"),
            (vec![claim(101, "8-9", false)], 4, "6-7,10-11,18-19,22-23"),
            // What is shared is taken before what another VM has for itself.
            (
                vec![
                    claim(101, "6-11,18-23", true),
                    claim(102, "1-5,13-17", false),
                ],
                4,
                "2-5,14-17",
            ),
            (
                vec![
                    claim(101, "6-11,18-23", true),
                    claim(102, "1-5,13-17", true),
                ],
                4,
                "8-11,20-23",
            ),
            // As few as can be, where it has to be some.
            (
                vec![
                    claim(101, "6-11,18-23", true),
                    claim(102, "1-3,13-15", true),
                ],
                6,
                "2-5,14-17",
            ),
        ] {
            let question = Question {
                topology: &topology,
                areas: &Areas::new(&topology),
                guest: &guest(vcpus, 1),
                claimed: &Claimed::by(&claims),
                within: None,
            };
            let choice = choose(&question, &claims);
            assert_eq!(choice.unwrap().isolated.to_string(), isolated, "{claims:?}");
        }
    }

    #[test]
    fn vcache_of_another_vm_is_not_promised() {
        let topology = topology("7950x3d");
        let claims = [Claim {
            owner: Owner::Vm(101.try_into().unwrap()),
            cpus: "2-7,18-23".parse().unwrap(),
            exclusive: true,
        }];
        for (vcpus, claims, way) in [
            (4, &[][..], "--vcache chooses there."),
            (2, &claims, "--vcache chooses there."),
            (
                4,
                &claims,
                "--vcache chooses there, and shares CPU 6-7,22-23 with others.",
            ),
            (
                15,
                &claims,
                "this VM has room there only with the core of CPU 0, by partition: --cpus 'vcache,core:0'.",
            ),
            (17, &claims, "this VM has no room there."),
        ] {
            let question = Question {
                topology: &topology,
                areas: &Areas::new(&topology),
                guest: &guest(vcpus, 1),
                claimed: &Claimed::by(claims),
                within: None,
            };
            let choice = given(&question, claims, "8-15,24-31".parse().unwrap());
            let text: Vec<String> = choice.reasons.iter().map(ToString::to_string).collect();
            let text = text.join(" ");
            assert!(text.contains(&format!("; {way}")), "{vcpus} vCPUs: {text}");
        }
    }

    #[test]
    fn as_many_vcpus_as_can_be_are_near_their_memory() {
        let topology = topology("two-sockets");
        let areas = Areas::new(&topology);
        for (vcpus, node, isolated, far) in [
            (6, 0, "2,4,6,10,12,14", "-"),
            // More than the node has: not all of it on the other one.
            (8, 0, "1-7,9-15", "4-7"),
            (10, 1, "1-7,9-15", "7-9"),
        ] {
            let guest = Guest {
                cells: vec![Cell {
                    vcpus: CpuSet::range(0, vcpus - 1),
                    nodes: [node].into_iter().collect(),
                }],
                ..guest(vcpus, 1)
            };
            let question = Question {
                topology: &topology,
                areas: &areas,
                guest: &guest,
                claimed: &Claimed::default(),
                within: None,
            };
            let choice = choose(&question, &[]).unwrap();
            assert_eq!(
                choice.isolated.to_string(),
                isolated,
                "{vcpus} vCPUs, node {node}"
            );
            let found = match choice.facts.far_vcpus.is_empty() {
                true => "-".to_owned(),
                false => choice.facts.far_vcpus.to_string(),
            };
            assert_eq!(found, far, "{vcpus} vCPUs, node {node}");
        }
    }

    #[test]
    fn guest_cores_get_whole_cores_if_there_are_any() {
        // The second threads of llc:1 are offline.
        let text = machine::text("5900x").replace("present 0-23", "present 0-23\noffline 18-23");
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&text, dir.path());
        let topology = Topology::read(&Host::new(dir.path())).unwrap();
        let question = Question {
            topology: &topology,
            areas: &Areas::new(&topology),
            guest: &guest(2, 2),
            claimed: &Claimed::default(),
            within: None,
        };
        let choice = choose(&question, &[]).unwrap();
        assert_eq!(choice.isolated.to_string(), "5,17");
        assert_eq!(choice.facts.split, 0);
    }

    #[test]
    fn what_is_better_than_cpus_asked_for_is_named() {
        let topology = topology("5900x");
        for (isolated, verdict) in [
            ("2-5,14-17", Verdict::Better),
            ("6-9,18-21", Verdict::BesideHost { cache: true }),
        ] {
            let question = Question {
                topology: &topology,
                areas: &Areas::new(&topology),
                guest: &guest(4, 1),
                claimed: &Claimed::default(),
                within: None,
            };
            let choice = given(&question, &[], isolated.parse().unwrap());
            let verdicts: Vec<_> = choice.passed_over.iter().map(|one| &one.verdict).collect();
            assert_eq!(verdicts, [&verdict], "{isolated}");
        }
    }

    #[test]
    fn a_cache_of_several_nodes_is_one_domain() {
        let topology = topology("numa-one-llc");
        let areas = Areas::new(&topology);
        let everywhere = areas.among(&topology.online);
        for vcpus in 1..=topology.online.len() {
            let question = Question {
                topology: &topology,
                areas: &areas,
                guest: &guest(vcpus, 1),
                claimed: &Claimed::default(),
                within: None,
            };
            for group in
                (1..=everywhere.len()).flat_map(|size| neighbours(&everywhere, SCOPES[2], size))
            {
                if has_room(&question, &group) {
                    let place = fit(&question, &group);
                    assert_eq!(place.rank.llcs, 1, "{vcpus} vCPUs: {place:?}");
                    assert!(
                        at_best(&question, &group) <= place.rank,
                        "{vcpus} vCPUs: {place:?}"
                    );
                }
            }
        }
    }

    /// So a group that is passed over for its best would not have been taken, and what is found without
    /// looking at small groups is what is found among all.
    #[test]
    fn no_place_is_better_than_its_group_at_best() {
        for (name, text) in machine::all() {
            let dir = tempfile::tempdir().unwrap();
            machine::expand(&text, dir.path());
            let topology = Topology::read(&Host::new(dir.path())).unwrap();
            let all = Areas::new(&topology);
            let cpus: Vec<usize> = topology.online.iter().collect();
            let some = || prop::sample::subsequence(cpus.clone(), 0..=cpus.len());
            let nodes = || prop::collection::btree_set(0..3usize, 0..3);
            let cell = (prop::collection::btree_set(0..20usize, 0..9), nodes());
            let vm = (0..cpus.len() + 2, 1..4usize, nodes());
            let cells = prop::collection::vec(cell, 0..3);
            let check =
                |(theirs, own, (vcpus, threads, devices), cells): (Vec<_>, Vec<_>, _, Vec<_>)| {
                    let cells = cells.into_iter().map(|(vcpus, nodes)| Cell {
                        vcpus: BTreeSet::into_iter(vcpus).collect(),
                        nodes: BTreeSet::into_iter(nodes).collect(),
                    });
                    let guest = Guest {
                        vcpus,
                        threads,
                        cells: cells.collect(),
                        device_nodes: BTreeSet::into_iter(devices).collect(),
                    };
                    let question = Question {
                        topology: &topology,
                        areas: &all,
                        guest: &guest,
                        claimed: &Claimed {
                            exclusive: CpuSet::new(),
                            all: theirs.into_iter().collect(),
                        },
                        within: None,
                    };
                    let areas = all.among(&own.into_iter().collect());
                    for part in SCOPES {
                        if let Some(found) = with_all(&question, &areas, part) {
                            let place = best_in(&question, &areas, part).unwrap();
                            prop_assert_eq!(
                                (found.isolated, found.rank),
                                (place.isolated, place.rank)
                            );
                        }
                        let groups =
                            (1..=areas.len()).flat_map(|size| neighbours(&areas, part, size));
                        for group in groups.chain(whole_parts(&areas, part)) {
                            if has_room(&question, &group) {
                                let (best, place) =
                                    (at_best(&question, &group), fit(&question, &group));
                                prop_assert!(best <= place.rank, "{best:?} {place:?}");
                            }
                        }
                    }
                    Ok(())
                };
            let usual = ProptestConfig::default();
            let config = ProptestConfig {
                cases: usual.cases.div_ceil(10),
                failure_persistence: None,
                ..usual
            };
            TestRunner::new(config)
                .run(&(some(), some(), vm, cells), check)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

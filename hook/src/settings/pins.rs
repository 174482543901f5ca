//! The settings' `pins`: which CPUs each vCPU may run on.

use pinfold_core::selector;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::{CpuSet, CpuSetError, MAX_CPU, Selector};
use serde::Deserialize;

/// More pins than the kernel has CPUs are no layout. A pin's set is as large as its CPU's number,
/// so they are counted before they are made.
const MAX_PINS: usize = MAX_CPU + 1;

/// The text of `pins` that leaves the order to hook.
const AUTO: &str = "auto";

/// Which CPUs each vCPU may run on, as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "\"auto\", CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU, as in [6, \"7,19\", \"core:8\"]"
)]
pub(super) enum Pins {
    /// CPU by CPU, in vCPU order; or [`AUTO`].
    InOrder(String),
    /// A list per vCPU.
    PerVcpu(Vec<Cpus>),
}

/// The CPUs of one vCPU.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Cpus {
    One(usize),
    Text(String),
}

impl Pins {
    /// Whether the order is left to hook: see [`auto`].
    pub(super) fn are_auto(&self) -> bool {
        matches!(self, Self::InOrder(text) if text.trim() == AUTO)
    }

    /// The CPUs of each vCPU as they are written, by its number; at least one each.
    ///
    /// # Errors
    /// What is wrong, with the vCPU or the token.
    pub(super) fn resolve(self, host: &selector::Resolver<'_>) -> Result<Vec<CpuSet>, String> {
        let pins = match self {
            Self::PerVcpu(lists) => {
                not_too_many(lists.len())?;
                let pin = |(vcpu, list)| match list {
                    Cpus::One(cpu) if cpu > MAX_CPU => {
                        Err(CpuSetError::TooLarge(cpu.to_string()).to_string())
                    }
                    Cpus::One(cpu) => Ok(one(cpu)),
                    Cpus::Text(text) => {
                        cpus(host, &text).map_err(|why| format!("vCPU {vcpu}: {why}"))
                    }
                };
                lists
                    .into_iter()
                    .enumerate()
                    .map(pin)
                    .collect::<Result<Vec<_>, _>>()?
            }
            Self::InOrder(text) => in_order(&text)?,
        };
        match pins.iter().position(CpuSet::is_empty) {
            Some(vcpu) => Err(format!("vCPU {vcpu} has no CPU")),
            None if pins.is_empty() => Err("no CPU at all".into()),
            None => Ok(pins),
        }
    }
}

/// The CPUs that a text stands for on the host; none for an empty one.
pub(super) fn cpus(
    host: &selector::Resolver<'_>,
    text: &str,
) -> std::result::Result<CpuSet, String> {
    if text.trim().is_empty() {
        return Ok(CpuSet::new());
    }
    let expr: Selector = text
        .parse()
        .map_err(|error: selector::SelectorError| error.to_string())?;
    if expr.names_vms() {
        // QEMU's monitor would be waited for as well, beyond the deadlines.
        let why = "where a VM's vCPUs may run changes as VMs come and go, settings do not; write the CPUs themselves";
        return Err(format!("{expr}: {why}"));
    }
    host.resolve(&expr).map_err(|error| error.to_string())
}

/// A CPU set has no order: token by token, ranges ascending. What a selector stands for has none
/// either, and whether the siblings of a core belong side by side is the guest's matter, so there
/// are none in here.
fn in_order(text: &str) -> Result<Vec<CpuSet>, String> {
    let mut pins = Vec::new();
    for token in text.split(',') {
        let cpus: CpuSet = token.parse().map_err(|error: CpuSetError| match text.parse::<Selector>() {
            Ok(_) => format!(
                "{:?} in {text:?} has no order; write \"auto\", CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU, as in \
                 [\"core:6\", \"core:6\"]",
                token.trim()
            ),
            Err(_) => error.to_string(),
        })?;
        not_too_many(pins.len() + cpus.len())?;
        pins.extend(cpus.iter().map(one));
    }
    Ok(pins)
}

/// A CPU for each vCPU, by its number: as many as are isolated. So whatever number of vCPUs a guest
/// has, its pins are the first of these.
///
/// A guest's core gets the threads of one of the host's: QEMU numbers vCPUs thread by thread.
/// Guests without SMT, with `threads` 1, get a thread of each core, then the next thread of each.
/// Cores come by LLC domain, the fast ones of a hybrid machine first; what is left of cores that
/// are no multiple of a guest's comes last.
pub(crate) fn auto(topology: &Topology, isolated: &CpuSet, threads: usize) -> Vec<CpuSet> {
    let llcs = topology.domains(Kind::Llc);
    let mut cores: Vec<CpuSet> = topology.cores.iter().map(|core| core & isolated).collect();
    // That they are offline is said elsewhere.
    cores.extend((isolated - &topology.online).iter().map(one));
    cores.sort_by_cached_key(|core| {
        llcs.iter()
            .position(|llc| llc.cpus.intersects(core))
            .unwrap_or(llcs.len())
    });
    let mut groups = Vec::new();
    for (at, core) in cores.iter().enumerate() {
        let cpus: Vec<usize> = core.iter().collect();
        for (round, group) in cpus.chunks(threads.max(1)).enumerate() {
            let is_rest = group.len() < threads;
            groups.push((
                (is_rest, core.intersects(&topology.ecores), round, at),
                group.to_vec(),
            ));
        }
    }
    groups.sort_unstable();
    groups
        .into_iter()
        .flat_map(|(_, group)| group.into_iter().map(one))
        .collect()
}

fn one(cpu: usize) -> CpuSet {
    [cpu].into_iter().collect()
}

fn not_too_many(count: usize) -> Result<(), String> {
    match count {
        ..=MAX_PINS => Ok(()),
        _ => Err(format!(
            "more than {MAX_PINS}, the most CPUs the kernel knows"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::machine;
    use pinfold_core::Host;
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    fn topology(text: &str) -> Topology {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(text, dir.path());
        Topology::read(&Host::new(dir.path())).unwrap()
    }

    fn numbers(pins: &[CpuSet]) -> Vec<usize> {
        assert!(
            pins.iter().all(|pin| pin.len() == 1),
            "a CPU each: {pins:?}"
        );
        pins.iter().flat_map(CpuSet::iter).collect()
    }

    #[test]
    fn a_guests_cores_are_the_hosts() {
        for (name, isolated, threads, order) in [
            ("5900x", "6-11,18-23", 2, "6 18 7 19 8 20 9 21 10 22 11 23"),
            ("5900x", "6-11,18-23", 1, "6 7 8 9 10 11 18 19 20 21 22 23"),
            ("5900x", "4-8,16-20", 1, "4 5 6 7 8 16 17 18 19 20"),
            ("5900x", "6-8,18", 2, "6 18 7 8"),
            ("5900x", "6-8,19-20", 1, "6 7 8 19 20"),
            ("5900x", "18-20", 1, "18 19 20"),
            ("5900x", "6-9,18-21", 4, "6 18 7 19 8 20 9 21"),
            ("two-sockets", "2-5,10-13", 2, "2 10 4 12 3 11 5 13"),
            ("two-sockets", "2-5,10-13", 1, "2 4 3 5 10 12 11 13"),
            ("hybrid", "2-5,16-17", 2, "2 3 4 5 16 17"),
            ("hybrid", "2-5,16-17", 1, "2 4 3 5 16 17"),
            ("hybrid", "3,5,16-17", 2, "3 5 16 17"),
            ("big-little", "2-5", 1, "4 5 2 3"),
            ("smt-off", "6-11", 2, "6 7 8 9 10 11"),
            ("5900x-offline", "10-11,22-23", 2, "10 22 23 11"),
            ("bare", "1-3", 2, "1 2 3"),
        ] {
            let (_, text) = machine::all()
                .into_iter()
                .find(|(known, _)| known == name)
                .unwrap();
            let pins = auto(&topology(&text), &isolated.parse().unwrap(), threads);
            let shown: Vec<String> = pins.iter().map(ToString::to_string).collect();
            assert_eq!(
                shown.join(" "),
                order,
                "{name}: {isolated}, {threads} threads per core"
            );
        }
    }

    #[test]
    fn whatever_is_isolated_on_whatever_machine() {
        for (name, text) in machine::all() {
            let topology = topology(&text);
            let cpus: Vec<usize> = topology.online.iter().collect();
            let in_core =
                |(at, core): (usize, &CpuSet)| core.iter().map(|cpu| (cpu, at)).collect::<Vec<_>>();
            let core: BTreeMap<usize, usize> = topology
                .cores
                .iter()
                .enumerate()
                .flat_map(in_core)
                .collect();
            let isolated = prop::sample::subsequence(cpus.clone(), 0..=cpus.len());
            let check = |(isolated, threads): (Vec<usize>, usize)| {
                let isolated: CpuSet = isolated.into_iter().collect();
                let pins = auto(&topology, &isolated, threads);
                prop_assert_eq!(&pins, &auto(&topology, &isolated, threads));
                let order = numbers(&pins);
                prop_assert_eq!(order.len(), isolated.len(), "no CPU twice");
                prop_assert_eq!(order.iter().copied().collect::<CpuSet>(), isolated.clone());
                let is_small = |cpu: &usize| topology.ecores.contains(*cpu);
                // As many guest cores as there can be are within one of the host's.
                let whole: usize = topology
                    .cores
                    .iter()
                    .map(|core| (core & &isolated).len() / threads * threads)
                    .sum();
                for guest_core in order[..whole].chunks(threads) {
                    prop_assert!(
                        guest_core
                            .iter()
                            .all(|cpu| core[cpu] == core[&guest_core[0]]),
                        "{:?}",
                        order
                    );
                }
                prop_assert!(
                    order[..whole].iter().is_sorted_by_key(is_small),
                    "{:?}",
                    order
                );
                prop_assert!(
                    order[whole..].iter().is_sorted_by_key(is_small),
                    "{:?}",
                    order
                );
                if threads == 1 {
                    // No core has a second vCPU before all of its kind have one.
                    let fast: Vec<usize> =
                        order.iter().copied().filter(|cpu| !is_small(cpu)).collect();
                    let cores: BTreeSet<usize> = fast.iter().map(|cpu| core[cpu]).collect();
                    let first: BTreeSet<usize> =
                        fast[..cores.len()].iter().map(|cpu| core[cpu]).collect();
                    prop_assert_eq!(first, cores, "{:?}", order);
                }
                Ok(())
            };
            let config = ProptestConfig {
                cases: 32,
                ..ProptestConfig::default()
            };
            TestRunner::new(config)
                .run(&(isolated, 1..5usize), check)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

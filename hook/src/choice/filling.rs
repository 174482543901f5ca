//! The order in which vCPUs fill cores.

use std::collections::VecDeque;

use pinfold_core::CpuSet;
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::Topology;

use super::guest::{Cell, cpus_of_nodes};

/// A CPU for each vCPU, by its number: as many as there are CPUs in `isolated`. So whatever number
/// of vCPUs a guest has, its pins are the first of these.
///
/// Cores come by LLC domain. The vCPUs of a cell get CPUs of the nodes that its memory is bound to,
/// as long as there are any.
pub(crate) fn in_vcpu_order(
    topology: &Topology,
    isolated: &CpuSet,
    threads: usize,
    cells: &[Cell],
) -> Vec<CpuSet> {
    let of_core = |core: &CpuSet| core & isolated;
    let mut cores: Vec<CpuSet> = topology.cores_of(isolated).map(of_core).collect();
    // That they are offline is reported elsewhere.
    cores.extend((isolated - &topology.online).iter().map(one));
    let llc = |core: &CpuSet| core.iter().filter_map(|cpu| topology.llc_of(cpu)).min();
    cores.sort_by_cached_key(|core| (llc(core).is_none(), llc(core)));
    let order = fill(topology, &cores, threads, cells);
    by_cells(topology, order, cells)
        .into_iter()
        .map(one)
        .collect()
}

/// The CPUs of cores in the order in which vCPUs fill them: fast cores, their further threads, small
/// cores, the slowest last, since a slow vCPU stalls the guest's locks. Cores that are alike are
/// filled in the order given, first those near the memory of the guest's cells, last that of CPU 0 and
/// those of which others have a thread.
///
/// A guest's core gets the threads of one of the host's: QEMU numbers vCPUs thread by thread. Guests
/// without SMT, with `threads` 1, get a thread of each core, then the next thread of each. What is
/// left of cores that are not a multiple of a guest's comes last.
pub(super) fn fill(
    topology: &Topology,
    cores: &[CpuSet],
    threads: usize,
    cells: &[Cell],
) -> Vec<usize> {
    let nodes = cells.iter().flat_map(|cell| cell.nodes.iter());
    let memory = cpus_of_nodes(topology, &nodes.collect());
    let mut groups = Vec::new();
    for (at, core) in cores.iter().enumerate() {
        let cpus: Vec<usize> = core.iter().collect();
        let whole = cpus.first().and_then(|cpu| topology.core_of(*cpu));
        let whole = whole.and_then(|at| topology.cores.get(at));
        let is_part = whole.is_some_and(|whole| whole.len() > core.len());
        let is_far = !memory.is_empty() && !core.intersects(&memory);
        let is_hosts = core.contains(cpu::BOOT_CPU);
        for (round, group) in cpus.chunks(threads.max(1)).enumerate() {
            let is_rest = group.len() < threads;
            groups.push((
                (
                    is_rest,
                    topology.slowness(core),
                    round,
                    is_far,
                    is_part,
                    is_hosts,
                    at,
                ),
                group.to_vec(),
            ));
        }
    }
    groups.sort_unstable();
    groups.into_iter().flat_map(|(_, group)| group).collect()
}

/// Orders CPUs so that the vCPUs of cells are on their nodes: first those of the cells, then the
/// rest in the given order. If a cell has more vCPUs than its nodes have CPUs, the CPUs that the
/// guest fills stay the same, and are only exchanged: else vCPUs would share cores there while
/// others were idle.
fn by_cells(topology: &Topology, order: Vec<usize>, cells: &[Cell]) -> Vec<usize> {
    let near: Vec<CpuSet> = cells
        .iter()
        .map(|cell| cpus_of_nodes(topology, &cell.nodes))
        .collect();
    let fits = |(cell, near): (&Cell, &CpuSet)| {
        let there = order.iter().filter(|cpu| near.contains(**cpu));
        there.count() >= cell.vcpus.len()
    };
    let filled = match cells.iter().zip(&near).all(fits) {
        true => order.len(),
        false => {
            let last = cells.iter().filter_map(|cell| cell.vcpus.last()).max();
            last.map_or(0, |last| order.len().min(last + 1))
        }
    };
    let mut by_vcpu: Vec<Option<usize>> = vec![None; order.len()];
    let mut left: VecDeque<usize> = order.into();
    let mut beyond = left.split_off(filled);
    for (cell, near) in cells.iter().zip(&near) {
        for vcpu in cell.vcpus.iter() {
            let at = left.iter().position(|cpu| near.contains(*cpu));
            if let (Some(place @ None), Some(at)) = (by_vcpu.get_mut(vcpu), at) {
                *place = left.remove(at);
            }
        }
    }
    left.append(&mut beyond);
    by_vcpu
        .into_iter()
        .filter_map(|cpu| cpu.or_else(|| left.pop_front()))
        .collect()
}

fn one(cpu: usize) -> CpuSet {
    [cpu].into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use pinfold_core::Host;
    use pinfold_core::testutils::machine;
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
            ("5900x", "6-8,19-20", 1, "7 8 6 19 20"),
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
            let text = machine::text(name);
            let pins = in_vcpu_order(&topology(&text), &isolated.parse().unwrap(), threads, &[]);
            let shown: Vec<String> = pins.iter().map(ToString::to_string).collect();
            assert_eq!(
                shown.join(" "),
                order,
                "{name}: {isolated}, {threads} threads per core"
            );
        }
    }

    #[test]
    fn cells_are_on_the_nodes_of_their_memory() {
        let cell = |vcpus: &str, nodes: &str| Cell {
            vcpus: vcpus.parse().unwrap(),
            nodes: nodes.parse().unwrap(),
        };
        let text = machine::text("two-sockets");
        let topology = topology(&text);
        for (isolated, threads, cells, order) in [
            (
                "2-5,10-13",
                1,
                vec![cell("0-3", "1"), cell("4-7", "0")],
                "3 5 11 13 2 4 10 12",
            ),
            (
                "2-5,10-13",
                2,
                vec![cell("0-3", "1"), cell("4-7", "0")],
                "3 11 5 13 2 10 4 12",
            ),
            (
                "2-5,10-13",
                2,
                vec![cell("4-7", "0"), cell("0-3", "1")],
                "3 11 5 13 2 10 4 12",
            ),
            // More vCPUs than the node has CPUs; a node that is not there; vCPUs that are not there.
            (
                "2-5,10-13",
                1,
                vec![cell("0-5", "1")],
                "3 5 11 13 2 4 10 12",
            ),
            (
                "2-5,10-13",
                1,
                vec![cell("0-3", "7")],
                "2 4 3 5 10 12 11 13",
            ),
            ("2,4", 1, vec![cell("0-8000", "0")], "2 4"),
        ] {
            let pins = in_vcpu_order(&topology, &isolated.parse().unwrap(), threads, &cells);
            let shown: Vec<String> = pins.iter().map(ToString::to_string).collect();
            assert_eq!(
                shown.join(" "),
                order,
                "{cells:?}, {threads} threads per core"
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
                let pins = in_vcpu_order(&topology, &isolated, threads, &[]);
                prop_assert_eq!(&pins, &in_vcpu_order(&topology, &isolated, threads, &[]));
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
            let usual = ProptestConfig::default();
            let config = ProptestConfig {
                cases: usual.cases.div_ceil(8),
                failure_persistence: None,
                ..usual
            };
            TestRunner::new(config)
                .run(&(isolated, 1..5usize), check)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

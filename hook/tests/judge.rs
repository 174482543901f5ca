//! A judge of what `hook init` chooses: for every machine of core's tests and guests of many sizes
//! it computes from the machine's text alone what must be so, and that every sentence is true.
//!
//! It shares no code with init and the readers of topology, so that it can disagree with them.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use pinfold_core::testutils::{machine, vm_conf, write};
use serde_json::Value;

type Cpus = BTreeSet<usize>;

/// A machine, by its text.
#[derive(Debug, Default)]
struct Machine {
    online: Cpus,
    cores: Vec<Cpus>,
    llcs: Vec<Llc>,
    /// CPUs by node; one node if the text has none.
    nodes: BTreeMap<usize, Cpus>,
    small: Cpus,
    /// Those of a third kind, slower than the other small ones.
    slowest: Cpus,
    amd: bool,
}

#[derive(Debug)]
struct Llc {
    cpus: Cpus,
    /// The size of an L3 in MiB; none for a stand-in.
    mib: Option<u64>,
}

/// The CPUs of a list as in `0-3,8`.
fn list(text: &str) -> Cpus {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.parse().unwrap()..=last.parse().unwrap()
    };
    text.split(',')
        .filter(|part| !part.is_empty())
        .flat_map(range)
        .collect()
}

impl Machine {
    fn read(text: &str) -> Self {
        let mut this = Self::default();
        let (mut dies, mut packages, mut caches) = (Vec::new(), Vec::new(), Vec::new());
        let (mut speeds, mut pmus) = (BTreeMap::new(), BTreeMap::new());
        for line in text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let words: Vec<&str> = line.split_whitespace().collect();
            let online = &this.online;
            let held = |word: usize| -> Cpus { &list(words[word]) & online };
            match words[0] {
                "present" => this.online = list(words[1]),
                "offline" => this.online = &this.online - &list(words[1]),
                "package" => packages.push(held(2)),
                "die" => dies.push(held(2)),
                "pairs" => {
                    let apart: usize = words[2].trim_start_matches('+').parse().unwrap();
                    for cpu in list(words[1]) {
                        this.cores.push(&Cpus::from([cpu, cpu + apart]) & online);
                    }
                }
                "single" => this
                    .cores
                    .extend(held(1).into_iter().map(|cpu| Cpus::from([cpu]))),
                "cache" => caches.push((
                    words[1].parse::<u32>().unwrap(),
                    words[3].trim_end_matches('K').parse::<u64>().ok(),
                    held(4),
                )),
                "node" => drop(this.nodes.insert(words[1].parse().unwrap(), held(2))),
                "pmu" => drop(pmus.insert(words[1].to_owned(), held(2))),
                "capacity" | "maxfreq" => {
                    let speed: u64 = words[1].parse().unwrap();
                    // Capacities come first in the texts, and count if there are any.
                    for cpu in held(2) {
                        speeds.entry(cpu).or_insert(speed);
                    }
                }
                "file" => this.amd |= words.contains(&"AuthenticAMD"),
                _ => {}
            }
        }
        this.cores.retain(|core| !core.is_empty());
        let in_cores: Cpus = this.cores.iter().flatten().copied().collect();
        let alone = &this.online - &in_cores;
        this.cores
            .extend(alone.into_iter().map(|cpu| Cpus::from([cpu])));
        this.nodes.retain(|_, cpus| !cpus.is_empty());
        if this.nodes.is_empty() {
            this.nodes.insert(0, this.online.clone());
        }
        this.llcs = domains(
            &this,
            &caches,
            if dies.is_empty() { &packages } else { &dies },
        );
        if let Some(fast) = pmus.get("cpu_core") {
            this.small = &this.online - fast;
        } else if speeds.len() == this.online.len() {
            this.small = slower(&this.online, &speeds);
        }
        this.slowest = slower(&this.small, &speeds);
        this
    }

    /// The cores that a VM may have: all but that of CPU 0.
    fn usable(&self) -> impl Iterator<Item = &Cpus> {
        self.cores.iter().filter(|core| !core.contains(&0))
    }

    fn is_fast(&self, core: &Cpus) -> bool {
        core.is_disjoint(&self.small)
    }

    fn has_vcache(&self, llc: &Llc) -> bool {
        let cores = self
            .cores
            .iter()
            .filter(|core| !core.is_disjoint(&llc.cpus))
            .count() as u64;
        self.amd && llc.mib.is_some_and(|mib| mib >= 64 && mib / cores >= 8)
    }

    fn core_of(&self, cpu: usize) -> usize {
        self.cores
            .iter()
            .position(|core| core.contains(&cpu))
            .unwrap()
    }
}

/// The CPUs below the highest gap of a fifth in the speeds of `cpus`.
fn slower(cpus: &Cpus, speeds: &BTreeMap<usize, u64>) -> Cpus {
    let speed = |cpu: &usize| speeds.get(cpu).copied().unwrap_or(0);
    let all: BTreeSet<u64> = cpus.iter().map(speed).collect();
    let all: Vec<u64> = all.into_iter().collect();
    let gap = all.windows(2).rev().find(|pair| pair[1] * 5 >= pair[0] * 6);
    let fast = gap.map_or(0, |pair| pair[1]);
    cpus.iter()
        .copied()
        .filter(|cpu| speed(cpu) < fast)
        .collect()
}

/// Groups by the highest cache that several cores share or that is an L3; what has none by die.
fn domains(machine: &Machine, caches: &[(u32, Option<u64>, Cpus)], dies: &[Cpus]) -> Vec<Llc> {
    let mut left = machine.online.clone();
    let mut llcs = Vec::new();
    let mut without = Cpus::new();
    while let Some(cpu) = left.first().copied() {
        let highest = caches
            .iter()
            .filter(|(_, _, cpus)| cpus.contains(&cpu))
            .max_by_key(|(level, ..)| *level);
        let shared = |cpus: &Cpus| {
            machine
                .cores
                .iter()
                .filter(|core| !core.is_disjoint(cpus))
                .count()
                > 1
        };
        match highest {
            Some((level, kib, cpus)) if *level >= 3 || shared(cpus) => {
                left = &left - cpus;
                let mib = kib.filter(|_| *level == 3).map(|kib| kib / 1024);
                llcs.push(Llc {
                    cpus: cpus.clone(),
                    mib,
                });
            }
            _ => {
                left.remove(&cpu);
                without.insert(cpu);
            }
        }
    }
    let stand_ins: Vec<Cpus> = match dies {
        [] => vec![machine.online.clone()],
        dies => dies.to_vec(),
    };
    for die in stand_ins {
        let cpus = &die & &without;
        if !cpus.is_empty() {
            llcs.push(Llc { cpus, mib: None });
        }
    }
    llcs
}

/// A guest to choose for.
#[derive(Debug)]
struct Guest {
    vcpus: usize,
    threads: usize,
    /// The NUMA node of its memory or its device.
    near: Option<(usize, &'static str)>,
}

impl Guest {
    fn conf(&self) -> String {
        let Self {
            vcpus,
            threads,
            near,
        } = self;
        let mut conf = format!("cores: {vcpus}\nmemory: 4096\nhookscript: local:snippets/hook\n");
        if *threads > 1 {
            let cores = vcpus / threads;
            conf += &format!(
                "args: -smp {vcpus},sockets=1,cores={cores},threads={threads},maxcpus={vcpus}\n"
            );
        }
        match near {
            Some((node, "memory")) => {
                let last = vcpus - 1;
                conf += &format!(
                    "numa: 1\nnuma0: cpus=0-{last},hostnodes={node},memory=4096,policy=bind\n"
                );
            }
            Some(_) => conf += "hostpci0: 0000:0b:00\n",
            None => {}
        }
        conf
    }
}

/// What is wrong with an answer.
fn faults(machine: &Machine, guest: &Guest, answer: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    let isolated = list(answer["isolated"].as_str().unwrap());
    let pins: Vec<usize> = answer["pins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pin| pin.as_str().unwrap().parse().unwrap())
        .collect();
    let used: Cpus = pins.iter().copied().collect();
    let mut expect = |is_so: bool, what: &str| {
        if !is_so {
            faults.push(what.to_owned());
        }
    };
    let &Guest {
        vcpus,
        threads,
        near,
    } = guest;
    expect(
        pins.len() == vcpus && used.len() == vcpus,
        "a CPU for each vCPU",
    );
    expect(used.is_subset(&isolated), "pins are isolated");
    let host_core = machine.cores.iter().find(|core| core.contains(&0));
    expect(
        host_core.is_none_or(|core| core.is_disjoint(&isolated)),
        "not the core of CPU 0",
    );
    let mine: Vec<&Cpus> = machine
        .cores
        .iter()
        .filter(|core| !core.is_disjoint(&isolated))
        .collect();
    expect(
        mine.iter().all(|core| core.is_subset(&isolated)),
        "whole cores",
    );
    expect(
        mine.iter().all(|core| !core.is_disjoint(&used)),
        "no idle core",
    );

    // The domains chosen: LLC domains within the nodes chosen.
    let nodes: BTreeSet<usize> = machine
        .nodes
        .iter()
        .filter(|(_, cpus)| !cpus.is_disjoint(&isolated))
        .map(|(node, _)| *node)
        .collect();
    let llcs: Vec<&Llc> = machine
        .llcs
        .iter()
        .filter(|llc| !llc.cpus.is_disjoint(&isolated))
        .collect();
    let of_nodes: Cpus = nodes
        .iter()
        .flat_map(|node| machine.nodes[node].iter().copied())
        .collect();
    let of_llcs: Cpus = llcs
        .iter()
        .flat_map(|llc| llc.cpus.iter().copied())
        .collect();
    let place = &of_llcs & &of_nodes;
    let free: Vec<&Cpus> = machine
        .usable()
        .filter(|core| core.is_subset(&place) && core.is_disjoint(&used))
        .collect();
    let mut per_core: BTreeMap<usize, usize> = BTreeMap::new();
    for cpu in &pins {
        *per_core.entry(machine.core_of(*cpu)).or_default() += 1;
    }
    if threads == 1 {
        let doubled = per_core
            .iter()
            .filter(|(_, count)| **count > 1)
            .map(|(core, _)| *core);
        let kinds: BTreeSet<bool> = doubled
            .map(|core| machine.is_fast(&machine.cores[core]))
            .collect();
        expect(
            !free
                .iter()
                .any(|core| kinds.contains(&machine.is_fast(core))),
            "no two vCPUs on a core while one of its kind is free in the domains chosen",
        );
    } else {
        let split = pins.chunks(threads).any(|core| {
            core.iter()
                .any(|cpu| machine.core_of(*cpu) != machine.core_of(core[0]))
        });
        expect(
            !split
                || !free
                    .iter()
                    .any(|core| core.len() >= threads && machine.is_fast(core)),
            "siblings on siblings",
        );
    }

    // Fast before small.
    let on_small = (&used & &machine.small).len();
    let fast_threads = |cpus: &Cpus| -> usize {
        let fast = machine
            .usable()
            .filter(|core| core.is_subset(cpus) && machine.is_fast(core));
        fast.map(BTreeSet::len).sum()
    };
    expect(
        on_small <= vcpus.saturating_sub(fast_threads(&place)),
        "fast before small",
    );
    let on_slowest = (&used & &machine.slowest).len();
    let faster: usize = machine
        .usable()
        .filter(|core| core.is_subset(&place) && core.is_disjoint(&machine.slowest))
        .map(BTreeSet::len)
        .sum();
    expect(
        on_slowest <= vcpus.saturating_sub(faster),
        "the slowest cores last",
    );
    if machine.nodes.len() == 1 {
        let least = vcpus.saturating_sub(fast_threads(&machine.online));
        expect(
            on_small == least,
            "as few vCPUs on small cores as there can be",
        );
    }

    // One LLC domain and one node, if one has room: a core, if possible a fast one, for each vCPU
    // or guest core.
    let room = |cpus: &Cpus, only_fast: bool| {
        let cores = machine
            .usable()
            .filter(|core| core.is_subset(cpus) && (!only_fast || machine.is_fast(core)));
        match threads {
            1 => cores.count() >= vcpus,
            _ => {
                let sizes: Vec<usize> = cores.map(BTreeSet::len).collect();
                let whole = sizes.iter().filter(|size| **size >= threads).count();
                let single = sizes.iter().filter(|size| **size < threads).count();
                whole + single / threads >= vcpus / threads
            }
        }
    };
    let only_fast = room(&machine.online, true);
    let near_cpus = near.and_then(|(node, _)| machine.nodes.get(&node));
    let fits = |cpus: &Cpus| {
        let threads: usize = machine
            .usable()
            .filter(|core| core.is_subset(cpus))
            .map(BTreeSet::len)
            .sum();
        threads >= vcpus
    };
    if let Some(cpus) = near_cpus.filter(|cpus| fits(cpus)) {
        expect(
            isolated.is_subset(cpus),
            "on the node of its memory or device",
        );
    }
    let within = near_cpus
        .filter(|cpus| fits(cpus))
        .unwrap_or(&machine.online);
    if machine.nodes.values().any(|node| fits(&(node & within))) {
        expect(nodes.len() == 1, "one node, since one has room");
    }
    let mut areas = Vec::new();
    for llc in &machine.llcs {
        for node in machine.nodes.values() {
            areas.push(&(&llc.cpus & node) & within);
        }
    }
    let with_room: Vec<&Cpus> = areas
        .iter()
        .filter(|area| room(area, only_fast) && (only_fast || machine.small.is_empty()))
        .collect();
    if !with_room.is_empty() {
        expect(llcs.len() == 1, "one LLC domain, since one has room");
        let host_llc = machine
            .llcs
            .iter()
            .find(|llc| llc.cpus.contains(&0))
            .unwrap();
        if with_room
            .iter()
            .any(|area| area.is_disjoint(&host_llc.cpus))
        {
            expect(
                isolated.is_disjoint(&host_llc.cpus),
                "away from CPU 0's cache",
            );
        }
    }

    // Several domains: without that of CPU 0, if as many neighbouring ones of a node have room.
    let host_llc = machine.llcs.iter().find(|llc| llc.cpus.contains(&0));
    if llcs.len() > 1
        && nodes.len() == 1
        && machine.small.is_empty()
        && host_llc.is_some_and(|llc| !llc.cpus.is_disjoint(&isolated))
    {
        let has_room_beyond = machine.nodes.values().any(|node| {
            let of_node: Vec<&Llc> = machine
                .llcs
                .iter()
                .filter(|llc| !llc.cpus.is_disjoint(node))
                .collect();
            of_node.windows(llcs.len()).any(|window| {
                let cpus: Cpus = window.iter().flat_map(|llc| llc.cpus.clone()).collect();
                let cpus = &(&cpus & node) & within;
                !window.iter().any(|llc| llc.cpus.contains(&0)) && room(&cpus, only_fast)
            })
        });
        expect(
            !has_room_beyond,
            "away from CPU 0's cache, since as many other domains have room",
        );
    }

    // What is to be set on the VM.
    let advice: Vec<&str> = answer["advice"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["command"].as_str().unwrap())
        .collect();
    let is_split = |core: &[usize]| {
        core.iter()
            .any(|cpu| machine.core_of(*cpu) != machine.core_of(core[0]))
    };
    expect(
        threads == 1
            || !pins.chunks(threads).any(is_split)
            || advice.iter().any(|command| command.contains(" --cores ")),
        "advice for guest cores on several cores",
    );
    for command in advice {
        let cores = number_after(command, " --cores ").unwrap_or(vcpus);
        let is_bound = command.contains(" --numa0 ");
        expect(
            !is_bound || list_after(command, "--numa0 cpus=") == (0..cores).collect(),
            "numa0 has the vCPUs that there are then",
        );
        let was_bound = matches!(near, Some((_, "memory")));
        expect(
            cores == vcpus || !was_bound || is_bound,
            "memory stays bound if the number of vCPUs changes",
        );
    }

    for sentence in answer["why"].as_array().unwrap() {
        let sentence = sentence.as_str().unwrap();
        if !is_true(machine, guest, &isolated, &pins, sentence) {
            faults.push(format!("untrue: {sentence}"));
        }
    }
    let says = |what: &str| answer["why"].to_string().contains(what);
    let vcache: Vec<&Llc> = machine
        .llcs
        .iter()
        .filter(|llc| machine.has_vcache(llc))
        .collect();
    let gets_it = vcache.iter().any(|llc| !llc.cpus.is_disjoint(&isolated));
    let is_mixed = llcs
        .iter()
        .any(|llc| machine.has_vcache(llc) != machine.has_vcache(llcs[0]));
    if is_mixed && !says("Their caches differ: ") {
        faults.push("CPUs with and without V-Cache are not named".into());
    }
    if !vcache.is_empty() && !gets_it && !says("3D V-Cache") {
        faults.push("V-Cache that it does not get is not named".into());
    }
    if threads == 1 && per_core.values().any(|count| *count > 1) && !says("several vCPUs, by ") {
        faults.push("doubled cores are not named".into());
    }
    if on_small > 0 && !says("small cores") {
        faults.push("small cores are not named".into());
    }
    const OF_INIT: [&str; 8] = [
        "isolated",
        "pins",
        "SMT",
        "L3",
        "NUMA",
        "vCPUs",
        "guest cores",
        "kinds",
    ];
    for finding in answer["findings"].as_array().unwrap() {
        if OF_INIT.contains(&finding["check"].as_str().unwrap()) {
            faults.push(format!("hook check contradicts: {finding}"));
        }
    }
    faults
}

/// The number behind some words.
fn number_after(text: &str, words: &str) -> Option<usize> {
    let (_, rest) = text.split_once(words)?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// The CPUs or numbers behind some words.
fn list_after(text: &str, words: &str) -> Cpus {
    let rest = text.split_once(words).map_or("", |(_, rest)| rest);
    let is_list = |c: &char| c.is_ascii_digit() || matches!(c, '-' | ',');
    let text: String = rest.chars().take_while(is_list).collect();
    list(text.trim_matches(','))
}

/// Whether a sentence is true. One that is not known is not.
fn is_true(
    machine: &Machine,
    guest: &Guest,
    isolated: &Cpus,
    pins: &[usize],
    sentence: &str,
) -> bool {
    let mine: Vec<&Cpus> = machine
        .cores
        .iter()
        .filter(|core| !core.is_disjoint(isolated))
        .collect();
    let llcs: Vec<&Llc> = machine
        .llcs
        .iter()
        .filter(|llc| !llc.cpus.is_disjoint(isolated))
        .collect();
    let of_llcs: Cpus = llcs
        .iter()
        .flat_map(|llc| llc.cpus.iter().copied())
        .collect();
    let used: Cpus = pins.iter().copied().collect();
    let count = |core: &Cpus| pins.iter().filter(|cpu| core.contains(cpu)).count();
    if sentence.contains(" of it: ") {
        let there = machine
            .cores
            .iter()
            .filter(|core| !core.is_disjoint(&of_llcs))
            .count();
        let all = sentence.contains("gets all of it");
        let mib = llcs[0].mib;
        let size = match sentence.split_once(", L3 ") {
            Some((_, size)) => {
                let digits: String = size.chars().take_while(char::is_ascii_digit).collect();
                let number: u64 = digits.parse().unwrap();
                let number = if size[digits.len()..].starts_with('K') {
                    number / 1024
                } else {
                    number
                };
                llcs.iter().all(|llc| llc.mib == Some(number))
            }
            None => mib.is_none() || llcs.iter().any(|llc| llc.mib != mib),
        };
        let vcache = llcs.iter().all(|llc| machine.has_vcache(llc));
        return list_after(sentence, " is CPU ") == of_llcs
            && number_after(sentence, " of it: ") == Some(mine.len())
            && all == (there == mine.len())
            && size
            && sentence.contains("V-Cache") == vcache;
    }
    if let Some(list) = sentence.strip_prefix("Their caches differ: ") {
        let mut named = Cpus::new();
        for item in list.trim_end_matches('.').split("; ") {
            let numbers = list_after(item, "llc:");
            let size = number_after(item, " L3 ").map(|number| match item.contains('K') {
                true => number as u64 / 1024,
                false => number as u64,
            });
            let is_so = |number: &usize| {
                let llc = &machine.llcs[*number];
                llc.mib == size && machine.has_vcache(llc) == item.contains("V-Cache")
            };
            if !numbers.iter().all(is_so) {
                return false;
            }
            named.extend(numbers);
        }
        let is_mine = |(_, llc): &(usize, &Llc)| !llc.cpus.is_disjoint(isolated);
        let mine = machine.llcs.iter().enumerate().filter(is_mine);
        return llcs.iter().any(|llc| llc.mib != llcs[0].mib)
            && named == mine.map(|(number, _)| number).collect();
    }
    if sentence.starts_with("They are on NUMA node") {
        let nodes: Cpus = machine
            .nodes
            .iter()
            .filter(|(_, cpus)| !cpus.is_disjoint(isolated))
            .map(|(node, _)| *node)
            .collect();
        let words = if nodes.len() > 1 {
            "NUMA nodes "
        } else {
            "NUMA node "
        };
        let is_like = sentence.contains("like the VM's");
        let is_near = guest
            .near
            .is_some_and(|(node, _)| nodes == Cpus::from([node]));
        let what_is_far = sentence.split_once(" Its ").map(|(_, far)| far);
        let far = match (what_is_far, guest.near) {
            (None, near) => near.is_none() || is_near,
            (Some(far), Some((node, _))) => {
                !is_near && list_after(far, "NUMA node ") == Cpus::from([node])
            }
            (Some(_), None) => false,
        };
        return list_after(sentence, words) == nodes && is_like == is_near && far;
    }
    if sentence.starts_with("CPU 0, which stays with the host, is in it too") {
        let beside = llcs.iter().find(|llc| llc.cpus.contains(&0));
        // A cache that is no L3 is one as well.
        return beside
            .is_some_and(|llc| llc.mib.is_none() || sentence.contains("shares the cache"));
    }
    if sentence.starts_with("Each vCPU has a core of its own") {
        return guest.threads == 1
            && mine.iter().all(|core| count(core) == 1)
            && mine.iter().any(|core| core.len() > 1);
    }
    if sentence.contains(" several vCPUs, by ") {
        let doubled = mine.iter().filter(|core| count(core) > 1).count();
        let start = match (doubled == mine.len(), mine.len()) {
            (true, 1) => "The core runs ".to_owned(),
            (true, all) => format!("All {all} cores run "),
            (false, all) => format!("{doubled} of the {all} cores run"),
        };
        return guest.threads == 1 && sentence.starts_with(&start) && doubled > 0;
    }
    if sentence.contains("on small cores") {
        let word = if sentence.starts_with("vCPUs ") {
            "vCPUs "
        } else {
            "vCPU "
        };
        let vcpus: Cpus = (0..)
            .zip(pins)
            .filter(|(_, cpu)| machine.small.contains(cpu))
            .map(|(vcpu, _)| vcpu)
            .collect();
        return list_after(sentence, word) == vcpus
            && list_after(sentence, "CPU ").is_superset(&Cpus::new())
            && list_after(sentence, ", CPU ") == &used & &machine.small;
    }
    if sentence.contains("of the guest's cores ha") {
        let is_split = |core: &&[usize]| {
            core.iter()
                .any(|cpu| machine.core_of(*cpu) != machine.core_of(core[0]))
        };
        let split = pins.chunks(guest.threads).filter(is_split).count();
        return match split {
            1 => sentence.starts_with("One of the guest's cores has its threads on several"),
            _ => sentence.starts_with(&format!("{split} of the guest's cores have their threads")),
        };
    }
    if sentence.contains("has 3D V-Cache") {
        let vcache: Cpus = machine
            .llcs
            .iter()
            .filter(|llc| machine.has_vcache(llc))
            .flat_map(|llc| llc.cpus.iter().copied())
            .collect();
        let room: usize = machine
            .usable()
            .filter(|core| core.is_subset(&vcache))
            .map(BTreeSet::len)
            .sum();
        return list_after(sentence, "(CPU ") == vcache
            && vcache.is_disjoint(isolated)
            && sentence.contains("--vcache chooses there") == (room >= guest.vcpus);
    }
    false
}

/// Runs `hook init` on a host with the guest as VM 100.
fn init(root: &Path, guest: &Guest) -> Result<Value, String> {
    init_beside(root, guest, "")
}

/// The same, with settings of VM 101 if there are any.
fn init_beside(root: &Path, guest: &Guest, settings: &str) -> Result<Value, String> {
    vm_conf(root, 100, &guest.conf());
    let _ = fs::remove_dir_all(root.join("etc/pinfold"));
    if !settings.is_empty() {
        write(root, "etc/pinfold/101.toml", settings);
        let file = root.join("etc/pinfold/101.toml");
        fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let output = Command::new(env!("CARGO_BIN_EXE_hook"))
        .args(["init", "100", "--json", "--sysroot"])
        .arg(root)
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// What is wrong beside a second VM with the same size, which has what it was given before: nothing
/// of it is taken while the rest has room.
fn beside_another(root: &Path, machine: &Machine, guest: &Guest) -> Vec<String> {
    let Ok(first) = init(root, guest) else {
        return Vec::new();
    };
    let theirs = list(first["isolated"].as_str().unwrap());
    let text = format!("isolated = {}\npins = \"auto\"\n", first["isolated"]);
    vm_conf(root, 101, &guest.conf());
    let result = init_beside(root, guest, &text);
    fs::remove_file(root.join("etc/pve/qemu-server/101.conf")).unwrap();
    let left: usize = machine
        .usable()
        .filter(|core| core.is_disjoint(&theirs))
        .map(BTreeSet::len)
        .sum();
    let mut faults = Vec::new();
    match result {
        Err(error) => faults.push(format!("beside another: {error}")),
        Ok(second) => {
            let isolated = list(second["isolated"].as_str().unwrap());
            let is_shared = !isolated.is_disjoint(&theirs);
            if is_shared && left >= guest.vcpus {
                faults.push("beside another: takes its CPUs, though others are free".into());
            }
            let text = second["why"].to_string();
            if is_shared != text.contains("only one of the two VMs can run") {
                faults.push("beside another: the text is not true".into());
            }
            if let Some((_, rest)) = text.split_once("has 3D V-Cache, ") {
                let vcache = machine.llcs.iter().filter(|llc| machine.has_vcache(llc));
                let vcache: Cpus = vcache.flat_map(|llc| llc.cpus.iter().copied()).collect();
                let room = |without: &Cpus| -> usize {
                    let cores = machine.usable();
                    let cores =
                        cores.filter(|core| core.is_subset(&vcache) && core.is_disjoint(without));
                    cores.map(BTreeSet::len).sum()
                };
                let way = match room(&theirs) >= guest.vcpus {
                    true => "; --vcache chooses there.",
                    false if room(&Cpus::new()) >= guest.vcpus => {
                        "; --vcache chooses there, and shares CPU "
                    }
                    false => "; this VM has no room there.",
                };
                if !rest.contains(way) {
                    faults.push("beside another: what --vcache would do is not true".into());
                }
            }
            // What keeps it from better CPUs of the same domains is named.
            let place: Cpus = machine
                .llcs
                .iter()
                .filter(|llc| !llc.cpus.is_disjoint(&isolated))
                .flat_map(|llc| llc.cpus.iter().copied())
                .collect();
            let beside = &(&theirs & &place) - &isolated;
            if text.contains("Beside them") && list_after(&text, "Beside them, CPU ") != beside {
                faults.push("beside another: CPUs that VM 101 does not have".into());
            }
            let is_small =
                !isolated.is_disjoint(&machine.small) && machine.small.len() < machine.online.len();
            if is_small && !is_shared && !beside.is_empty() && !text.contains("Beside them") {
                faults.push("beside another: why it is on small cores is not named".into());
            }
            let used = second["pins"].as_array().unwrap().len();
            if used != guest.vcpus {
                faults.push("beside another: a CPU for each vCPU".into());
            }
        }
    }
    faults
}

/// The faults of all guests on one machine, and how many guests there were.
fn judge(root: &Path, name: &str, text: &str) -> (usize, Vec<String>) {
    let (mut guests, mut found) = (0, Vec::new());
    let judged = Machine::read(text);
    machine::expand(text, root);
    write(root, "proc/cmdline", "quiet\n");
    write(
        root,
        "sys/fs/cgroup/cgroup.controllers",
        "cpuset cpu memory\n",
    );
    let last = *judged.nodes.keys().last().unwrap();
    let device = "sys/bus/pci/devices/0000:0b:00.0/numa_node";
    write(root, device, &format!("{last}\n"));
    let usable: usize = judged.usable().map(BTreeSet::len).sum();
    for (vcpus, threads) in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48]
        .into_iter()
        .flat_map(|vcpus| [(vcpus, 1), (vcpus, 2)])
        .filter(|(vcpus, threads)| vcpus % threads == 0)
    {
        // On a machine with several nodes a guest with memory or a device on the last one, too.
        let mut near = vec![None];
        match judged.nodes.len() {
            1 => {}
            _ if vcpus % 4 == 0 => near.push(Some((last, "memory"))),
            _ => near.push(Some((last, "device"))),
        }
        for near in near {
            let guest = Guest {
                vcpus,
                threads,
                near,
            };
            guests += 1;
            let mut faults = match init(root, &guest) {
                Ok(answer) => faults(&judged, &guest, &answer),
                Err(_) if usable < vcpus => Vec::new(),
                Err(error) => vec![format!("a refusal with room: {error}")],
            };
            if matches!(vcpus, 4 | 6 | 8) && guest.near.is_none() {
                faults.extend(beside_another(root, &judged, &guest));
            }
            found.extend(
                faults
                    .into_iter()
                    .map(|fault| format!("{name}: {guest:?}: {fault}")),
            );
        }
    }
    (guests, found)
}

#[test]
fn no_choice_has_a_fault() {
    let folder = tempfile::tempdir().unwrap();
    let machines = machine::all();
    let judge_some = |machines: Vec<&(String, String)>| {
        let each = machines
            .into_iter()
            .map(|(name, text)| judge(&folder.path().join(name), name, text));
        each.fold((0, Vec::new()), |(all, mut found), (guests, more)| {
            found.extend(more);
            (all + guests, found)
        })
    };
    let (guests, found) = std::thread::scope(|scope| {
        let (even, odd): (Vec<_>, Vec<_>) =
            machines.iter().enumerate().partition(|(at, _)| at % 2 == 0);
        let [even, odd] =
            [even, odd].map(|half| half.into_iter().map(|(_, machine)| machine).collect());
        let even = scope.spawn(|| judge_some(even));
        let (odd, mut found) = judge_some(odd);
        let (even, more) = even.join().unwrap();
        found.extend(more);
        (even + odd, found)
    });
    assert!(guests > 500, "{guests} guests");
    assert!(
        found.is_empty(),
        "{} faults in {guests} guests:\n{}",
        found.len(),
        found.join("\n")
    );
}

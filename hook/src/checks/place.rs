//! Whether a VM has good CPUs: compares the facts about its CPUs with those of the CPUs that `hook
//! init` would choose now. So `hook check` does not complain about what `hook init` chose.

use std::collections::BTreeMap;

use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::{VmConf, VmId};
use pinfold_core::{CpuSet, Result};

use super::finding::Finding;
use super::shared_readings::SharedReadings;
use super::vm_settings;
use crate::choice::{self, Facts, Guest, Owner, Question};
use crate::settings::Settings;

/// The findings about LLC domains, NUMA nodes, unused CPUs, shared cores and kinds of cores.
///
/// # Errors
/// If sysfs cannot be read.
pub(super) fn findings(
    around: &SharedReadings<'_>,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let (root, topology) = (around.root, around.cpus.topology()?);
    let guest = Guest::new(conf, vm_settings::device_nodes(root, vmid, conf)?);
    let Settings { isolated, pins, .. } = settings;
    let facts = Facts::of_pins(topology, &guest, isolated, pins, &[]);
    let areas = around.areas()?;
    let question = Question {
        topology,
        areas,
        guest: &guest,
        claimed: &around.claims().of_others(Owner::Vm(vmid)),
        // If all CPUs have V-Cache, compare only with CPUs that have it.
        within: Some(&areas.vcache).filter(|vcache| isolated.is_subset(vcache)),
    };
    // Without room elsewhere there is no better choice.
    let best = choice::best(&question).unwrap_or_else(|| facts.clone());
    let mut findings = vec![
        llc(isolated, &facts, &best),
        numa(topology, &guest, pins, &facts, &best),
        unused(topology, &guest, settings),
        guest_cores(vmid, conf, topology, &guest, settings, &facts, &best),
        kinds(&guest, &facts, &best),
    ];
    if guest.threads > 1 && vm_settings::lacks_topoext(root, topology, conf) {
        findings.push(Finding::warn(
            "topoext",
            "the CPU model has no topoext, so that a guest on AMD does not see which vCPUs share a core",
            vm_settings::topoext(vmid),
        ));
    }
    Ok(findings)
}

/// Whether the CPUs are in as few LLC domains as the VM needs.
fn llc(isolated: &CpuSet, facts: &Facts, best: &Facts) -> Finding {
    const CHECK: &str = "L3";
    let own: Vec<String> = facts.llcs.iter().map(|llc| format!("llc:{llc}")).collect();
    let own = own.join(", ");
    let needed = best.llcs.len();
    if facts.llcs.len() <= needed {
        return Finding::ok(CHECK, format!("in {own}"));
    }
    Finding::warn(
        CHECK,
        format!("CPU {isolated} is split across {own}: vCPUs share caches with the host"),
        format!("{needed} would be enough; `hook layout` shows which CPUs share one"),
    )
}

/// Whether CPUs, memory and devices are on the same NUMA nodes.
fn numa(
    topology: &Topology,
    guest: &Guest,
    pins: &[CpuSet],
    facts: &Facts,
    best: &Facts,
) -> Finding {
    const CHECK: &str = "NUMA";
    if topology.domains(Kind::Node).len() < 2 {
        return Finding::ok(CHECK, "this host has one node");
    }
    let nodes = &facts.nodes;
    let (memory, devices) = (guest.memory_nodes(), &guest.device_nodes);
    let there: CpuSet = (topology.domains(Kind::Node).iter())
        .map(|node| node.number)
        .collect();
    let missing = &memory - &there;
    if !missing.is_empty() {
        let what = format!("memory is bound to node {missing}; this host has node {there}");
        return Finding::warn(
            CHECK,
            what,
            "Proxmox VE refuses such a start; correct hostnodes",
        );
    }
    let far_vcpus = far_vcpus(topology, guest, pins);
    if !far_vcpus.is_empty() && memory.is_subset(nodes) {
        return Finding::warn(
            CHECK,
            match far_vcpus.len() {
                1 => format!("vCPU {far_vcpus} is on another node than its memory"),
                _ => format!("vCPUs {far_vcpus} are on other nodes than their memory"),
            },
            "write pins = \"auto\", which puts each vCPU on the node of its cell",
        );
    }
    if !memory.is_empty() && !memory.intersects(nodes) && guest.cells.len() == 1 {
        return Finding::warn(
            CHECK,
            format!("the CPUs are on node {nodes}, but its memory is bound to node {memory}"),
            match best.nodes.intersects(&memory) {
                true => format!("use CPUs of node {}: `hook layout` shows them", best.nodes),
                false => format!("bind its memory to node {nodes}: hostnodes={nodes} in its numaN"),
            },
        );
    }
    let is_far = |near: &CpuSet, nodes: &CpuSet| !near.is_empty() && !nodes.is_subset(near);
    let mut far = Vec::new();
    if facts.far_vcpus.len() > best.far_vcpus.len() {
        far.push(format!("its memory is bound to node {memory}"));
    }
    if is_far(devices, nodes) && !is_far(devices, &best.nodes) {
        far.push(format!("its devices are at node {devices}"));
    }
    if nodes.len() > best.nodes.len() && memory.is_empty() {
        far.push("one node has room for it".to_owned());
    }
    if far.is_empty() {
        let memory = match memory.is_empty() {
            true => "memory is not bound to a node".to_owned(),
            false if facts.far_vcpus.is_empty() => format!("memory is bound to node {memory}"),
            false => format!(
                "memory is bound to node {memory}, which has too few free CPUs: {} on others",
                choice::counted(facts.far_vcpus.len(), "vCPU")
            ),
        };
        return Finding::ok(CHECK, format!("CPUs on node {nodes}; {memory}"));
    }
    Finding::warn(
        CHECK,
        format!("the CPUs are on node {nodes}, but {}", far.join(" and ")),
        format!("use CPUs of node {}: `hook layout` shows them", best.nodes),
    )
}

/// vCPUs of cells that could be on the nodes of their memory, since there are CPUs of these, and are
/// not.
fn far_vcpus(topology: &Topology, guest: &Guest, pins: &[CpuSet]) -> CpuSet {
    let used: CpuSet = pins
        .iter()
        .take(guest.vcpus)
        .flat_map(CpuSet::iter)
        .collect();
    let mut far = CpuSet::new();
    for cell in &guest.cells {
        let near = choice::cpus_of_nodes(topology, &cell.nodes);
        if (&used & &near).len() < cell.vcpus.len() {
            continue;
        }
        let is_far = |vcpu: &usize| pins.get(*vcpu).is_some_and(|pin| !pin.is_subset(&near));
        let vcpus = cell.vcpus.iter().filter(|vcpu| *vcpu < guest.vcpus);
        far = &far | &vcpus.filter(is_far).collect();
    }
    far
}

/// CPUs that are isolated and that no vCPU has. Further threads of cores with a vCPU are kept empty
/// on purpose.
fn unused(topology: &Topology, guest: &Guest, settings: &Settings) -> Finding {
    const CHECK: &str = "vCPUs";
    let Settings { isolated, pins, .. } = settings;
    let vcpus = guest.vcpus;
    if !settings.sharing(vcpus).is_empty() {
        return Finding::ok(CHECK, "not checked: some vCPUs share a CPU");
    }
    let used: CpuSet = pins.iter().take(vcpus).flat_map(CpuSet::iter).collect();
    // Threads that the guest believes to have are not kept empty for it.
    let is_full = |core: &&CpuSet| (*core & &used).len() >= guest.threads.max(1);
    let full: CpuSet = (topology.cores_of(&used).filter(is_full))
        .flat_map(CpuSet::iter)
        .collect();
    let spare = &(isolated - &used) - &full;
    let kept = &(isolated - &used) & &full;
    if !spare.is_empty() {
        let what = match pins.len() > vcpus {
            true => format!(
                "{vcpus}, but {} pins: CPU {spare} is isolated but unused",
                pins.len()
            ),
            false => format!(
                "{vcpus}, with {} pins: CPU {spare} is isolated but unused",
                pins.len()
            ),
        };
        return Finding::warn(CHECK, what, "give the VM more cores, or isolate fewer CPUs");
    }
    if kept.is_empty() {
        return Finding::ok(CHECK, format!("{vcpus}, each with a pin"));
    }
    Finding::ok(
        CHECK,
        format!("{vcpus}, each with a pin; CPU {kept} is kept empty, so that a vCPU has its core"),
    )
}

/// Whether the guest knows which of its vCPUs are threads of one core.
fn guest_cores(
    vmid: VmId,
    conf: &VmConf,
    topology: &Topology,
    guest: &Guest,
    settings: &Settings,
    facts: &Facts,
    best: &Facts,
) -> Finding {
    const CHECK: &str = "guest cores";
    let (vcpus, threads) = (guest.vcpus, guest.threads);
    let single = |pin: &CpuSet| pin.first().filter(|_| pin.len() == 1);
    let pins: Vec<usize> = settings.pins.iter().take(vcpus).map_while(single).collect();
    if vcpus < 2 {
        return Finding::ok(CHECK, "one vCPU");
    }
    if pins.len() < vcpus {
        return Finding::ok(CHECK, "not checked: not every vCPU has a CPU of its own");
    }
    if !settings.sharing(vcpus).is_empty() {
        return Finding::ok(CHECK, "not checked: some vCPUs share a CPU");
    }
    let pinned: CpuSet = pins.iter().copied().collect();
    let offline = &pinned - &topology.online;
    if !offline.is_empty() {
        return Finding::ok(CHECK, format!("not checked: CPU {offline} is offline"));
    }
    let core_of = |cpu: usize| topology.core_of(cpu);
    let mut by_core: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (vcpu, cpu) in pins.iter().enumerate() {
        by_core.entry(core_of(*cpu)).or_default().push(vcpu);
    }
    let mut shared: Vec<&Vec<usize>> = by_core.values().filter(|vcpus| vcpus.len() > 1).collect();
    shared.sort();
    if threads > 1 {
        let is_split = |cores: &[usize]| {
            cores
                .windows(2)
                .any(|pair| core_of(pair[0]) != core_of(pair[1]))
        };
        let split = pins.chunks(threads).filter(|core| is_split(core)).count();
        if split <= best.split {
            let what = match split {
                0 => format!("{threads} vCPUs per core, on the threads of one host core"),
                _ => format!(
                    "{split} of the guest's cores are on several host cores: too few cores have {threads} threads"
                ),
            };
            return Finding::ok(CHECK, what);
        }
        let what = format!(
            "the guest sees vCPUs 0-{}, {threads}-{}, … as threads of one core each, but {split} of these are on \
             several host cores",
            threads - 1,
            2 * threads - 1
        );
        let ordered = choice::in_vcpu_order(topology, &settings.isolated, threads, &guest.cells);
        let ordered: Vec<usize> = ordered
            .iter()
            .take(vcpus)
            .filter_map(CpuSet::first)
            .collect();
        let better = ordered
            .chunks(threads)
            .filter(|core| is_split(core))
            .count()
            < split;
        let ordered: Vec<String> = ordered.iter().map(ToString::to_string).collect();
        let fix = match better {
            true => format!(
                "put the threads of a core next to each other: pins = \"{}\"",
                ordered.join(",")
            ),
            false => "isolate whole cores; `hook layout` shows them".to_owned(),
        };
        return Finding::warn(CHECK, what, fix);
    }
    let pairs: Vec<String> = shared
        .iter()
        .take(2)
        .map(|vcpus| {
            let vcpus: Vec<String> = vcpus.iter().map(ToString::to_string).collect();
            vcpus.join(" and ")
        })
        .collect();
    let mut pairs = pairs.join(", ");
    if shared.len() > 2 {
        pairs += ", …";
    }
    if shared.is_empty() {
        return Finding::ok(CHECK, "one vCPU per core");
    }
    if facts.doubled <= best.doubled {
        return Finding::ok(
            CHECK,
            format!(
                "vCPUs {pairs} are threads of one core: {vcpus} vCPUs have {}",
                choice::counted(facts.cores, "core")
            ),
        );
    }
    let in_order = pins
        .chunks(2)
        .all(|pair| pair.len() == 2 && core_of(pair[0]) == core_of(pair[1]));
    let fewer = vm_settings::resized(conf, facts.cores, 1);
    let with_threads = vm_settings::with_threads(conf, vcpus, 2).filter(|_| in_order);
    let fix = match (with_threads, fewer) {
        (Some(set), _) => set.command(vmid),
        (None, Some(fewer)) => format!(
            "give each vCPU a core of its own, or the VM fewer vCPUs: {}",
            fewer.command(vmid)
        ),
        (None, None) => "give each vCPU a core of its own, or the VM fewer vCPUs".to_owned(),
    };
    Finding::warn(
        CHECK,
        format!(
            "vCPUs {pairs} are threads of one core, but the guest sees each as a core of its own"
        ),
        fix,
    )
}

/// Whether fast and small cores are mixed.
fn kinds(guest: &Guest, facts: &Facts, best: &Facts) -> Finding {
    const CHECK: &str = "kinds";
    let small = facts.small_vcpus.len();
    if small == 0 {
        return Finding::ok(CHECK, "no vCPU is on a small core");
    }
    let what = format!(
        "vCPU {} of {} on small cores (CPU {})",
        facts.small_vcpus, guest.vcpus, facts.on_small
    );
    if small <= best.small_vcpus.len() {
        return Finding::ok(CHECK, format!("{what}: there are too few fast cores"));
    }
    Finding::warn(
        CHECK,
        format!("{what}: a slow vCPU delays the others"),
        "use fast cores (pcores in `hook layout`)",
    )
}

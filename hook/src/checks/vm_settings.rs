//! What to set on a VM so that it fits its CPUs, as commands.

use std::fmt;

use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::sys::{cpu, pci};
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};
use serde::Serialize;

use super::qm_set::QmSet;
use crate::choice::{self, Choice, Guest};

/// Something to set on the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Advice {
    /// What for.
    pub what: String,
    /// The command.
    pub command: String,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.command)
    }
}

/// The NUMA nodes of the devices that a VM gets as a whole.
///
/// # Errors
/// If sysfs or the reservations of devices cannot be read.
pub(crate) fn device_nodes(root: &Host, vmid: VmId, conf: &VmConf) -> Result<CpuSet> {
    let mut nodes = CpuSet::new();
    for function in pci_reset::passed_through(root, vmid, conf)?.functions {
        if let Some(node) = pci::numa_node(root, &function)?
            && node <= pinfold_core::MAX_CPU
        {
            nodes.insert(node);
        }
    }
    Ok(nodes)
}

/// A VM of which something is to be set.
pub(crate) struct Vm<'a> {
    pub root: &'a Host,
    pub vmid: VmId,
    /// The text of its VMID.conf.
    pub text: &'a str,
    pub conf: &'a VmConf,
    pub topology: &'a Topology,
    pub guest: &'a Guest,
    pub choice: &'a Choice,
    /// The choice for other settings of it; none if the host has no room.
    pub choose: &'a dyn Fn(&VmConf) -> Option<(Guest, Choice)>,
}

/// A VM with other settings, and the choice for it.
pub(crate) struct Changed {
    pub set: QmSet,
    pub conf: VmConf,
    pub guest: Guest,
    pub choice: Choice,
}

/// What to set on a VM for the best result with the CPUs chosen: the first of what excludes each
/// other is the best. Where that gets other CPUs, `again` is run to choose them.
pub(crate) fn advice(vm: &Vm<'_>, again: Option<&str>) -> Vec<Advice> {
    let Vm {
        root,
        vmid,
        conf,
        topology,
        guest,
        choice,
        ..
    } = *vm;
    let mut all = Vec::new();
    let mut add = |what: &str, command: String| {
        all.push(Advice {
            what: what.to_owned(),
            command,
        });
    };
    let sizes = settled_sizes(vm);
    for (number, (size, changed)) in sizes.iter().enumerate() {
        let or = if number == 0 { "" } else { "or " };
        let Changed {
            set,
            conf,
            guest,
            choice: next,
        } = changed;
        let memory = memory(root, topology, conf, guest, next);
        let mut command = set.clone().and(memory.set).command(vmid);
        if let Some(again) = again.filter(|_| next.isolated != choice.isolated) {
            command += &format!(" && {again}");
        }
        add(&format!("{or}{}", size.what), command);
    }
    let wants_smt = match sizes[..] {
        [] => guest.threads > 1,
        _ => sizes.iter().any(|(size, _)| size.threads > 1),
    };
    if wants_smt && lacks_topoext(root, topology, conf) {
        add(
            "for SMT in the guest on AMD, which needs topoext",
            topoext(vmid),
        );
    }
    let memory = memory(root, topology, conf, guest, choice);
    if !memory.set.is_empty() {
        let or = if sizes.is_empty() {
            ""
        } else {
            "or with as many vCPUs as now, "
        };
        add(&format!("{or}{}", memory.what), memory.set.command(vmid));
    }
    all
}

/// What `hook init --apply` sets of the size: the nearest of those that [`advice`] offers, if it needs
/// nothing else and costs no more than half of the vCPUs, since to lose more is a choice.
pub(crate) fn best_size(vm: &Vm<'_>) -> Option<Changed> {
    let vcpus = vm.guest.vcpus;
    // A guest on AMD needs a CPU model for SMT that `qm set` cannot make.
    let is_able = |size: &Size| {
        (size.threads == 1 || !lacks_topoext(vm.root, vm.topology, vm.conf))
            && size.vcpus * 2 >= vcpus
    };
    let sizes = settled_sizes(vm).into_iter();
    let nearest = sizes
        .filter(|(size, _)| is_able(size))
        .min_by_key(|(size, _)| (size.vcpus.abs_diff(vcpus), size.vcpus));
    nearest.map(|(_, changed)| changed)
}

/// How often a size is chosen for the CPUs of the size before.
const MAX_SIZES: usize = 4;

/// The sizes that suit the CPUs that the VM would get with them.
fn settled_sizes(vm: &Vm<'_>) -> Vec<(Size, Changed)> {
    let mut settled: Vec<(Size, Changed)> = Vec::new();
    for mut size in sizes(vm.root, vm.topology, vm.conf, vm.guest, vm.choice) {
        for _ in 0..MAX_SIZES {
            let Some(changed) = changed(vm, &size) else {
                break;
            };
            if suits(&size, vm, &changed) {
                let is_new = |(other, _): &(Size, Changed)| {
                    (other.vcpus, other.threads) != (size.vcpus, size.threads)
                };
                if settled.iter().all(is_new) {
                    settled.push((size, changed));
                }
                break;
            }
            // A smaller VM may get other CPUs, which another size would suit better.
            let Changed {
                conf,
                guest,
                choice,
                ..
            } = &changed;
            let next = sizes(vm.root, vm.topology, conf, guest, choice).into_iter();
            let mut smaller = next.filter(|next| {
                next.threads == size.threads
                    && next.vcpus < size.vcpus
                    && next.vcpus * 2 >= vm.guest.vcpus
            });
            match smaller.next() {
                Some(next) => size = next,
                None => break,
            }
        }
    }
    settled
}

fn changed(vm: &Vm<'_>, size: &Size) -> Option<Changed> {
    let set = resized(vm.conf, size.vcpus, size.threads)?;
    let conf = VmConf::parse(&set.applied_to(vm.text));
    let (guest, choice) = (vm.choose)(&conf)?;
    Some(Changed {
        set,
        conf,
        guest,
        choice,
    })
}

/// Whether a VM of this size has what the size is for.
fn suits(size: &Size, vm: &Vm<'_>, changed: &Changed) -> bool {
    let (before, facts) = (&vm.choice.facts, &changed.choice.facts);
    let has_llc = !size.in_one_llc || facts.llcs.len() == 1;
    has_llc
        && facts.doubled + facts.on_small.len() + facts.split == 0
        && facts.idle_cores.is_empty()
        && facts.shared.len() <= before.shared.len()
}

/// What gives a VM so many vCPUs, in cores of so many threads. Its memory stays bound, for as many
/// vCPUs as it has then; none if it is bound for parts of them, or if `args` needs a change and
/// cannot be split into words.
pub(crate) fn resized(conf: &VmConf, vcpus: usize, threads: usize) -> Option<QmSet> {
    let resized = resize(conf, vcpus, threads)?;
    match &conf.numa_nodes[..] {
        _ if !conf.numa => Some(resized),
        [] => Some(resized),
        [node] => Some(resized.set(
            &format!("numa{}", node.index),
            numa_node(
                vcpus,
                node.host_nodes.as_ref(),
                node.memory,
                node.policy.as_deref(),
            ),
        )),
        _ => None,
    }
}

/// A number of vCPUs that would suit the CPUs better.
struct Size {
    what: &'static str,
    vcpus: usize,
    threads: usize,
    /// Whether that is for one LLC domain in place of several.
    in_one_llc: bool,
}

/// The sizes that would suit a VM whose vCPUs share cores or are on small ones, without the guest's
/// knowledge, or whose cores are split.
fn sizes(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    guest: &Guest,
    choice: &Choice,
) -> Vec<Size> {
    let facts = &choice.facts;
    let isolated = &choice.isolated;
    let fast: Vec<CpuSet> = topology
        .cores_of(isolated)
        .filter(|core| !core.intersects(&topology.ecores))
        .map(|core| core & isolated)
        .collect();
    let crowded = facts.doubled > 0 || !facts.on_small.is_empty();
    let has_cells = conf.numa && conf.numa_nodes.len() > 1;
    if fast.is_empty() || has_cells {
        return Vec::new();
    }
    if guest.threads > 1 {
        return if_split(guest, choice, &fast).into_iter().collect();
    }
    // A smaller guest than one on several nodes would be on one, and crowded there.
    if !crowded || facts.nodes.len() > 1 {
        return Vec::new();
    }
    let mut sizes = vec![Size {
        what: match facts.doubled {
            0 => "for fast cores only",
            _ if topology.ecores.is_empty() => "for a core per vCPU",
            _ => "for a fast core per vCPU",
        },
        vcpus: fast.len(),
        threads: 1,
        in_one_llc: false,
    }];
    if fast.iter().all(|core| core.len() == 2) {
        sizes.push(Size {
            what: "for both threads of each core, known to the guest",
            vcpus: fast.len() * 2,
            threads: 2,
            in_one_llc: false,
        });
        let as_many = guest.vcpus;
        let is_other = as_many.is_multiple_of(2) && facts.llcs.len() > 1;
        if is_other && fits_with_smt(topology, guest) {
            sizes.push(Size {
                what: "for as many vCPUs in one LLC domain, two per core, known to the guest",
                vcpus: as_many,
                threads: 2,
                in_one_llc: true,
            });
        }
    }
    if lacks_topoext(root, topology, conf) {
        // A core per vCPU needs nothing else.
        sizes.sort_by_key(|size| size.threads);
    }
    sizes
}

/// The size for a guest with SMT that has cores whose threads are on several of the host's.
fn if_split(guest: &Guest, choice: &Choice, fast: &[CpuSet]) -> Option<Size> {
    let threads = guest.threads;
    let whole = fast.iter().filter(|core| core.len() >= threads).count();
    let theirs = fast.iter().map(CpuSet::len).min().unwrap_or(1);
    let size = match whole {
        0 if theirs > 1 => Size {
            what: "for as many threads per core as the host's have",
            vcpus: (guest.vcpus / theirs * theirs).min(fast.len() * theirs),
            threads: theirs,
            in_one_llc: false,
        },
        0 => Size {
            what: "for a guest without SMT, since these cores have too few threads",
            vcpus: fast.len().min(guest.vcpus),
            threads: 1,
            in_one_llc: false,
        },
        _ => Size {
            what: "for one of the host's cores per guest core",
            vcpus: whole * threads,
            threads,
            in_one_llc: false,
        },
    };
    (choice.facts.split > 0).then_some(size)
}

/// Whether a domain has a fast core for each two vCPUs.
fn fits_with_smt(topology: &Topology, guest: &Guest) -> bool {
    topology.domains(Kind::Llc).iter().any(|llc| {
        let is_free = |core: &&CpuSet| {
            core.is_subset(&llc.cpus)
                && core.len() == 2
                && !core.contains(cpu::BOOT_CPU)
                && !core.intersects(&topology.ecores)
        };
        topology.cores.iter().filter(is_free).count() * 2 >= guest.vcpus
    })
}

/// Settings of the VM for its memory, and what they are good for.
pub(crate) struct Memory {
    what: &'static str,
    pub set: QmSet,
}

/// Binds the VM's memory to the node of its CPUs, with huge pages if enough are free there. Without
/// it nothing is set but `affinity:` removed, if memory does not depend on that.
pub(crate) fn memory(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    guest: &Guest,
    choice: &Choice,
) -> Memory {
    let nodes = &choice.facts.nodes;
    let several = topology.domains(Kind::Node).len() > 1;
    let mib = conf.memory_mib();
    let plugs_memory = |features: &str| features.split([',', ';', ' ']).any(|one| one == "memory");
    let node = nodes.first().filter(|_| nodes.len() == 1);
    let is_plugged = conf.hotplug.as_deref().is_some_and(plugs_memory);
    let binds = several
        && !is_plugged
        && node.is_some_and(|node| super::memory::has_room(root, node, mib))
        && guest.cells.iter().all(|cell| !cell.nodes.intersects(nodes))
        && conf.numa_nodes.len() < 2;
    let mut set = QmSet::default();
    let mut what = "since the pins take precedence";
    if let Some(cells) = cells_of(root, topology, conf, guest, choice).filter(|_| !is_plugged) {
        what = "for a NUMA cell of the guest on each node of its CPUs";
        set = cells;
    }
    if binds {
        what = "for memory on the node of its CPUs";
        let numa0 = numa_node(guest.vcpus, Some(nodes), Some(mib), Some("bind"));
        let others = conf.numa_nodes.iter().filter(|node| node.index != 0);
        set = set.set("numa", "1").set("numa0", numa0);
        for other in others {
            set = set.delete(&format!("numa{}", other.index), true);
        }
    }
    // Proxmox VE asks for the pages of each `numaN` on its node, else for a socket's on node 0.
    let is_here = match (&conf.numa_nodes[..], &guest.cells[..]) {
        _ if binds => true,
        ([_], [cell]) => cell.nodes == *nodes,
        ([], _) => !several && conf.sockets.unwrap_or(1) <= 1,
        _ => false,
    };
    let size = node.and_then(|node| super::memory::free_pages_for(root, node, mib));
    let may_have = is_here && !is_plugged && conf.hugepages.is_none();
    if let Some(size) = size.filter(|_| may_have) {
        what = match binds {
            true => "for memory on the node of its CPUs, in huge pages",
            false => "for huge pages, of which enough are free",
        };
        set = set.set("numa", "1").set("hugepages", size);
    }
    let depends = several && !binds && guest.cells.is_empty();
    Memory {
        what,
        set: set.delete("affinity", conf.affinity_text.is_some() && !depends),
    }
}

/// A socket of the guest, with its part of the memory, on each of several nodes; none if the VM says
/// where its vCPUs and memory are, or the parts would not be alike.
fn cells_of(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    guest: &Guest,
    choice: &Choice,
) -> Option<QmSet> {
    let nodes = &choice.facts.nodes;
    let count = nodes.len();
    let mib = conf.memory_mib();
    let has_own = !guest.cells.is_empty() || !conf.numa_nodes.is_empty() || conf.vcpus.is_some();
    let threads = guest.threads.max(1);
    let is_even = guest.vcpus.is_multiple_of(count * threads) && mib.is_multiple_of(count as u64);
    if count < 2 || has_own || !is_even {
        return None;
    }
    let (vcpus, mib) = (guest.vcpus / count, mib / count as u64);
    let mut set = QmSet::default()
        .set("sockets", count.to_string())
        .set("cores", vcpus.to_string())
        .set("numa", "1");
    if conf.has_smp() {
        set = set.set("args", args(conf, guest.vcpus, count, threads)?);
    }
    for (cell, node) in nodes.iter().enumerate() {
        let cpus = choice::cpus_of_nodes(topology, &[node].into_iter().collect());
        if (&cpus & &choice.isolated).len() < vcpus || !super::memory::has_room(root, node, mib) {
            return None;
        }
        let first = cell * vcpus;
        let value = format!(
            "cpus={},hostnodes={node},memory={mib},policy=bind",
            CpuSet::range(first, first + vcpus - 1)
        );
        set = set.set(&format!("numa{cell}"), value);
    }
    Some(set)
}

/// A value of `numaN`.
fn numa_node(
    vcpus: usize,
    nodes: Option<&CpuSet>,
    memory: Option<u64>,
    policy: Option<&str>,
) -> String {
    let mut value = format!("cpus={}", CpuSet::range(0, vcpus.saturating_sub(1)));
    if let Some(nodes) = nodes {
        // Several are separated by semicolons.
        value += &format!(",hostnodes={}", nodes.to_string().replace(',', ";"));
    }
    if let Some(memory) = memory {
        value += &format!(",memory={memory}");
    }
    match policy {
        Some(policy) => value + &format!(",policy={policy}"),
        None => value,
    }
}

/// What gives a VM so many vCPUs, in cores of so many threads.
fn resize(conf: &VmConf, vcpus: usize, threads: usize) -> Option<QmSet> {
    let mut set = QmSet::default().set("cores", vcpus.to_string());
    if conf.sockets.is_some_and(|sockets| sockets > 1) {
        set = set.set("sockets", "1");
    }
    let has_smp = conf.has_smp();
    if threads > 1 || has_smp {
        set = set.set("args", args(conf, vcpus, 1, threads)?);
    }
    if let Some(features) = hotplug_without_cpu(conf).filter(|_| threads > 1) {
        set = set.set("hotplug", features);
    }
    // A `-smp` has all of them, and fewer cannot be more.
    let keeps = threads == 1 && !has_smp;
    Some(set.delete(
        "vcpus",
        conf.vcpus.is_some_and(|now| !keeps || now as usize > vcpus),
    ))
}

/// `hotplug` without `cpu`, since that adds vCPUs in places that a `-smp` in `args` has filled; none
/// if it is not there.
fn hotplug_without_cpu(conf: &VmConf) -> Option<String> {
    if !conf.plugs_vcpus {
        return None;
    }
    let features = conf.hotplug.as_deref().unwrap_or_default();
    let rest: Vec<&str> = features
        .split([',', ';', ' ', '\t', '\0'])
        .filter(|feature| !feature.is_empty() && *feature != "cpu")
        .collect();
    Some(match rest[..] {
        [] => "0".into(),
        _ => rest.join(","),
    })
}

/// What makes the threads of its cores known to a guest; none if `args` cannot be split into words.
pub(crate) fn with_threads(conf: &VmConf, vcpus: usize, threads: usize) -> Option<QmSet> {
    let set = QmSet::default().set("args", args(conf, vcpus, 1, threads)?);
    Some(match hotplug_without_cpu(conf) {
        Some(features) => set.set("hotplug", features),
        None => set,
    })
}

/// `args` with a `-smp` for so many vCPUs in so many sockets, with cores of so many threads; whatever
/// else is in it stays.
fn args(conf: &VmConf, vcpus: usize, sockets: usize, threads: usize) -> Option<String> {
    conf.args_with_smp(&format!(
        "{vcpus},sockets={sockets},cores={},threads={threads},maxcpus={vcpus}",
        vcpus / threads.max(1) / sockets
    ))
}

/// Whether a guest on AMD would not see the threads of its cores: QEMU's model host, and those that
/// are not EPYC, come without topoext.
pub(crate) fn lacks_topoext(root: &Host, topology: &Topology, conf: &VmConf) -> bool {
    let cpu = conf.cpu.as_deref().unwrap_or_default();
    let model = cpu.split(',').next().unwrap_or_default();
    let model = model.strip_prefix("cputype=").unwrap_or(model);
    let says = |text: &str| text.contains("topoext") && !text.contains("topoext=off");
    let custom = model.strip_prefix("custom-");
    let of_model = custom.and_then(|name| vm::cpu_model_flags(root, name));
    topology.is_amd()
        && !model.starts_with("EPYC")
        && !of_model.is_some_and(|flags| says(&flags))
        && !says(cpu)
        && !conf.args.as_deref().is_some_and(says)
}

/// How to give a guest topoext: Proxmox VE takes this flag in custom models only.
pub(crate) fn topoext(vmid: VmId) -> String {
    format!(
        "add `cpu-model: host-smt`, `    flags +topoext`, `    reported-model host` as three lines to \
         /etc/pve/virtual-guest/cpu-models.conf, then qm set {vmid} --cpu custom-host-smt"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::{Areas, Claimed, Question};
    use pinfold_core::testutils::machine;

    #[test]
    fn sizes_that_suit_the_cpus() {
        let vmid: VmId = "100".parse().unwrap();
        for (machine, conf, isolated, set) in [
            ("13900k", "cores: 7", "2-15", ""),
            (
                "13900k",
                "cores: 24",
                "",
                "qm set 100 --cores 14 --args '-smp 14,sockets=1,cores=7,threads=2,maxcpus=14'",
            ),
            // To lose more than half of the vCPUs is a choice.
            ("13900k", "cores: 30", "", ""),
            // A guest's core needs both threads of one; and no size leaves given CPUs idle.
            ("13900k", "cores: 4", "2-3,4", "qm set 100 --cores 2"),
            ("13900k", "cores: 4", "2,4,16-17", ""),
            // A guest on AMD has no SMT without topoext.
            ("5900x", "cores: 12", "6-11,18-23", "qm set 100 --cores 6"),
            ("5900x", "cores: 12", "", "qm set 100 --cores 11"),
            (
                "5900x",
                "cores: 12\ncpu: EPYC",
                "6-11,18-23",
                "qm set 100 --cores 12 --args '-smp 12,sockets=1,cores=6,threads=2,maxcpus=12'",
            ),
            // What it starts with stays if it still can.
            (
                "5900x",
                "cores: 12\nvcpus: 4",
                "6-11,18-23",
                "qm set 100 --cores 6",
            ),
            (
                "5900x",
                "cores: 12\nvcpus: 8",
                "6-11,18-23",
                "qm set 100 --cores 6 --delete vcpus",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            machine::expand(&machine::text(machine), dir.path());
            let root = Host::new(dir.path());
            let topology = Topology::read(&root).unwrap();
            let areas = Areas::new(&topology);
            let choose = |conf: &VmConf| {
                let guest = Guest::new(conf, CpuSet::new());
                let question = Question {
                    topology: &topology,
                    areas: &areas,
                    guest: &guest,
                    claimed: &Claimed::default(),
                    within: None,
                };
                let choice = match isolated {
                    "" => choice::choose(&question, &[]).ok()?,
                    cpus => choice::given(&question, &[], cpus.parse().unwrap()),
                };
                Some((guest, choice))
            };
            let text = conf;
            let conf = VmConf::parse(text);
            let (guest, choice) = choose(&conf).unwrap();
            let best = best_size(&Vm {
                root: &root,
                vmid,
                text,
                conf: &conf,
                topology: &topology,
                guest: &guest,
                choice: &choice,
                choose: &choose,
            });
            let found = best.map_or_else(String::new, |best| best.set.command(vmid));
            assert_eq!(found, set, "{machine}: {text:?} on {isolated:?}");
        }
    }

    #[test]
    fn other_arguments_stay() {
        for (old, new) in [
            ("", "-smp 12,sockets=1,cores=6,threads=2,maxcpus=12"),
            (
                "-device ivshmem -smp 4,cores=4 -global x=y",
                "-device ivshmem -global x=y -smp 12,sockets=1,cores=6,threads=2,maxcpus=12",
            ),
            (
                "-append \"-smp 1\" --smp '4,dies=2'",
                "-append \"-smp 1\" -smp 12,sockets=1,cores=6,threads=2,maxcpus=12",
            ),
            ("-smp", "-smp 12,sockets=1,cores=6,threads=2,maxcpus=12"),
        ] {
            let conf = VmConf::parse(&format!("args: {old}"));
            assert_eq!(args(&conf, 12, 1, 2).unwrap(), new, "{old:?}");
        }
        let unbalanced = VmConf::parse("cores: 4\nargs: -name 'a");
        assert_eq!(resized(&unbalanced, 12, 2), None);
        assert!(resized(&unbalanced, 2, 1).is_some());
        let conf = VmConf::parse(
            "cores: 8\nvcpus: 2\nsockets: 2\nhotplug: disk,cpu,usb\nargs: -name a'b'",
        );
        assert_eq!(
            resized(&conf, 14, 2)
                .unwrap()
                .command("100".parse().unwrap()),
            "qm set 100 --cores 14 --sockets 1 --args '-name a'\\''b'\\'' \
             -smp 14,sockets=1,cores=7,threads=2,maxcpus=14' --hotplug disk,usb --delete vcpus"
        );
    }
}

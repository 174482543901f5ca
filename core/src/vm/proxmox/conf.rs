//! A VM's settings: VMID.conf, as `PVE::QemuServer` reads it and makes QEMU's command line of it.

use std::fmt;

use super::grammar;
pub use super::grammar::PassedOver;
pub use super::hostpci::{HostDevices, HostPci};
use super::paths::{CONFS, NODES, conf_file, conf_file_on, container_conf_file};
use super::property;
use super::schema::{self, MACHINE, MAX_NUMA, MEMORY, NUMA};
use super::words::{self, Word};
use crate::cpuset::{CpuSet, MAX_CPU};
use crate::error::{Error, Result, is_gone};
use crate::sysroot::Sysroot;
use crate::text::excerpt;

use crate::vm::guest_topology::{self, SmpError, Topology};
use crate::vm::id::VmId;

/// What Pinfold needs of a VM's settings: those of the running VM, neither pending ones nor a
/// snapshot's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmConf {
    /// The VM's name.
    pub name: Option<String>,
    /// Why an action holds the VM: `backup`, `migrate`, …
    pub lock: Option<String>,
    /// CPU sockets, by `sockets:` or by the older `smp:`; Proxmox VE takes 1 if none is set.
    pub sockets: Option<u32>,
    /// Cores per socket; Proxmox VE takes 1 if it is not set.
    pub cores: Option<u32>,
    /// vCPUs that the VM starts with, if not all.
    pub vcpus: Option<u32>,
    /// Whether vCPUs can be plugged in (`hotplug: cpu`): all but the first are then devices.
    pub plugs_vcpus: bool,
    /// What can be plugged in while it runs, as it is written.
    pub hotplug: Option<String>,
    /// The CPU model with its flags, as it is written.
    pub cpu: Option<String>,
    /// Arguments for QEMU, as they are written; Proxmox VE puts them behind its own.
    pub args: Option<String>,
    /// Proxmox VE's own pinning of the whole process.
    pub affinity: Option<CpuSet>,
    /// The same as it is written.
    pub affinity_text: Option<String>,
    /// A pinning that is proposed for Proxmox VE, as it is written.
    pub pinning: Option<String>,
    /// The memory in MiB, if it is set.
    pub memory: Option<u64>,
    /// The size of the huge pages: `2`, `1024` or `any`.
    pub hugepages: Option<String>,
    /// Whether the guest has NUMA nodes (`numa: 1`).
    pub numa: bool,
    /// The guest's NUMA nodes (`numaN`), by index. They count only with [`numa`](Self::numa).
    pub numa_nodes: Vec<NumaNode>,
    /// The machine type of QEMU, if it is set.
    pub machine: Option<String>,
    /// The host's PCI devices that are passed through, by index.
    pub hostpci: Vec<HostPci>,
    /// Whether it is a template, which starts for a backup only: with one vCPU and no device.
    pub template: bool,
    /// The volume of the hook script: `local:snippets/hook`.
    pub hookscript: Option<String>,
    /// Whether it has a TPM, for which swtpm runs beside QEMU.
    pub tpm: bool,
    /// Whether it shares a folder, for each of which virtiofsd runs beside QEMU.
    pub virtiofs: bool,
    /// What Proxmox VE warns of and passes over, in the whole file.
    pub passed_over: Vec<PassedOver>,
}

/// One `numaN` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NumaNode {
    /// The N of `numaN`.
    pub index: u32,
    /// The node's vCPUs, by number.
    pub vcpus: CpuSet,
    /// The node's memory in MiB.
    pub memory: Option<u64>,
    /// The NUMA nodes of the host that the memory is on, by number.
    pub host_nodes: Option<CpuSet>,
    /// How strictly: `bind`, `preferred` or `interleave`.
    pub policy: Option<String>,
}

/// Settings that Proxmox VE accepts, but with which the VM does not start, or starts differently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contradiction {
    /// QEMU refuses the merged `-smp`.
    Smp(SmpError),
    /// QEMU refuses a vCPU that is plugged in at the start, since the `-smp` in `args` has it
    /// already, or has no place for it.
    PluggedVcpu {
        /// The number in its id, `cpuN`.
        number: u64,
        /// Whether it is there already.
        is_there: bool,
    },
    /// Nothing of `args` reaches QEMU: a quote in it is not closed.
    Args,
    /// `affinity` has no CPU.
    Affinity,
    /// `affinity: 0`, which Perl treats as false: Proxmox VE does not apply it.
    AffinityOfZero,
    /// `hugepages` without `numa: 1`.
    HugepagesWithoutNuma,
    /// A size of huge pages that does not exist.
    HugepagesSize(String),
    /// A `numaN` entry, or all of them, with which Proxmox VE refuses to start.
    Numa {
        /// The N of `numaN`, if it is one entry.
        index: Option<u32>,
        /// Why.
        reason: String,
    },
    /// A `hostpciN` entry with which Proxmox VE refuses to start.
    HostPci {
        /// The N of `hostpciN`.
        index: u32,
        /// Why.
        reason: String,
    },
}

impl Contradiction {
    /// Whether the VM does not start.
    pub fn stops_start(&self) -> bool {
        !matches!(self, Self::Args | Self::AffinityOfZero)
    }
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Smp(error) => write!(f, "QEMU refuses to start: {error}"),
            Self::PluggedVcpu { number, is_there } => write!(
                f,
                "QEMU refuses to start: `hotplug: cpu` plugs in cpu{number}, {why} in args",
                why = if *is_there {
                    "which is already part of the -smp"
                } else {
                    "for which there is no room in the -smp"
                }
            ),
            Self::Args => write!(
                f,
                "args has a quote that is not closed; all of it is ignored"
            ),
            Self::Affinity => write!(f, "affinity has no CPU, so taskset fails"),
            Self::AffinityOfZero => write!(
                f,
                "`affinity: 0` has no effect, since Proxmox VE treats it as unset; use `0-0`"
            ),
            Self::HugepagesWithoutNuma => {
                write!(f, "Proxmox VE refuses to start: hugepages needs `numa: 1`")
            }
            Self::HugepagesSize(size) => write!(
                f,
                "Proxmox VE refuses to start: there are no huge pages of {size:?}",
                size = excerpt(size)
            ),
            Self::Numa { index, reason } => {
                let index = index.map(|index| index.to_string()).unwrap_or_default();
                write!(f, "Proxmox VE refuses to start: numa{index}: {reason}")
            }
            Self::HostPci { index, reason } => {
                write!(f, "Proxmox VE refuses to start: hostpci{index}: {reason}")
            }
        }
    }
}

impl VmConf {
    /// Parses VMID.conf. As Proxmox VE does, it passes over what it cannot read, and keeps a
    /// warning of it; there is no text that is an error.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        let mut legacy_sockets = None;
        let passed_over = grammar::read(text, |key, value| match key {
            "smp" => legacy_sockets = count(value),
            _ => conf.set(key, value),
        });
        conf.sockets = conf.sockets.or(legacy_sockets);
        conf.hostpci.sort_by_key(|entry| entry.index);
        conf.numa_nodes.sort_by_key(|node| node.index);
        conf.passed_over = passed_over;
        conf
    }

    /// Takes a setting whose value has been checked.
    fn set(&mut self, key: &str, value: &str) {
        let text = || Some(value.to_owned());
        let is_set = || property::boolean(value) == Some(true);
        match key {
            "name" => self.name = text(),
            "lock" => self.lock = text(),
            "sockets" => self.sockets = count(value),
            "cores" => self.cores = count(value),
            "vcpus" => self.vcpus = count(value),
            "hotplug" => {
                self.plugs_vcpus = schema::list(value).any(|feature| feature == "cpu");
                self.hotplug = text();
            }
            "cpu" => self.cpu = text(),
            // Perl treats 0 as false.
            "args" => self.args = text().filter(|args| args != "0"),
            "affinity" => {
                let ranges = schema::parse_cpus(value).unwrap_or_default();
                self.affinity = Some(numbers(&ranges));
                self.affinity_text = text();
            }
            "pinning" => self.pinning = text(),
            "memory" => {
                let values = property::parse(&MEMORY, value).unwrap_or_default();
                self.memory = values.get("current").and_then(|size| size.parse().ok());
            }
            "hugepages" => self.hugepages = text().filter(|size| size != "0"),
            "numa" => self.numa = is_set(),
            "machine" => {
                let mut values = property::parse(&MACHINE, value).unwrap_or_default();
                self.machine = values.remove("type");
            }
            "hookscript" => self.hookscript = text(),
            "tpmstate0" => self.tpm = true,
            "template" => self.template = is_set(),
            _ => self.set_numbered(key, value),
        }
    }

    /// Takes a setting of which there are several.
    fn set_numbered(&mut self, key: &str, value: &str) {
        if let Some(index) = HostPci::index_of(key) {
            self.hostpci.retain(|other| other.index != index);
            self.hostpci.extend(HostPci::parse(index, value));
            return;
        }
        match schema::split_number(key) {
            ("numa", Some(index)) if index < MAX_NUMA => {
                self.numa_nodes.retain(|other| other.index != index);
                self.numa_nodes.extend(NumaNode::parse(index, value));
            }
            ("virtiofs", Some(_)) => self.virtiofs = true,
            _ => {}
        }
    }

    /// Whether a backup of the VM is under way.
    pub fn is_in_backup(&self) -> bool {
        self.lock.as_deref() == Some("backup")
    }

    /// Its memory in MiB; what Proxmox VE gives a VM without `memory:` if that is not set.
    pub fn memory_mib(&self) -> u64 {
        const DEFAULT: u64 = 512;
        self.memory.unwrap_or(DEFAULT)
    }

    /// The number of vCPUs that the VM starts with.
    pub fn vcpus(&self) -> u32 {
        let plugged = || {
            if self.has_devices_for_vcpus() {
                self.own_vcpus().saturating_sub(1)
            } else {
                0
            }
        };
        let count = match self.topology() {
            _ if self.template => 1,
            Ok(topology) if self.contradicting_plug(&topology).is_none() => {
                topology.cpus.saturating_add(plugged())
            }
            _ => self.own_vcpus(),
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The number of vCPUs that the VM can have, those that can be plugged in among them.
    pub fn max_vcpus(&self) -> u32 {
        let count = match self.topology() {
            _ if self.template => 1,
            Ok(topology) => topology.maxcpus,
            Err(_) => self.own_maxcpus(),
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// The threads of each core of the guest: one with Proxmox VE's own settings, unless `args` has
    /// a `-smp` that contains more.
    pub fn threads_per_core(&self) -> usize {
        match self.topology() {
            Ok(topology) if !self.template => usize::try_from(topology.threads).unwrap_or(1),
            _ => 1,
        }
    }

    /// Settings that contradict each other. A template has none: it starts with disks only.
    pub fn contradictions(&self) -> Vec<Contradiction> {
        if self.template {
            return Vec::new();
        }
        let mut found = Vec::new();
        if self.words().is_none() {
            found.push(Contradiction::Args);
        }
        match self.topology() {
            Err(error) => found.push(Contradiction::Smp(error)),
            Ok(topology) => found.extend(self.contradicting_plug(&topology)),
        }
        if self.affinity.as_ref().is_some_and(CpuSet::is_empty) {
            found.push(Contradiction::Affinity);
        }
        if self.affinity_text.as_deref() == Some("0") {
            found.push(Contradiction::AffinityOfZero);
        }
        found.extend(self.contradicting_memory());
        found.extend(self.hostpci.iter().filter_map(|entry| {
            let is_q35 = self
                .machine
                .as_ref()
                .is_some_and(|name| name.contains("q35"));
            let reason = match &entry.devices {
                HostDevices::Refused(why) => why.clone(),
                _ if entry.pcie && !is_q35 => "pcie=1 needs `machine: q35`".into(),
                _ => return None,
            };
            Some(Contradiction::HostPci {
                index: entry.index,
                reason,
            })
        }));
        found
    }

    /// As `PVE::QemuServer::Memory::config` checks them.
    fn contradicting_memory(&self) -> Vec<Contradiction> {
        let mut found = Vec::new();
        if let Some(size) = &self.hugepages {
            if !matches!(size.as_str(), "2" | "1024" | "any") {
                found.push(Contradiction::HugepagesSize(size.clone()));
            }
            if !self.numa {
                found.push(Contradiction::HugepagesWithoutNuma);
            }
        }
        if !self.numa {
            return found;
        }
        let vcpus = self.vcpus().max(self.max_vcpus()) as usize;
        for node in &self.numa_nodes {
            let reason = if node.memory.unwrap_or(0) == 0 {
                "it has no memory"
            } else if node.host_nodes.is_some() && node.policy.is_none() {
                "hostnodes needs a policy"
            } else if node.host_nodes.is_none() && self.hugepages.is_some() {
                "hugepages needs hostnodes"
            } else if node
                .host_nodes
                .as_ref()
                .is_some_and(|nodes| nodes.len() > 1)
                && self.hugepages.is_some()
            {
                "hugepages needs a single host node"
            } else if node.vcpus.last().is_some_and(|last| last >= vcpus) {
                "it has vCPUs that the VM does not have"
            } else {
                continue;
            };
            found.push(Contradiction::Numa {
                index: Some(node.index),
                reason: reason.into(),
            });
        }
        let memory = self.memory_mib();
        let of_nodes = self
            .numa_nodes
            .iter()
            .filter_map(|node| node.memory)
            .fold(0, u64::saturating_add);
        if of_nodes != 0 && of_nodes != memory {
            found.push(Contradiction::Numa {
                index: None,
                reason: format!("the nodes have {of_nodes} MiB of the VM's {memory} MiB"),
            });
        }
        found
    }

    /// The first vCPU that Proxmox VE adds as a device (`cpu2` and so on) and QEMU refuses.
    fn contradicting_plug(&self, topology: &Topology) -> Option<Contradiction> {
        if !self.has_devices_for_vcpus() {
            return None;
        }
        let cores = u64::from(self.cores.unwrap_or(1));
        // No more than any machine of QEMU's has.
        (2..=self.own_vcpus().min(MAX_CPU as u64)).find_map(|number| {
            let (socket, core) = ((number - 1) / cores, (number - 1) % cores);
            // QEMU numbers the places of vCPUs thread by thread and core by core.
            let is_place = socket < topology.sockets
                && core < topology.cores
                && topology.dies == 1
                && topology.modules == 1;
            let is_there = (socket * topology.cores + core) * topology.threads < topology.cpus;
            (!is_place || is_there).then_some(Contradiction::PluggedVcpu {
                number,
                is_there: is_place && is_there,
            })
        })
    }

    /// Whether all vCPUs but the first are devices. Machine types before 2.7 do not have that.
    fn has_devices_for_vcpus(&self) -> bool {
        let version = || {
            let version = self.machine.as_deref()?.rsplit('-').next()?;
            let mut parts = version.split(['.', '+']);
            let mut part = || parts.next()?.parse::<u32>().ok();
            Some((part()?, part()?))
        };
        self.plugs_vcpus && version().is_none_or(|version| version >= (2, 7))
    }

    /// The vCPUs that Proxmox VE itself asks for.
    fn own_vcpus(&self) -> u64 {
        self.vcpus.map_or_else(|| self.own_maxcpus(), u64::from)
    }

    /// The most vCPUs that Proxmox VE itself asks for.
    fn own_maxcpus(&self) -> u64 {
        u64::from(self.sockets.unwrap_or(1)) * u64::from(self.cores.unwrap_or(1))
    }

    /// The topology of the guest by all `-smp` options, Proxmox VE's own first.
    fn topology(&self) -> std::result::Result<Topology, SmpError> {
        let cpus = if self.has_devices_for_vcpus() {
            1
        } else {
            self.own_vcpus()
        };
        let own = format!(
            "{cpus},sockets={},cores={},maxcpus={}",
            self.sockets.unwrap_or(1),
            self.cores.unwrap_or(1),
            self.own_maxcpus()
        );
        let words = self.words().unwrap_or_default();
        guest_topology::merge(
            [own.as_str()]
                .into_iter()
                .chain(words::values_of(&words, "smp")),
        )
    }

    /// Whether `args` has a `-smp` of its own.
    pub fn has_smp(&self) -> bool {
        let words = self.words().unwrap_or_default();
        !words::values_of(&words, "smp").is_empty()
    }

    /// `args` with this `-smp` in place of its own ones, since QEMU merges them key by key; `None` if
    /// Proxmox VE cannot split it into words.
    pub fn args_with_smp(&self, smp: &str) -> Option<String> {
        let others = words::without(self.args.as_deref().unwrap_or_default(), "smp")?;
        Some(format!("{others} -smp {smp}").trim_start().to_owned())
    }

    /// The words of `args`; `None` if it cannot be split.
    fn words(&self) -> Option<Vec<Word>> {
        words::split(self.args.as_deref().unwrap_or_default())
    }
}

impl NumaNode {
    /// Parses the value of a `numaN` key; `None` if Proxmox VE passes over it.
    fn parse(index: u32, value: &str) -> Option<Self> {
        let values = property::parse(&NUMA, value).ok()?;
        let set = |key: &str| {
            let ranges = values.get(key)?.split(';');
            let ranges: Vec<_> = ranges
                .filter_map(|range| schema::parse_range(range).ok())
                .collect();
            Some(numbers(&ranges))
        };
        Some(Self {
            index,
            vcpus: set("cpus")?,
            memory: values
                .get("memory")
                .and_then(|size| size.parse::<f64>().ok())
                .map(|size| size as u64),
            host_nodes: set("hostnodes"),
            policy: values.get("policy").cloned(),
        })
    }
}

/// A count of which 0 is the same as none.
fn count(digits: &str) -> Option<u32> {
    match digits.parse::<u32>() {
        Ok(0) => None,
        Ok(count) => Some(count),
        // More digits than the type has room for.
        Err(_) => Some(u32::MAX),
    }
}

/// The numbers in ranges, without those that no CPU has.
fn numbers(ranges: &[(u64, u64)]) -> CpuSet {
    let most = MAX_CPU as u64;
    ranges
        .iter()
        .filter(|(first, _)| *first <= most)
        .flat_map(|(first, last)| *first..=(*last).min(most))
        .filter_map(|number| usize::try_from(number).ok())
        .collect()
}

/// A VM's settings.
///
/// # Errors
/// [`Error::Unusable`] if it is a container or there is no such VM.
pub fn conf(root: &Sysroot, vmid: VmId) -> Result<VmConf> {
    check_exists(root, vmid)?;
    Ok(VmConf::parse(&root.read(conf_file(vmid))?))
}

/// The settings of a VM that comes from another node, while it is started here: Proxmox VE moves
/// VMID.conf when the migration has succeeded. `source` is that node.
///
/// # Errors
/// [`Error::Malformed`] if the node's name is not valid, [`Error::Unusable`] if there is no such VM.
pub fn conf_from(root: &Sysroot, vmid: VmId, source: &str) -> Result<VmConf> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if source.is_empty() || !source.bytes().all(is_name) {
        let why = "not the name of a node";
        return Err(Error::malformed(format!("{source:?}"), why));
    }
    match root.read(conf_file_on(source, vmid)) {
        Err(error) if error.is_gone() => conf(root, vmid),
        text => Ok(VmConf::parse(&text?)),
    }
}

/// The VMs of this node; none if it is not a node of Proxmox VE.
///
/// # Errors
/// If the list of VMs cannot be read.
pub fn all(root: &Sysroot) -> Result<Vec<VmId>> {
    let names = match root.names(CONFS) {
        Err(error) if error.is_gone() => Vec::new(),
        names => names?,
    };
    Ok(names
        .iter()
        .filter_map(|name| name.strip_suffix(".conf")?.parse().ok())
        .collect())
}

/// Whether another node of the cluster has the VM.
pub fn is_elsewhere(root: &Sysroot, vmid: VmId) -> bool {
    let nodes = root.names(NODES).unwrap_or_default();
    nodes
        .iter()
        .any(|node| root.exists(conf_file_on(node, vmid)))
}

/// Checks that the number is a VM's.
///
/// # Errors
/// [`Error::Unusable`] if it is a container's, or none of this node.
pub fn check_exists(root: &Sysroot, vmid: VmId) -> Result<()> {
    if is_container(root, vmid) {
        return Err(Error::unusable(
            vmid.to_string(),
            "it is a container; only VMs have a QEMU",
        ));
    }
    let path = root.path(conf_file(vmid));
    match path.symlink_metadata() {
        Ok(_) => Ok(()),
        Err(error) if is_gone(&error) => {
            let why = format!("no such VM on this node: there is no {}", path.display());
            Err(Error::unusable(format!("VM {vmid}"), why))
        }
        Err(error) => Err(Error::io(path, "look", error)),
    }
}

/// Whether the number is a container's.
pub fn is_container(root: &Sysroot, vmid: VmId) -> bool {
    root.exists(container_conf_file(vmid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pci::PciAddress;
    use crate::testutils::write;
    use crate::vm::fixture::{any_selector, host, joined};
    use proptest::prelude::*;

    #[test]
    fn the_running_vm_ends_at_the_first_section() {
        let conf = VmConf::parse(
            "#cores: 99\n#hostpci0%3A 09:00\naffinity: 6-11,18-23\ncores: 6\nhookscript: local:snippets/hook\n\
             hostpci0: 0000:01:00,pcie=1,x-vga=1\nhugepages: 1024\nlock: backup\nmemory: 16384\nname: gaming\n\
             numa: 1\nnuma0: cpus=0-5;7,hostnodes=1,memory=16384,policy=bind\nsockets: 2\n\n\
             [PENDING]\ncores: 8\n\n[special:cloudinit]\nname: x\n\n[before]\n#snapshot\nhostpci1: 02:00\nvcpus: 1\n",
        );
        assert_eq!(
            (conf.name.as_deref(), conf.cores, conf.sockets, conf.vcpus),
            (Some("gaming"), Some(6), Some(2), None)
        );
        assert_eq!(conf.vcpus(), 12);
        assert_eq!(conf.affinity.unwrap().to_string(), "6-11,18-23");
        assert_eq!(conf.hugepages.as_deref(), Some("1024"));
        assert_eq!(conf.hookscript.as_deref(), Some("local:snippets/hook"));
        assert_eq!(conf.lock.as_deref(), Some("backup"));
        assert_eq!(conf.hostpci.len(), 1);
        assert!(!conf.template && conf.passed_over.is_empty());
        let NumaNode {
            vcpus,
            memory,
            host_nodes,
            ..
        } = &conf.numa_nodes[0];
        assert_eq!(
            (vcpus.to_string().as_str(), *memory, host_nodes.clone()),
            ("0-5,7", Some(16384), Some(CpuSet::range(1, 1)))
        );
    }

    #[test]
    fn vcpus_as_proxmox_and_qemu_count_them() {
        for (text, vcpus, max_vcpus, threads) in [
            ("", 1, 1, 1),
            ("cores: 2\ncores: 3\n", 3, 3, 1),
            ("cores: 2\ncores: x\n", 2, 2, 1),
            ("cores: 2\ncores: 0\n", 1, 1, 1),
            ("cores: 4\nsockets: 2\nvcpus: 3\n", 3, 8, 1),
            ("cores: 4\nsockets: 0\nvcpus: 0\n", 4, 4, 1),
            ("cores: 2\nsmp: 4\n", 8, 8, 1),
            ("cores: 2\nsmp: 4\nsockets: 3\n", 6, 6, 1),
            ("sockets: 0\nsmp: 4\n", 4, 4, 1),
            ("cores: 12\nsockets: 2\n", 24, 24, 1),
            (
                "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\n",
                12,
                12,
                2,
            ),
            (
                "cores: 12\nargs: -cpu host --smp '12,sockets=1,cores=6,threads=2' -S\n",
                12,
                12,
                2,
            ),
            ("cores: 12\nargs: -smp cores=6\n", 12, 12, 2),
            ("cores: 12\nvcpus: 4\nargs: -smp cores=4\n", 4, 12, 3),
            ("cores: 12\nargs: -smp\n", 12, 12, 1),
            ("cores: 12\nargs: -append '-smp 24'\n", 12, 12, 1),
            ("cores: 12\nargs: -smp cores=6 'x\n", 12, 12, 1),
            ("cores: 12\nargs: -device x,threads=2\n", 12, 12, 1),
            ("cores: 12\n[before]\nargs: -smp threads=2\n", 12, 12, 1),
            (
                "cores: 4\nargs: -smp 12,cores=6,threads=2,maxcpus=12\n",
                12,
                12,
                2,
            ),
            ("cores: 4\nargs: -smp cores=2 -smp 8,maxcpus=8\n", 8, 8, 4),
            ("cores: 4\nvcpus: 3\nhotplug: network;cpu\n", 3, 4, 1),
            ("cores: 4\nvcpus: 3\nhotplug: cpu,x\n", 3, 4, 1),
            (
                "cores: 4\nhotplug: cpu\nmachine: pc-i440fx-2.6\nargs: -smp 2\n",
                2,
                4,
                1,
            ),
            (
                "cores: 4\nvcpus: 2\ntemplate: on\nargs: -smp threads=2\n",
                1,
                1,
                1,
            ),
            // What QEMU refuses is counted as Proxmox VE counts it.
            ("cores: 2\nvcpus: 6\n", 6, 2, 1),
            ("cores: 4\nargs: -smp 12\n", 4, 4, 1),
            (
                "cores: 4294967295\nsockets: 4294967296\n",
                u32::MAX,
                u32::MAX,
                1,
            ),
        ] {
            let conf = VmConf::parse(text);
            assert_eq!(
                (conf.vcpus(), conf.max_vcpus(), conf.threads_per_core()),
                (vcpus, max_vcpus, threads),
                "{text:?}"
            );
        }
    }

    #[test]
    fn contradictions() {
        for (text, expected) in [
            ("", &[] as &[&str]),
            (
                "hotplug: cpu\ncores: 12\nargs: -smp cores=12 -cpu host",
                &[],
            ),
            (
                "hotplug: cpu\ncores: 2\nsockets: 2\nargs: -smp threads=1",
                &[],
            ),
            (
                "numa: 1\nhugepages: any\nmemory: 1024\nnuma0: cpus=0,hostnodes=0,memory=1024,policy=bind",
                &[],
            ),
            ("numa0: cpus=0,hostnodes=0,memory=99", &[]),
            ("hostpci0: 01:00,pcie=1\nmachine: pc-q35-9.0", &[]),
            (
                "template: 1\nvcpus: 4\nhostpci0: 01:00,pcie=1\nhugepages: 2",
                &[],
            ),
            (
                "cores: 2\nvcpus: 6",
                &["QEMU refuses to start: the merged -smp has 6 vCPUs, and maxcpus=2"],
            ),
            (
                "cores: 4\nargs: -smp 12,sockets=1,cores=6,threads=2",
                &[
                    "QEMU refuses to start: the merged -smp has maxcpus=4, and a topology of 12 vCPUs",
                ],
            ),
            (
                "cores: 4\nargs: -smp help",
                &["QEMU refuses to start: -smp has \"help\", which QEMU does not know"],
            ),
            (
                "cores: 12\nhotplug: cpu\nargs: -smp 12,sockets=1,cores=6,threads=2",
                &[
                    "QEMU refuses to start: `hotplug: cpu` plugs in cpu2, which is already part of the -smp in args",
                ],
            ),
            (
                "cores: 12\nhotplug: cpu\nargs: -smp cores=6",
                &[
                    "QEMU refuses to start: `hotplug: cpu` plugs in cpu7, for which there is no \
                     room in the -smp in args",
                ],
            ),
            (
                "cores: 2\nvcpus: 3\nhotplug: cpu",
                &[
                    "QEMU refuses to start: `hotplug: cpu` plugs in cpu3, for which there is no \
                     room in the -smp in args",
                ],
            ),
            (
                "args: -cpu 'host",
                &["args has a quote that is not closed; all of it is ignored"],
            ),
            ("affinity: ,", &["affinity has no CPU, so taskset fails"]),
            ("affinity: 0-0", &[]),
            (
                "affinity: 0",
                &["`affinity: 0` has no effect, since Proxmox VE treats it as unset; use `0-0`"],
            ),
            (
                "hugepages: 2",
                &["Proxmox VE refuses to start: hugepages needs `numa: 1`"],
            ),
            (
                "numa: 1\nhugepages: 4\nmemory: 2048\nnuma1: cpus=0\n\
                 numa2: cpus=1,memory=1024,hostnodes=0\nnuma3: cpus=2,memory=1",
                &[
                    "Proxmox VE refuses to start: there are no huge pages of \"4\"",
                    "Proxmox VE refuses to start: numa1: it has no memory",
                    "Proxmox VE refuses to start: numa2: hostnodes needs a policy",
                    "Proxmox VE refuses to start: numa3: hugepages needs hostnodes",
                    "Proxmox VE refuses to start: numa: the nodes have 1025 MiB of the VM's 2048 MiB",
                ],
            ),
            (
                "hostpci0: 01:00,pcie=1\nhostpci1: pcie=0\nhostpci2: 01:00,mapping=gpu",
                &[
                    "Proxmox VE refuses to start: hostpci0: pcie=1 needs `machine: q35`",
                    "Proxmox VE refuses to start: hostpci1: neither `host` nor `mapping` is set",
                    "Proxmox VE refuses to start: hostpci2: both `host` and `mapping` are set",
                ],
            ),
        ] {
            let found = VmConf::parse(text).contradictions();
            let found: Vec<_> = found.iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn devices_of_the_host() {
        let conf = VmConf::parse(
            "hostpci10: 05:00\nhostpci2: 03:00,mdev=nvidia-63\nhostpci16: 09:00\nhostpci01: 08:00\n\
             hostpci3: 04:00,driver=keep\nhostpci3: x\ntpmstate0: local:x1\nvirtiofs3: share\ntpmstate1: local:x1\n",
        );
        let entries: Vec<_> = conf
            .hostpci
            .iter()
            .map(|entry| (entry.index, entry.mdev.is_some(), entry.keep_driver))
            .collect();
        assert_eq!(
            entries,
            [(2, true, false), (3, false, true), (10, false, false)]
        );
        assert!(conf.tpm && conf.virtiofs);
        assert_eq!(conf.passed_over.len(), 4);
    }

    /// What Proxmox VE 9.2 was seen to make of a file.
    #[derive(serde::Deserialize)]
    struct Verdict {
        file: String,
        vcpus: Option<u32>,
        threads: Option<usize>,
        affinity: Option<String>,
        hookscript: Option<String>,
        template: Option<u8>,
        hugepages: Option<String>,
        pci: Option<Vec<String>>,
        warns: bool,
        qemu: Option<String>,
    }

    /// The functions of the host that the files were read on, but for its graphics card.
    const FUNCTIONS: [&str; 7] = [
        "0000:01:00.4",
        "0000:01:00.5",
        "0000:01:00.6",
        "0000:07:10.0",
        "0000:07:10.1",
        "0000:07:10.4",
        "1234:f0:13.1",
    ];

    fn differences(verdict: &Verdict, text: &str) -> Vec<String> {
        let conf = VmConf::parse(text);
        let mut found = Vec::new();
        let mut compare = |what: &str, is: String, expected: String| {
            if is != expected {
                found.push(format!("{what} is {is}, not {expected}"));
            }
        };
        let refused = conf.contradictions().iter().any(Contradiction::stops_start);
        compare(
            "QEMU's refusal",
            refused.to_string(),
            (verdict.qemu.as_deref() == Some("refuses")).to_string(),
        );
        if let Some(vcpus) = verdict.vcpus {
            compare("vcpus", conf.vcpus().to_string(), vcpus.to_string());
        }
        if let Some(threads) = verdict.threads {
            compare(
                "threads",
                conf.threads_per_core().to_string(),
                threads.to_string(),
            );
        }
        let affinity = verdict.affinity.as_deref().map(|list| {
            let ranges = schema::parse_cpus(list).unwrap();
            numbers(&ranges)
        });
        compare(
            "affinity",
            format!("{:?}", conf.affinity),
            format!("{affinity:?}"),
        );
        compare(
            "hookscript",
            format!("{:?}", conf.hookscript),
            format!("{:?}", verdict.hookscript),
        );
        compare(
            "template",
            conf.template.to_string(),
            (verdict.template == Some(1)).to_string(),
        );
        compare(
            "hugepages",
            format!("{:?}", conf.hugepages),
            format!("{:?}", verdict.hugepages),
        );
        let functions: Vec<PciAddress> = FUNCTIONS.iter().map(|at| at.parse().unwrap()).collect();
        let whole = conf.hostpci.iter().filter(|entry| entry.mdev.is_none());
        let mut given: Vec<String> = whole
            .flat_map(|entry| match &entry.devices {
                HostDevices::Addresses(selectors) => selectors.clone(),
                other => panic!("{other:?}"),
            })
            .flat_map(|selector| {
                functions
                    .iter()
                    .filter(move |address| selector.matches(address))
            })
            .map(ToString::to_string)
            .collect();
        given.sort();
        let pci = verdict.pci.clone().unwrap_or_default();
        compare("pci", format!("{given:?}"), format!("{pci:?}"));
        compare(
            "a warning",
            (!conf.passed_over.is_empty()).to_string(),
            verdict.warns.to_string(),
        );
        found
    }

    #[test]
    fn agrees_with_what_proxmox_makes_of_each_file() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pve-conf");
        let verdicts = std::fs::read_to_string(folder.join("verdicts.json")).unwrap();
        let verdicts: Vec<Verdict> = serde_json::from_str(&verdicts).unwrap();
        assert_eq!(verdicts.len(), 72);
        let mut disagree = Vec::new();
        for verdict in &verdicts {
            let bytes = std::fs::read(folder.join(&verdict.file)).unwrap();
            let differences = differences(verdict, &String::from_utf8_lossy(&bytes));
            if !differences.is_empty() {
                disagree.push(format!("{}: {}", verdict.file, differences.join("; ")));
            }
        }
        assert!(disagree.is_empty(), "{}", disagree.join("\n"));
    }

    fn any_hostpci() -> impl Strategy<Value = Vec<HostPci>> {
        let devices = prop_oneof![
            prop::collection::vec(any_selector(), 1..4).prop_map(HostDevices::Addresses),
            "[a-zA-Z][a-zA-Z0-9_-]{1,9}".prop_map(HostDevices::Mapping),
        ];
        let entry = (
            devices,
            prop::option::of("[a-z0-9-]{1,9}"),
            any::<bool>(),
            any::<bool>(),
        );
        prop::collection::btree_map(0..schema::MAX_HOSTPCI, entry, 0..5).prop_map(|entries| {
            entries
                .into_iter()
                .map(|(index, (devices, mdev, keep_driver, pcie))| HostPci {
                    index,
                    devices,
                    mdev,
                    keep_driver,
                    pcie,
                })
                .collect()
        })
    }

    fn render(conf: &VmConf) -> String {
        let mut lines = Vec::new();
        for (key, count) in [
            ("sockets", conf.sockets),
            ("cores", conf.cores),
            ("vcpus", conf.vcpus),
        ] {
            lines.extend(count.map(|count| format!("{key}: {count}\n")));
        }
        for (key, text) in [
            ("name", &conf.name),
            ("hookscript", &conf.hookscript),
            ("args", &conf.args),
        ] {
            lines.extend(text.as_ref().map(|text| format!("{key}: {text}\n")));
        }
        for entry in &conf.hostpci {
            let mut value = match &entry.devices {
                HostDevices::Addresses(selectors) => joined(selectors),
                HostDevices::Mapping(id) => format!("mapping={id}"),
                HostDevices::Refused(_) => "rombar=1".into(),
            };
            value.extend(entry.mdev.iter().map(|mdev| format!(",mdev={mdev}")));
            if entry.keep_driver {
                value += ",driver=keep";
            }
            value += if entry.pcie { ",pcie=1" } else { ",pcie=0" };
            lines.push(format!("hostpci{}: {value}\n", entry.index));
        }
        lines.push(format!("template: {}\n", u8::from(conf.template)));
        lines.reverse();
        lines.concat()
    }

    proptest! {
        #[test]
        fn conf_round_trip(
            name in prop::option::of("[a-z]([a-z0-9-]{0,20}[a-z])?"),
            hookscript in prop::option::of("local:snippets/[a-z:#\\[\\]]{1,9}"),
            args in prop::option::of("-smp [0-9]{1,3},threads=[0-9]"),
            counts in prop::array::uniform3(prop::option::of(1u32..)),
            hostpci in any_hostpci(),
            template: bool,
            rest in "(\\[PENDING\\]\n|\\[before\\]\n)((cores|name|hostpci0): \\PC*\n){0,3}",
        ) {
            let [sockets, cores, vcpus] = counts;
            let conf = VmConf { name, sockets, cores, vcpus, args, hostpci, template, hookscript, ..VmConf::default() };
            let mut parsed = VmConf::parse(&(render(&conf) + &rest));
            prop_assert!(parsed.passed_over.iter().all(|line| line.section.is_some()));
            parsed.passed_over.clear();
            prop_assert_eq!(parsed, conf);
        }

        #[test]
        fn no_text_panics(text in "(hostpci[0-9]*|cores|gpu|\tmap|\\PC)[:= ]\\PC*\n?\\PC*") {
            let conf = VmConf::parse(&text);
            let _ = conf.contradictions();
            prop_assert!(conf.vcpus() >= 1 && conf.max_vcpus() >= 1 && conf.threads_per_core() >= 1);
        }
    }

    fn id(number: u32) -> VmId {
        number.try_into().unwrap()
    }

    #[test]
    fn settings_of_a_vm() {
        let (dir, root) = host();
        assert_eq!(super::conf(&root, id(100)).unwrap().vcpus(), 2);
        let other = super::conf(&root, id(102)).unwrap();
        assert_eq!((other.vcpus(), other.passed_over.len()), (1, 1));
        assert!(super::conf(&root, id(101)).is_err());
        write(dir.path(), "etc/pve/qemu-server/99.conf.tmp", "");
        assert_eq!(all(&root).unwrap(), [id(100), id(102)]);
        assert!(all(&Sysroot::new("/nonexistent")).unwrap().is_empty());
        let unreadable = tempfile::tempdir().unwrap();
        write(unreadable.path(), "etc/pve/x", "");
        let confs = unreadable.path().join(CONFS);
        std::os::unix::fs::symlink(&confs, &confs).unwrap();
        assert!(all(&Sysroot::new(unreadable.path())).is_err());
    }
}

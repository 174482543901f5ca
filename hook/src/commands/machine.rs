//! The machine drawn for people: packages, NUMA nodes, LLC domains with their caches, cores and
//! devices; on it whose CPUs they are by the settings, and what `hook init` chose.

use std::collections::{BTreeMap, BTreeSet};

use anstyle::{AnsiColor, Style};
use pinfold_core::sys::cpu;
use pinfold_core::sys::pci::{self, PciAddress};
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Host, Result};

use super::drawing::{self, Block, Mark};
use super::places::{self, Place};
use crate::choice::{Choice, Claim, Owner};

/// A choice for a VM, and what else of it is drawn.
pub(super) struct Chosen<'a> {
    pub vmid: VmId,
    pub choice: &'a Choice,
    /// The host's devices that it gets.
    pub devices: &'a [PciAddress],
    /// The NUMA nodes that its memory is bound to.
    pub memory: CpuSet,
}

/// What is drawn of a host.
pub(super) struct Machine<'a> {
    topology: &'a Topology,
    devices: Vec<Device>,
}

/// A PCI device.
struct Device {
    address: PciAddress,
    kind: &'static str,
    node: Option<usize>,
}

/// What a device is called, by its class and subclass; none if it is not drawn.
fn kind(class: u32) -> Option<&'static str> {
    const KINDS: [(u32, u32, &str); 7] = [
        (0x03_0000, 0xff_0000, "GPU"),
        (0x12_0000, 0xff_0000, "accelerator"),
        (0x01_0800, 0xff_ff00, "NVMe"),
        (0x01_0000, 0xff_0000, "storage"),
        (0x02_0000, 0xff_0000, "network"),
        (0x0d_0000, 0xff_0000, "wireless"),
        (0x0c_0300, 0xff_ff00, "USB"),
    ];
    let is = |&&(wanted, mask, _): &&(u32, u32, &str)| class & mask == wanted;
    KINDS.iter().find(is).map(|(_, _, kind)| *kind)
}

/// The kinds in the order in which they are listed.
const ORDER: [&str; 7] = [
    "GPU",
    "accelerator",
    "NVMe",
    "storage",
    "network",
    "wireless",
    "USB",
];

impl<'a> Machine<'a> {
    /// Reads the devices that a VM could be given; bridges and the like are left out, and so are
    /// virtual functions.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub(super) fn read(root: &Host, topology: &'a Topology) -> Result<Self> {
        let addresses = match pci::addresses(root) {
            Err(error) if error.is_gone() => Vec::new(),
            addresses => addresses?,
        };
        let mut devices = Vec::new();
        for address in addresses {
            // One that has vanished, or that the kernel describes in part, is left out.
            let class = pci::function(root, address).map(|function| function.class);
            let Some(kind) = class.ok().and_then(kind) else {
                continue;
            };
            if !pci::is_virtual(root, &address) {
                let node = pci::numa_node(root, &address)?;
                devices.push(Device {
                    address,
                    kind,
                    node,
                });
            }
        }
        Ok(Self { topology, devices })
    }

    /// Draws it, with a legend of the marks in use.
    pub(super) fn draw(
        &self,
        claims: &[Claim],
        chosen: Option<&Chosen<'_>>,
        columns: usize,
    ) -> String {
        let uses = self.uses(claims, chosen);
        let marks: BTreeMap<usize, Mark> = uses
            .iter()
            .map(|(cpu, used)| (*cpu, used.mark(claims)))
            .collect();
        let has_several = self.topology.domains(Kind::Node).len() > 1;
        let inset = if has_several { 4 } else { 2 };
        let blocks = self.blocks(chosen, inset, columns);
        let mut known: BTreeSet<(u8, String)> = BTreeSet::new();
        let mut legend = Vec::new();
        for used in uses.values() {
            let meaning = used.meaning(chosen);
            if known.insert((used.order(), meaning.clone())) {
                legend.push((used.order(), used.example().mark(claims), meaning));
            }
        }
        legend.sort_by_key(|(order, ..)| *order);
        let mut legend: Vec<(Mark, String)> = legend
            .into_iter()
            .map(|(_, mark, meaning)| (mark, meaning))
            .collect();
        if let Some(chosen) = chosen
            && self.devices.iter().any(|device| chosen.gets(device))
        {
            let mark = Mark {
                text: "*".into(),
                style: own(),
            };
            legend.push((mark, format!("device of VM {}", chosen.vmid)));
        }
        drawing::draw(&blocks, &marks, inset, columns) + &drawing::legend(&legend, columns)
    }

    fn blocks(&self, chosen: Option<&Chosen<'_>>, inset: usize, columns: usize) -> Vec<Block> {
        let nodes = self.topology.domains(Kind::Node);
        let has_several = nodes.len() > 1;
        let places = places::by_package(self.topology);
        let mut blocks: Vec<Block> = Vec::new();
        let (mut package, mut node) = ("", "");
        for (at, (place, cores)) in places.iter().enumerate() {
            let mut block = Block {
                label: self.label(place),
                cores: cores.iter().map(|core| (*core).clone()).collect(),
                ..Block::default()
            };
            if place.package != package {
                (package, node) = (&place.package, "");
                block.head = format!("{package}\n");
            }
            let number = || {
                let number = place.node.rsplit(':').next();
                number.and_then(|number| number.parse::<usize>().ok())
            };
            if has_several && place.node != node {
                node = &place.node;
                let memory = number().and_then(|number| chosen?.memory_on(number));
                block.head += &format!("  {node}{}\n", memory.unwrap_or_default());
            }
            let is_last = |next: &(Place, _)| next.0.node != place.node;
            if has_several && places.get(at + 1).is_none_or(is_last) {
                let here = |device: &&Device| device.node.is_some() && device.node == number();
                block.foot = self.devices("devices", inset, here, chosen, columns);
            }
            blocks.push(block);
        }
        let is_elsewhere = |device: &&Device| {
            let is_at = |number: usize| nodes.iter().any(|node| node.number == number);
            !has_several || !device.node.is_some_and(is_at)
        };
        if let Some(last) = blocks.last_mut() {
            let (head, inset) = match has_several {
                true => ("devices of no known node", 2),
                false => ("devices", inset),
            };
            last.foot += &self.devices(head, inset, is_elsewhere, chosen, columns);
        }
        blocks.extend(drawing::offline(self.topology));
        blocks
    }

    /// `llc:0  L3 96M, V-Cache`.
    fn label(&self, place: &Place) -> String {
        let vcache = self.topology.vcache();
        let llcs = self.topology.domains(Kind::Llc).iter();
        let llc = llcs
            .clone()
            .find(|llc| places::selector(Kind::Llc, llc) == place.llc);
        let mut words = vec![place.llc.clone()];
        if let Some(llc) = llc {
            let mut what = llc.extent.to_string();
            if !llc.extent.is_cache() {
                what += " (no shared cache known)";
            }
            if vcache.contains(&llc) {
                what += ", V-Cache";
            }
            words.push(what);
        }
        let label = words.join("  ");
        match place.kind {
            "" => label,
            kind => format!("{label}, {kind}"),
        }
    }

    /// Lines with devices by kind; nothing if there are none.
    fn devices(
        &self,
        head: &str,
        inset: usize,
        is_here: impl Fn(&&Device) -> bool,
        chosen: Option<&Chosen<'_>>,
        columns: usize,
    ) -> String {
        let mut items: Vec<(String, usize)> = Vec::new();
        let mut add = |text: String, width: usize| {
            items.push((text, width));
        };
        for kind in ORDER {
            let of_kind = |device: &&Device| device.kind == kind && is_here(device);
            let mut of_kind = self.devices.iter().filter(of_kind).peekable();
            let mut name = format!("{kind} ");
            while let Some(device) = of_kind.next() {
                let address = short(&device.address);
                let (text, width) = match chosen {
                    Some(chosen) if chosen.gets(device) => {
                        let style = own();
                        (format!("{style}{address}*{style:#}"), address.len() + 1)
                    }
                    _ => (address.clone(), address.len()),
                };
                let end = if of_kind.peek().is_some() { "," } else { " " };
                add(format!("{name}{text}{end}"), name.len() + width + 1);
                name.clear();
            }
        }
        match items.is_empty() {
            true => String::new(),
            false => {
                let head = format!("{:inset$}{head}  ", "");
                let text = drawing::wrapped(&head, &items, " ", columns);
                let lines = text.lines().map(|line| format!("{}\n", line.trim_end()));
                lines.collect()
            }
        }
    }

    /// What each CPU is used for.
    fn uses(&self, claims: &[Claim], chosen: Option<&Chosen<'_>>) -> BTreeMap<usize, Use> {
        let cores = &self.topology.cores;
        let host = cores.iter().find(|core| core.contains(cpu::BOOT_CPU));
        let mut vcpus = BTreeMap::new();
        for (vcpu, pin) in chosen.iter().flat_map(|it| (0..).zip(&it.choice.pins)) {
            vcpus.extend(pin.iter().map(|cpu| (cpu, vcpu)));
        }
        let used = |cpu: usize| {
            let theirs: Vec<&Claim> = claims
                .iter()
                .filter(|claim| claim.cpus.contains(cpu))
                .collect();
            let exclusive = theirs.iter().find(|claim| claim.exclusive);
            if !self.topology.online.contains(cpu) {
                Use::Offline
            } else if let Some(chosen) = chosen.filter(|it| it.choice.isolated.contains(cpu)) {
                Use::Chosen {
                    vcpu: vcpus.get(&cpu).copied(),
                    is_idle: chosen.choice.facts.idle_cores.contains(cpu),
                    is_shared: !theirs.is_empty(),
                }
            } else if let Some(claim) = exclusive.or(theirs.first()) {
                Use::Claimed {
                    owner: claim.owner,
                    exclusive: claim.exclusive,
                    others: theirs.len() > 1,
                }
            } else if host.is_some_and(|core| core.contains(cpu)) {
                Use::Host
            } else {
                Use::Free
            }
        };
        let present = self.topology.present.iter();
        present.map(|cpu| (cpu, used(cpu))).collect()
    }
}

impl Chosen<'_> {
    fn gets(&self, device: &Device) -> bool {
        self.devices.contains(&device.address)
    }

    /// What of the VM's memory is on a node.
    fn memory_on(&self, node: usize) -> Option<String> {
        let style = own();
        let vmid = self.vmid;
        let is_there = self.memory.contains(node);
        is_there.then(|| format!("  {style}memory of VM {vmid}{style:#}"))
    }
}

/// An address as lspci has it: with the domain only if that is not 0.
fn short(address: &PciAddress) -> String {
    let text = address.to_string();
    match address.domain {
        0 => text.trim_start_matches("0000:").to_owned(),
        _ => text,
    }
}

/// The style of what a VM gets.
fn own() -> Style {
    Style::new().fg_color(Some(AnsiColor::Green.into())).bold()
}

/// What a CPU is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// It is chosen.
    Chosen {
        vcpu: Option<usize>,
        /// Whether its core has no vCPU.
        is_idle: bool,
        /// Whether others use it too.
        is_shared: bool,
    },
    /// A VM or a container has it by its settings.
    Claimed {
        owner: Owner,
        exclusive: bool,
        /// Whether there are more of them.
        others: bool,
    },
    /// It is of the core of CPU 0.
    Host,
    Free,
    Offline,
}

impl Use {
    /// One that stands for all with the same meaning.
    fn example(self) -> Self {
        match self {
            Self::Chosen {
                vcpu,
                is_idle,
                is_shared,
            } => Self::Chosen {
                vcpu: vcpu.map(|_| 0),
                is_idle,
                is_shared,
            },
            other => other,
        }
    }

    /// Its place in the legend.
    fn order(self) -> u8 {
        match self {
            Self::Chosen { vcpu: Some(_), .. } => 0,
            Self::Chosen { vcpu: None, .. } => 1,
            Self::Claimed { .. } => 2,
            Self::Host => 3,
            Self::Free => 4,
            Self::Offline => 5,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Chosen {
                vcpu,
                is_idle,
                is_shared,
            } => {
                let text = match (vcpu, is_idle) {
                    (Some(vcpu), _) => format!("v{vcpu}"),
                    (None, true) => "idle".into(),
                    (None, false) => "-".into(),
                };
                text + if is_shared { "!" } else { "" }
            }
            Self::Claimed {
                owner,
                exclusive,
                others,
            } => {
                let may = if exclusive { "" } else { "~" };
                let more = if others { "+" } else { "" };
                match owner {
                    Owner::Vm(vmid) => format!("{may}{vmid}{more}"),
                    Owner::Container(vmid) => format!("{may}ct{vmid}{more}"),
                }
            }
            Self::Host => "host".into(),
            Self::Free => ".".into(),
            Self::Offline => "off".into(),
        }
    }

    fn meaning(self, chosen: Option<&Chosen<'_>>) -> String {
        let vm = chosen.map(|chosen| format!(" of VM {}", chosen.vmid));
        let vm = vm.unwrap_or_default();
        match self {
            Self::Chosen {
                vcpu,
                is_idle,
                is_shared,
            } => {
                let what = match (vcpu, is_idle) {
                    (Some(_), _) => format!("vCPU{vm}"),
                    (None, false) => "kept empty beside a vCPU".into(),
                    (None, true) => "isolated but unused".into(),
                };
                match is_shared {
                    true => what + ", used by others too",
                    false => what,
                }
            }
            Self::Claimed {
                owner,
                exclusive,
                others,
            } => {
                let verb = if exclusive { "" } else { "may be used by " };
                let more = if others { " and others" } else { "" };
                format!("{verb}{owner}{more}")
            }
            Self::Host => "core of CPU 0".into(),
            Self::Free => "free".into(),
            Self::Offline => "offline".into(),
        }
    }

    /// The owners of `claims` have a colour each, by turns.
    fn mark(self, claims: &[Claim]) -> Mark {
        const COLOURS: [AnsiColor; 3] = [AnsiColor::Cyan, AnsiColor::Magenta, AnsiColor::Blue];
        let colour = |colour: AnsiColor| Style::new().fg_color(Some(colour.into()));
        let style = match self {
            Self::Chosen {
                is_shared: true, ..
            } => colour(AnsiColor::Red).bold(),
            Self::Chosen { vcpu: Some(_), .. } => own(),
            Self::Chosen { .. } => colour(AnsiColor::Green),
            Self::Claimed { owner, .. } => {
                let owners: BTreeSet<Owner> = claims.iter().map(|claim| claim.owner).collect();
                let place = owners.iter().position(|known| *known == owner);
                colour(COLOURS[place.unwrap_or(0) % COLOURS.len()])
            }
            Self::Host | Self::Free | Self::Offline => Style::new().dimmed(),
        };
        Mark {
            text: self.text(),
            style,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::{Areas, Claimed, Guest, Question, choose};
    use pinfold_core::testutils::{machine, write};

    /// With devices of all kinds on all nodes, a VM's number of nine digits and claims of all kinds.
    #[test]
    fn no_line_is_wider_than_a_terminal() {
        let vm = |id: u32| VmId::try_from(id).unwrap();
        for (name, text) in machine::all() {
            let dir = tempfile::tempdir().unwrap();
            machine::expand(&text, dir.path());
            for bus in 0..0x50 {
                let class = ["0x030000", "0x010802", "0x020000", "0x0c0330"][bus % 4];
                for (file, value) in [
                    ("class", class),
                    ("vendor", "0x1002"),
                    ("device", "0x744c"),
                    ("numa_node", ["-1", "0", "1"][bus % 3]),
                ] {
                    let path = format!("sys/bus/pci/devices/0000:{bus:02x}:00.0/{file}");
                    write(dir.path(), &path, value);
                }
            }
            let root = Host::new(dir.path());
            let topology = Topology::read(&root).unwrap();
            let drawn = Machine::read(&root, &topology).unwrap();
            assert_eq!(drawn.devices.len(), 0x50, "{name}");
            let claims: Vec<Claim> = (0..)
                .zip(topology.cores.iter().skip(1).step_by(2))
                .map(|(at, core)| Claim {
                    owner: match at % 3 {
                        0 => Owner::Container(vm(999_999_990 + at % 7)),
                        _ => Owner::Vm(vm(999_999_980 + at % 7)),
                    },
                    cpus: core.clone(),
                    exclusive: at % 2 == 0,
                })
                .collect();
            let guest = Guest {
                vcpus: 3,
                threads: 1,
                ..Guest::default()
            };
            let question = Question {
                topology: &topology,
                areas: &Areas::new(&topology),
                guest: &guest,
                claimed: &Claimed::by(&claims),
                within: None,
            };
            let choice = choose(&question, &claims).unwrap();
            let devices: Vec<PciAddress> = drawn.devices.iter().map(|it| it.address).collect();
            let chosen = Chosen {
                vmid: vm(999_999_999),
                choice: &choice,
                devices: &devices,
                memory: [0, 1].into_iter().collect(),
            };
            for (claims, chosen) in [(&[][..], None), (&claims, None), (&claims, Some(&chosen))] {
                for columns in [80, 100] {
                    let text = drawn.draw(claims, chosen, columns);
                    let text = anstream::adapter::strip_str(&text).to_string();
                    for line in text.lines() {
                        assert!(line.len() <= columns, "{name}: {columns}: {line}");
                        assert_eq!(line, line.trim_end(), "{name}");
                    }
                    assert!(text.contains("host core of CPU 0"), "{text}");
                }
            }
        }
    }

    #[test]
    fn devices_that_a_vm_could_get_have_a_name() {
        for (class, name) in [
            (0x03_0000, Some("GPU")),
            (0x03_0200, Some("GPU")),
            (0x12_0000, Some("accelerator")),
            (0x01_0802, Some("NVMe")),
            (0x01_0601, Some("storage")),
            (0x02_0000, Some("network")),
            (0x02_8000, Some("network")),
            (0x0c_0330, Some("USB")),
            (0x0c_0500, None),
            (0x06_0400, None),
            (0x04_0300, None),
        ] {
            assert_eq!(kind(class), name, "{class:06x}");
        }
    }
}

//! The host drawn for people: each hardware thread with its owner, by package, LLC domain and core.

use std::collections::{BTreeMap, BTreeSet};

use anstyle::{AnsiColor, Style};
use pinfold_core::CpuSet;
use pinfold_core::sys::topology::Topology;
use serde::Serialize;

use super::drawing::{self, Block, Mark};
use super::places;
use crate::state::reservation::{JITTER, owner};

/// How far in domains are.
const INSET: usize = 2;

/// What a CPU is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Owner {
    /// For the host and all VMs.
    Housekeeping,
    /// For one VM.
    Isolated,
    /// For a VM that is starting: nothing is kept off yet.
    Reserved,
    /// Not used: it is offline.
    Offline,
}

/// A CPU and its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Cpu {
    /// By logical number.
    pub cpu: usize,
    /// What it is used for.
    pub owner: Owner,
    /// The VM it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<u32>,
    /// The VM's vCPUs that run there, by number.
    #[serde(skip_serializing_if = "CpuSet::is_empty")]
    pub vcpus: CpuSet,
    /// Whether something may run there that could be elsewhere.
    pub stray: bool,
}

impl Cpu {
    /// Its mark: `.`, `100:v3`, `(100)`, `off`; with `!` if something strays.
    fn text(&self) -> String {
        let vm = match self.vm {
            Some(JITTER) => "jitter".to_owned(),
            vm => vm.map(|vm| vm.to_string()).unwrap_or_default(),
        };
        let mark = match self.owner {
            Owner::Housekeeping => ".".into(),
            Owner::Offline => "off".into(),
            Owner::Reserved => format!("({vm})"),
            Owner::Isolated => match (self.vcpus.first(), self.vcpus.to_string()) {
                (None, _) => vm,
                (Some(first), list) if list.contains(',') => {
                    format!("{vm}:v{first}+{}", self.vcpus.len() - 1)
                }
                (_, list) => format!("{vm}:v{list}"),
            },
        };
        if self.stray { mark + "!" } else { mark }
    }

    /// What the mark means.
    fn meaning(&self) -> String {
        let owner = owner(self.vm.unwrap_or_default());
        match self.owner {
            Owner::Housekeeping => "housekeeping".into(),
            Owner::Offline => "offline".into(),
            Owner::Reserved => format!("reserved for {owner}"),
            Owner::Isolated if self.vcpus.is_empty() => format!("{owner}, no vCPU"),
            Owner::Isolated => format!("vCPU of {owner}"),
        }
    }

    fn mark(&self, vms: &[u32]) -> Mark {
        Mark {
            text: self.text(),
            style: self.style(vms),
        }
    }

    /// VMs have a colour each, by turns.
    fn style(&self, vms: &[u32]) -> Style {
        const COLOURS: [AnsiColor; 4] = [
            AnsiColor::Green,
            AnsiColor::Cyan,
            AnsiColor::Magenta,
            AnsiColor::Blue,
        ];
        let colour = |colour: AnsiColor| Style::new().fg_color(Some(colour.into()));
        let place = vms.iter().position(|vm| Some(*vm) == self.vm).unwrap_or(0);
        match self.owner {
            _ if self.stray => colour(AnsiColor::Red).bold(),
            Owner::Housekeeping | Owner::Offline => Style::new().dimmed(),
            Owner::Reserved => colour(AnsiColor::Yellow),
            Owner::Isolated => colour(COLOURS[place % COLOURS.len()]).bold(),
        }
    }
}

/// Draws the host, with a legend of the marks in use. `cpus` are all of the host's, by number.
pub(crate) fn draw(topology: &Topology, cpus: &BTreeMap<usize, Cpu>, columns: usize) -> String {
    let vms: BTreeSet<u32> = cpus.values().filter_map(|cpu| cpu.vm).collect();
    let vms: Vec<u32> = vms.into_iter().collect();
    let places = places::by_package(topology);
    let nodes: BTreeSet<&str> = places
        .iter()
        .map(|(place, _)| place.node.as_str())
        .collect();
    let mut blocks = Vec::new();
    let mut package = "";
    for (place, cores) in &places {
        let node = if nodes.len() > 1 {
            place.node.as_str()
        } else {
            ""
        };
        let label = [place.llc.as_str(), place.kind, node].join(" ");
        let mut block = Block {
            label: label.split_whitespace().collect::<Vec<_>>().join(" "),
            cores: cores.iter().map(|core| (*core).clone()).collect(),
            ..Block::default()
        };
        if place.package != package {
            package = &place.package;
            block.head = format!("{package}\n");
        }
        blocks.push(block);
    }
    blocks.extend(drawing::offline(topology));
    let marks: BTreeMap<usize, Mark> = cpus.values().map(|cpu| (cpu.cpu, cpu.mark(&vms))).collect();
    drawing::draw(&blocks, &marks, INSET, columns) + &legend(cpus, &vms, columns)
}

/// What the marks in use mean: one example of each kind.
fn legend(cpus: &BTreeMap<usize, Cpu>, vms: &[u32], columns: usize) -> String {
    let mut kinds: BTreeMap<_, Cpu> = BTreeMap::new();
    for cpu in cpus.values() {
        let example = Cpu {
            stray: false,
            ..cpu.clone()
        };
        kinds
            .entry((
                example.owner,
                cpu.vm.filter(|_| cpu.owner != Owner::Offline),
                cpu.vcpus.is_empty(),
            ))
            .or_insert(example);
    }
    let examples = kinds.values();
    let mut marks: Vec<(Mark, String)> =
        examples.map(|cpu| (cpu.mark(vms), cpu.meaning())).collect();
    if let Some(stray) = cpus.values().find(|cpu| cpu.stray) {
        let mark = Mark {
            text: "!".into(),
            style: stray.style(vms),
        };
        marks.push((mark, "a stray can run there".into()));
    }
    drawing::legend(&marks, columns)
}

//! The host drawn for people: each hardware thread with its owner, by package, LLC domain and core.

use std::collections::BTreeMap;

use anstyle::{AnsiColor, Style};
use pinfold_core::CpuSet;
use pinfold_core::cli::terminal;
use pinfold_core::sys::topology::Topology;
use serde::Serialize;

use super::layout::{self, CORES_PER_LINE};

/// The columns if stdout is not a terminal: those of Proxmox VE's task log.
const COLUMNS: usize = 100;
/// On hosts with more CPUs than this, a domain with CPUs that are all alike is one line.
const DRAWN_WHOLE: usize = 64;

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
    fn mark(&self) -> String {
        let vm = self.vm.map(|vm| vm.to_string()).unwrap_or_default();
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
        let vm = self.vm.unwrap_or_default();
        match self.owner {
            Owner::Housekeeping => "housekeeping".into(),
            Owner::Offline => "offline".into(),
            Owner::Reserved => format!("reserved for VM {vm}"),
            Owner::Isolated if self.vcpus.is_empty() => format!("VM {vm}, no vCPU"),
            Owner::Isolated => format!("vCPU of VM {vm}"),
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

/// How many columns a screen has.
pub(crate) fn columns() -> usize {
    terminal::size().map_or(COLUMNS, |(columns, _)| columns)
}

/// Draws the host, with a legend of the marks in use. `cpus` are all of the host's, by number.
pub(crate) fn draw(topology: &Topology, cpus: &BTreeMap<usize, Cpu>, columns: usize) -> String {
    let mut vms: Vec<u32> = cpus.values().filter_map(|cpu| cpu.vm).collect();
    vms.dedup();
    vms.sort_unstable();
    vms.dedup();
    let places = layout::by_place(topology);
    let mut nodes: Vec<&str> = places
        .iter()
        .map(|(place, _)| place.node.as_str())
        .collect();
    nodes.dedup();
    let mut domains = Vec::new();
    for (place, cores) in &places {
        let node = if nodes.len() > 1 {
            place.node.as_str()
        } else {
            ""
        };
        let label = [place.llc.as_str(), place.kind, node].join(" ");
        domains.push((
            place.package.as_str(),
            label.split_whitespace().collect::<Vec<_>>().join(" "),
            cores.clone(),
        ));
    }
    let offline: Vec<CpuSet> = topology
        .offline()
        .iter()
        .map(|cpu| [cpu].into_iter().collect())
        .collect();
    if !offline.is_empty() {
        domains.push(("", "offline".into(), offline.iter().collect()));
    }
    let indent = domains
        .iter()
        .map(|(_, label, _)| label.len())
        .max()
        .unwrap_or(0)
        + 4;
    let number = topology.present.last().unwrap_or(0).to_string().len();
    let mark = cpus.values().map(|cpu| cpu.mark().len()).max().unwrap_or(0);
    let cell = number + 1 + mark + 2;
    let per_line = (columns.saturating_sub(indent) / cell).clamp(1, CORES_PER_LINE);
    let mut text = String::new();
    let mut package = "";
    for (of, label, cores) in domains {
        if of != package {
            text += &format!("{of}\n");
            package = of;
        }
        for (line, cells) in lines(&cores, cpus, per_line).into_iter().enumerate() {
            let label = if line == 0 { label.as_str() } else { "" };
            let mut row = format!("  {label:<width$}", width = indent - 2);
            match cells {
                Cells::Alike(list, cpu) => row += &format!("{list} {}", painted(cpu, &vms, 0)),
                Cells::Each(cells) => {
                    for cell in cells {
                        row += &match cell {
                            Some(cpu) => {
                                format!("{:>number$} {}  ", cpu.cpu, painted(cpu, &vms, mark))
                            }
                            None => " ".repeat(number + 1 + mark + 2),
                        };
                    }
                }
            }
            text += row.trim_end();
            text.push('\n');
        }
    }
    text + &legend(cpus, &vms, columns)
}

/// A line of the picture.
enum Cells<'a> {
    /// CPUs that are all as this one.
    Alike(CpuSet, &'a Cpu),
    /// One thread of each core; a blank if a core has none (any more).
    Each(Vec<Option<&'a Cpu>>),
}

/// A domain's lines: cores side by side, the threads of one below each other.
fn lines<'a>(cores: &[&CpuSet], cpus: &'a BTreeMap<usize, Cpu>, per_line: usize) -> Vec<Cells<'a>> {
    let own: CpuSet = cores.iter().flat_map(|core| core.iter()).collect();
    let seen: Vec<&Cpu> = own.iter().filter_map(|cpu| cpus.get(&cpu)).collect();
    if cpus.len() > DRAWN_WHOLE
        && let Some(first) = seen.first()
        && seen.iter().all(|cpu| cpu.mark() == first.mark())
    {
        return vec![Cells::Alike(own, first)];
    }
    let mut lines = Vec::new();
    for cores in cores.chunks(per_line) {
        let threads = cores.iter().map(|core| core.len()).max().unwrap_or(0);
        for thread in 0..threads {
            let cells = cores.iter().map(|core| cpus.get(&core.iter().nth(thread)?));
            lines.push(Cells::Each(cells.collect()));
        }
    }
    lines
}

/// A mark in its colour, so wide.
fn painted(cpu: &Cpu, vms: &[u32], width: usize) -> String {
    let (style, mark) = (cpu.style(vms), cpu.mark());
    format!(
        "{style}{mark}{style:#}{}",
        " ".repeat(width.saturating_sub(mark.len()))
    )
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
    let mut items: Vec<(String, usize)> = kinds
        .values()
        .map(|cpu| {
            let meaning = cpu.meaning();
            (
                format!("{} {meaning}", painted(cpu, vms, 0)),
                cpu.mark().len() + 1 + meaning.len(),
            )
        })
        .collect();
    if let Some(stray) = cpus.values().find(|cpu| cpu.stray) {
        let (style, meaning) = (stray.style(vms), "a stray can run there");
        items.push((format!("{style}!{style:#} {meaning}"), 2 + meaning.len()));
    }
    wrapped("", &items, "   ", columns)
}

/// Items one behind the other, in lines of so many columns; further lines are as far in as the
/// first's `head` is. An item comes with the columns it takes.
pub(crate) fn wrapped(
    head: &str,
    items: &[(String, usize)],
    between: &str,
    columns: usize,
) -> String {
    let indent = " ".repeat(head.len());
    let (mut text, mut used) = (head.to_owned(), head.len());
    for (at, (item, width)) in items.iter().enumerate() {
        let last = at + 1 == items.len();
        let behind = if last { 0 } else { between.trim_end().len() };
        if used > head.len() && used + width + behind > columns {
            text.truncate(text.trim_end().len());
            text += &format!("\n{indent}");
            used = head.len();
        }
        text += item;
        used += width;
        if !last {
            text += between;
            used += between.len();
        }
    }
    text + "\n"
}

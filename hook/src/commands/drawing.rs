//! How a host is drawn: CPUs with a mark each, in blocks of cores that belong together.

use std::collections::BTreeMap;

use anstyle::Style;
use pinfold_core::CpuSet;
use pinfold_core::cli::terminal;
use pinfold_core::sys::topology::Topology;

use super::places::{self, CORES_PER_LINE};

/// The columns if stdout is not a terminal: those of Proxmox VE's task log.
pub(super) const COLUMNS: usize = 100;
/// On hosts with more CPUs than this, a block with CPUs that are all alike is one line.
const DRAWN_WHOLE: usize = 64;

/// What is drawn beside a CPU's number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    pub text: String,
    pub style: Style,
}

/// Cores that are drawn side by side.
#[derive(Debug, Default)]
pub(super) struct Block {
    /// Lines above it, complete.
    pub head: String,
    /// Beside its first line.
    pub label: String,
    pub cores: Vec<CpuSet>,
    /// Lines below it, complete.
    pub foot: String,
}

/// How many columns a screen has.
pub(super) fn columns() -> usize {
    terminal::size().map_or(COLUMNS, |(columns, _)| columns)
}

/// The CPUs that are offline, of which nothing else is known, to be drawn below the others.
pub(super) fn offline(topology: &Topology) -> Option<Block> {
    let offline = topology.offline();
    let cores = offline.iter().map(|cpu| [cpu].into_iter().collect());
    (!offline.is_empty()).then(|| Block {
        label: "offline".into(),
        cores: cores.collect(),
        ..Block::default()
    })
}

/// Draws blocks one below the other, each so far in. `marks` are those of all CPUs.
pub(super) fn draw(
    blocks: &[Block],
    marks: &BTreeMap<usize, Mark>,
    inset: usize,
    columns: usize,
) -> String {
    let labels = blocks.iter().map(|block| block.label.len());
    let indent = inset + labels.max().unwrap_or(0) + 2;
    let number = marks.keys().last().unwrap_or(&0).to_string().len();
    let widest = marks.values().map(|mark| mark.text.len()).max();
    let mark = widest.unwrap_or(0);
    let cell = number + 1 + mark + 2;
    let per_line = (columns.saturating_sub(indent) / cell).clamp(1, CORES_PER_LINE);
    let room = columns.saturating_sub(indent + 1 + mark);
    let mut text = String::new();
    for block in blocks {
        text += &block.head;
        for (line, cells) in lines(&block.cores, marks, per_line, room)
            .into_iter()
            .enumerate()
        {
            let label = if line == 0 { block.label.as_str() } else { "" };
            let mut row = format!("{:inset$}{label:<width$}", "", width = indent - inset);
            match cells {
                Cells::Alike(list, mark) => {
                    row += &list;
                    if let Some(mark) = mark {
                        row += &format!(" {}", painted(mark, 0));
                    }
                }
                Cells::Each(cells) => {
                    for thread in cells {
                        row += &match thread {
                            Some((cpu, of)) => format!("{cpu:>number$} {}  ", painted(of, mark)),
                            None => " ".repeat(cell),
                        };
                    }
                }
            }
            text += row.trim_end();
            text.push('\n');
        }
        text += &block.foot;
    }
    text
}

/// A line of a block.
enum Cells<'a> {
    /// A part of a list of CPUs that are all alike; the last one with their mark.
    Alike(String, Option<&'a Mark>),
    /// One thread of each core; a blank if a core has none (any more).
    Each(Vec<Option<(usize, &'a Mark)>>),
}

/// A block's lines: cores side by side, the threads of one below each other.
fn lines<'a>(
    cores: &[CpuSet],
    marks: &'a BTreeMap<usize, Mark>,
    per_line: usize,
    room: usize,
) -> Vec<Cells<'a>> {
    let own: CpuSet = cores.iter().flat_map(CpuSet::iter).collect();
    let mut seen = own.iter().filter_map(|cpu| marks.get(&cpu));
    if marks.len() > DRAWN_WHOLE
        && let Some(first) = seen.next()
        && seen.all(|mark| mark.text == first.text)
    {
        let parts = places::wrapped(&own.to_string(), room);
        let last = parts.len() - 1;
        let line = |(at, part)| Cells::Alike(part, (at == last).then_some(first));
        return parts.into_iter().enumerate().map(line).collect();
    }
    // So that lines are of the same length.
    let most = per_line.max(1);
    let per_line = cores.len().div_ceil(cores.len().div_ceil(most).max(1));
    let mut lines = Vec::new();
    for cores in cores.chunks(per_line.max(1)) {
        let threads = cores.iter().map(CpuSet::len).max().unwrap_or(0);
        for thread in 0..threads {
            let cells = cores.iter().map(|core| {
                let cpu = core.iter().nth(thread)?;
                Some((cpu, marks.get(&cpu)?))
            });
            lines.push(Cells::Each(cells.collect()));
        }
    }
    lines
}

/// A mark in its colour, so wide.
fn painted(mark: &Mark, width: usize) -> String {
    let Mark { text, style } = mark;
    let blanks = " ".repeat(width.saturating_sub(text.len()));
    format!("{style}{text}{style:#}{blanks}")
}

/// What marks mean: those in use, each with its meaning.
pub(super) fn legend(marks: &[(Mark, String)], columns: usize) -> String {
    let items: Vec<(String, usize)> = marks
        .iter()
        .map(|(mark, meaning)| {
            (
                format!("{} {meaning}", painted(mark, 0)),
                mark.text.len() + 1 + meaning.len(),
            )
        })
        .collect();
    wrapped("", &items, "   ", columns)
}

/// Items one behind the other, in lines of so many columns; further lines are as far in as the
/// first's `head` is. An item comes with the columns it takes.
pub(super) fn wrapped(
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

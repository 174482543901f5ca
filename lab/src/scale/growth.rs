//! Bounds: the cost of a command is a sum over its objects, with no product of two kinds of them.
//!
//! For each kind, and each command, six hosts are measured: the smallest with one, two and four
//! times as many objects of the kind, and the smallest with twice as many of all others, and of
//! all. A sum grows by as much from 2 to 4 as twice from 1 to 2, and by the same whatever the
//! others are. The VMs of these hosts are of one size, or their threads would be a product of VMs
//! and CPUs, or a VM would shrink as others come; only those in which CPUs are counted have VMs that
//! divide the CPUs, so that the CPUs of a VM are counted too. What a host's files are long for is allowed: /proc/interrupts has a column for each
//! CPU in the line of each IRQ.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::scale::command::{COMMANDS, Command, HostState, POST_START};
use crate::scale::tree::{self, Counts};

/// Not smaller, since a set of CPUs has a word for each 64, and each VM needs a core of its own.
const SMALLEST: Counts = Counts {
    cpus: 64,
    kthreads: 400,
    threads: 400,
    irqs: 400,
    vms: 4,
    vm_cores: Some(1),
    pci: 64,
    settled: true,
};

/// So much more than linear is allowed of the growth itself, for sorting and for what is rounded.
const TOLERANCE: f64 = 0.15;
/// And so much of the whole cost.
const NOISE: f64 = 0.01;
/// Instructions for each byte of the host's files that is there because of two kinds of objects.
const PER_BYTE: f64 = 2.0;

/// A kind of objects.
struct Axis {
    name: &'static str,
    of: fn(&mut Counts) -> &mut u32,
}

const AXES: [Axis; 6] = [
    Axis {
        name: "cpus",
        of: |counts| &mut counts.cpus,
    },
    Axis {
        name: "kthreads",
        of: |counts| &mut counts.kthreads,
    },
    Axis {
        name: "threads",
        of: |counts| &mut counts.threads,
    },
    Axis {
        name: "irqs",
        of: |counts| &mut counts.irqs,
    },
    Axis {
        name: "vms",
        of: |counts| &mut counts.vms,
    },
    Axis {
        name: "pci",
        of: |counts| &mut counts.pci,
    },
];

/// What a command cost on a host.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    calls: f64,
    instructions: f64,
}

/// All commands' costs on a host, and the length of its files.
struct Point {
    costs: Vec<Cost>,
    bytes: f64,
}

/// A command with a cost that grows faster than the host.
#[derive(Debug, Clone, PartialEq)]
struct Excess {
    what: &'static str,
    found: f64,
    allowed: f64,
}

/// Measures all hosts and prints what each object costs; an error that names what grows too fast.
pub fn check(bins: &Path, out: &mut impl Write) -> Result<()> {
    let dividing = Counts {
        vm_cores: None,
        ..SMALLEST
    };
    let ends = |smallest| -> Result<(Point, Point)> {
        let all = times(smallest, 2, |_| true);
        Ok((point(bins, smallest)?, point(bins, all)?))
    };
    let (of_size, of_share) = (ends(SMALLEST)?, ends(dividing)?);
    let mut faults = Vec::new();
    for (number, axis) in AXES.iter().enumerate() {
        let (smallest, (one, all)) = if axis.name == "cpus" {
            (dividing, &of_share)
        } else {
            (SMALLEST, &of_size)
        };
        let only = |n: usize| n == number;
        let twice = point(bins, times(smallest, 2, only))?;
        let four_times = point(bins, times(smallest, 4, only))?;
        let others = point(bins, times(smallest, 2, |n| n != number))?;
        for (n, command) in COMMANDS.iter().enumerate() {
            let cost = |point: &Point| (point.costs[n], point.bytes);
            let measured = Measured {
                one: cost(one),
                twice: cost(&twice),
                four_times: cost(&four_times),
                others: cost(&others),
                all: cost(all),
            };
            let mut start = smallest;
            let objects = f64::from(*(axis.of)(&mut start));
            let calls = (measured.twice.0.calls - measured.one.0.calls) / objects;
            let instructions =
                (measured.twice.0.instructions - measured.one.0.instructions) / objects;
            writeln!(
                out,
                "{:<22} each of {:<8} {calls:>8.1} calls {instructions:>12.0} instructions",
                command.name(),
                axis.name
            )?;
            out.flush()?;
            faults.extend(measured.excesses().into_iter().map(|excess| {
                format!(
                    "{}, {}: {} {:.0}, allowed {:.0}",
                    command.name(),
                    axis.name,
                    excess.what,
                    excess.found,
                    excess.allowed
                )
            }));
        }
    }
    ensure!(
        faults.is_empty(),
        "costs that grow faster than the host:\n{}",
        faults.join("\n")
    );
    Ok(())
}

fn times(mut counts: Counts, factor: u32, is_meant: impl Fn(usize) -> bool) -> Counts {
    for (n, axis) in AXES.iter().enumerate() {
        if is_meant(n) {
            *(axis.of)(&mut counts) *= factor;
        }
    }
    counts
}

fn point(bins: &Path, counts: Counts) -> Result<Point> {
    let folder = TempDir::new().context("no folder for a host")?;
    let scratch = TempDir::new().context("no folder for the measurements")?;
    let (fresh, fenced) = (folder.path().join("fresh"), folder.path().join("fenced"));
    let bytes = tree::write(&fresh, counts)?;
    tree::write(&fenced, counts)?;
    // Measured by the first of its two runs, on the host that those behind it find fenced.
    let calls = POST_START.run(bins, &fenced).calls(scratch.path())?;
    let cost = |command: &Command| -> Result<Cost> {
        let root = match command.host {
            HostState::Fenced => &fenced,
            HostState::Fresh | HostState::Changed => &fresh,
        };
        let run = command.run(bins, root);
        let calls = match command.host {
            HostState::Changed => calls,
            HostState::Fresh | HostState::Fenced => run.calls(scratch.path())?,
        };
        Ok(Cost {
            calls: float(calls),
            instructions: float(run.instructions(scratch.path())?),
        })
    };
    let costs = COMMANDS.iter().map(cost).collect::<Result<_>>()?;
    Ok(Point {
        costs,
        bytes: float(bytes),
    })
}

#[expect(clippy::cast_precision_loss, reason = "compared with a tolerance")]
fn float(count: u64) -> f64 {
    count as f64
}

/// A command's costs on the hosts that differ in one kind of objects, each with the length of the
/// host's files.
#[derive(Debug, Clone, Copy)]
struct Measured {
    one: (Cost, f64),
    twice: (Cost, f64),
    four_times: (Cost, f64),
    others: (Cost, f64),
    all: (Cost, f64),
}

impl Measured {
    fn excesses(&self) -> Vec<Excess> {
        let bytes = self.map(|(_, bytes)| *bytes);
        let calls = self.map(|(cost, _)| cost.calls);
        let instructions = self.map(|(cost, _)| cost.instructions);
        let texts = |more: f64| more.max(0.0) * PER_BYTE;
        [
            ("more calls than linear:", calls, 0.0, true),
            ("calls by each of two kinds:", calls, 0.0, false),
            (
                "more instructions than linear:",
                instructions,
                texts(bytes.above_linear()),
                true,
            ),
            (
                "instructions by each of two kinds:",
                instructions,
                texts(bytes.product()),
                false,
            ),
        ]
        .into_iter()
        .filter_map(|(what, costs, texts, is_alone)| {
            let (found, growth, whole) = if is_alone {
                let growth = 2.0 * (costs.twice - costs.one);
                (costs.above_linear(), growth, costs.four_times)
            } else {
                (costs.product(), costs.twice - costs.one, costs.all)
            };
            let allowed = growth.max(0.0) * TOLERANCE + whole * NOISE + texts;
            (found > allowed).then_some(Excess {
                what,
                found,
                allowed,
            })
        })
        .collect()
    }

    fn map(&self, value: impl Fn(&(Cost, f64)) -> f64) -> Five {
        Five {
            one: value(&self.one),
            twice: value(&self.twice),
            four_times: value(&self.four_times),
            others: value(&self.others),
            all: value(&self.all),
        }
    }
}

/// One figure on the five hosts.
#[derive(Debug, Clone, Copy)]
struct Five {
    one: f64,
    twice: f64,
    four_times: f64,
    others: f64,
    all: f64,
}

impl Five {
    fn above_linear(&self) -> f64 {
        (self.four_times - self.twice) - 2.0 * (self.twice - self.one)
    }

    fn product(&self) -> f64 {
        (self.all - self.others) - (self.twice - self.one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command with this cost on x objects of this kind and y of the others.
    fn measured(cost: fn(f64, f64) -> f64, bytes: fn(f64, f64) -> f64) -> Measured {
        let at = |x: f64, y: f64| {
            let calls = cost(x, y);
            let instructions = 1000.0 * calls;
            (
                Cost {
                    calls,
                    instructions,
                },
                bytes(x, y),
            )
        };
        Measured {
            one: at(100.0, 100.0),
            twice: at(200.0, 100.0),
            four_times: at(400.0, 100.0),
            others: at(100.0, 200.0),
            all: at(200.0, 200.0),
        }
    }

    fn found(measured: Measured) -> Vec<&'static str> {
        measured
            .excesses()
            .iter()
            .map(|excess| excess.what)
            .collect()
    }

    #[test]
    fn sums_are_allowed() {
        let none: [&str; 0] = [];
        assert_eq!(
            found(measured(|x, y| 50.0 + 3.0 * x + 2.0 * y, |_, _| 0.0)),
            none
        );
        assert_eq!(
            found(measured(|x, y| 50.0 + x * x.ln() + y, |_, _| 0.0)),
            none
        );
        assert_eq!(found(measured(|_, y| 50.0 + y, |_, _| 0.0)), none);
    }

    #[test]
    fn squares_and_products_are_found() {
        let square = measured(|x, y| 50.0 + x * x / 50.0 + y, |_, _| 0.0);
        assert_eq!(
            found(square),
            ["more calls than linear:", "more instructions than linear:"]
        );
        let product = measured(|x, y| 50.0 + x + y + x * y / 100.0, |_, _| 0.0);
        assert_eq!(
            found(product),
            [
                "calls by each of two kinds:",
                "instructions by each of two kinds:"
            ]
        );
    }

    #[test]
    fn long_files_may_be_read() {
        // A thousand instructions for each pair, in 600 bytes.
        let text = measured(
            |x, y| 50.0 + x + y + x * y / 100.0,
            |x, y| 600.0 * x * y / 100.0,
        );
        assert_eq!(found(text), ["calls by each of two kinds:"]);
    }
}

//! `hook layout`: this host's CPUs, the place of each, and the selectors that name them
//! (docs/selectors.md).

use std::collections::BTreeSet;

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{coloured, print, print_json};
use pinfold_core::sys::topology::{Domain, Kind, Topology};
use pinfold_core::{CpuSet, Exit, Host, Table, printable};
use serde::Serialize;
use serde_json::json;

use super::drawing;
use super::machine::Machine;
use super::places::{CORES_PER_LINE, Place, by_place, core_selector, place, selector, wrapped};
use crate::claims;
use crate::own_steps::TOOL;

/// How wide the output may be.
const WIDTH: usize = 100;

/// CPUs that a selector names.
#[derive(Debug, Serialize)]
struct Named {
    selector: String,
    cpus: CpuSet,
    cores: usize,
    /// What they are.
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_kib: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    vcache: bool,
}

/// The options of `hook layout`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Draw them: packages, NUMA nodes, LLC domains with their caches, cores and PCI devices, and
    /// which VM or container has which CPUs by its settings
    #[arg(long)]
    pub map: bool,
}

/// The command's whole run.
///
/// # Errors
/// If sysfs cannot be read.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    let topology = Topology::read(&root)?;
    if args.map {
        let (claims, notes) = claims::of_all_guests(&root);
        let mut report = output.report(TOOL);
        notes.iter().for_each(|note| report.note(note));
        let machine = Machine::read(&root, &topology)?;
        print(&coloured(&machine.draw(&claims, None, drawing::columns())))?;
    } else if output.json {
        print_json(&to_json(&topology))?;
    } else {
        print(&printable(&to_text(&topology)))?;
    }
    Ok(Exit::Success)
}

/// The selectors and the map of a host, for a report.
///
/// # Errors
/// If sysfs cannot be read.
pub(super) fn text(root: &Host) -> anyhow::Result<String> {
    Ok(to_text(&Topology::read(root)?))
}

fn to_json(topology: &Topology) -> serde_json::Value {
    let cores: Vec<_> = topology
        .cores
        .iter()
        .map(|core| json!({"selector": core_selector(core), "cpus": core, "place": place(topology, core)}))
        .collect();
    json!({
        "present": topology.present, "online": topology.online, "offline": topology.offline(),
        "selectors": named(topology), "cores": cores,
    })
}

fn to_text(topology: &Topology) -> String {
    let mut table = Table::new(&["selector", "cpus", "cores", "what"]);
    let named = named(topology);
    let widest = |width: fn(&Named) -> usize| named.iter().map(width).max().unwrap_or(0);
    // Beside the CPUs: the other columns, the third one under its head, and what is between them.
    let beside = widest(|row| row.selector.len()) + "cores".len() + widest(|row| row.what.len());
    let room = WIDTH.saturating_sub(beside + 6).max(20);
    for Named {
        selector,
        cpus,
        cores,
        what,
        ..
    } in &named
    {
        // The kernel does not report the cores of offline CPUs.
        let cores = if *cores == 0 {
            "-".into()
        } else {
            cores.to_string()
        };
        let mut lines = wrapped(&cpus.to_string(), room).into_iter();
        let first = lines.next().unwrap_or_default();
        table.row([selector.clone(), first, cores, what.clone()]);
        for line in lines {
            table.row([String::new(), line, String::new(), String::new()]);
        }
    }
    format!("{}\n{}", table.to_text(), map(topology).to_text())
}

/// The selectors that name something on this host.
pub(crate) fn selectors(topology: &Topology) -> Vec<String> {
    let named = named(topology);
    named.into_iter().map(|it| it.selector).collect()
}

/// Every selector that stands for something here, but for those of cores and VMs.
fn named(topology: &Topology) -> Vec<Named> {
    let cores = |cpus: &CpuSet| {
        topology
            .cores
            .iter()
            .filter(|core| core.intersects(cpus))
            .count()
    };
    let mut rows = Vec::new();
    let vcache = topology.vcache();
    for kind in [Kind::Package, Kind::Die, Kind::Llc, Kind::Node] {
        for domain in topology.domains(kind) {
            let vcache = kind == Kind::Llc && vcache.contains(&domain);
            rows.push(Named {
                selector: selector(kind, domain),
                cpus: domain.cpus.clone(),
                cores: cores(&domain.cpus),
                what: what(kind, domain, vcache),
                cache_kib: domain.extent.cache_kib(),
                vcache,
            });
        }
    }
    for (selector, cpus, what) in [
        ("vcache", topology.vcache_cpus(), "those with 3D V-Cache"),
        ("pcores", topology.pcores.clone(), "fast cores"),
        ("ecores", topology.ecores.clone(), "small cores"),
        (
            "first-threads",
            topology.first_threads(),
            "one thread of each core",
        ),
        ("online", topology.online.clone(), "CPUs tasks can run on"),
        (
            "offline",
            topology.offline(),
            "the kernel does not report where they are",
        ),
        ("all", topology.present.clone(), "present CPUs"),
    ] {
        if !cpus.is_empty() {
            let (selector, what, cores) = (selector.into(), what.into(), cores(&cpus));
            rows.push(Named {
                selector,
                cpus,
                cores,
                what,
                cache_kib: None,
                vcache: false,
            });
        }
    }
    rows
}

fn what(kind: Kind, domain: &Domain, vcache: bool) -> String {
    let mut what = domain.extent.to_string();
    if kind == Kind::Llc && !domain.extent.is_cache() {
        what = format!("{what} (no shared cache known)");
    } else if kind == Kind::Die && what == "package" {
        what = "package (no die known)".into();
    }
    if vcache {
        what += ", V-Cache";
    }
    if !domain.sure {
        what += "; the number is uncertain while CPUs are offline";
    }
    what
}

/// The cores by place, each as its threads: `0,12  1,13`.
fn map(topology: &Topology) -> Table {
    let cells = by_place(topology);
    let hybrid = cells
        .iter()
        .map(|(place, _)| place.kind)
        .collect::<BTreeSet<_>>()
        .len()
        > 1;
    let mut table = if hybrid {
        Table::new(&[
            "package",
            "die",
            "llc",
            "node",
            "kind",
            "cores by their threads",
        ])
    } else {
        Table::new(&["package", "die", "llc", "node", "cores by their threads"])
    };
    let widest = |width: fn(&Place) -> usize| {
        let widths = cells.iter().map(|(place, _)| width(place));
        widths.max().unwrap_or(0)
    };
    let beside = widest(|place| place.package.len())
        + widest(|place| place.die.len())
        + widest(|place| place.llc.len())
        + widest(|place| place.node.len())
        + if hybrid { "pcores".len() + 10 } else { 8 };
    let core_width = topology
        .cores
        .iter()
        .map(|core| {
            core.iter()
                .map(|cpu| cpu.to_string().len() + 1)
                .sum::<usize>()
                + 1
        })
        .max()
        .unwrap_or(1);
    let fits = beside + CORES_PER_LINE * core_width - 2 <= WIDTH;
    let per_line = if fits {
        CORES_PER_LINE
    } else {
        CORES_PER_LINE / 2
    };
    for (place, cores) in cells {
        let lines = cores.chunks(per_line).map(|line| {
            line.iter()
                .map(|core| {
                    core.iter()
                        .map(|cpu| cpu.to_string())
                        .collect::<Vec<_>>()
                        .join(",")
                })
                .collect::<Vec<_>>()
        });
        for (number, line) in lines.enumerate() {
            // What is in the line above is not repeated.
            let once = |text: &str| {
                if number == 0 {
                    text.to_owned()
                } else {
                    String::new()
                }
            };
            let (package, die) = (once(&place.package), once(&place.die));
            let (llc, node, line) = (once(&place.llc), once(&place.node), line.join("  "));
            if hybrid {
                table.row([package, die, llc, node, once(place.kind), line]);
            } else {
                table.row([package, die, llc, node, line]);
            }
        }
    }
    if !topology.offline().is_empty() {
        let room = WIDTH.saturating_sub(beside + "offline: ".len()).max(20);
        let lines = wrapped(&topology.offline().to_string(), room);
        for (number, line) in lines.into_iter().enumerate() {
            let unknown = || {
                if number == 0 {
                    "?".to_owned()
                } else {
                    String::new()
                }
            };
            let line = match number {
                0 => format!("offline: {line}"),
                _ => format!("         {line}"),
            };
            let places = [unknown(), unknown(), unknown(), unknown()];
            let [package, die, llc, node] = places;
            if hybrid {
                table.row([package, die, llc, node, unknown(), line]);
            } else {
                table.row([package, die, llc, node, line]);
            }
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::Host;
    use pinfold_core::testutils::machine;

    #[test]
    fn no_line_is_wider_than_a_terminal() {
        for (name, text) in machine::all() {
            let dir = tempfile::tempdir().unwrap();
            machine::expand(&text, dir.path());
            let topology = Topology::read(&Host::new(dir.path())).unwrap();
            for line in to_text(&topology).lines() {
                assert!(line.chars().count() <= WIDTH, "{name}: {line}");
            }
        }
    }
}

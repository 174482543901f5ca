//! `hook layout`: this host's CPUs, the place of each, and the selectors that name them
//! (docs/selectors.md).

use std::collections::BTreeSet;

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::print;
use pinfold_core::sys::topology::{Domain, Kind, Topology};
use pinfold_core::{CpuSet, Exit, Table, printable};
use serde::Serialize;
use serde_json::json;

/// How many cores a line of a map has at most.
pub(crate) const CORES_PER_LINE: usize = 8;

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

/// The place of a core, by selectors.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Place {
    pub package: String,
    die: String,
    pub llc: String,
    pub node: String,
    /// `pcores` or `ecores`; empty if all are of one kind.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub kind: &'static str,
}

/// The command's whole run.
///
/// # Errors
/// If sysfs cannot be read.
pub(crate) fn run(output: &Output) -> anyhow::Result<Exit> {
    let topology = Topology::read(&output.root())?;
    if output.json {
        print(&format!("{:#}\n", to_json(&topology)))?;
    } else {
        print(&printable(&to_text(&topology)))?;
    }
    Ok(Exit::Success)
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
    for Named {
        selector,
        cpus,
        cores,
        what,
        ..
    } in named(topology)
    {
        // The kernel does not report the cores of offline CPUs.
        let cores = if cores == 0 {
            "-".into()
        } else {
            cores.to_string()
        };
        table.row([selector, cpus.to_string(), cores, what]);
    }
    format!("{}\n{}", table.to_text(), map(topology).to_text())
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
    let vcache: CpuSet = vcache.iter().flat_map(|llc| llc.cpus.iter()).collect();
    for (selector, cpus, what) in [
        ("vcache", vcache, "what has a larger L3 than others"),
        ("pcores", topology.pcores.clone(), "fast cores"),
        ("ecores", topology.ecores.clone(), "small cores"),
        (
            "first-threads",
            topology.first_threads(),
            "one thread of each core",
        ),
        ("online", topology.online.clone(), "what tasks can run on"),
        (
            "offline",
            topology.offline(),
            "the kernel does not tell where they are",
        ),
        ("all", topology.present.clone(), "what is in the machine"),
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

fn selector(kind: Kind, domain: &Domain) -> String {
    let name = match kind {
        Kind::Package => "package",
        Kind::Die => "die",
        Kind::Llc => "llc",
        Kind::Node => "node",
    };
    format!("{name}:{}", domain.number)
}

fn what(kind: Kind, domain: &Domain, vcache: bool) -> String {
    let mut what = domain.extent.to_string();
    if kind == Kind::Llc && !domain.extent.is_cache() {
        what = format!("no shared cache is told: the {what}");
    } else if kind == Kind::Die && what == "package" {
        what = "no die is told: the package".into();
    }
    if vcache {
        what += ", V-Cache";
    }
    if !domain.sure {
        what += "; the number is not sure, with CPUs offline";
    }
    what
}

/// Any of its CPUs names a core; this takes the first.
fn core_selector(core: &CpuSet) -> String {
    core.first()
        .map(|cpu| format!("core:{cpu}"))
        .unwrap_or_default()
}

fn place(topology: &Topology, core: &CpuSet) -> Place {
    let of = |kind| {
        let domain = topology
            .domains(kind)
            .iter()
            .find(|domain| domain.cpus.intersects(core));
        domain
            .map(|domain| selector(kind, domain))
            .unwrap_or_default()
    };
    let kind = match (
        core.intersects(&topology.pcores),
        core.intersects(&topology.ecores),
    ) {
        (true, _) => "pcores",
        (_, true) => "ecores",
        _ => "",
    };
    Place {
        package: of(Kind::Package),
        die: of(Kind::Die),
        llc: of(Kind::Llc),
        node: of(Kind::Node),
        kind,
    }
}

/// The cores by place, the places in the order of their first CPUs.
pub(crate) fn by_place(topology: &Topology) -> Vec<(Place, Vec<&CpuSet>)> {
    let mut places: Vec<(Place, Vec<&CpuSet>)> = Vec::new();
    for core in &topology.cores {
        let place = place(topology, core);
        match places.iter_mut().find(|(known, _)| *known == place) {
            Some((_, cores)) => cores.push(core),
            None => places.push((place, vec![core])),
        }
    }
    places
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
    for (place, cores) in cells {
        let lines = cores.chunks(CORES_PER_LINE).map(|line| {
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
        let offline = topology.offline().to_string();
        let unknown = || "?".to_owned();
        if hybrid {
            table.row([
                unknown(),
                unknown(),
                unknown(),
                unknown(),
                unknown(),
                format!("offline: {offline}"),
            ]);
        } else {
            table.row([
                unknown(),
                unknown(),
                unknown(),
                unknown(),
                format!("offline: {offline}"),
            ]);
        }
    }
    table
}

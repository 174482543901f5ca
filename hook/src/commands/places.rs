//! The places of cores: package, die, LLC domain, NUMA node and kind, by selectors.

use pinfold_core::CpuSet;
use pinfold_core::sys::topology::{Domain, Kind, Topology};
use serde::Serialize;

/// How many cores a line of a map has at most.
pub(super) const CORES_PER_LINE: usize = 8;

/// The place of a core, by selectors.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Place {
    pub package: String,
    pub die: String,
    pub llc: String,
    pub node: String,
    /// `pcores` or `ecores`; empty if all are of one kind.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub kind: &'static str,
}

/// The selector of a domain.
pub(super) fn selector(kind: Kind, domain: &Domain) -> String {
    let name = match kind {
        Kind::Package => "package",
        Kind::Die => "die",
        Kind::Llc => "llc",
        Kind::Node => "node",
    };
    format!("{name}:{}", domain.number)
}

/// Any of its CPUs names a core; this takes the first.
pub(super) fn core_selector(core: &CpuSet) -> String {
    core.first()
        .map(|cpu| format!("core:{cpu}"))
        .unwrap_or_default()
}

/// The place of a core.
pub(super) fn place(topology: &Topology, core: &CpuSet) -> Place {
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
pub(super) fn by_place(topology: &Topology) -> Vec<(Place, Vec<&CpuSet>)> {
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

/// The same, those of a package together and in it those of a NUMA node.
pub(super) fn by_package(topology: &Topology) -> Vec<(Place, Vec<&CpuSet>)> {
    let mut places = by_place(topology);
    let order = |text: fn(&Place) -> &str| {
        let mut order: Vec<String> = Vec::new();
        for (place, _) in &places {
            if !order.iter().any(|known| known == text(place)) {
                order.push(text(place).to_owned());
            }
        }
        move |place: &Place| order.iter().position(|known| known == text(place))
    };
    let (package, node) = (order(|place| &place.package), order(|place| &place.node));
    places.sort_by_key(|(place, _)| (package(place), node(place)));
    places
}

/// A list of CPUs in lines of at most so many characters, as far as its parts allow.
pub(super) fn wrapped(list: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for part in list.split_inclusive(',') {
        match lines.last_mut() {
            Some(line) if line.is_empty() || line.len() + part.len() <= width => {
                line.push_str(part)
            }
            _ => lines.push(part.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_wrapped_at_commas() {
        for (list, width, lines) in [
            ("0-3,8-11", 20, &["0-3,8-11"][..]),
            ("0-3,8-11,16-19", 9, &["0-3,8-11,", "16-19"]),
            ("1000-1001", 4, &["1000-1001"]),
            ("", 4, &[""]),
        ] {
            assert_eq!(wrapped(list, width), lines, "{list}");
        }
    }
}

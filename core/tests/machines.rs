//! Topology and CPU expressions on captured machines of many shapes.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use pinfold_core::selector;
use pinfold_core::sys::topology::{Domain, Kind, Topology};
use pinfold_core::testutils::machine;
use pinfold_core::{CpuSet, Host, Selector};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// The captured machines.
struct Machines {
    folder: tempfile::TempDir,
    machines: BTreeMap<String, String>,
}

impl Machines {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            machines: machine::all().into_iter().collect(),
        }
    }

    /// A machine, expanded if it was not yet.
    fn root(&self, name: &str) -> Host {
        let root = self.folder.path().join(name);
        if !root.exists() {
            machine::expand(&self.machines[name], &root);
        }
        Host::new(root)
    }
}

fn resolved(root: &Host, text: &str) -> Result<String, String> {
    let expr: Selector = text.parse().unwrap();
    expr.resolve(root)
        .map(|cpus| cpus.to_string())
        .map_err(|error| error.to_string())
}

/// `0=0-5,12-17 L3 32M`, joined by `; `.
fn shown(domains: &[Domain]) -> String {
    let one = |d: &Domain| {
        format!(
            "{}={} {}{}",
            d.number,
            d.cpus,
            d.extent,
            if d.sure { "" } else { " ?" }
        )
    };
    domains.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[test]
fn llc_domains() {
    let machines = Machines::new();
    for (name, llcs) in [
        ("5900x", "0=0-5,12-17 L3 32M; 1=6-11,18-23 L3 32M"),
        (
            "5900x-offline",
            "0=0-1,3-5,12-17 L3 32M; 1=6-10,18-23 L3 32M",
        ),
        ("5900x-fenced", "0=0-5,12-17 L3 32M"),
        ("7950x3d", "0=0-7,16-23 L3 96M; 1=8-15,24-31 L3 32M"),
        ("one-l3", "0=0-15 L3 16M"),
        (
            "two-sockets",
            "0=0,2,4,6,8,10,12,14 L3 25344K; 1=1,3,5,7,9,11,13,15 L3 25344K",
        ),
        ("hybrid", "0=0-23 L3 30M"),
        ("meteor-lake", "0=0-11 L3 24M; 1=12-13 L2 2M"),
        ("big-little", "0=0-7 package"),
        ("smt-off", "0=0-5 L3 32M; 1=6-11 L3 32M"),
        ("numa-one-llc", "0=0-7 L3 16M"),
        ("no-numa", "0=0-3 L3 8M; 1=4-7 L3 8M"),
        ("no-l3", "0=0-3 die; 1=4-7 die"),
        ("bare", "0=0-3 package"),
        ("gaps", "0=0-3,16-19 L3 16M; 1=8-11,24-27 L3 16M"),
        (
            "epyc-fenced",
            "0=0-7,64-71 L3 32M; 1=8-15,72-79 L3 32M; 2=16-23,80-87 L3 32M; 3=32-39,96-103 L3 32M ?; \
             4=40-47,104-111 L3 32M ?; 5=48-55,112-119 L3 32M ?; 6=56-63,120-127 L3 32M ?",
        ),
    ] {
        let topology = Topology::read(&machines.root(name)).unwrap();
        assert_eq!(shown(topology.domains(Kind::Llc)), llcs, "{name}");
    }
}

#[test]
fn a_large_l3_of_others_is_no_vcache() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (vendor, size, vcache)) in [
        ("vendor_id : GenuineIntel", "163840K", false),
        ("vendor_id : AuthenticAMD", "163840K", true),
        ("vendor_id : AuthenticAMD", "65536K", true),
        ("vendor_id : AuthenticAMD", "32768K", false),
        ("processor : 0", "163840K", false),
    ]
    .into_iter()
    .enumerate()
    {
        let root = folder.path().join(number.to_string());
        let text =
            format!("present 0-7\nsingle 0-7\ncache 3 0 {size} 0-7\nfile proc/cpuinfo {vendor}\n");
        machine::expand(&text, &root);
        let topology = Topology::read(&Host::new(&root)).unwrap();
        assert_eq!(!topology.vcache().is_empty(), vcache, "{vendor}, {size}");
    }
}

#[test]
fn packages_without_a_number_are_distinguished_by_their_cpus() {
    let folder = tempfile::tempdir().unwrap();
    let text = "present 0-7\npackage -1 0-3\npackage -1 4-7\nsingle 0-7\n";
    machine::expand(text, folder.path());
    let topology = Topology::read(&Host::new(folder.path())).unwrap();
    assert_eq!(
        shown(topology.domains(Kind::Package)),
        "0=0-3 package; 1=4-7 package"
    );
}

#[test]
fn every_online_cpu_is_in_one_domain_of_each_kind_and_in_one_core() {
    let machines = Machines::new();
    for name in machines.machines.keys() {
        let topology = Topology::read(&machines.root(name)).unwrap();
        let once = |sets: Vec<&CpuSet>| {
            let union = sets.iter().fold(CpuSet::new(), |all, set| &all | set);
            assert_eq!(union, topology.online, "{name}");
            assert_eq!(
                sets.iter().map(|set| set.len()).sum::<usize>(),
                union.len(),
                "{name}"
            );
        };
        for kind in [Kind::Package, Kind::Die, Kind::Llc, Kind::Node] {
            once(
                topology
                    .domains(kind)
                    .iter()
                    .map(|domain| &domain.cpus)
                    .collect(),
            );
        }
        once(topology.cores.iter().collect());
        assert_eq!(
            &topology.online | &topology.offline(),
            topology.present,
            "{name}: none is lost"
        );
        assert!(!topology.online.intersects(&topology.offline()));
    }
}

#[test]
fn expressions_on_machines() {
    let machines = Machines::new();
    for (name, text, cpus) in [
        ("5900x", "llc:1", "6-11,18-23"),
        ("5900x", "ccd:0-1", "0-23"),
        ("5900x", "llc:0,1", "0-23"),
        ("5900x", "llc:1,cpu:0", "0,6-11,18-23"),
        ("5900x", "!llc:1", "0-5,12-17"),
        ("5900x", "core:6", "6,18"),
        ("5900x", "core:18", "6,18"),
        ("5900x", "smt:6-8,9", "6-9,18-21"),
        ("5900x", "first-threads", "0-11"),
        ("5900x", "llc:1&first-threads", "6-11"),
        ("5900x", "llc:1,!6,18", "7-11,19-23"),
        ("5900x", "llc:1&!smt:6", "7-11,19-23"),
        ("5900x", "0-5,12-17&first-threads", "0-5"),
        ("5900x", "0-3,llc:1&first-threads", "0-3,6-11"),
        ("5900x", "(0-3,llc:1)&(first-threads,23)", "0-3,6-11,23"),
        ("5900x", "package:0&die:0&node:0&online&all", "0-23"),
        ("5900x", "!!llc:1", "6-11,18-23"),
        ("7950x3d", "vcache", "0-7,16-23"),
        ("7950x3d", "!vcache", "8-15,24-31"),
        ("7950x3d", "vcache&first-threads,!0", "1-7"),
        ("one-l3", "l3:0", "0-15"),
        ("epyc-7763", "llc:7", "56-63,120-127"),
        ("epyc-7763", "node:3&!llc:6", "56-63,120-127"),
        ("epyc-7763", "llc:0-3", "0-31,64-95"),
        ("epyc-fenced", "llc:2", "16-23,80-87"),
        ("9950x3d", "vcache", "0-7,16-23"),
        ("7800x3d", "vcache", "0-15"),
        ("hx370", "pcores", "0-3,12-15"),
        ("alderlake-no-pmu", "pcores", "0-11"),
        ("alderlake-no-pmu", "ecores", "12-19"),
        ("dgx-gb10", "pcores", "5-9,15-19"),
        ("265k-interleaved", "ecores", "2-5,10-17"),
        ("epyc-fenced", "offline", "24-31,88-95"),
        ("two-sockets", "socket:1", "1,3,5,7,9,11,13,15"),
        ("two-sockets", "die:1&llc:1&numa:1", "1,3,5,7,9,11,13,15"),
        ("two-sockets", "smt:1", "1,9"),
        ("hybrid", "pcores", "0-15"),
        ("hybrid", "ecores", "16-23"),
        ("hybrid", "pcores&first-threads", "0,2,4,6,8,10,12,14"),
        ("hybrid", "core:6", "6-7"),
        ("hybrid", "smt:7,16", "6-7,16"),
        ("meteor-lake", "ecores&!llc:0", "12-13"),
        ("big-little", "pcores", "4-7"),
        ("big-little", "ecores", "0-3"),
        ("smt-off", "llc:1", "6-11"),
        ("smt-off", "all", "0-23"),
        ("smt-off", "online", "0-11"),
        ("smt-off", "first-threads", "0-11"),
        ("5900x-offline", "llc:1", "6-10,18-23"),
        ("5900x-offline", "!llc:1", "0-5,11-17"),
        ("5900x-offline", "online&!llc:1", "0-1,3-5,12-17"),
        ("5900x-offline", "smt:23", "23"),
        ("5900x-offline", "offline", "2,11"),
        ("5900x-offline", "first-threads", "0-1,3-10,14,23"),
        ("5900x-fenced", "offline", "6-11,18-23"),
        ("numa-one-llc", "node:2", "4-7"),
        ("no-numa", "node:0", "0-7"),
        ("no-numa", "llc:1", "4-7"),
        ("no-l3", "llc:1&die:1", "4-7"),
        ("bare", "package:0&die:0&llc:0&node:0", "0-3"),
        ("bare", "smt:2", "2"),
        ("gaps", "llc:1", "8-11,24-27"),
        ("gaps", "!llc:1", "0-3,16-19"),
        ("512-cpus", "llc:31", "248-255,504-511"),
        ("512-cpus", "package:1&first-threads", "128-255"),
    ] {
        assert_eq!(
            resolved(&machines.root(name), text).as_deref(),
            Ok(cpus),
            "{name}: {text}"
        );
    }
}

#[test]
fn the_documented_examples_hold() {
    let machines = Machines::new();
    let table = include_str!("../../docs/selectors.md")
        .split("## On a 5900X")
        .nth(1)
        .unwrap();
    let rows = table
        .lines()
        .skip(4)
        .take_while(|line| line.starts_with('|'));
    let rows: Vec<Vec<&str>> = rows
        .map(|row| {
            row.split('|')
                .map(|cell| cell.trim_matches([' ', '`']))
                .collect()
        })
        .collect();
    assert!(rows.len() > 10);
    for row in rows {
        assert_eq!(
            resolved(&machines.root("5900x"), row[1]).as_deref(),
            Ok(row[2]),
            "{}",
            row[1]
        );
    }
}

#[test]
fn what_a_machine_lacks_is_named_with_what_it_has() {
    let machines = Machines::new();
    let offline = "and the kernel does not report where they belong";
    for (name, text, message) in [
        (
            "5900x",
            "llc:2",
            "llc:2: no such LLC domain; this host has llc:0 (CPU 0-5,12-17) and llc:1 (CPU 6-11,18-23)".to_owned(),
        ),
        (
            "5900x",
            "llc:1,6",
            "llc:6: no such LLC domain; for CPU 6 write cpu:6; this host has llc:0 (CPU 0-5,12-17) and \
             llc:1 (CPU 6-11,18-23)"
                .into(),
        ),
        ("one-l3", "0-5,ccd:1-3", "llc:1-3: no such LLC domain; this host has llc:0 (CPU 0-15)".into()),
        (
            "5900x-fenced",
            "llc:1",
            format!(
                "llc:1: no such LLC domain; this host has llc:0 (CPU 0-5,12-17); CPU 6-11,18-23 offline, {offline}"
            ),
        ),
        (
            "epyc-fenced",
            "llc:3",
            "llc:3: whether this is CPU 32-39,96-103 is uncertain: offline CPU 24-31,88-95 could \
             form one before it; bring them online, or write CPUs by number"
                .into(),
        ),
        ("512-cpus", "llc:32", "llc:32: no such LLC domain; this host has llc:0-31; `hook layout` shows them".into()),
        (
            "numa-one-llc",
            "node:1",
            "node:1: no such NUMA node with CPUs; this host has node:0 (CPU 0-3) and node:2 (CPU 4-7)".into(),
        ),
        ("5900x", "socket:1", "package:1: no such package; this host has package:0 (CPU 0-23)".into()),
        ("5900x", "die:1", "die:1: no such die; this host has die:0 (CPU 0-23)".into()),
        ("5900x", "core:24", "CPU 24: no such CPU; this host has 0-23".into()),
        ("5900x", "llc:0,cpu:24", "CPU 24: no such CPU; this host has 0-23".into()),
        ("gaps", "!4", "CPU 4: no such CPU; this host has 0-3,8-11,16-19,24-27".into()),
        (
            "5900x-offline",
            "smt:10-11",
            "smt:11: offline, and the kernel does not report its core; online are 0-1,3-10,12-23".into(),
        ),
        (
            "5900x",
            "vcache",
            "vcache: no L3 has 3D V-Cache (AMD, 64M or more, 8M or more per core); \
             this host has llc:0 (CPU 0-5,12-17, L3 32M) and \
             llc:1 (CPU 6-11,18-23, L3 32M)"
                .into(),
        ),
        ("meteor-lake", "vcache&0", {
            "vcache: no L3 has 3D V-Cache (AMD, 64M or more, 8M or more per core); \
             this host has llc:0 (CPU 0-11, L3 24M) and llc:1 (CPU 12-13, L2 2M)"
                .into()
        }),
        (
            "hx370",
            "vcache",
            "vcache: no L3 has 3D V-Cache (AMD, 64M or more, 8M or more per core); \
             this host has llc:0 (CPU 0-3,12-15, L3 16M) and \
             llc:1 (CPU 4-11,16-23, L3 8M)"
                .into(),
        ),
        ("5900x", "pcores", "pcores: all online cores of this host are of one kind".into()),
        ("5900x", "0-5&llc:1", "0-5&llc:1: it selects no CPU".into()),
        ("5900x", "!all", "!all: it selects no CPU".into()),
        ("5900x", "offline", "offline: it selects no CPU".into()),
    ] {
        assert_eq!(resolved(&machines.root(name), text), Err(message), "{name}: {text}");
    }
    let error = resolved(&machines.root("5900x"), "vm:100").unwrap_err();
    assert!(
        error.starts_with("VM 100: no such VM on this node: "),
        "{error}"
    );
}

#[test]
fn what_the_kernel_could_not_have_written_is_an_error_or_left_out() {
    let machines = Machines::new();
    let root = machines.root("5900x");
    for (file, text, expected) in [
        (
            "cpu0/topology/thread_siblings_list",
            "5-3",
            Err("runs backwards"),
        ),
        (
            "cpu0/cache/index3/shared_cpu_list",
            "x",
            Err("is not a CPU number or range"),
        ),
        (
            "cpu0/cache/index3/shared_cpu_list",
            "6-11",
            Ok("0=0,6-11 L3 32M; 1=1-5,12-17 L3 32M; 2=18-23 L3 32M"),
        ),
        (
            "cpu0/cache/index3/shared_cpu_list",
            "",
            Ok("0=0 die; 1=1-5,12-17 L3 32M; 2=6-11,18-23 L3 32M"),
        ),
        (
            "cpu0/cache/index3/level",
            "x",
            Ok("0=0,12 die; 1=1-5,13-17 L3 32M; 2=6-11,18-23 L3 32M"),
        ),
        (
            "cpu0/cache/index3/size",
            "x",
            Ok("0=0-5,12-17 L3; 1=6-11,18-23 L3 32M"),
        ),
        (
            "cpu0/cache/index3/type",
            "Instruction",
            Ok("0=0,12 die; 1=1-5,13-17 L3 32M; 2=6-11,18-23 L3 32M"),
        ),
        (
            "cpu0/topology/physical_package_id",
            "x",
            Ok("0=0-5,12-17 L3 32M; 1=6-11,18-23 L3 32M"),
        ),
        ("present", "", Ok("")),
        (
            "online",
            "0-40",
            Ok("0=0-5,12-17 L3 32M; 1=6-11,18-23 L3 32M"),
        ),
    ] {
        let path = root.path("sys/devices/system/cpu").join(file);
        let before = std::fs::read(&path).unwrap();
        std::fs::write(&path, format!("{text}\n")).unwrap();
        let llcs = Topology::read(&root).map(|topology| shown(topology.domains(Kind::Llc)));
        std::fs::write(&path, before).unwrap();
        match expected {
            Ok(expected) => assert_eq!(llcs.unwrap(), expected, "{file}: {text}"),
            Err(expected) => {
                let error = llcs.unwrap_err().to_string();
                assert!(
                    error.contains(file) && error.contains(expected),
                    "{file}: {text}: {error}"
                );
            }
        }
    }
}

/// What selectors stand for on the 5900X.
fn selectors() -> BTreeMap<&'static str, CpuSet> {
    let set = |text: &str| text.parse().unwrap();
    BTreeMap::from([
        ("llc:0", set("0-5,12-17")),
        ("ccd:1", set("6-11,18-23")),
        ("l3:0,1", set("0-23")),
        ("core:6", set("6,18")),
        ("smt:6-7,23", set("6-7,11,18-19,23")),
        ("first-threads", set("0-11")),
        ("online", set("0-23")),
        ("cpu:3,4", set("3-4")),
    ])
}

/// An expression's text, and its CPUs by the operations of `CpuSet` only.
fn any_expr() -> impl Strategy<Value = (String, CpuSet)> {
    let numbers = prop::collection::vec(0..24usize, 1..5).prop_map(|cpus| {
        let cpus: CpuSet = cpus.into_iter().collect();
        (cpus.to_string(), cpus)
    });
    let named: Vec<(String, CpuSet)> = selectors()
        .into_iter()
        .map(|(name, cpus)| (name.into(), cpus))
        .collect();
    let leaf = prop_oneof![numbers, prop::sample::select(named)];
    // Everything that is joined is put in parentheses, so that the model needs no grammar of its
    // own.
    leaf.prop_recursive(4, 24, 3, |inner| {
        let all = CpuSet::range(0, 23);
        prop_oneof![
            (inner.clone(), inner.clone())
                .prop_map(|(a, b)| (format!("({},({}))", a.0, b.0), &a.1 | &b.1)),
            (inner.clone(), inner.clone())
                .prop_map(|(a, b)| (format!("(({}) & ({}))", a.0, b.0), &a.1 & &b.1)),
            (inner.clone(), inner.clone())
                .prop_map(|(a, b)| (format!("({},!({}))", a.0, b.0), &a.1 - &b.1)),
            inner.prop_map(move |a| (format!("!({})", a.0), &all - &a.1)),
        ]
    })
}

/// Any text that is made of what expressions are made of.
fn any_text() -> impl Strategy<Value = String> {
    const TOKENS: [&str; 18] = [
        "0", "5", "0-3", ",", ",", "&", "!", "(", ")", "llc:", "llc:1", "smt:", "vm:", "100",
        "all", "cpu:", " ", "é",
    ];
    prop::collection::vec(prop::sample::select(&TOKENS[..]), 0..12)
        .prop_map(|tokens| tokens.concat())
}

#[test]
fn algebra_is_that_of_sets() {
    let machines = Machines::new();
    let root = machines.root("5900x");
    let host = selector::Resolver::new(&root);
    let check = |(text, cpus): (String, CpuSet)| {
        let expr: Selector = text.parse().unwrap();
        match host.resolve(&expr) {
            Ok(resolved) => prop_assert_eq!(resolved, cpus, "{}", text),
            Err(error) => prop_assert!(cpus.is_empty(), "{}: {}", text, error),
        }
        prop_assert_eq!(expr.to_string().parse::<Selector>().unwrap(), expr);
        Ok(())
    };
    TestRunner::default().run(&any_expr(), check).unwrap();
}

proptest! {
    #[test]
    fn what_is_printed_reads_as_the_same(text in any_text()) {
        if let Ok(expr) = text.parse::<Selector>() {
            prop_assert_eq!(expr.to_string().parse::<Selector>().unwrap(), expr, "{}", text);
        }
    }

    #[test]
    fn no_text_panics(text in "\\PC*") {
        let _ = text.parse::<Selector>();
    }
}

//! A stand-in for what Proxmox VE's `pvestatd` does each 10 s with VMs and containers.
//!
//! It reads the load of each VM from the VM's scope, and warns once for each value that is not there;
//! and it spreads containers over the CPUs of the root cgroup (`vmstatus` in PVE::QemuServer,
//! `rebalance_lxc_containers` in PVE::Service::pvestatd).

use crate::cache;
use crate::cpus::Cpus;
use crate::proc::{names, read};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

const CGROUPS: &str = "/sys/fs/cgroup";
const CONTAINERS: &str = "/etc/pve/lxc";
const RUN: &str = "/run/qemu-server";
/// The values that it takes from each of these files.
const LOADS: [(&str, usize); 4] = [
    ("memory.current", 1),
    ("cpu.pressure", 2),
    ("io.pressure", 2),
    ("memory.pressure", 2),
];

/// One round; what it would log.
pub fn round() -> Result<String> {
    let mut log = String::new();
    for vmid in numbers(RUN, ".pid") {
        let scope = Path::new(CGROUPS).join(format!("qemu.slice/{vmid}.scope"));
        for (file, values) in LOADS {
            if read(scope.join(file)).is_none() {
                for _ in 0..values {
                    // Writing to a String cannot fail.
                    let _ = writeln!(log, "VM {vmid}: uninitialized value of {file}");
                }
            }
        }
    }
    for (vmid, cpus) in spread()? {
        // As in PVE, the outer one allows all while the inner one is set.
        let folder = format!("{CGROUPS}/lxc/{vmid}");
        let all = read(format!("{CGROUPS}/cpuset.cpus.effective")).unwrap_or_default();
        for (file, value) in [
            ("cpuset.cpus", all.trim().to_owned()),
            ("ns/cpuset.cpus", cpus.to_string()),
            ("cpuset.cpus", cpus.to_string()),
        ] {
            cache::write(&Path::new(&folder).join(file), value)?;
        }
        let _ = writeln!(log, "modified cpu set for lxc/{vmid}: {cpus}");
    }
    Ok(log)
}

fn numbers(folder: &str, extension: &str) -> Vec<String> {
    let names = names(folder).into_iter();
    names
        .filter_map(|name| name.strip_suffix(extension).map(str::to_owned))
        .collect()
}

/// The containers whose CPUs change, with these.
fn spread() -> Result<Vec<(String, Cpus)>> {
    let all = read(format!("{CGROUPS}/cpuset.cpus.effective"))
        .context("the root cgroup: no effective CPUs")?;
    let mut containers = Vec::new();
    for vmid in numbers(CONTAINERS, ".conf") {
        let own = format!("{CGROUPS}/lxc/{vmid}");
        if !Path::new(&own).join("ns").is_dir() {
            continue;
        }
        let conf = read(format!("{CONTAINERS}/{vmid}.conf")).unwrap_or_default();
        let cpus = read(format!("{own}/cpuset.cpus")).unwrap_or_default();
        containers.push(Container::parse(vmid, &conf, &cpus)?);
    }
    Ok(balance(&all.parse()?, containers))
}

struct Container {
    vmid: String,
    cores: Option<usize>,
    is_pinned: bool,
    cpus: Cpus,
}

impl Container {
    fn parse(vmid: String, conf: &str, cpus: &str) -> Result<Self> {
        let value = |key: &str| {
            let mut lines = conf.lines().take_while(|line| !line.starts_with('['));
            lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::trim))
        };
        Ok(Self {
            vmid,
            cores: value("cores").and_then(|cores| cores.parse().ok()),
            is_pinned: value("lxc.cgroup2.cpuset.cpus").is_some(),
            cpus: cpus.parse()?,
        })
    }
}

fn balance(allowed: &Cpus, containers: Vec<Container>) -> Vec<(String, Cpus)> {
    let count = allowed.0.len();
    let mut load: BTreeMap<u32, usize> = allowed.0.iter().map(|cpu| (*cpu, 0)).collect();
    let mut all = Vec::new();
    for container in containers {
        let mut cpus = container.cpus.clone();
        if !container.is_pinned {
            let cores = container.cores.unwrap_or(count).min(count);
            while cpus.0.len() > cores {
                cpus.0.pop_last();
            }
            for cpu in &allowed.0 {
                if cpus.0.len() < cores {
                    cpus.0.insert(*cpu);
                }
            }
        }
        for cpu in &cpus.0 {
            load.entry(*cpu).and_modify(|load| *load += 1);
        }
        all.push((container, cpus));
    }
    let mut changed = Vec::new();
    for (container, cpus) in all {
        let mut chosen = cpus.clone();
        if !container.is_pinned && container.cores.is_some_and(|cores| cores < count) {
            chosen.0.clear();
            let rest: Vec<u32> = allowed.0.difference(&cpus.0).copied().collect();
            for cpu in &cpus.0 {
                let (mut best, mut cost) = (*cpu, load.get(cpu).copied().unwrap_or_default());
                for candidate in &rest {
                    if load[candidate] + 1 < cost {
                        (best, cost) = (*candidate, load[candidate]);
                    }
                }
                if best != *cpu {
                    *load.entry(best).or_default() += 1;
                    load.entry(*cpu).and_modify(|load| *load -= 1);
                }
                chosen.0.insert(best);
            }
        }
        if chosen != container.cpus {
            changed.push((container.vmid, chosen));
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(allowed: &str, containers: &[(&str, &str)]) -> String {
        let containers = containers
            .iter()
            .zip(201..)
            .map(|((conf, cpus), vmid)| Container::parse(vmid.to_string(), conf, cpus).unwrap());
        let changed = balance(&allowed.parse().unwrap(), containers.collect());
        let changed: Vec<_> = changed
            .iter()
            .map(|(vmid, cpus)| format!("{vmid}={cpus}"))
            .collect();
        changed.join(" ")
    }

    #[test]
    fn containers_are_spread_as_pvestatd_does() {
        // The first of too many, as many of the first as there are too few.
        assert_eq!(after("0-5,12-17", &[("cores: 2", "0-23")]), "201=0-1");
        assert_eq!(after("0-5,12-17", &[("", "0-23")]), "201=0-11");
        assert_eq!(after("0-23", &[("", "0-11")]), "201=0-23");
        assert_eq!(after("0-23", &[("cores: 2\n[a]\ncores: 3", "")]), "201=0-1");
        // CPUs that are not allowed stay, as long as the number is right.
        assert_eq!(after("0-5,12-17", &[("cores: 2", "6,18")]), "");
        assert_eq!(after("0-3", &[("lxc.cgroup2.cpuset.cpus: 6-7", "6-7")]), "");
        // From CPUs with two more than others to those.
        let two = ("cores: 2", "0-1");
        assert_eq!(after("0-3", &[two, two]), "201=2-3");
        assert_eq!(after("0-3", &[two]), "");
    }
}

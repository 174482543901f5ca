//! Containers: the CPUs that their settings pin them to, and their cgroups.

use super::paths;
use crate::cpuset::CpuSet;
use crate::sys::cgroup;
use crate::sysroot::Sysroot;
use crate::vm::id::VmId;

/// A container that runs on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its number.
    pub vmid: VmId,
    /// Whether its settings choose its CPUs. If they do not, pvestatd does.
    pub is_pinned: bool,
    /// Its cgroups with a cpuset of their own, below the root of the tree, the outer one first.
    /// What a container makes within is its own.
    pub cgroups: Vec<String>,
}

/// The containers of this node that have a cgroup; those whose settings cannot be read are left out,
/// as pvestatd leaves them out.
pub fn running_containers(root: &Sysroot) -> Vec<Container> {
    let names = root.names(paths::CONTAINERS).unwrap_or_default();
    let running = |name: &String| {
        let vmid: VmId = name.strip_suffix(".conf")?.parse().ok()?;
        let mut cgroups = paths::container_cgroups(vmid).to_vec();
        cgroups.retain(|path| root.exists(cgroup::path(path)));
        if cgroups.is_empty() {
            return None;
        }
        let text = root.read(paths::container_conf_file(vmid)).ok()?;
        Some(Container {
            vmid,
            is_pinned: cpusets(&text).next().is_some(),
            cgroups,
        })
    };
    names.iter().filter_map(running).collect()
}

/// The containers of this node that are pinned to CPUs, with these CPUs, by their numbers; those
/// whose settings cannot be read are left out.
pub fn pinned_containers(root: &Sysroot) -> Vec<(VmId, CpuSet)> {
    let names = root.names(paths::CONTAINERS).unwrap_or_default();
    let pinned = |name: &String| {
        let vmid = name.strip_suffix(".conf")?.parse().ok()?;
        let text = root.read(paths::container_conf_file(vmid)).ok()?;
        Some((vmid, parse_cpuset(&text)?))
    };
    names.iter().filter_map(pinned).collect()
}

/// The CPUs that a container's settings pin it to; none if they do not. LXC takes the last of
/// several lines.
fn parse_cpuset(text: &str) -> Option<CpuSet> {
    cpusets(text)
        .filter_map(|value| value.parse::<CpuSet>().ok())
        .last()
}

/// The values of the lines that pin a container to CPUs. The sections of snapshots are for later.
fn cpusets(text: &str) -> impl Iterator<Item = &str> {
    const KEYS: [&str; 2] = ["lxc.cgroup2.cpuset.cpus", "lxc.cgroup.cpuset.cpus"];
    let now = text.lines().take_while(|line| !line.starts_with('['));
    now.filter_map(|line| {
        let (key, value) = line.split_once([':', '='])?;
        KEYS.contains(&key.trim()).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutils::container_conf;

    #[test]
    fn cpusets_of_containers() {
        for (text, cpus) in [
            ("lxc.cgroup2.cpuset.cpus: 8-11\n", Some("8-11")),
            ("arch: amd64\nlxc.cgroup.cpuset.cpus = 1,3", Some("1,3")),
            (
                "lxc.cgroup2.cpuset.cpus: 1\nlxc.cgroup2.cpuset.cpus: 2",
                Some("2"),
            ),
            ("[snap]\nlxc.cgroup2.cpuset.cpus: 8-11\n", None),
            ("#lxc.cgroup2.cpuset.cpus: 8-11", None),
            ("lxc.cgroup2.cpuset.cpus: x", None),
            ("lxc.cgroup2.cpuset.cpus:", None),
            ("", None),
        ] {
            let found = parse_cpuset(text).map(|cpus| cpus.to_string());
            assert_eq!(found.as_deref(), cpus, "{text:?}");
        }
    }
    #[test]
    fn containers_that_run() {
        let dir = tempfile::tempdir().unwrap();
        for (vmid, settings) in [
            (101, "cores: 2\n"),
            (102, "lxc.cgroup2.cpuset.cpus: 6-7\n[snap]\n"),
            (103, "cores: 2\n"),
            (104, "[snap]\nlxc.cgroup2.cpuset.cpus: 6-7\n"),
        ] {
            container_conf(dir.path(), vmid, settings);
        }
        for cgroup in [
            "lxc/101/ns/init.scope",
            "lxc/102",
            "lxc/104/ns",
            "lxc/105/ns",
        ] {
            std::fs::create_dir_all(dir.path().join("sys/fs/cgroup").join(cgroup)).unwrap();
        }
        let found = running_containers(&Sysroot::new(dir.path()));
        let found: Vec<_> = found
            .iter()
            .map(|it| format!("{} {} {}", it.vmid, it.is_pinned, it.cgroups.join(" ")))
            .collect();
        assert_eq!(
            found,
            [
                "101 false lxc/101 lxc/101/ns",
                "102 true lxc/102",
                "104 false lxc/104 lxc/104/ns"
            ]
        );
    }
}

//! Gives the lab host the numbering of a Ryzen 9 5900X: SMT siblings n and n+12, two L3 domains.
//!
//! QEMU can't: its siblings are n and n+1, and without KVM it shows one L3. So folders are mounted
//! over those in sysfs, two for each CPU: systemd has a unit for every mount and looks at all of
//! them whenever one goes, as it does with its CPU (with a mount for each file, six,
//! `daemon-reload` and hotplug took twice as long). The kernel takes such a mount away when the CPU
//! goes offline; calling this again mounts what is missing.

use crate::cache;
use crate::cpus::Cpus;
use crate::proc::{names, read};
use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::path::Path;

const CPUS: u32 = 24;
/// While this file is there, the CPUs keep the numbering that QEMU gives them: a host that is not a 5900X.
pub const AS_QEMU_HAS_IT: &str = "/run/pinfold-lab/as-qemu-has-it";

const FOLDERS: &str = "/run/pinfold-lab/topology";

/// The files of one CPU that differ from QEMU's: folder below its sysfs folder; files in it
/// with their content.
fn files_of(cpu: u32) -> [(&'static str, Vec<(&'static str, String)>); 2] {
    let core = cpu % (CPUS / 2);
    let siblings = Cpus([core, core + CPUS / 2].into());
    let first = core / 6 * 6;
    let domain = Cpus((first..first + 6).chain(first + 12..first + 18).collect());
    let topology = vec![
        ("thread_siblings_list", siblings.to_string()),
        ("thread_siblings", mask(&siblings)),
        ("core_cpus_list", siblings.to_string()),
        ("core_cpus", mask(&siblings)),
        ("core_id", core.to_string()),
    ];
    let cache = vec![
        ("shared_cpu_list", domain.to_string()),
        ("shared_cpu_map", mask(&domain)),
        ("id", (core / 6).to_string()),
    ];
    [("topology", topology), ("cache/index3", cache)]
}

fn mask(cpus: &Cpus) -> String {
    let bits = cpus.0.iter().fold(0u32, |bits, cpu| bits | 1 << cpu);
    format!("{bits:06x}")
}

/// Mounts what is not mounted yet, for every CPU that is online.
pub fn apply() -> Result<()> {
    if Path::new(AS_QEMU_HAS_IT).exists() {
        return Ok(());
    }
    for cpu in 0..CPUS {
        for (folder, files) in files_of(cpu) {
            let target = format!("/sys/devices/system/cpu/cpu{cpu}/{folder}");
            let now = |name: &str| read(format!("{target}/{name}"));
            // None: the CPU is offline, or has no such cache.
            if files
                .iter()
                .all(|(name, wanted)| now(name).is_none_or(|now| now == *wanted))
            {
                continue;
            }
            let own = format!("{FOLDERS}/cpu{cpu}/{folder}");
            cache::make(Path::new(&own))?;
            let ours = files
                .into_iter()
                .map(|(name, wanted)| (name.to_owned(), wanted));
            let as_it_is = names(Path::new(&target))
                .into_iter()
                .filter_map(|name| Some((name.clone(), now(&name)?)));
            for (name, content) in as_it_is.chain(ours) {
                cache::write(&Path::new(&own).join(name), format!("{content}\n"))?;
            }
            mount(
                Some(own.as_str()),
                target.as_str(),
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .with_context(|| format!("{target}: cannot mount over it"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbering_of_a_5900x() {
        let topology = |cpu, index: usize| files_of(cpu)[0].1[index].1.clone();
        let cache = |cpu, index: usize| files_of(cpu)[1].1[index].1.clone();
        assert_eq!(topology(0, 0), "0,12");
        assert_eq!(topology(23, 0), "11,23");
        assert_eq!(topology(18, 1), "040040");
        assert_eq!(cache(5, 0), "0-5,12-17");
        assert_eq!(cache(18, 0), "6-11,18-23");
        assert_eq!(cache(18, 1), "fc0fc0");
        assert_eq!(cache(18, 2), "1");
    }
}

//! Gives the lab host the numbering of a Ryzen 9 5900X: SMT siblings n and n+12, two L3 domains.
//!
//! QEMU can't: its siblings are n and n+1, and without KVM it shows one L3. So files are mounted over
//! those in sysfs. The kernel takes such a mount away when the CPU goes offline; calling this again
//! puts back what is missing.

use crate::cache;
use crate::cpus::Cpus;
use crate::proc::read;
use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::path::Path;

const CPUS: u32 = 24;
const FILES: &str = "/run/pinfold-lab/topology";

/// What is told of one CPU: file below its sysfs folder, content.
fn told(cpu: u32) -> [(&'static str, String); 6] {
    let core = cpu % (CPUS / 2);
    let siblings = Cpus([core, core + CPUS / 2].into());
    let first = core / 6 * 6;
    let domain = Cpus((first..first + 6).chain(first + 12..first + 18).collect());
    [
        ("topology/thread_siblings_list", siblings.to_string()),
        ("topology/thread_siblings", mask(&siblings)),
        ("topology/core_cpus_list", siblings.to_string()),
        ("topology/core_cpus", mask(&siblings)),
        ("cache/index3/shared_cpu_list", domain.to_string()),
        ("cache/index3/shared_cpu_map", mask(&domain)),
    ]
}

fn mask(cpus: &Cpus) -> String {
    let bits = cpus.0.iter().fold(0u32, |bits, cpu| bits | 1 << cpu);
    format!("{bits:06x}")
}

/// Mounts what is not mounted yet, for every CPU that is online.
pub fn apply() -> Result<()> {
    cache::make(Path::new(FILES))?;
    for cpu in 0..CPUS {
        for (name, wanted) in told(cpu) {
            let target = format!("/sys/devices/system/cpu/cpu{cpu}/{name}");
            // None: the CPU is offline, or has no such cache.
            if read(&target).is_none_or(|now| now == wanted) {
                continue;
            }
            let file = format!("{FILES}/{wanted}");
            if read(&file).is_none() {
                cache::write(Path::new(&file), format!("{wanted}\n"))?;
            }
            mount(Some(file.as_str()), target.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
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
        let list = |cpu, index: usize| told(cpu)[index].1.clone();
        assert_eq!(list(0, 0), "0,12");
        assert_eq!(list(23, 0), "11,23");
        assert_eq!(list(18, 1), "040040");
        assert_eq!(list(5, 4), "0-5,12-17");
        assert_eq!(list(18, 4), "6-11,18-23");
        assert_eq!(list(18, 5), "fc0fc0");
    }
}

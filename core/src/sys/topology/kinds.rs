//! The kinds of a machine's cores, and whose CPUs they are.

use std::collections::BTreeSet;

use crate::cpuset::CpuSet;
use crate::error::Result;
use crate::sysroot::{Sysroot, cpu_list};

/// Whether the CPUs are AMD's, by /proc/cpuinfo; unknown if there is no such file.
pub(super) fn is_amd(root: &Sysroot) -> Result<Option<bool>> {
    let mut amd = false;
    let read = root.for_each_line("proc/cpuinfo", |line| amd |= is_amd_vendor(line));
    match read {
        Err(error) if error.is_gone() => Ok(None),
        read => read.map(|()| Some(amd)),
    }
}

/// Whether a line of /proc/cpuinfo names AMD.
fn is_amd_vendor(line: &str) -> bool {
    line.split_once(':')
        .is_some_and(|(key, value)| key.trim() == "vendor_id" && value.trim() == "AuthenticAMD")
}

/// The CPUs of a hybrid machine by their cores' kinds; all empty if these are alike.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    /// Of the fast cores.
    pub fast: CpuSet,
    /// Of all others.
    pub small: CpuSet,
    /// Of the slower ones of these, if there are two kinds of them.
    pub slowest: CpuSet,
}

/// The kinds of a machine's cores: by Intel's PMUs, else by the CPUs' capacities (ARM), else by their
/// highest clocks.
pub(super) fn of_cores(root: &Sysroot, online: &CpuSet, cores: &[CpuSet]) -> Result<Kinds> {
    let pmu = |name: &str| -> Result<Option<CpuSet>> {
        let path = format!("sys/devices/{name}/cpus");
        root.read_value(&path)?
            .map(|list| Ok(&cpu_list(&path, &list)? & online))
            .transpose()
    };
    if let Some(fast) = pmu("cpu_core")? {
        let ecores = pmu("cpu_atom")?.unwrap_or_default();
        // Some parts have a third kind, that of the SoC tile, with a PMU of its own since Linux
        // 6.13; before, these are among the E cores, with lower clocks.
        let lowest = pmu("cpu_lowpower")?.unwrap_or_default();
        let slowest = match lowest.is_empty() {
            true => by_speed(root, &of(cores, &ecores))?.map(|(_, slower)| slower),
            false => Some(lowest.clone()),
        };
        return Ok(Kinds {
            fast,
            small: &ecores | &lowest,
            slowest: slowest.unwrap_or_default(),
        });
    }
    let Some((fast, small)) = by_speed(root, cores)? else {
        return Ok(Kinds::default());
    };
    let slower = by_speed(root, &of(cores, &small))?;
    Ok(Kinds {
        fast,
        small,
        slowest: slower.map(|(_, slower)| slower).unwrap_or_default(),
    })
}

/// Those of the cores that have some of these CPUs.
fn of(cores: &[CpuSet], cpus: &CpuSet) -> Vec<CpuSet> {
    let cores = cores.iter().filter(|core| core.intersects(cpus));
    cores.cloned().collect()
}

/// The CPUs of the faster and of the slower cores; `None` if these are alike, or nothing is known.
fn by_speed(root: &Sysroot, cores: &[CpuSet]) -> Result<Option<(CpuSet, CpuSet)>> {
    for file in ["cpu_capacity", "cpufreq/cpuinfo_max_freq"] {
        let mut speeds = Vec::new();
        for core in cores {
            // A core is as fast as its fastest thread.
            let mut speed = None;
            for cpu in core.iter() {
                let path = format!("sys/devices/system/cpu/cpu{cpu}/{file}");
                let of_cpu = root.read_value(path)?.and_then(|text| text.parse().ok());
                speed = speed.max(of_cpu);
            }
            speeds.push(speed);
        }
        let speeds: Option<Vec<u64>> = speeds.into_iter().collect();
        let slowest = speeds.as_deref().and_then(slowest_fast);
        if let Some((speeds, slowest)) = speeds.zip(slowest) {
            let by_core = cores.iter().zip(speeds);
            let (faster, slower): (Vec<_>, Vec<_>) =
                by_core.partition(|(_, speed)| *speed >= slowest);
            let cpus = |cores: Vec<(&CpuSet, u64)>| {
                cores
                    .into_iter()
                    .flat_map(|(core, _)| core.iter())
                    .collect()
            };
            return Ok(Some((cpus(faster), cpus(slower))));
        }
    }
    Ok(None)
}

/// The speed of the slowest fast core: the one above the highest gap of a fifth or more. Cores of
/// one kind differ by less: favoured ones are up to a tenth faster, those with V-Cache slower.
fn slowest_fast(speeds: &[u64]) -> Option<u64> {
    let ascending: BTreeSet<u64> = speeds.iter().copied().collect();
    let ascending: Vec<u64> = ascending.into_iter().collect();
    let gap = |pair: &&[u64]| pair[1].saturating_mul(5) >= pair[0].saturating_mul(6);
    ascending.windows(2).rev().find(gap).map(|pair| pair[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_distinguished_by_a_gap() {
        for (speeds, slowest) in [
            (&[][..], None),
            (&[3_600_000], None),
            // Favoured cores; V-Cache beside none.
            (&[5_800_000, 5_400_000, 5_500_000], None),
            (&[5_050_000, 5_660_000], None),
            // P and E; Zen 5 and 5c; ARM.
            (&[5_200_000, 5_000_000, 3_900_000], Some(5_000_000)),
            (&[5_157_895, 3_308_271], Some(5_157_895)),
            (&[718, 731, 997, 1017, 1024], Some(997)),
            // P, E and those of the SoC tile.
            (&[4_800_000, 3_800_000, 2_500_000], Some(4_800_000)),
            (&[0, 0], None),
            (&[u64::MAX, 1], Some(u64::MAX)),
        ] {
            assert_eq!(slowest_fast(speeds), slowest, "{speeds:?}");
        }
    }

    #[test]
    fn vendors() {
        for (line, amd) in [
            ("vendor_id\t: AuthenticAMD", true),
            ("vendor_id : AuthenticAMD", true),
            ("vendor_id\t: GenuineIntel", false),
            ("model name\t: AuthenticAMD", false),
            ("", false),
        ] {
            assert_eq!(is_amd_vendor(line), amd, "{line:?}");
        }
    }
}

//! A CPU's last-level cache, from its folder `cache`; see
//! Documentation/ABI/testing/sysfs-devices-system-cpu.

use crate::cpuset::CpuSet;
use crate::error::Result;
use crate::sysroot::{Sysroot, cpu_list};

/// A cache that holds data.
#[derive(Debug)]
pub(super) struct Cache {
    /// The kernel's number of it among those of its level.
    pub(super) id: Option<usize>,
    /// 1 is next to the core.
    pub(super) level: u32,
    /// Its size in KiB.
    pub(super) kib: Option<u64>,
    /// The online CPUs that share it.
    pub(super) cpus: CpuSet,
}

/// The data cache of the highest level that a CPU has; `None` if the kernel reports none, as in
/// some VMs.
pub(super) fn last_level(root: &Sysroot, cpu: usize) -> Result<Option<Cache>> {
    let folder = format!("sys/devices/system/cpu/cpu{cpu}/cache");
    let names = match root.names(&folder) {
        Err(error) if error.is_gone() => return Ok(None),
        names => names?,
    };
    let mut last: Option<(u32, String)> = None;
    for name in names.iter().filter(|name| name.starts_with("index")) {
        let index = format!("{folder}/{name}");
        let Some(level) = root
            .read_value(format!("{index}/level"))?
            .and_then(|text| text.parse().ok())
        else {
            continue;
        };
        let kind = root
            .read_value(format!("{index}/type"))?
            .unwrap_or_default();
        if matches!(kind.as_str(), "Unified" | "Data")
            && last.as_ref().is_none_or(|(highest, _)| level > *highest)
        {
            last = Some((level, index));
        }
    }
    let Some((level, index)) = last else {
        return Ok(None);
    };
    let path = format!("{index}/shared_cpu_list");
    // Some hypervisors report a cache without the CPUs that share it.
    let Some(list) = root.read_value(&path)?.filter(|list| !list.is_empty()) else {
        return Ok(None);
    };
    let id = root
        .read_value(format!("{index}/id"))?
        .and_then(|text| text.parse().ok());
    let kib = root
        .read_value(format!("{index}/size"))?
        .and_then(|text| parse_kib(&text));
    Ok(Some(Cache {
        id,
        level,
        kib,
        cpus: cpu_list(&path, &list)?,
    }))
}

/// A cache's size in KiB, from `32768K` as the kernel writes it; `None` for anything else, and for
/// nothing.
fn parse_kib(text: &str) -> Option<u64> {
    let digits = text.trim().strip_suffix('K')?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|kib| is_number && *kib > 0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes() {
        for (text, kib) in [
            ("32768K", Some(32768)),
            ("98304K\n", Some(98304)),
            ("512K", Some(512)),
            ("", None),
            ("\n", None),
            ("0K", None),
            ("K", None),
            ("32M", None),
            ("32768", None),
            ("+1K", None),
            ("-1K", None),
            ("99999999999999999999K", None),
            ("é", None),
        ] {
            assert_eq!(super::parse_kib(text), kib, "{text:?}");
        }
    }
}

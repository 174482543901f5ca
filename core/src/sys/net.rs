//! The queues of network interfaces and the CPUs that handle their packets; see
//! Documentation/networking/scaling.rst.

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

const INTERFACES: &str = "sys/class/net";

/// The queues of all interfaces that receive, by both names, `enp6s0/rx-0`. Interfaces come and go with guests;
/// one that goes meanwhile is left out.
///
/// # Errors
/// If the interfaces cannot be listed.
pub fn queues(root: &Sysroot) -> Result<Vec<String>> {
    let names = |path: String| match root.names(path) {
        // `bonding_masters` is a file.
        Err(error) if error.is_gone() => Ok(Vec::new()),
        names => names,
    };
    let mut all = Vec::new();
    for interface in names(INTERFACES.to_owned())? {
        let mut queues = names(format!("{INTERFACES}/{interface}/queues"))?;
        queues.retain(|queue| queue.starts_with("rx-"));
        all.extend(queues.iter().map(|queue| format!("{interface}/{queue}")));
    }
    Ok(all)
}

/// The file with the CPUs of a queue.
pub(crate) fn cpus_file(queue: &str) -> String {
    let (interface, queue) = queue.split_once('/').unwrap_or_default();
    format!("{INTERFACES}/{interface}/queues/{queue}/rps_cpus")
}

/// The CPUs of a queue; `None` if it has gone.
///
/// # Errors
/// If it cannot be read or parsed.
pub(crate) fn queue_cpus(root: &Sysroot, queue: &str) -> Result<Option<CpuSet>> {
    let path = cpus_file(queue);
    let mask = root.read_value(&path)?;
    mask.map(|mask| CpuSet::from_mask(&mask))
        .transpose()
        .map_err(|source| Error::Cpus {
            object: path,
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_interfaces_that_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert!(queues(&root).unwrap().is_empty());
        for (path, text) in [
            ("bonding_masters", ""),
            ("enp6s0/queues/rx-0/rps_cpus", "00ff0fff\n"),
            ("enp6s0/queues/tx-0/xps_cpus", "00000001\n"),
            ("lo/queues/rx-0/rps_cpus", "0,00000000\n"),
            ("tap100i0/mtu", "1500\n"),
            ("odd/queues/rx-0/rps_cpus", "x\n"),
        ] {
            crate::testutils::write(dir.path(), &format!("{INTERFACES}/{path}"), text);
        }
        let cpus = |queue: &str| {
            let cpus = queue_cpus(&root, queue).map_err(|error| error.to_string());
            cpus.map(|cpus| cpus.map(|cpus| cpus.to_string()))
        };
        assert_eq!(
            queues(&root).unwrap(),
            ["enp6s0/rx-0", "lo/rx-0", "odd/rx-0"]
        );
        assert_eq!(cpus("enp6s0/rx-0").unwrap().unwrap(), "0-11,16-23");
        assert_eq!(cpus("lo/rx-0").unwrap().unwrap(), "");
        assert_eq!(cpus("tap100i0/rx-0"), Ok(None));
        let error = cpus("odd/rx-0").unwrap_err();
        assert!(error.contains("odd/queues/rx-0/rps_cpus"), "{error}");
    }
}

//! cpufreq policies and their governors; see Documentation/admin-guide/pm/cpufreq.rst.

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};

use crate::sysroot::{Sysroot, cpu_list};

const POLICIES: &str = "sys/devices/system/cpu/cpufreq";

/// One cpufreq policy: the CPUs that share a clock, and what governs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The folder's name, `policy6`.
    pub name: String,
    /// The CPUs it sets the pace of, those offline included; while all are, just the one that it is
    /// named after.
    pub cpus: CpuSet,
    /// The governor in force; empty while all of its CPUs are offline.
    pub governor: String,
    /// The governors it can have; none while all of its CPUs are offline.
    pub available: Vec<String>,
}

impl Policy {
    /// Whether its driver offers the governor.
    pub fn offers(&self, governor: &str) -> bool {
        self.available.iter().any(|offered| offered == governor)
    }
}

/// All policies by number; none where the machine has no cpufreq driver.
///
/// # Errors
/// Where one of the files cannot be read or understood.
pub fn policies(root: &Sysroot) -> Result<Vec<Policy>> {
    let names = match root.names(POLICIES) {
        Ok(names) => names,
        Err(error) if error.is_gone() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut policies = Vec::new();
    for name in names.into_iter().filter(|name| name.starts_with("policy")) {
        let value = |file: &str| match root.read_value(format!("{POLICIES}/{name}/{file}")) {
            // So the kernel answers for a policy whose CPUs are all offline, whatever is asked.
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
                Ok(Some(String::new()))
            }
            other => other,
        };
        let (Some(cpus), Some(governor), Some(available)) = (
            value("related_cpus")?,
            value("scaling_governor")?,
            value("scaling_available_governors")?,
        ) else {
            // The policy went while it was read: its last CPU was taken offline.
            continue;
        };
        let cpus = match CpuSet::from_words(&name, &cpus)? {
            none if none.is_empty() => name["policy".len()..]
                .parse::<usize>()
                .into_iter()
                .collect(),
            cpus => cpus,
        };
        let available = available.split_whitespace().map(str::to_owned).collect();
        policies.push(Policy {
            cpus,
            governor,
            available,
            name,
        });
    }
    policies.sort_by_key(|policy| policy.cpus.first());
    Ok(policies)
}

impl CpuSet {
    /// cpufreq writes its CPUs as numbers with spaces between.
    fn from_words(object: &str, text: &str) -> Result<Self> {
        cpu_list(
            object,
            &text.split_whitespace().collect::<Vec<_>>().join(","),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn policies_by_number_and_one_that_is_all_offline() {
        let dir = tempfile::tempdir().unwrap();
        for (name, cpus, governor, available) in [
            (
                "policy10",
                "10 22\n",
                "schedutil\n",
                "performance schedutil \n",
            ),
            ("policy6", "\n", "\n", "\n"),
            ("boost", "", "", ""),
        ] {
            let folder = dir.path().join(POLICIES).join(name);
            fs::create_dir_all(&folder).unwrap();
            let files = [
                ("related_cpus", cpus),
                ("scaling_governor", governor),
                ("scaling_available_governors", available),
            ];
            for (file, text) in files {
                fs::write(folder.join(file), text).unwrap();
            }
        }
        let root = Sysroot::new(dir.path());
        let policies = policies(&root).unwrap();
        let seen: Vec<String> = policies
            .iter()
            .map(|policy| {
                format!(
                    "{} (CPU {}) {:?} {}",
                    policy.name,
                    policy.cpus,
                    policy.governor,
                    policy.available.join("|")
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                "policy6 (CPU 6) \"\" ",
                "policy10 (CPU 10,22) \"schedutil\" performance|schedutil"
            ]
        );
        assert!(
            super::policies(&Sysroot::new(dir.path().join("none")))
                .unwrap()
                .is_empty()
        );
    }
}

//! cpufreq policies and their governors; see Documentation/admin-guide/pm/cpufreq.rst.

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};

use crate::sysroot::{Sysroot, cpu_list};

const POLICIES: &str = "sys/devices/system/cpu/cpufreq";

/// One cpufreq policy: the CPUs that share a clock, and their governor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The folder's name, `policy6`.
    pub name: String,
    /// The CPUs it is for, offline ones included. While all of them are offline, only the one that
    /// it is named after.
    pub cpus: CpuSet,
    /// The current governor; empty while all of its CPUs are offline.
    pub governor: String,
    /// The current energy_performance_preference; none if the driver has none or it is unknown.
    pub preference: Option<String>,
}

impl Policy {
    /// The governors that can be set; none while all of its CPUs are offline, or if the policy is
    /// gone.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn available(&self, root: &Sysroot) -> Result<Vec<String>> {
        let names = value(root, &self.name, "scaling_available_governors")?.unwrap_or_default();
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// The energy preferences that can be set by name; none if the driver has none.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn available_preferences(&self, root: &Sysroot) -> Result<Vec<String>> {
        let names = value(root, &self.name, "energy_performance_available_preferences")?;
        let names = names.unwrap_or_default();
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }
}

/// All policies by number; none if the machine has no cpufreq driver.
///
/// # Errors
/// If one of the files cannot be read or parsed.
pub fn policies(root: &Sysroot) -> Result<Vec<Policy>> {
    let names = match root.names(POLICIES) {
        Ok(names) => names,
        Err(error) if error.is_gone() => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut policies = Vec::new();
    for name in names.into_iter().filter(|name| name.starts_with("policy")) {
        let (Some(cpus), Some(governor)) = (
            value(root, &name, "related_cpus")?,
            value(root, &name, "scaling_governor")?,
        ) else {
            // The policy went while it was read: its last CPU was taken offline.
            continue;
        };
        let mut cpus = CpuSet::from_words(&name, &cpus)?;
        if cpus.is_empty() {
            cpus = name["policy".len()..]
                .parse::<usize>()
                .into_iter()
                .collect();
        }
        let preference = preference(root, &name)?;
        policies.push(Policy {
            name,
            cpus,
            governor,
            preference,
        });
    }
    policies.sort_by_key(|policy| policy.cpus.first());
    Ok(policies)
}

/// A policy's energy_performance_preference; `None` if its driver has none, or if the kernel does
/// not report it: EBUSY while its CPUs are offline, EINVAL for a value without a name (amd-pstate).
///
/// # Errors
/// If the user may not read it.
pub(crate) fn preference(root: &Sysroot, policy: &str) -> Result<Option<String>> {
    match root.read_value(format!("{POLICIES}/{policy}/energy_performance_preference")) {
        Err(error) if !error.is_denied() => Ok(None),
        found => Ok(found?.filter(|name| !name.is_empty())),
    }
}

fn value(root: &Sysroot, policy: &str, file: &str) -> Result<Option<String>> {
    match root.read_value(format!("{POLICIES}/{policy}/{file}")) {
        // The kernel's error for any file of a policy whose CPUs are all offline.
        Err(Error::Io { source, .. }) if source.raw_os_error() == Some(nix::libc::EBUSY) => {
            Ok(Some(String::new()))
        }
        other => other,
    }
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
                    policy.available(&root).unwrap().join("|")
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

//! What systemd was asked for when it made a scope: lost with the scope, which goes when its last
//! process leaves it.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::sysroot::Sysroot;

/// Where systemd keeps the unit files of transient units, and where `set-property --runtime` adds
/// to them.
const TRANSIENT: &str = "run/systemd/transient";
const CONTROL: &str = "run/systemd/system.control";

/// The properties of a scope that Proxmox VE sets by the VM's settings (`cpuunits`, `cpulimit`) or
/// always (PVE::QemuServer, `vm_start_nolock`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScopeProperties {
    /// Its name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Units that it is stopped before, as in After=.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Units that it is stopped after, as in Before=.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<String>,
    /// CPUWeight=.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// CPUQuota=, in microseconds of CPU time for each second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_quota_usec: Option<u64>,
    /// Units that systemd starts when it has ended, as in OnSuccess=: never of a VM's scope, and not
    /// saved.
    #[serde(skip)]
    pub on_success: Vec<String>,
}

impl ScopeProperties {
    /// Those of a scope; `None` if systemd has no such transient unit.
    ///
    /// # Errors
    /// If its files cannot be read.
    pub fn of(root: &Sysroot, scope: &str) -> Result<Option<Self>> {
        let Some(text) = root.read_value(format!("{TRANSIENT}/{scope}"))? else {
            return Ok(None);
        };
        let mut properties = Self::default();
        properties.add(&text);
        for folder in [TRANSIENT, CONTROL] {
            let folder = format!("{folder}/{scope}.d");
            let names = match root.names(&folder) {
                Err(error) if error.is_gone() => continue,
                names => names?,
            };
            for name in names.iter().filter(|name| name.ends_with(".conf")) {
                if let Some(text) = root.read_value(format!("{folder}/{name}"))? {
                    properties.add(&text);
                }
            }
        }
        Ok(Some(properties))
    }

    /// Adds what a unit file has. What cannot be read is left out.
    fn add(&mut self, text: &str) {
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            // systemd doubles them, since they begin specifiers.
            let value = value.trim().replace("%%", "%");
            let names = || value.split_whitespace().map(str::to_owned);
            match key.trim() {
                "Description" => self.description = Some(value),
                "After" if value.is_empty() => self.after.clear(),
                "After" => self.after.extend(names()),
                "Before" if value.is_empty() => self.before.clear(),
                "Before" => self.before.extend(names()),
                "CPUWeight" => self.cpu_weight = value.parse().ok(),
                "CPUQuota" => self.cpu_quota_usec = quota(&value),
                _ => {}
            }
        }
    }
}

/// `150%` is a CPU and a half: 1.5 s in each second. systemd writes up to two decimals.
fn quota(percent: &str) -> Option<u64> {
    let number = percent.strip_suffix('%')?;
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let hundredths: u64 = match part.len() {
        0 => 0,
        1 => part.parse::<u64>().ok()? * 10,
        2 => part.parse().ok()?,
        _ => return None,
    };
    let whole: u64 = whole.parse().ok()?;
    whole
        .checked_mul(10_000)?
        .checked_add(hundredths * 100)
        .filter(|usec| *usec > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn good_empty_garbage_hostile() {
        let read = |text: &str| {
            let mut properties = ScopeProperties::default();
            properties.add(text);
            properties
        };
        assert_eq!(
            read(
                "# This is a transient unit file\n[Unit]\nDescription=Proxmox VE VM 100 %% x\nAfter=dbus.service\n\
                 Before=pve-ha-lrm.service pve-guests.service\n\n[Scope]\nSlice=qemu.slice\nCPUWeight=200\nCPUQuota=150%\n"
            ),
            ScopeProperties {
                description: Some("Proxmox VE VM 100 % x".into()),
                after: vec!["dbus.service".into()],
                before: vec!["pve-ha-lrm.service".into(), "pve-guests.service".into()],
                cpu_weight: Some(200),
                cpu_quota_usec: Some(1_500_000),
                on_success: Vec::new(),
            }
        );
        for text in [
            "",
            "garbage",
            "CPUWeight=idle\nCPUQuota=\nAfter=\n",
            "CPUQuota=99999999999999999999%",
        ] {
            assert_eq!(read(text), ScopeProperties::default(), "{text:?}");
        }
        assert_eq!(quota("0.5%"), Some(5_000));
        assert_eq!(quota("12.25%"), Some(122_500));
    }

    #[test]
    fn what_was_set_later_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert_eq!(ScopeProperties::of(&root, "100.scope").unwrap(), None);
        for (file, text) in [
            ("transient/100.scope", "[Scope]\nCPUWeight=100\n"),
            (
                "transient/100.scope.d/50-CPUWeight.conf",
                "[Scope]\nCPUWeight=200\n",
            ),
            (
                "system.control/100.scope.d/50-CPUQuota.conf",
                "[Scope]\nCPUQuota=50%\n",
            ),
        ] {
            let file = dir.path().join("run/systemd").join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let found = ScopeProperties::of(&root, "100.scope").unwrap().unwrap();
        assert_eq!(
            (found.cpu_weight, found.cpu_quota_usec),
            (Some(200), Some(500_000))
        );
    }
}

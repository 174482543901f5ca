//! Units' AllowedCPUs=, by systemctl; see systemd.resource-control(5).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

use crate::cgroup;
use crate::command;
use crate::cpuset::CpuSet;
use crate::error::{Error, Result, is_gone};
use crate::knob::{cpu_list, into_io};
use crate::sysroot::Sysroot;

/// How long systemd may take for one unit.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to read all units again.
const RELOAD_DEADLINE: Duration = Duration::from_secs(60);

/// Whether a cgroup's name is one that systemd gives its units.
pub fn is_unit_name(name: &str) -> bool {
    [".slice", ".scope", ".service"].iter().any(|suffix| name.ends_with(suffix))
}

/// Reads `systemctl show -p Id -p LoadState -p AllowedCPUs UNIT…`: each loaded unit's CPUs, empty where unset.
///
/// # Errors
/// [`Error::Cpus`] where a list cannot be read.
pub fn parse_show(text: &str) -> Result<BTreeMap<String, CpuSet>> {
    let mut units = BTreeMap::new();
    for block in text.split("\n\n") {
        let value = |key: &str| block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let (Some(unit), Some("loaded")) = (value("Id"), value("LoadState")) else { continue };
        // systemd puts spaces between ranges.
        let list = value("AllowedCPUs").unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(",");
        units.insert(unit.to_owned(), cpu_list(&format!("{unit}: AllowedCPUs"), &list)?);
    }
    Ok(units)
}

/// The AllowedCPUs= of units, empty where unset; units that systemd does not know are left out.
///
/// # Errors
/// Where systemctl cannot be run or understood.
pub fn allowed_cpus_of(root: &Sysroot, units: &[String]) -> Result<BTreeMap<String, CpuSet>> {
    if units.is_empty() || !root.is_live() {
        return Ok(BTreeMap::new());
    }
    let mut args = vec!["show", "-p", "Id", "-p", "LoadState", "-p", "AllowedCPUs", "--"];
    args.extend(units.iter().map(String::as_str));
    let text =
        command::run("systemctl", &args, DEADLINE).map_err(|error| Error::unusable("systemd", error.to_string()))?;
    parse_show(&text)
}

/// One unit's AllowedCPUs=; `None` where there is no such unit.
///
/// # Errors
/// As [`allowed_cpus_of`].
pub fn allowed_cpus(root: &Sysroot, unit: &str) -> Result<Option<String>> {
    let mut units = allowed_cpus_of(root, &[unit.to_owned()])?;
    Ok(units.remove(unit).map(|cpus| cpus.to_string()))
}

/// Sets a unit's AllowedCPUs= until the next boot; an empty list clears it.
pub(crate) fn set_allowed_cpus(root: &Sysroot, unit: &str, cpus: &str) -> io::Result<()> {
    if !root.is_live() {
        return Err(io::Error::other("units can be set on the running host only, not under --sysroot"));
    }
    let property = format!("AllowedCPUs={cpus}");
    command::run("systemctl", &["set-property", "--runtime", "--", unit, &property], DEADLINE)?;
    if cpus.is_empty() {
        // Cleared, the property leaves the live cpuset as it was (systemd#43846), unless no unit uses the controller any
        // more.
        let top = root.exists(cgroup::path(unit));
        let cgroup = match top {
            true => unit.to_owned(),
            false => command::run("systemctl", &["show", "-p", "ControlGroup", "--value", "--", unit], DEADLINE)?,
        };
        let live = root.read_value(cgroup::file(cgroup.trim(), "cpuset.cpus")).map_err(into_io)?;
        if live.is_some_and(|list| !list.is_empty()) {
            cgroup::set_cpus(root, cgroup.trim(), "")?;
        }
    }
    Ok(())
}

/// Where `systemctl set-property --runtime` keeps what it was told: slices and services, and scopes.
const OVERRIDE_FOLDERS: [&str; 2] = ["run/systemd/system.control", "run/systemd/transient"];
/// The name of its file for AllowedCPUs=.
const OVERRIDE: &str = "50-AllowedCPUs.conf";

/// The units whose AllowedCPUs= is overridden until the next boot, sorted.
///
/// # Errors
/// Where the folders cannot be listed.
pub fn overrides(root: &Sysroot) -> Result<Vec<String>> {
    let mut units = Vec::new();
    for folder in OVERRIDE_FOLDERS {
        let names = match root.names(folder) {
            Err(error) if error.is_gone() => continue,
            names => names?,
        };
        let has_override = |unit: &&str| root.exists(format!("{folder}/{unit}.d/{OVERRIDE}"));
        units.extend(names.iter().filter_map(|name| name.strip_suffix(".d")).filter(has_override).map(str::to_owned));
    }
    units.sort();
    Ok(units)
}

/// Removes the overrides of all units but those in `kept`, and has systemd look at its files again.
pub(crate) fn keep_overrides(root: &Sysroot, kept: &str) -> io::Result<()> {
    let kept: Vec<&str> = kept.split_whitespace().collect();
    for unit in overrides(root).map_err(into_io)?.iter().filter(|unit| !kept.contains(&unit.as_str())) {
        for folder in OVERRIDE_FOLDERS {
            let drop_ins = root.path(format!("{folder}/{unit}.d"));
            match fs::remove_file(drop_ins.join(OVERRIDE)) {
                Err(error) if is_gone(&error) => continue,
                other => other?,
            }
            // The folders too, where nothing else is in them.
            let _ = fs::remove_dir(drop_ins).and_then(|()| fs::remove_dir(root.path(folder)));
        }
    }
    if root.is_live() {
        command::run("systemctl", &["daemon-reload"], RELOAD_DEADLINE)?;
    }
    Ok(())
}

/// Makes a scope around a running process, with what PVE gives its VMs' scopes (PVE/QemuServer.pm, `vm_start`):
/// stopping it signals QEMU alone and never kills.
pub(crate) fn start_scope(scope: &str, slice: &str, pid: i32) -> io::Result<()> {
    let pid = pid.to_string();
    #[rustfmt::skip]
    let args = [
        "call", "--quiet", "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager",
        "StartTransientUnit", "ssa(sv)a(sa(sv))", scope, "fail",
        "5", "PIDs", "au", "1", &pid, "Slice", "s", slice, "KillMode", "s", "process", "SendSIGKILL", "b", "false",
        "TimeoutStopUSec", "t", "18446744073709551615",
        "0",
    ];
    command::run("busctl", &args, DEADLINE).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_as_systemctl_shows_them() {
        let text = "Id=system.slice\nAllowedCPUs=0-5 12-17\nLoadState=loaded\n\n\
                    Id=user.slice\nAllowedCPUs=\nLoadState=loaded\n\nId=x.slice\nAllowedCPUs=\nLoadState=not-found\n";
        let units = parse_show(text).unwrap();
        assert_eq!(units["system.slice"].to_string(), "0-5,12-17");
        assert!(units["user.slice"].is_empty());
        assert_eq!(units.len(), 2);
        assert!(parse_show("").unwrap().is_empty());
        assert!(parse_show("Id=a\nLoadState=loaded\nAllowedCPUs=x").is_err());
    }
}

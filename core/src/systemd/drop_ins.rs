//! Drop-ins below /run/systemd, which last until the next boot.

use crate::error::Result;
use crate::sysroot::Sysroot;

/// The folders in which `systemctl set-property --runtime` writes: for slices and services, and
/// for scopes.
pub(crate) const OVERRIDE_FOLDERS: [&str; 2] = [CONTROL, "run/systemd/transient"];

pub(crate) const CONTROL: &str = "run/systemd/system.control";

/// The name of its file for AllowedCPUs=.
pub(crate) const OVERRIDE: &str = "50-AllowedCPUs.conf";

/// Marks [`CONTROL`] as present and empty; no unit has a name with a slash.
pub(crate) const EMPTY: &str = "system.control/";

/// The units with AllowedCPUs= overridden until the next boot, sorted; also units with an empty
/// folder, and `system.control/` if that is empty, as a hook leaves them that was killed while it
/// removed the overrides.
///
/// # Errors
/// If the folders cannot be listed.
pub fn overrides(root: &Sysroot) -> Result<Vec<String>> {
    let mut units = Vec::new();
    for folder in OVERRIDE_FOLDERS {
        let names = match root.names(folder) {
            Err(error) if error.is_gone() => continue,
            names => names?,
        };
        if names.is_empty() && folder == CONTROL {
            units.push(EMPTY.to_owned());
        }
        let has_override = |unit: &&str| {
            is_there_or_emptied(root, &format!("{folder}/{unit}.d"), OVERRIDE) != Some(false)
        };
        units.extend(
            names
                .iter()
                .filter_map(|name| name.strip_suffix(".d"))
                .filter(has_override)
                .map(str::to_owned),
        );
    }
    units.sort();
    Ok(units)
}

/// Whether a drop-in exists; `None` if its folder does, but is empty.
fn is_there_or_emptied(root: &Sysroot, folder: &str, drop_in: &str) -> Option<bool> {
    let names = root.names(folder).unwrap_or_else(|_| vec![String::new()]);
    (!names.is_empty()).then(|| names.iter().any(|name| name == drop_in))
}

/// The drop-in that delegates the cpuset controller to a scope that will be made: systemd then does
/// not change the partition within it (systemd.resource-control(5), `Delegate=`;
/// CGROUP_DELEGATION.md).
pub(crate) fn delegation(scope: &str) -> String {
    format!("run/systemd/system/{scope}.d/50-pinfold.conf")
}

/// Whether the drop-in of [`delegation`] exists; `None` if a hook was killed that had removed it
/// and not yet its folder.
pub(crate) fn is_to_delegate(root: &Sysroot, scope: &str) -> Option<bool> {
    let file = delegation(scope);
    file.rsplit_once('/').map_or(Some(false), |(folder, name)| {
        is_there_or_emptied(root, folder, name)
    })
}

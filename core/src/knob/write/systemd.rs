//! Writes to systemd: units' properties and drop-ins.

use std::fs;
use std::io;
use std::path::Path;

use super::cgroup::set_cpus;
use crate::cpuset::CpuSet;
use crate::error::{into_io, is_gone};
use crate::host::Host;
use crate::sys::cgroup;
use crate::systemd::drop_ins::{CONTROL, EMPTY, OVERRIDE, OVERRIDE_FOLDERS, delegation, overrides};
use crate::systemd::{Called, Client, Writer, bitmap};

/// Sets a unit's AllowedCPUs= until the next boot; an empty list clears it.
pub(super) fn set_allowed_cpus(host: &Host, unit: &str, cpus: &CpuSet) -> io::Result<()> {
    let session = host.systemd();
    let failed = |error| {
        into_io(session.failed(format!("set AllowedCPUs={cpus} of {unit}"))(
            error,
        ))
    };
    let client = session.connect(host, session.timeouts().call);
    let Some(mut client) = client.map_err(failed)? else {
        return Err(io::Error::other(
            "units can be set on the running host only, not under --sysroot",
        ));
    };
    if cpus.is_empty() {
        // After the last unit that uses the controller systemd disables it. The kernel may then
        // leave threads on the CPUs of a cpuset that was still narrow: it compares only the first
        // thread's cpuset (cpuset_attach).
        clear_live(host, &mut client, unit)?;
    }
    set_property(&mut client, unit, cpus).map_err(failed)?;
    if cpus.is_empty() {
        // Clearing the property leaves the live cpuset as it is (systemd#43846), and another
        // process may have written it meanwhile.
        clear_live(host, &mut client, unit)?;
    }
    Ok(())
}

fn set_property(client: &mut Client, unit: &str, cpus: &CpuSet) -> Called<()> {
    let bits = bitmap(cpus);
    let mut body = Writer::default();
    // true: until the next boot.
    body.string(unit).bool(true).array(8, |properties| {
        properties.property("AllowedCPUs", "ay", |value| value.bytes(&bits));
    });
    client
        .manager("SetUnitProperties", "sba(sv)", body)
        .map(drop)
}

/// Clears the cpuset of a unit's cgroup, if it has one.
fn clear_live(host: &Host, client: &mut Client, unit: &str) -> io::Result<()> {
    let cgroup = if host.exists(cgroup::path(unit)) {
        Some(unit.to_owned())
    } else {
        let failed = host.systemd().failed(format!("find the cgroup of {unit}"));
        client
            .cgroup(unit)
            .map_err(|error| into_io(failed(error)))?
    };
    let Some(cgroup) = cgroup else { return Ok(()) };
    let live = host
        .read_value(cgroup::file(&cgroup, "cpuset.cpus"))
        .map_err(into_io)?;
    if live.is_none_or(|list| list.is_empty()) {
        return Ok(());
    }
    match set_cpus(host, &cgroup, &CpuSet::new()) {
        // systemd removes the cgroup of a slice that has become empty.
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

/// Removes the overrides of all units that are not in `units`, and reloads systemd.
pub(super) fn retain_overrides(host: &Host, units: &str) -> io::Result<()> {
    let retained: Vec<&str> = units.split_whitespace().collect();
    let units = overrides(host).map_err(into_io)?;
    for folder in OVERRIDE_FOLDERS {
        // The other folder is systemd's own: it is removed only after a drop-in written here.
        let mut emptied = folder == CONTROL;
        for unit in units
            .iter()
            .filter(|unit| !retained.contains(&unit.as_str()))
        {
            emptied |= remove_drop_in(&host.path(format!("{folder}/{unit}.d/{OVERRIDE}")))?;
        }
        let was_empty = folder == CONTROL && retained.contains(&EMPTY);
        if emptied && !was_empty {
            // This fails if the folder is not empty.
            let _ = fs::remove_dir(host.path(folder));
        }
    }
    reload(host)
}

/// Removes a drop-in, and its folder if nothing else is in it; returns whether the folder is gone.
fn remove_drop_in(file: &Path) -> io::Result<bool> {
    match fs::remove_file(file) {
        Err(error) if !is_gone(&error) => return Err(error),
        _ => {}
    }
    Ok(file
        .parent()
        .is_some_and(|folder| fs::remove_dir(folder).is_ok()))
}

/// Has systemd read all its units again.
fn reload(host: &Host) -> io::Result<()> {
    let session = host.systemd();
    let failed = |error| into_io(session.failed("reload".into())(error));
    match session
        .connect(host, session.timeouts().reload)
        .map_err(failed)?
    {
        Some(mut client) => client
            .manager("Reload", "", Writer::default())
            .map(drop)
            .map_err(failed),
        None => Ok(()),
    }
}

const DELEGATION: &str =
    "# Made by hook's pre-start and removed when the VM has stopped.\n[Scope]\nDelegate=cpuset\n";

/// Writes or removes the drop-in that has systemd delegate the cpuset controller to a new scope.
///
/// Without the reload systemd notices a new drop-in only in some cases; a removed one does not
/// matter to it.
pub(super) fn write_drop_in(host: &Host, scope: &str, wanted: bool) -> io::Result<()> {
    let file = host.path(delegation(scope));
    let folder = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    if wanted {
        fs::create_dir_all(folder)?;
        fs::write(&file, DELEGATION)?;
        return reload(host);
    }
    remove_drop_in(&file).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::BUS_SOCKET;
    use crate::systemd::drop_ins::is_to_delegate;
    use crate::systemd::fake::{fake, write};

    fn cpus(list: &str) -> CpuSet {
        CpuSet::from_kernel_list(list).unwrap()
    }

    #[test]
    fn units_are_set() {
        let (_dir, host, fake) = fake(BUS_SOCKET);
        set_allowed_cpus(&host, "x.slice", &cpus("0-5,12-17")).unwrap();
        assert_eq!(
            fake.calls().last().unwrap(),
            "/org/freedesktop/systemd1 SetUnitProperties sba(sv) x.slice"
        );
        let error = set_allowed_cpus(&host, "gone.scope", &cpus("0-5"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "systemd: set AllowedCPUs=0-5 of gone.scope: Unit gone.scope not found."
        );
        let error = set_allowed_cpus(&host, "denied.slice", &cpus("0-5"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("systemd: set AllowedCPUs=0-5 of denied.slice: Access denied"),
            "{error}"
        );
        assert_eq!(
            error.ends_with("; this needs root"),
            !nix::unistd::geteuid().is_root()
        );
    }

    #[test]
    fn clearing_a_unit_clears_its_live_cpuset() {
        let (_dir, host, _fake) = fake(BUS_SOCKET);
        for (unit, file) in [
            ("x.slice", "sys/fs/cgroup/x.slice/cpuset.cpus"),
            ("x-y.slice", "sys/fs/cgroup/x.slice/x-y.slice/cpuset.cpus"),
        ] {
            write(&host, file, "0-5\n");
            set_allowed_cpus(&host, unit, &cpus("")).unwrap();
            assert_eq!(host.read_value(file).unwrap().unwrap(), "", "{unit}");
        }
    }

    #[test]
    fn overrides_go_with_one_reload() {
        let (_dir, host, fake) = fake(BUS_SOCKET);
        for unit in [
            "system.control/x.slice",
            "system.control/y.slice",
            "transient/init.scope",
        ] {
            write(&host, &format!("run/systemd/{unit}.d/{OVERRIDE}"), "");
        }
        retain_overrides(&host, "y.slice").unwrap();
        assert_eq!(overrides(&host).unwrap(), ["y.slice"]);
        assert!(!host.exists("run/systemd/transient"));
        let reloads = fake
            .calls()
            .into_iter()
            .filter(|call| call == "/org/freedesktop/systemd1 Reload  ")
            .count();
        assert_eq!(reloads, 1, "{:?}", fake.calls());
    }

    #[test]
    fn what_a_killed_run_leaves_goes() {
        let (_dir, host, _fake) = fake(BUS_SOCKET);
        let make = |path: &str| fs::create_dir_all(host.path(path)).unwrap();
        make("run/systemd/system.control/x.slice.d");
        assert_eq!(overrides(&host).unwrap(), ["x.slice"]);
        retain_overrides(&host, "").unwrap();
        assert!(!host.exists("run/systemd/system.control"));
        make("run/systemd/system.control");
        assert_eq!(overrides(&host).unwrap(), [EMPTY]);
        retain_overrides(&host, EMPTY).unwrap();
        assert!(
            host.exists("run/systemd/system.control"),
            "it was so before"
        );
        retain_overrides(&host, "").unwrap();
        assert!(!host.exists("run/systemd/system.control"));
        make("run/systemd/system/100.scope.d");
        assert_eq!(is_to_delegate(&host, "100.scope"), None);
        write_drop_in(&host, "100.scope", true).unwrap();
        assert_eq!(is_to_delegate(&host, "100.scope"), Some(true));
        write_drop_in(&host, "100.scope", false).unwrap();
        make("run/systemd/transient");
        retain_overrides(&host, "").unwrap();
        assert!(
            host.exists("run/systemd/transient"),
            "nothing of ours was in it"
        );
        assert_eq!(is_to_delegate(&host, "100.scope"), Some(false));
        assert!(!host.exists("run/systemd/system/100.scope.d"));
    }

    #[test]
    fn a_captured_tree_has_no_units_to_set() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path());
        let error = set_allowed_cpus(&host, "x.slice", &cpus("0-5"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "units can be set on the running host only, not under --sysroot"
        );
        retain_overrides(&host, "").unwrap();
    }
}

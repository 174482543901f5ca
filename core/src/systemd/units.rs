//! Units: their AllowedCPUs=, delegation and cgroup; see org.freedesktop.systemd1(5),
//! systemd.resource-control(5).
//!
//! The calls are those of `systemctl`, without a process for each unit.

use std::collections::BTreeMap;

use super::dbus::{DbusError, Writer};
use super::session::{Called, Client, Session};
use crate::cpuset::{CpuSet, CpuSetError, MAX_CPU};
use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

/// Whether a cgroup's name is one that systemd gives its units.
pub fn is_unit_name(name: &str) -> bool {
    [".slice", ".scope", ".service"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

pub(super) const UNIT: &str = "org.freedesktop.systemd1.Unit";

/// The D-Bus interface of a unit's own kind, of those kinds that have a cgroup.
fn interface(unit: &str) -> Option<&'static str> {
    Some(match unit.rsplit_once('.')?.1 {
        "slice" => "org.freedesktop.systemd1.Slice",
        "scope" => "org.freedesktop.systemd1.Scope",
        "service" => "org.freedesktop.systemd1.Service",
        "mount" => "org.freedesktop.systemd1.Mount",
        "socket" => "org.freedesktop.systemd1.Socket",
        "swap" => "org.freedesktop.systemd1.Swap",
        _ => return None,
    })
}

/// CPUs as systemd has them over D-Bus: bit `n % 8` of byte `n / 8` is CPU `n`.
pub(crate) fn bitmap(cpus: &CpuSet) -> Vec<u8> {
    let mut bytes = vec![0; cpus.last().map_or(0, |last| last / 8 + 1)];
    for cpu in cpus.iter() {
        bytes[cpu / 8] |= 1 << (cpu % 8);
    }
    bytes
}

fn from_bitmap(bytes: &[u8]) -> std::result::Result<CpuSet, CpuSetError> {
    let is_set = |cpu: &usize| bytes[cpu / 8] & (1 << (cpu % 8)) != 0;
    let cpus = (0..bytes.len() * 8).filter(is_set);
    cpus.map(|cpu| {
        if cpu > MAX_CPU {
            Err(CpuSetError::TooLarge(cpu.to_string()))
        } else {
            Ok(cpu)
        }
    })
    .collect()
}

/// A unit's name as the last part of its object's path: `x_2eslice`; see sd_bus_path_encode(3).
pub(super) fn label(unit: &str) -> String {
    let plain =
        |at: usize, byte: u8| byte.is_ascii_alphabetic() || (at > 0 && byte.is_ascii_digit());
    let bytes = unit.bytes().enumerate();
    bytes
        .map(|(at, byte)| {
            if plain(at, byte) {
                char::from(byte).into()
            } else {
                format!("_{byte:02x}")
            }
        })
        .collect()
}

impl Client {
    /// A unit's object; `None` if the unit has another name, or the name is invalid.
    fn unit(&mut self, unit: &str) -> Called<Option<String>> {
        let mut body = Writer::default();
        body.string(unit);
        let path = match self.manager("LoadUnit", "s", body) {
            Err(DbusError::Refused { name, .. })
                if name == "org.freedesktop.DBus.Error.InvalidArgs" =>
            {
                return Ok(None);
            }
            message => message?.body("o")?.string()?.to_owned(),
        };
        Ok((path.rsplit('/').next() == Some(label(unit).as_str())).then_some(path))
    }

    /// A unit's AllowedCPUs= as a bitmap; `None` if it is not loaded or has no such setting.
    fn allowed_cpus(&mut self, unit: &str) -> Called<Option<Vec<u8>>> {
        let Some(interface) = interface(unit) else {
            return Ok(None);
        };
        let Some(path) = self.unit(unit)? else {
            return Ok(None);
        };
        if self.get_string(&path, UNIT, "LoadState")? != "loaded" {
            return Ok(None);
        }
        let message = self.get(&path, interface, "AllowedCPUs")?;
        Ok(Some(message.body("v")?.variant("ay")?.bytes()?.to_vec()))
    }

    fn is_delegated(&mut self, unit: &str, interface: &str) -> Called<bool> {
        let path = format!("/org/freedesktop/systemd1/unit/{}", label(unit));
        let message = self.get(&path, interface, "DelegateControllers")?;
        Ok(message
            .body("v")?
            .variant("as")?
            .strings()?
            .contains(&"cpuset"))
    }

    /// A unit's cgroup; `None` if it has none.
    pub(crate) fn cgroup(&mut self, unit: &str) -> Called<Option<String>> {
        let Some(interface) = interface(unit) else {
            return Ok(None);
        };
        let Some(path) = self.unit(unit)? else {
            return Ok(None);
        };
        self.get_string(&path, interface, "ControlGroup")
            .map(|cgroup| Some(cgroup).filter(|path| !path.is_empty()))
    }
}

/// The AllowedCPUs= of units, empty if unset; units that systemd does not know are left out.
///
/// # Errors
/// [`Error`] if systemd cannot be called or its reply cannot be parsed.
pub fn allowed_cpus_of(
    session: &Session,
    root: &Sysroot,
    units: &[String],
) -> Result<BTreeMap<String, CpuSet>> {
    let mut known = BTreeMap::new();
    let Some(first) = units.first() else {
        return Ok(known);
    };
    let failed = |unit: &str| session.failed(format!("read AllowedCPUs of {unit}"));
    let client = session.connect(root, session.timeouts().call);
    let Some(mut client) = client.map_err(failed(first))? else {
        return Ok(known);
    };
    for unit in units {
        if let Some(bytes) = client.allowed_cpus(unit).map_err(failed(unit))? {
            let cpus = from_bitmap(&bytes).map_err(|source| Error::Cpus {
                object: format!("{unit}: AllowedCPUs"),
                source,
            })?;
            known.insert(unit.clone(), cpus);
        }
    }
    Ok(known)
}

/// One unit's AllowedCPUs=; `None` if the unit does not exist.
///
/// # Errors
/// As [`allowed_cpus_of`].
pub(crate) fn allowed_cpus(
    session: &Session,
    root: &Sysroot,
    unit: &str,
) -> Result<Option<CpuSet>> {
    let mut units = allowed_cpus_of(session, root, &[unit.to_owned()])?;
    Ok(units.remove(unit))
}

/// Whether systemd has delegated the cpuset controller to a unit, so that it does not remove what
/// others create below that unit's cgroup.
///
/// # Errors
/// [`Error`] if systemd cannot be called or its reply cannot be parsed.
pub fn is_delegated(session: &Session, root: &Sysroot, unit: &str) -> Result<bool> {
    let failed = || session.failed(format!("read Delegate of {unit}"));
    let connected = session
        .connect(root, session.timeouts().call)
        .map_err(failed())?;
    let (Some(mut client), Some(interface)) = (connected, interface(unit)) else {
        return Ok(false);
    };
    client.is_delegated(unit, interface).map_err(failed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;
    use crate::systemd::fake::{fake, names, write};
    use crate::systemd::session::{BUS_SOCKET, PRIVATE_SOCKET};
    use proptest::prelude::*;

    #[test]
    fn units_are_read_on_one_connection() {
        let (_dir, host, fake) = fake(BUS_SOCKET);
        let asked = [
            "x.slice",
            "1.scope",
            "masked.service",
            "alias.service",
            "bad@.service",
            "lxc",
            "a.timer",
        ];
        let units = allowed_cpus_of(host.systemd(), &host, &names(&asked)).unwrap();
        assert_eq!(units["x.slice"].to_string(), "0-5,12-17");
        assert!(units["1.scope"].is_empty());
        assert_eq!(units.len(), 2, "{units:?}");
        assert_eq!(
            allowed_cpus(host.systemd(), &host, "masked.service").unwrap(),
            None
        );
        let calls = fake.calls();
        assert_eq!(
            calls.iter().filter(|call| call.contains(" Hello")).count(),
            1,
            "{calls:?}"
        );
        assert!(
            calls.contains(&"/org/freedesktop/systemd1 LoadUnit s x.slice".to_owned()),
            "{calls:?}"
        );
        let get = "/org/freedesktop/systemd1/unit/_31_2escope Get ss org.freedesktop.systemd1.Scope AllowedCPUs";
        assert!(calls.contains(&get.to_owned()), "{calls:?}");
        assert!(
            allowed_cpus_of(host.systemd(), &host, &[])
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn odd_answers_are_errors_that_name_the_unit() {
        let (_dir, host, _fake) = fake(BUS_SOCKET);
        for (unit, words) in [
            (
                "odd.slice",
                "systemd: read AllowedCPUs of odd.slice: invalid reply: a value of the wrong type",
            ),
            (
                "huge.slice",
                "huge.slice: AllowedCPUs: CPU 8192 is beyond 8191, the largest CPU number the kernel knows",
            ),
        ] {
            assert_eq!(
                allowed_cpus(host.systemd(), &host, unit)
                    .unwrap_err()
                    .to_string(),
                words
            );
        }
    }

    #[test]
    fn as_root_systemd_itself_is_asked() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: systemd's own socket is for root");
            return;
        }
        let (_dir, host, fake) = fake(PRIVATE_SOCKET);
        let cpus = allowed_cpus(host.systemd(), &host, "x.slice").unwrap();
        assert_eq!(cpus.unwrap().to_string(), "0-5,12-17");
        assert!(fake.calls().iter().all(|call| !call.contains("Hello")));
    }

    #[test]
    fn a_captured_tree_has_no_units() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path());
        assert!(
            allowed_cpus_of(host.systemd(), &host, &names(&["x.slice"]))
                .unwrap()
                .is_empty()
        );
        // No process listens on a socket that was copied along.
        write(&host, BUS_SOCKET, "");
        assert!(
            allowed_cpus_of(host.systemd(), &host, &names(&["x.slice"]))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn labels_as_systemd_makes_them() {
        for (unit, path) in [
            ("system.slice", "system_2eslice"),
            ("100.scope", "_3100_2escope"),
            ("user@0.service", "user_400_2eservice"),
            ("a-b_c.slice", "a_2db_5fc_2eslice"),
            ("-.slice", "_2d_2eslice"),
        ] {
            assert_eq!(label(unit), path);
        }
    }

    #[test]
    fn bitmaps() {
        for (list, bytes) in [
            ("", &[][..]),
            ("0", &[1]),
            ("0-5,12-17", &[0x3f, 0xf0, 0x03]),
            ("64", &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ] {
            let cpus = CpuSet::from_kernel_list(list).unwrap();
            assert_eq!(bitmap(&cpus), bytes, "{list}");
            assert_eq!(from_bitmap(bytes).unwrap(), cpus);
        }
        assert!(from_bitmap(&[0; 4000]).unwrap().is_empty());
        assert!(from_bitmap(&[1; 1025]).is_err());
    }

    proptest! {
        #[test]
        fn bitmaps_survive(cpus in prop::collection::btree_set(0..=MAX_CPU, 0..40)) {
            let cpus: CpuSet = cpus.into_iter().collect();
            prop_assert_eq!(from_bitmap(&bitmap(&cpus)).unwrap(), cpus);
        }
    }
}

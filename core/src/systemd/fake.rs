//! A fake systemd for tests.

use std::fs;

use super::dbus::Writer;
pub(crate) use super::dbus::fake::{Answer, Fake};
use super::units::{UNIT, label};
use crate::host::Host;
use crate::sysroot::Sysroot;

/// A systemd with x.slice and x-y.slice (0-5,12-17), the unset 1.scope, and masked.service, on
/// the bus.
pub(crate) fn answer(path: &str, member: &str, body: &[&str]) -> Answer {
    let mut reply = Writer::default();
    let variant = |signature: &str, fill: &dyn Fn(&mut Writer)| {
        let mut reply = Writer::default();
        reply.variant(signature);
        fill(&mut reply);
        Ok(("v", reply))
    };
    match (member, body) {
        ("Hello", _) => {
            reply.string(":1.7");
            Ok(("s", reply))
        }
        ("LoadUnit", ["alias.service"]) => {
            reply.string("/org/freedesktop/systemd1/unit/real_2eservice");
            Ok(("o", reply))
        }
        ("LoadUnit", ["bad@.service"]) => Err((
            "org.freedesktop.DBus.Error.InvalidArgs",
            "Unit name bad@.service is not valid.",
        )),
        ("LoadUnit", [unit, ..]) => {
            reply.string(&format!("/org/freedesktop/systemd1/unit/{}", label(unit)));
            Ok(("o", reply))
        }
        ("Get", [UNIT, "LoadState"]) => {
            let state = if path.contains("masked") {
                "masked"
            } else {
                "loaded"
            };
            variant("s", &|value| {
                value.string(state);
            })
        }
        ("Get", ["org.freedesktop.systemd1.Slice", "AllowedCPUs"])
            if path.ends_with("/huge_2eslice") =>
        {
            variant("ay", &|value| {
                value.bytes(&[0xff; 2000]);
            })
        }
        ("Get", ["org.freedesktop.systemd1.Slice", "AllowedCPUs"])
            if path.ends_with("/odd_2eslice") =>
        {
            variant("s", &|value| {
                value.string("0-5");
            })
        }
        ("Get", ["org.freedesktop.systemd1.Slice", "AllowedCPUs"]) => variant("ay", &|value| {
            value.bytes(&[0x3f, 0xf0, 0x03, 0, 0, 0, 0, 0]);
        }),
        ("Get", ["org.freedesktop.systemd1.Scope", "AllowedCPUs"]) => variant("ay", &|value| {
            value.bytes(&[]);
        }),
        ("Get", ["org.freedesktop.systemd1.Slice", "ControlGroup"]) => variant("s", &|value| {
            value.string("/x.slice/x-y.slice");
        }),
        ("SetUnitProperties", ["gone.scope", ..]) => Err((
            "org.freedesktop.systemd1.NoSuchUnit",
            "Unit gone.scope not found.",
        )),
        ("SetUnitProperties", ["denied.slice", ..]) => {
            Err(("org.freedesktop.DBus.Error.AccessDenied", "Access denied"))
        }
        ("SetUnitProperties" | "Reload", _) => Ok(("", reply)),
        ("StopUnit", ["pinfold-threads-404.timer", ..]) => Err((
            "org.freedesktop.systemd1.NoSuchUnit",
            "Unit pinfold-threads-404.timer not loaded.",
        )),
        ("StartTransientUnit" | "StopUnit", _) => {
            reply.string("/org/freedesktop/systemd1/job/7");
            Ok(("o", reply))
        }
        _ => Err(("org.freedesktop.DBus.Error.UnknownMethod", "")),
    }
}

/// A host with a systemd that listens at `socket`.
pub(crate) fn fake(socket: &str) -> (tempfile::TempDir, Host, Fake) {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new(dir.path());
    fs::create_dir_all(host.path(socket).parent().unwrap()).unwrap();
    let fake = Fake::start(&host.path(socket), answer);
    (dir, host, fake)
}

pub(crate) fn names(units: &[&str]) -> Vec<String> {
    units.iter().map(|unit| (*unit).to_owned()).collect()
}

pub(crate) fn write(root: &Sysroot, path: &str, text: &str) {
    let path = root.path(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

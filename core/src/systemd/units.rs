//! Units' AllowedCPUs=, by calls to systemd over D-Bus; see org.freedesktop.systemd1(5),
//! systemd.resource-control(5).
//!
//! What `systemctl` does too, less a process for each unit.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cpuset::{CpuSet, CpuSetError, MAX_CPU};
use crate::error::{Error, Result, is_gone};
use crate::knob::{cpu_list, into_io};
use crate::sys::cgroup;
use crate::sysroot::Sysroot;
use crate::systemd::dbus::{Connection, DbusError, Message, Method, Writer};

/// How long systemd is waited for, and over which connection it is called.
#[derive(Debug, Clone)]
pub struct Patience {
    /// For one call.
    pub call: Duration,
    /// For all units to be read again.
    pub reload: Duration,
    /// It has let a deadline pass: one that hangs is not waited for again in the same run.
    hangs: Arc<AtomicBool>,
    /// The connection of the last call, for the next one: to be let in takes longer than a call.
    open: Arc<Mutex<Option<Connection>>>,
}

impl Patience {
    /// So long, in seconds.
    pub fn new(call: u64, reload: u64) -> Self {
        Self {
            call: Duration::from_secs(call),
            reload: Duration::from_secs(reload),
            hangs: Arc::default(),
            open: Arc::default(),
        }
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new(10, 60)
    }
}

/// systemd's own socket, for root alone: there is no bus in between that has to run.
const PRIVATE_SOCKET: &str = "run/systemd/private";
/// The system bus, for everybody.
const BUS_SOCKET: &str = "run/dbus/system_bus_socket";

const NAME: &str = "org.freedesktop.systemd1";
const UNIT: &str = "org.freedesktop.systemd1.Unit";

/// Whether a cgroup's name is one that systemd gives its units.
pub fn is_unit_name(name: &str) -> bool {
    [".slice", ".scope", ".service"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

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

/// Calls to systemd, on one connection, which goes back to where it is kept afterwards.
struct Systemd {
    connection: Option<Connection>,
    kept: Arc<Mutex<Option<Connection>>>,
}

impl Drop for Systemd {
    fn drop(&mut self) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = self.connection.take();
    }
}

type Called<T> = std::result::Result<T, DbusError>;

impl Systemd {
    /// Connects, as root past the bus where that can be; `None` where a captured tree has no
    /// systemd behind it.
    fn connect(root: &Sysroot, patience: Duration) -> Called<Option<Self>> {
        if root.patience().hangs.load(Ordering::Relaxed) {
            return Err(DbusError::Late(patience));
        }
        let kept = Arc::clone(&root.patience().open);
        let open = kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .filter(Connection::is_usable);
        let connection = match open {
            Some(open) => Some(open.with_patience(patience)),
            None => Self::open(root, patience)?,
        };
        Ok(connection.map(|connection| Self {
            connection: Some(connection),
            kept,
        }))
    }

    fn open(root: &Sysroot, patience: Duration) -> Called<Option<Connection>> {
        if nix::unistd::geteuid().is_root() {
            match Connection::open(&root.path(PRIVATE_SOCKET), patience) {
                Err(DbusError::Unreachable(_)) => {}
                connection => return connection.map(Some),
            }
        }
        let mut connection = match Connection::open(&root.path(BUS_SOCKET), patience) {
            Err(DbusError::Unreachable(_)) if !root.is_live() => return Ok(None),
            connection => connection?,
        };
        let bus = "org.freedesktop.DBus";
        let hello = Method {
            destination: bus,
            path: "/org/freedesktop/DBus",
            interface: bus,
            member: "Hello",
        };
        connection.call(hello, "", Writer::default())?;
        Ok(Some(connection))
    }

    fn call(&mut self, method: Method<'_>, signature: &str, body: Writer) -> Called<Message> {
        // Taken out at the end alone.
        let connection = self
            .connection
            .as_mut()
            .ok_or(DbusError::Closed(io::ErrorKind::NotConnected.into()))?;
        connection.call(method, signature, body)
    }

    fn manager(&mut self, member: &str, signature: &str, body: Writer) -> Called<Message> {
        let interface = "org.freedesktop.systemd1.Manager";
        let method = Method {
            destination: NAME,
            path: "/org/freedesktop/systemd1",
            interface,
            member,
        };
        self.call(method, signature, body)
    }

    /// A unit's object; `None` where the unit has another name, or its name is none.
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

    fn get(&mut self, path: &str, interface: &str, property: &str) -> Called<Message> {
        let mut body = Writer::default();
        body.string(interface).string(property);
        let member = "Get";
        let method = Method {
            destination: NAME,
            path,
            interface: "org.freedesktop.DBus.Properties",
            member,
        };
        self.call(method, "ss", body)
    }

    fn get_string(&mut self, path: &str, interface: &str, property: &str) -> Called<String> {
        self.get(path, interface, property)?
            .body("v")?
            .variant("s")?
            .string()
            .map(str::to_owned)
    }

    /// A unit's AllowedCPUs= as a bitmap; `None` where it is not loaded or its kind has none.
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

    fn set_allowed_cpus(&mut self, unit: &str, cpus: &CpuSet) -> Called<()> {
        let bitmap = bitmap(cpus);
        let mut body = Writer::default();
        // true: until the next boot.
        body.string(unit).bool(true).array(8, |properties| {
            properties.property("AllowedCPUs", "ay", |value| value.bytes(&bitmap));
        });
        self.manager("SetUnitProperties", "sba(sv)", body).map(drop)
    }

    /// A unit's cgroup; `None` where it has none.
    fn cgroup(&mut self, unit: &str) -> Called<Option<String>> {
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

/// A unit's name as the last part of its object's path: `x_2eslice`; see sd_bus_path_encode(3).
fn label(unit: &str) -> String {
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

/// CPUs as systemd has them over D-Bus: bit `n % 8` of byte `n / 8` is CPU `n`.
fn bitmap(cpus: &CpuSet) -> Vec<u8> {
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

/// A failed call in words that say what was tried.
fn failed(root: &Sysroot, tried: String) -> impl FnOnce(DbusError) -> Error {
    move |error| {
        if matches!(error, DbusError::Late(_)) {
            root.patience().hangs.store(true, Ordering::Relaxed);
        }
        let needs_root = error.is_denied() && !nix::unistd::geteuid().is_root();
        Error::unusable(
            "systemd",
            format!(
                "{tried}: {error}{}",
                if needs_root { "; this needs root" } else { "" }
            ),
        )
    }
}

/// The AllowedCPUs= of units, empty where unset; units that systemd does not know are left out.
///
/// # Errors
/// Where systemd cannot be asked or understood.
pub fn allowed_cpus_of(root: &Sysroot, units: &[String]) -> Result<BTreeMap<String, CpuSet>> {
    let mut known = BTreeMap::new();
    let Some(first) = units.first() else {
        return Ok(known);
    };
    let tried = |unit: &str| failed(root, format!("read AllowedCPUs of {unit}"));
    let Some(mut systemd) = Systemd::connect(root, root.patience().call).map_err(tried(first))?
    else {
        return Ok(known);
    };
    for unit in units {
        if let Some(bytes) = systemd.allowed_cpus(unit).map_err(tried(unit))? {
            let object = || format!("{unit}: AllowedCPUs");
            let cpus = from_bitmap(&bytes).map_err(|source| Error::Cpus {
                object: object(),
                source,
            })?;
            known.insert(unit.clone(), cpus);
        }
    }
    Ok(known)
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
    let tried = || failed(root, format!("set AllowedCPUs={cpus} of {unit}"));
    let set = cpu_list(unit, cpus).map_err(into_io)?;
    let systemd =
        Systemd::connect(root, root.patience().call).map_err(|error| into_io(tried()(error)))?;
    let Some(mut systemd) = systemd else {
        return Err(io::Error::other(
            "units can be set on the running host only, not under --sysroot",
        ));
    };
    if set.is_empty() {
        // With the last unit that uses the controller systemd takes it away, and the kernel may
        // then leave threads on the CPUs of a cpuset that was still narrow: it compares the first
        // thread's cpuset alone (cpuset_attach).
        clear_live(root, &mut systemd, unit)?;
    }
    systemd
        .set_allowed_cpus(unit, &set)
        .map_err(|error| into_io(tried()(error)))?;
    if set.is_empty() {
        // Cleared, the property leaves the live cpuset as it is (systemd#43846); somebody may have
        // had it written meanwhile.
        clear_live(root, &mut systemd, unit)?;
    }
    Ok(())
}

/// Clears the cpuset of a unit's cgroup, where it has one.
fn clear_live(root: &Sysroot, systemd: &mut Systemd, unit: &str) -> io::Result<()> {
    let cgroup = match root.exists(cgroup::path(unit)) {
        true => Some(unit.to_owned()),
        false => systemd
            .cgroup(unit)
            .map_err(|error| into_io(failed(root, format!("find the cgroup of {unit}"))(error)))?,
    };
    let Some(cgroup) = cgroup else { return Ok(()) };
    let live = root
        .read_value(cgroup::file(&cgroup, "cpuset.cpus"))
        .map_err(into_io)?;
    if live.is_none_or(|list| list.is_empty()) {
        return Ok(());
    }
    match cgroup::set_cpus(root, &cgroup, "") {
        // systemd removes the cgroup of a slice that has become empty.
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

/// Where `systemctl set-property --runtime` keeps what it was told: slices and services, and
/// scopes.
const OVERRIDE_FOLDERS: [&str; 2] = [CONTROL, "run/systemd/transient"];
const CONTROL: &str = "run/systemd/system.control";
/// The name of its file for AllowedCPUs=.
const OVERRIDE: &str = "50-AllowedCPUs.conf";

/// Says of [`CONTROL`] that it is there and empty; no unit has a name with a slash.
const EMPTY: &str = "system.control/";

/// The units whose AllowedCPUs= is overridden until the next boot, sorted; those too whose folder
/// is there and empty, and `system.control/` where that is, as a hook that was killed while it took
/// the overrides back leaves them.
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

/// Removes the overrides of all units but those in `kept`, and has systemd look at its files again.
pub(crate) fn keep_overrides(root: &Sysroot, kept: &str) -> io::Result<()> {
    let kept: Vec<&str> = kept.split_whitespace().collect();
    let units = overrides(root).map_err(into_io)?;
    for folder in OVERRIDE_FOLDERS {
        // The other one is systemd's own, and goes with a drop-in of ours alone.
        let mut emptied = folder == CONTROL;
        for unit in units.iter().filter(|unit| !kept.contains(&unit.as_str())) {
            emptied |= remove_drop_in(&root.path(format!("{folder}/{unit}.d/{OVERRIDE}")))?;
        }
        let was_empty = folder == CONTROL && kept.contains(&EMPTY);
        if emptied && !was_empty {
            // Where nothing else is in it.
            let _ = fs::remove_dir(root.path(folder));
        }
    }
    reload(root)
}

/// Whether a drop-in is there; nothing where its folder is, with nothing in it.
fn is_there_or_emptied(root: &Sysroot, folder: &str, drop_in: &str) -> Option<bool> {
    let names = root.names(folder).unwrap_or_else(|_| vec![String::new()]);
    (!names.is_empty()).then(|| names.iter().any(|name| name == drop_in))
}

/// Removes a drop-in, and its folder where nothing else is in it; says whether that went.
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
fn reload(root: &Sysroot) -> io::Result<()> {
    let words = |error| into_io(failed(root, "reload".into())(error));
    match Systemd::connect(root, root.patience().reload).map_err(words)? {
        Some(mut systemd) => systemd
            .manager("Reload", "", Writer::default())
            .map(drop)
            .map_err(words),
        None => Ok(()),
    }
}

/// The drop-in by which a scope that is yet to be made has the cpuset controller delegated: to the
/// partition within it systemd keeps its hands off then (systemd.resource-control(5), `Delegate=`;
/// CGROUP_DELEGATION.md).
fn delegation(scope: &str) -> String {
    format!("run/systemd/system/{scope}.d/50-pinfold.conf")
}

const DELEGATION: &str =
    "# Made by hook's pre-start and removed when the VM has stopped.\n[Scope]\nDelegate=cpuset\n";

/// Whether the drop-in of [`delegate`] is there; nothing where a hook was killed that had removed
/// it and not yet its folder.
pub(crate) fn is_to_delegate(root: &Sysroot, scope: &str) -> Option<bool> {
    let file = delegation(scope);
    file.rsplit_once('/').map_or(Some(false), |(folder, name)| {
        is_there_or_emptied(root, folder, name)
    })
}

/// Has systemd delegate the cpuset controller to a scope when it is made, or no more. Without the
/// reload it sees a new drop-in in some cases only; one that has gone is no matter to it.
pub(crate) fn delegate(root: &Sysroot, scope: &str, wanted: bool) -> io::Result<()> {
    let file = root.path(delegation(scope));
    let folder = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    if wanted {
        fs::create_dir_all(folder)?;
        fs::write(&file, DELEGATION)?;
        return reload(root);
    }
    remove_drop_in(&file).map(drop)
}

/// Whether systemd has delegated the cpuset controller to a unit, so that it does not take away
/// what is made within.
///
/// # Errors
/// Where systemd cannot be asked or understood.
pub fn is_delegated(root: &Sysroot, unit: &str) -> Result<bool> {
    let words = || failed(root, format!("read Delegate of {unit}"));
    let connected = Systemd::connect(root, root.patience().call).map_err(|error| words()(error))?;
    let (Some(mut systemd), Some(interface)) = (connected, interface(unit)) else {
        return Ok(false);
    };
    systemd.is_delegated(unit, interface).map_err(words())
}

/// Makes a scope around a running process, with what PVE gives its VMs' scopes (PVE/QemuServer.pm,
/// `vm_start`): stopping it signals QEMU alone and never kills. It answers before the process is in
/// it.
pub(crate) fn start_scope(root: &Sysroot, scope: &str, slice: &str, pid: i32) -> io::Result<()> {
    let words = |error| {
        into_io(failed(root, format!("make {scope} around process {pid}"))(
            error,
        ))
    };
    let process = u32::try_from(pid).map_err(io::Error::other)?;
    let Some(mut systemd) = Systemd::connect(root, root.patience().call).map_err(words)? else {
        return Err(io::Error::other(
            "scopes can be made on the running host only, not under --sysroot",
        ));
    };
    let mut body = Writer::default();
    body.string(scope).string("fail").array(8, |properties| {
        properties.property("PIDs", "au", |value| {
            value.array(4, |pids| {
                pids.u32(process);
            })
        });
        properties.property("Slice", "s", |value| value.string(slice));
        properties.property("KillMode", "s", |value| value.string("process"));
        properties.property("SendSIGKILL", "b", |value| value.bool(false));
        properties.property("TimeoutStopUSec", "t", |value| value.u64(u64::MAX));
    });
    // No further units.
    body.array(8, |_| {});
    systemd
        .manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        .map(drop)
        .map_err(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::dbus::fake::{Answer, Fake};
    use proptest::prelude::*;

    /// A systemd with x.slice and x-y.slice (0-5,12-17), the unset 1.scope, and masked.service, on
    /// the bus.
    fn answer(path: &str, member: &str, body: &[&str]) -> Answer {
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
            ("StartTransientUnit", _) => {
                reply.string("/org/freedesktop/systemd1/job/7");
                Ok(("o", reply))
            }
            _ => Err(("org.freedesktop.DBus.Error.UnknownMethod", "")),
        }
    }

    fn fake(socket: &str) -> (tempfile::TempDir, Sysroot, Fake) {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        fs::create_dir_all(root.path(socket).parent().unwrap()).unwrap();
        let fake = Fake::start(&root.path(socket), answer);
        (dir, root, fake)
    }

    fn names(units: &[&str]) -> Vec<String> {
        units.iter().map(|unit| (*unit).to_owned()).collect()
    }

    fn write(root: &Sysroot, path: &str, text: &str) {
        let path = root.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn units_are_read_on_one_connection() {
        let (_dir, root, fake) = fake(BUS_SOCKET);
        let asked = [
            "x.slice",
            "1.scope",
            "masked.service",
            "alias.service",
            "bad@.service",
            "lxc",
            "a.timer",
        ];
        let units = allowed_cpus_of(&root, &names(&asked)).unwrap();
        assert_eq!(units["x.slice"].to_string(), "0-5,12-17");
        assert!(units["1.scope"].is_empty());
        assert_eq!(units.len(), 2, "{units:?}");
        assert_eq!(allowed_cpus(&root, "masked.service").unwrap(), None);
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
        assert!(allowed_cpus_of(&root, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_connection_that_ended_is_replaced() {
        let (dir, root, fake) = fake(BUS_SOCKET);
        assert!(allowed_cpus(&root, "x.slice").unwrap().is_some());
        // As with `systemctl daemon-reexec`.
        fake.hang_up();
        fs::remove_file(dir.path().join(BUS_SOCKET)).unwrap();
        let again = Fake::start(&root.path(BUS_SOCKET), answer);
        assert!(allowed_cpus(&root, "x.slice").unwrap().is_some());
        assert_eq!(
            again
                .calls()
                .iter()
                .filter(|call| call.contains(" Hello"))
                .count(),
            1
        );
    }

    #[test]
    fn odd_answers_are_errors_that_name_the_unit() {
        let (_dir, root, _fake) = fake(BUS_SOCKET);
        for (unit, words) in [
            (
                "odd.slice",
                "systemd: read AllowedCPUs of odd.slice: it sends garbage: a value of another type",
            ),
            (
                "huge.slice",
                "huge.slice: AllowedCPUs: CPU 8192 is beyond 8191, the largest CPU number the kernel knows",
            ),
        ] {
            assert_eq!(allowed_cpus(&root, unit).unwrap_err().to_string(), words);
        }
    }

    #[test]
    fn as_root_systemd_itself_is_asked() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: systemd's own socket is for root");
            return;
        }
        let (_dir, root, fake) = fake(PRIVATE_SOCKET);
        assert_eq!(
            allowed_cpus(&root, "x.slice").unwrap().unwrap(),
            "0-5,12-17"
        );
        assert!(fake.calls().iter().all(|call| !call.contains("Hello")));
    }

    #[test]
    fn units_are_set() {
        let (_dir, root, fake) = fake(BUS_SOCKET);
        set_allowed_cpus(&root, "x.slice", "0-5,12-17").unwrap();
        assert_eq!(
            fake.calls().last().unwrap(),
            "/org/freedesktop/systemd1 SetUnitProperties sba(sv) x.slice"
        );
        let error = set_allowed_cpus(&root, "gone.scope", "0-5")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "systemd: set AllowedCPUs=0-5 of gone.scope: Unit gone.scope not found."
        );
        let error = set_allowed_cpus(&root, "denied.slice", "0-5")
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
        let (_dir, root, _fake) = fake(BUS_SOCKET);
        for (unit, file) in [
            ("x.slice", "sys/fs/cgroup/x.slice/cpuset.cpus"),
            ("x-y.slice", "sys/fs/cgroup/x.slice/x-y.slice/cpuset.cpus"),
        ] {
            write(&root, file, "0-5\n");
            set_allowed_cpus(&root, unit, "").unwrap();
            assert_eq!(root.read_value(file).unwrap().unwrap(), "", "{unit}");
        }
    }

    #[test]
    fn overrides_go_with_one_reload() {
        let (_dir, root, fake) = fake(BUS_SOCKET);
        for unit in [
            "system.control/x.slice",
            "system.control/y.slice",
            "transient/init.scope",
        ] {
            write(&root, &format!("run/systemd/{unit}.d/{OVERRIDE}"), "");
        }
        keep_overrides(&root, "y.slice").unwrap();
        assert_eq!(overrides(&root).unwrap(), ["y.slice"]);
        assert!(!root.exists("run/systemd/transient"));
        let reloads = fake
            .calls()
            .into_iter()
            .filter(|call| call == "/org/freedesktop/systemd1 Reload  ")
            .count();
        assert_eq!(reloads, 1, "{:?}", fake.calls());
    }

    #[test]
    fn what_a_killed_run_leaves_goes() {
        let (_dir, root, _fake) = fake(BUS_SOCKET);
        let make = |path: &str| fs::create_dir_all(root.path(path)).unwrap();
        make("run/systemd/system.control/x.slice.d");
        assert_eq!(overrides(&root).unwrap(), ["x.slice"]);
        keep_overrides(&root, "").unwrap();
        assert!(!root.exists("run/systemd/system.control"));
        make("run/systemd/system.control");
        assert_eq!(overrides(&root).unwrap(), [EMPTY]);
        keep_overrides(&root, EMPTY).unwrap();
        assert!(
            root.exists("run/systemd/system.control"),
            "it was so before"
        );
        keep_overrides(&root, "").unwrap();
        assert!(!root.exists("run/systemd/system.control"));
        make("run/systemd/system/100.scope.d");
        assert_eq!(is_to_delegate(&root, "100.scope"), None);
        delegate(&root, "100.scope", true).unwrap();
        assert_eq!(is_to_delegate(&root, "100.scope"), Some(true));
        delegate(&root, "100.scope", false).unwrap();
        make("run/systemd/transient");
        keep_overrides(&root, "").unwrap();
        assert!(
            root.exists("run/systemd/transient"),
            "nothing of ours was in it"
        );
        assert_eq!(is_to_delegate(&root, "100.scope"), Some(false));
        assert!(!root.exists("run/systemd/system/100.scope.d"));
    }

    #[test]
    fn a_scope_is_asked_for() {
        let (_dir, root, fake) = fake(BUS_SOCKET);
        start_scope(&root, "100.scope", "qemu.slice", 4711).unwrap();
        let call = "/org/freedesktop/systemd1 StartTransientUnit ssa(sv)a(sa(sv)) 100.scope fail";
        assert_eq!(fake.calls().last().unwrap(), call);
        assert!(start_scope(&root, "100.scope", "qemu.slice", -1).is_err());
    }

    #[test]
    fn a_captured_tree_has_no_units() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert!(
            allowed_cpus_of(&root, &names(&["x.slice"]))
                .unwrap()
                .is_empty()
        );
        let error = set_allowed_cpus(&root, "x.slice", "0-5")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "units can be set on the running host only, not under --sysroot"
        );
        keep_overrides(&root, "").unwrap();
        // A socket that was copied along has nobody behind it.
        write(&root, BUS_SOCKET, "");
        assert!(
            allowed_cpus_of(&root, &names(&["x.slice"]))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_systemd_that_hangs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let _silent: Vec<_> = [PRIVATE_SOCKET, BUS_SOCKET]
            .iter()
            .map(|socket| {
                fs::create_dir_all(root.path(socket).parent().unwrap()).unwrap();
                std::os::unix::net::UnixListener::bind(root.path(socket)).unwrap()
            })
            .collect();
        let error = Systemd::connect(&root, Duration::from_millis(50))
            .map(drop)
            .unwrap_err();
        let error = failed(&root, "reload".into())(error).to_string();
        assert_eq!(error, "systemd: reload: no answer within 0.05 s");
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

//! A session with systemd: timeouts, one connection that is used again, and the calls on it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::dbus::{Connection, DbusError, Message, Method, Writer};
use crate::error::Error;
use crate::sysroot::Sysroot;

/// How long systemd may take to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For one call.
    pub call: Duration,
    /// For reloading all units.
    pub reload: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(10),
            reload: Duration::from_secs(60),
        }
    }
}

/// A session with systemd. Clones share its connection.
#[derive(Debug, Clone, Default)]
pub struct Session {
    timeouts: Timeouts,
    /// Whether a call has timed out: a systemd that hangs is not called again in the same run.
    hangs: Arc<AtomicBool>,
    /// The connection of the last call, for the next one: authenticating takes longer than a call.
    idle_connection: Arc<Mutex<Option<Connection>>>,
}

impl Session {
    /// A session that is not connected yet.
    pub fn new(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            ..Self::default()
        }
    }

    /// How long systemd may take to answer.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Connects within `timeout`, or takes the idle connection. `None` if the tree below `root` has
    /// no systemd behind it.
    pub(crate) fn connect(&self, root: &Sysroot, timeout: Duration) -> Called<Option<Client>> {
        if self.hangs.load(Ordering::Relaxed) {
            return Err(DbusError::Late(timeout));
        }
        let idle_connection = Arc::clone(&self.idle_connection);
        let idle = idle_connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .filter(Connection::is_usable);
        let connection = match idle {
            Some(idle) => Some(idle.with_timeout(timeout)),
            None => open(root, timeout)?,
        };
        Ok(connection.map(|connection| Client {
            connection: Some(connection),
            idle_connection,
        }))
    }

    /// A failed call as an error that names what was `tried`.
    pub(crate) fn failed(&self, tried: String) -> impl FnOnce(DbusError) -> Error + use<> {
        let hangs = Arc::clone(&self.hangs);
        move |error| {
            if matches!(error, DbusError::Late(_)) {
                hangs.store(true, Ordering::Relaxed);
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
}

/// systemd's own socket, for root only; it needs no running bus.
pub(crate) const PRIVATE_SOCKET: &str = "run/systemd/private";

/// The system bus, for every user.
pub(crate) const BUS_SOCKET: &str = "run/dbus/system_bus_socket";

const NAME: &str = "org.freedesktop.systemd1";

/// Calls on one connection, which goes back to its session when this is dropped.
pub(crate) struct Client {
    connection: Option<Connection>,
    idle_connection: Arc<Mutex<Option<Connection>>>,
}

impl Drop for Client {
    fn drop(&mut self) {
        *self
            .idle_connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = self.connection.take();
    }
}

pub(crate) type Called<T> = std::result::Result<T, DbusError>;

/// Opens a connection: to systemd itself if we are root, else over the bus. `None` if the tree
/// below `root` has no systemd behind it.
fn open(root: &Sysroot, timeout: Duration) -> Called<Option<Connection>> {
    if nix::unistd::geteuid().is_root() {
        match Connection::open(&root.path(PRIVATE_SOCKET), timeout) {
            Err(DbusError::Unreachable(_)) => {}
            connection => return connection.map(Some),
        }
    }
    let mut connection = match Connection::open(&root.path(BUS_SOCKET), timeout) {
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

impl Client {
    fn call(&mut self, method: Method<'_>, signature: &str, body: Writer) -> Called<Message> {
        // It is taken only when this is dropped.
        let connection = self
            .connection
            .as_mut()
            .ok_or(DbusError::Closed(io::ErrorKind::NotConnected.into()))?;
        connection.call(method, signature, body)
    }

    /// Calls a method of the manager object.
    pub(crate) fn manager(
        &mut self,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> Called<Message> {
        let interface = "org.freedesktop.systemd1.Manager";
        let method = Method {
            destination: NAME,
            path: "/org/freedesktop/systemd1",
            interface,
            member,
        };
        self.call(method, signature, body)
    }

    /// A property of an object.
    pub(crate) fn get(&mut self, path: &str, interface: &str, property: &str) -> Called<Message> {
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

    /// A string property of an object.
    pub(crate) fn get_string(
        &mut self,
        path: &str,
        interface: &str,
        property: &str,
    ) -> Called<String> {
        self.get(path, interface, property)?
            .body("v")?
            .variant("s")?
            .string()
            .map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::allowed_cpus;
    use crate::systemd::fake::{Fake, answer, fake};
    use std::fs;

    #[test]
    fn a_connection_that_ended_is_replaced() {
        let (dir, host, fake) = fake(BUS_SOCKET);
        assert!(
            allowed_cpus(host.systemd(), &host, "x.slice")
                .unwrap()
                .is_some()
        );
        // As with `systemctl daemon-reexec`.
        fake.hang_up();
        fs::remove_file(dir.path().join(BUS_SOCKET)).unwrap();
        let again = Fake::start(&host.path(BUS_SOCKET), answer);
        assert!(
            allowed_cpus(host.systemd(), &host, "x.slice")
                .unwrap()
                .is_some()
        );
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
    fn a_systemd_that_hangs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let session = Session::default();
        let _silent: Vec<_> = [PRIVATE_SOCKET, BUS_SOCKET]
            .iter()
            .map(|socket| {
                fs::create_dir_all(root.path(socket).parent().unwrap()).unwrap();
                std::os::unix::net::UnixListener::bind(root.path(socket)).unwrap()
            })
            .collect();
        let error = session
            .connect(&root, Duration::from_millis(50))
            .map(drop)
            .unwrap_err();
        let error = session.failed("reload".into())(error).to_string();
        assert_eq!(error, "systemd: reload: no answer within 0.05 s");
    }
}

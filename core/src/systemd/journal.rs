//! Messages for the journal, for what has to be found later than in the task log.
//!
//! By the journal's native protocol, <https://systemd.io/JOURNAL_NATIVE_PROTOCOL>: a datagram of
//! `FIELD=value` lines to its socket. `journalctl -t pinfold VMID=100` finds those of a VM.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

const SOCKET: &str = "run/systemd/journal/socket";

/// The identifier of all messages.
const IDENTIFIER: &str = "pinfold";

/// How long to wait for a journal that does not read.
const PATIENCE: Duration = Duration::from_secs(1);

/// Longer texts are cut, in bytes: a datagram has no room for more than some 200 KiB.
const MAX_TEXT: usize = 16 * 1024;

/// How important a message is, as syslog(3) numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Priority {
    /// Something failed.
    Error = 3,
    /// A VM does not have what its settings ask for.
    Warning = 4,
    /// Normal, and worth knowing later.
    Notice = 5,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// How important it is.
    pub priority: Priority,
    /// The VM that it is about, if it is about one: the field `VMID`.
    pub vmid: Option<u32>,
    /// Its text.
    pub message: &'a str,
}

/// Sends a message. Without a journal below `root` nothing is sent, and that is not an error.
///
/// # Errors
/// [`Error::Io`] if the journal does not take it.
pub(crate) fn send(root: &Sysroot, entry: &Entry<'_>) -> Result<()> {
    let path = root.path(SOCKET);
    let sent = UnixDatagram::unbound().and_then(|socket| {
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.send_to(&datagram(entry), &path)
    });
    match sent {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::io(path, "send a message", source)),
    }
}

fn datagram(entry: &Entry<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    field(&mut bytes, "SYSLOG_IDENTIFIER", IDENTIFIER);
    field(&mut bytes, "PRIORITY", &(entry.priority as u8).to_string());
    if let Some(vmid) = entry.vmid {
        field(&mut bytes, "VMID", &vmid.to_string());
    }
    field(&mut bytes, "MESSAGE", shortened(entry.message));
    bytes
}

/// A field. A value of several lines has its length before it instead of the equals sign.
fn field(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

fn shortened(text: &str) -> &str {
    let end = (0..=text.len().min(MAX_TEXT)).rfind(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn journal() -> (tempfile::TempDir, Sysroot, UnixDatagram) {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        fs::create_dir_all(root.path(SOCKET).parent().unwrap()).unwrap();
        let socket = UnixDatagram::bind(root.path(SOCKET)).unwrap();
        (dir, root, socket)
    }

    fn entry(message: &str) -> Entry<'_> {
        Entry {
            priority: Priority::Warning,
            vmid: Some(100),
            message,
        }
    }

    #[test]
    fn fields_as_the_journal_reads_them() {
        let (_dir, root, socket) = journal();
        let long = "ä".repeat(MAX_TEXT);
        for (message, text) in [
            ("VM 100 runs", &b"MESSAGE=VM 100 runs\n"[..]),
            ("", b"MESSAGE=\n"),
            ("a=b", b"MESSAGE=a=b\n"),
            // What follows a line break is not a field of its own.
            (
                "a\nPRIORITY=0",
                b"MESSAGE\n\x0c\0\0\0\0\0\0\0a\nPRIORITY=0\n",
            ),
        ] {
            send(&root, &entry(message)).unwrap();
            let mut bytes = [0; 200];
            let length = socket.recv(&mut bytes).unwrap();
            let head = b"SYSLOG_IDENTIFIER=pinfold\nPRIORITY=4\nVMID=100\n";
            assert_eq!(bytes[..length], [head, text].concat(), "{message:?}");
        }
        let without = Entry {
            vmid: None,
            ..entry(&long)
        };
        let bytes = datagram(&without);
        let head = b"SYSLOG_IDENTIFIER=pinfold\nPRIORITY=4\nMESSAGE=";
        assert!(bytes.starts_with(head));
        assert_eq!(bytes.len(), head.len() + MAX_TEXT + 1);
    }

    #[test]
    fn without_a_journal_nothing_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        send(&Sysroot::new(dir.path()), &entry("x")).unwrap();
    }

    #[test]
    fn a_journal_that_reads_nothing_is_an_error_in_time() {
        let (_dir, root, socket) = journal();
        // Its queue is of net.unix.max_dgram_qlen messages.
        let error = (0..100_000).find_map(|_| send(&root, &entry("x")).err());
        assert!(
            error
                .unwrap()
                .to_string()
                .ends_with("journal/socket: send a message: Resource temporarily unavailable")
        );
        drop(socket);
        let error = send(&root, &entry("x")).unwrap_err().to_string();
        assert!(error.ends_with("Connection refused"), "{error}");
    }
}

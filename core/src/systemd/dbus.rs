//! A small D-Bus client: one method call at a time over a Unix socket, under a deadline.
//!
//! It knows only the types that calls to systemd need; see the D-Bus specification, "Message
//! Protocol" and "Authentication Protocol". Strings are UTF-8, numbers little-endian, everything
//! aligned to its own size.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

use crate::error::os_text;

/// A longer message is not an answer: a reply has some 200 bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// A longer line is not part of the authentication.
const MAX_LINE: usize = 1 << 10;
/// How often to retry a server with a full queue of new clients.
const FULL_INTERVAL: Duration = Duration::from_millis(10);

/// Kinds of messages: the answers to a call. Others, signals mostly, come in between.
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// Header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DbusError {
    /// The socket cannot be connected to.
    #[error("cannot connect: {}", os_text(.0))]
    Unreachable(io::Error),
    /// It rejected the authentication.
    #[error("authentication failed: {0}")]
    Rejected(String),
    /// No answer within the deadline.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Late(Duration),
    /// The connection ended, or broke.
    #[error("it closed the connection: {}", os_text(.0))]
    Closed(io::Error),
    /// The reply is not D-Bus, or does not answer the call.
    #[error("invalid reply: {0}")]
    Garbage(&'static str),
    /// The call was answered with an error.
    #[error("{}", if message.is_empty() { name } else { message })]
    Refused {
        /// The error's name: `org.freedesktop.systemd1.NoSuchUnit`.
        name: String,
        /// Its words: `Unit x.slice not found.`
        message: String,
    },
}

impl DbusError {
    /// Whether the unit is not there (any more).
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Refused { name, .. } if name == "org.freedesktop.systemd1.NoSuchUnit")
    }

    /// Whether the caller may not do it.
    pub(crate) fn is_denied(&self) -> bool {
        let denied = ["AccessDenied", "InteractiveAuthorizationRequired"];
        matches!(self, Self::Refused { name, .. }
            if name.strip_prefix("org.freedesktop.DBus.Error.").is_some_and(|name| denied.contains(&name)))
    }
}

type Result<T> = std::result::Result<T, DbusError>;

/// A method to be called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Method<'a> {
    pub(crate) destination: &'a str,
    pub(crate) path: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) member: &'a str,
}

/// A connection, open until dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    timeout: Duration,
    until: Instant,
    serial: u32,
    /// A call is under way, or ended without its answer.
    in_call: bool,
    /// What came and was not looked at yet.
    bytes: Vec<u8>,
}

impl Connection {
    /// Connects and authenticates as the running user. To connect, and each call, may take
    /// `timeout`.
    pub(crate) fn open(path: &Path, timeout: Duration) -> Result<Self> {
        let until = Instant::now() + timeout;
        let stream = loop {
            match connect_now(path) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(DbusError::Unreachable(error));
                }
                Err(_) if Instant::now() + FULL_INTERVAL >= until => {
                    return Err(DbusError::Late(timeout));
                }
                Err(_) => std::thread::sleep(FULL_INTERVAL),
                Ok(stream) => break stream,
            }
        };
        let mut connection = Self {
            until,
            ..Self::new(stream, timeout)
        };
        let uid: String = nix::unistd::geteuid()
            .to_string()
            .bytes()
            .map(|digit| format!("{digit:02x}"))
            .collect();
        // BEGIN goes along, and the first message not before the answer: a message that systemd
        // reads together with BEGIN lies there until more comes. sd-bus does it so too.
        connection.send(format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").as_bytes())?;
        let answer = connection.line()?;
        if !answer.starts_with("OK ") {
            return Err(DbusError::Rejected(answer));
        }
        Ok(connection)
    }

    fn new(stream: UnixStream, timeout: Duration) -> Self {
        Self {
            stream,
            timeout,
            until: Instant::now() + timeout,
            serial: 0,
            in_call: false,
            bytes: Vec::new(),
        }
    }

    /// The same, with a time limit for each call.
    pub(crate) fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Whether it can be used for another call: the last one ended in order, and the other end has
    /// not closed it.
    pub(crate) fn is_usable(&self) -> bool {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !self.in_call
            && matches!(
                recv(self.stream.as_raw_fd(), &mut [0], peek),
                Ok(1) | Err(Errno::EAGAIN)
            )
    }

    /// Calls a method with the arguments in `body`, of the types in `signature`, and waits for what
    /// it returns.
    pub(crate) fn call(
        &mut self,
        method: Method<'_>,
        signature: &str,
        body: Writer,
    ) -> Result<Message> {
        self.until = Instant::now() + self.timeout;
        self.serial += 1;
        self.in_call = true;
        self.send(&marshal(method, self.serial, signature, &body.bytes))?;
        loop {
            let message = self.message()?;
            if message.reply_serial != Some(self.serial) {
                continue;
            }
            match message.kind {
                METHOD_RETURN => {
                    self.in_call = false;
                    return Ok(message);
                }
                ERROR => {
                    self.in_call = false;
                    let words = message
                        .body("s")
                        .and_then(|mut body| body.string().map(str::to_owned));
                    return Err(DbusError::Refused {
                        name: message
                            .error
                            .ok_or(DbusError::Garbage("an error without a name"))?,
                        message: words.unwrap_or_default(),
                    });
                }
                _ => {}
            }
        }
    }

    fn message(&mut self) -> Result<Message> {
        self.fill_to(FIXED)?;
        let size = message_size(&self.bytes)?;
        self.fill_to(size)?;
        let message = parse_message(&self.bytes[..size]);
        self.bytes.drain(..size);
        message
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\r\n") {
                let line = String::from_utf8_lossy(&self.bytes[..end]).into_owned();
                self.bytes.drain(..end + 2);
                return Ok(line);
            }
            if self.bytes.len() > MAX_LINE {
                return Err(DbusError::Garbage("a line without end"));
            }
            self.fill_to(self.bytes.len() + 1)?;
        }
    }

    fn fill_to(&mut self, size: usize) -> Result<()> {
        let mut chunk = [0; 4096];
        while self.bytes.len() < size {
            self.stream
                .set_read_timeout(Some(self.left()?))
                .map_err(DbusError::Closed)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(DbusError::Closed(io::ErrorKind::UnexpectedEof.into())),
                Ok(used) => self.bytes.extend_from_slice(&chunk[..used]),
                Err(error) => self.go_on_after(error)?,
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.stream
                .set_write_timeout(Some(self.left()?))
                .map_err(DbusError::Closed)?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) => self.go_on_after(error)?,
            }
        }
        Ok(())
    }

    fn left(&self) -> Result<Duration> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(DbusError::Late(self.timeout)),
            left => Ok(left),
        }
    }

    fn go_on_after(&self, error: io::Error) -> Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Err(DbusError::Late(self.timeout))
            }
            _ => Err(DbusError::Closed(error)),
        }
    }
}

/// Connects without waiting: with the queue of new clients full, connect(2) would, for as long as
/// it likes.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let fd: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| match errno {
        Errno::EAGAIN => io::ErrorKind::WouldBlock.into(),
        errno => io::Error::from(errno),
    })?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Values on their way out.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    /// A length or number.
    pub(crate) fn u32(&mut self, number: u32) -> &mut Self {
        self.align(4);
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// A signed number.
    pub(crate) fn i32(&mut self, number: i32) -> &mut Self {
        self.align(4);
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// A number.
    pub(crate) fn u64(&mut self, number: u64) -> &mut Self {
        self.align(8);
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// A truth value.
    pub(crate) fn bool(&mut self, value: bool) -> &mut Self {
        self.u32(value.into())
    }

    /// A string or an object's path.
    pub(crate) fn string(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes());
        self.bytes.push(0);
        self
    }

    /// A signature; those in use have some ten characters.
    fn signature(&mut self, text: &str) -> &mut Self {
        self.bytes.push(text.len() as u8);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        self
    }

    /// An array of bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32);
        self.bytes.extend(bytes);
        self
    }

    /// An array of what `fill` writes, each element aligned to `to`.
    pub(crate) fn array(&mut self, to: usize, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.u32(0);
        let length_at = self.bytes.len() - 4;
        self.align(to);
        let start = self.bytes.len();
        fill(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
        self
    }

    /// A struct `(sv)`: a name and a value of the type `signature`, which `value` writes.
    pub(crate) fn property(
        &mut self,
        name: &str,
        signature: &str,
        value: impl FnOnce(&mut Self) -> &mut Self,
    ) {
        self.align(8);
        self.string(name).signature(signature);
        value(self);
    }

    /// The start of a struct, or of an entry of an array of structs.
    pub(crate) fn record(&mut self) -> &mut Self {
        self.align(8);
        self
    }

    /// A header field `(yv)`.
    fn field(&mut self, code: u8, signature: &str) -> &mut Self {
        self.align(8);
        self.bytes.push(code);
        self.signature(signature)
    }
}

fn marshal(method: Method<'_>, serial: u32, signature: &str, body: &[u8]) -> Vec<u8> {
    // Little-endian, a method call, no flags, protocol version 1.
    let mut message = Writer {
        bytes: vec![b'l', 1, 0, 1],
    };
    message
        .u32(body.len() as u32)
        .u32(serial)
        .array(8, |fields| {
            fields.field(PATH, "o").string(method.path);
            fields.field(INTERFACE, "s").string(method.interface);
            fields.field(MEMBER, "s").string(method.member);
            fields.field(DESTINATION, "s").string(method.destination);
            if !signature.is_empty() {
                fields.field(SIGNATURE, "g").signature(signature);
            }
        });
    message.align(8);
    message.bytes.extend(body);
    message.bytes
}

/// A message that came, as far as it matters to the caller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    kind: u8,
    reply_serial: Option<u32>,
    error: Option<String>,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    /// The body, which must have these types.
    pub(crate) fn body(&self, signature: &str) -> Result<Reader<'_>> {
        if self.signature != signature {
            return Err(DbusError::Garbage("an answer of the wrong type"));
        }
        Ok(Reader {
            bytes: &self.body,
            at: 0,
        })
    }
}

/// What a message's size follows from: the fixed fields and the length of the others.
const FIXED: usize = 16;

/// The whole size of the message that begins with [`FIXED`] bytes.
fn message_size(bytes: &[u8]) -> Result<usize> {
    let mut reader = Reader { bytes, at: 0 };
    match reader.take(4)? {
        [b'l', _, _, 1] => {}
        [b'B', _, _, 1] => return Err(DbusError::Garbage("a big-endian message")),
        _ => return Err(DbusError::Garbage("not a D-Bus message")),
    }
    let body = reader.u32()? as usize;
    reader.u32()?;
    let fields = reader.u32()? as usize;
    if body > MAX_MESSAGE || fields > MAX_MESSAGE {
        return Err(DbusError::Garbage("a message of more than 1 MiB"));
    }
    Ok(FIXED + fields.next_multiple_of(8) + body)
}

/// Parses a whole message of the size that [`message_size`] returned.
fn parse_message(bytes: &[u8]) -> Result<Message> {
    let mut reader = Reader { bytes, at: 0 };
    let kind = reader.take(4)?[1];
    reader.u32()?;
    reader.u32()?;
    let fields = reader.u32()? as usize;
    let mut header = Reader {
        bytes: bytes
            .get(..FIXED + fields)
            .ok_or(DbusError::Garbage(SHORT))?,
        at: FIXED,
    };
    let mut message = Message {
        kind,
        reply_serial: None,
        error: None,
        signature: String::new(),
        body: Vec::new(),
    };
    while header.at < header.bytes.len() {
        match header.field()? {
            (REPLY_SERIAL, Field::Number(serial)) => message.reply_serial = Some(serial),
            (ERROR_NAME, Field::Text(name)) => message.error = Some(name.to_owned()),
            (SIGNATURE, Field::Text(signature)) => message.signature = signature.to_owned(),
            _ => {}
        }
    }
    header.bytes = bytes;
    header.align(8)?;
    message.body = bytes[header.at..].to_vec();
    Ok(message)
}

const SHORT: &str = "a message that ends too early";

/// A header field's value.
#[derive(Debug, PartialEq, Eq)]
enum Field<'a> {
    Number(u32),
    Text(&'a str),
}

/// Values on their way in. Nothing is allocated for what a length claims: values are parts of the
/// bytes that came.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(size);
        let part = end
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or(DbusError::Garbage(SHORT))?;
        self.at += size;
        Ok(part)
    }

    fn align(&mut self, to: usize) -> Result<()> {
        self.take(self.at.next_multiple_of(to) - self.at).map(drop)
    }

    fn u32(&mut self) -> Result<u32> {
        self.align(4)?;
        let mut number = [0; 4];
        number.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(number))
    }

    /// An array of bytes.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8]> {
        let size = self.u32()? as usize;
        self.take(size)
    }

    /// A string or an object's path.
    pub(crate) fn string(&mut self) -> Result<&'a str> {
        let text = self.bytes()?;
        self.text(text)
    }

    /// An array of strings.
    pub(crate) fn strings(&mut self) -> Result<Vec<&'a str>> {
        let end = self.u32()? as usize;
        let end = self
            .at
            .checked_add(end)
            .ok_or(DbusError::Garbage("an array without an end"))?;
        let mut strings = Vec::new();
        while self.at < end {
            strings.push(self.string()?);
        }
        Ok(strings)
    }

    fn signature(&mut self) -> Result<&'a str> {
        let size = self.take(1)?[0];
        let text = self.take(size.into())?;
        self.text(text)
    }

    fn text(&mut self, text: &'a [u8]) -> Result<&'a str> {
        if self.take(1)? != [0] {
            return Err(DbusError::Garbage("a text without an end"));
        }
        str::from_utf8(text).map_err(|_| DbusError::Garbage("a text that is not UTF-8"))
    }

    /// Goes into a variant, which must be of this type.
    pub(crate) fn variant(&mut self, signature: &str) -> Result<&mut Self> {
        if self.signature()? != signature {
            return Err(DbusError::Garbage("a value of the wrong type"));
        }
        Ok(self)
    }

    fn field(&mut self) -> Result<(u8, Field<'a>)> {
        self.align(8)?;
        let code = self.take(1)?[0];
        let value = match self.signature()? {
            "s" | "o" => Field::Text(self.string()?),
            "g" => Field::Text(self.signature()?),
            "u" => Field::Number(self.u32()?),
            _ => return Err(DbusError::Garbage("a header field of an unknown type")),
        };
        Ok((code, value))
    }
}

/// A server to test with.
#[cfg(test)]
pub(crate) mod fake {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Mutex, mpsc};
    use std::thread;

    /// What a call is answered with: the types and values, or an error's name and words.
    pub(crate) type Answer =
        std::result::Result<(&'static str, Writer), (&'static str, &'static str)>;

    impl Writer {
        /// Whether these bytes are in it.
        pub(crate) fn has(&self, bytes: &[u8]) -> bool {
            self.bytes.windows(bytes.len()).any(|part| part == bytes)
        }

        /// The type of a variant; the value follows.
        pub(crate) fn variant(&mut self, signature: &str) {
            self.signature(signature);
        }
    }

    /// A server on a socket, until the test ends.
    pub(crate) struct Fake {
        calls: Arc<Mutex<Vec<String>>>,
        client: Arc<Mutex<Option<UnixStream>>>,
    }

    impl Fake {
        /// Serves one client after the other. `answer` gets the path, the member and the strings
        /// that the body begins with.
        pub(crate) fn start(path: &Path, answer: fn(&str, &str, &[&str]) -> Answer) -> Self {
            let listener = UnixListener::bind(path).unwrap();
            let calls = Arc::new(Mutex::new(Vec::new()));
            let client = Arc::default();
            let (seen, served) = (
                Arc::clone(&calls),
                Arc::<Mutex<Option<UnixStream>>>::clone(&client),
            );
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let stream = stream.unwrap();
                    *served.lock().unwrap() = Some(stream.try_clone().unwrap());
                    // A client closes the connection once it has its answer.
                    let _ = serve(stream, &seen, answer);
                }
            });
            Self { calls, client }
        }

        /// Ends the connection of the client that is served.
        pub(crate) fn hang_up(&self) {
            self.client
                .lock()
                .unwrap()
                .take()
                .unwrap()
                .shutdown(std::net::Shutdown::Both)
                .unwrap();
        }

        /// The calls so far: path, member, types, strings.
        pub(crate) fn calls(&self) -> Vec<String> {
            self.calls.lock().unwrap().clone()
        }
    }

    /// What a call returns if the server sends only `bytes`.
    pub(crate) fn hostile(bytes: Vec<u8>, timeout: Duration) -> Result<Message> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (done, wait) = mpsc::channel::<()>();
        let server = thread::spawn(move || {
            let _ = theirs.write_all(&bytes);
            let _ = wait.recv();
        });
        let mut connection = Connection::new(ours, timeout);
        let method = Method {
            destination: "a.b",
            path: "/",
            interface: "a.b",
            member: "C",
        };
        let answer = connection.call(method, "", Writer::default());
        drop((connection, done));
        server.join().unwrap();
        answer
    }

    fn serve(
        stream: UnixStream,
        calls: &Mutex<Vec<String>>,
        answer: fn(&str, &str, &[&str]) -> Answer,
    ) -> Result<()> {
        let timeout = Duration::from_secs(20);
        let mut client = Connection::new(stream, timeout);
        let auth = client.line()?;
        let uid = nix::unistd::geteuid()
            .to_string()
            .bytes()
            .map(|digit| format!("3{}", digit - b'0'))
            .collect::<String>();
        assert_eq!(auth, format!("\0AUTH EXTERNAL {uid}"));
        client.send(b"OK 0123456789abcdef0123456789abcdef\r\n")?;
        assert_eq!(client.line()?, "BEGIN");
        loop {
            client.fill_to(FIXED)?;
            let size = message_size(&client.bytes)?;
            client.fill_to(size)?;
            let bytes: Vec<u8> = client.bytes.drain(..size).collect();
            let message = parse_message(&bytes)?;
            let mut header = Reader {
                bytes: &bytes,
                at: 8,
            };
            let serial = header.u32()?;
            let end = FIXED + header.u32()? as usize;
            let (mut path, mut member) = ("", "");
            while header.at < end {
                match header.field()? {
                    (PATH, Field::Text(text)) => path = text,
                    (MEMBER, Field::Text(text)) => member = text,
                    _ => {}
                }
            }
            let mut body = message.body(&message.signature)?;
            let mut strings = Vec::new();
            for _ in message.signature.chars().take_while(|kind| *kind == 's') {
                strings.push(body.string()?);
            }
            calls.lock().unwrap().push(format!(
                "{path} {member} {} {}",
                message.signature,
                strings.join(" ")
            ));
            // Signals come whenever they like.
            client.send(&encode(4, None, None, "s", b"\x01\0\0\0x\0"))?;
            client.send(&match answer(path, member, &strings) {
                Ok((signature, body)) => {
                    encode(METHOD_RETURN, Some(serial), None, signature, &body.bytes)
                }
                Err((name, words)) => {
                    let mut body = Writer::default();
                    body.string(words);
                    encode(ERROR, Some(serial), Some(name), "s", &body.bytes)
                }
            })?;
        }
    }

    /// A message as servers send them.
    pub(crate) fn encode(
        kind: u8,
        reply_serial: Option<u32>,
        error: Option<&str>,
        signature: &str,
        body: &[u8],
    ) -> Vec<u8> {
        let mut message = Writer {
            bytes: vec![b'l', kind, 1, 1],
        };
        message.u32(body.len() as u32).u32(77).array(8, |fields| {
            if let Some(serial) = reply_serial {
                fields.field(REPLY_SERIAL, "u").u32(serial);
            }
            fields.field(7, "s").string("org.freedesktop.systemd1");
            if let Some(name) = error {
                fields.field(ERROR_NAME, "s").string(name);
            }
            if !signature.is_empty() {
                fields.field(SIGNATURE, "g").signature(signature);
            }
        });
        message.align(8);
        message.bytes.extend(body);
        message.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{encode, hostile};
    use super::*;
    use proptest::prelude::*;

    /// More than any answer takes, on a busy machine too.
    const LONG: Duration = Duration::from_secs(20);
    /// For answers that never come.
    const BRIEF: Duration = Duration::from_millis(50);

    const METHOD: Method<'_> = Method {
        destination: "a.b",
        path: "/p",
        interface: "a.c",
        member: "Set",
    };

    fn reply(signature: &str, body: &[u8]) -> Vec<u8> {
        encode(METHOD_RETURN, Some(1), None, signature, body)
    }

    #[test]
    fn values_as_the_specification_has_them() {
        let written = |fill: &dyn Fn(&mut Writer)| {
            let mut writer = Writer::default();
            fill(&mut writer);
            writer.bytes
        };
        type Case<'a> = (&'a dyn Fn(&mut Writer), &'a [u8]);
        let cases: [Case<'_>; 6] = [
            (&|w| _ = w.u32(0x0102_0304), b"\x04\x03\x02\x01"),
            (&|w| _ = w.string("foo").u32(1), b"\x03\0\0\0foo\0\x01\0\0\0"),
            (&|w| _ = w.string("+").bool(true), b"\x01\0\0\0+\0\0\0\x01\0\0\0"),
            (&|w| _ = w.u32(1).u64(5), b"\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0"),
            // The length of an empty array counts no padding.
            (&|w| _ = w.array(8, |_| {}), b"\0\0\0\0\0\0\0\0"),
            (
                &|w| {
                    w.string("x.slice").bool(true).array(8, |properties| {
                        properties.property("AllowedCPUs", "ay", |value| value.bytes(&[0x3f, 0xf0, 0x03]));
                    });
                },
                b"\x07\0\0\0x.slice\0\x01\0\0\0\x1b\0\0\0\0\0\0\0\x0b\0\0\0AllowedCPUs\0\x02ay\0\x03\0\0\0\x3f\xf0\x03",
            ),
        ];
        for (number, (fill, bytes)) in cases.iter().enumerate() {
            assert_eq!(written(fill), *bytes, "case {number}");
        }
    }

    #[test]
    fn a_call_as_the_specification_has_it() {
        let message = marshal(METHOD, 2, "s", b"\x01\0\0\0x\0");
        let expected = b"l\x01\0\x01\x06\0\0\0\x02\0\0\0\x47\0\0\0\
            \x01\x01o\0\x02\0\0\0/p\0\0\0\0\0\0\
            \x02\x01s\0\x03\0\0\0a.c\0\0\0\0\0\
            \x03\x01s\0\x03\0\0\0Set\0\0\0\0\0\
            \x06\x01s\0\x03\0\0\0a.b\0\0\0\0\0\
            \x08\x01g\0\x01s\0\0\
            \x01\0\0\0x\0";
        assert_eq!(message, expected);
        assert_eq!(message_size(&message).unwrap(), message.len());
    }

    #[test]
    fn answers() {
        let message = hostile(reply("v", b"\x01s\0\0\x02\0\0\0ab\0"), LONG).unwrap();
        assert_eq!(
            message
                .body("v")
                .unwrap()
                .variant("s")
                .unwrap()
                .string()
                .unwrap(),
            "ab"
        );
        assert!(matches!(message.body("o"), Err(DbusError::Garbage(_))));
        assert!(matches!(
            message.body("v").unwrap().variant("ay"),
            Err(DbusError::Garbage(_))
        ));

        // Other messages come first: a signal, an answer to another call.
        let mut bytes = encode(4, None, None, "", b"");
        bytes.extend(encode(METHOD_RETURN, Some(9), None, "", b""));
        bytes.extend(reply("", b""));
        assert!(hostile(bytes, LONG).is_ok());

        let error = encode(
            ERROR,
            Some(1),
            Some("org.freedesktop.systemd1.NoSuchUnit"),
            "s",
            b"\x03\0\0\0No.\0",
        );
        assert_eq!(hostile(error, LONG).unwrap_err().to_string(), "No.");
        let error = encode(ERROR, Some(1), Some("a.b.Wordless"), "", b"");
        assert_eq!(
            hostile(error, LONG).unwrap_err().to_string(),
            "a.b.Wordless"
        );
    }

    #[test]
    fn hostile_answers_are_errors() {
        let mut long = reply("", b"");
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut long_fields = reply("", b"");
        long_fields[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut claims_more = reply("", b"");
        claims_more[4..8].copy_from_slice(&1000_u32.to_le_bytes());
        let mut bad_field = reply("", b"");
        bad_field[18] = b'x';
        let mut big_endian = reply("", b"");
        big_endian[0] = b'B';
        for (bytes, words) in [
            (long, "invalid reply: a message of more than 1 MiB"),
            (long_fields, "invalid reply: a message of more than 1 MiB"),
            (claims_more, "no answer within 0.05 s"),
            (
                bad_field,
                "invalid reply: a header field of an unknown type",
            ),
            (big_endian, "invalid reply: a big-endian message"),
            (
                b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
                "invalid reply: not a D-Bus message",
            ),
            (
                encode(ERROR, Some(1), None, "", b""),
                "invalid reply: an error without a name",
            ),
            (Vec::new(), "no answer within 0.05 s"),
        ] {
            let timeout = if words.starts_with("no answer") {
                BRIEF
            } else {
                LONG
            };
            assert_eq!(hostile(bytes, timeout).unwrap_err().to_string(), words);
        }
    }

    #[test]
    fn a_body_that_lies_is_an_error() {
        for body in [
            &b""[..],
            b"\x02ay\0\xff\xff\xff\xff",
            b"\x02ay\0\x05\0\0\0abcd",
            b"\x02ay\xff\0\0\0\0",
            b"\xffay\0",
        ] {
            let mut reader = Reader { bytes: body, at: 0 };
            assert!(
                reader.variant("ay").and_then(Reader::bytes).is_err(),
                "{body:?}"
            );
        }
        for body in [
            &b"\x01\0\0\0\xff\0"[..],
            b"\x01\0\0\0xy",
            b"\x01\0\0\0x",
            b"\xff\xff\xff\xffx\0",
            b"\0\0",
        ] {
            assert!(Reader { bytes: body, at: 0 }.string().is_err(), "{body:?}");
        }
    }

    #[test]
    fn refused_authentication_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        for (number, (answer, words)) in [
            (
                "REJECTED EXTERNAL\r\n".to_owned(),
                "authentication failed: REJECTED EXTERNAL",
            ),
            ("x".repeat(5000), "invalid reply: a line without end"),
            (
                String::new(),
                "it closed the connection: unexpected end of file",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let path = dir.path().join(number.to_string());
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                // Not read out, closing would be a reset.
                let mut asked = [0; 100];
                let used = stream.read(&mut asked).unwrap();
                assert!(asked[..used].ends_with(b"\r\nBEGIN\r\n"));
                let _ = stream.write_all(answer.as_bytes());
            });
            let error = Connection::open(&path, LONG).unwrap_err().to_string();
            assert_eq!(error, words);
            server.join().unwrap();
        }
        let error = Connection::open(&dir.path().join("none"), LONG)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "cannot connect: No such file or directory");
    }

    fn read_all(message: &Message) {
        for signature in ["s", "o", "v"] {
            let _ = message
                .body(signature)
                .and_then(|mut body| body.string().map(drop));
        }
        for signature in ["s", "ay"] {
            let mut body = Reader {
                bytes: &message.body,
                at: 0,
            };
            let _ = body
                .variant(signature)
                .and_then(|value| value.bytes().map(drop));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..200), plain in any::<bool>()) {
            let mut bytes = bytes;
            if plain && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[b'l', METHOD_RETURN, 0, 1]);
            }
            let _ = message_size(&bytes);
            if let Ok(message) = parse_message(&bytes) {
                read_all(&message);
            }
        }

        #[test]
        fn no_change_to_an_answer_does_harm(
            text in "[a-z./]{0,40}",
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            end in any::<prop::sample::Index>(),
        ) {
            let mut body = Writer::default();
            body.signature("s").string(&text);
            let mut bytes = reply("v", &body.bytes);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(end.index(bytes.len()) + 1);
            if let Ok(size) = message_size(&bytes) {
                prop_assert!(size <= 2 * MAX_MESSAGE + 2 * FIXED);
            }
            if let Ok(message) = parse_message(&bytes) {
                prop_assert!(message.body.len() <= bytes.len());
                read_all(&message);
            }
        }

        #[test]
        fn what_is_written_is_read(text in ".{0,40}", more in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut body = Writer::default();
            body.string(&text).bytes(&more);
            let bytes = encode(METHOD_RETURN, Some(3), None, "say", &body.bytes);
            prop_assert_eq!(message_size(&bytes).unwrap(), bytes.len());
            let message = parse_message(&bytes).unwrap();
            prop_assert_eq!(message.reply_serial, Some(3));
            let mut body = message.body("say").unwrap();
            prop_assert_eq!(body.string().unwrap(), text);
            prop_assert_eq!(body.bytes().unwrap(), more);
        }
    }
}

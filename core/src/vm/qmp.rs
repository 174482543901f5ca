//! Queries of QEMU's monitor: the threads of vCPUs and iothreads, and whether the guest runs.
//!
//! The protocol is a JSON text per line, see QEMU's docs/interop/qmp-spec.rst. A socket serves one
//! client at a time, and Proxmox VE is another: all commands are sent at once, under a deadline,
//! and the socket is closed.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::Deserialize;
use serde_json::Value;

use crate::cpuset::MAX_CPU;
use crate::error::os_text;

/// How long QEMU may take in all, tries and pauses, if nothing else is asked for.
pub const DEFAULT_BUDGET: Duration = Duration::from_secs(5);

/// How long one try may take; with QEMU idle it takes 5 ms.
const TRY: Duration = Duration::from_secs(1);
/// The pause between two tries is a random time up to twice this, so that two clients do not keep
/// meeting.
const PAUSE: Duration = Duration::from_millis(50);
/// More than this in one conversation is not QMP: 500 vCPUs make some 100 KiB.
const MAX_BYTES: usize = 1 << 20;

/// What is asked for, in this order.
const COMMANDS: [&str; 4] = [
    "qmp_capabilities",
    "query-cpus-fast",
    "query-iothreads",
    "query-status",
];

/// What QEMU reports of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ThreadRoles {
    /// vCPU numbers by thread id.
    pub vcpus: BTreeMap<i32, usize>,
    /// Iothreads' ids by thread id.
    pub iothreads: BTreeMap<i32, String>,
    /// The state of the guest (`RunState` in QEMU's qapi/run-state.json): `running`, `paused`,
    /// `prelaunch`, …
    pub status: String,
}

/// Why QEMU's monitor could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be connected to.
    #[error("its monitor cannot be reached: {}", os_text(.0))]
    Unreachable(io::Error),
    /// No greeting within the deadline.
    #[error("its monitor is busy with another client, or QEMU hangs")]
    Busy,
    /// Greeted, then nothing within the deadline.
    #[error("its monitor did not reply to {0}")]
    Silent(&'static str),
    /// The connection ended, or broke.
    #[error("its monitor closed the connection: {}", os_text(.0))]
    Closed(io::Error),
    /// The reply is not QMP.
    #[error("its monitor sent an invalid reply: {0}")]
    Garbage(String),
    /// QEMU answered with an error.
    #[error("its monitor rejected {command}: {why}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        why: String,
    },
}

/// Queries the monitor behind `socket`, again after a pause if it is busy, within `budget` in all.
///
/// # Errors
/// Why the query failed, from the last try.
pub fn query(socket: &Path, budget: Duration) -> Result<ThreadRoles, QmpError> {
    let end = Instant::now() + budget;
    loop {
        let until = end.min(Instant::now() + TRY);
        match query_once(socket, until) {
            Err(error @ (QmpError::Busy | QmpError::Silent(_) | QmpError::Closed(_))) => {
                let pause = random(2 * PAUSE);
                if Instant::now() + pause >= end {
                    return Err(error);
                }
                std::thread::sleep(pause);
            }
            other => return other,
        }
    }
}

fn query_once(path: &Path, until: Instant) -> Result<ThreadRoles, QmpError> {
    let stream = open(path)?;
    let mut facts = ThreadRoles::default();
    let mut lines = Lines {
        stream,
        until,
        bytes: Vec::new(),
        start: 0,
        total: 0,
    };
    match message(
        lines
            .next()
            .map_err(|stop| stop.into_error(QmpError::Busy))?,
    )? {
        Message::Greeting => {}
        _ => return Err(QmpError::Garbage("no greeting".into())),
    }
    // After the greeting all commands are sent at once, so that QEMU wakes up once.
    let (entry, questions) = COMMANDS.split_at(1);
    for commands in [entry, questions] {
        lines.send(commands)?;
        for command in commands.iter().copied() {
            let value = lines.value(command)?;
            facts.take(command, value).map_err(QmpError::Garbage)?;
        }
    }
    Ok(facts)
}

/// Connects without ever blocking: with other clients waiting already, connect(2) would wait as
/// they do.
fn open(path: &Path) -> Result<UnixStream, QmpError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connected = || -> nix::Result<OwnedFd> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(fd)
    };
    match connected() {
        Ok(fd) => {
            let stream = UnixStream::from(fd);
            stream
                .set_nonblocking(false)
                .map_err(QmpError::Unreachable)?;
            Ok(stream)
        }
        Err(nix::errno::Errno::EAGAIN) => Err(QmpError::Busy),
        Err(errno) => Err(QmpError::Unreachable(errno.into())),
    }
}

/// Why no further line was read.
enum Stop {
    /// The deadline passed.
    Late,
    /// The connection ended.
    Closed(io::Error),
    /// More than [`MAX_BYTES`] came.
    TooMuch,
}

impl Stop {
    fn into_error(self, late: QmpError) -> QmpError {
        match self {
            Self::Late => late,
            Self::Closed(error) => QmpError::Closed(error),
            Self::TooMuch => QmpError::Garbage(format!("more than {MAX_BYTES} bytes")),
        }
    }
}

/// The lines that come from a socket, until a deadline.
struct Lines {
    stream: UnixStream,
    until: Instant,
    bytes: Vec<u8>,
    /// The start of the line that was not returned yet.
    start: usize,
    total: usize,
}

impl Lines {
    fn next(&mut self) -> Result<&[u8], Stop> {
        let mut searched = self.start;
        loop {
            if let Some(at) = self.bytes[searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line = self.start..searched + at;
                self.start = line.end + 1;
                return Ok(&self.bytes[line]);
            }
            self.bytes.drain(..self.start);
            self.start = 0;
            searched = self.bytes.len();
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Result<(), Stop> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Stop::Late);
        }
        self.stream
            .set_read_timeout(Some(left))
            .map_err(Stop::Closed)?;
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(Stop::Closed(io::ErrorKind::UnexpectedEof.into())),
            Ok(used) => {
                self.total += used;
                self.bytes.extend_from_slice(&chunk[..used]);
                if self.total > MAX_BYTES {
                    Err(Stop::TooMuch)
                } else {
                    Ok(())
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(Stop::Late),
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(Stop::Closed(error)),
            },
        }
    }

    /// What a command that was sent returns.
    fn value(&mut self, command: &'static str) -> Result<Value, QmpError> {
        loop {
            match message(
                self.next()
                    .map_err(|stop| stop.into_error(QmpError::Silent(command)))?,
            )? {
                Message::Return(value) => return Ok(value),
                Message::Error(why) => return Err(QmpError::Refused { command, why }),
                // Events come at any time; a greeting comes once.
                Message::Event => {}
                Message::Greeting => return Err(QmpError::Garbage("a second greeting".into())),
            }
        }
    }

    fn send(&mut self, commands: &[&'static str]) -> Result<(), QmpError> {
        let left = self
            .until
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let text: String = commands
            .iter()
            .map(|command| format!("{{\"execute\":\"{command}\"}}\n"))
            .collect();
        let sent = self
            .stream
            .set_write_timeout(Some(left))
            .and_then(|()| self.stream.write_all(text.as_bytes()));
        sent.map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                QmpError::Silent(commands.first().unwrap_or(&""))
            }
            _ => QmpError::Closed(error),
        })
    }
}

fn random(below: Duration) -> Duration {
    let number = RandomState::new().build_hasher().finish();
    below.mul_f64((number % 1000) as f64 / 1000.0)
}

/// One line from QEMU.
#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Event,
    Return(Value),
    Error(String),
}

fn message(line: &[u8]) -> Result<Message, QmpError> {
    parse_message(line).map_err(QmpError::Garbage)
}

/// Parses a line from QEMU.
fn parse_message(line: &[u8]) -> Result<Message, String> {
    let mut value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if let Some(value) = value.get_mut("return") {
        return Ok(Message::Return(value.take()));
    }
    if let Some(error) = value.get("error") {
        let why = error
            .get("desc")
            .and_then(Value::as_str)
            .unwrap_or("an error without a description");
        return Ok(Message::Error(why.to_owned()));
    }
    if value.get("QMP").is_some() {
        return Ok(Message::Greeting);
    }
    if value.get("event").is_some() {
        return Ok(Message::Event);
    }
    Err("a reply of unknown kind".into())
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cpu {
    cpu_index: usize,
    thread_id: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Iothread {
    id: String,
    thread_id: i32,
}

#[derive(Deserialize)]
struct Status {
    status: String,
}

impl ThreadRoles {
    /// Takes in what QEMU returned for a command.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn take(&mut self, command: &str, value: Value) -> Result<(), String> {
        let bad = |error: serde_json::Error| format!("{command}: {error}");
        match command {
            "query-cpus-fast" => {
                let cpus: Vec<Cpu> = serde_json::from_value(value).map_err(bad)?;
                // The numbers become a set, as large as the largest of them.
                if let Some(Cpu { cpu_index, .. }) = cpus.iter().find(|cpu| cpu.cpu_index > MAX_CPU)
                {
                    return Err(format!("{command}: vCPU {cpu_index} is beyond {MAX_CPU}"));
                }
                self.vcpus = cpus
                    .into_iter()
                    .map(|cpu| (cpu.thread_id, cpu.cpu_index))
                    .collect();
            }
            "query-iothreads" => {
                let iothreads: Vec<Iothread> = serde_json::from_value(value).map_err(bad)?;
                self.iothreads = iothreads
                    .into_iter()
                    .map(|iothread| (iothread.thread_id, iothread.id))
                    .collect();
            }
            "query-status" => {
                self.status = serde_json::from_value::<Status>(value).map_err(bad)?.status
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads a recorded conversation, QEMU's lines only: greeting, then what it replied, events in
    /// between.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut facts = Self::default();
        let mut commands = COMMANDS.into_iter();
        for line in text.lines() {
            match parse_message(line.as_bytes())? {
                Message::Return(value) => {
                    facts.take(commands.next().ok_or("more replies than commands")?, value)?
                }
                Message::Error(why) => return Err(why),
                Message::Greeting | Message::Event => {}
            }
        }
        Ok(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \
                            \"major\": 10}}, \"capabilities\": [\"oob\"]}}";
    const EVENT: &str = "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \
                         \"event\": \"NIC_RX_FILTER_CHANGED\", \"data\": {}}";
    const CPUS: &str = "{\"return\": [{\"thread-id\": 11, \"props\": {\"core-id\": 0}, \
                        \"cpu-index\": 0, \"target\": \"x86_64\"}, \
                        {\"thread-id\": 12, \"cpu-index\": 1}]}";
    const IOTHREADS: &str =
        r#"{"return": [{"poll-grow": 0, "thread-id": 13, "id": "iothread-virtioscsi0"}]}"#;
    const STATUS: &str = r#"{"return": {"status": "running", "running": true}}"#;
    const BUDGET: Duration = Duration::from_secs(20);

    /// A monitor that greets each client with `greeting` and answers its lines with `replies`, then
    /// waits for it to go.
    fn monitor(
        clients: usize,
        greeting: &'static str,
        replies: Vec<&'static str>,
    ) -> (tempfile::TempDir, JoinHandle<()>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let serve = move || {
            for client in 0..clients {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.write_all(greeting.as_bytes());
                let mut asked = BufReader::new(stream.try_clone().unwrap()).lines();
                for reply in &replies {
                    if client + 1 < clients || asked.next().is_none() {
                        break;
                    }
                    let _ = stream.write_all(reply.as_bytes());
                }
                if client + 1 == clients {
                    asked.for_each(drop);
                }
            }
        };
        (dir, thread::spawn(serve))
    }

    fn replies() -> Vec<String> {
        let line = |text: &str| format!("{text}\r\n");
        vec![
            line("{\"return\": {}}"),
            line(EVENT) + &line(CPUS),
            line(IOTHREADS),
            line(STATUS),
        ]
    }

    fn leak(text: &str) -> &'static str {
        Box::leak(text.to_owned().into_boxed_str())
    }

    fn talk(
        clients: usize,
        greeting: &str,
        replies: &[String],
        budget: Duration,
    ) -> Result<ThreadRoles, String> {
        let replies = replies.iter().map(|reply| leak(reply)).collect();
        let (dir, server) = monitor(clients, leak(greeting), replies);
        let facts = query(&dir.path().join("qmp"), budget).map_err(|error| error.to_string());
        server.join().unwrap();
        facts
    }

    #[test]
    fn a_conversation() {
        let facts = talk(1, &format!("{GREETING}\r\n{EVENT}\r\n"), &replies(), BUDGET).unwrap();
        assert_eq!(facts.vcpus, [(11, 0), (12, 1)].into());
        assert_eq!(
            facts.iothreads,
            [(13, "iothread-virtioscsi0".to_owned())].into()
        );
        assert_eq!(facts.status, "running");
    }

    #[test]
    fn one_that_hangs_up_is_asked_again() {
        assert_eq!(
            talk(2, &format!("{GREETING}\n"), &replies(), BUDGET)
                .unwrap()
                .vcpus
                .len(),
            2
        );
    }

    #[test]
    fn busy_silent_and_garbage_have_their_words() {
        let greeting = format!("{GREETING}\n");
        let refusal =
            "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such command\"}}\n"
                .to_owned();
        let long = " ".repeat(MAX_BYTES + 1);
        let no_cpus = [
            "{\"return\": {}}\n".to_owned(),
            "{\"return\": [{\"cpu-index\": -1}]}\n".to_owned(),
        ];
        for (greeting, replies, message) in [
            (
                "",
                &[] as &[String],
                "its monitor is busy with another client, or QEMU hangs",
            ),
            (
                &greeting,
                &[],
                "its monitor did not reply to qmp_capabilities",
            ),
            (
                &greeting,
                &replies()[..2],
                "its monitor did not reply to query-iothreads",
            ),
            (
                "hello\n",
                &[],
                "its monitor sent an invalid reply: expected value at line 1 column 1",
            ),
            (
                "{}\n",
                &[],
                "its monitor sent an invalid reply: a reply of unknown kind",
            ),
            (
                "\n",
                &[],
                "its monitor sent an invalid reply: EOF while parsing a value at line 1 column 0",
            ),
            (
                &format!("{EVENT}\n"),
                &[],
                "its monitor sent an invalid reply: no greeting",
            ),
            (
                &format!("{greeting}{greeting}"),
                &[],
                "its monitor sent an invalid reply: a second greeting",
            ),
            (
                &long,
                &[],
                "its monitor sent an invalid reply: more than 1048576 bytes",
            ),
            (
                &greeting,
                &[refusal],
                "its monitor rejected qmp_capabilities: no such command",
            ),
            (
                &greeting,
                &no_cpus,
                "its monitor sent an invalid reply: query-cpus-fast: invalid value: integer `-1`, expected usize",
            ),
        ] {
            // Long enough for a loaded machine to answer, too short for a second try.
            let waits = message.contains("busy") || message.contains("did not reply");
            let budget = if waits { TRY } else { BUDGET };
            assert_eq!(talk(1, greeting, replies, budget).unwrap_err(), message);
        }
    }

    #[test]
    fn the_budget_bounds_it_all() {
        let begin = Instant::now();
        let (dir, _server) = monitor(1, "", vec!["x"]);
        let budget = Duration::from_millis(300);
        assert!(matches!(
            query(&dir.path().join("qmp"), budget),
            Err(QmpError::Busy)
        ));
        assert!(begin.elapsed() < budget + TRY);
    }

    #[test]
    fn no_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let error = |path: &Path| query(path, BUDGET).unwrap_err().to_string();
        assert_eq!(
            error(&socket),
            "its monitor cannot be reached: No such file or directory"
        );
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(
            error(&socket),
            "its monitor cannot be reached: Connection refused"
        );
        assert_eq!(
            error(Path::new(&"x".repeat(200))),
            "its monitor cannot be reached: File name too long"
        );
    }

    #[test]
    fn recorded_conversations() {
        let text = [GREETING, "{\"return\": {}}", EVENT, CPUS, IOTHREADS, STATUS].join("\n");
        assert_eq!(ThreadRoles::parse(&text).unwrap().vcpus.len(), 2);
        assert_eq!(ThreadRoles::parse("").unwrap(), ThreadRoles::default());
        for text in [
            "garbage",
            "[]",
            "\"return\"",
            "1",
            &"[".repeat(100_000),
            &format!("{text}\n{STATUS}"),
        ] {
            assert!(ThreadRoles::parse(text).is_err());
        }
        let huge = text.replace("\"cpu-index\": 1", "\"cpu-index\": 18446744073709551615");
        assert_eq!(
            ThreadRoles::parse(&huge).unwrap_err(),
            "query-cpus-fast: vCPU 18446744073709551615 is beyond 8191"
        );
    }

    proptest! {
        #[test]
        fn no_reply_panics(text in "\\PC*|\\{\"return\": *[\\[{\"a-z0-9:,}\\]-]*\\}") {
            let _ = ThreadRoles::parse(&text);
        }
    }
}

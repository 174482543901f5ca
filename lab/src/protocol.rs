//! What goes over the virtio-serial port between the lab and its agent: one JSON object a line.
//!
//! A line is complete in itself, so that whoever meets half a line (the other end was reset to a
//! snapshot in the middle of it) drops it at the next newline. Every request carries the number of
//! its session; the agent ignores those of an earlier one, which may still sit in a socket buffer.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Name of the port, as the guest sees it under `/dev/virtio-ports/`.
pub const PORT: &str = "pinfold.lab";

/// A request to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Number the host drew when it connected.
    pub session: u64,
    /// Number of the request in its session.
    pub id: u64,
    /// What is asked.
    pub ask: Ask,
}

/// What can be asked of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// Begin a session: requests of other sessions are ignored from now on.
    Hello,
    /// Run a program to its end.
    Run(Run),
    /// Write a file.
    Put {
        /// Absolute path; missing directories are made.
        path: String,
        /// Permission bits.
        mode: u32,
        /// The content.
        data: Bytes,
    },
    /// Read a file.
    Get {
        /// Absolute path.
        path: String,
    },
}

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Program and arguments; the program is looked up in the agent's PATH.
    pub argv: Vec<String>,
    /// Standard input; none means /dev/null.
    pub stdin: Option<Bytes>,
    /// Variables added to the agent's own environment.
    pub env: Vec<(String, String)>,
    /// After so many milliseconds its process group is killed.
    pub timeout_ms: u64,
}

/// The agent's answer to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Session of the request.
    pub session: u64,
    /// Number of the request.
    pub id: u64,
    /// What came of it.
    pub answer: Answer,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// The session has begun.
    Hello {
        /// Key of the files that the agent was unpacked with.
        payload: String,
    },
    /// The program ended.
    Done(Done),
    /// The file is written.
    Written,
    /// The file's content.
    Content(Bytes),
    /// It could not be done: object and OS text.
    Failed(String),
}

/// How a program ended and what it printed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// It was killed for running longer than its time.
    pub timed_out: bool,
    /// It ended, but something it left behind holds its stdout or stderr open.
    pub left_open: bool,
    /// Standard output.
    pub stdout: Bytes,
    /// Standard error.
    pub stderr: Bytes,
}

/// Bytes as a JSON string with one character (U+0000 to U+00FF) a byte: readable for text, exact
/// for the rest.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = self.0.iter().map(|&byte| char::from(byte)).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = text.chars().map(|c| u8::try_from(u32::from(c)));
        let bytes: Result<_, _> = bytes.collect();
        bytes
            .map(Bytes)
            .map_err(|_| serde::de::Error::custom("a character above U+00FF"))
    }
}

/// One line, newline and all, of a request or reply.
pub fn line<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_and_stays_on_one_line() {
        let all = Bytes((0..=255).collect());
        let reply = Reply {
            session: 1,
            id: 2,
            answer: Answer::Content(all),
        };
        let line = line(&reply).unwrap();
        assert_eq!(line.iter().filter(|&&b| b == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Reply>(&line).unwrap(), reply);
    }

    #[test]
    fn text_is_readable_on_the_wire() {
        let line = line(&Bytes(b"cpu 6\n".to_vec())).unwrap();
        assert_eq!(line, b"\"cpu 6\\n\"\n");
    }

    #[test]
    fn characters_that_are_no_byte_are_refused() {
        assert!(serde_json::from_str::<Bytes>("\"\u{100}\"").is_err());
    }
}

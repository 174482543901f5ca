//! Scheduling policies of threads; see sched(7) and proc_pid_stat(5).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::task::TaskId;
use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

/// A thread's scheduling policy, with the priority of a real-time one, 1 to 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SchedPolicy {
    /// SCHED_OTHER, that of most threads.
    Other,
    /// SCHED_FIFO.
    Fifo(u8),
    /// SCHED_RR.
    RoundRobin(u8),
    /// SCHED_BATCH.
    Batch,
    /// SCHED_IDLE.
    Idle,
    /// SCHED_DEADLINE, whose parameters are not known here.
    Deadline,
    /// SCHED_EXT.
    Ext,
}

impl SchedPolicy {
    /// From fields 41 and 40 of /proc/PID/stat, numbered as in include/uapi/linux/sched.h.
    fn from_fields(policy: &str, priority: &str) -> Option<Self> {
        let priority = priority.parse().ok();
        Some(match policy {
            "0" => Self::Other,
            "1" => Self::Fifo(priority?),
            "2" => Self::RoundRobin(priority?),
            "3" => Self::Batch,
            "5" => Self::Idle,
            "6" => Self::Deadline,
            "7" => Self::Ext,
            _ => return None,
        })
    }

    /// The priority of a real-time policy.
    pub fn priority(self) -> Option<u8> {
        match self {
            Self::Fifo(priority) | Self::RoundRobin(priority) => Some(priority),
            Self::Other | Self::Batch | Self::Idle | Self::Deadline | Self::Ext => None,
        }
    }
}

impl fmt::Display for SchedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other => f.write_str("other"),
            Self::Fifo(priority) => write!(f, "fifo:{priority}"),
            Self::RoundRobin(priority) => write!(f, "rr:{priority}"),
            Self::Batch => f.write_str("batch"),
            Self::Idle => f.write_str("idle"),
            Self::Deadline => f.write_str("deadline"),
            Self::Ext => f.write_str("ext"),
        }
    }
}

impl From<SchedPolicy> for String {
    fn from(policy: SchedPolicy) -> Self {
        policy.to_string()
    }
}

impl TryFrom<String> for SchedPolicy {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl FromStr for SchedPolicy {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let priority = |number: &str| {
            let digits = number.bytes().all(|byte| byte.is_ascii_digit());
            let priority = number.parse().ok().filter(|_| digits);
            priority.filter(|priority| (1..=99).contains(priority))
        };
        let policy = match text.split_once(':') {
            Some(("fifo", number)) => priority(number).map(Self::Fifo),
            Some(("rr", number)) => priority(number).map(Self::RoundRobin),
            Some(_) => None,
            None => match text {
                "other" => Some(Self::Other),
                "batch" => Some(Self::Batch),
                "idle" => Some(Self::Idle),
                "deadline" => Some(Self::Deadline),
                "ext" => Some(Self::Ext),
                _ => None,
            },
        };
        policy.ok_or_else(|| {
            format!("{text:?} is not a policy; write other, or fifo:1 to fifo:99, or rr:1 to rr:99")
        })
    }
}

/// A thread's policy.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the thread has ended.
pub fn policy(root: &Sysroot, task: &TaskId) -> Result<SchedPolicy> {
    let path = format!("proc/{}/task/{}/stat", task.pid, task.tid);
    let line = root.read_record(&path)?;
    parse_policy(&line)
        .ok_or_else(|| Error::malformed(path, format!("{:?} has no policy", line.trim_end())))
}

/// The policy in a line of /proc/PID/stat, whose name may contain anything.
fn parse_policy(line: &str) -> Option<SchedPolicy> {
    let (_, fields) = line.rsplit_once(") ")?;
    // Field 3, the state, is the first one here.
    let mut fields = fields.split_ascii_whitespace().skip(40 - 3);
    let priority = fields.next()?;
    SchedPolicy::from_fields(fields.next()?, priority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_in_stat_lines() {
        let line = |end: &str| {
            let zeros = " 0".repeat(39 - 3);
            format!("17 (a) b (c) S{zeros} {end}\n")
        };
        for (end, policy) in [
            ("0 0 0 0", Some("other")),
            ("1 1 0 0", Some("fifo:1")),
            ("49 2", Some("rr:49")),
            ("0 3", Some("batch")),
            ("0 5", Some("idle")),
            ("0 6", Some("deadline")),
            ("0 7", Some("ext")),
            ("0 4", None),
            ("x 1", None),
            ("0", None),
        ] {
            let found = parse_policy(&line(end)).map(|policy| policy.to_string());
            assert_eq!(found.as_deref(), policy, "{end}");
        }
        for garbage in ["", "\n", "17", "17 (a) S", ") "] {
            assert_eq!(parse_policy(garbage), None, "{garbage:?}");
        }
    }

    #[test]
    fn policies_as_they_are_written() {
        for text in [
            "other", "fifo:1", "fifo:99", "rr:5", "batch", "idle", "deadline", "ext",
        ] {
            let policy: SchedPolicy = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(serde_json::from_str::<SchedPolicy>(&json).unwrap(), policy);
        }
        for text in [
            "",
            "fifo",
            "fifo:",
            "fifo:0",
            "fifo:100",
            "fifo:+1",
            "fifo:1\n",
            "FIFO:1",
            "other:1",
            "rr:-1",
            "fifo:99999999999",
        ] {
            assert!(text.parse::<SchedPolicy>().is_err(), "{text:?}");
        }
    }
}

//! A change is data: it is computed first, then applied.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::knobs::Knob;
use super::value::{NO_TIME, Value};

/// A knob as it was found on the host: what a tool lists, and what a change is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// What would be set.
    pub knob: Knob,
    /// Its name for people: `IRQ 24 (nvme0q1)`. The changes made of it share it.
    pub label: Arc<str>,
    /// Its value.
    pub found: Value,
}

impl Setting {
    /// A knob with its label and value.
    pub fn new(knob: Knob, label: impl Into<Arc<str>>, found: impl Into<Value>) -> Self {
        Self {
            knob,
            label: label.into(),
            found: found.into(),
        }
    }

    /// The change that brings the object to `wanted`.
    pub fn want(self, wanted: impl Into<Value>) -> Change {
        Change {
            knob: self.knob,
            label: self.label,
            found: self.found,
            wanted: wanted.into(),
        }
    }
}

/// One thing to set: the object, the value found and the value wanted. If they are equal there is
/// nothing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What is set.
    pub knob: Knob,
    /// Its name for people.
    pub label: Arc<str>,
    /// Its value.
    pub found: Value,
    /// The value wanted.
    pub wanted: Value,
}

impl Change {
    /// Whether there is nothing to do.
    pub fn is_noop(&self) -> bool {
        self.found == self.wanted
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Knob::Trigger(_) | Knob::NodeCompaction(_) | Knob::PciReset(_) = &self.knob {
            return write!(f, "{}: {}", self.label, self.wanted);
        }
        let [found, wanted] = [&self.found, &self.wanted].map(|value| shown(&self.knob, value));
        write!(f, "{}: {found} -> {wanted}", self.label)
    }
}

/// A value in words, if it has some.
fn shown(knob: &Knob, value: &Value) -> String {
    if let (Knob::WakeupLatency(_), Some(text)) = (knob, value.as_text()) {
        // In the kernel's file 0 means no limit (Documentation/ABI/testing/sysfs-devices-power).
        return match text {
            "0" => "any".to_owned(),
            NO_TIME => "0 us".to_owned(),
            microseconds => format!("{microseconds} us"),
        };
    }
    match value {
        value if value.is_unset() => "unset".into(),
        Value::Online(false) => "offline".into(),
        Value::Online(true) => "online".into(),
        Value::Cpus(_) | Value::Present(_) | Value::Text(_) => value.to_string(),
    }
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "message")]
pub enum Outcome {
    /// Dry run: it would be made.
    Planned,
    /// Made.
    Changed,
    /// There was nothing to do.
    Already,
    /// The object vanished meanwhile: a thread ended, a device went.
    Gone,
    /// Never allowed by the kernel, which is not a failure: a managed IRQ, a per-CPU kthread.
    Refused(String),
    /// Another program has set it since, so it was not changed.
    #[serde(rename = "left")]
    Foreign(String),
    /// Tried and failed, in the system's words.
    Failed(String),
}

/// A change and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The change.
    pub change: Change,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change {
            knob,
            label,
            found,
            wanted,
        } = &self.change;
        match &self.outcome {
            Outcome::Planned | Outcome::Changed => self.change.fmt(f),
            Outcome::Already => write!(f, "{label}: already {}", shown(knob, found)),
            Outcome::Gone => write!(f, "{label}: gone"),
            Outcome::Refused(why) => write!(f, "{label}: refused: {why}"),
            Outcome::Foreign(why) => write!(f, "{label}: left as it is: {why}"),
            Outcome::Failed(why) => write!(f, "{label}: set to {}: {why}", shown(knob, wanted)),
        }
    }
}

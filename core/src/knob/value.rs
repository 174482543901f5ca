//! The value of a knob, as a type; as text only in files, messages and JSON.

use std::fmt;

use serde::{Serialize, Serializer};

use super::knobs::Knob;
use crate::cpuset::{CpuSet, CpuSetPool};
use crate::error::{Error, Result};
use crate::sys::sched::SchedPolicy;
use crate::sysroot::cpu_list;

/// The value of a knob. `Display` prints the text that [`Knob::parse`] reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// CPUs, as a list; empty if unset.
    Cpus(CpuSet),
    /// Whether a CPU is online: `1` or `0`.
    Online(bool),
    /// Whether a folder, a device or a controller is there: `present` or `absent`.
    Present(bool),
    /// Anything else: a governor, a cgroup, a number.
    Text(String),
}

/// The value of a folder or device that is there.
pub const PRESENT: Value = Value::Present(true);
/// The value of a folder or device that is not there.
pub const ABSENT: Value = Value::Present(false);
/// The text of a wake-up latency of no time at all, where `0` is any time.
pub const NO_TIME: &str = "n/a";

impl Value {
    /// A value that is a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// The CPUs; `None` for a value of another type.
    pub fn cpus(&self) -> Option<&CpuSet> {
        if let Self::Cpus(cpus) = self {
            Some(cpus)
        } else {
            None
        }
    }

    /// The text; `None` for a value of another type.
    pub fn as_text(&self) -> Option<&str> {
        if let Self::Text(text) = self {
            Some(text)
        } else {
            None
        }
    }

    /// Makes its CPUs share their memory with equal sets.
    pub fn share(&mut self, pool: &mut CpuSetPool) {
        if let Self::Cpus(cpus) = self {
            *cpus = pool.share(std::mem::take(cpus));
        }
    }

    /// Whether it prints as nothing, which means unset.
    pub fn is_unset(&self) -> bool {
        match self {
            Self::Cpus(cpus) => cpus.is_empty(),
            Self::Text(text) => text.is_empty(),
            Self::Online(_) | Self::Present(_) => false,
        }
    }
}

impl From<CpuSet> for Value {
    fn from(cpus: CpuSet) -> Self {
        Self::Cpus(cpus)
    }
}

impl From<&CpuSet> for Value {
    fn from(cpus: &CpuSet) -> Self {
        Self::Cpus(cpus.clone())
    }
}

impl From<&Value> for Value {
    fn from(value: &Value) -> Self {
        value.clone()
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpus(cpus) => cpus.fmt(f),
            Self::Online(true) => f.write_str("1"),
            Self::Online(false) => f.write_str("0"),
            Self::Present(true) => f.write_str("present"),
            Self::Present(false) => f.write_str("absent"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Knob {
    /// Reads a value of this knob from text: a kernel file, saved state.
    ///
    /// # Errors
    /// [`Error`] if the text is not such a value.
    pub fn parse(&self, text: &str) -> Result<Value> {
        match self {
            Self::Irq(_)
            | Self::DefaultIrq
            | Self::QueueCpus(_)
            | Self::Workqueues
            | Self::Kthread(_)
            | Self::Thread(_)
            | Self::UnitCpus(_)
            | Self::CgroupCpus(_)
            | Self::ContainerCpus(_)
            | Self::ExclusiveCpus(_)
            | Self::Trace(_) => cpu_list(&self.to_string(), text).map(Value::Cpus),
            Self::CpuOnline(_) => match text {
                "1" => Ok(Value::Online(true)),
                "0" => Ok(Value::Online(false)),
                _ => Err(self.malformed(text, "1 or 0")),
            },
            Self::WakeupLatency(_) => match text == NO_TIME || text.parse::<u32>().is_ok() {
                true => Ok(Value::text(text)),
                false => Err(self.malformed(text, "microseconds or n/a")),
            },
            Self::HaltPolling => match text.parse::<u32>() {
                Ok(_) => Ok(Value::text(text)),
                Err(_) => Err(self.malformed(text, "a number of nanoseconds")),
            },
            Self::ThreadPolicy(_) => match text.parse::<SchedPolicy>() {
                Ok(policy) => Ok(Value::text(policy.to_string())),
                Err(_) => Err(self.malformed(text, "a scheduling policy, as in other or fifo:1")),
            },
            Self::Cgroup(_)
            | Self::ChildCpusets(_)
            | Self::ThreadTimer(_)
            | Self::PciFunction(_) => {
                presence(text).ok_or_else(|| self.malformed(text, "present or absent"))
            }
            // A cgroup's type or `emptied` is possible too.
            Self::ThreadedCgroup(_) | Self::Delegation(_) => {
                Ok(presence(text).unwrap_or_else(|| Value::text(text)))
            }
            Self::Governor(_)
            | Self::EnergyPreference(_)
            | Self::UnitOverrides
            | Self::CgroupOf(_)
            | Self::CgroupOfThread(_)
            | Self::Partition(_)
            | Self::Sysctl(_)
            | Self::Trigger(_)
            | Self::NodeCompaction(_)
            | Self::PciDriver(_)
            | Self::PciResetMethod(_)
            | Self::PciReset(_) => Ok(Value::text(text)),
        }
    }

    fn malformed(&self, text: &str, expected: &str) -> Error {
        Error::malformed(self.to_string(), format!("{text:?} is not {expected}"))
    }
}

fn presence(text: &str) -> Option<Value> {
    match text {
        "present" => Some(PRESENT),
        "absent" => Some(ABSENT),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are_printed() {
        let cgroup = || "a.slice".to_owned();
        for (knob, texts) in [
            (Knob::Irq(1), &["0-5,12", ""][..]),
            (Knob::CpuOnline(6), &["0", "1"]),
            (Knob::Cgroup(cgroup()), &["present", "absent"]),
            (
                Knob::ThreadedCgroup(cgroup()),
                &["absent", "threaded", "domain"],
            ),
            (
                Knob::Delegation(cgroup()),
                &["present", "absent", "emptied"],
            ),
            (Knob::Partition(cgroup()), &["isolated invalid (why)"]),
        ] {
            for text in texts {
                assert_eq!(knob.parse(text).unwrap().to_string(), *text, "{knob:?}");
            }
        }
    }

    #[test]
    fn a_value_that_cannot_be_parsed_is_an_error() {
        for (knob, text, message) in [
            (
                Knob::Irq(1),
                "x",
                "IRQ 1: \"x\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (Knob::CpuOnline(6), "", "CPU 6: \"\" is not 1 or 0"),
            (
                Knob::Cgroup("a".into()),
                "",
                "cgroup /a: \"\" is not present or absent",
            ),
        ] {
            assert_eq!(knob.parse(text).unwrap_err().to_string(), message);
        }
    }
}

//! The result of a check.

use std::fmt;

use pinfold_core::Error;
use serde::Serialize;

/// How severe a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Does not stop a start, but should be known.
    Warn,
    /// The VM cannot start, or cannot have its CPUs.
    Error,
}

/// Where kernel options are explained, by what each of them keeps away.
pub(crate) const EXPLAINED: &str = "see docs/noise.md";

/// The keys of all findings, by which settings mute warnings (`ignore`). They are permanent.
pub(crate) const KEYS: [&str; 42] = [
    "affinity",
    "chain",
    "command-line",
    "containers",
    "emulator",
    "energy_preference",
    "governor",
    "guest-cores",
    "halt_poll_ns",
    "helpers",
    "hookscript",
    "host",
    "housekeeping_energy_preference",
    "housekeeping_governor",
    "hugepages",
    "idle_vm",
    "iothreads",
    "irqbalance",
    "isolated",
    "kinds",
    "l3",
    "max_latency_us",
    "memory",
    "method",
    "numa",
    "other-nodes",
    "other-vms",
    "pinning",
    "pins",
    "profiles",
    "recover",
    "reset_pci",
    "settings",
    "smt",
    "state",
    "storage",
    "topoext",
    "vcpu_policy",
    "vcpus",
    "vm",
    "vmid.conf",
    "zfs",
];

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How severe it is.
    pub level: Level,
    /// What was checked: a key of the settings, or a word.
    pub check: &'static str,
    /// What was found.
    pub what: String,
    /// What to do about it; empty if that is obvious.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
    /// Whether it is that something could not be read, so that the check was not made.
    #[serde(skip)]
    pub unread: bool,
}

impl Finding {
    /// The key of the check, which is the same in all versions: its name in lower case, with dashes.
    pub(crate) fn key(&self) -> String {
        self.check.to_lowercase().replace(' ', "-")
    }

    pub(crate) fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check,
            what: what.into(),
            fix: String::new(),
            unread: false,
        }
    }

    pub(crate) fn warn(
        check: &'static str,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warn,
            check,
            what: what.into(),
            fix: fix.into(),
            unread: false,
        }
    }

    pub(crate) fn error(
        check: &'static str,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Error,
            check,
            what: what.into(),
            fix: fix.into(),
            unread: false,
        }
    }

    /// That a check could not be made, since something could not be read.
    pub(crate) fn unread(check: &'static str, error: &Error) -> Self {
        Self {
            unread: true,
            ..Self::error(check, error.to_string(), "")
        }
    }

    /// An error of a reader: of what it read, or that it could not.
    pub(crate) fn of_error(check: &'static str, error: &Error) -> Self {
        match error {
            Error::Io { .. } => Self::unread(check, error),
            Error::Malformed { .. } | Error::Cpus { .. } | Error::Unusable { .. } => {
                Self::error(check, error.to_string(), "")
            }
        }
    }

    /// Makes an error a warning: with `required = false` the VM starts without isolated CPUs.
    pub(crate) fn stops_no_start(&mut self) {
        if self.level == Level::Error {
            self.level = Level::Warn;
            self.what += "; the VM starts without isolated CPUs, as required = false allows";
        }
    }
}

/// As in a note of pre-start.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.fix.is_empty() {
            Ok(())
        } else {
            write!(f, "; {}", self.fix)
        }
    }
}

//! The result of a check.

use std::fmt;

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
}

impl Finding {
    pub(crate) fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check,
            what: what.into(),
            fix: String::new(),
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

//! What can go wrong below the command line.

use std::io;
use std::path::PathBuf;

use crate::cpuset::CpuSetError;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error that names the object, what was tried, and the system's words.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be used.
    #[error("{}: {tried}: {}", path.display(), os_text(source))]
    Io {
        /// The full path.
        path: PathBuf,
        /// What was tried: `read`, `write 0-5`, …
        tried: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A file or a reply has unexpected contents.
    #[error("{object}: {why}")]
    Malformed {
        /// What was read.
        object: String,
        /// What is wrong with it, with the value.
        why: String,
    },
    /// A CPU list or mask that cannot be read.
    #[error("{object}: {source}")]
    Cpus {
        /// What was read.
        object: String,
        /// Why it cannot be read.
        source: CpuSetError,
    },
    /// A request cannot be met; the text names what is missing and what to do next.
    #[error("{object}: {why}")]
    Unusable {
        /// What was asked for.
        object: String,
        /// Why it cannot be met, and the next step.
        why: String,
    },
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(path: impl Into<PathBuf>, tried: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            path: path.into(),
            tried: tried.into(),
            source,
        }
    }

    /// An [`Error::Malformed`].
    pub fn malformed(object: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Malformed {
            object: object.into(),
            why: why.into(),
        }
    }

    /// An [`Error::Unusable`].
    pub fn unusable(object: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unusable {
            object: object.into(),
            why: why.into(),
        }
    }

    /// Whether the user lacks the permission.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Whether the object is not there (any more): ENOENT for files, ESRCH for processes, ENODEV
    /// for devices.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_gone(source))
    }
}

/// Whether a system error means that the object does not exist (any more).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    use nix::libc::{ENODEV, ENOENT, ENOTDIR, ESRCH};
    matches!(
        error.raw_os_error(),
        Some(ENOENT | ESRCH | ENODEV | ENOTDIR)
    )
}

/// The system's words for an error, without Rust's ` (os error N)`.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text
            .trim_end_matches(&format!(" (os error {code})"))
            .to_owned(),
        None => text,
    }
}

/// The system error behind ours, for the code that distinguishes gone, refused and failed.
pub(crate) fn into_io(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

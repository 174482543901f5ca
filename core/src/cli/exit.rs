//! The exit codes.

use std::process::ExitCode;

/// The exit codes, the same in every tool (as util-linux's chcpu), but for [`Exit::Unknown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Applied, or nothing to do.
    Success = 0,
    /// Nothing was done, or everything that was done was undone.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A command that only reads could not read the host.
    Unknown = 3,
    /// Some items failed and some were done.
    Partial = 64,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The part of the help that every tool ends with.
pub const EXIT_CODES: &str = "\
Exit codes:
  0   success, or nothing to do
  1   failed
  2   the command line is wrong
  64  some items failed and others succeeded";

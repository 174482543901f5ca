//! The options that every tool has, and the run from the command line to the exit code.

pub mod filter;
pub mod report;
mod table;
pub mod terminal;

pub use table::Table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use self::report::{Exit, Report, Verbosity};
use self::terminal::err;
use crate::error::Error;
use crate::host::Host;
use crate::knob::{Applied, Change, Outcome, apply_each};
use crate::state::save::{self, Entry};
use crate::text::printable;

/// The options that every tool has.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Show what is now and change nothing
    #[arg(long, conflicts_with_all = ["dry_run", "save", "restore"])]
    pub list: bool,

    /// Show what would be changed and change nothing
    #[arg(short = 'n', long, conflicts_with = "save")]
    pub dry_run: bool,

    /// Save the values before they are changed, in a new file
    #[arg(long, value_name = "FILE", conflicts_with = "restore")]
    pub save: Option<PathBuf>,

    /// Put back the values saved in a file, which is removed when all is back; what others have set
    /// meanwhile is left
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,

    /// How much is told, and where the host's files are
    #[command(flatten)]
    pub output: Output,
}

/// How much is told, and where the host's files are.
#[derive(Debug, Clone, clap::Args)]
pub struct Output {
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub json: bool,

    /// Name also what is left alone, and why
    #[arg(short, long, global = true)]
    pub verbose: bool,

    /// Print nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Look for the host's files (sys, proc, etc, run) below this folder
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    pub sysroot: PathBuf,
}

impl Output {
    /// The root of the host's files.
    pub fn root(&self) -> Host {
        Host::new(&self.sysroot)
    }

    /// The report that these options ask for.
    pub fn report(&self, tool: &'static str) -> Report {
        let verbosity = match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        };
        Report::new(tool, verbosity, self.json)
    }
}

impl Common {
    /// Carries changes out as the options say: shows them, or saves what they change, makes them
    /// and reports.
    ///
    /// # Errors
    /// Where the values cannot be saved; nothing has been changed then.
    pub fn carry_out(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
        changes: Vec<Change>,
    ) -> anyhow::Result<Exit> {
        self.make(root, report, tool, changes)?;
        Ok(report.finish())
    }

    /// As [`carry_out`](Self::carry_out), where what comes back is not just what the changes set.
    ///
    /// # Errors
    /// Where the values cannot be saved; nothing has been changed then.
    pub fn carry_out_saving(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
        changes: Vec<Change>,
        entries: Vec<Entry>,
    ) -> anyhow::Result<Exit> {
        self.make_saving(root, report, tool, changes, entries)?;
        Ok(report.finish())
    }

    /// As [`carry_out`](Self::carry_out), less the report's end: for a tool that looks at the host
    /// once more afterwards.
    ///
    /// # Errors
    /// Where the values cannot be saved; nothing has been changed then.
    pub fn make(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
        changes: Vec<Change>,
    ) -> anyhow::Result<()> {
        let mut entries = Vec::new();
        if self.save.is_some() {
            entries.extend(
                changes
                    .iter()
                    .filter(|change| !change.is_noop())
                    .map(Entry::from),
            );
        }
        self.make_saving(root, report, tool, changes, entries)
    }

    fn make_saving(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
        changes: Vec<Change>,
        entries: Vec<Entry>,
    ) -> anyhow::Result<()> {
        if !self.dry_run {
            check_root(root)?;
        }
        if let Some(path) = self.save.as_ref().filter(|_| !self.dry_run) {
            save::write(path, tool, entries)?;
        }
        if self.dry_run {
            let outcome = |change: &Change| {
                if change.is_noop() {
                    Outcome::Already
                } else {
                    Outcome::Planned
                }
            };
            changes.into_iter().for_each(|change| {
                report.changes(&[Applied {
                    outcome: outcome(&change),
                    change,
                }])
            });
        } else {
            apply_each(root, changes, |done| report.changes(&[done]));
        }
        Ok(())
    }

    /// Does what `--restore` asks for; `None` where it was not given.
    ///
    /// # Errors
    /// Where the file is none that this tool saved, or cannot be removed at the end.
    pub fn restore(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
    ) -> anyhow::Result<Option<Exit>> {
        let Some(path) = &self.restore else {
            return Ok(None);
        };
        let entries = save::read(path, tool)?;
        if !self.dry_run {
            check_root(root)?;
        }
        let dones = save::restore(root, entries, self.dry_run);
        report.changes(&dones);
        if report.failures() == 0 && !self.dry_run {
            save::remove(path)?;
        }
        Ok(Some(report.finish()))
    }
}

/// Makes sure that the running host may be changed at all, so that this is said once and not for
/// every object.
///
/// # Errors
/// Where we are not root; under `--sysroot` the files' own permissions decide.
pub fn check_root(root: &Host) -> anyhow::Result<()> {
    anyhow::ensure!(
        !root.is_live() || nix::unistd::geteuid().is_root(),
        "changing the host needs root; --list and --dry-run do not"
    );
    Ok(())
}

/// Prints a `--list` and what could not be seen.
pub fn listed(report: &mut Report, table: &Table) -> Exit {
    report.table(table);
    Exit::Success
}

/// A tool's run: reads the command line, does it, prints what went wrong once, and gives the exit
/// code. A [`clap::Error`] that `run` returns is an error of the command line too.
pub fn main<A: Parser>(tool: &str, run: impl FnOnce(A) -> anyhow::Result<Exit>) -> ExitCode {
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(error) => return refused(&error),
    };
    match run(args) {
        Ok(exit) => exit.into(),
        Err(error) => match error.downcast_ref::<clap::Error>() {
            Some(usage) => refused(usage),
            None => {
                err(&format!("{tool}: {}\n", printable(&in_words(&error))));
                Exit::Failed.into()
            }
        },
    }
}

/// Prints what clap answers to a command line instead of running it: an error, help or the version.
fn refused(answer: &clap::Error) -> ExitCode {
    // A closed pipe is no reason to fail.
    let _ = answer.print();
    if answer.use_stderr() {
        Exit::Usage.into()
    } else {
        Exit::Success.into()
    }
}

/// An error with what caused it. Our own errors say their causes already.
fn in_words(error: &anyhow::Error) -> String {
    let mut words = Vec::new();
    for cause in error.chain() {
        words.push(cause.to_string());
        if cause.is::<Error>() {
            break;
        }
    }
    words.join(": ")
}

/// The part of the help that every tool ends with.
pub const EXIT_CODES: &str = "\
Exit codes:
  0   done, or nothing to do
  1   failed
  2   the command line is wrong
  64  some items failed and some were done";

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn the_systems_words_are_said_once() {
        let gone = Error::io(
            "/x",
            "read",
            std::io::Error::from_raw_os_error(nix::libc::ENOENT),
        );
        let error = Err::<(), _>(gone).context("pre-start").unwrap_err();
        assert_eq!(
            in_words(&error),
            "pre-start: /x: read: No such file or directory"
        );
        assert_eq!(in_words(&anyhow::anyhow!("b").context("a")), "a: b");
    }
}

//! The options that every tool has, and the run from the command line to the exit code.

mod exit;
pub mod filter;
pub mod report;
mod table;
pub mod terminal;

pub use exit::{EXIT_CODES, Exit};
pub use table::Table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ErrorKind};

use self::report::{Report, Verbosity};
use self::terminal::err;
use crate::error::Error;
use crate::host::Host;
use crate::knob::{Applied, Change, Knob, Outcome, apply_each};
use crate::state::save::{self, Entry, Restorable};
use crate::text::printable;

/// The options that every tool has.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Print the current values and change nothing
    #[arg(long, conflicts_with_all = ["dry_run", "save", "restore"])]
    pub list: bool,

    /// Print what would be changed and change nothing
    #[arg(short = 'n', long, conflicts_with = "save")]
    pub dry_run: bool,

    /// Save the old values in a new file before changing them
    #[arg(long, value_name = "FILE", conflicts_with = "restore")]
    pub save: Option<PathBuf>,

    /// Restore the values saved in a file, and remove it when all are restored; values that something
    /// else has set since are kept
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,

    /// Form and amount of the output, and the root of the host's files
    #[command(flatten)]
    pub output: Output,
}

/// Form and amount of the output, and the root of the host's files.
#[derive(Debug, Clone, clap::Args)]
pub struct Output {
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub json: bool,

    /// Also list what was not changed, and why
    #[arg(short, long, global = true)]
    pub verbose: bool,

    /// Print errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Use the host's files (sys, proc, etc, run) below this folder
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
    /// Carries changes out by the options: prints them, or saves the old values, applies the changes
    /// and reports.
    ///
    /// # Errors
    /// If the values cannot be saved; then nothing has been changed.
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

    /// Like [`carry_out`](Self::carry_out), if more is to be restored than the changes set.
    ///
    /// # Errors
    /// If the values cannot be saved; then nothing has been changed.
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

    /// Like [`carry_out`](Self::carry_out) without the end of the report, for a tool that reads the
    /// host once more afterwards.
    ///
    /// # Errors
    /// If the values cannot be saved; then nothing has been changed.
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
            for change in changes {
                report.changes(&[Applied {
                    outcome: outcome(&change),
                    change,
                }]);
            }
        } else {
            apply_each(root, changes, |done| report.changes(&[done]));
        }
        Ok(())
    }

    /// Carries out `--restore`; `None` if it was not given. `is_own` is true for the knobs that this
    /// tool sets.
    ///
    /// # Errors
    /// If others can write the file, it was not saved by this tool or has other knobs, or it cannot
    /// be removed at the end.
    pub fn restore(
        &self,
        root: &Host,
        report: &mut Report,
        tool: &str,
        is_own: impl Fn(&Knob) -> bool,
    ) -> anyhow::Result<Option<Exit>> {
        let Some(path) = &self.restore else {
            return Ok(None);
        };
        let Restorable { entries, newer } = save::read(path, tool, is_own)?;
        if !self.dry_run {
            check_root(root)?;
        }
        let dones = save::restore(root, entries, self.dry_run);
        report.changes(&dones);
        if let Some(newer) = newer {
            report.left(&format!(
                "{}: kept, since only a later version of {tool} can restore the rest: {newer}",
                path.display()
            ));
        }
        if report.failures() == 0 && !self.dry_run {
            save::remove(path)?;
        }
        Ok(Some(report.finish()))
    }
}

/// Checks that the running host may be changed, so that this is reported once and not for every
/// object.
///
/// # Errors
/// If the process is not root's; with `--sysroot` the permissions of the files decide.
pub fn check_root(root: &Host) -> anyhow::Result<()> {
    anyhow::ensure!(
        !root.is_live() || nix::unistd::geteuid().is_root(),
        "changing the host needs root; --list and --dry-run do not"
    );
    Ok(())
}

/// Prints a `--list` and what could not be read.
pub fn listed(report: &mut Report, table: &Table) -> Exit {
    report.table(table);
    report.exit(Exit::Success)
}

/// A tool's run: parses the command line, runs it, prints an error once, and returns the exit code.
/// `commit` is what the program was built from, for `--version`. A [`clap::Error`] that `run`
/// returns is an error of the command line too.
pub fn main<A: Parser>(
    tool: &str,
    commit: Option<&str>,
    run: impl FnOnce(A) -> anyhow::Result<Exit>,
) -> ExitCode {
    // clap wants a text that lives as long as the program.
    let command = A::command().version(&*version(commit).leak());
    let parsed = command.clone().try_get_matches().and_then(|matches| {
        A::from_arg_matches(&matches).map_err(|error| error.format(&mut command.clone()))
    });
    let args = match parsed {
        Ok(args) => args,
        Err(error) => return refused(&without_dashes_tip(error)),
    };
    match run(args) {
        Ok(exit) => exit.into(),
        Err(error) => match error.downcast_ref::<clap::Error>() {
            Some(usage) => refused(usage),
            None => {
                print_error(tool, &error);
                Exit::Failed.into()
            }
        },
    }
}

/// Without the tip to write an unknown option after `--`: no argument of ours begins with a dash.
fn without_dashes_tip(mut error: clap::Error) -> clap::Error {
    if error.kind() == ErrorKind::UnknownArgument
        && error.get(ContextKind::SuggestedArg).is_none()
        && error.get(ContextKind::SuggestedSubcommand).is_none()
    {
        error.remove(ContextKind::Suggested);
    }
    error
}

/// A program's version with its commit and kind of build, as `--version` prints it.
pub fn version(commit: Option<&str>) -> String {
    let build = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let commit = commit
        .filter(|commit| !commit.is_empty())
        .map_or("unknown commit".to_owned(), |commit| {
            format!("commit {commit}")
        });
    format!("{} ({commit}, {build} build)", env!("CARGO_PKG_VERSION"))
}

/// Prints an error with its causes.
pub fn print_error(tool: &str, error: &anyhow::Error) {
    err(&format!("{tool}: {}\n", printable(&in_words(error))));
}

/// Prints what was asked for instead of a run, such as help.
pub fn print_answer(text: &str) -> ExitCode {
    match terminal::print(text) {
        Ok(()) => Exit::Success.into(),
        Err(error) => {
            err(&format!("{error:#}\n"));
            Exit::Failed.into()
        }
    }
}

/// Prints what clap returns instead of arguments: an error, help or the version.
pub fn refused(answer: &clap::Error) -> ExitCode {
    // A closed pipe is not a failure.
    let _ = answer.print();
    if answer.use_stderr() {
        Exit::Usage.into()
    } else {
        Exit::Success.into()
    }
}

/// An error with its causes. [`Error`] already contains its own.
pub fn in_words(error: &anyhow::Error) -> String {
    let mut words = Vec::new();
    for cause in error.chain() {
        words.push(cause.to_string());
        if cause.is::<Error>() {
            break;
        }
    }
    words.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_version_names_commit_and_build() {
        for (commit, shown) in [
            (Some("1a2b3c-dirty"), "(commit 1a2b3c-dirty, debug build)"),
            (Some(""), "(unknown commit, debug build)"),
            (None, "(unknown commit, debug build)"),
        ] {
            let version = version(commit);
            assert_eq!(version.split_once(' ').unwrap().1, shown);
            assert!(version.starts_with(env!("CARGO_PKG_VERSION")));
        }
    }

    #[test]
    fn the_systems_message_is_printed_once() {
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

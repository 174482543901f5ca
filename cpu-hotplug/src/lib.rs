//! cpu-hotplug: takes CPUs offline, which moves every task, timer and unbound worker off them, and
//! online again.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod checks;

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Common};
use pinfold_core::knob::Value;
use pinfold_core::sys::cpu;
use pinfold_core::{Change, CpuSet, Exit, Host, Knob, Result, Selector, Setting, Table};

pub use checks::{bound_tasks, check_partitions, check_possible};

const TOOL: &str = "cpu-hotplug";

/// Take CPUs offline and online
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
#[command(arg_required_else_help = true, mut_args(|arg| arg.global(true)))]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Take CPUs offline
    Offline {
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,

        /// Continue even if a cpuset partition loses all of its CPUs
        #[arg(long)]
        force: bool,
    },
    /// Bring CPUs online
    Online {
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,
    },
}

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(knob, Knob::CpuOnline(_))
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        return Ok(cli::listed(&mut report, &list(&root)?));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let (cpus, online) = match args.verb {
        None => {
            report.error("nothing to do; use offline CPUS, online CPUS, --list or --restore FILE");
            return Ok(Exit::Usage);
        }
        Some(Verb::Offline { cpus, force }) => {
            let cpus = cpus.resolve(&root)?;
            check_possible(&root, &cpus)?;
            let mut notes = check_partitions(&root, &cpus, force)?;
            notes.extend(bound_tasks(&root, &cpus)?);
            for note in notes {
                report.note(&note);
            }
            (cpus, false)
        }
        Some(Verb::Online { cpus }) => {
            let cpus = cpus.resolve(&root)?;
            cpu::check_present(&root, &cpus)?;
            (cpus, true)
        }
    };
    let changes: Vec<Change> = settings(&root, &cpus)?
        .into_iter()
        .map(|object| object.want(Value::Online(online)))
        .collect();
    args.common.make(&root, &mut report, TOOL, changes)?;
    // In a captured tree the list of online CPUs does not follow.
    if root.is_live() && !args.common.dry_run {
        let other = in_between(&cpus, &cpu::online(&root)?, online);
        // Failed writes have been reported. This is about a kernel that accepts a write and does not
        // act on it.
        if other.len() > report.failures() {
            report.error(&format!(
                "CPU {other}: still {} after the change",
                if online { "offline" } else { "online" }
            ));
        }
    }
    Ok(report.finish())
}

/// Those of the CPUs that are not in the wanted state.
fn in_between(cpus: &CpuSet, online_now: &CpuSet, wanted_online: bool) -> CpuSet {
    if wanted_online {
        cpus - online_now
    } else {
        cpus & online_now
    }
}

/// The CPUs among these that can go offline and online, with the state they are in. CPU 0 mostly
/// cannot.
///
/// # Errors
/// If a CPU does not exist, or sysfs cannot be read.
pub fn settings(root: &Host, cpus: &CpuSet) -> Result<Vec<Setting>> {
    cpu::check_present(root, cpus)?;
    cpus.iter()
        .map(Knob::CpuOnline)
        .filter_map(|knob| match knob.read(root) {
            Ok(found) => found.map(|found| Ok(Setting::new(knob.clone(), knob.to_string(), found))),
            Err(error) => Some(Err(error)),
        })
        .collect()
}

fn list(root: &Host) -> Result<Table> {
    let present = cpu::present(root)?;
    let states: BTreeMap<Knob, Value> = settings(root, &present)?
        .into_iter()
        .map(|object| (object.knob, object.found))
        .collect();
    let mut table = Table::new(&["cpu", "state", "can go offline"]);
    for cpu in present.iter() {
        let state = match states.get(&Knob::CpuOnline(cpu)) {
            Some(Value::Online(false)) => "offline",
            // Without the file it cannot be anything else.
            _ => "online",
        };
        let removable = if checks::can_go(root, cpu) {
            "yes"
        } else {
            "no"
        };
        table.row([cpu.to_string(), state.into(), removable.into()]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_valid() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_is_not_as_asked() {
        let set = |text: &str| CpuSet::from_kernel_list(text).unwrap();
        assert_eq!(in_between(&set("2-3"), &set("0-2"), false), set("2"));
        assert_eq!(in_between(&set("2-3"), &set("0-2"), true), set("3"));
        assert_eq!(in_between(&set("2-3"), &set("0-1"), false), set(""));
    }
}

//! governor: sets the cpufreq governor of CPUs.
//!
//! A governor belongs to a policy: the CPUs that share a clock. Setting it for one of them sets it
//! for all.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Common};
use pinfold_core::cpufreq::{self, Policy};
use pinfold_core::{CpuExpr, CpuSet, Error, Exit, Object, Result, Sysroot, Table, cpu};

const TOOL: &str = "governor";

/// Set the cpufreq governor of CPUs
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
    /// Set the governor of these CPUs, and of those that share a policy with them
    Set {
        /// The governor's name, as in performance; --list shows those there are
        name: String,
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: CpuExpr,
    },
}

/// The command's whole run.
pub fn main() -> ExitCode {
    cli::main(TOOL, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        let policies = cpufreq::policies(&root)?;
        if policies.is_empty() {
            report.note(NO_DRIVER);
        }
        return Ok(cli::listed(&mut report, &list(policies)));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL)? {
        return Ok(exit);
    }
    let Some(Verb::Set { name, cpus }) = args.verb else {
        report.error("nothing to do: say set NAME CPUS, or --list or --restore FILE");
        return Ok(Exit::Usage);
    };
    let cpus = cpus.resolve(&root)?;
    for note in check(&root, &name, &cpus)? {
        report.note(&note);
    }
    let changes = objects(&root, &cpus)?
        .into_iter()
        .map(|object| object.want(&*name))
        .collect();
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

const NO_DRIVER: &str =
    "this host has no cpufreq driver, as in a VM, or with the clock left to the firmware";

/// The policies of these CPUs, with their governors.
///
/// # Errors
/// Where cpufreq cannot be read.
pub fn objects(root: &Sysroot, cpus: &CpuSet) -> Result<Vec<Object>> {
    let policies = cpufreq::policies(root)?;
    Ok(policies
        .iter()
        .filter(|policy| policy.cpus.intersects(cpus))
        .map(Policy::object)
        .collect())
}

/// Makes sure that these CPUs can have the governor, and says which others would get it too.
///
/// # Errors
/// [`Error::Unusable`] where a CPU does not exist or has no policy, or a policy does not offer the
/// governor; nothing should be set then.
pub fn check(root: &Sysroot, name: &str, cpus: &CpuSet) -> Result<Vec<String>> {
    cpu::check_present(root, cpus)?;
    let policies = cpufreq::policies(root)?;
    if policies.is_empty() {
        return Err(Error::unusable(format!("CPU {cpus}"), NO_DRIVER));
    }
    let mut without = cpus.clone();
    let mut offline = CpuSet::new();
    let mut notes = Vec::new();
    for policy in policies
        .iter()
        .filter(|policy| policy.cpus.intersects(cpus))
    {
        without = &without - &policy.cpus;
        if policy.governor.is_empty() {
            offline = &offline | &policy.cpus;
            continue;
        }
        if !policy.available.iter().any(|offered| offered == name) {
            let why = format!(
                "no governor {name:?}; it offers {}",
                policy.available.join(", ")
            );
            return Err(Error::unusable(
                format!("{} (CPU {})", policy.name, policy.cpus),
                why,
            ));
        }
        let others = &policy.cpus - cpus;
        if !others.is_empty() {
            notes.push(format!(
                "{}: CPU {others} shares its clock and follows",
                policy.name
            ));
        }
    }
    offline = &offline | &(&without - &cpu::online(root)?);
    if !offline.is_empty() {
        return Err(Error::unusable(
            format!("CPU {offline}"),
            "offline; a governor can be set when it is online again",
        ));
    }
    if !without.is_empty() {
        return Err(Error::unusable(
            format!("CPU {without}"),
            "no cpufreq policy; see --list",
        ));
    }
    Ok(notes)
}

fn list(policies: Vec<Policy>) -> Table {
    let mut table = Table::new(&["policy", "cpus", "governor", "available"]);
    for Policy {
        name,
        cpus,
        governor,
        available,
    } in policies
    {
        table.row([name, cpus.to_string(), governor, available.join(" ")]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_holds_together() {
        Args::command().debug_assert();
    }
}

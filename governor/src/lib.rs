//! governor: sets the cpufreq governor of CPUs.
//!
//! A governor belongs to a policy: the CPUs that share a clock. Setting it for one of them sets it
//! for all.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Common};
use pinfold_core::knob::Value;
use pinfold_core::sys::cpu;
use pinfold_core::sys::cpufreq::{self, Policy};
use pinfold_core::{CpuSet, Error, Exit, Host, Knob, Result, Selector, Setting, Table};

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
        /// The governor's name, as in performance; --list prints those available
        name: String,
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,
    },
}

/// Runs the command.
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
        return Ok(cli::listed(&mut report, &list(&root, policies)?));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL)? {
        return Ok(exit);
    }
    let Some(Verb::Set { name, cpus }) = args.verb else {
        report.error("nothing to do; use set NAME CPUS, --list or --restore FILE");
        return Ok(Exit::Usage);
    };
    let cpus = cpus.resolve(&root)?;
    let policies = cpufreq::policies(&root)?;
    for note in check(&root, &policies, &name, &cpus)? {
        report.note(&note);
    }
    let changes = settings(&policies, |policy| policy.cpus.intersects(&cpus))
        .into_iter()
        .map(|object| object.want(Value::text(&*name)))
        .collect();
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

const NO_DRIVER: &str =
    "this host has no cpufreq driver, as in a VM or if the firmware sets the clock";

/// The governors of the policies that `is_chosen` selects, as settings to change.
pub fn settings(policies: &[Policy], is_chosen: impl Fn(&Policy) -> bool) -> Vec<Setting> {
    policies
        .iter()
        .filter(|policy| is_chosen(policy))
        .map(setting)
        .collect()
}

fn setting(policy: &Policy) -> Setting {
    Setting::new(
        Knob::Governor(policy.name.clone()),
        label(policy),
        Value::text(&*policy.governor),
    )
}

fn label(policy: &Policy) -> String {
    format!("{} (CPU {})", policy.name, policy.cpus)
}

/// A policy that does not offer a governor.
#[derive(Debug, PartialEq, Eq)]
pub struct NotOffered<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// The governors that it offers.
    pub available: Vec<String>,
}

/// The first policy of these CPUs that does not offer the governor, if there is one.
///
/// # Errors
/// If cpufreq cannot be read.
pub fn not_offered<'a>(
    root: &Host,
    policies: &'a [Policy],
    name: &str,
    cpus: &CpuSet,
) -> Result<Option<NotOffered<'a>>> {
    for policy in policies
        .iter()
        .filter(|policy| policy.cpus.intersects(cpus))
    {
        let available = policy.available(root)?;
        if !available.iter().any(|offered| offered == name) {
            return Ok(Some(NotOffered { policy, available }));
        }
    }
    Ok(None)
}

/// Checks that these CPUs can have the governor. Returns a note for each policy that other CPUs
/// share.
///
/// # Errors
/// [`Error::Unusable`] if a CPU does not exist or has no policy, or if a policy does not offer the
/// governor; nothing should be set then.
fn check(root: &Host, policies: &[Policy], name: &str, cpus: &CpuSet) -> Result<Vec<String>> {
    cpu::check_present(root, cpus)?;
    if policies.is_empty() {
        return Err(Error::unusable(format!("CPU {cpus}"), NO_DRIVER));
    }
    let mut without = cpus.clone();
    let mut offline = CpuSet::new();
    let mut online = CpuSet::new();
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
        online = &online | &policy.cpus;
        let others = &policy.cpus - cpus;
        if !others.is_empty() {
            notes.push(format!(
                "{}: CPU {others} shares its clock and follows",
                policy.name
            ));
        }
    }
    if let Some(NotOffered { policy, available }) = not_offered(root, policies, name, &online)? {
        let why = format!("no governor {name:?}; it offers {}", available.join(", "));
        return Err(Error::unusable(label(policy), why));
    }
    offline = &offline | &(&without - &cpu::online(root)?);
    if !offline.is_empty() {
        return Err(Error::unusable(
            format!("CPU {offline}"),
            "offline; a governor can be set only while it is online",
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

fn list(root: &Host, policies: Vec<Policy>) -> Result<Table> {
    let mut table = Table::new(&["policy", "cpus", "governor", "available"]);
    for policy in policies {
        let available = policy.available(root)?.join(" ");
        table.row([
            policy.name,
            policy.cpus.to_string(),
            policy.governor,
            available,
        ]);
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
}

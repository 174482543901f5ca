//! governor: sets the cpufreq governor and the energy preference of CPUs, and how long they may take
//! to wake up.
//!
//! A governor belongs to a policy: the CPUs that share a clock. Setting it for one of them sets it
//! for all. How long a CPU may take to wake up is its own.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Common};
use pinfold_core::knob::{NO_TIME, Value};
use pinfold_core::state::save::Entry;
use pinfold_core::sys::cpu;
use pinfold_core::sys::cpufreq::{self, Policy};
use pinfold_core::{Change, CpuSet, Error, Exit, Host, Knob, Result, Selector, Setting, Table};

const TOOL: &str = "governor";

/// Set the cpufreq governor and energy preference of CPUs, and how long they may take to wake up
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
    /// Set the energy preference of these CPUs, and of those that share a policy with them
    Epp {
        /// The preference's name, as in balance_performance, or a number; drivers differ
        name: String,
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,
    },
    /// Set how long these CPUs may take to wake up, which keeps them out of deeper idle states
    Latency {
        /// The longest time in microseconds; 0 allows no idle states, `any` allows all of them
        #[arg(value_name = "MICROSECONDS", value_parser = parse_latency)]
        latency: Value,
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,
    },
}

fn parse_latency(text: &str) -> std::result::Result<Value, String> {
    match text.parse() {
        Ok(microseconds @ ..=LONGEST_LATENCY) => Ok(latency(microseconds)),
        Ok(_) => Err(format!(
            "the longest is {LONGEST_LATENCY} microseconds, or `any`"
        )),
        Err(_) if text == "any" => Ok(Value::text("0")),
        Err(_) => Err("neither a number of microseconds nor `any`".into()),
    }
}

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(
        knob,
        Knob::Governor(_) | Knob::EnergyPreference(_) | Knob::WakeupLatency(_)
    )
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
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
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let (name, cpus) = match args.verb {
        Some(Verb::Set { name, cpus }) => (name, cpus),
        Some(Verb::Epp { name, cpus }) => {
            let cpus = cpus.resolve(&root)?;
            let changes = (preferences_of_all(&root, &cpus, &name)?.into_iter())
                .map(|object| object.want(Value::text(&*name)))
                .collect();
            return args.common.carry_out(&root, &mut report, TOOL, changes);
        }
        Some(Verb::Latency { latency, cpus }) => {
            let cpus = cpus.resolve(&root)?;
            let changes = (latencies_of_all(&root, &cpus)?.into_iter())
                .map(|object| object.want(latency.clone()))
                .collect();
            return args.common.carry_out(&root, &mut report, TOOL, changes);
        }
        None => {
            report.error(
                "nothing to do; use set NAME CPUS, epp NAME CPUS, latency MICROSECONDS CPUS, --list or --restore FILE",
            );
            return Ok(Exit::Usage);
        }
    };
    let cpus = cpus.resolve(&root)?;
    let policies = cpufreq::policies(&root)?;
    for note in check(&root, &policies, &name, &cpus)? {
        report.note(&note);
    }
    let changes: Vec<Change> = settings(&policies, |policy| policy.cpus.intersects(&cpus))
        .into_iter()
        .map(|object| object.want(Value::text(&*name)))
        .collect();
    let entries = entries(&policies, &cpus, &name, &changes);
    args.common
        .carry_out_saving(&root, &mut report, TOOL, changes, entries)
}

/// The entries of a saved file. The kernel sets the energy preference to performance with the
/// governor performance, and leaves it so: it is restored too, and after the governor, since what
/// is saved first is restored last.
fn entries(policies: &[Policy], cpus: &CpuSet, name: &str, changes: &[Change]) -> Vec<Entry> {
    const PERFORMANCE: &str = "performance";
    let preferences = preferences(policies, |policy| {
        name == PERFORMANCE && policy.governor != name && policy.cpus.intersects(cpus)
    });
    preferences
        .into_iter()
        .map(|object| object.want(Value::text(PERFORMANCE)))
        .chain(changes.iter().cloned())
        .filter(|change| !change.is_noop())
        .map(|change| Entry::from(&change))
        .collect()
}

const NO_DRIVER: &str =
    "this host has no cpufreq driver; it may be a VM, or its firmware sets the clock";

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

/// The energy preferences of the policies that `is_chosen` selects, as far as they are known, as
/// settings to change.
pub fn preferences(policies: &[Policy], is_chosen: impl Fn(&Policy) -> bool) -> Vec<Setting> {
    policies
        .iter()
        .filter(|policy| is_chosen(policy))
        .filter_map(|policy| {
            let found = Value::text(policy.preference.clone()?);
            Some(preference(policy, found))
        })
        .collect()
}

/// The energy preferences of all policies of these CPUs, to be set to `name`.
///
/// # Errors
/// [`Error::Unusable`] if a CPU does not exist or has none, or if a policy does not offer this one.
fn preferences_of_all(root: &Host, cpus: &CpuSet, name: &str) -> Result<Vec<Setting>> {
    cpu::check_present(root, cpus)?;
    let policies = cpufreq::policies(root)?;
    let is_chosen = |policy: &Policy| policy.cpus.intersects(cpus);
    let mut without = cpus.clone();
    for policy in policies.iter().filter(|policy| is_chosen(policy)) {
        let available = policy.available_preferences(root)?;
        if policy.preference.is_some() && !available.is_empty() {
            without = &without - &policy.cpus;
        }
        let is_offered = name.parse::<u8>().is_ok() || available.iter().any(|one| one == name);
        if !available.is_empty() && !is_offered {
            let why = format!(
                "no energy preference {name:?}; available: {}",
                available.join(", ")
            );
            return Err(Error::unusable(label(policy), why));
        }
    }
    match without.is_empty() {
        true => Ok(preferences(&policies, is_chosen)),
        false => Err(Error::unusable(
            format!("CPU {without}"),
            "the cpufreq driver has no energy preference",
        )),
    }
}

/// A policy's energy preference with a value found.
pub fn preference(policy: &Policy, found: Value) -> Setting {
    let knob = Knob::EnergyPreference(policy.name.clone());
    let label = format!("{knob} (CPU {})", policy.cpus);
    Setting::new(knob, label, found)
}

/// The longest wake-up latency that the kernel takes, in microseconds: one below that of a limit that is
/// none (`PM_QOS_RESUME_LATENCY_NO_CONSTRAINT`, include/linux/pm_qos.h).
pub const LONGEST_LATENCY: u32 = i32::MAX as u32 - 1;

/// A wake-up latency as the kernel has it: no more than so many microseconds.
pub fn latency(microseconds: u32) -> Value {
    match microseconds {
        0 => Value::text(NO_TIME),
        more => Value::text(more.to_string()),
    }
}

/// How long these CPUs may take to wake up, as settings to change; without those of which the
/// kernel does not know it.
///
/// # Errors
/// If a value cannot be read.
pub fn latencies(root: &Host, cpus: &CpuSet) -> Result<Vec<Setting>> {
    let mut objects = Vec::new();
    for cpu in cpus.iter() {
        let knob = Knob::WakeupLatency(cpu);
        if let Some(found) = knob.read(root)? {
            let label = knob.to_string();
            objects.push(Setting::new(knob, label, found));
        }
    }
    Ok(objects)
}

/// As [`latencies`], of all of them.
///
/// # Errors
/// [`Error::Unusable`] if a CPU does not exist or the kernel does not know its latency.
fn latencies_of_all(root: &Host, cpus: &CpuSet) -> Result<Vec<Setting>> {
    cpu::check_present(root, cpus)?;
    let objects = latencies(root, cpus)?;
    let known = objects.iter().filter_map(|object| cpu_of(&object.knob));
    let without = cpus - &known.collect();
    match without.is_empty() {
        true => Ok(objects),
        false => Err(Error::unusable(format!("CPU {without}"), NO_LATENCY)),
    }
}

/// The CPU whose wake-up latency a knob is.
pub fn cpu_of(knob: &Knob) -> Option<usize> {
    if let Knob::WakeupLatency(cpu) = knob {
        Some(*cpu)
    } else {
        None
    }
}

/// Why CPUs have no wake-up latency.
pub const NO_LATENCY: &str =
    "this kernel does not limit how long a CPU takes to wake up (pm_qos_resume_latency_us)";

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
    let mut table = Table::new(&[
        "policy",
        "cpus",
        "governor",
        "available",
        "energy preference",
        "wakeup latency",
    ]);
    let mut others = cpu::present(root)?;
    for policy in policies {
        others = &others - &policy.cpus;
        let available = policy.available(root)?.join(" ");
        table.row([
            policy.name,
            policy.cpus.to_string(),
            policy.governor,
            available,
            policy.preference.unwrap_or_default(),
            names(&by_latency(root, &policy.cpus)?),
        ]);
    }
    for (latency, cpus) in by_latency(root, &others)? {
        let none = || String::new();
        table.row([none(), cpus.to_string(), none(), none(), none(), latency]);
    }
    Ok(table)
}

/// CPUs by how long they may take to wake up, as `latency` takes it; without those of which the
/// kernel does not know it.
fn by_latency(root: &Host, cpus: &CpuSet) -> Result<BTreeMap<String, CpuSet>> {
    let mut by_latency: BTreeMap<String, CpuSet> = BTreeMap::new();
    for Setting { knob, found, .. } in latencies(root, cpus)? {
        let name = match found.as_text() {
            Some("0") => "any".to_owned(),
            Some(NO_TIME) => "0".to_owned(),
            _ => found.to_string(),
        };
        if let Some(cpu) = cpu_of(&knob) {
            by_latency.entry(name).or_default().insert(cpu);
        }
    }
    Ok(by_latency)
}

fn names(by_latency: &BTreeMap<String, CpuSet>) -> String {
    let names: Vec<&str> = by_latency.keys().map(String::as_str).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use pinfold_core::state::save;
    use std::fs;

    const PREFERENCE: &str = "energy_performance_preference";

    #[test]
    fn command_line_is_valid() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_latency_is_as_the_kernel_has_it() {
        let parsed = |text| parse_latency(text).map(|value| value.to_string());
        assert_eq!(parsed("20"), Ok("20".into()));
        // The kernel's 0 is any time.
        assert_eq!(parsed("0"), Ok("n/a".into()));
        assert_eq!(parsed("any"), Ok("0".into()));
        for text in ["", "-1", "n/a", "5000000000", "1.5"] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_energy_preference_comes_back_after_the_governor() {
        let dir = tempfile::tempdir().unwrap();
        let file = |policy: usize, name: &str| {
            dir.path().join(format!(
                "sys/devices/system/cpu/cpufreq/policy{policy}/{name}"
            ))
        };
        let write = |policy, name: &str, text: &str| {
            fs::create_dir_all(file(policy, name).parent().unwrap()).unwrap();
            fs::write(file(policy, name), format!("{text}\n")).unwrap();
        };
        let read = |policy, name: &str| fs::read_to_string(file(policy, name)).unwrap();
        for (policy, governor, preference) in [
            (0, "powersave", Some("balance_power")),
            (1, "performance", Some("performance")),
            // A driver without it.
            (2, "powersave", None),
        ] {
            write(policy, "related_cpus", &policy.to_string());
            write(policy, "scaling_governor", governor);
            if let Some(preference) = preference {
                write(policy, PREFERENCE, preference);
            }
        }
        let host = Host::new(dir.path());
        let policies = cpufreq::policies(&host).unwrap();
        let changes: Vec<Change> = settings(&policies, |_| true)
            .into_iter()
            .map(|object| object.want(Value::text("performance")))
            .collect();
        let cpus = CpuSet::range(0, 2);
        let saved = entries(&policies, &cpus, "performance", &changes);
        let saved = save::parse(&save::to_text(TOOL, saved).unwrap(), TOOL)
            .unwrap()
            .entries;
        pinfold_core::apply(&host, changes);
        // As amd-pstate does with the governor performance.
        write(0, PREFERENCE, "performance");
        let done: Vec<String> = save::restore(&host, saved, false)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            done,
            [
                "policy2 (CPU 2): performance -> powersave",
                "policy0 (CPU 0): performance -> powersave",
                "energy preference of policy0 (CPU 0): performance -> balance_power",
            ]
        );
        assert_eq!(read(0, PREFERENCE), "balance_power");
        assert_eq!(read(0, "scaling_governor"), "powersave");
    }
}

//! hook's command line, and which command it runs.

use std::ffi::OsStr;

use clap::builder::{StyledStr, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, CommandFactory, Parser, Subcommand};
use pinfold_core::cli::{self, Output};
use pinfold_core::vm::VmId;
use pinfold_core::{Exit, nearest};

use crate::commands::{
    blame, check, complete, init, install, jitter, layout, list, plan, recover, remove, report,
    status, step,
};
use crate::own_steps::TOOL;
use crate::phases;

/// Isolate CPUs for a VM when it starts and return them to the host when it stops
///
/// Proxmox VE runs `hook VMID PHASE`; register it with `qm set VMID --hookscript
/// local:snippets/hook`.
#[derive(Debug, Parser)]
#[command(
    name = TOOL,
    version,
    after_help = cli::EXIT_CODES,
    arg_required_else_help = true,
    override_usage = "hook [OPTIONS] <VMID> <PHASE>\n       hook [OPTIONS] <COMMAND>",
    subcommand_negates_reqs = true
)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// The VM's number
    #[arg(required = true, value_parser = VmIdParser)]
    vmid: Option<VmId>,

    /// pre-start, post-start, pre-stop or post-stop
    #[arg(required = true)]
    phase: Option<String>,

    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show which VM owns each CPU and what can still run on it, grouped by reason
    #[command(after_help = status::EXIT_CODES)]
    Status(status::Args),
    /// Show this host's CPUs: packages, dies, LLC domains, NUMA nodes and cores, and the selectors
    /// that name them
    Layout(layout::Args),
    /// Choose CPUs for a VM on this host, by LLC domain, and write its settings file
    ///
    /// Writes /etc/pinfold/VMID.toml, unless the VM has a settings file of its own. Nothing else is
    /// changed without --apply.
    Init(init::Args),
    /// Set a VM up: settings, hookscript, storage; and check it
    ///
    /// Prints each step, with the equivalent command, before doing it. Steps that are already done
    /// are skipped, so it can be run again. An existing hookscript of the VM is kept: hook runs it
    /// too (`chain` in the settings).
    Install(install::Args),
    /// Stop using hook for a VM: release its CPUs, and restore its earlier hookscript
    ///
    /// Keeps the settings unless --purge is given. Prints each step before doing it, and can be run
    /// again.
    #[command(override_usage = "hook remove [OPTIONS] <VMID>\n       hook remove [OPTIONS] --all")]
    Remove(remove::Args),
    /// List the VMs that use hook, on this node and, from /etc/pve, the others
    List,
    /// Show every change that post-start would make now, in order, and how long each step took last
    /// time; changes nothing
    ///
    /// If the VM does not run, the changes that need its threads are unknown.
    Plan(plan::Args),
    /// Check a VM's settings and this host, and suggest fixes
    ///
    /// Runs the checks of pre-start and more. Without a number: all VMs that have settings or use
    /// hook as their hookscript.
    #[command(after_help = check::EXIT_CODES)]
    Check(check::Args),
    /// Show what disturbs a VM's CPUs, and what to do about it
    ///
    /// Watches for some seconds and, without --trace, changes nothing. Prints how long vCPUs waited
    /// for a CPU, how often they left the guest, if KVM counts it, and which threads, interrupts
    /// and softirqs ran on their CPUs: first those that could run elsewhere, then the rest, each
    /// sorted by time; the time of interrupts is estimated from their number, unless --trace
    /// measures it.
    Blame(blame::Args),
    /// Measure how long a loop on each CPU is interrupted
    ///
    /// Runs a loop on all of the CPUs at the same time for some seconds, records gaps of a
    /// microsecond or more, and counts interrupts. Run it before a VM starts, to see what would
    /// disturb the VM. CPUs of a running VM are refused.
    #[command(
        override_usage = "hook jitter [OPTIONS] <VMID>\n       hook jitter [OPTIONS] --cpus <CPUS>"
    )]
    Jitter(jitter::Args),
    /// Collect what a bug report needs, without names, paths and secrets
    ///
    /// Prints Markdown: versions, kernel, the parts of command line and VMID.conf that matter, topology,
    /// settings, plan, check, status and the journal's entries of this VM. Changes nothing. Read it
    /// before you publish it.
    #[command(after_help = report::EXIT_CODES)]
    Report(report::Args),
    /// Release the CPUs of VMs that have stopped, and complete interrupted runs of hook
    Recover(recover::Args),
    /// Run one of the steps that have no tool of their own
    Step {
        #[command(subcommand)]
        step: step::Step,
    },
    /// Print words for the shells' completions
    #[command(name = "__complete", hide = true)]
    Complete(complete::Args),
}

impl Verb {
    /// The name of a verb that is about no single VM.
    fn without_vmid(&self) -> Option<&'static str> {
        match self {
            Self::Status(_) => Some("status"),
            Self::Layout(_) => Some("layout"),
            Self::List => Some("list"),
            Self::Recover(_) => Some("recover"),
            Self::Step { .. } => Some("step"),
            _ => None,
        }
    }
}

/// The whole run; `commit` is that of this program.
pub(crate) fn run(args: Args, commit: Option<&str>) -> anyhow::Result<Exit> {
    let output = &args.output;
    let Some(verb) = args.verb else {
        let (Some(vmid), Some(phase)) = (args.vmid, args.phase) else {
            return Err(usage(
                ErrorKind::MissingRequiredArgument,
                "VMID and PHASE are required",
            ));
        };
        // Set by Proxmox VE for the hookscript of a VM that a live migration brings here.
        let source = std::env::var("PVE_MIGRATED_FROM").ok();
        return phases::run(output.root(), output.report(TOOL), vmid, &phase, source);
    };
    if let Some(vmid) = args.vmid {
        let what = match verb.without_vmid() {
            Some(name) => format!("hook {name} takes no VM number"),
            None => format!("the number of a VM comes after the command, not before it: {vmid}"),
        };
        return Err(usage(ErrorKind::ArgumentConflict, &what));
    }
    match verb {
        Verb::Status(args) if output.json && (args.metrics || args.nagios) => {
            let what = "--json cannot be used with --metrics or --nagios";
            Err(usage(ErrorKind::ArgumentConflict, what))
        }
        Verb::Status(args) => status::run(&args, output),
        Verb::Layout(args) if args.map && output.json => {
            let what = "--map cannot be used with --json";
            Err(usage(ErrorKind::ArgumentConflict, what))
        }
        Verb::Layout(args) => layout::run(&args, output),
        Verb::Init(args) if (args.print || args.map) && (output.json || output.quiet) => {
            let option = if args.print { "--print" } else { "--map" };
            let what = format!("{option} cannot be used with --json or --quiet");
            Err(usage(ErrorKind::ArgumentConflict, &what))
        }
        Verb::Init(args) => init::run(&args, output),
        Verb::Install(args) => install::run(&args, output),
        Verb::Remove(args) => remove::run(&args, output),
        Verb::List => list::run(output),
        Verb::Plan(args) => plan::run(&args, output),
        Verb::Check(args) => check::run(&args, output),
        Verb::Blame(args) => blame::run(&args, output),
        Verb::Jitter(args) => match args.contradiction() {
            Some(what) => Err(usage(ErrorKind::ArgumentConflict, &what)),
            None => jitter::run(&args, output),
        },
        Verb::Report(args) => report::run(&args, output, &cli::version(commit)),
        Verb::Recover(args) => recover::run(&args, output),
        Verb::Step { step } => step::run(step, output),
        Verb::Complete(args) => complete::run(&args, output),
    }
}

fn usage(kind: ErrorKind, what: &str) -> anyhow::Error {
    Args::command().error(kind, what).into()
}

/// Parses a VM's number. A word in its place is a misspelt command, and reported as that.
#[derive(Debug, Clone)]
struct VmIdParser;

impl TypedValueParser for VmIdParser {
    type Value = VmId;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<VmId, clap::Error> {
        let text = value.to_string_lossy();
        if phases::NAMES.contains(&&*text) {
            let what = format!("the number of a VM comes before a phase: hook VMID {text}");
            return Err(command.clone().error(ErrorKind::ArgumentConflict, what));
        }
        if text.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(unknown_verb(command, &text));
        }
        let parse = |text: &str| text.parse::<VmId>();
        parse.parse_ref(command, arg, value)
    }
}

/// What is often tried, and the verb for it.
const SYNONYMS: [(&str, &str); 14] = [
    ("add", "install"),
    ("delete", "remove"),
    ("disable", "remove"),
    ("enable", "install"),
    ("info", "status"),
    ("isolate", "install"),
    ("register", "install"),
    ("setup", "install"),
    ("show", "status"),
    ("undo", "remove"),
    ("uninstall", "remove"),
    ("unregister", "remove"),
    ("validate", "check"),
    ("verify", "check"),
];

/// The error for a word that is no command of `command`, with the nearest one and all.
pub(crate) fn unknown_verb(command: &Command, word: &str) -> clap::Error {
    let verbs: Vec<&str> = command
        .get_subcommands()
        .filter(|verb| !verb.is_hide_set())
        .map(Command::get_name)
        .filter(|name| *name != "help")
        .collect();
    let mut error = clap::Error::new(ErrorKind::InvalidSubcommand).with_cmd(command);
    error.insert(
        ContextKind::InvalidSubcommand,
        ContextValue::String(word.to_owned()),
    );
    let synonym = SYNONYMS.iter().find(|(tried, _)| *tried == word);
    let nearest = || nearest(word, verbs.iter().copied());
    let mut tips = Vec::new();
    if matches!(word, "start" | "stop" | "shutdown" | "reboot") {
        let tip = format!("Proxmox VE does that, and calls hook: qm {word} VMID");
        tips.push(StyledStr::from(tip));
    } else if let Some(verb) = synonym.map(|(_, verb)| *verb).or_else(nearest) {
        error.insert(
            ContextKind::SuggestedSubcommand,
            ContextValue::Strings(vec![verb.to_owned()]),
        );
    }
    tips.push(format!("the commands are {}", verbs.join(", ")).into());
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    fn refusal(line: &str) -> String {
        Args::try_parse_from(line.split(' '))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn an_unknown_command_lists_the_commands() {
        let text = refusal("hook frobnicate");
        assert!(
            text.contains("unrecognized subcommand 'frobnicate'"),
            "{text}"
        );
        assert!(
            text.contains(
                "the commands are status, layout, init, install, remove, list, plan, check, blame, \
                 jitter, report, recover, step"
            ),
            "{text}"
        );
        assert!(!text.contains("similar"), "{text}");
        let text = refusal("hook --json statsu 100");
        assert!(
            text.contains("a similar subcommand exists: 'status'"),
            "{text}"
        );
        assert!(refusal("hook 7x post-start").contains("invalid value '7x' for '<VMID>'"));
        for (line, tip) in [
            (
                "hook uninstall 100",
                "a similar subcommand exists: 'remove'",
            ),
            (
                "hook stop 100",
                "Proxmox VE does that, and calls hook: qm stop VMID",
            ),
            (
                "hook post-start 100",
                "the number of a VM comes before a phase: hook VMID post-start",
            ),
        ] {
            let text = refusal(line);
            assert!(text.contains(tip), "{line}: {text}");
            assert!(
                !text.contains("'install'") && !text.contains("'step'"),
                "{line}: {text}"
            );
        }
    }

    #[test]
    fn options_may_come_before_the_command() {
        for line in [
            "hook --sysroot /d check 100",
            "hook check --sysroot /d 100",
            "hook --sysroot /d step stat-interval 10",
            "hook step stat-interval 10 --sysroot /d",
            "hook 100 post-start --sysroot /d",
        ] {
            let args = Args::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(args.output.sysroot.to_str(), Some("/d"), "{line}");
        }
    }
}

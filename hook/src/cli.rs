//! hook's command line, and which command it runs.

use clap::{Parser, Subcommand};
use pinfold_core::Exit;
use pinfold_core::cli::{self, Output};
use pinfold_core::vm::VmId;

use crate::commands::{check, init, layout, plan, recover, status, step};
use crate::phases;
use crate::steps::TOOL;

/// Fence CPUs off for a VM when it starts and put the host back when it stops
///
/// Proxmox VE calls it as `hook VMID PHASE`; name it with `qm set VMID --hookscript
/// local:snippets/hook`.
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// The VM's number
    #[arg(required = true)]
    vmid: Option<VmId>,

    /// pre-start, post-start, pre-stop or post-stop
    #[arg(required = true)]
    phase: Option<String>,

    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show which CPUs are whose, and what may still run on the isolated ones
    ///
    /// Exit code 1 where something that could be elsewhere may run on an isolated CPU.
    Status(status::Args),
    /// Show this host's CPUs: packages, dies, LLC domains, NUMA nodes and cores, and the selectors
    /// that name them
    Layout(layout::Args),
    /// Write settings for a VM on this host: which CPUs it has, chosen by LLC domain
    ///
    /// They are written to /etc/pinfold/VMID.toml, and nowhere where the VM has some. Nothing else
    /// is changed.
    Init(init::Args),
    /// Show every change that post-start would make now, in order, and how long each step took last
    /// time; changes nothing
    ///
    /// Of a VM that does not run it is what is known without its threads.
    Plan(plan::Args),
    /// Look for what would keep a VM from having its CPUs, or from making the most of them, each
    /// with what to do
    ///
    /// It is what pre-start checks, and more. Without a number: all VMs that have settings, or hook
    /// as their hookscript. Exit code 1 where a line says error.
    Check(check::Args),
    /// Give back the CPUs of VMs that run no more, and mend what a killed hook left
    Recover(recover::Args),
    /// Do one of the steps that have no tool of their own
    Step {
        #[command(subcommand)]
        step: step::Step,
    },
}

/// The whole run.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    match (args.verb, args.vmid, args.phase) {
        (Some(Verb::Status(args)), ..) => status::run(&args),
        (Some(Verb::Layout(args)), ..) => Ok(layout::run(&args)?),
        (Some(Verb::Init(args)), ..) => init::run(&args),
        (Some(Verb::Plan(args)), ..) => plan::run(&args),
        (Some(Verb::Check(args)), ..) => check::run(&args),
        (Some(Verb::Recover(args)), ..) => recover::run(&args),
        (Some(Verb::Step { step }), ..) => step::run(step),
        (None, Some(vmid), Some(phase)) => {
            phases::run(args.output.root(), args.output.report(TOOL), vmid, &phase)
        }
        // clap asks for both.
        (None, ..) => anyhow::bail!("VMID and PHASE are missing; see hook --help"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Args::command().debug_assert();
    }
}

//! hook: fences CPUs off for a VM when it starts, and puts the host back when it stops.
//!
//! It composes the other tools' libraries in the documented order (docs/design.md) and keeps, under
//! /run/pinfold, what is needed to take everything back.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Output};
use pinfold_core::store::Store;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{CpuExpr, Exit, Report, Sysroot, Table};

mod advice;
mod by_kernel;
mod check;
mod checks;
#[cfg(test)]
mod fixture;
mod init;
mod layout;
mod phases;
mod plan;
mod reconcile;
mod reservation;
mod screen;
mod settings;
mod status;
mod steps;
mod times;

use reservation::Reservation;

const TOOL: &str = "hook";

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
    Status {
        /// Look again every so many seconds, 2 where none are given, until interrupted
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=settings::MAX_DEADLINE))]
        watch: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// Show this host's CPUs: packages, dies, LLC domains, NUMA nodes and cores, and the selectors
    /// that name them
    Layout {
        #[command(flatten)]
        output: Output,
    },
    /// Write settings for a VM on this host: which CPUs it has, chosen by LLC domain
    ///
    /// They are written to /etc/pinfold/VMID.toml, and nowhere where the VM has some. Nothing else
    /// is changed.
    Init {
        /// The VM's number
        vmid: VmId,
        /// The CPUs to isolate, by logical number or selector, as in 6-11,18-23 or llc:1 [default:
        /// an LLC domain that fits]
        #[arg(long, conflicts_with = "vcache")]
        cpus: Option<CpuExpr>,
        /// Choose among the LLC domains with a larger L3 (3D V-Cache)
        #[arg(long)]
        vcache: bool,
        /// Print the settings and write nothing
        #[arg(long, conflicts_with_all = ["json", "quiet"])]
        print: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show every change that post-start would make now, in order, and how long each step took last
    /// time; changes nothing
    ///
    /// Of a VM that does not run it is what is known without its threads.
    Plan {
        /// The VM's number
        vmid: VmId,
        #[command(flatten)]
        output: Output,
    },
    /// Look for what would keep a VM from having its CPUs, or from making the most of them, each
    /// with what to do
    ///
    /// It is what pre-start checks, and more. Without a number: all VMs that have settings, or hook
    /// as their hookscript. Exit code 1 where a line says error.
    Check {
        /// The VM's number
        vmid: Option<VmId>,
        #[command(flatten)]
        output: Output,
    },
    /// Give back the CPUs of VMs that run no more, and mend what a killed hook left
    Recover {
        /// Remove a saved state that cannot be read; the host stays as it is now
        #[arg(long)]
        discard: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Do one of the steps that have no tool of their own
    Step {
        #[command(subcommand)]
        step: Step,
    },
}

#[derive(Debug, Subcommand)]
enum Step {
    /// Drop clean caches and compact memory
    TidyCaches {
        #[command(flatten)]
        common: cli::Common,
    },
    /// Set the interval of the kernel's statistics, vm.stat_interval
    StatInterval {
        /// Seconds
        #[arg(required_unless_present_any = ["list", "restore"], value_parser = clap::value_parser!(u32).range(1..))]
        seconds: Option<u32>,
        #[command(flatten)]
        common: cli::Common,
    },
    /// Stop or start the VM that runs while another does not
    IdleVm {
        /// What to do with it
        action: IdleAction,
        /// Its number
        vmid: VmId,
        /// How long it may take, in seconds
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=settings::MAX_DEADLINE))]
        deadline: u64,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum IdleAction {
    Stop,
    Start,
}

/// The command's whole run.
pub fn main() -> ExitCode {
    cli::main(TOOL, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    match (args.verb, args.vmid, args.phase) {
        (Some(Verb::Status { watch, output }), ..) => status::run(
            &output.root(),
            output.json,
            watch.map(std::time::Duration::from_secs),
        ),
        (Some(Verb::Layout { output }), ..) => Ok(layout::run(&output.root(), output.json)?),
        (
            Some(Verb::Init {
                vmid,
                cpus,
                vcache,
                print,
                output,
            }),
            ..,
        ) => {
            let wish = init::Wish {
                vmid,
                cpus,
                vcache,
                print,
            };
            init::run(&output.root(), &mut output.report(TOOL), &wish, output.json)
        }
        (Some(Verb::Plan { vmid, output }), ..) => plan::run(&output, vmid),
        (Some(Verb::Check { vmid, output }), ..) => check::run(&output, vmid),
        (Some(Verb::Recover { discard, output }), ..) => {
            let mut report = output.report(TOOL);
            let mut run = phases::Run {
                root: output.root(),
                report: &mut report,
            };
            if discard {
                run.discard()
            } else {
                run.recover()
            }
        }
        (Some(Verb::Step { step }), ..) => run_step(step),
        (None, Some(vmid), Some(phase)) => {
            run_phase(args.output.root(), args.output.report(TOOL), vmid, &phase)
        }
        // clap asks for both.
        (None, ..) => anyhow::bail!("VMID and PHASE are missing; see hook --help"),
    }
}

/// Checks the text of a settings file as pre-start does before it looks at the VM, and says what it
/// comes to: the JSON that is kept with the VM's reservation, for a guest without SMT. `source`
/// names the file in errors.
///
/// # Errors
/// What the text says wrong, with the key; that a layout is not for this machine.
pub fn check_settings(root: &Sysroot, text: &str, source: &str) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&settings::resolve(
        root, text, source, 1,
    )?)?)
}

/// Checks the text of a state file as every phase does, and gives it back as hook would write it.
///
/// # Errors
/// Why it cannot be trusted.
pub fn check_state(text: &str) -> anyhow::Result<String> {
    let (reservations, baseline) = Store::<Reservation>::parse(text).map_err(anyhow::Error::msg)?;
    Ok(Store::to_text(&reservations, &baseline)?)
}

/// A failure in pre-start stops the VM's start; in the other phases PVE only warns. Whatever is not
/// hook's business ends well, so that it stops nobody.
fn run_phase(root: Sysroot, mut report: Report, vmid: VmId, phase: &str) -> anyhow::Result<Exit> {
    if vm::is_container(&root, vmid) {
        report.note(&format!(
            "{vmid} is a container; only VMs have vCPUs to fence off, nothing is done"
        ));
        return Ok(report.finish());
    }
    let mut run = phases::Run {
        root,
        report: &mut report,
    };
    match phase {
        "pre-start" => run.pre_start(vmid),
        "post-start" => run.post_start(vmid),
        // Not run when the guest powers itself off or QEMU dies: nothing may depend on it.
        "pre-stop" => Ok(report.finish()),
        "post-stop" => run.post_stop(vmid),
        other => {
            report.note(&format!(
                "{other:?} is no phase that hook knows (pre-start, post-start, pre-stop, post-stop); nothing is done"
            ));
            Ok(report.finish())
        }
    }
}

fn run_step(step: Step) -> anyhow::Result<Exit> {
    match step {
        Step::TidyCaches { common } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            if common.list || common.restore.is_some() || common.save.is_some() {
                anyhow::bail!(
                    "tidy-caches holds no state: there is nothing to list, save or restore"
                );
            }
            common.carry_out(&root, &mut report, TOOL, steps::tidy_caches_plan())
        }
        Step::StatInterval { seconds, common } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            if let Some(exit) = common.restore(&root, &mut report, TOOL)? {
                return Ok(exit);
            }
            let object = steps::stat_interval(&root)?
                .ok_or_else(|| anyhow::anyhow!("vm.stat_interval: this kernel has none"))?;
            let Some(seconds) = seconds.filter(|_| !common.list) else {
                let mut table = Table::new(&["sysctl", "seconds"]);
                table.row([object.label, object.found]);
                return Ok(cli::listed(&mut report, &table));
            };
            common.carry_out(
                &root,
                &mut report,
                TOOL,
                vec![object.want(seconds.to_string())],
            )
        }
        Step::IdleVm {
            action,
            vmid,
            deadline,
            output,
        } => {
            let (root, mut report) = (output.root(), output.report(TOOL));
            let deadline = std::time::Duration::from_secs(deadline);
            match action {
                IdleAction::Stop => steps::stop_idle_vm(&root, &mut report, vmid.into(), deadline)?,
                IdleAction::Start => {
                    steps::start_idle_vm(&root, &mut report, vmid.into(), deadline)?
                }
            }
            Ok(report.finish())
        }
    }
}

#[cfg(test)]
#[path = "../../core/tests/machine/mod.rs"]
mod machine;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Args::command().debug_assert();
    }
}

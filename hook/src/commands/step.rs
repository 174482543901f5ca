//! `hook step`: the steps that have no tool of their own.

use std::time::Duration;

use clap::Subcommand;
use pinfold_core::cli::{self, Output};
use pinfold_core::knob::Value;
use pinfold_core::vm::VmId;
use pinfold_core::{Exit, Table};

use crate::settings::MAX_DEADLINE;
use crate::steps::{self, TOOL};

/// The steps.
#[derive(Debug, Subcommand)]
pub(crate) enum Step {
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
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=MAX_DEADLINE))]
        deadline: u64,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum IdleAction {
    Stop,
    Start,
}

/// The command's whole run.
///
/// # Errors
/// Where the step fails as a whole.
pub(crate) fn run(step: Step, output: &Output) -> anyhow::Result<Exit> {
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
                table.row([object.label, object.found.to_string()]);
                return Ok(cli::listed(&mut report, &table));
            };
            common.carry_out(
                &root,
                &mut report,
                TOOL,
                vec![object.want(Value::text(seconds.to_string()))],
            )
        }
        Step::IdleVm {
            action,
            vmid,
            deadline,
        } => {
            let (root, mut report) = (output.root(), output.report(TOOL));
            let deadline = Duration::from_secs(deadline);
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

//! `hook step`: the steps that have no tool of their own.

use std::time::Duration;

use clap::Subcommand;
use pinfold_core::cli::{self, Output};
use pinfold_core::knob::Value;
use pinfold_core::sys::pci::PciSelector;
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Exit, Knob, Table};

use crate::own_steps::{self, TOOL};
use crate::phases::Run;
use crate::settings::{Deadlines, MAX_DEADLINE};

/// The steps.
#[derive(Debug, Subcommand)]
pub(crate) enum Step {
    /// Drop clean caches and compact memory
    TidyCaches {
        /// Only compact the memory of these NUMA nodes, by number, as in 0-1
        #[arg(long)]
        nodes: Option<CpuSet>,
        #[command(flatten)]
        common: cli::Common,
    },
    /// Have the kernel reset PCI functions, by the first of their reset methods that works
    ResetPci {
        /// The functions, as in 0000:01:00.0, or 01:00 for all functions of a device
        #[arg(required = true, num_args = 1..)]
        device: Vec<PciSelector>,
        #[command(flatten)]
        common: cli::Common,
    },
    /// Set the interval of the kernel's statistics, vm.stat_interval
    StatInterval {
        /// Seconds
        #[arg(required_unless_present_any = ["list", "restore"], value_parser = interval)]
        seconds: Option<u32>,
        #[command(flatten)]
        common: cli::Common,
    },
    /// Set how long KVM polls before a vCPU that halts gives its CPU away (halt_poll_ns)
    ///
    /// It is for all VMs; on Linux 5.9 to 6.1 for those that are started from then on.
    HaltPoll {
        /// Nanoseconds at most; 0 for none
        #[arg(required_unless_present_any = ["list", "restore"])]
        nanoseconds: Option<u32>,
        #[command(flatten)]
        common: cli::Common,
    },
    /// Pin threads that a VM has started since post-start, if there are any
    ///
    /// A timer calls it while a VM with `hotplug: cpu` runs, or until a waiting guest runs.
    PinNew {
        /// The VM's number
        vmid: VmId,
    },
    /// Stop or start the VM that runs while another does not
    IdleVm {
        /// What to do with it
        action: IdleAction,
        /// Its number
        vmid: VmId,
        /// How long it may take, in seconds
        #[arg(long, default_value_t = Deadlines::default().idle_vm)]
        #[arg(value_parser = clap::value_parser!(u64).range(..=MAX_DEADLINE))]
        deadline: u64,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum IdleAction {
    Stop,
    Start,
}

/// Parses vm.stat_interval, in seconds.
fn interval(text: &str) -> Result<u32, String> {
    let number = text.parse().ok();
    number
        .filter(|seconds| *seconds > 0)
        .ok_or_else(|| "not a number of seconds (1 or more)".to_owned())
}

/// The command's whole run.
///
/// # Errors
/// If the step fails as a whole.
pub(crate) fn run(step: Step, output: &Output) -> anyhow::Result<Exit> {
    match step {
        Step::TidyCaches { nodes, common } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            if common.list || common.restore.is_some() || common.save.is_some() {
                anyhow::bail!(
                    "tidy-caches has no state: there is nothing to list, save or restore"
                );
            }
            common.carry_out(
                &root,
                &mut report,
                TOOL,
                own_steps::tidy_caches_plan(nodes.as_ref()),
            )
        }
        Step::ResetPci { device, common } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            if common.list || common.restore.is_some() || common.save.is_some() {
                anyhow::bail!("reset-pci has no state: there is nothing to list, save or restore");
            }
            let functions = pci_reset::expand(&root, &device)?;
            pci_reset::check(&root, &functions)?;
            let changes = functions
                .iter()
                .map(own_steps::pci_reset_by_kernel)
                .collect();
            common.carry_out(&root, &mut report, TOOL, changes)
        }
        Step::StatInterval { seconds, common } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            if let Some(exit) =
                common.restore(&root, &mut report, TOOL, own_steps::is_stat_interval)?
            {
                return Ok(exit);
            }
            let object = own_steps::stat_interval(&root)?
                .ok_or_else(|| anyhow::anyhow!("vm.stat_interval: this kernel has none"))?;
            let Some(seconds) = seconds.filter(|_| !common.list) else {
                let mut table = Table::new(&["sysctl", "seconds"]);
                table.row([object.label.to_string(), object.found.to_string()]);
                return Ok(cli::listed(&mut report, &table));
            };
            common.carry_out(
                &root,
                &mut report,
                TOOL,
                vec![object.want(Value::text(seconds.to_string()))],
            )
        }
        Step::HaltPoll {
            nanoseconds,
            common,
        } => {
            let (root, mut report) = (common.output.root(), common.output.report(TOOL));
            let is_own = |knob: &Knob| *knob == Knob::HaltPolling;
            if let Some(exit) = common.restore(&root, &mut report, TOOL, is_own)? {
                return Ok(exit);
            }
            let object = own_steps::halt_polling(&root)?
                .ok_or_else(|| anyhow::anyhow!("halt_poll_ns: this host has no KVM"))?;
            let Some(nanoseconds) = nanoseconds.filter(|_| !common.list) else {
                let mut table = Table::new(&["parameter", "nanoseconds"]);
                table.row([object.label.to_string(), object.found.to_string()]);
                return Ok(cli::listed(&mut report, &table));
            };
            let change = object.want(Value::text(nanoseconds.to_string()));
            common.carry_out(&root, &mut report, TOOL, vec![change])
        }
        Step::PinNew { vmid } => {
            let mut report = output.report(TOOL).for_log();
            let mut run = Run {
                root: output.root(),
                report: &mut report,
                migrated_from: None,
            };
            run.pin_new(vmid)
        }
        Step::IdleVm {
            action,
            vmid,
            deadline,
        } => {
            let (root, mut report) = (output.root(), output.report(TOOL));
            let deadline = Duration::from_secs(deadline);
            match action {
                IdleAction::Stop => {
                    own_steps::stop_idle_vm(&root, &mut report, vmid.into(), deadline)?
                }
                IdleAction::Start => {
                    own_steps::start_idle_vm(&root, &mut report, vmid.into(), deadline)?
                }
            }
            Ok(report.finish())
        }
    }
}

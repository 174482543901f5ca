//! The phases of a VM's life, as Proxmox VE calls them; see docs/design.md, "The phases".

mod devices;
mod end_of_run;
mod fence;
mod give_back;
mod new_threads;
mod offer;
mod own_fence;
mod post_start;
mod post_stop;
mod pre_start;
mod recover;
mod run;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_failures;
mod thread_timer;

use pinfold_core::vm::{self, VmId};
use pinfold_core::{Exit, Host, Report};

use crate::chain::Chain;

pub(crate) use fence::failures;
pub(crate) use run::Run;

/// The phases in which Proxmox VE calls a hookscript.
pub(crate) const NAMES: [&str; 4] = ["pre-start", "post-start", "pre-stop", "post-stop"];

/// Runs a phase. A failure in pre-start stops the VM's start; in the other phases PVE only warns.
/// What hook does not handle succeeds, so that it does not stop a start.
///
/// # Errors
/// If the phase could not do its work.
pub(crate) fn run(
    root: Host,
    report: Report,
    vmid: VmId,
    phase: &str,
    migrated_from: Option<String>,
) -> anyhow::Result<Exit> {
    // A full disk below the task log stops no VM.
    let mut report = report.for_log();
    if vm::is_container(&root, vmid) {
        report.note(&format!(
            "{vmid} is a container; only VMs have vCPUs to isolate, nothing to do"
        ));
        return Ok(report.finish());
    }
    let mut run = Run {
        root,
        report: &mut report,
        migrated_from,
    };
    // The VM's other scripts nest around hook, and are never run under its lock. A phase that is
    // called once more, to repair a fence, is not a start.
    match phase {
        "pre-start" | "post-start" if run.is_fenced(vmid) => run.start_phase(vmid, phase),
        "pre-start" => {
            Chain::for_start(&run.root, vmid).run(&run.root, run.report, phase)?;
            run.start_phase(vmid, phase)
        }
        "post-start" => {
            let chain = Chain::of_started(&run.root, vmid);
            if let Err(error) = chain.run(&run.root, run.report, phase) {
                run.report.error(&format!("{error:#}"));
            }
            run.start_phase(vmid, phase)
        }
        // Not run when the guest powers itself off or QEMU dies: nothing may depend on it.
        "pre-stop" => {
            run.save_counters(vmid);
            Chain::of_started(&run.root, vmid).run_back(&run.root, run.report, phase);
            Ok(report.finish())
        }
        "post-stop" => {
            let chain = Chain::of_started(&run.root, vmid);
            let ended = run.post_stop(vmid);
            run.report_counters(vmid);
            let earlier = run.report.failures();
            chain.run_back(&run.root, run.report, phase);
            match ended {
                Ok(Exit::Success) if run.report.failures() > earlier => Ok(Exit::Partial),
                ended => ended,
            }
        }
        other => {
            report.note(&format!(
                "{other:?} is not a phase that hook knows (pre-start, post-start, pre-stop, post-stop); nothing to do"
            ));
            Ok(report.finish())
        }
    }
}

impl Run<'_> {
    fn start_phase(&mut self, vmid: VmId, phase: &str) -> anyhow::Result<Exit> {
        match phase {
            "pre-start" => self.pre_start(vmid),
            _ => self.post_start(vmid),
        }
    }

    fn is_fenced(&self, vmid: VmId) -> bool {
        matches!(self.isolated_already(vmid), Ok(Some(_)))
    }
}

//! The steps that have no tool of their own: caches and compaction, vm.stat_interval, the idle VM.

use std::time::Duration;

use crate::exec;
use pinfold_core::knob::Value;
use pinfold_core::vm::VmId;
use pinfold_core::{Error, Host, Knob, Report, Result, Setting, apply, vm};

/// The name under which hook reports and saves values.
pub(crate) const TOOL: &str = "hook";

/// Drops clean caches and compacts memory, so that huge pages can be allocated. A failure is
/// reported and does not stop the start.
pub(crate) fn tidy_caches(root: &Host, report: &mut Report) {
    report.step("caches");
    report.changes(&apply(root, tidy_caches_plan()));
    report.summary("caches: dropped, memory compacted");
}

/// The changes behind [`tidy_caches`]: admin-guide/sysctl/vm.rst, `drop_caches` and
/// `compact_memory`.
pub(crate) fn tidy_caches_plan() -> Vec<pinfold_core::Change> {
    [("vm/drop_caches", "3"), ("vm/compact_memory", "1")]
        .into_iter()
        .map(|(name, value)| {
            let knob = Knob::Trigger(name.into());
            Setting::new(knob.clone(), knob.to_string(), Value::text("")).want(Value::text(value))
        })
        .collect()
}

/// The sysctl for the interval of the kernel's statistics.
const STAT_INTERVAL: &str = "vm/stat_interval";

/// vm.stat_interval, if the kernel has it.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn stat_interval(root: &Host) -> Result<Option<Setting>> {
    let knob = Knob::Sysctl(STAT_INTERVAL.into());
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

/// Whether the idle VM runs.
///
/// # Errors
/// If its pid file cannot be read.
pub(crate) fn idle_vm_runs(root: &Host, idle: u32) -> Result<bool> {
    Ok(vm::find(root, VmId::try_from(idle)?)?.is_some())
}

/// Shuts the idle VM down and waits for it, if it runs.
///
/// # Errors
/// If `qm` fails, or the VM does not stop in time.
pub(crate) fn stop_idle_vm(
    root: &Host,
    report: &mut Report,
    idle: u32,
    deadline: Duration,
) -> anyhow::Result<()> {
    if !idle_vm_runs(root, idle)? {
        return Ok(());
    }
    check_live(root)?;
    // qm waits itself; hook waits a little longer, so that qm's own message is reported.
    let seconds = deadline.as_secs().to_string();
    exec::run(
        "qm",
        &["shutdown", &idle.to_string(), "--timeout", &seconds],
        deadline + Duration::from_secs(5),
    )?;
    report.did(&format!("idle VM {idle} stopped"));
    Ok(())
}

/// Starts the idle VM, if it does not run.
///
/// # Errors
/// If `qm` fails or takes too long.
pub(crate) fn start_idle_vm(
    root: &Host,
    report: &mut Report,
    idle: u32,
    deadline: Duration,
) -> anyhow::Result<()> {
    if idle_vm_runs(root, idle)? {
        return Ok(());
    }
    check_live(root)?;
    exec::run("qm", &["start", &idle.to_string()], deadline)?;
    report.did(&format!("idle VM {idle} started"));
    Ok(())
}

fn check_live(root: &Host) -> Result<()> {
    let why = "VMs can only be started and stopped on the running host, not below --sysroot";
    if root.is_live() {
        Ok(())
    } else {
        Err(Error::unusable("qm", why))
    }
}

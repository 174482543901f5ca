//! The steps that have no tool of their own: caches and compaction, vm.stat_interval, the idle VM.

use std::time::Duration;

use pinfold_core::{Knob, Object, Report, Result, Sysroot, apply, command, vm};

/// Drops clean caches and compacts memory, so that hugepages can be had. What it cannot do is told and stops nothing.
pub(crate) fn tidy_caches(root: &Sysroot, report: &mut Report) {
    report.step("caches");
    report.changes(&apply(root, tidy_caches_plan()));
    report.summary("caches: dropped, memory compacted");
}

/// The changes behind [`tidy_caches`]: admin-guide/sysctl/vm.rst, `drop_caches` and `compact_memory`.
pub(crate) fn tidy_caches_plan() -> Vec<pinfold_core::Change> {
    [("vm/drop_caches", "3"), ("vm/compact_memory", "1")]
        .into_iter()
        .map(|(name, value)| {
            let knob = Knob::Trigger(name.into());
            Object::new(knob.clone(), knob.to_string(), "").want(value)
        })
        .collect()
}

/// vm.stat_interval, as an object to change.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn stat_interval(root: &Sysroot) -> Result<Option<Object>> {
    let knob = Knob::Sysctl("vm/stat_interval".into());
    Ok(knob.read(root)?.map(|found| Object::new(knob.clone(), knob.to_string(), found)))
}

/// Shuts the idle VM down and waits for it; one that does not run is left so.
///
/// # Errors
/// Where `qm` fails, or the VM does not stop in time.
pub(crate) fn stop_idle_vm(report: &mut Report, idle: u32, deadline: Duration) -> anyhow::Result<bool> {
    let vmid = vm::VmId::try_from(idle)?;
    if vm::find(&Sysroot::default(), vmid)?.is_none() {
        return Ok(false);
    }
    // qm waits itself; a little longer here, so that its own words are the ones told.
    let seconds = deadline.as_secs().to_string();
    command::run("qm", &["shutdown", &idle.to_string(), "--timeout", &seconds], deadline + Duration::from_secs(5))?;
    report.did(&format!("idle VM {idle} stopped"));
    Ok(true)
}

/// Starts the idle VM. A failure is told and stops nothing.
pub(crate) fn start_idle_vm(report: &mut Report, idle: u32, deadline: Duration) {
    match command::run("qm", &["start", &idle.to_string()], deadline) {
        Ok(_) => report.did(&format!("idle VM {idle} started")),
        Err(error) => report.error(&format!("idle VM {idle}: {error}")),
    }
}

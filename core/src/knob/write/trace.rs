//! Has the kernel record what runs on CPUs, in a tracefs instance (Documentation/trace/ftrace.rst).

use std::fs;
use std::io;

use super::file;
use crate::cpuset::CpuSet;
use crate::sys::task::TaskId;
use crate::sys::trace;
use crate::sysroot::Sysroot;

/// The size of the buffer for each CPU, in KiB: some thousand records. An instance begins with 1.4 MB
/// for each CPU of the host.
const BUFFER: &str = "256";

/// What is recorded.
const EVENTS: [&str; 5] = [
    "sched/sched_switch",
    "irq/irq_handler_entry",
    "irq/irq_handler_exit",
    "irq/softirq_entry",
    "irq/softirq_exit",
];

/// Makes a process's instance, which records what runs on these CPUs; removes it if there are none.
/// One that cannot be set up is removed again.
pub(super) fn record(root: &Sysroot, process: &TaskId, cpus: &CpuSet) -> io::Result<()> {
    let instance = trace::instance(process);
    if cpus.is_empty() {
        return remove(root, &instance);
    }
    fs::create_dir(root.path(&instance))?;
    let set = |name: &str, text: &str| file::write(root, format!("{instance}/{name}"), text);
    let set_up = || -> io::Result<()> {
        // Before the first record: the kernel frees the rest of the memory.
        set("buffer_size_kb", BUFFER)?;
        set("tracing_cpumask", &cpus.to_mask())?;
        // Without `record-cmd`: that option is the top level's, and sets all instances.
        EVENTS
            .iter()
            .try_for_each(|event| set(&format!("events/{event}/enable"), "1"))
    };
    set_up().or_else(|error| remove(root, &instance).and(Err(error)))
}

/// The kernel refuses to remove an instance whose records are still open (EBUSY).
fn remove(root: &Sysroot, instance: &str) -> io::Result<()> {
    match file::write(root, format!("{instance}/tracing_on"), "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        stopped => stopped?,
    }
    fs::remove_dir(root.path(instance))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knob::{Knob, Outcome, Setting, apply_one};
    use crate::testutils::MadeUpHost;

    const PROCESS: TaskId = TaskId {
        pid: 4711,
        tid: 4711,
        start: 42,
    };

    fn set(host: &MadeUpHost, found: CpuSet, wanted: CpuSet) -> Outcome {
        let knob = Knob::Trace(PROCESS);
        let setting = Setting::new(knob.clone(), knob.to_string(), found);
        apply_one(&host.root, setting.want(wanted)).outcome
    }

    #[test]
    fn an_instance_goes_and_one_that_cannot_be_set_up_too() {
        let host = MadeUpHost::new("5900x");
        let (none, some) = (CpuSet::new(), CpuSet::range(6, 7));
        let hint = "without tracefs: mount -t tracefs tracefs /sys/kernel/tracing";
        let refused = Outcome::Failed(format!("No such file or directory; {hint}"));
        assert_eq!(set(&host, none.clone(), some.clone()), refused);

        let instances = host.root.path("sys/kernel/tracing/instances");
        fs::create_dir_all(&instances).unwrap();
        // A plain folder stays empty, so the buffer's size cannot be set.
        assert_eq!(set(&host, none.clone(), some.clone()), refused);
        assert_eq!(fs::read_dir(&instances).unwrap().count(), 0);

        let instance = instances.join("pinfold-4711-42");
        fs::create_dir(&instance).unwrap();
        assert_eq!(set(&host, some.clone(), none.clone()), Outcome::Changed);
        assert!(!instance.exists());
        // Another has removed it.
        assert_eq!(set(&host, some, none), Outcome::Changed);
    }

    #[test]
    fn the_cpus_are_read_back() {
        let host = MadeUpHost::new("5900x");
        let read = || Knob::Trace(PROCESS).read(&host.root).unwrap().unwrap();
        assert_eq!(read(), CpuSet::new().into());
        let file = "sys/kernel/tracing/instances/pinfold-4711-42/tracing_cpumask";
        host.file(file, "00000000,00fc0fc0");
        assert_eq!(read().to_string(), "6-11,18-23");
    }
}

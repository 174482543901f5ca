//! What is looked at before CPUs go offline.

use pinfold_core::knob::TaskId;
use pinfold_core::{CpuSet, Error, Knob, Result, Sysroot, cgroup, cpu, process};

/// All that is looked at before CPUs go offline: [`check_possible`], [`check_partitions`] and [`bound_tasks`], whose
/// notes it gives.
///
/// # Errors
/// Where they should not go, with the reason.
pub fn check_offline(root: &Sysroot, cpus: &CpuSet) -> Result<Vec<String>> {
    check_possible(root, cpus)?;
    check_partitions(root, cpus)?;
    bound_tasks(root, cpus)
}

/// Whether the kernel lets this CPU go offline; CPU 0 we never ask for, whatever the kernel says.
pub(crate) fn can_go(root: &Sysroot, cpu: usize) -> bool {
    cpu != 0 && root.exists(format!("sys/devices/system/cpu/cpu{cpu}/online"))
}

/// Makes sure that these CPUs exist, can go offline, and leave others behind.
///
/// # Errors
/// [`Error::Unusable`] naming the CPUs that cannot.
pub fn check_possible(root: &Sysroot, cpus: &CpuSet) -> Result<()> {
    cpu::check_present(root, cpus)?;
    if cpus.contains(0) {
        return Err(Error::unusable("CPU 0", "cannot be taken offline: the kernel needs it; leave it out"));
    }
    let stuck: CpuSet = cpus.iter().filter(|cpu| !can_go(root, *cpu)).collect();
    if !stuck.is_empty() {
        let why = "cannot be taken offline: the kernel gives it no file to do so (CONFIG_HOTPLUG_CPU)";
        return Err(Error::unusable(format!("CPU {stuck}"), why));
    }
    if cpu::online(root)?.is_subset(cpus) {
        return Err(Error::unusable(format!("CPU {cpus}"), "no CPU would be left online"));
    }
    Ok(())
}

/// Makes sure that no cpuset partition loses its last CPU: it would be invalid from then on, online again or not.
///
/// # Errors
/// [`Error::Unusable`] naming the first such partition.
pub fn check_partitions(root: &Sysroot, cpus: &CpuSet) -> Result<()> {
    // Since Linux 6.7 the root cgroup lists the CPUs of isolated partitions, which saves the walk.
    let isolated = root.read_value(cgroup::file("", "cpuset.cpus.isolated"))?;
    if isolated.is_some_and(|list| CpuSet::from_kernel_list(&list).is_ok_and(|isolated| !isolated.intersects(cpus))) {
        return Ok(());
    }
    let mut left = vec![String::new()];
    while let Some(path) = left.pop() {
        let children = match cgroup::children(root, &path) {
            Err(error) if error.is_gone() => continue,
            children => children?,
        };
        left.extend(children.iter().map(|name| format!("{path}/{name}").trim_start_matches('/').to_owned()));
        let value = |name: &str| root.read_value(cgroup::file(&path, name));
        let state = value("cpuset.cpus.partition")?.unwrap_or_default();
        // The root cgroup has no such file; `isolated invalid (…)` has nothing left to lose.
        if !matches!(state.as_str(), "isolated" | "root") {
            continue;
        }
        let own = value("cpuset.cpus.effective")?.unwrap_or_default();
        let own = CpuSet::from_kernel_list(&own).unwrap_or_default();
        if !own.is_empty() && own.is_subset(cpus) {
            let why = format!(
                "offline would take all CPUs of cpuset partition /{path} ({state}), which does not become valid again; \
                 make it a member first, or say --force"
            );
            return Err(Error::unusable(format!("CPU {own}"), why));
        }
    }
    Ok(())
}

/// The tasks that may run on none but these CPUs, a note for each: when the CPUs go, the kernel lets them run anywhere.
///
/// # Errors
/// Where /proc or the list of online CPUs cannot be read.
pub fn bound_tasks(root: &Sysroot, cpus: &CpuSet) -> Result<Vec<String>> {
    let online = cpu::online(root)?;
    let mut notes = Vec::new();
    for pid in process::pids(root)? {
        let Ok(tids) = root.names(format!("proc/{pid}/task")) else { continue };
        for tid in tids.iter().filter_map(|tid| tid.parse().ok()) {
            // Its start time matters to nobody here, and one file less per thread does.
            let id = TaskId { pid, tid, start: 0 };
            let allowed = match process::affinity(root, &id) {
                Err(error) if error.is_gone() => continue,
                allowed => &allowed? & &online,
            };
            if allowed.is_empty() || !allowed.is_subset(cpus) {
                continue;
            }
            match process::task(root, pid, tid) {
                // An IRQ's thread goes with its IRQ, which the kernel moves by itself.
                Ok(task) if task.kernel && (task.bound || task.name.starts_with("irq/")) => {}
                Ok(task) => {
                    let thread = if task.kernel { Knob::Kthread(task.id) } else { Knob::Thread(task.id) };
                    notes.push(format!(
                        "{thread} ({}): may run on CPU {allowed} only; when that is offline the kernel lets it run anywhere",
                        task.name
                    ));
                }
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(notes)
}

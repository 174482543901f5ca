//! Checks before CPUs go offline.

use pinfold_core::sys::task::{self, Allowed, Processes};
use pinfold_core::sys::{cgroup, cpu};
use pinfold_core::{CpuSet, Error, Host, Knob, Result};

/// Whether this CPU may go offline. CPU 0 may not, even if the kernel would allow it.
pub(crate) fn can_go(root: &Host, number: usize) -> bool {
    number != cpu::BOOT_CPU && root.exists(format!("sys/devices/system/cpu/cpu{number}/online"))
}

/// Checks that these CPUs exist, can go offline, and are not all that are online.
///
/// # Errors
/// [`Error::Unusable`] naming the CPUs that cannot.
pub fn check_possible(root: &Host, cpus: &CpuSet) -> Result<()> {
    cpu::check_present(root, cpus)?;
    if cpus.contains(cpu::BOOT_CPU) {
        return Err(Error::unusable(
            "CPU 0",
            "cannot be taken offline: the kernel needs it; leave it out",
        ));
    }
    let stuck: CpuSet = cpus.iter().filter(|cpu| !can_go(root, *cpu)).collect();
    if !stuck.is_empty() {
        let why = "cannot be taken offline: the kernel has no file for it (CONFIG_HOTPLUG_CPU)";
        return Err(Error::unusable(format!("CPU {stuck}"), why));
    }
    if cpu::online(root)?.is_subset(cpus) {
        return Err(Error::unusable(
            format!("CPU {cpus}"),
            "no CPU would be left online",
        ));
    }
    Ok(())
}

/// Checks that no cpuset partition loses its last CPU: it would stay invalid even once the CPU is
/// online again. Returns a note for each that loses some, and with `force` for each that loses all.
///
/// # Errors
/// [`Error::Unusable`] naming the first partition that would lose all of its CPUs, unless `force`.
pub fn check_partitions(root: &Host, cpus: &CpuSet, force: bool) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    // Since Linux 6.7 the root cgroup lists the CPUs of isolated partitions, which saves the walk.
    let isolated = root.read_value(cgroup::file("", "cpuset.cpus.isolated"))?;
    if isolated.is_some_and(|list| {
        CpuSet::from_kernel_list(&list).is_ok_and(|isolated| !isolated.intersects(cpus))
    }) {
        return Ok(notes);
    }
    for (path, own) in partitions(root)? {
        let lost = &own & cpus;
        let object = format!("CPU {lost}");
        if lost.is_empty() {
            continue;
        } else if lost != own {
            notes.push(format!(
                "{object}: cpuset partition /{path} lacks it until it is online again"
            ));
        } else if force {
            notes.push(format!(
                "{object}: cpuset partition /{path} loses all of its CPUs and becomes invalid"
            ));
        } else {
            let why = format!(
                "cpuset partition /{path} would lose all of its CPUs and become invalid; \
                 make it a member first, or use --force"
            );
            return Err(Error::unusable(object, why));
        }
    }
    Ok(notes)
}

/// The valid cpuset partitions below the root cgroup, with their CPUs; see cpuset.cpus.partition in
/// cgroup-v2.rst.
fn partitions(root: &Host) -> Result<Vec<(String, CpuSet)>> {
    let mut partitions = Vec::new();
    let mut left = vec![String::new()];
    while let Some(path) = left.pop() {
        let children = match cgroup::children(root, &path) {
            Err(error) if error.is_gone() => continue,
            children => children?,
        };
        left.extend(
            children
                .iter()
                .map(|name| format!("{path}/{name}").trim_start_matches('/').to_owned()),
        );
        let value = |name: &str| {
            root.read_value(cgroup::file(&path, name))
                .map(Option::unwrap_or_default)
        };
        // The root cgroup has no such file, and `isolated invalid (…)` has nothing left to lose.
        if matches!(
            value("cpuset.cpus.partition")?.as_str(),
            "isolated" | "root"
        ) {
            let own = value("cpuset.cpus.effective")?;
            let own = CpuSet::from_kernel_list(&own).map_err(|source| Error::Cpus {
                object: format!("cgroup /{path}"),
                source,
            })?;
            partitions.push((path, own));
        }
    }
    Ok(partitions)
}

/// A note for each task that may run only on these CPUs: once they are offline, the kernel lets it
/// run anywhere.
///
/// # Errors
/// If /proc or the list of online CPUs cannot be read.
pub fn bound_tasks(root: &Host, cpus: &CpuSet) -> Result<Vec<String>> {
    let allowed = Allowed::among(root, &cpu::online(root)?)?;
    let mut notes = Vec::new();
    let mut hidden = 0;
    let processes = Processes::read(root)?;
    for pid in processes.pids() {
        let tids = match processes.tids(root, pid) {
            Ok(tids) => tids,
            Err(error) if error.is_gone() => continue,
            Err(error) if error.is_denied() => {
                hidden += 1;
                continue;
            }
            Err(error) => return Err(error),
        };
        for tid in tids {
            match bound_task(root, pid, tid, cpus, &allowed) {
                Ok(note) => notes.extend(note),
                Err(error) if error.is_gone() => {}
                Err(error) if error.is_denied() => hidden += 1,
                Err(error) => return Err(error),
            }
        }
    }
    if hidden > 0 {
        notes.push(format!(
            "without root, the CPUs of {hidden} tasks could not be read"
        ));
    }
    Ok(notes)
}

fn bound_task(
    root: &Host,
    pid: i32,
    tid: i32,
    cpus: &CpuSet,
    allowed: &Allowed<'_>,
) -> Result<Option<String>> {
    let allowed = allowed.of(pid, tid)?;
    if allowed.is_empty() || !allowed.is_subset(cpus) {
        return Ok(None);
    }
    let task = task::task(root, pid, tid)?;
    // An IRQ's thread follows its IRQ, which the kernel moves.
    if task.kernel && (task.bound || task.name.starts_with("irq/")) {
        return Ok(None);
    }
    let thread = if task.kernel {
        Knob::Kthread(task.id)
    } else {
        Knob::Thread(task.id)
    };
    let name = task.name;
    Ok(Some(format!(
        "{thread} ({name}): may run on CPU {allowed} only; once offline, the kernel lets it run anywhere"
    )))
}

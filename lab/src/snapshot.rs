//! The state of the whole host as text, a line for each fact, so that two of them can be compared.
//!
//! What comes and goes on an idle host is reduced to what lasts: kworkers to the
//! masks of their two kinds, threads to the distinct (name, cgroup, mask), thread ids left out.
//! An IRQ's effective affinity is left out as well: within its mask it is the kernel's choice.

use crate::proc::{self, Thread, names, read};
use crate::tool;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SYSCTLS: &[(&str, &[&str])] = &[
    (
        "/proc/sys/kernel",
        &[
            "watchdog",
            "sched",
            "numa_balancing",
            "timer_migration",
            "hung_task",
        ],
    ),
    (
        "/proc/sys/vm",
        &[
            "stat_interval",
            "dirty",
            "swappiness",
            "compaction",
            "nr_",
            "overcommit",
            "zone_reclaim",
            "min_free",
        ],
    ),
];
/// What reads as the last command written, not as state.
const COMMANDS: [&str; 3] = ["drop_caches", "compact_memory", "stat_refresh"];
const CPUSET_FILES: [&str; 7] = [
    "cpuset.cpus",
    "cpuset.cpus.effective",
    "cpuset.cpus.exclusive",
    "cpuset.cpus.partition",
    "cpuset.mems",
    "cgroup.subtree_control",
    "cgroup.type",
];
const UNIT_FOLDERS: [&str; 5] = [
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/system",
    "/etc/systemd/system.control",
    "/run/pinfold",
];
const UNIT_PROPERTIES: &str = "Id,ActiveState,Slice,ControlGroup,Delegate,DelegateControllers,\
                               AllowedCPUs,EffectiveCPUs,AllowedMemoryNodes";

/// The state of a host at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState(Vec<String>);

impl HostState {
    /// Reads a state that `lab-agent snapshot` printed.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().map(str::to_owned).collect())
    }

    /// The lines, in a fixed order.
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    /// What of this state did not come back, as [`diff`](Self::diff) has it; empty means all did.
    ///
    /// hook's own empty folder and its lock stay until the next boot. A thread that refuses an
    /// affinity has the one that the kernel gives it: a rescuer takes that of the last pool it
    /// helped, and no program can set it back.
    pub fn not_restored(&self, later: &Self) -> String {
        let stays = |line: &str| {
            line.starts_with("file /run/pinfold")
                || (line.starts_with("kthread ") && line.contains(" no_setaffinity "))
        };
        self.diff(later)
            .lines()
            .filter(|line| !stays(&line[1..]))
            .map(|line| format!("{line}\n"))
            .collect()
    }

    /// Lines that only one has: `-` before those of `self`, `+` before those of `later`. Empty
    /// means equal.
    pub fn diff(&self, later: &Self) -> String {
        let (before, after): (BTreeSet<_>, BTreeSet<_>) =
            (self.0.iter().collect(), later.0.iter().collect());
        let gone = before.difference(&after).map(|line| (*line, '-'));
        let come = after.difference(&before).map(|line| (*line, '+'));
        let mut lines: Vec<_> = gone.chain(come).collect();
        lines.sort();
        lines
            .into_iter()
            .map(|(line, sign)| format!("{sign}{line}\n"))
            .collect()
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// Reads the state of the host we run on.
pub fn take() -> Result<HostState> {
    // First: when systemd answers, it has done what it had put off, as to take a controller away
    // that no unit uses any more.
    let units = units()?;
    let threads = proc::threads();
    let sections = [
        irqs(),
        kthreads(&threads),
        tasks(&threads),
        queues(),
        workqueues(),
        cgroups(Path::new("/sys/fs/cgroup")),
        units,
        unit_files(),
        cpufreq(),
        sysctls(),
        cpus(),
        pci(),
        mounts(),
    ];
    Ok(HostState(sections.concat()))
}

/// `NAME=VALUE` for each of these files that exists.
fn values(folder: &Path, files: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    let mut line = String::new();
    for file in files {
        if let Some(value) = read(folder.join(file.as_ref())) {
            // Writing to a String cannot fail.
            let _ = write!(line, " {}={value:?}", file.as_ref());
        }
    }
    line
}

fn irqs() -> Vec<String> {
    let folder = Path::new("/proc/irq");
    let mut numbers: Vec<u32> = names(folder)
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut lines = vec![format!(
        "irq default{}",
        values(folder, ["default_smp_affinity"])
    )];
    for number in numbers {
        let own = folder.join(number.to_string());
        let actions: Vec<_> = names(&own)
            .into_iter()
            .filter(|name| own.join(name).is_dir())
            .collect();
        lines.push(format!(
            "irq {number} {:?}{}",
            actions.join(" "),
            values(&own, ["smp_affinity_list"])
        ));
    }
    lines
}

/// What of a kthread's name lasts: kworkers by kind, without a process's number.
fn lasting_name(comm: &str) -> String {
    if comm.starts_with("kworker/R-") {
        return comm.to_owned();
    }
    if comm.starts_with("kworker/u") {
        return "kworker/unbound".to_owned();
    }
    if comm.starts_with("kworker/") {
        return "kworker/bound".to_owned();
    }
    let (stem, number) = comm.rsplit_once('/').unwrap_or((comm, ""));
    let per_cpu = number.len() <= 2;
    if number.is_empty() || per_cpu || number.contains(|c: char| !c.is_ascii_digit()) {
        comm.to_owned()
    } else {
        format!("{stem}/*")
    }
}

fn kthreads(threads: &[Thread]) -> Vec<String> {
    let mut groups: BTreeMap<(String, bool), BTreeSet<&str>> = BTreeMap::new();
    // A worker is bound before it works; one that is not was made this moment (kernel/workqueue.c,
    // `create_worker`).
    let newborn = |thread: &&Thread| {
        !thread.bound
            && ["kworker/bound", "kworker/unbound"].contains(&lasting_name(&thread.comm).as_str())
    };
    for thread in threads
        .iter()
        .filter(|thread| thread.kernel && !newborn(thread))
    {
        groups
            .entry((lasting_name(&thread.comm), thread.bound))
            .or_default()
            .insert(&thread.cpus);
    }
    let line = |((name, bound), masks): ((String, bool), BTreeSet<&str>)| {
        let bound = if bound { " no_setaffinity" } else { "" };
        format!(
            "kthread {name:?}{bound} cpus={}",
            masks.into_iter().collect::<Vec<_>>().join(" ")
        )
    };
    groups.into_iter().map(line).collect()
}

/// Threads that come with an event and go a while after it: udev's workers, and journald's that
/// syncs its file to the disk (`journald_file_set_offline_thread`).
const PASSING: [&str; 2] = ["(udev-worker)", "journal-offline"];

fn tasks(threads: &[Thread]) -> Vec<String> {
    let own = own_line(threads);
    let users = threads
        .iter()
        .filter(|thread| !thread.kernel && !own.contains(&thread.pid));
    let lasting = users.filter(|thread| !PASSING.contains(&thread.comm.as_str()));
    let lines: BTreeSet<_> = lasting
        .map(|thread| {
            format!(
                "task {:?} cgroup={} policy={} cpus={}",
                thread.comm,
                proc::cgroup(thread.pid, thread.tid),
                proc::policy(thread.pid, thread.tid),
                thread.cpus
            )
        })
        .collect();
    lines.into_iter().collect()
}

/// We and those who started us, up to the agent, which stays.
fn own_line(threads: &[Thread]) -> BTreeSet<i32> {
    let leaders: BTreeMap<i32, &Thread> =
        threads.iter().map(|thread| (thread.pid, thread)).collect();
    let mut own = BTreeSet::new();
    let mut pid = std::process::id().cast_signed();
    while let Some(process) = leaders.get(&pid) {
        if pid <= 1 || (process.parent == 1 && !own.is_empty()) || !own.insert(pid) {
            break;
        }
        pid = process.parent;
    }
    own
}

/// The CPUs of network queues, as far as the kernel shows them.
fn queues() -> Vec<String> {
    let folder = Path::new("/sys/class/net");
    let mut lines = Vec::new();
    for interface in names(folder) {
        let queues = folder.join(&interface).join("queues");
        lines.extend(names(&queues).into_iter().map(|queue| {
            let masks = values(&queues.join(&queue), ["rps_cpus"]);
            format!("queue {interface} {queue}{masks}")
        }));
    }
    lines
}

fn workqueues() -> Vec<String> {
    let folder = Path::new("/sys/devices/virtual/workqueue");
    let masks = ["cpumask", "cpumask_requested", "cpumask_isolated"];
    let mut lines = vec![format!("workqueue{}", values(folder, masks))];
    let own = names(folder)
        .into_iter()
        .filter(|name| folder.join(name).join("cpumask").exists());
    lines.extend(own.map(|name| {
        format!(
            "workqueue {name}{}",
            values(&folder.join(&name), ["cpumask", "nice", "affinity_scope"])
        )
    }));
    lines
}

fn cgroups(folder: &Path) -> Vec<String> {
    let mut files = CPUSET_FILES.to_vec();
    if folder == Path::new("/sys/fs/cgroup") {
        files.push("cpuset.cpus.isolated");
    }
    let mut lines = vec![format!(
        "cgroup {}{}",
        folder.display(),
        values(folder, files)
    )];
    for name in names(folder) {
        let child = folder.join(name);
        if child.is_dir() {
            lines.extend(cgroups(&child));
        }
    }
    lines
}

fn units() -> Result<Vec<String>> {
    let mut show = Command::new("systemctl");
    show.args([
        "show",
        "--all",
        "-p",
        UNIT_PROPERTIES,
        "*.slice",
        "*.scope",
        "irqbalance.service",
    ]);
    let text = tool::run(&mut show).context("cannot list units")?;
    let mut lines: Vec<_> = text.split("\n\n").map(unit_line).collect();
    lines.sort();
    lines.dedup();
    Ok(lines)
}

/// One line of a block of `NAME=VALUE` lines, `Id` first.
fn unit_line(block: &str) -> String {
    let mut properties: Vec<_> = block.lines().filter(|line| !line.is_empty()).collect();
    properties.sort_by_key(|line| (!line.starts_with("Id="), *line));
    format!("unit {}", properties.join(" "))
}

fn unit_files() -> Vec<String> {
    let mut lines = Vec::new();
    for folder in UNIT_FOLDERS.map(Path::new) {
        if folder.exists() {
            list_files(folder, &mut lines);
        } else {
            lines.push(format!("file {} absent", folder.display()));
        }
    }
    lines
}

fn list_files(path: &Path, lines: &mut Vec<String>) {
    let kind = fs::symlink_metadata(path).map(|file| file.file_type());
    if kind.as_ref().is_ok_and(fs::FileType::is_dir) {
        lines.push(format!("file {}/", path.display()));
        for name in names(path) {
            list_files(&path.join(name), lines);
        }
    } else {
        let content = fs::read_link(path)
            .map(|to| to.display().to_string())
            .ok()
            .or_else(|| read(path));
        lines.push(format!("file {} {content:?}", path.display()));
    }
}

fn cpufreq() -> Vec<String> {
    let folder = Path::new("/sys/devices/system/cpu/cpufreq");
    let files = [
        "affected_cpus",
        "scaling_driver",
        "scaling_governor",
        "energy_performance_preference",
        "scaling_min_freq",
        "scaling_max_freq",
    ];
    let policies = names(folder)
        .into_iter()
        .filter(|name| name.starts_with("policy"));
    policies
        .map(|name| format!("cpufreq {name}{}", values(&folder.join(&name), files)))
        .collect()
}

fn sysctls() -> Vec<String> {
    let mut lines = Vec::new();
    for (folder, stems) in SYSCTLS {
        for name in names(folder) {
            if stems.iter().any(|stem| name.contains(stem)) && !COMMANDS.contains(&name.as_str()) {
                lines.push(format!("sysctl{}", values(Path::new(folder), [name])));
            }
        }
    }
    let kvm = Path::new("/sys/module/kvm/parameters");
    lines.push(format!("kvm{}", values(kvm, ["halt_poll_ns"])));
    let memory = Path::new("/sys/kernel/mm");
    lines.push(format!(
        "mm{}",
        values(
            memory,
            [
                "transparent_hugepage/enabled",
                "transparent_hugepage/defrag",
                "ksm/run"
            ]
        )
    ));
    lines
}

fn cpus() -> Vec<String> {
    let folder = Path::new("/sys/devices/system/cpu");
    let latencies = names(folder)
        .into_iter()
        .filter(|name| {
            name.starts_with("cpu") && name.ends_with(|last: char| last.is_ascii_digit())
        })
        .map(|cpu| {
            let latency = values(&folder.join(&cpu), ["power/pm_qos_resume_latency_us"]);
            format!("{cpu}{latency}")
        });
    let all = format!(
        "cpus{}",
        values(
            folder,
            [
                "online",
                "offline",
                "present",
                "isolated",
                "nohz_full",
                "smt/control"
            ]
        )
    );
    std::iter::once(all).chain(latencies).collect()
}

fn pci() -> Vec<String> {
    let folder = Path::new("/sys/bus/pci/devices");
    let files = [
        "vendor",
        "device",
        "class",
        "power/control",
        "driver_override",
        "local_cpulist",
        "enable",
    ];
    let link = |path: PathBuf| {
        fs::read_link(path)
            .ok()?
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let line = |name: String| {
        let own = folder.join(&name);
        let driver = link(own.join("driver")).unwrap_or_else(|| "-".to_owned());
        format!("pci {name} driver={driver}{}", values(&own, files))
    };
    names(folder).into_iter().map(line).collect()
}

fn mounts() -> Vec<String> {
    let text = read("/proc/self/mountinfo").unwrap_or_default();
    // The lab's own, which CPU hotplug takes away.
    let mounts = text
        .lines()
        .filter_map(mount_line)
        .filter(|line| !line.contains(" /sys/devices/system/cpu/"));
    let mut lines: Vec<_> = mounts.collect();
    lines.sort();
    lines
}

/// Of `ID PARENT DEV ROOT POINT OPTIONS [TAGS] - TYPE SOURCE SUPER`, the parts that identify the
/// mount: root, mount point, options, type and source.
fn mount_line(line: &str) -> Option<String> {
    let (own, file_system) = line.split_once(" - ")?;
    let fields: Vec<_> = own.split(' ').collect();
    let [_, _, _, root, point, options, ..] = fields.as_slice() else {
        return None;
    };
    Some(format!(
        "mount {point} {root} {options} {}",
        file_system.split(' ').take(2).collect::<Vec<_>>().join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_both_sides() {
        let before = HostState::parse("a 1\nb 2\nc 3\n");
        let after = HostState::parse("a 1\nb 9\nc 3\nd 4\n");
        assert_eq!(before.diff(&after), "-b 2\n+b 9\n+d 4\n");
        assert!(before.diff(&before.clone()).is_empty());
        assert_eq!(before.to_string(), "a 1\nb 2\nc 3\n");
    }

    #[test]
    fn names_that_do_not_last_are_brought_down() {
        for (comm, lasting) in [
            ("kworker/u96:3-events_unbound", "kworker/unbound"),
            ("kworker/5:1H-kblockd", "kworker/bound"),
            ("kworker/R-writeback", "kworker/R-writeback"),
            ("migration/12", "migration/12"),
            ("kvm-pit/12345", "kvm-pit/*"),
            ("jbd2/vda-8", "jbd2/vda-8"),
            ("kthreadd", "kthreadd"),
        ] {
            assert_eq!(lasting_name(comm), lasting);
        }
    }

    #[test]
    fn unit_and_mount_lines() {
        assert_eq!(
            unit_line("Slice=-.slice\nId=a.slice\nAllowedCPUs=\n"),
            "unit Id=a.slice AllowedCPUs= Slice=-.slice"
        );
        let line = "25 30 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw";
        assert_eq!(
            mount_line(line).as_deref(),
            Some("mount /sys / rw,nosuid sysfs sysfs")
        );
        assert_eq!(mount_line("garbage"), None);
    }
}

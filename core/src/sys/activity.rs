//! What happened on CPUs, as counters: how long threads ran and waited (/proc/PID/task/TID/schedstat,
//! Documentation/scheduler/sched-stats.rst), interrupts by source (/proc/interrupts) and softirqs by
//! kind (/proc/softirqs), see proc(5).

use std::collections::BTreeMap;

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sys::task::TaskId;
use crate::sysroot::Sysroot;

/// How long a thread has run, since it was born.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunTime {
    /// Time on a CPU, in nanoseconds.
    pub run: u64,
    /// Time in which it could have run and waited for a CPU, in nanoseconds. Of a vCPU thread this is
    /// what KVM reports to the guest as steal time.
    pub wait: u64,
    /// How many times it was given a CPU.
    pub slices: u64,
}

impl RunTime {
    /// What was added since an earlier reading.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            run: self.run.saturating_sub(earlier.run),
            wait: self.wait.saturating_sub(earlier.wait),
            slices: self.slices.saturating_sub(earlier.slices),
        }
    }
}

/// A thread's time.
///
/// # Errors
/// One that [is gone](Error::is_gone) if the thread has ended; [`Error::Malformed`] if the kernel
/// does not count (CONFIG_SCHED_INFO).
pub fn run_time(root: &Sysroot, task: &TaskId) -> Result<RunTime> {
    let path = format!("proc/{}/task/{}/schedstat", task.pid, task.tid);
    let text = root.read_record(&path)?;
    parse_run_time(&text)
        .ok_or_else(|| Error::malformed(path, format!("{:?} is not three counters", text.trim())))
}

/// Parses `RUN WAIT SLICES`.
fn parse_run_time(text: &str) -> Option<RunTime> {
    let mut fields = text.split_ascii_whitespace();
    let mut number = || fields.next()?.parse().ok();
    let time = RunTime {
        run: number()?,
        wait: number()?,
        slices: number()?,
    };
    fields.next().is_none().then_some(time)
}

/// A source of interrupts, or a kind of softirqs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// `47`, `LOC`, `NET_RX`.
    pub name: String,
    /// What follows the counters: chip and devices, or the words for a kind.
    pub what: String,
    /// By CPU: how many times. CPUs that are offline are not listed.
    pub counts: Vec<(usize, u64)>,
}

/// The interrupts that have arrived on these CPUs.
///
/// # Errors
/// If /proc/interrupts cannot be read.
pub fn interrupts(root: &Sysroot, cpus: &CpuSet) -> Result<Vec<Source>> {
    counts(root, "proc/interrupts", cpus)
}

/// The softirqs that have run on these CPUs.
///
/// # Errors
/// If /proc/softirqs cannot be read.
pub fn softirqs(root: &Sysroot, cpus: &CpuSet) -> Result<Vec<Source>> {
    counts(root, "proc/softirqs", cpus)
}

/// How often a VM's vCPUs have left the guest, by reason as KVM names it (`halt`, `io`), all of them
/// under `all`; `None` where debugfs does not have it: without root, without KVM.
///
/// Its files are `kvm/PID-FD/NAME` (virt/kvm/kvm_main.c, `kvm_create_vm_debugfs`), one number each.
pub fn kvm_exits(root: &Sysroot, pid: i32) -> Option<BTreeMap<String, u64>> {
    const KVM: &str = "sys/kernel/debug/kvm";
    let prefix = format!("{pid}-");
    let folders = root.names(KVM).ok()?;
    let folder = folders.iter().find(|name| name.starts_with(&prefix))?;
    let mut exits = BTreeMap::new();
    for name in root.names(format!("{KVM}/{folder}")).ok()? {
        let reason = match &*name {
            "exits" => "all",
            "hypercalls" => "hypercall",
            _ => match name.strip_suffix("_exits") {
                Some(reason) => reason,
                None => continue,
            },
        };
        let count = root.read_value(format!("{KVM}/{folder}/{name}")).ok()??;
        exits.insert(reason.to_owned(), count.parse().ok()?);
    }
    Some(exits)
}

fn counts(root: &Sysroot, path: &str, cpus: &CpuSet) -> Result<Vec<Source>> {
    let mut columns: Option<Vec<Option<usize>>> = None;
    let mut sources = Vec::new();
    root.for_each_line(path, |line| {
        if let Some(columns) = &columns {
            sources.extend(parse_counts(columns, line));
        } else {
            columns = Some(parse_head(line, cpus));
        }
    })?;
    Ok(sources)
}

/// The CPU of each column, if it is one of `cpus`: `CPU0 CPU2 ...`.
fn parse_head(line: &str, cpus: &CpuSet) -> Vec<Option<usize>> {
    line.split_ascii_whitespace()
        .map(|word| {
            let number = word.strip_prefix("CPU")?.parse().ok()?;
            cpus.contains(number).then_some(number)
        })
        .collect()
}

/// A line `NAME: COUNT ... WHAT`; none if it has fewer counters than there are columns, as `ERR`,
/// which is not counted by CPU.
fn parse_counts(columns: &[Option<usize>], line: &str) -> Option<Source> {
    let (name, rest) = line.split_once(':')?;
    let mut rest = rest.trim_start();
    let mut counts = Vec::new();
    for column in columns {
        let (count, after) = rest
            .split_once(|c: char| c.is_ascii_whitespace())
            .unwrap_or((rest, ""));
        let count = count.parse().ok()?;
        counts.extend(column.map(|cpu| (cpu, count)));
        rest = after.trim_start();
    }
    Some(Source {
        name: name.trim().to_owned(),
        what: rest.trim_end().to_owned(),
        counts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_threads() {
        let time = parse_run_time("5000 70 3\n").unwrap();
        assert_eq!((time.run, time.wait, time.slices), (5000, 70, 3));
        let later = parse_run_time("9000 60 5").unwrap();
        let since = later.since(&time);
        assert_eq!((since.run, since.wait, since.slices), (4000, 0, 2));
        for text in ["", "1 2", "1 2 3 4", "a b c", "-1 2 3"] {
            assert_eq!(parse_run_time(text), None, "{text:?}");
        }
    }

    #[test]
    fn exits_of_a_vm() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert_eq!(kvm_exits(&root, 100), None);
        for (path, text) in [
            ("1001-9/exits", "7\n"),
            ("100-12/exits", "1200\n"),
            ("100-12/halt_exits", "900\n"),
            ("100-12/hypercalls", "3\n"),
            ("100-12/pages_4k", "5\n"),
            ("100-12/vcpu0/guest_mode", "0\n"),
        ] {
            crate::testutils::write(dir.path(), &format!("sys/kernel/debug/kvm/{path}"), text);
        }
        let found: Vec<_> = kvm_exits(&root, 100).unwrap().into_iter().collect();
        let expected = [("all", 1200), ("halt", 900), ("hypercall", 3)];
        assert_eq!(
            found,
            expected.map(|(name, count)| (name.to_owned(), count))
        );
        // Of another kernel.
        let hostile = "sys/kernel/debug/kvm/100-12/io_exits";
        crate::testutils::write(dir.path(), hostile, "x\n");
        assert_eq!(kvm_exits(&root, 100), None);
    }

    #[test]
    fn counters_of_the_chosen_cpus() {
        let cpus: CpuSet = [2, 3].into_iter().collect();
        let head = parse_head("           CPU0       CPU2       CPU3", &cpus);
        assert_eq!(head, [None, Some(2), Some(3)]);
        let irq = parse_counts(
            &head,
            "  47:   1   20   3  PCI-MSIX-0000:01:00.0   0-edge   nvme0q1",
        )
        .unwrap();
        assert_eq!(irq.name, "47");
        assert_eq!(irq.counts, [(2, 20), (3, 3)]);
        assert!(irq.what.ends_with("nvme0q1"));
        let local = parse_counts(&head, " LOC:   9   8   7   Local timer interrupts").unwrap();
        assert_eq!(
            (local.what.as_str(), local.counts[1]),
            ("Local timer interrupts", (3, 7))
        );
        let softirq = parse_counts(&head, "      NET_RX:   1  2  3").unwrap();
        assert_eq!(
            (softirq.name.as_str(), softirq.what.as_str()),
            ("NET_RX", "")
        );
        for line in ["", "ERR:          0", "  47:  1  x  3", "no colon"] {
            assert_eq!(parse_counts(&head, line), None, "{line:?}");
        }
    }
}

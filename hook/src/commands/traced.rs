//! `hook blame --trace`: what ran on CPUs, by each switch that the kernel records.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{geteuid, getpid};
use pinfold_core::sys::task;
use pinfold_core::sys::trace::{Event, Record, Records, Work};
use pinfold_core::{CpuSet, Host, Knob, Outcome, Report, Setting, TaskId, Verbosity, apply_one};
use serde::Serialize;

use crate::own_steps::{TOOL, remove_dead_traces};

/// How often records are read, in milliseconds: before the kernel's buffer is full.
const READ_INTERVAL: u64 = 50;

/// How long the records that are there at the end may take to be read.
const LAST_READ: Duration = Duration::from_secs(2);

/// How many threads are listed by themselves.
const MAX_THREADS: usize = 4096;

/// What stands for the threads beyond those.
pub(super) const OTHERS: i32 = -1;

/// What a thread, an interrupt or a softirq took of the CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Of a thread.
    pub name: String,
    /// Where.
    pub cpus: CpuSet,
    /// How many times it began.
    pub count: u64,
    pub ns: u64,
    pub longest_ns: u64,
}

impl Taken {
    fn add(&mut self, ns: u64) {
        self.ns += ns;
        self.longest_ns = self.longest_ns.max(ns);
    }
}

/// Switches to other threads than vCPUs, on one CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct OnCpu {
    pub cpu: usize,
    pub switches: u64,
    pub longest_ns: u64,
}

/// What ran on the CPUs beside vCPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Traced {
    /// By thread id.
    pub threads: BTreeMap<i32, Taken>,
    pub irqs: BTreeMap<u32, Taken>,
    /// By the name in /proc/softirqs.
    pub softirqs: BTreeMap<String, Taken>,
    pub by_cpu: BTreeMap<usize, OnCpu>,
    /// How many records are missing, at the least.
    pub lost: u64,
}

impl Traced {
    fn thread(&mut self, tid: i32, name: &str) -> &mut Taken {
        let is_known = self.threads.contains_key(&tid);
        let (tid, name) = match is_known || self.threads.len() < MAX_THREADS {
            true => (tid, name),
            false => (OTHERS, "other threads"),
        };
        let thread = self.threads.entry(tid).or_default();
        // The last one: it changes when a program is started.
        if thread.name != name {
            thread.name = name.to_owned();
        }
        thread
    }

    fn on(&mut self, cpu: usize) -> &mut OnCpu {
        let begin = OnCpu {
            cpu,
            ..OnCpu::default()
        };
        self.by_cpu.entry(cpu).or_insert(begin)
    }
}

/// Adds records up.
#[derive(Debug)]
struct Tally {
    /// The vCPUs' threads.
    own: BTreeSet<i32>,
    traced: Traced,
    /// By CPU, the thread that runs with its name, and since when; none if records were lost.
    runs: BTreeMap<usize, Option<(i32, String, u64)>>,
    /// By CPU, the interrupt that is handled, and since when.
    irqs: BTreeMap<usize, (u32, u64)>,
    softirqs: BTreeMap<usize, (String, u64)>,
    /// The times of the first record and of the last one.
    first: Option<u64>,
    last: u64,
}

impl Tally {
    fn new(own: BTreeSet<i32>) -> Self {
        Self {
            own,
            traced: Traced::default(),
            runs: BTreeMap::new(),
            irqs: BTreeMap::new(),
            softirqs: BTreeMap::new(),
            first: None,
            last: 0,
        }
    }

    /// Begins anew; what runs goes on.
    fn restart(&mut self) {
        self.traced = Traced::default();
        self.first = None;
        for (.., since) in self.runs.values_mut().flatten() {
            *since = self.last;
        }
    }

    fn add(&mut self, record: &Record<'_>) {
        let cpu = record.cpu;
        match record.event {
            Event::Switch { ns, from, to } => {
                let first = *self.first.get_or_insert(ns);
                let now = Some((to.tid, to.name.to_owned(), ns));
                let since = match self.runs.insert(cpu, now) {
                    Some(Some((tid, _, since))) if tid == from.tid => since,
                    Some(_) => ns,
                    // It ran before the first record of its CPU.
                    None => first,
                };
                self.ran(cpu, (from.tid, from.name), since, ns);
                if self.is_foreign(to.tid) {
                    let thread = self.traced.thread(to.tid, to.name);
                    thread.count += 1;
                    thread.cpus.insert(cpu);
                    self.traced.on(cpu).switches += 1;
                }
                self.last = self.last.max(ns);
            }
            Event::Began {
                ns,
                work: Work::Irq(irq),
            } => {
                self.irqs.insert(cpu, (irq, ns));
            }
            Event::Began {
                ns,
                work: Work::Softirq(name),
            } => {
                self.softirqs.insert(cpu, (name.to_owned(), ns));
            }
            Event::Ended {
                ns,
                work: Work::Irq(irq),
            } => {
                if let Some((begun, since)) = self.irqs.remove(&cpu)
                    && begun == irq
                {
                    let taken = self.traced.irqs.entry(irq).or_default();
                    handled(taken, cpu, ns.saturating_sub(since));
                }
            }
            Event::Ended {
                ns,
                work: Work::Softirq(name),
            } => {
                if let Some((begun, since)) = self.softirqs.remove(&cpu)
                    && begun == name
                {
                    let taken = self.traced.softirqs.entry(begun).or_default();
                    handled(taken, cpu, ns.saturating_sub(since));
                }
            }
            Event::Lost(count) => {
                self.traced.lost += count.unwrap_or(1);
                self.runs.insert(cpu, None);
                self.irqs.remove(&cpu);
                self.softirqs.remove(&cpu);
            }
        }
    }

    fn is_foreign(&self, tid: i32) -> bool {
        tid != 0 && !self.own.contains(&tid)
    }

    fn ran(&mut self, cpu: usize, (tid, name): (i32, &str), since: u64, until: u64) {
        let ns = until.saturating_sub(since);
        if !self.is_foreign(tid) || ns == 0 {
            return;
        }
        let thread = self.traced.thread(tid, name);
        thread.add(ns);
        thread.cpus.insert(cpu);
        let on = self.traced.on(cpu);
        on.longest_ns = on.longest_ns.max(ns);
    }

    /// What was seen up to the last record.
    fn take(&mut self) -> Traced {
        for (cpu, run) in self.runs.clone() {
            if let Some((tid, name, since)) = run {
                self.ran(cpu, (tid, &name), since, self.last);
            }
        }
        std::mem::take(&mut self.traced)
    }
}

fn handled(taken: &mut Taken, cpu: usize, ns: u64) {
    taken.count += 1;
    taken.cpus.insert(cpu);
    taken.add(ns);
}

/// Has the kernel record what runs on CPUs, in an instance of this process's own.
pub(super) struct Recorder<'a> {
    root: &'a Host,
    process: TaskId,
    cpus: &'a CpuSet,
    records: Records,
    tally: Tally,
    /// Signals that end the program wait until the instance is gone.
    signals: SignalFd,
}

impl<'a> Recorder<'a> {
    /// Begins to record; `own` are the ids of the vCPUs' threads. First removes what killed processes
    /// have left.
    ///
    /// # Errors
    /// If the kernel cannot record.
    pub(super) fn start(
        root: &'a Host,
        cpus: &'a CpuSet,
        own: BTreeSet<i32>,
    ) -> anyhow::Result<Self> {
        ensure!(
            root.is_live(),
            "--trace records the running host only, not one under --sysroot"
        );
        ensure!(geteuid().is_root(), "--trace needs root");
        remove_dead_traces(root, &mut Report::new(TOOL, Verbosity::Quiet, false))?;
        let pid = getpid().as_raw();
        let process = task::task(root, pid, pid)?.id;
        let held = signals();
        held.thread_block()?;
        let signals = SignalFd::with_flags(&held, SfdFlags::SFD_CLOEXEC)?;
        set(root, process, &CpuSet::new(), cpus)?;
        let records = match Records::open(root, &process) {
            Ok(records) => records,
            Err(error) => {
                set(root, process, cpus, &CpuSet::new())?;
                return Err(error.into());
            }
        };
        Ok(Self {
            root,
            process,
            cpus,
            records,
            tally: Tally::new(own),
            signals,
        })
    }

    /// What runs within some time; `None` if the program is to end.
    ///
    /// # Errors
    /// If the records cannot be read.
    pub(super) fn watch(&mut self, time: Duration) -> anyhow::Result<Option<Traced>> {
        let end = Instant::now() + time;
        // What was recorded before now.
        self.read(end)?;
        self.tally.restart();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let wait = left.min(Duration::from_millis(READ_INTERVAL));
            let wait = PollTimeout::try_from(wait + Duration::from_millis(1))?;
            let mut signalled = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if poll(&mut signalled, wait)? > 0 {
                return Ok(None);
            }
            self.read(end)?;
        }
        if !self.read(Instant::now() + LAST_READ)? {
            self.tally.traced.lost += 1;
        }
        Ok(Some(self.tally.take()))
    }

    fn read(&mut self, until: Instant) -> pinfold_core::Result<bool> {
        let tally = &mut self.tally;
        self.records.drain(until, |record| tally.add(&record))
    }

    /// Removes the instance. A signal that came meanwhile ends the program.
    ///
    /// # Errors
    /// If the kernel does not remove it.
    pub(super) fn end(self) -> anyhow::Result<()> {
        drop(self.records);
        let removed = set(self.root, self.process, self.cpus, &CpuSet::new());
        signals().thread_unblock()?;
        removed
    }
}

/// Those that a terminal or a supervisor ends a program with.
fn signals() -> SigSet {
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]
        .into_iter()
        .collect()
}

fn set(root: &Host, process: TaskId, found: &CpuSet, wanted: &CpuSet) -> anyhow::Result<()> {
    let knob = Knob::Trace(process);
    let label = knob.to_string();
    let change = Setting::new(knob, label, found).want(wanted);
    let done = apply_one(root, change);
    match done.outcome {
        Outcome::Changed | Outcome::Already => Ok(()),
        _ => Err(anyhow!("{done}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::sys::trace::Thread;

    /// At a time in milliseconds.
    fn at(ms: u64) -> u64 {
        ms * 1_000_000
    }

    fn switch(tally: &mut Tally, cpu: usize, ms: u64, from: (i32, &str), to: (i32, &str)) {
        let (from, to) = (
            Thread {
                tid: from.0,
                name: from.1,
            },
            Thread {
                tid: to.0,
                name: to.1,
            },
        );
        let event = Event::Switch {
            ns: at(ms),
            from,
            to,
        };
        tally.add(&Record { cpu, event });
    }

    fn tally() -> Tally {
        Tally::new([1006, 1007].into())
    }

    fn taken(name: &str, cpus: &str, count: u64, ms: u64, longest: u64) -> Taken {
        Taken {
            name: name.to_owned(),
            cpus: cpus.parse().unwrap(),
            count,
            ns: at(ms),
            longest_ns: at(longest),
        }
    }

    #[test]
    fn runs_of_other_threads_are_counted() {
        let mut tally = tally();
        // A vCPU, another thread twice on two CPUs, idle.
        switch(&mut tally, 6, 10, (0, "idle"), (1006, "CPU 0/KVM"));
        switch(&mut tally, 6, 20, (1006, "CPU 0/KVM"), (50, "bash"));
        switch(&mut tally, 6, 23, (50, "bash"), (1006, "CPU 0/KVM"));
        switch(&mut tally, 7, 30, (1007, "CPU 1/KVM"), (50, "bash"));
        // It has started a program meanwhile.
        switch(&mut tally, 7, 31, (50, "perl"), (0, "swapper/7"));
        let traced = tally.take();
        let expected = [(50, taken("perl", "6-7", 2, 4, 3))];
        assert_eq!(traced.threads, expected.into());
        let on = |cpu, longest| OnCpu {
            cpu,
            switches: 1,
            longest_ns: at(longest),
        };
        assert_eq!(traced.by_cpu, [(6, on(6, 3)), (7, on(7, 1))].into());
        assert_eq!(traced.lost, 0);
    }

    #[test]
    fn what_runs_at_the_beginning_and_at_the_end_counts() {
        let mut tally = tally();
        switch(&mut tally, 6, 100, (0, "idle"), (1006, "CPU 0/KVM"));
        // It ran before the first switch of its CPU, so not since then.
        switch(&mut tally, 7, 140, (51, "x"), (0, "swapper/7"));
        switch(&mut tally, 6, 150, (1006, "CPU 0/KVM"), (52, "hog"));
        switch(&mut tally, 7, 190, (0, "idle"), (1007, "CPU 1/KVM"));
        let traced = tally.take();
        let expected = [
            (51, taken("x", "7", 0, 40, 40)),
            (52, taken("hog", "6", 1, 40, 40)),
        ];
        assert_eq!(traced.threads, expected.into());
        // The next look begins where this one ended.
        tally.restart();
        switch(&mut tally, 6, 200, (52, "hog"), (0, "swapper/6"));
        let expected = [(52, taken("hog", "6", 0, 10, 10))];
        assert_eq!(tally.take().threads, expected.into());
    }

    #[test]
    fn what_was_lost_is_not_guessed() {
        let mut tally = tally();
        switch(&mut tally, 6, 10, (0, "idle"), (50, "bash"));
        for lost in [Some(12), None] {
            let event = Event::Lost(lost);
            tally.add(&Record { cpu: 6, event });
        }
        // Another thread has run since: what this one had is not known.
        switch(&mut tally, 6, 90, (51, "x"), (50, "bash"));
        switch(&mut tally, 6, 91, (50, "bash"), (0, "swapper/6"));
        let traced = tally.take();
        assert_eq!(traced.lost, 13);
        let expected = [(50, taken("bash", "6", 2, 1, 1))];
        assert_eq!(traced.threads, expected.into());
    }

    #[test]
    fn interrupts_and_softirqs_take_the_time_between_begin_and_end() {
        let mut tally = tally();
        let mut work = |cpu, ms, work, begins| {
            let ns = at(ms);
            let event = match begins {
                true => Event::Began { ns, work },
                false => Event::Ended { ns, work },
            };
            tally.add(&Record { cpu, event });
        };
        let (irq, softirq) = (Work::Irq(47), Work::Softirq("NET_RX"));
        // The end of one that began before.
        work(7, 5, irq, false);
        work(6, 10, softirq, true);
        work(6, 11, irq, true);
        work(6, 13, irq, false);
        work(6, 15, softirq, false);
        work(7, 20, irq, true);
        work(7, 21, irq, false);
        let traced = tally.take();
        assert_eq!(traced.irqs, [(47, taken("", "6-7", 2, 3, 2))].into());
        let expected = [("NET_RX".to_owned(), taken("", "6", 1, 5, 5))];
        assert_eq!(traced.softirqs, expected.into());
        assert!(traced.threads.is_empty());
    }

    #[test]
    fn threads_are_listed_by_themselves_up_to_a_bound() {
        let mut tally = tally();
        let most = i32::try_from(MAX_THREADS).unwrap();
        for tid in 0..most + 10 {
            switch(&mut tally, 6, 10, (0, "idle"), (100_000 + tid, "sh"));
        }
        let traced = tally.take();
        assert_eq!(traced.threads.len(), MAX_THREADS + 1);
        assert_eq!(traced.threads[&OTHERS].count, 10);
    }
}

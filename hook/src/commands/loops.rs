//! Loops that measure how long they are interrupted, one on each CPU.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{getpid, gettid};
use pinfold_core::knob::{Outcome, apply_one};
use pinfold_core::sys::{activity, task};
use pinfold_core::{CpuSet, Host, Knob, Setting};
use serde::Serialize;

use super::blame;
use crate::exec;

/// A gap of at least this length counts as noise, in nanoseconds. A pass of the loop takes some 50.
const LEAST_GAP: u64 = 1_000;

/// The buckets of the histogram: the last one is for gaps of half a second and more.
const BUCKETS: usize = 20;

/// How long chrt may take.
const CHRT_DEADLINE: Duration = Duration::from_secs(10);

/// What a loop has measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gaps {
    /// How many gaps there were from 2^N microseconds up to the double.
    by_length: [u64; BUCKETS],
    longest: u64,
    /// All of them together.
    sum: u64,
    whole: u64,
}

impl Gaps {
    pub(super) fn new() -> Self {
        Self {
            by_length: [0; BUCKETS],
            longest: 0,
            sum: 0,
            whole: 0,
        }
    }

    /// Counts the time between two passes.
    pub(super) fn add(&mut self, ns: u64) {
        self.whole += ns;
        if ns < LEAST_GAP {
            return;
        }
        self.sum += ns;
        self.longest = self.longest.max(ns);
        let bucket = (ns / 1000).ilog2() as usize;
        self.by_length[bucket.min(BUCKETS - 1)] += 1;
    }

    /// The share of the time that the loop did not have, in millionths.
    fn noise_ppm(&self) -> f64 {
        match self.whole {
            0 => 0.0,
            whole => self.sum as f64 / whole as f64 * 1e6,
        }
    }
}

/// A bucket of the histogram that is not empty.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Bucket {
    pub from_us: u64,
    pub count: u64,
}

/// A source of interrupts on a CPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Interrupts {
    pub source: String,
    pub count: u64,
}

/// A CPU's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub cpu: usize,
    pub longest_ns: u64,
    pub noise_ppm: f64,
    pub gaps: Vec<Bucket>,
    pub interrupts: Vec<Interrupts>,
}

/// The signals that end a program, held back while this exists.
#[derive(Debug)]
pub(super) struct HeldSignals(SignalFd);

impl HeldSignals {
    /// Holds them back in this thread and in those that it starts from now on.
    ///
    /// # Errors
    /// If the kernel has no file descriptor left.
    pub(super) fn new() -> nix::Result<Self> {
        let ending = SigSet::from_iter([
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGTERM,
            // Stopped, it would keep the lock.
            Signal::SIGTSTP,
        ]);
        let held = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        ending.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self(held))
    }

    /// Waits for one of them, so long at most.
    fn wait(&self, time: Duration) -> nix::Result<Option<Signal>> {
        let until = Instant::now() + time;
        loop {
            if let Some(came) = self.0.read_signal()? {
                let number = i32::try_from(came.ssi_signo);
                return Ok(number.ok().and_then(|number| Signal::try_from(number).ok()));
            }
            // Rounded up, so that it is not asked again and again in the last millisecond.
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], left)?;
        }
    }
}

/// Loops that wait to be started; they end without it when this is dropped.
#[derive(Debug)]
pub(super) struct Loops {
    threads: Vec<Loop>,
    fifo: bool,
    time: Duration,
    stop: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Loop {
    cpu: usize,
    tid: i32,
    start: Sender<()>,
    thread: JoinHandle<Option<Gaps>>,
}

impl Loops {
    /// One for each CPU, not placed there yet. With `fifo` they become real-time threads when they
    /// are started.
    ///
    /// # Errors
    /// If a thread cannot be made.
    pub(super) fn new(cpus: &CpuSet, time: Duration, fifo: bool) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::with_capacity(cpus.len());
        for cpu in cpus.iter() {
            let (start, wait) = mpsc::channel();
            let (send_tid, tid) = mpsc::channel();
            let stop = Arc::clone(&stop);
            let thread = Builder::new().name(format!("loop {cpu}")).spawn(move || {
                let sent = send_tid.send(gettid().as_raw());
                sent.ok().and_then(|()| spin(&wait, time, &stop))
            })?;
            let tid = tid.recv().context("a loop has ended")?;
            threads.push(Loop {
                cpu,
                tid,
                start,
                thread,
            });
        }
        Ok(Self {
            threads,
            fifo,
            time,
            stop,
        })
    }

    /// The ids of their threads, in the order of the CPUs.
    pub(super) fn tids(&self) -> Vec<i32> {
        self.threads.iter().map(|it| it.tid).collect()
    }

    /// Puts each on its CPU. Nothing has to be restored, since they end after their run.
    ///
    /// # Errors
    /// If one cannot run there.
    pub(super) fn place(&self, root: &Host) -> anyhow::Result<()> {
        for Loop { cpu, tid, .. } in &self.threads {
            let own = task::task(root, getpid().as_raw(), *tid)?.id;
            let found = task::affinity(root, &own)?;
            let change =
                Setting::new(Knob::Thread(own), "loop", found).want(CpuSet::range(*cpu, *cpu));
            match apply_one(root, change).outcome {
                Outcome::Changed | Outcome::Already => {}
                other => return Err(anyhow!("CPU {cpu}: the loop cannot run there: {other:?}")),
            }
        }
        Ok(())
    }

    /// Runs them all at the same time to their end, or until one of these signals comes: that is an
    /// error.
    ///
    /// # Errors
    /// If one cannot be run, or the interrupts cannot be read.
    pub(super) fn run(
        self,
        root: &Host,
        signals: Option<&HeldSignals>,
    ) -> anyhow::Result<Vec<Row>> {
        if self.fifo {
            for Loop { tid, .. } in &self.threads {
                fifo(*tid)?;
            }
        }
        let cpus: CpuSet = self.threads.iter().map(|it| it.cpu).collect();
        let earlier = activity::interrupts(root, &cpus)?;
        for Loop { start, .. } in &self.threads {
            start.send(()).context("a loop has ended")?;
        }
        let came = match signals {
            Some(signals) => signals.wait(self.time),
            None => Ok(None),
        };
        if !matches!(came, Ok(None)) {
            self.stop.store(true, Ordering::Relaxed);
        }
        let mut all = BTreeMap::new();
        for Loop { cpu, thread, .. } in self.threads {
            let gaps = thread.join().ok().flatten();
            all.insert(
                cpu,
                gaps.ok_or_else(|| anyhow!("CPU {cpu}: its loop failed"))?,
            );
        }
        if let Some(signal) = came? {
            return Err(anyhow!("interrupted by {signal}"));
        }
        let later = activity::interrupts(root, &cpus)?;
        Ok(all
            .iter()
            .map(|(cpu, gaps)| row(*cpu, gaps, &earlier, &later))
            .collect())
    }
}

/// Makes a thread a real-time thread.
fn fifo(tid: i32) -> anyhow::Result<()> {
    let tid = tid.to_string();
    exec::run("chrt", &["--fifo", "--pid", "1", &tid], CHRT_DEADLINE)
        .map(drop)
        .context("--fifo needs chrt (package util-linux) and root")
}

/// The loop, once it is started; none if it is not.
fn spin(wait: &Receiver<()>, time: Duration, stop: &AtomicBool) -> Option<Gaps> {
    wait.recv().ok()?;
    let mut gaps = Gaps::new();
    let begin = Instant::now();
    let (until, mut last) = (begin + time, begin);
    while last < until && !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        gaps.add(u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX));
        last = now;
    }
    Some(gaps)
}

/// The result of a CPU.
pub(super) fn row(
    cpu: usize,
    gaps: &Gaps,
    earlier: &[activity::Source],
    later: &[activity::Source],
) -> Row {
    let buckets = gaps.by_length.iter().enumerate();
    Row {
        cpu,
        longest_ns: gaps.longest,
        noise_ppm: (gaps.noise_ppm() * 10.0).round() / 10.0,
        gaps: buckets
            .filter(|(_, count)| **count > 0)
            .map(|(power, count)| Bucket {
                from_us: 1 << power,
                count: *count,
            })
            .collect(),
        interrupts: blame::added_on(cpu, earlier, later)
            .into_iter()
            .map(|(source, count)| Interrupts { source, count })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_by_powers_of_two() {
        let mut gaps = Gaps::new();
        for ns in [
            50,
            999,
            1_000,
            1_999,
            2_000,
            3_999,
            4_000,
            70_000,
            5_000_000_000,
        ] {
            gaps.add(ns);
        }
        assert_eq!(gaps.by_length[..3], [2, 2, 1]);
        assert_eq!((gaps.by_length[6], gaps.by_length[BUCKETS - 1]), (1, 1));
        assert_eq!(
            (gaps.by_length.iter().sum::<u64>(), gaps.longest),
            (7, 5_000_000_000)
        );
        let mut half = Gaps::new();
        half.add(2_000);
        (0..4).for_each(|_| half.add(500));
        assert!((half.noise_ppm() - 500_000.0).abs() < 1e-6);
        assert!(Gaps::new().noise_ppm().abs() < 1e-6);
    }

    #[test]
    fn a_loop_lasts_as_long_as_asked() {
        let (start, wait) = mpsc::channel();
        start.send(()).unwrap();
        let spin = |stop| spin(&wait, Duration::from_millis(20), &AtomicBool::new(stop));
        let gaps = spin(false).unwrap();
        assert!(gaps.whole >= 20_000_000, "{gaps:?}");
        assert!(
            gaps.longest <= gaps.sum && gaps.sum <= gaps.whole,
            "{gaps:?}"
        );
        start.send(()).unwrap();
        assert_eq!(
            spin(true).unwrap().whole,
            0,
            "stopped before its first pass"
        );
        drop(start);
        assert_eq!(spin(false), None, "never started");
    }

    #[test]
    fn a_held_signal_ends_the_loops_and_not_the_program() {
        // All tests are threads of one process, and only this one holds the signal back.
        let held = HeldSignals::new().unwrap();
        let loops = Loops::new(&CpuSet::range(0, 1), Duration::from_secs(60), false).unwrap();
        assert_eq!(loops.tids().len(), 2);
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        let ended = loops.run(&Host::new("/"), Some(&held)).unwrap_err();
        assert_eq!(ended.to_string(), "interrupted by SIGTERM");
    }
}

//! What the kernel records of CPUs: each switch to another thread, each interrupt of a device, each
//! softirq. Each process has a tracefs instance of its own for it (Documentation/trace/ftrace.rst,
//! "Instances"), whose name is the process, so that one that was left behind is known.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::cpuset::{CpuSet, MAX_CPU};
use crate::error::{Error, Result};
use crate::sys::cpu;
use crate::sys::task::{self, TaskId};
use crate::sysroot::Sysroot;

const INSTANCES: &str = "sys/kernel/tracing/instances";
/// What the names of Pinfold's instances begin with.
const PREFIX: &str = "pinfold-";

/// How much is read at once. The kernel returns a page or two.
const READ: usize = 8192;

/// The longest record, in bytes; one has some 200.
const LONGEST: usize = 1024;

/// The folder of a process's instance, below the root.
pub(crate) fn instance(process: &TaskId) -> String {
    format!("{INSTANCES}/{PREFIX}{}-{}", process.pid, process.start)
}

/// The CPUs of which the kernel records what runs there, for a process; none without an instance.
///
/// # Errors
/// If the instance cannot be read.
pub(crate) fn cpus(root: &Sysroot, process: &TaskId) -> Result<CpuSet> {
    let path = format!("{}/tracing_cpumask", instance(process));
    match root.read_value(&path)? {
        None if root.exists(instance(process)) => cpu::present(root),
        None => Ok(CpuSet::new()),
        Some(mask) => CpuSet::from_mask(&mask).map_err(|source| Error::Cpus {
            object: path,
            source,
        }),
    }
}

/// The processes that have ended and left an instance behind.
///
/// # Errors
/// If tracefs cannot be listed, or a process cannot be read.
pub fn left_behind(root: &Sysroot) -> Result<Vec<TaskId>> {
    let names = match root.names(INSTANCES) {
        Err(error) if error.is_gone() => return Ok(Vec::new()),
        names => names?,
    };
    let mut found = Vec::new();
    for process in names.iter().filter_map(|name| parse_name(name)) {
        match task::check_start(root, &process) {
            Err(error) if error.is_gone() => found.push(process),
            checked => checked?,
        }
    }
    Ok(found)
}

/// Parses `pinfold-PID-START`; other instances are not Pinfold's.
fn parse_name(name: &str) -> Option<TaskId> {
    let (pid, start) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let pid = pid.parse().ok()?;
    let start = start.parse().ok()?;
    let process = TaskId {
        pid,
        tid: pid,
        start,
    };
    // Not `pinfold-007-1`, whose folder would be another.
    (instance(&process) == format!("{INSTANCES}/{name}")).then_some(process)
}

/// What the kernel has recorded on a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The CPU.
    pub cpu: usize,
    /// What happened there.
    pub event: Event<'a>,
}

/// What has happened on a CPU. Times are in nanoseconds, by the CPU's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// From one thread to another.
    Switch {
        /// When.
        ns: u64,
        /// The thread that ran.
        from: Thread<'a>,
        /// The thread that runs now.
        to: Thread<'a>,
    },
    /// The handler of an interrupt or a softirq began.
    Began {
        /// When.
        ns: u64,
        /// Which.
        work: Work<'a>,
    },
    /// The handler of an interrupt or a softirq ended.
    Ended {
        /// When.
        ns: u64,
        /// Which.
        work: Work<'a>,
    },
    /// Records that were overwritten before they were read, if the kernel knows how many.
    Lost(Option<u64>),
}

/// A thread that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread<'a> {
    /// Its id; 0 if the CPU is idle.
    pub tid: i32,
    /// Its name.
    pub name: &'a str,
}

/// What interrupts threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work<'a> {
    /// An interrupt of a device, by its number.
    Irq(u32),
    /// A softirq, by its name in /proc/softirqs.
    Softirq(&'a str),
}

/// The events that are recorded, as they begin in a record. A thread's name, 15 bytes at most, holds
/// none of these.
const MARKS: [&str; 5] = [
    ": sched_switch: prev_comm=",
    ": irq_handler_entry: irq=",
    ": irq_handler_exit: irq=",
    ": softirq_entry: vec=",
    ": softirq_exit: vec=",
];

/// Parses a record of `trace_pipe`: `COMM-TID [CPU] FLAGS SECONDS: EVENT: FIELDS`, see
/// trace/ftrace.rst, include/trace/events/sched.h and irq.h.
pub fn parse_record(text: &str) -> Option<Record<'_>> {
    if let Some(lost) = text.strip_prefix("CPU:") {
        return parse_lost(lost);
    }
    let found = (0..).zip(MARKS).filter_map(|(number, mark)| {
        let (head, fields) = text.split_once(mark)?;
        Some((head, number, fields))
    });
    let (head, number, fields) = found.min_by_key(|(head, ..)| head.len())?;
    let (_, after) = head.rsplit_once('[')?;
    let (cpu, after) = after.split_once(']')?;
    let ns = parse_seconds(after.rsplit(' ').next()?)?;
    let event = match number {
        0 => parse_switch(ns, fields)?,
        1 => began(ns, Work::Irq(first_number(fields)?)),
        2 => ended(ns, Work::Irq(first_number(fields)?)),
        3 => began(ns, Work::Softirq(action(fields)?)),
        _ => ended(ns, Work::Softirq(action(fields)?)),
    };
    let cpu = parse_cpu(cpu)?;
    Some(Record { cpu, event })
}

fn began(ns: u64, work: Work<'_>) -> Event<'_> {
    Event::Began { ns, work }
}

fn ended(ns: u64, work: Work<'_>) -> Event<'_> {
    Event::Ended { ns, work }
}

/// Parses `N [LOST COUNT EVENTS]`, or without the count.
fn parse_lost(text: &str) -> Option<Record<'static>> {
    let (cpu, lost) = text.split_once(" [LOST ")?;
    let lost = match lost.strip_suffix("EVENTS]")? {
        "" => None,
        count => Some(digits(count.strip_suffix(' ')?)?.parse().ok()?),
    };
    Some(Record {
        cpu: parse_cpu(cpu)?,
        event: Event::Lost(lost),
    })
}

fn parse_cpu(text: &str) -> Option<usize> {
    let cpu = digits(text)?.parse().ok()?;
    (cpu <= MAX_CPU).then_some(cpu)
}

/// Parses `NAME prev_pid=N prev_prio=N prev_state=S ==> next_comm=NAME next_pid=N next_prio=N` from
/// its end, since a name may hold anything: what follows it is found before what it holds.
fn parse_switch(ns: u64, text: &str) -> Option<Event<'_>> {
    let (text, priority) = text.rsplit_once(" next_prio=")?;
    priority.parse::<i32>().ok()?;
    let (text, to) = text.rsplit_once(" next_pid=")?;
    let (text, to_name) = text.rsplit_once(" ==> next_comm=")?;
    let (text, _) = text.rsplit_once(" prev_state=")?;
    let (text, _) = text.rsplit_once(" prev_prio=")?;
    let (from_name, from) = text.rsplit_once(" prev_pid=")?;
    let thread = |tid: &str, name| {
        let tid = digits(tid)?.parse().ok()?;
        Some(Thread { tid, name })
    };
    Some(Event::Switch {
        ns,
        from: thread(from, from_name)?,
        to: thread(to, to_name)?,
    })
}

/// Parses `SECONDS.MICROSECONDS` as nanoseconds.
fn parse_seconds(text: &str) -> Option<u64> {
    let (seconds, micros) = text.split_once('.')?;
    let seconds: u64 = digits(seconds)?.parse().ok()?;
    let micros: u64 = digits(micros).filter(|it| it.len() == 6)?.parse().ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(micros * 1000)
}

/// The number of an interrupt, which other fields follow.
fn first_number(fields: &str) -> Option<u32> {
    digits(fields.split(' ').next()?)?.parse().ok()
}

/// The name in `3 [action=NET_RX]`.
fn action(fields: &str) -> Option<&str> {
    let (_, name) = fields.split_once(" [action=")?;
    name.strip_suffix(']')
}

/// A text that is only digits; `parse` would take a sign too.
fn digits(text: &str) -> Option<&str> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some(text)
}

/// Reads what the kernel records for a process, each record once.
#[derive(Debug)]
pub struct Records {
    file: File,
    path: PathBuf,
    lines: Lines,
}

impl Records {
    /// Opens the records of an instance, which exists until this is dropped.
    ///
    /// # Errors
    /// If the process has none, or it cannot be read.
    pub fn open(root: &Sysroot, process: &TaskId) -> Result<Self> {
        let path = root.path(format!("{}/trace_pipe", instance(process)));
        let open = || -> io::Result<File> {
            let file = File::open(&path)?;
            // A read that waits would have each traced CPU wake up the reader.
            fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(file)
        };
        let file = open().map_err(|source| Error::io(path.clone(), "open", source))?;
        let lines = Lines::default();
        Ok(Self { file, path, lines })
    }

    /// Passes the records that are there to `each`. Returns whether these were all, or it took too
    /// long.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn drain(&mut self, until: Instant, mut each: impl FnMut(Record<'_>)) -> Result<bool> {
        let mut buffer = [0; READ];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(read) => self.lines.add(&buffer[..read], &mut each),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::io(self.path.clone(), "read", source)),
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }
}

/// Puts records together. A thread's name may hold line ends, which the kernel prints as they are.
#[derive(Debug, Default)]
struct Lines {
    /// A record's beginning.
    text: Vec<u8>,
    /// Where its last line begins.
    line: usize,
}

impl Lines {
    fn add(&mut self, bytes: &[u8], each: &mut impl FnMut(Record<'_>)) {
        let mut pass = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            let record = parse_record(text.trim_end_matches('\n'));
            record.map(&mut *each).is_some()
        };
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.text.extend_from_slice(part);
            let is_done = part.ends_with(b"\n")
                && (pass(&self.text[self.line..]) || self.line > 0 && pass(&self.text));
            if is_done || self.text.len() > LONGEST {
                self.text.clear();
                self.line = 0;
            } else if part.ends_with(b"\n") {
                self.line = self.text.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "          <idle>-0       [006] d..2.  1234.567890";

    fn switch(from: (i32, &str), to: (i32, &str)) -> String {
        format!(
            "{HEAD}: sched_switch: prev_comm={} prev_pid={} prev_prio=120 prev_state=R+ ==> \
             next_comm={} next_pid={} next_prio=120",
            from.1, from.0, to.1, to.0
        )
    }

    fn thread((tid, name): (i32, &str)) -> Thread<'_> {
        Thread { tid, name }
    }

    #[test]
    fn switches_with_hostile_names() {
        // 15 bytes at most.
        for name in [
            "bash",
            "kworker/6:1-eve",
            "",
            "a b [7] 1.5: x",
            " next_pid=9",
            " prev_pid=9",
            " next_prio=1",
            " prev_state=S",
            "[9] 1.000000: s",
            " ==> next_comm",
            "sched_switch: ",
        ] {
            for (from, to) in [((0, "swapper/6"), (77, name)), ((77, name), (0, "x"))] {
                let text = switch(from, to);
                let expected = Record {
                    cpu: 6,
                    event: Event::Switch {
                        ns: 1_234_567_890_000,
                        from: thread(from),
                        to: thread(to),
                    },
                };
                assert_eq!(parse_record(&text), Some(expected), "{text}");
            }
        }
        // The name before the id is a thread's too, and other options add fields.
        for head in [
            "a [9] b-1 [006] 1.000000",
            "x-1  (   12) [006] ..... 1.000000",
        ] {
            let text = switch((1, "a"), (2, "b")).replace(HEAD, head);
            assert_eq!(parse_record(&text).map(|record| record.cpu), Some(6));
        }
        // A name that is what comes before it is lost, and nothing else.
        let text = switch((1, "a"), (2, " ==> next_comm="));
        let Some(Event::Switch { from, to, .. }) = parse_record(&text).map(|it| it.event) else {
            panic!("{text}");
        };
        assert_eq!((from.tid, to), (1, thread((2, ""))));
    }

    #[test]
    fn interrupts_softirqs_and_what_was_lost() {
        let ns = 1_234_567_890_000;
        for (text, event) in [
            (
                "irq_handler_entry: irq=47 name=nvme0 q1",
                began(ns, Work::Irq(47)),
            ),
            (
                "irq_handler_exit: irq=47 ret=handled",
                ended(ns, Work::Irq(47)),
            ),
            (
                "softirq_entry: vec=3 [action=NET_RX]",
                began(ns, Work::Softirq("NET_RX")),
            ),
            (
                "softirq_exit: vec=3 [action=NET_RX]",
                ended(ns, Work::Softirq("NET_RX")),
            ),
        ] {
            let record = Record { cpu: 6, event };
            assert_eq!(parse_record(&format!("{HEAD}: {text}")), Some(record));
        }
        let lost = |text| parse_record(text).map(|record| (record.cpu, record.event));
        assert_eq!(
            lost("CPU:7 [LOST 12 EVENTS]"),
            Some((7, Event::Lost(Some(12))))
        );
        assert_eq!(lost("CPU:7 [LOST EVENTS]"), Some((7, Event::Lost(None))));
    }

    #[test]
    fn what_is_not_a_record() {
        let good = switch((1, "a"), (2, "b"));
        for text in [
            "",
            "garbage",
            "CPU:x [LOST 12 EVENTS]",
            "CPU:1 [LOST -1 EVENTS]",
            &good.replace("[006]", "[]"),
            &good.replace("[006]", "006"),
            &good.replace("[006]", "[+6]"),
            &good.replace("[006]", "[99999999]"),
            &good.replace("1234.567890", "1234"),
            &good.replace("1234.567890", "1234.5"),
            &good.replace("1234.567890", "99999999999999999999.000000"),
            &good.replace("1234.567890", "18446744073709551615.000000"),
            &good.replace("next_pid=2", "next_pid=-2"),
            &good.replace(" next_pid=2", ""),
            &good.replace("next_prio=120", "next_prio="),
            &good.replace("sched_switch", "sched_wakeup"),
            &format!("{HEAD}: irq_handler_entry: irq=x name=a"),
            &format!("{HEAD}: softirq_entry: vec=3 [action=NET_RX"),
        ] {
            assert_eq!(parse_record(text), None, "{text:?}");
        }
    }

    #[test]
    fn records_are_put_together() {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        let broken = switch((1, "a"), (2, "x\ny\n[z"));
        let text = format!(
            "garbage\n{}\n{broken}\nCPU:6 [LOST 1 EVENTS]\n{}\n{}\n",
            switch((0, ""), (1, "a")),
            "[".repeat(3 * LONGEST),
            switch((2, "x"), (3, "c")),
        );
        // As the reads happen to end.
        for part in text.as_bytes().chunks(7) {
            lines.add(part, &mut |record| {
                found.push(match record.event {
                    Event::Switch { to, .. } => (to.tid, to.name.to_owned()),
                    other => (0, format!("{other:?}")),
                });
            });
            assert!(lines.text.len() <= LONGEST);
        }
        let expected = [(1, "a"), (2, "x\ny\n[z"), (0, "Lost(Some(1))"), (3, "c")];
        let expected = expected.map(|(tid, name)| (tid, name.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_left_behind() {
        let host = crate::testutils::MadeUpHost::new("5900x");
        assert_eq!(left_behind(&host.root).unwrap(), []);
        for name in [
            "pinfold-1-42",
            "pinfold-1-41",
            "pinfold-4711-42",
            "pinfold-04711-42",
            "pinfold-x-42",
            "pinfold-4711",
            "foo",
        ] {
            let folder = host.root.path(format!("{INSTANCES}/{name}"));
            std::fs::create_dir_all(folder).unwrap();
        }
        let found = left_behind(&host.root).unwrap();
        let names: Vec<String> = found.iter().map(instance).collect();
        // Process 1 lives, and was started after 42 ticks.
        assert_eq!(
            names,
            ["pinfold-1-41", "pinfold-4711-42"].map(|name| format!("{INSTANCES}/{name}"))
        );
    }
}

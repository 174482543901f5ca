//! `hook jitter`: how long a loop on each CPU is interrupted, measured from inside.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use nix::unistd::{getpid, gettid};
use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{print, print_json};
use pinfold_core::knob::{Outcome, apply_one};
use pinfold_core::state::Store;
use pinfold_core::sys::{activity, cpu, task};
use pinfold_core::vm::{self, Role, VmId};
use pinfold_core::{CpuSet, Exit, Host, Knob, Selector, Setting, printable};
use serde::Serialize;
use serde_json::json;

use super::blame;
use crate::exec;
use crate::settings::{self, Loaded};
use crate::state::reservation::Reservation;

/// A gap of at least this length counts as noise, in nanoseconds. A pass of the loop takes some 50.
const LEAST_GAP: u64 = 1_000;

/// The buckets of the histogram: the last one is for gaps of half a second and more.
const BUCKETS: usize = 20;

/// How long chrt may take.
const CHRT_DEADLINE: Duration = Duration::from_secs(10);

/// The options of `hook jitter`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM whose CPUs are measured, by its settings; it must not run
    #[arg(required_unless_present = "cpus", conflicts_with = "cpus")]
    vmid: Option<VmId>,

    /// The CPUs to measure, by logical number or selector, as in 6-11,18-23 or llc:1
    #[arg(long, value_name = "CPUS")]
    cpus: Option<Selector>,

    /// How long to measure
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = super::seconds)]
    seconds: u64,

    /// Run the loops as real-time threads (SCHED_FIFO, priority 1, by chrt): they then measure only
    /// what real-time priority does not prevent. Nothing else runs on these CPUs meanwhile, except
    /// in the kernel's reserve (kernel.sched_rt_runtime_us), a gap of 50 ms in each second
    #[arg(long)]
    fifo: bool,
}

/// What a loop has measured.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Gaps {
    /// How many gaps there were from 2^N microseconds up to the double.
    by_length: [u64; BUCKETS],
    longest: u64,
    /// All of them together.
    sum: u64,
    whole: u64,
}

impl Gaps {
    fn new() -> Self {
        Self {
            by_length: [0; BUCKETS],
            longest: 0,
            sum: 0,
            whole: 0,
        }
    }

    /// Counts the time between two passes.
    fn add(&mut self, ns: u64) {
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
#[derive(Debug, Serialize)]
struct Bucket {
    from_us: u64,
    count: u64,
}

/// A source of interrupts on a CPU.
#[derive(Debug, Serialize)]
struct Interrupts {
    source: String,
    count: u64,
}

/// A CPU's result.
#[derive(Debug, Serialize)]
struct Row {
    cpu: usize,
    longest_ns: u64,
    noise_ppm: f64,
    gaps: Vec<Bucket>,
    interrupts: Vec<Interrupts>,
}

/// The command's whole run.
///
/// # Errors
/// If a VM that runs has the CPUs, or a loop cannot run on its CPU.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    ensure!(
        root.is_live(),
        "loops run on the running host only, not under --sysroot"
    );
    let cpus = chosen(&root, args)?;
    let earlier = activity::interrupts(&root, &cpus)?;
    let gaps = measure(&root, &cpus, Duration::from_secs(args.seconds), args.fifo)?;
    let later = activity::interrupts(&root, &cpus)?;
    let rows: Vec<Row> = gaps
        .iter()
        .map(|(cpu, gaps)| row(*cpu, gaps, &earlier, &later))
        .collect();
    if output.json {
        print_json(&json!({
            "cpus": cpus, "seconds": args.seconds, "fifo": args.fifo, "by_cpu": rows,
        }))?;
    } else {
        print(&printable(&to_text(&rows)))?;
    }
    Ok(Exit::Success)
}

/// The CPUs that are measured, none of which a running VM may have.
fn chosen(root: &Host, args: &Args) -> anyhow::Result<CpuSet> {
    let cpus = match (args.vmid, &args.cpus) {
        (Some(vmid), _) => {
            ensure!(
                vm::find(root, vmid)?.is_none(),
                "VM {vmid} runs; `hook blame {vmid}` shows what disturbs it"
            );
            let threads = vm::conf(root, vmid)?.threads_per_core();
            match settings::load(root, vmid, threads, &[])? {
                Loaded::Fenced(settings) => settings.isolated,
                Loaded::Unfenced { why, .. } => return Err(anyhow!("VM {vmid}: {why}")),
            }
        }
        (None, Some(cpus)) => cpus.resolve(root)?,
        (None, None) => CpuSet::new(),
    };
    ensure!(!cpus.is_empty(), "no CPUs to measure");
    cpu::check_online(root, &cpus)?;
    let taken = taken(root, &cpus)?;
    ensure!(taken.is_empty(), "{}", taken.join("; "));
    Ok(cpus)
}

/// Which VMs that run have CPUs of these: isolated ones, or vCPUs that are pinned there.
fn taken(root: &Host, cpus: &CpuSet) -> anyhow::Result<Vec<String>> {
    let reservations = Store::<Reservation>::peek(root)?
        .unwrap_or_default()
        .reservations;
    let online = cpu::online(root)?;
    let mut taken = Vec::new();
    for (id, reservation) in &reservations {
        let own = &reservation.settings.isolated & cpus;
        let vmid = VmId::try_from(*id)?;
        if reservation.is_claim() && !own.is_empty() && reservation.is_alive(root, vmid) {
            taken.push(format!("CPU {own} belongs to VM {id}, which runs"));
        }
    }
    for vmid in vm::all(root)? {
        if reservations.contains_key(&vmid.into()) {
            continue;
        }
        let Some(qemu) = vm::find(root, vmid)? else {
            continue;
        };
        let mut pinned = CpuSet::new();
        for task in task::tasks(root, qemu.id.pid)? {
            if let Role::Vcpu(_) = vm::role_by_name(&task.name) {
                let allowed = task::affinity(root, &task.id)?;
                if !online.is_subset(&allowed) {
                    pinned = &pinned | &(&allowed & cpus);
                }
            }
        }
        if !pinned.is_empty() {
            taken.push(format!(
                "vCPUs of VM {vmid}, which runs, are pinned to CPU {pinned}"
            ));
        }
    }
    Ok(taken)
}

/// Runs a loop on each CPU at the same time.
fn measure(
    root: &Host,
    cpus: &CpuSet,
    time: Duration,
    fifo: bool,
) -> anyhow::Result<Vec<(usize, Gaps)>> {
    let ready = Barrier::new(cpus.len());
    let one = |cpu: usize| {
        let placed = place(root, cpu, fifo);
        // Also after a failure, since the others wait.
        ready.wait();
        placed.with_context(|| format!("CPU {cpu}"))?;
        Ok((cpu, spin(time)))
    };
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = cpus
            .iter()
            .map(|cpu| scope.spawn(move || one(cpu)))
            .collect();
        let ended = threads.into_iter().map(|thread| match thread.join() {
            Ok(measured) => measured,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.collect()
    })
}

/// Puts the thread that calls it on a CPU. Nothing has to be restored, since it ends after its loop.
fn place(root: &Host, cpu: usize, fifo: bool) -> anyhow::Result<()> {
    let own = task::task(root, getpid().as_raw(), gettid().as_raw())?.id;
    let found = task::affinity(root, &own)?;
    let change = Setting::new(Knob::Thread(own), "loop", found).want(CpuSet::range(cpu, cpu));
    match apply_one(root, change).outcome {
        Outcome::Changed | Outcome::Already => {}
        other => return Err(anyhow!("the loop cannot run there: {other:?}")),
    }
    if fifo {
        let tid = own.tid.to_string();
        exec::run("chrt", &["--fifo", "--pid", "1", &tid], CHRT_DEADLINE)?;
    }
    Ok(())
}

/// The loop.
fn spin(time: Duration) -> Gaps {
    let mut gaps = Gaps::new();
    let begin = Instant::now();
    let (until, mut last) = (begin + time, begin);
    while last < until {
        let now = Instant::now();
        gaps.add(u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX));
        last = now;
    }
    gaps
}

fn row(cpu: usize, gaps: &Gaps, earlier: &[activity::Source], later: &[activity::Source]) -> Row {
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

/// A row per CPU with a column per length of gaps, and the interrupts.
fn to_text(rows: &[Row]) -> String {
    let mut lengths: Vec<u64> = rows
        .iter()
        .flat_map(|row| row.gaps.iter().map(|bucket| bucket.from_us))
        .collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut heads = vec!["CPU".to_owned(), "LONGEST".to_owned(), "NOISE".to_owned()];
    heads.extend(lengths.iter().map(|from| format!(">={from} us")));
    let mut lines = vec![heads];
    for row in rows {
        let mut line = vec![
            row.cpu.to_string(),
            format!("{:.1} us", row.longest_ns as f64 / 1e3),
            format!("{:.0} ppm", row.noise_ppm),
        ];
        line.extend(lengths.iter().map(|from| {
            let bucket = row.gaps.iter().find(|bucket| bucket.from_us == *from);
            bucket.map_or_else(|| "-".to_owned(), |bucket| bucket.count.to_string())
        }));
        lines.push(line);
    }
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].len())
            .max()
            .unwrap_or(0)
    };
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("{cell:>width$}", width = width(column)))
            .collect();
        text += &format!("{}\n", cells.join("  "));
    }
    text += "interrupts meanwhile:\n";
    for row in rows {
        let sources: Vec<String> = (row.interrupts.iter())
            .map(|it| format!("{} {}", it.source, it.count))
            .collect();
        let sources = match sources.is_empty() {
            true => "none".to_owned(),
            false => sources.join(", "),
        };
        text += &format!("  CPU {}: {sources}\n", row.cpu);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::state::reservation::Phase;
    use pinfold_core::sys::activity::Source;

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
        let gaps = spin(Duration::from_millis(20));
        assert!(gaps.whole >= 20_000_000, "{gaps:?}");
        assert!(
            gaps.longest <= gaps.sum && gaps.sum <= gaps.whole,
            "{gaps:?}"
        );
    }

    #[test]
    fn a_table_for_people() {
        let source = |name: &str, count| Source {
            name: name.to_owned(),
            what: "Local timer interrupts".to_owned(),
            counts: vec![(6, count), (7, count)],
        };
        let mut noisy = Gaps::new();
        for ns in [500_000, 2_500, 70_000] {
            noisy.add(ns);
        }
        let (earlier, later) = ([source("LOC", 5)], [source("LOC", 12)]);
        let rows = [
            row(6, &noisy, &earlier, &later),
            row(7, &Gaps::new(), &later, &later),
        ];
        assert_eq!(
            to_text(&rows),
            "\
CPU   LONGEST        NOISE  >=2 us  >=64 us  >=256 us
  6  500.0 us  1000000 ppm       1        1         1
  7    0.0 us        0 ppm       -        -         -
interrupts meanwhile:
  CPU 6: LOC (Local timer interrupts) 7
  CPU 7: none
"
        );
    }

    #[test]
    fn cpus_of_a_vm_that_runs_are_not_measured() {
        let host = MadeUpHost::new("5900x");
        let taken = |cpus: &str| taken(&host.root, &cpus.parse().unwrap()).unwrap();
        host.vm(101, &[2, 3]);
        assert_eq!(
            taken("1-2"),
            ["vCPUs of VM 101, which runs, are pinned to CPU 2"]
        );
        assert_eq!(taken("4-5"), [""; 0]);
        host.vm(100, &[6, 18]);
        host.reserve(
            100,
            Phase::Isolated,
            "layout = \"5900x\"\ngovernor = \"keep\"",
        );
        assert_eq!(taken("0-1,23"), ["CPU 23 belongs to VM 100, which runs"]);
        std::fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        assert_eq!(taken("0-1,23"), [""; 0]);
    }
}

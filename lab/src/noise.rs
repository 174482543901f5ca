//! `lab noise`: what runs on a VM's CPUs beside its vCPUs, under a light load: with nothing done, with
//! the steps of the plain shell script, and isolated by either method.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::bench::SCRIPT;
use crate::cpus::Cpus;
use crate::{Guest, Host, VmSpec};

const LOAD: &str = include_str!("../noise/load.sh");
const COUNT: &str = include_str!("../noise/count.sh");
/// How long to count.
const SECONDS: usize = 8;
/// The VM's CPUs, by the layout `5900x`.
const CPUS: &str = "6-11,18-23";

/// What is done for the VM: a name, the settings of a hook that is called at its start, and what
/// runs after it.
const WAYS: [(&str, Option<&str>, &str); 4] = [
    ("nothing done", None, ""),
    ("shell script", None, "/tmp/post-start.sh 100 2>/dev/null"),
    (
        "hotplug",
        Some("layout = \"5900x\"\nmethod = \"hotplug\"\n"),
        "hook 100 post-start -q",
    ),
    (
        "partition",
        Some("layout = \"5900x\"\nmethod = \"partition\"\n"),
        "hook 100 post-start -q",
    ),
];

/// What happened, by kind: the rows of the table, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Switches to a process of the host.
    User,
    /// Switches to a thread of the VM that is not a vCPU.
    Emulator,
    /// Switches to a kernel thread that may run elsewhere.
    Kernel,
    /// Switches to a kernel thread that the kernel does not allow to move.
    Bound,
    Device,
    BetweenCpus,
    Timer,
    Softirq,
}

impl Kind {
    const ALL: [(Self, &'static str); 8] = [
        (Self::User, "processes of the host"),
        (Self::Emulator, "threads of QEMU, not vCPUs"),
        (Self::Kernel, "kernel threads, movable"),
        (Self::Bound, "kernel threads, bound"),
        (Self::Device, "interrupts of devices"),
        (Self::BetweenCpus, "interrupts between CPUs"),
        (Self::Timer, "timer interrupts"),
        (Self::Softirq, "softirqs"),
    ];

    /// Switches to a thread that need not run there.
    fn is_foreign(self) -> bool {
        matches!(self, Self::User | Self::Emulator | Self::Kernel)
    }
}

/// How often something happened on the VM's CPUs, per second and CPU.
#[derive(Debug, Default)]
struct Noise {
    by_kind: BTreeMap<Kind, f64>,
    /// The same by name: of a thread, without the numbers of CPUs and pools; of an interrupt.
    by_name: BTreeMap<(Kind, String), f64>,
    /// The functions that other CPUs have asked for, and those of timers.
    functions: BTreeMap<String, f64>,
}

impl Noise {
    fn of(&self, kind: Kind) -> f64 {
        self.by_kind.get(&kind).copied().unwrap_or_default()
    }

    fn foreign(&self) -> f64 {
        let kinds = Kind::ALL.iter().filter(|(kind, _)| kind.is_foreign());
        kinds.map(|(kind, _)| self.of(*kind)).sum()
    }

    fn add(&mut self, kind: Kind, name: String, rate: f64) {
        if rate > 0.0 {
            *self.by_kind.entry(kind).or_default() += rate;
            *self.by_name.entry((kind, name)).or_default() += rate;
        }
    }
}

/// Counts for each way and writes the tables.
///
/// # Errors
/// If by partition a thread ran there that need not, or more such threads by hotplug than with the
/// shell script.
pub fn run(bins: &Path, out: &mut impl Write) -> Result<()> {
    let mut host = Host::acquire(Guest::Trixie, bins)?;
    let mut found = Vec::new();
    for (_, settings, after) in WAYS {
        host.reset()?;
        found.push(count(&host, settings, after)?);
    }
    out.write_all(table(&found).as_bytes())?;
    for ((way, ..), noise) in WAYS.iter().zip(&found) {
        out.write_all(by_name(way, noise).as_bytes())?;
    }
    judge(&found)
}

fn count(host: &Host, settings: Option<&str>, after: &str) -> Result<Noise> {
    host.put("/tmp/post-start.sh", SCRIPT.as_bytes(), 0o755)?;
    host.put("/tmp/load.sh", LOAD.as_bytes(), 0o755)?;
    host.put("/tmp/count.sh", COUNT.as_bytes(), 0o755)?;
    let vm = VmSpec::new(100);
    if let Some(settings) = settings {
        host.put(&vm.conf_path(), vm.conf().as_bytes(), 0o640)?;
        host.ok("mkdir -p /etc/pinfold")?;
        host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644)?;
        host.ok("hook 100 pre-start -q")?;
    }
    host.start_vm(&vm)?;
    host.ok("systemd-run -q --unit=lab-load /tmp/load.sh")?;
    host.ok(after)?;
    // What the start itself has set off ends first.
    host.ok("sleep 3")?;
    let text = host.ok(&format!("/tmp/count.sh {SECONDS} 100"))?;
    parse(&text, &CPUS.parse()?)
}

/// Reads what count.sh printed.
fn parse(text: &str, cpus: &Cpus) -> Result<Noise> {
    let parts: Vec<&str> = text.split("\n=\n").collect();
    let [
        interrupts,
        softirqs,
        interrupts_after,
        softirqs_after,
        switches,
        functions,
        rest,
    ] = parts[..]
    else {
        anyhow::bail!("count.sh printed {} parts: {text}", parts.len())
    };
    let mut rest = rest.lines();
    let micros: f64 = rest.next().unwrap_or_default().parse().context("no time")?;
    let mut numbers = || -> BTreeSet<&str> {
        let line = rest.next().unwrap_or_default();
        line.split_whitespace().collect()
    };
    let (kernel, qemu) = (numbers(), numbers());
    ensure!(
        micros > 0.0 && !kernel.is_empty() && !qemu.is_empty(),
        "count.sh printed no threads: {text}"
    );
    #[allow(clippy::cast_precision_loss, reason = "a few thousand")]
    let rate = |count: u64| count as f64 * 1e6 / micros / cpus.0.len() as f64;
    let mut noise = Noise::default();
    for (name, count) in since(interrupts, interrupts_after, cpus)? {
        let kind = match name.split(' ').next().unwrap_or_default() {
            "LOC" => Kind::Timer,
            number if number.parse::<u32>().is_ok() => Kind::Device,
            _ => Kind::BetweenCpus,
        };
        noise.add(kind, name, rate(count));
    }
    for (name, count) in since(softirqs, softirqs_after, cpus)? {
        noise.add(Kind::Softirq, name, rate(count));
    }
    for line in switches.lines() {
        let Some((cpu, pid, comm, count)) = switch(line) else {
            continue;
        };
        if !cpus.0.contains(&cpu) {
            continue;
        }
        let kind = if qemu.contains(pid) {
            if comm.starts_with("CPU ") {
                continue;
            }
            Kind::Emulator
        } else if !kernel.contains(pid) && !comm.starts_with("kworker/") {
            // A kworker may have ended since.
            Kind::User
        } else if is_bound(comm, cpu) {
            Kind::Bound
        } else {
            Kind::Kernel
        };
        noise.add(kind, without_numbers(comm), rate(count));
    }
    for (cpu, name, count) in functions.lines().filter_map(function) {
        if cpus.0.contains(&cpu) {
            *noise.functions.entry(name.to_owned()).or_default() += rate(count);
        }
    }
    Ok(noise)
}

/// What was added to the counters of these CPUs, by source.
fn since(before: &str, after: &str, cpus: &Cpus) -> Result<Vec<(String, u64)>> {
    let before: BTreeMap<String, u64> = counters(before, cpus)?.into_iter().collect();
    let mut added = Vec::new();
    for (name, count) in counters(after, cpus)? {
        let earlier = before.get(&name).copied().unwrap_or_default();
        added.push((name, count.saturating_sub(earlier)));
    }
    Ok(added)
}

/// The counters of /proc/interrupts or /proc/softirqs, summed over these CPUs.
fn counters(text: &str, cpus: &Cpus) -> Result<Vec<(String, u64)>> {
    let mut lines = text.lines();
    let head = lines.next().context("no counters")?;
    let columns: Vec<u32> = head
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("CPU")?.parse().ok())
        .collect();
    ensure!(!columns.is_empty(), "no CPUs in {head:?}");
    let mut counters = Vec::new();
    for line in lines {
        let Some((name, rest)) = line.split_once(':') else {
            continue;
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        // Some are not counted by CPU.
        if words.len() < columns.len() {
            continue;
        }
        let counts = columns
            .iter()
            .zip(&words)
            .filter(|(cpu, _)| cpus.0.contains(*cpu));
        let sum = counts
            .filter_map(|(_, count)| count.parse::<u64>().ok())
            .sum();
        let what = words[columns.len()..].join(" ");
        counters.push((format!("{} {what}", name.trim()).trim_end().to_owned(), sum));
    }
    Ok(counters)
}

/// `{ common_cpu: 7, next_pid: 12, next_comm: a name } hitcount: 5`
fn switch(line: &str) -> Option<(u32, &str, &str, u64)> {
    let (keys, count) = line.strip_prefix('{')?.split_once("} hitcount:")?;
    let (_, rest) = keys.split_once("common_cpu:")?;
    let (cpu, rest) = rest.split_once(", next_pid:")?;
    let (pid, comm) = rest.split_once(", next_comm:")?;
    Some((
        cpu.trim().parse().ok()?,
        pid.trim(),
        comm.trim(),
        count.trim().parse().ok()?,
    ))
}

/// `{ common_cpu: 7, func: [ffffffff81234567] name } hitcount: 5`, or `function:`
fn function(line: &str) -> Option<(u32, &str, u64)> {
    let (keys, count) = line.strip_prefix('{')?.split_once("} hitcount:")?;
    let (_, rest) = keys.split_once("common_cpu:")?;
    let (cpu, rest) = rest.split_once(',')?;
    // A module's name is behind it, in brackets too.
    let name = rest.split_once(']')?.1.trim();
    Some((cpu.trim().parse().ok()?, name, count.trim().parse().ok()?))
}

/// Whether the kernel does not allow one of its threads to be moved, by its name: those that each
/// CPU has (`migration/7`, `kworker/7:1H`), and workqueues' rescuers (`kworker/R-mm_percpu_wq`).
fn is_bound(comm: &str, cpu: u32) -> bool {
    comm.starts_with("kworker/R")
        || comm.split_once('/').is_some_and(|(_, rest)| {
            let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
            number == cpu.to_string()
        })
}

/// A thread's name as a kind: `kworker/7:1H-kblockd` is `kworker/N:NH`.
fn without_numbers(comm: &str) -> String {
    let name = match comm.strip_prefix("kworker/") {
        Some(_) => comm.split('-').next().unwrap_or_default(),
        None => comm,
    };
    let mut text = String::new();
    for c in name.chars() {
        if !c.is_ascii_digit() {
            text.push(c);
        } else if !text.ends_with('N') {
            text.push('N');
        }
    }
    text
}

fn table(found: &[Noise]) -> String {
    let mut text = format!("{:<30}", format!("per second and CPU, {SECONDS} s"));
    for (way, ..) in WAYS {
        text += &format!("{way:>14}");
    }
    let mut row = |name: &str, value: &dyn Fn(&Noise) -> f64| {
        text += &format!("\n{name:<30}");
        for noise in found {
            text += &format!("{:>14.2}", value(noise));
        }
    };
    row("threads that need not run there", &Noise::foreign);
    for (kind, name) in Kind::ALL {
        row(name, &|noise| noise.of(kind));
    }
    text + "\n"
}

/// What is most frequent, by name.
fn by_name(way: &str, noise: &Noise) -> String {
    let mut text = format!("\n{way}:\n");
    let mut line = |what: &str, mut names: Vec<(&str, f64)>| {
        names.sort_by(|a, b| b.1.total_cmp(&a.1));
        let names: Vec<String> = names
            .iter()
            .take(8)
            .map(|(name, rate)| format!("{name} {rate:.2}"))
            .collect();
        if !names.is_empty() {
            text += &format!("  {what}: {}\n", names.join(", "));
        }
    };
    for (kind, what) in Kind::ALL {
        let names = noise.by_name.iter().filter(|((of, _), _)| *of == kind);
        line(
            what,
            names
                .map(|((_, name), rate)| (name.as_str(), *rate))
                .collect(),
        );
    }
    let functions = noise.functions.iter();
    line(
        "functions of calls and timers",
        functions
            .map(|(name, rate)| (name.as_str(), *rate))
            .collect(),
    );
    text
}

fn judge(found: &[Noise]) -> Result<()> {
    let [open, script, hotplug, partition] = found else {
        anyhow::bail!("{} ways", found.len())
    };
    ensure!(
        open.foreign() > 1.0,
        "the load does not reach the VM's CPUs if nothing is done: {open:?}"
    );
    ensure!(
        partition.foreign() == 0.0,
        "by partition threads ran on the VM's CPUs that need not: {partition:?}"
    );
    ensure!(
        hotplug.foreign() <= script.foreign(),
        "by hotplug more ran on the VM's CPUs than with the script: {hotplug:?}, {script:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "     CPU0 CPU7\n 4:  5  10  IO-APIC  ttyS0\nLOC:  7  8  Local timer interrupts\nRES:  1  2  Rescheduling interrupts\nERR:  0\n=\n  CPU0 CPU7\nTIMER:  1  1\n=\n     CPU0 CPU7\n 4:  5  14  IO-APIC  ttyS0\nLOC:  7  16  Local timer interrupts\nRES:  1  4  Rescheduling interrupts\nERR:  0\n=\n  CPU0 CPU7\nTIMER:  9  3\n=\n# event histogram\n{ common_cpu:          7, next_pid:        100, next_comm: CPU 0/KVM       } hitcount:         50\n{ common_cpu:          7, next_pid:        101, next_comm: kvm             } hitcount:          2\n{ common_cpu:          7, next_pid:         30, next_comm: kworker/7:1H-kblockd } hitcount:          4\n{ common_cpu:          7, next_pid:         99, next_comm: kworker/u96:2   } hitcount:          6\n{ common_cpu:          7, next_pid:        900, next_comm: a name, bash    } hitcount:          8\n{ common_cpu:          0, next_pid:        900, next_comm: bash            } hitcount:         80\n\nTotals:\n    Hits: 150\n=\n{ common_cpu:          7, func: [ffffffff8a1] nohz_csd_func [kvm]              } hitcount:          6\n=\n2000000\n2 30 31 \n100 101\n";

    #[test]
    fn rates_on_the_vms_cpus_by_kind() {
        let noise = parse(PRINTED, &"7".parse().unwrap()).unwrap();
        let rates: Vec<f64> = Kind::ALL.iter().map(|(kind, _)| noise.of(*kind)).collect();
        assert_eq!(rates, [4.0, 1.0, 3.0, 2.0, 2.0, 1.0, 4.0, 1.0]);
        let names: Vec<&str> = noise
            .by_name
            .keys()
            .map(|(_, name)| name.as_str())
            .collect();
        assert!(
            names.contains(&"kworker/N:NH") && names.contains(&"kworker/uN:N"),
            "{names:?}"
        );
        assert_eq!(noise.functions["nohz_csd_func [kvm]"], 3.0);
        assert!(parse("no\n=\nparts", &"7".parse().unwrap()).is_err());
    }

    #[test]
    fn a_thread_that_need_not_run_there_is_an_error() {
        let noise = |kind, rate| {
            let mut noise = Noise::default();
            noise.add(kind, String::new(), rate);
            noise
        };
        let ways = |hotplug, partition| {
            [
                noise(Kind::User, 9.0),
                noise(Kind::Emulator, 2.0),
                hotplug,
                partition,
            ]
        };
        let quiet = || noise(Kind::Bound, 3.0);
        assert!(judge(&ways(quiet(), quiet())).is_ok());
        assert!(judge(&ways(noise(Kind::User, 2.1), quiet())).is_err());
        assert!(judge(&ways(quiet(), noise(Kind::Kernel, 0.1))).is_err());
        assert!(judge(&[quiet(), quiet(), quiet(), quiet()]).is_err());
    }
}

//! `hook status`: which VM owns each CPU, and what can still run on the isolated ones.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, anyhow};
use pinfold_core::cli::terminal::{self, Each, coloured, print, print_json, try_json, try_out};
use pinfold_core::cli::{Output, print_error};
use pinfold_core::knob::Value;
use pinfold_core::state::{Newer, State, Store};
use pinfold_core::sys::task::{self, Task};
use pinfold_core::sys::topology::Topology;
use pinfold_core::vm::{self, Role, VmId};
use pinfold_core::{CpuSet, Error, Exit, Host, Knob, Result, TaskId, printable};
use serde::Serialize;
use serde_json::json;

use super::drawing;
use super::map::{self, Cpu, Owner};
use super::monitor;
use crate::own_steps::TOOL;
use crate::phases::failures;
use crate::settings::Bounds;
use crate::state::reservation::{Isolation, Phase, Reservation, owner};
use crate::strays::{Class, Stray, strays};

/// The options of `hook status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Repeat every so many seconds until interrupted [default: 2]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2")]
    #[arg(value_parser = super::seconds)]
    watch: Option<u64>,
    /// Print metrics in Prometheus' text format, for node_exporter's textfile collector; the exit
    /// code is 0 if they could be read
    #[arg(long, conflicts_with_all = ["watch", "nagios"])]
    pub metrics: bool,
    /// Print a line with performance data, with the exit codes of Nagios' plugins: 1 for strays and
    /// failed changes, 2 for a VM that has stopped and keeps its CPUs, 3 if it could not look
    #[arg(long, conflicts_with = "watch")]
    pub nagios: bool,
}

/// What is shown.
struct View {
    topology: Topology,
    reservations: BTreeMap<u32, Reservation>,
    /// The CPUs of all fenced VMs.
    isolated: CpuSet,
    strays: Vec<Stray>,
    cpus: BTreeMap<usize, Cpu>,
    /// What only a later version of hook knows of the state.
    newer: Newer,
}

/// The exit codes of the command.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0   nothing that could run elsewhere can run on an isolated CPU
  1   something can: a stray
  2   the command line is wrong
  3   the state or the host could not be read; the state needs root";

/// The command's whole run, with exit codes for monitoring. With an `interval` it looks again and
/// again, until the reader has gone.
///
/// # Errors
/// If the result cannot be written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let (root, json) = (&output.root(), output.json);
    if args.metrics || args.nagios {
        return for_monitoring(args, root);
    }
    let interval = args.watch.map(Duration::from_secs);
    loop {
        let seen = match look(root) {
            Err(error) => {
                print_error(TOOL, &unread(error));
                return Ok(Exit::Unknown);
            }
            Ok(seen) => seen,
        };
        let exit = if seen.missed() == 0 {
            Exit::Success
        } else {
            Exit::Failed
        };
        let text = || coloured(&seen.to_text(root, drawing::columns()));
        let Some(interval) = interval else {
            match json {
                true => print_json(&seen.to_json(root))?,
                false => print(&text())?,
            }
            return Ok(exit);
        };
        let shown = match terminal::size() {
            _ if json => try_json(&seen.to_json(root)).and_then(|()| try_out("\n")),
            Some((_, rows)) => try_out(&redrawn(&text(), rows)),
            None => try_out(&(text() + "\n")),
        };
        match shown {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(exit),
            shown => shown.context("stdout")?,
        }
        std::thread::sleep(interval);
    }
}

/// Why nothing could be seen.
fn unread(error: Error) -> anyhow::Error {
    if error.is_denied() {
        anyhow!("{error}; only root can read the reservations")
    } else {
        error.into()
    }
}

/// What is shown on so many columns, for a report.
///
/// # Errors
/// If the state or the host cannot be read.
pub(super) fn text_of(root: &Host, columns: usize) -> anyhow::Result<String> {
    Ok(look(root).map_err(unread)?.to_text(root, columns))
}

/// `--metrics` and `--nagios`.
fn for_monitoring(args: &Args, root: &Host) -> anyhow::Result<Exit> {
    let seen = look(root).and_then(|view| {
        if args.nagios {
            monitor::nagios(root, &view.seen())
        } else {
            Ok((monitor::metrics(root, &view.seen())?, Exit::Success))
        }
    });
    match seen.map_err(unread) {
        Ok((text, exit)) => {
            print(&text)?;
            Ok(exit)
        }
        Err(error) => {
            if args.nagios {
                print(&printable(&format!("PINFOLD UNKNOWN - {error:#}\n")))?;
            } else {
                print_error(TOOL, &error);
            }
            Ok(Exit::Unknown)
        }
    }
}

/// Looks at the host and the state, without the lock.
fn look(root: &Host) -> Result<View> {
    let State {
        reservations,
        baseline,
        newer,
    } = Store::<Reservation>::peek(root)?.unwrap_or_default();
    let topology = Topology::read(root)?;
    let mut cpus: BTreeMap<usize, Cpu> = (topology.present.iter())
        .map(|cpu| {
            let owner = if topology.online.contains(cpu) {
                Owner::Housekeeping
            } else {
                Owner::Offline
            };
            (
                cpu,
                Cpu {
                    cpu,
                    owner,
                    vm: None,
                    vcpus: CpuSet::new(),
                    stray: false,
                },
            )
        })
        .collect();
    let mut isolated = CpuSet::new();
    let mut pinned = BTreeMap::new();
    for (id, reservation) in reservations
        .iter()
        .filter(|(_, reservation)| reservation.is_claim())
    {
        let own = &reservation.settings.isolated;
        for cpu in own.iter() {
            let Some(cpu) = cpus.get_mut(&cpu) else {
                continue;
            };
            cpu.vm = Some(*id);
            if cpu.owner == Owner::Housekeeping {
                cpu.owner = if reservation.is_fenced() {
                    Owner::Isolated
                } else {
                    Owner::Reserved
                };
            }
        }
        if !reservation.is_fenced() {
            continue;
        }
        isolated = &isolated | own;
        for task in qemu_tasks(root, reservation)? {
            // What hook pinned inside the fence belongs there: the vCPU threads.
            let last = baseline
                .last(&Knob::Thread(task.id))
                .and_then(Value::cpus)
                .cloned();
            let Some(last) = last.filter(|last| last.is_subset(own)) else {
                continue;
            };
            let now = match task::affinity(root, &task.id) {
                Err(error) if error.is_gone() => continue,
                now => now?,
            };
            if let (Role::Vcpu(vcpu), true) = (vm::role_by_name(&task.name), now.is_subset(own)) {
                for cpu in now.iter() {
                    if let Some(cpu) = cpus.get_mut(&cpu) {
                        cpu.vcpus.insert(vcpu);
                    }
                }
            }
            pinned.insert(task.id, last);
        }
    }
    let strays = if isolated.is_empty() {
        Vec::new()
    } else {
        strays(root, &isolated, &pinned, &baseline)?
    };
    let strayed: CpuSet = strays
        .iter()
        .filter(|stray| stray.class == Class::Stray)
        .flat_map(|stray| stray.cpus.iter())
        .collect();
    for cpu in cpus.values_mut() {
        cpu.stray = strayed.contains(cpu.cpu);
    }
    Ok(View {
        topology,
        reservations,
        isolated,
        strays,
        cpus,
        newer,
    })
}

/// The threads of a VM's QEMU; none if it has ended.
fn qemu_tasks(root: &Host, reservation: &Reservation) -> Result<Vec<Task>> {
    let tasks = |qemu: &TaskId| match task::tasks(root, qemu.pid) {
        Err(error) if error.is_gone() => Ok(Vec::new()),
        tasks => tasks,
    };
    reservation.qemu.as_ref().map_or(Ok(Vec::new()), tasks)
}

impl View {
    fn seen(&self) -> monitor::Seen<'_> {
        monitor::Seen {
            reservations: &self.reservations,
            isolated: &self.isolated,
            strays: &self.strays,
        }
    }

    /// How many things could be elsewhere.
    fn missed(&self) -> usize {
        self.strays
            .iter()
            .filter(|stray| stray.class == Class::Stray)
            .count()
    }

    fn to_json(&self, root: &Host) -> impl Serialize {
        let bounds = |r: &Reservation| r.settings.bounds(self.reservations.len() - 1);
        let alive = |id: &u32, r: &Reservation| {
            VmId::try_from(*id).is_ok_and(|vmid| r.is_alive(root, vmid))
        };
        let vm = |(id, r): (&u32, &Reservation)| {
            let vm = json!({
                "phase": r.phase,
                "isolation": r.isolation,
                "isolated": r.settings.isolated,
                "alive": alive(id, r),
                "failed": r.failed,
                "bounds": bounds(r),
                "settings": r.settings,
            });
            (id.to_string(), vm)
        };
        let vms: BTreeMap<String, serde_json::Value> = self.reservations.iter().map(vm).collect();
        InJson {
            cpus: Each(|| self.cpus.values().map(|cpu| json!(cpu))),
            isolated: &self.isolated,
            missed: self.missed(),
            newer: self.newer.summary(),
            strays: Each(|| self.strays.iter().map(|stray| json!(stray))),
            vms,
        }
    }

    fn to_text(&self, root: &Host, columns: usize) -> String {
        let picture = map::draw(&self.topology, &self.cpus, columns);
        let text = text(
            root,
            &self.reservations,
            &self.isolated,
            &self.strays,
            columns,
        );
        let newer = self.newer.summary().unwrap_or_default();
        let end = if newer.is_empty() { "" } else { "\n" };
        format!("{picture}\n{text}{newer}{end}")
    }
}

/// What is shown, for programs.
#[derive(Serialize)]
struct InJson<'a, C: Serialize, S: Serialize> {
    cpus: C,
    isolated: &'a CpuSet,
    missed: usize,
    newer: Option<String>,
    strays: S,
    vms: BTreeMap<String, serde_json::Value>,
}

/// Draws the screen over the last one, so that it is never empty; at most `rows` lines, so that it
/// does not scroll.
pub(super) fn redrawn(text: &str, rows: usize) -> String {
    // ECMA-48: cursor to the first column of the first line; erase to the end of the line; of the
    // screen.
    const HOME: &str = "\x1b[H";
    const END_OF_LINE: &str = "\x1b[K";
    const TO_THE_END: &str = "\x1b[J";
    let lines: Vec<&str> = text.lines().collect();
    let fit = if lines.len() < rows {
        lines.len()
    } else {
        rows.saturating_sub(2)
    };
    let mut screen = HOME.to_owned();
    for line in &lines[..fit] {
        screen += &format!("{line}{END_OF_LINE}\n");
    }
    if fit < lines.len() {
        screen += &format!("... and {} lines more{END_OF_LINE}\n", lines.len() - fit);
    }
    screen + TO_THE_END
}

fn text(
    root: &Host,
    reservations: &BTreeMap<u32, Reservation>,
    isolated: &CpuSet,
    strays: &[Stray],
    columns: usize,
) -> String {
    if reservations.is_empty() {
        return "no CPU is isolated\n".into();
    }
    let mut text = String::new();
    for (id, reservation) in reservations {
        let phase = match reservation.phase {
            Phase::Leaving => "is releasing",
            Phase::Idle if reservation.comes_back() => {
                "is stopped for a backup, will start again, and has released"
            }
            Phase::Idle => "is starting its idle VM and has released",
            Phase::Unfenced => "runs without isolated CPUs",
            Phase::Starting => "is starting and will have",
            Phase::Isolating => "is getting",
            Phase::Isolated => "has",
        };
        let owner = owner(*id);
        let alive = VmId::try_from(*id).is_ok_and(|vmid| reservation.is_alive(root, vmid));
        let dead = if alive {
            ""
        } else {
            ", but it has stopped; `hook recover` releases them"
        };
        let by = if reservation.isolation == Isolation::Partition {
            ", by partition"
        } else {
            ""
        };
        if reservation.phase == Phase::Unfenced {
            text += &format!("{owner} {phase}\n");
            continue;
        }
        text += &format!(
            "{owner} {phase} CPU {}{by}{dead}\n",
            reservation.settings.isolated
        );
        if reservation.failed > 0 {
            text += &format!(
                "  {} when it was isolated; `hook {id} post-start` tries again\n",
                failures(reservation.failed)
            );
        }
        let Bounds {
            pre_start,
            post_start,
            post_stop,
        } = reservation.settings.bounds(reservations.len() - 1);
        text += &format!(
            "  time limits: pre-start {pre_start} s, post-start {post_start} s, post-stop {post_stop} s\n"
        );
    }
    for (class, title) in [
        (Class::Stray, "strays (could be elsewhere)"),
        (
            Class::ManagedIrq,
            "managed IRQs (the kernel does not move them)",
        ),
        (Class::MovingIrq, "IRQs that move with their next interrupt"),
        (Class::KernelBound, "kernel-bound threads"),
    ] {
        let of_class: Vec<&Stray> = strays.iter().filter(|stray| stray.class == class).collect();
        if class == Class::MovingIrq && of_class.is_empty() {
            continue;
        }
        text += &format!("{title}: {}\n", of_class.len());
        let lines = if class == Class::KernelBound {
            by_kinds(&of_class, isolated)
        } else {
            by_cpus(&of_class)
        };
        for (cpus, items) in lines {
            let items: Vec<(String, usize)> = items
                .into_iter()
                .map(|item| {
                    let width = item.chars().count();
                    (item, width)
                })
                .collect();
            text += &drawing::wrapped(&format!("  CPU {cpus}: "), &items, ", ", columns);
        }
    }
    text
}

/// CPUs and what can run on them.
type Line = (CpuSet, Vec<String>);

/// Each stray once; those with the same CPUs share a line.
fn by_cpus(strays: &[&Stray]) -> Vec<Line> {
    let mut lines: BTreeMap<(Option<usize>, &CpuSet), Vec<String>> = BTreeMap::new();
    for stray in strays {
        lines
            .entry((stray.cpus.first(), &stray.cpus))
            .or_default()
            .push(printable(&stray.object).into_owned());
    }
    lines
        .into_iter()
        .map(|((_, cpus), items)| (cpus.clone(), items))
        .collect()
}

/// The number of each kind on each CPU; CPUs with the same numbers share a line.
fn by_kinds(strays: &[&Stray], isolated: &CpuSet) -> Vec<Line> {
    let mut counts: BTreeMap<usize, BTreeMap<&str, usize>> = BTreeMap::new();
    for stray in strays {
        let kind = kind(&stray.object);
        for cpu in stray.cpus.iter().filter(|cpu| isolated.contains(*cpu)) {
            *counts.entry(cpu).or_default().entry(kind).or_default() += 1;
        }
    }
    let mut lines: Vec<Line> = Vec::new();
    let mut known: BTreeMap<BTreeMap<&str, usize>, usize> = BTreeMap::new();
    for (cpu, kinds) in counts {
        match known.get(&kinds) {
            Some(line) => lines[*line].0.insert(cpu),
            None => {
                let items = kinds.iter().map(|(kind, count)| match count {
                    1 => printable(kind).into_owned(),
                    _ => format!("{} x{count}", printable(kind)),
                });
                lines.push(([cpu].into_iter().collect(), items.collect()));
                known.insert(kinds, lines.len() - 1);
            }
        }
    }
    lines
}

/// Kernel-bound threads come in a few kinds, the same on every CPU: `kthread 40
/// (kworker/6:0-events)` is a kworker.
fn kind(object: &str) -> &str {
    let name = object
        .split_once('(')
        .map_or(object, |(_, name)| name.trim_end_matches(')'));
    if name.starts_with("kworker/R-") {
        "rescuer"
    } else {
        name.split('/').next().unwrap_or(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;

    const LAYOUT: &str = "layout = \"5900x\"";

    fn screen(host: &MadeUpHost, columns: usize) -> String {
        let text = look(&host.root).unwrap().to_text(&host.root, columns);
        anstream::adapter::strip_str(&text).to_string()
    }

    fn fenced() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[6, 18, 7, 19]);
        host.file("proc/irq/24/smp_affinity_list", "0-5");
        host.file("sys/devices/virtual/workqueue/cpumask", "03f03f");
        host.file("proc/irq/default_smp_affinity", "03f03f");
        for (pid, name) in [
            (1, "systemd"),
            (2, "kthreadd"),
            (3, "kswapd0"),
            (100, "kvm"),
        ] {
            let flags = if matches!(pid, 2 | 3) { 0x0020_0000 } else { 0 };
            host.thread(pid, pid, name, "0-5,12-17", flags);
        }
        host.reserve(100, Phase::Isolated, LAYOUT);
        host
    }

    #[test]
    fn a_host_without_a_fence_is_drawn_all_the_same() {
        let host = MadeUpHost::new("5900x");
        assert_eq!(
            screen(&host, 100),
            "package:0\n\
             \x20 llc:0   0 .   1 .   2 .   3 .   4 .   5 .\n\
             \x20        12 .  13 .  14 .  15 .  16 .  17 .\n\
             \x20 llc:1   6 .   7 .   8 .   9 .  10 .  11 .\n\
             \x20        18 .  19 .  20 .  21 .  22 .  23 .\n\
             . housekeeping\n\
             \n\
             no CPU is isolated\n"
        );
        assert!(!host.root.exists("run/pinfold"));
    }

    #[test]
    fn each_vcpu_stands_on_its_cpu() {
        let text = screen(&fenced(), 100);
        let picture: Vec<&str> = text.lines().collect();
        assert_eq!(
            picture[3..=6],
            [
                "  llc:1   6 100:v0   7 100:v2   8 100      9 100     10 100     11 100",
                "         18 100:v1  19 100:v3  20 100     21 100     22 100     23 100",
                ". housekeeping   100:v0 vCPU of VM 100   100 VM 100, no vCPU",
                ""
            ],
            "{text}"
        );
        assert!(text.contains("\nVM 100 has CPU 6-11,18-23\n"), "{text}");
        assert!(
            text.contains("\nstrays (could be elsewhere): 0\n"),
            "{text}"
        );
        assert!(
            text.contains("\nkernel-bound threads: 1\n  CPU 6: ksoftirqd\n"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
    }

    #[test]
    fn a_stray_is_marked_listed_and_counted() {
        let host = fenced();
        host.thread(900, 900, "stress", "7,20", 0);
        host.thread(901, 901, "wide", "0-7", 0);
        let seen = look(&host.root).unwrap();
        assert_eq!(seen.missed(), 2);
        let text = screen(&host, 100);
        assert!(
            text.contains(" 7 100:v2!")
                && text.contains("20 100! ")
                && text.contains("! a stray can run there")
        );
        assert!(
            text.contains("\n  CPU 6-7: thread 901 (wide)\n  CPU 7,20: thread 900 (stress)\n"),
            "{text}"
        );
        let json = json!(seen.to_json(&host.root));
        assert_eq!(
            json["cpus"][7],
            json!({"cpu": 7, "owner": "isolated", "vm": 100, "vcpus": "2", "stray": true})
        );
        assert_eq!(
            json["cpus"][0],
            json!({"cpu": 0, "owner": "housekeeping", "stray": false})
        );
        assert_eq!(
            (&json["missed"], &json["isolated"]),
            (&json!(2), &json!("6-11,18-23"))
        );
        assert!(json["vms"]["100"]["bounds"]["post_start"].is_u64() && json["strays"].is_array());
    }

    #[test]
    fn monitoring_sees_strays_failures_and_dead_vms() {
        let host = fenced();
        let nagios = || monitor::nagios(&host.root, &look(&host.root).unwrap().seen()).unwrap();
        let (text, exit) = nagios();
        assert_eq!(
            text,
            "PINFOLD OK - 1 VMs on 12 isolated CPUs; no strays | vms=1 cpus=12 strays=0;0 failed=0;0\n"
        );
        assert_eq!(exit, Exit::Success);
        host.thread(900, 900, "stress", "7,20", 0);
        let (text, exit) = nagios();
        assert!(
            text.starts_with("PINFOLD WARNING - ") && text.contains("strays: 1 |"),
            "{text}"
        );
        assert_eq!(exit, Exit::Failed);
        let metrics = monitor::metrics(&host.root, &look(&host.root).unwrap().seen()).unwrap();
        for line in [
            "pinfold_vms 1",
            "pinfold_isolated_cpus 12",
            "pinfold_vm_cpus{vmid=\"100\"} 12",
            "pinfold_vm_alive{vmid=\"100\"} 1",
            "pinfold_vm_failed_changes{vmid=\"100\"} 0",
            "pinfold_strays{class=\"stray\"} 1",
            "pinfold_strays{class=\"kernel_bound\"} 1",
            "# TYPE pinfold_strays gauge",
        ] {
            assert!(metrics.lines().any(|it| it == line), "{line}: {metrics}");
        }
        assert!(!metrics.contains("partition"), "{metrics}");
        std::fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
        std::fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        let (text, exit) = nagios();
        assert!(
            text.contains("VM 100 has stopped and keeps its CPUs"),
            "{text}"
        );
        assert_eq!(exit as u8, 2);
        let none = MadeUpHost::new("5900x");
        let metrics = monitor::metrics(&none.root, &look(&none.root).unwrap().seen()).unwrap();
        assert!(metrics.contains("pinfold_vms 0\n"), "{metrics}");
    }

    #[test]
    fn a_kernel_threads_folder_is_not_listed() {
        let host = fenced();
        // Kernel threads have no others, so that their folders need not be read.
        host.thread(3, 4, "beside kswapd0", "7", 0);
        assert_eq!(look(&host.root).unwrap().missed(), 0);
        host.file("proc/2/task/2/children", "");
        assert_eq!(look(&host.root).unwrap().missed(), 1);
    }

    #[test]
    fn a_mask_that_cannot_be_read_is_an_error() {
        let host = fenced();
        host.file("proc/900/task/900/status", "Name:\tx");
        let error = look(&host.root).err().unwrap().to_string();
        assert!(error.contains("Cpus_allowed_list"), "{error}");
    }

    #[test]
    fn an_irq_that_still_comes_is_listed_but_not_a_stray() {
        let host = fenced();
        host.file("proc/irq/24/effective_affinity_list", "7");
        assert_eq!(look(&host.root).unwrap().missed(), 0);
        let text = screen(&host, 100);
        assert!(
            text.contains(
                "\nIRQs that move with their next interrupt: 1\n  CPU 7: IRQ 24 (nvme0q0)\n"
            ),
            "{text}"
        );
        host.file("proc/irq/24/effective_affinity_list", "3");
        assert!(!screen(&host, 100).contains("next interrupt"));
    }

    #[test]
    fn what_is_reserved_or_offline_has_marks_of_its_own() {
        let host = MadeUpHost::new("5900x-offline");
        host.vm(100, &[6]);
        host.reserve(100, Phase::Starting, "isolated = \"6,11\"\npins = [6]");
        let text = screen(&host, 100);
        assert!(
            text.contains(" 6 (100)  ") && text.contains("(100) reserved for VM 100"),
            "{text}"
        );
        assert!(text.contains("\n  offline   2 off    11 off\n"), "{text}");
        assert!(
            text.contains("\nVM 100 is starting and will have CPU 6,11\n"),
            "{text}"
        );
        assert_eq!(
            json!(look(&host.root).unwrap().to_json(&host.root))["cpus"][11]["owner"],
            "offline"
        );
    }

    #[test]
    fn a_large_host_folds_what_is_all_alike() {
        let host = MadeUpHost::new("512-cpus");
        host.vm(100, &[]);
        host.reserve(100, Phase::Isolated, "isolated = \"8-11,264\"\npins = [8]");
        let text = screen(&host, 80);
        assert!(
            text.contains("\n  llc:0 node:0   0-7,256-263 .\n"),
            "{text}"
        );
        assert!(
            text.contains("package:1\n") && text.contains("264 100"),
            "{text}"
        );
        let picture = text.split("\n\n").next().unwrap();
        assert!(
            picture.lines().count() < 40 && picture.lines().all(|line| line.len() <= 80),
            "{text}"
        );
    }

    #[test]
    fn long_lists_are_wrapped_and_never_cut() {
        let host = fenced();
        for pid in 900..930 {
            host.thread(pid, pid, "stress", "7", 0);
        }
        let text = screen(&host, 60);
        assert!(
            (900..930).all(|pid| text.contains(&format!("thread {pid} (stress)"))),
            "{text}"
        );
        let listed = text
            .split("elsewhere): 30\n")
            .nth(1)
            .unwrap()
            .split("managed IRQs")
            .next()
            .unwrap();
        assert!(
            listed
                .lines()
                .all(|line| line.len() <= 60 && line.starts_with("  ")),
            "{listed}"
        );
    }

    #[test]
    fn a_redrawn_screen_never_scrolls() {
        assert_eq!(redrawn("a\nb\n", 3), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(
            redrawn("a\nb\nc\nd\n", 4),
            "\x1b[Ha\x1b[K\nb\x1b[K\n... and 2 lines more\x1b[K\n\x1b[J"
        );
        assert_eq!(
            redrawn("a\nb\n", 1),
            "\x1b[H... and 2 lines more\x1b[K\n\x1b[J"
        );
    }

    #[test]
    fn only_terminals_get_colours() {
        let host = fenced();
        let text = look(&host.root).unwrap().to_text(&host.root, 100);
        assert!(text.contains("\x1b[1m\x1b[32m100:v0\x1b[0m"), "{text:?}");
        assert!(
            !coloured(&text).contains('\x1b'),
            "tests write to a pipe or a file"
        );
    }
}

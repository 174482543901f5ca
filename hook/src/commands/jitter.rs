//! `hook jitter`: how long a loop on each CPU is interrupted, measured from inside.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{print, print_json};
use pinfold_core::state::{Baseline, Store};
use pinfold_core::sys::topology::Topology;
use pinfold_core::sys::{cpu, task};
use pinfold_core::vm::{self, Role, VmId};
use pinfold_core::{CpuSet, Exit, Host, Selector, printable};
use serde_json::json;

use super::comparison::{Comparison, Measured, right_aligned};
use super::loops::{HeldSignals, Loops, Row};
use super::needs_root;
use crate::own_steps::TOOL;
use crate::phases::Run;
use crate::settings::{self, Loaded, Method, ResetPci, Settings};
use crate::state::reservation::{Reservation, owner};
use crate::strays::{Class, strays};

/// The longest time to measure inside a fence, in seconds: other hooks wait for its end, by default
/// for two minutes.
const LONGEST_COMPARED: u64 = 60;

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

    /// Measure twice: as the host is now, then with the CPUs isolated for the loops as for a VM, by
    /// partition; and return them to the host. At most 60 seconds each; hooks of VMs that start or
    /// stop meanwhile wait. CPU 0 and its core are refused. Needs root
    #[arg(long)]
    compare: bool,

    /// Also draw the comparison into this file, as an SVG picture
    #[arg(long, value_name = "FILE", requires = "compare")]
    svg: Option<PathBuf>,
}

impl Args {
    /// What contradicts itself in the options.
    pub(crate) fn contradiction(&self) -> Option<String> {
        (self.compare && self.seconds > LONGEST_COMPARED)
            .then(|| format!("--compare measures for {LONGEST_COMPARED} seconds at most"))
    }
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
    let (cpus, settings) = chosen(&root, args)?;
    if args.compare {
        return compare(&root, args, &cpus, settings, output);
    }
    let loops = Loops::new(&cpus, Duration::from_secs(args.seconds), args.fifo)?;
    loops.place(&root)?;
    let rows = loops.run(&root, None)?;
    if output.json {
        print_json(&json!({
            "cpus": cpus, "seconds": args.seconds, "fifo": args.fifo, "by_cpu": rows,
        }))?;
    } else {
        print(&printable(&to_text(&rows)))?;
    }
    Ok(Exit::Success)
}

/// Measures open and inside a fence.
fn compare(
    root: &Host,
    args: &Args,
    cpus: &CpuSet,
    settings: Option<Settings>,
    output: &Output,
) -> anyhow::Result<Exit> {
    needs_root(root, false)?;
    not_the_boot_core(&Topology::read(root)?, cpus)?;
    let settings = for_loops(match settings {
        Some(settings) => settings,
        None => {
            let text = format!("isolated = \"{cpus}\"\npins = \"auto\"\n");
            settings::resolve(root, &text, "--cpus", 1)?
        }
    });
    // Before anything is measured, in case it cannot be made.
    let picture = args.svg.as_deref().map(create).transpose()?;
    let mut report = output.report(TOOL).for_log();
    // Before the first change, so that none is left half way.
    let signals = HeldSignals::new().context("signals")?;
    let loops = || Loops::new(cpus, Duration::from_secs(args.seconds), args.fifo);
    let all = strays(root, cpus, &Default::default(), &Baseline::default())?;
    let open = all.iter().filter(|it| it.class == Class::Stray).count();
    report.line(&format!("measuring CPU {cpus} as the host is now"));
    let first = loops()?;
    first.place(root)?;
    let open = Measured {
        strays: open,
        rows: first.run(root, Some(&signals))?,
    };
    let second = loops()?;
    let mut run = Run {
        root: root.clone(),
        report: &mut report,
        migrated_from: None,
    };
    let fenced = run.within_fence(settings, &second.tids(), |strays| {
        let rows = second.run(root, Some(&signals))?;
        anyhow::Ok(Measured { strays, rows })
    })??;
    let comparison = Comparison {
        cpus: cpus.clone(),
        seconds: args.seconds,
        fifo: args.fifo,
        open,
        fenced,
    };
    if let Some(mut file) = picture {
        file.write_all(comparison.to_svg().as_bytes())
            .context("--svg")?;
    }
    if output.json {
        print_json(&comparison.to_json())?;
    } else {
        print(&printable(&comparison.to_text()))?;
    }
    Ok(match report.failures() {
        0 => Exit::Success,
        _ => Exit::Partial,
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "the picture, in the file that was named"
)]
fn create(file: &Path) -> anyhow::Result<File> {
    File::create(file).with_context(|| file.display().to_string())
}

/// Refuses CPU 0 and its siblings, which the host needs.
fn not_the_boot_core(topology: &Topology, cpus: &CpuSet) -> anyhow::Result<()> {
    let core = topology
        .cores
        .iter()
        .find(|core| core.contains(cpu::BOOT_CPU));
    if let Some(core) = core.filter(|core| core.intersects(cpus)) {
        return Err(anyhow!(
            "CPU {core} is the core of CPU 0, which stays with the host; leave it out: !core:0"
        ));
    }
    Ok(())
}

/// The CPUs that are measured, none of which a running VM may have, and the settings of their VM.
fn chosen(root: &Host, args: &Args) -> anyhow::Result<(CpuSet, Option<Settings>)> {
    let (cpus, settings) = match (args.vmid, &args.cpus) {
        (Some(vmid), _) => {
            ensure!(
                vm::find(root, vmid)?.is_none(),
                "VM {vmid} runs; `hook blame {vmid}` shows what disturbs it"
            );
            let threads = vm::conf(root, vmid)?.threads_per_core();
            match settings::load(root, vmid, threads, &[])? {
                Loaded::Fenced(settings) => (settings.isolated.clone(), Some(settings)),
                Loaded::Unfenced { why, .. } => return Err(anyhow!("VM {vmid}: {why}")),
            }
        }
        (None, Some(cpus)) => (cpus.resolve(root)?, None),
        (None, None) => (CpuSet::new(), None),
    };
    ensure!(!cpus.is_empty(), "no CPUs to measure");
    cpu::check_online(root, &cpus)?;
    let taken = taken(root, &cpus)?;
    ensure!(taken.is_empty(), "{}", taken.join("; "));
    Ok((cpus, settings))
}

/// The settings of a VM for loops: one for each CPU, by partition; no other VM, device or script is
/// touched.
fn for_loops(settings: Settings) -> Settings {
    let each = settings.isolated.iter();
    Settings {
        pins: each.map(|cpu| CpuSet::range(cpu, cpu)).collect(),
        auto_pins: None,
        method: Method::Partition,
        vcpu_policy: None,
        halt_poll_ns: None,
        idle_vm: None,
        reset_pci: ResetPci::OfVm(false),
        tidy_caches: Some(false),
        chain: Vec::new(),
        ..settings
    }
}

/// Which VMs that run have CPUs of these: isolated ones, or vCPUs that are pinned there.
fn taken(root: &Host, cpus: &CpuSet) -> anyhow::Result<Vec<String>> {
    let reservations = Store::<Reservation>::peek(root)?
        .unwrap_or_default()
        .reservations;
    let fenced = (reservations.values()).filter(|reservation| reservation.is_fenced());
    let fenced = fenced.fold(CpuSet::new(), |all, it| &all | &it.settings.isolated);
    // What every thread has that is not pinned.
    let open = &cpu::online(root)? - &fenced;
    let mut taken = Vec::new();
    for (id, reservation) in &reservations {
        let own = &reservation.settings.isolated & cpus;
        let vmid = VmId::try_from(*id)?;
        if reservation.is_claim() && !own.is_empty() && reservation.is_alive(root, vmid) {
            taken.push(format!("CPU {own} belongs to {}, which runs", owner(*id)));
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
                if !open.is_subset(&allowed) {
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
    let mut text = right_aligned(&lines);
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
    use super::super::loops::{Gaps, row};
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::state::reservation::Phase;
    use pinfold_core::sys::activity::Source;

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
    fn the_core_of_cpu_0_is_not_compared() {
        let host = MadeUpHost::new("5900x");
        let topology = Topology::read(&host.root).unwrap();
        let refused = |cpus: &str| not_the_boot_core(&topology, &cpus.parse().unwrap());
        for cpus in ["0", "12", "6-12"] {
            let why = refused(cpus).unwrap_err().to_string();
            assert!(why.starts_with("CPU 0,12 is the core of CPU 0"), "{why}");
        }
        refused("1-11,13-23").unwrap();
    }

    #[test]
    fn a_fence_for_loops_has_a_cpu_for_each_and_leaves_vms_and_devices_alone() {
        let host = MadeUpHost::new("5900x");
        let text = "isolated = \"6-7,18\"\npins = \"6,18\"\nmethod = \"hotplug\"\nidle_vm = 107\n\
                    reset_pci = true\nchain = [\"local:snippets/x\"]\nstat_interval = 60\n";
        let settings = settings::resolve(&host.root, text, "test", 1).unwrap();
        let found = for_loops(settings);
        let pins: Vec<String> = found.pins.iter().map(ToString::to_string).collect();
        assert_eq!(pins, ["6", "7", "18"]);
        assert_eq!(found.method, Method::Partition);
        assert_eq!((found.idle_vm, found.chain.len()), (None, 0));
        assert_eq!(found.listed_resets(false).count(), 0);
        assert_eq!(found.stat_interval, Some(60), "what the VM would have");
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
        // A fence keeps a VM off its CPUs, which does not pin it to the others.
        host.vm(102, &[4]);
        host.thread(102, 10200, "CPU 0/KVM", "0-5,12-17", 0);
        assert_eq!(taken("0-1"), [""; 0]);
        std::fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        assert_eq!(taken("0-1,23"), [""; 0]);
    }
}

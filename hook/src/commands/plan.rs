//! `hook plan`: what post-start would change now, from a dry run of post-start's own code.

use pinfold_core::cli::Output;
use pinfold_core::cli::report::{Step, applied_to_json};
use pinfold_core::cli::terminal::{Each, err, print, print_json};
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Applied, CpuSet, Exit, Host, Outcome, Report, Verbosity, printable};
use serde::Serialize;

use crate::own_steps::TOOL;
use crate::phases::Run;
use crate::state::step_times::{self, Times};

/// The options of `hook plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    vmid: VmId,
}

/// What post-start would do, and how long it took last time.
struct Plan {
    vmid: VmId,
    isolated: CpuSet,
    /// Whether the VM runs, so that its threads are in the plan.
    running: bool,
    steps: Vec<PlannedStep>,
    notes: Vec<String>,
}

/// A step of it.
struct PlannedStep {
    name: &'static str,
    label: &'static str,
    unknown: Option<String>,
    changes: Vec<Applied>,
    /// How long it took last time in seconds, if that is known.
    seconds: Option<f64>,
}

/// The command's whole run.
///
/// # Errors
/// If post-start would refuse to begin, or the host cannot be read.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let plan = make(&output.root(), args.vmid)?;
    if !output.json && !output.quiet {
        for note in &plan.notes {
            err(&format!("{TOOL}: {note}\n"));
        }
    }
    if output.json {
        print_json(&plan.to_json())?;
    } else {
        print(&printable(&plan.to_text(output.verbose)))?;
    }
    Ok(Exit::Success)
}

/// The plan of a VM with its notes, for a report.
///
/// # Errors
/// As [`run`].
pub(super) fn text(root: &Host, vmid: VmId) -> anyhow::Result<String> {
    let plan = make(root, vmid)?;
    let notes: String = (plan.notes.iter())
        .map(|note| format!("note: {note}\n"))
        .collect();
    Ok(notes + &plan.to_text(true))
}

/// Goes through post-start. Nothing is written, locked or saved.
fn make(root: &Host, vmid: VmId) -> anyhow::Result<Plan> {
    vm::check_exists(root, vmid)?;
    let root = root.clone().for_dry_run();
    let qemu = vm::find(&root, vmid)?;
    // It keeps the changes and prints nothing.
    let mut report = Report::new(TOOL, Verbosity::Quiet, true);
    let isolated = Run {
        root: root.clone(),
        report: &mut report,
        migrated_from: None,
    }
    .fence_vm(vmid, qemu.as_ref())?;
    anyhow::ensure!(report.failures() == 0, "VM {vmid}: cannot plan post-start");
    let mut notes = report.notes().to_vec();
    let last = step_times::last(&root, vmid).unwrap_or_else(|error| {
        notes.push(error.to_string());
        Times::new()
    });
    Ok(Plan {
        vmid,
        isolated,
        running: qemu.is_some(),
        steps: join(report.take_steps(), last),
        notes,
    })
}

/// Steps with how long they took; the same one twice in a row is one.
fn join(steps: Vec<Step>, last: Times) -> Vec<PlannedStep> {
    let mut times = Times::new();
    for (name, seconds) in last {
        match times.last_mut().filter(|(before, _)| *before == name) {
            Some((_, sum)) => *sum += seconds,
            None => times.push((name, seconds)),
        }
    }
    let mut joined: Vec<PlannedStep> = Vec::new();
    for Step {
        name,
        label,
        unknown,
        changes,
        ..
    } in steps
    {
        match joined.last_mut().filter(|before| before.name == name) {
            Some(before) => before.changes.extend(changes),
            None => joined.push(PlannedStep {
                name,
                label,
                unknown,
                changes,
                seconds: None,
            }),
        }
    }
    // From the end: steps that release CPUs of VMs that are gone were not in the last run.
    for step in joined.iter_mut().rev() {
        if let Some(at) = times.iter().rposition(|(name, _)| name == step.name) {
            step.seconds = Some(times[at].1);
            times.truncate(at);
        }
    }
    joined
}

impl PlannedStep {
    fn planned(&self) -> usize {
        self.changes
            .iter()
            .filter(|done| done.outcome == Outcome::Planned)
            .count()
    }

    fn to_text(&self, verbose: bool) -> String {
        let held = self
            .changes
            .iter()
            .filter(|done| matches!(done.outcome, Outcome::Refused(_)))
            .count();
        let what = match (&self.unknown, self.planned()) {
            (Some(why), _) => format!("unknown, {why}"),
            (None, 0) => "nothing to do".into(),
            (None, 1) => "1 change".into(),
            (None, count) => format!("{count} changes"),
        };
        let held = if held > 0 {
            format!(", {held} not movable (kernel-managed)")
        } else {
            String::new()
        };
        let seconds = self
            .seconds
            .map(|seconds| format!("; last time {seconds:.1} s"));
        let seconds = seconds.unwrap_or_default();
        let mut text = format!("{}: {what}{held}{seconds}\n", self.label);
        for done in &self.changes {
            let shown = match done.outcome {
                Outcome::Planned | Outcome::Foreign(_) | Outcome::Failed(_) => true,
                Outcome::Changed | Outcome::Already | Outcome::Gone | Outcome::Refused(_) => {
                    verbose
                }
            };
            if shown {
                text += &format!("  {done}\n");
            }
        }
        text
    }
}

impl Plan {
    fn to_text(&self, verbose: bool) -> String {
        let Self { vmid, isolated, .. } = self;
        let count: usize = self.steps.iter().map(PlannedStep::planned).sum();
        let state = if self.running { "runs" } else { "does not run" };
        let steps: String = self
            .steps
            .iter()
            .map(|step| step.to_text(verbose))
            .collect();
        let whose = if isolated.is_empty() {
            String::new()
        } else {
            format!(" and will have CPU {isolated}")
        };
        format!("VM {vmid} {state}{whose}: post-start would make {count} changes\n{steps}")
    }

    fn to_json(&self) -> impl Serialize {
        let steps = || {
            self.steps.iter().map(|step| StepInJson {
                changes: Each(|| {
                    let changes = step.changes.iter();
                    changes.map(|done| applied_to_json(Some(step.name), done))
                }),
                last_seconds: step.seconds,
                step: step.name,
                unknown: step.unknown.as_deref(),
            })
        };
        InJson {
            isolated: &self.isolated,
            notes: &self.notes,
            running: self.running,
            steps: Each(steps),
            vm: self.vmid,
        }
    }
}

/// A plan for programs.
#[derive(Serialize)]
struct InJson<'a, S: Serialize> {
    isolated: &'a CpuSet,
    notes: &'a [String],
    running: bool,
    steps: S,
    vm: VmId,
}

/// A step of it.
#[derive(Serialize)]
struct StepInJson<'a, C: Serialize> {
    changes: C,
    last_seconds: Option<f64>,
    step: &'static str,
    unknown: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::state::reservation::{Phase, Reservation};
    use pinfold_core::state::Store;

    fn vmid() -> VmId {
        "100".parse().unwrap()
    }

    fn isolated() -> CpuSet {
        "6-11,18-23".parse().unwrap()
    }

    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.settings(100, "layout = \"5900x\"");
        host
    }

    #[test]
    fn a_running_vm_has_all_steps_in_the_documented_order() {
        let host = host();
        host.vm(100, &[6, 6, 6]);
        host.thread(900, 900, "pinned", "5-6", 0);
        // As since Linux 6.12 with those that it holds.
        host.file("proc/irq/25/smp_affinity_list", "6");
        let held = host.root.path("proc/irq/25/smp_affinity_list");
        std::fs::set_permissions(held, std::os::unix::fs::PermissionsExt::from_mode(0o444))
            .unwrap();
        let before = host.snapshot();
        let plan = make(&host.root, vmid()).unwrap();
        let all = |from: &str, to: &str| -> String {
            isolated()
                .iter()
                .map(|cpu| format!("  CPU {cpu}: {from} -> {to}\n"))
                .collect()
        };
        assert_eq!(
            plan.to_text(false),
            format!(
                "VM 100 runs and will have CPU 6-11,18-23: post-start would make 39 changes\n\
                 baseline: nothing to do\n\
                 slices: 2 changes\n\
                 \x20 cgroup /system.slice: unset -> 0-5,12-17\n\
                 \x20 cgroup /qemu.slice: unset -> 0-5,12-17\n\
                 tasks: 1 change\n\
                 \x20 thread 900 (pinned): 5-6 -> 5\n\
                 offline: 12 changes\n\
                 {}\
                 irqs: 2 changes, 1 not movable (kernel-managed)\n\
                 \x20 default IRQ mask: 0-23 -> 0-5,12-17\n\
                 \x20 IRQ 24 (nvme0q0): 0-23 -> 0-5,12-17\n\
                 kthreads: 3 changes\n\
                 \x20 kthread 2 (kthreadd): 0-23 -> 0-5,12-17\n\
                 \x20 kthread 3 (kswapd0): 0-23 -> 0-5,12-17\n\
                 \x20 unbound workqueues: 0-23 -> 0-5,12-17\n\
                 online: 12 changes\n\
                 {}\
                 tuning: 1 change\n\
                 \x20 vm.stat_interval: 1 -> 120\n\
                 decouple: 3 changes\n\
                 \x20 cgroup /qemu-decoupled.slice: absent -> present\n\
                 \x20 cgroup /qemu-decoupled.slice/100.scope: absent -> present\n\
                 \x20 process 100 (kvm): /qemu.slice/100.scope -> /qemu-decoupled.slice/100.scope\n\
                 pins: 3 changes\n\
                 \x20 vCPU 1 (thread 10001): 6 -> 18\n\
                 \x20 vCPU 2 (thread 10002): 6 -> 7\n\
                 \x20 emulator thread 100 (kvm): 0-23 -> 0-5,12-17\n\
                 irqs: nothing to do, 1 not movable (kernel-managed)\n\
                 kthreads: nothing to do\n",
                all("online", "offline"),
                all("offline", "online")
            )
        );
        assert_eq!(host.snapshot(), before);
    }

    #[test]
    fn emulator_threads_go_to_the_vms_numa_node() {
        for (emulator, to) in [("", "1,7,9,15"), ("emulator = \"0-2\"\n", "0-2")] {
            let host = MadeUpHost::new("two-sockets");
            host.vm(100, &[3, 5]);
            host.settings(
                100,
                &format!(
                    "isolated = \"3,5,11,13\"\npins = \"auto\"\nmethod = \"hotplug\"\n{emulator}"
                ),
            );
            let text = make(&host.root, vmid()).unwrap().to_text(false);
            let line = format!("  emulator thread 100 (kvm): 0-15 -> {to}\n");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn a_vm_that_does_not_run_has_unknown_steps() {
        let host = host();
        host.conf(100, "cores: 3");
        let before = host.snapshot();
        let plan = make(&host.root, vmid()).unwrap();
        let text = plan.to_text(false);
        assert!(
            text.starts_with(
                "VM 100 does not run and will have CPU 6-11,18-23: post-start would make "
            ),
            "{text}"
        );
        for line in [
            "offline: 12 changes\n  CPU 6: online -> offline\n",
            "pins: unknown, its QEMU is needed\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let json = serde_json::json!(plan.to_json());
        assert_eq!(json["steps"][8]["unknown"], "its QEMU is needed");
        assert_eq!(host.snapshot(), before);
    }

    #[test]
    fn a_vm_that_is_fenced_keeps_its_cpus_online() {
        let host = host();
        host.vm(100, &[6, 18]);
        host.reserve(
            100,
            Phase::Isolated,
            "layout = \"5900x\"\ngovernor = \"keep\"",
        );
        for (file, text) in [
            ("proc/irq/24/smp_affinity_list", "0-5,12-17"),
            ("sys/devices/virtual/workqueue/cpumask", "03f03f"),
            ("proc/irq/default_smp_affinity", "03f03f"),
        ] {
            host.file(file, text);
        }
        let plan = make(&host.root, vmid()).unwrap();
        assert!(
            plan.steps.iter().all(|step| step.name != "offline"),
            "{}",
            plan.to_text(true)
        );
        let vcpus = plan.steps.iter().find(|step| step.name == "pins").unwrap();
        assert!(
            vcpus
                .to_text(true)
                .contains("  vCPU 1 (thread 10001): already 18\n"),
            "{}",
            vcpus.to_text(true)
        );
    }

    #[test]
    fn what_post_start_would_refuse_is_refused() {
        let host = host();
        host.conf(100, "cores: 13");
        let error = make(&host.root, vmid())
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("the VM has 13 vCPUs but only 12 pins"),
            "{error}"
        );
        let error = make(&host.root, "101".parse().unwrap())
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("VM 101: no such VM on this node"), "{error}");
    }

    #[test]
    fn it_shows_how_long_steps_took_last_time() {
        let host = host();
        host.conf(100, "cores: 2");
        let store: Store<Reservation> =
            Store::open(&host.root, std::time::Duration::from_secs(1)).unwrap();
        step_times::keep(&store, vmid(), &[("slices", 9.0)]).unwrap();
        step_times::keep(
            &store,
            vmid(),
            &[("slices", 0.625), ("offline", 2.0), ("offline", 1.0)],
        )
        .unwrap();
        step_times::keep(&store, "101".parse().unwrap(), &[("irqs", 7.0)]).unwrap();
        let text = make(&host.root, vmid()).unwrap().to_text(false);
        for line in [
            "slices: 1 change; last time 0.6 s\n",
            "offline: 12 changes; last time 3.0 s\n",
            "irqs: 2 changes\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        host.file("run/pinfold/times.json", "garbage");
        assert!(
            make(&host.root, vmid())
                .unwrap()
                .notes
                .iter()
                .any(|note| note.contains("times.json"))
        );
    }

    #[test]
    fn times_go_with_their_steps() {
        let step = |name| {
            let mut report = Report::new("test", Verbosity::Quiet, true);
            report.step(name);
            report.steps()[0].clone()
        };
        let steps = ["irqs", "slices", "irqs", "pins", "pins", "irqs", "pace"].map(step);
        let last = [
            ("slices", 1.0),
            ("irqs", 2.0),
            ("pins", 3.0),
            ("pins", 4.0),
            ("irqs", 5.0),
        ];
        let last = last
            .map(|(name, seconds)| (name.to_owned(), seconds))
            .into();
        let joined: Vec<_> = join(steps.into(), last)
            .into_iter()
            .map(|step| (step.name, step.seconds))
            .collect();
        assert_eq!(
            joined,
            [
                ("irqs", None),
                ("slices", Some(1.0)),
                ("irqs", Some(2.0)),
                ("pins", Some(7.0)),
                ("irqs", Some(5.0)),
                ("pace", None)
            ]
        );
    }
}

//! The steps that have no tool of their own: caches and compaction, vm.stat_interval, the idle VM.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::exec;
use crate::settings::{PciReset, REMOVE, ResetPci, Settings};
use crate::state::reservation::Reservation;
use pinfold_core::knob::Value;
use pinfold_core::state::Store;
use pinfold_core::sys::pci::PciAddress;
use pinfold_core::sys::trace;
use pinfold_core::vm::{HugePages, LARGE, VmConf, VmId};
use pinfold_core::{CpuSet, Error, Host, Knob, Report, Result, Setting, apply_one, vm};

/// The name under which hook reports and saves values.
pub(crate) const TOOL: &str = "hook";

/// Removes what a killed `hook blame --trace` has left: the trace instances of processes that have
/// ended.
///
/// # Errors
/// If tracefs or a process cannot be read.
pub(crate) fn remove_dead_traces(root: &Host, report: &mut Report) -> Result<()> {
    for process in trace::left_behind(root)? {
        let knob = Knob::Trace(process);
        if let Some(found) = knob.read(root)? {
            let label = knob.to_string();
            let change = Setting::new(knob, label, found).want(CpuSet::new());
            report.changes(&[apply_one(root, change)]);
        }
    }
    Ok(())
}

/// The order of the kernel's blocks that hold a huge page of 2 MiB.
const HUGE_ORDER: usize = 9;
/// A page, in KiB.
const PAGE: u64 = 4;

/// What a NUMA node has for the huge pages that a VM asks for.
#[derive(Debug, PartialEq, Eq)]
struct NodePages {
    node: usize,
    /// The pages asked for, and how many of that size are free.
    wanted: Vec<(HugePages, u64)>,
    /// Free memory in blocks that pages of 2 MiB can be made of, in KiB.
    blocks: u64,
}

impl NodePages {
    /// What the nodes have now.
    fn look(root: &Host, wanted: &[HugePages]) -> Vec<Self> {
        let buddies = root.read("proc/buddyinfo").unwrap_or_default();
        let mut nodes: BTreeMap<usize, Vec<(HugePages, u64)>> = BTreeMap::new();
        for pages in wanted {
            let free = root.read_value(format!("{}/free_hugepages", pages.folder()));
            let free = free.ok().flatten().and_then(|free| free.parse().ok());
            let of_node = nodes.entry(pages.node).or_default();
            of_node.push((*pages, free.unwrap_or(0)));
        }
        let of_node = |(node, wanted)| Self {
            node,
            wanted,
            blocks: free_blocks(&buddies, node),
        };
        nodes.into_iter().map(of_node).collect()
    }

    /// The memory of the pages that are not free, in KiB. Proxmox VE makes them.
    fn missing(&self) -> u64 {
        let missing =
            |(pages, free): &(HugePages, u64)| pages.kib * pages.pages.saturating_sub(*free);
        (self.wanted.iter().map(missing)).fold(0, u64::saturating_add)
    }

    /// Whether the missing pages cannot be made of what is free.
    fn is_short(&self) -> bool {
        self.missing() > self.blocks
    }

    /// What is wanted and what is free, and what compaction has made of that.
    fn describe(&self, blocks_before: u64) -> String {
        let wanted: Vec<String> = (self.wanted.iter())
            .map(|(pages, free)| {
                let size = if pages.kib == LARGE { "1G" } else { "2M" };
                format!("{} huge pages of {size} wanted, {free} free", pages.pages)
            })
            .collect();
        let mut text = format!("node {}: {}", self.node, wanted.join(", "));
        if self.missing() > 0 {
            text += &format!(
                "; Proxmox VE has to make the rest ({} MiB); in free blocks of 2 MiB: {} MiB",
                self.missing() >> 10,
                blocks_before >> 10,
            );
        }
        if self.blocks != blocks_before {
            text += &format!(", {} MiB after compaction", self.blocks >> 10);
        }
        text
    }
}

/// Free memory of a node in blocks of at least 2 MiB, in KiB; from /proc/buddyinfo, see
/// proc_buddyinfo(5).
fn free_blocks(buddies: &str, node: usize) -> u64 {
    let prefix = format!("Node {node}, zone ");
    buddies
        .lines()
        .filter_map(|line| line.strip_prefix(&prefix))
        .flat_map(|line| {
            let counts = line.split_whitespace().skip(1);
            (0..).zip(counts).skip(HUGE_ORDER).take(16)
        })
        .map(|(order, count)| {
            count
                .parse::<u64>()
                .unwrap_or(0)
                .saturating_mul(PAGE << order)
        })
        .fold(0, u64::saturating_add)
}

/// Before the start of a VM: makes huge pages possible on its nodes, if they are not yet, by
/// compaction; only if that is not enough, caches are dropped too. With `Some(true)` all memory is
/// compacted and caches are dropped, with `Some(false)` nothing is done. Reports a line per node of
/// what is wanted, free and won; a shortage is a note, since Proxmox VE makes the pages.
pub(crate) fn tidy_caches(
    root: &Host,
    report: &mut Report,
    huge: &[HugePages],
    tidy: Option<bool>,
    deadline: Duration,
) {
    let before = NodePages::look(root, huge);
    compact(root, report, huge, tidy, deadline);
    for (earlier, node) in before.iter().zip(NodePages::look(root, huge)) {
        let text = node.describe(earlier.blocks);
        if node.is_short() {
            report.note(&format!(
                "{text}: the start may fail for lack of huge pages; {RESERVE}"
            ));
        } else {
            report.line(&text);
        }
    }
}

/// What to do about too few huge pages.
pub(crate) const RESERVE: &str =
    "reserve them at boot, as with hugepagesz=1G hugepages=N, while memory is not fragmented";

/// Compacts memory, as far as the VM needs it or `tidy` asks for. A child does it, since the kernel
/// may take long; a failure is reported and does not stop the start.
fn compact(
    root: &Host,
    report: &mut Report,
    huge: &[HugePages],
    tidy: Option<bool>,
    deadline: Duration,
) {
    let until = Instant::now() + deadline;
    let run = |args: &[&str]| -> anyhow::Result<()> {
        let program = std::env::current_exe()?;
        let base = root.path("").display().to_string();
        let mut words = vec!["--sysroot", &base, "--quiet", "step", "tidy-caches"];
        words.extend(args);
        let left = until.saturating_duration_since(Instant::now());
        Ok(exec::run_apart(&program, &words, left)?)
    };
    let short_nodes = || -> CpuSet {
        let nodes = NodePages::look(root, huge).into_iter();
        nodes
            .filter(NodePages::is_short)
            .map(|it| it.node)
            .collect()
    };
    let always = tidy == Some(true);
    let nodes = short_nodes();
    if tidy == Some(false) || (!always && nodes.is_empty()) {
        return;
    }
    report.step("caches");
    let mut done = Ok(());
    if !always {
        done = run(&["--nodes", &nodes.to_string()]);
        if done.is_ok() && short_nodes().is_empty() {
            report.summary(&format!("caches: memory of node {nodes} compacted"));
            return;
        }
    }
    match done.and_then(|()| run(&[])) {
        Ok(()) => report.summary("caches: dropped, memory compacted"),
        // Proxmox VE may find pages all the same, and reports it if it does not.
        Err(error) => report.note(&format!("caches: {error:#}")),
    }
}

/// The changes behind [`tidy_caches`]: caches dropped and all memory compacted, or only the memory
/// of these nodes. See admin-guide/sysctl/vm.rst, `drop_caches` and `compact_memory`.
pub(crate) fn tidy_caches_plan(nodes: Option<&CpuSet>) -> Vec<pinfold_core::Change> {
    let trigger = |knob: Knob, value: &str| {
        Setting::new(knob.clone(), knob.to_string(), Value::text("")).want(Value::text(value))
    };
    match nodes {
        Some(nodes) => nodes
            .iter()
            .map(|node| trigger(Knob::NodeCompaction(node), "1"))
            .collect(),
        None => [("vm/drop_caches", "3"), ("vm/compact_memory", "1")]
            .into_iter()
            .map(|(name, value)| trigger(Knob::Trigger(name.into()), value))
            .collect(),
    }
}

/// Functions to be reset in one way.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reset {
    pub functions: Vec<PciAddress>,
    /// [`REMOVE`], or a name of the kernel's reset_method.
    pub method: String,
    /// Whether the VM must not start without it.
    pub required: bool,
}

/// What is to be reset for a VM before it starts, or else after it has stopped. A device that keeps
/// its driver is not among it.
///
/// # Errors
/// If sysfs cannot be read, or no device of a mapping is free.
pub(crate) fn resets(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
    is_before: bool,
) -> Result<Vec<Reset>> {
    if settings.reset_pci == ResetPci::OfVm(true) {
        let functions = match is_before {
            true => pci_reset::functions_of_vm(root, vmid, conf)?,
            false => Vec::new(),
        };
        return Ok(vec![Reset {
            functions,
            method: REMOVE.into(),
            required: false,
        }]);
    }
    let kept = pci_reset::kept(root, conf)?;
    let mut resets: Vec<Reset> = Vec::new();
    for PciReset {
        device,
        method,
        required,
        ..
    } in settings.listed_resets(is_before)
    {
        let mut functions = pci_reset::functions_of(root, &[*device])?;
        functions.retain(|function| !kept.contains(function));
        let same = |reset: &&mut Reset| reset.method == *method && reset.required == *required;
        match resets.iter_mut().find(same) {
            Some(reset) => reset.functions.extend(functions),
            None => resets.push(Reset {
                functions,
                method: method.clone(),
                required: *required,
            }),
        }
    }
    Ok(resets)
}

/// The change that has the kernel reset a function.
pub(crate) fn pci_reset_by_kernel(address: &PciAddress) -> pinfold_core::Change {
    let knob = Knob::PciReset(address.to_string());
    Setting::new(knob.clone(), knob.to_string(), Value::text("")).want(Value::text("1"))
}

/// Has the kernel reset functions by one of its methods. The methods that were set before are in the
/// baseline meanwhile, and set again afterwards.
///
/// # Errors
/// If a function is in use, does not have the method, or is not reset in time.
pub(crate) fn reset_by_kernel(
    store: &mut Store<Reservation>,
    report: &mut Report,
    functions: &[PciAddress],
    method: &str,
    deadline: Duration,
) -> anyhow::Result<()> {
    let root = store.root().clone();
    pci_reset::check(&root, functions)?;
    let objects = functions.iter().map(|address| {
        let knob = Knob::PciResetMethod(address.to_string());
        let found = knob.read(&root)?;
        let found = found.ok_or_else(|| {
            let why = "it does not exist, or the kernel cannot reset it";
            Error::unusable(format!("PCI {address}"), why)
        })?;
        Ok(Setting::new(knob.clone(), knob.to_string(), found))
    });
    let objects = objects.collect::<Result<Vec<Setting>>>()?;
    let earlier = report.failures();
    let plan = store
        .baseline
        .plan(objects.clone(), |_, _| Value::text(method));
    store.carry_out(plan, |done| report.changes(std::slice::from_ref(done)))?;
    let mut done = Ok(());
    if report.failures() == earlier {
        let names: Vec<String> = functions.iter().map(ToString::to_string).collect();
        let base = root.path("").display().to_string();
        let mut words = vec!["--sysroot", &base, "--quiet", "step", "reset-pci"];
        words.extend(names.iter().map(String::as_str));
        done = std::env::current_exe().and_then(|it| exec::run_apart(&it, &words, deadline));
    }
    let set: Vec<Setting> = (objects.into_iter())
        .filter_map(|object| {
            let found = object.knob.read(&root).ok().flatten()?;
            Some(Setting { found, ..object })
        })
        .collect();
    let knobs: Vec<Knob> = set.iter().map(|object| object.knob.clone()).collect();
    let plan = store.baseline.plan(set, |_, before| before.clone());
    store.carry_out(plan, |done| report.changes(std::slice::from_ref(done)))?;
    for knob in knobs {
        if knob.read(&root).ok().flatten().as_ref() == store.baseline.before(&knob) {
            store.baseline.forget(&knob);
        }
    }
    store.save()?;
    done?;
    anyhow::ensure!(
        report.failures() == earlier,
        "PCI reset by {method}: not done"
    );
    Ok(())
}

/// The sysctl for the interval of the kernel's statistics.
const STAT_INTERVAL: &str = "vm/stat_interval";

/// Whether a knob is vm.stat_interval.
pub(crate) fn is_stat_interval(knob: &Knob) -> bool {
    matches!(knob, Knob::Sysctl(name) if name == STAT_INTERVAL)
}

/// vm.stat_interval, if the kernel has it.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn stat_interval(root: &Host) -> Result<Option<Setting>> {
    let knob = Knob::Sysctl(STAT_INTERVAL.into());
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

/// How long KVM polls, if KVM is there.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn halt_polling(root: &Host) -> Result<Option<Setting>> {
    let found = Knob::HaltPolling.read(root)?;
    Ok(found.map(|found| Setting::new(Knob::HaltPolling, Knob::HaltPolling.to_string(), found)))
}

/// Whether the idle VM runs.
///
/// # Errors
/// If its pid file cannot be read.
pub(crate) fn idle_vm_runs(root: &Host, idle: u32) -> Result<bool> {
    Ok(vm::find(root, VmId::try_from(idle)?)?.is_some())
}

/// Shuts the idle VM down and waits for it, if it runs.
///
/// # Errors
/// If `qm` fails, or the VM does not stop in time.
pub(crate) fn stop_idle_vm(
    root: &Host,
    report: &mut Report,
    idle: u32,
    deadline: Duration,
) -> anyhow::Result<()> {
    if !idle_vm_runs(root, idle)? {
        return Ok(());
    }
    check_live(root)?;
    // qm waits itself; hook waits a little longer, so that qm's own message is reported.
    let seconds = deadline.as_secs().to_string();
    exec::run(
        "qm",
        &["shutdown", &idle.to_string(), "--timeout", &seconds],
        deadline + Duration::from_secs(5),
    )?;
    report.did(&format!("idle VM {idle} stopped"));
    Ok(())
}

/// Starts the idle VM, if it does not run.
///
/// # Errors
/// If `qm` fails or takes too long.
pub(crate) fn start_idle_vm(
    root: &Host,
    report: &mut Report,
    idle: u32,
    deadline: Duration,
) -> anyhow::Result<()> {
    if idle_vm_runs(root, idle)? {
        return Ok(());
    }
    check_live(root)?;
    exec::run("qm", &["start", &idle.to_string()], deadline)?;
    report.did(&format!("idle VM {idle} started"));
    Ok(())
}

/// How long Proxmox VE may take to change a VM's settings: it waits 10 s for their lock.
const SET_DEADLINE: Duration = Duration::from_secs(30);

/// Changes a VM's settings by `qm` with these arguments.
///
/// # Errors
/// If `qm` fails or takes too long.
pub(crate) fn set_on_vm(root: &Host, words: &[String]) -> Result<()> {
    check_live(root)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let set = exec::run("qm", &words, SET_DEADLINE);
    set.map(drop)
        .map_err(|error| Error::unusable("qm", error.to_string()))
}

fn check_live(root: &Host) -> Result<()> {
    let why =
        "VMs can only be changed, started and stopped on the running host, not below --sysroot";
    if root.is_live() {
        Ok(())
    } else {
        Err(Error::unusable("qm", why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_counts_in_blocks_of_huge_pages() {
        let text = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3\n\
                    Node 0, zone   Normal  99999     50     20      1      1      1      1      1      1      2      1\n\
                    Node 1, zone   Normal      1      x\n\
                    Node 10, zone Normal 0 0 0 0 0 0 0 0 0 9 9\ngarbage";
        // Three of 2 MiB and four of 4 MiB.
        assert_eq!(free_blocks(text, 0), (3 * 2 + 4 * 4) * 1024);
        assert_eq!(free_blocks(text, 1), 0);
        assert_eq!(free_blocks("", 0), 0);
    }

    #[test]
    fn nothing_is_done_while_there_are_enough() {
        let dir = tempfile::tempdir().unwrap();
        let root = Host::new(dir.path());
        let conf = VmConf::parse("hugepages: 2\nnuma: 1\nmemory: 16");
        let huge = vm::huge_pages(&root, &conf);
        let is_short = || NodePages::look(&root, &huge)[0].is_short();
        assert!(is_short());
        let pages = dir
            .path()
            .join("sys/devices/system/node/node0/hugepages/hugepages-2048kB");
        std::fs::create_dir_all(&pages).unwrap();
        std::fs::write(pages.join("free_hugepages"), "7\n").unwrap();
        assert!(is_short());
        std::fs::create_dir_all(dir.path().join("proc")).unwrap();
        let line = "Node 0, zone Normal 0 0 0 0 0 0 0 0 0 1 0\n";
        std::fs::write(dir.path().join("proc/buddyinfo"), line).unwrap();
        assert!(!is_short());
        let mut report = Report::new("hook", pinfold_core::Verbosity::Quiet, false);
        // This program would run itself.
        tidy_caches(&root, &mut report, &huge, None, Duration::ZERO);
        tidy_caches(&root, &mut report, &[], None, Duration::ZERO);
        assert!(report.steps().is_empty() && report.notes().is_empty());
        std::fs::write(dir.path().join("proc/buddyinfo"), "").unwrap();
        tidy_caches(&root, &mut report, &huge, Some(false), Duration::ZERO);
        assert!(report.steps().is_empty());
        assert_eq!(
            report.notes(),
            [
                "node 0: 8 huge pages of 2M wanted, 7 free; Proxmox VE has to make the rest (2 MiB); in free blocks \
                 of 2 MiB: 0 MiB: the start may fail for lack of huge pages; reserve them at boot, as with \
                 hugepagesz=1G hugepages=N, while memory is not fragmented"
            ]
        );
    }

    #[test]
    fn what_a_node_has_and_what_compaction_won() {
        let page = |kib, pages| HugePages {
            node: 1,
            kib,
            pages,
        };
        let mut node = NodePages {
            node: 1,
            wanted: vec![(page(2048, 500), 500), (page(LARGE, 4), 4)],
            blocks: 0,
        };
        assert_eq!(
            node.describe(0),
            "node 1: 500 huge pages of 2M wanted, 500 free, 4 huge pages of 1G wanted, 4 free"
        );
        node.wanted = vec![(page(LARGE, 4), 1)];
        node.blocks = 7 << 20;
        assert!(!node.is_short());
        assert_eq!(
            node.describe(2 << 20),
            "node 1: 4 huge pages of 1G wanted, 1 free; Proxmox VE has to make the rest (3072 MiB); in free blocks \
             of 2 MiB: 2048 MiB, 7168 MiB after compaction"
        );
    }
}

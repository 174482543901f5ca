//! pin-kthreads: moves kernel threads to a set of CPUs, and the unbound workqueues.
//!
//! Threads that are not movable (PF_NO_SETAFFINITY: per-CPU threads, workers) are not tried. Workers
//! of unbound workqueues have that flag too and follow only the workqueues' mask, which is why the
//! tool sets it.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Parser;
use pinfold_core::cli::filter::{Filter, FilterArgs};
use pinfold_core::cli::{self, Common};
use pinfold_core::sys::cpu;
use pinfold_core::sys::task::{self, KTHREADD, Task};
use pinfold_core::{
    Applied, CpuSet, CpuSetPool, Error, Exit, Host, Knob, Outcome, Result, Selector, Setting, Table,
};

const TOOL: &str = "pin-kthreads";

/// The unbound workqueues' name for --only and --except.
const WORKQUEUES: &str = "workqueues";

/// Move kernel threads to a set of CPUs
///
/// Sets the CPUs of every kernel thread that can be moved, kthreadd first, since new ones inherit
/// its CPUs; then the mask of the unbound workqueues, which --only and --except call `workqueues`.
/// Threads that the kernel binds are counted and not changed.
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
pub struct Args {
    /// CPUs by logical number, as in 0-5,12-17, or by selector, as in llc:0; see `hook layout`
    #[arg(required_unless_present_any = ["list", "restore"], conflicts_with_all = ["list", "restore"])]
    cpus: Option<Selector>,

    #[command(flatten)]
    filter: FilterArgs,

    #[command(flatten)]
    common: Common,
}

/// The kernel threads, by whether user space may move them.
#[derive(Debug, Default)]
struct Kthreads {
    /// Those that may be moved, kthreadd first, and then the unbound workqueues' mask.
    movable: Vec<Setting>,
    /// Those that are not movable.
    bound: Vec<Task>,
}

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(knob, Knob::Kthread(_) | Knob::Workqueues)
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        return Ok(cli::listed(&mut report, &list(&root, &args.filter)?));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let cpus = args
        .cpus
        .map(|cpus| cpus.resolve(&root))
        .transpose()?
        .unwrap_or_default();
    cpu::check_usable(&root, &cpus)?;
    let offline = &cpus - &cpu::online(&root)?;
    if !offline.is_empty() {
        report.note(&format!(
            "CPU {offline}: offline and left out; kernel threads will not use it once it is online again"
        ));
    }
    // Older kernels leave them out by themselves, so what was set would not be what reads back.
    let cpus = &cpus - &offline;
    let Kthreads { movable, bound } =
        chosen(&root, &args.filter, &kthreads(&root, &BTreeMap::new())?)?;
    let changes = movable
        .into_iter()
        .map(|object| args.filter.change(object, &cpus))
        .collect();
    for task in bound {
        let change = Setting::new(Knob::Kthread(task.id), label(&task), CpuSet::new()).want(&cpus);
        report.changes(&[Applied {
            change,
            outcome: Outcome::Refused("the kernel binds this thread itself".into()),
        }]);
    }
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

/// The kernel threads of a run. A thread's name and flags are read only once.
#[derive(Debug, Default)]
pub struct Threads {
    known: BTreeMap<i32, Task>,
}

impl Threads {
    /// The threads that may be moved, kthreadd first, and the unbound workqueues' mask.
    ///
    /// # Errors
    /// If /proc cannot be read, or shows no kernel threads.
    pub fn settings(&mut self, root: &Host) -> Result<Vec<Setting>> {
        let tasks = kthreads(root, &self.known)?;
        let Kthreads { movable, .. } = chosen(root, &FilterArgs::default(), &tasks)?;
        self.known = tasks.into_iter().map(|task| (task.id.pid, task)).collect();
        Ok(movable)
    }

    /// The threads that may be moved and that were not there at the last look; only these are read.
    ///
    /// # Errors
    /// As [`settings`](Self::settings).
    pub fn newborns(&mut self, root: &Host) -> Result<Vec<Setting>> {
        let mut tasks = kthreads(root, &self.known)?;
        tasks.retain(|task| !self.known.contains_key(&task.id.pid));
        let Kthreads { mut movable, .. } = chosen(root, &FilterArgs::default(), &tasks)?;
        movable.retain(|setting| setting.knob != Knob::Workqueues);
        self.known
            .extend(tasks.into_iter().map(|task| (task.id.pid, task)));
        Ok(movable)
    }
}

/// The kernel threads that the options choose.
fn chosen(root: &Host, filter: &FilterArgs, tasks: &[Task]) -> Result<Kthreads> {
    let mut matcher = filter.filter();
    let mut kthreads = Kthreads::default();
    let mut masks = CpuSetPool::default();
    for task in tasks {
        if !is_chosen(&mut matcher, task) {
            continue;
        }
        if task.bound {
            kthreads.bound.push(task.clone());
        } else if let Some(cpus) = affinity(root, task)? {
            let (knob, cpus) = (Knob::Kthread(task.id), masks.share(cpus));
            kthreads.movable.push(Setting::new(knob, label(task), cpus));
        }
    }
    kthreads.movable.extend(workqueues(root, &mut matcher)?);
    matcher.check("kernel thread")?;
    Ok(kthreads)
}

fn is_chosen(matcher: &mut Filter<'_>, task: &Task) -> bool {
    matcher.takes(task.id.pid.unsigned_abs().into(), &task.name)
}

/// All kernel threads, kthreadd first.
fn kthreads(root: &Host, known: &BTreeMap<i32, Task>) -> Result<Vec<Task>> {
    let tasks = match task::kthreads_again(root, known) {
        // With hidepid=1 an ordinary user sees that they are there, with hidepid=2 not even that.
        Err(error) if error.is_denied() => Vec::new(),
        tasks => tasks?,
    };
    if tasks.first().is_none_or(|task| task.id.pid != KTHREADD) {
        let why = "no kernel threads found; is this a container, or is /proc mounted with hidepid?";
        return Err(Error::unusable(
            root.path("proc").display().to_string(),
            why,
        ));
    }
    Ok(tasks)
}

/// The CPUs of a thread; `None` if it has ended.
fn affinity(root: &Host, task: &Task) -> Result<Option<CpuSet>> {
    match task::affinity(root, &task.id) {
        Ok(cpus) => Ok(Some(cpus)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The unbound workqueues' mask; `None` if it was not chosen or this kernel has none.
fn workqueues(root: &Host, matcher: &mut Filter<'_>) -> Result<Option<Setting>> {
    let knob = Knob::Workqueues;
    if !matcher.takes_word(WORKQUEUES) {
        return Ok(None);
    }
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

fn label(task: &Task) -> String {
    format!("kthread {} ({})", task.id.pid, task.name)
}

fn list(root: &Host, filter: &FilterArgs) -> Result<Table> {
    let mut matcher = filter.filter();
    let mut table = Table::new(&["pid", "name", "cpus", "last cpu", "movable"]);
    for task in kthreads(root, &BTreeMap::new())? {
        if !is_chosen(&mut matcher, &task) {
            continue;
        }
        let Some(cpus) = affinity(root, &task)? else {
            continue;
        };
        let movable = if task.bound { "bound" } else { "movable" };
        table.row([
            task.id.pid.to_string(),
            task.name,
            cpus.to_string(),
            task.last_cpu.to_string(),
            movable.into(),
        ]);
    }
    if let Some(mask) = workqueues(root, &mut matcher)? {
        table.row([
            WORKQUEUES.into(),
            mask.label.to_string(),
            mask.found.to_string(),
            String::new(),
            "movable".into(),
        ]);
    }
    matcher.check("kernel thread")?;
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_valid() {
        Args::command().debug_assert();
    }
}

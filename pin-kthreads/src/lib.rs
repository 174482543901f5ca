//! pin-kthreads: moves kernel threads to a set of CPUs, and the unbound workqueues.
//!
//! Threads that the kernel binds itself (PF_NO_SETAFFINITY: per-CPU threads, workers) are never
//! tried. Workers of unbound workqueues carry that flag too and obey the workqueues' mask alone,
//! which is why it is moved along.

use std::process::ExitCode;

use clap::Parser;
use pinfold_core::cli::{self, Common};
use pinfold_core::process::{self, KTHREADD, Task};
use pinfold_core::select::{Choice, Select};
use pinfold_core::{
    CpuExpr, CpuSet, Done, Error, Exit, Knob, Object, Outcome, Result, Sysroot, Table, cpu,
};

const TOOL: &str = "pin-kthreads";

/// What --only and --except call the unbound workqueues' mask.
const WORKQUEUES: &str = "workqueues";

/// Move kernel threads to a set of CPUs
///
/// Sets the CPUs of every kernel thread that can be moved, kthreadd first, whose CPUs new ones
/// start with; then the mask of the unbound workqueues, which --only and --except call
/// `workqueues`. Threads that the kernel binds itself are counted and left.
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
pub struct Args {
    /// CPUs by logical number, as in 0-5,12-17, or by selector, as in llc:0; see `hook layout`
    #[arg(required_unless_present_any = ["list", "restore"], conflicts_with_all = ["list", "restore"])]
    cpus: Option<CpuExpr>,

    #[command(flatten)]
    select: Select,

    #[command(flatten)]
    common: Common,
}

/// The kernel threads, by whether user space may move them.
#[derive(Debug, Default)]
pub struct Kthreads {
    /// Those that may be moved, kthreadd first; behind them the unbound workqueues' mask.
    pub movable: Vec<Object>,
    /// Those that the kernel binds itself.
    pub bound: Vec<Task>,
}

/// The command's whole run.
pub fn main() -> ExitCode {
    cli::main(TOOL, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        return Ok(cli::listed(&mut report, &list(&root, &args.select)?));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL)? {
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
            "CPU {offline}: offline and left out; kernel threads will not use it when it is online again"
        ));
    }
    // Older kernels leave them out by themselves, so what was set would not be what reads back.
    let cpus = &cpus - &offline;
    let Kthreads { movable, bound } = chosen(&root, &args.select)?;
    let changes = movable
        .into_iter()
        .map(|object| args.select.change(object, &cpus))
        .collect::<Result<_>>()?;
    for task in bound {
        let change = Object::new(Knob::Kthread(task.id), label(&task), "").want(cpus.to_string());
        report.changes(&[Done {
            change,
            outcome: Outcome::Refused("the kernel binds this thread itself".into()),
        }]);
    }
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

/// All kernel threads, and the unbound workqueues' mask.
///
/// # Errors
/// Where /proc cannot be read, or shows no kernel threads.
pub fn objects(root: &Sysroot) -> Result<Kthreads> {
    chosen(root, &Select::default())
}

/// The kernel threads that the options choose.
fn chosen(root: &Sysroot, select: &Select) -> Result<Kthreads> {
    let mut choice = select.choice();
    let mut kthreads = Kthreads::default();
    for task in tasks(root, &mut choice)? {
        if task.bound {
            kthreads.bound.push(task);
        } else if let Some(cpus) = affinity(root, &task)? {
            kthreads.movable.push(Object::new(
                Knob::Kthread(task.id),
                label(&task),
                cpus.to_string(),
            ));
        }
    }
    kthreads.movable.extend(workqueues(root, &mut choice)?);
    choice.check("kernel thread")?;
    Ok(kthreads)
}

fn tasks(root: &Sysroot, choice: &mut Choice<'_>) -> Result<Vec<Task>> {
    let mut tasks = match process::kthreads(root) {
        // With hidepid=1 an ordinary user is told that they are there, with hidepid=2 not even
        // that.
        Err(error) if error.is_denied() => Vec::new(),
        tasks => tasks?,
    };
    if tasks.first().is_none_or(|task| task.id.pid != KTHREADD) {
        let why =
            "no kernel threads to be seen; is this a container, or is /proc mounted with hidepid?";
        return Err(Error::unusable(
            root.path("proc").display().to_string(),
            why,
        ));
    }
    tasks.retain(|task| choice.takes(task.id.pid.unsigned_abs().into(), &task.name));
    Ok(tasks)
}

/// The CPUs of a thread; `None` where it has ended.
fn affinity(root: &Sysroot, task: &Task) -> Result<Option<CpuSet>> {
    match process::affinity(root, &task.id) {
        Ok(cpus) => Ok(Some(cpus)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The unbound workqueues' mask; `None` where it was not chosen, or this kernel has none.
fn workqueues(root: &Sysroot, choice: &mut Choice<'_>) -> Result<Option<Object>> {
    let knob = Knob::Workqueues;
    if !choice.takes_word(WORKQUEUES) {
        return Ok(None);
    }
    Ok(knob
        .read(root)?
        .map(|found| Object::new(knob.clone(), knob.to_string(), found)))
}

fn label(task: &Task) -> String {
    format!("kthread {} ({})", task.id.pid, task.name)
}

fn list(root: &Sysroot, select: &Select) -> Result<Table> {
    let mut choice = select.choice();
    let mut table = Table::new(&["pid", "name", "cpus", "last cpu", "movable"]);
    for task in tasks(root, &mut choice)? {
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
    if let Some(mask) = workqueues(root, &mut choice)? {
        table.row([
            WORKQUEUES.into(),
            mask.label,
            mask.found,
            String::new(),
            "movable".into(),
        ]);
    }
    choice.check("kernel thread")?;
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_holds_together() {
        Args::command().debug_assert();
    }
}

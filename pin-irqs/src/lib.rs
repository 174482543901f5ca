//! pin-irqs: moves interrupts to a set of CPUs, the mask that new ones start with, and the CPUs of
//! network queues.
//!
//! The kernel never lets user space move some of them: managed queues (NVMe, virtio-blk) and timers.
//! That is not a failure.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::Parser;
use pinfold_core::cli::filter::FilterArgs;
use pinfold_core::cli::{self, Common};
use pinfold_core::sys::{cpu, irq};
use pinfold_core::{Applied, Change, Exit, Host, Knob, Outcome, Result, Selector, Setting, Table};

mod irqs;
mod queues;

pub use irqs::{Irqs, default_mask, settings};
pub use queues::queues;

const TOOL: &str = "pin-irqs";

/// The default mask's name for --only and --except.
const DEFAULT: &str = "default";

/// Move IRQs to a set of CPUs
///
/// Sets the CPUs of every IRQ that can be moved, and the default for new ones, which --only and
/// --except call `default`. IRQs that the kernel does not allow to move (managed queues, timers) are
/// counted and not changed. The masks of network queues (RPS) are narrowed to these CPUs, as
/// with --narrow; those that are empty, which means off, are not changed.
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

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(knob, Knob::Irq(_) | Knob::DefaultIrq | Knob::QueueCpus(_))
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        let unmovable = unmovable(&root)?;
        if unmovable.is_none() {
            report.note(
                "this kernel does not report which IRQs are movable; only trying to move them shows it",
            );
        }
        return Ok(cli::listed(
            &mut report,
            &list(&root, &args.filter, unmovable.as_ref())?,
        ));
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
    let mut changes = chosen(&root, &args.filter, &mut Irqs::default())?
        .into_iter()
        .map(|object| match (&object.knob, object.found.cpus()) {
            (Knob::QueueCpus(_), Some(found)) => {
                let narrowed = found.narrow_to(&cpus);
                object.want(narrowed)
            }
            _ => args.filter.change(object, &cpus),
        })
        .collect::<Vec<_>>();
    if args.common.dry_run {
        // Otherwise only a write shows it.
        let numbers = unmovable(&root)?.unwrap_or_default();
        let is_unmovable =
            |change: &mut Change| !change.is_noop() && is_among(&numbers, &change.knob);
        for change in changes.extract_if(.., is_unmovable) {
            report.changes(&[Applied {
                change,
                outcome: Outcome::Refused("its smp_affinity is read-only".into()),
            }]);
        }
    }
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

/// The IRQs that the kernel does not let user space move; `None` if it does not show them.
///
/// Kernels before 6.12 do not show them in what [`irq::is_unmovable`] reads. So if none is found,
/// nothing is known.
///
/// # Errors
/// If /proc/irq cannot be listed.
pub fn unmovable(root: &Host) -> Result<Option<BTreeSet<u32>>> {
    let mut unmovable = BTreeSet::new();
    for number in irqs::numbers(root)? {
        if irq::is_unmovable(root, number)? {
            unmovable.insert(number);
        }
    }
    Ok(Some(unmovable).filter(|numbers| !numbers.is_empty()))
}

fn is_among(irqs: &BTreeSet<u32>, knob: &Knob) -> bool {
    matches!(knob, Knob::Irq(number) if irqs.contains(number))
}

/// The settings that the options choose.
fn chosen(root: &Host, filter: &FilterArgs, irqs: &mut Irqs) -> Result<Vec<Setting>> {
    let mut matcher = filter.filter();
    let mut objects: Vec<Setting> = default_mask(root)?.into_iter().collect();
    objects.extend(irqs.settings(root)?);
    objects.extend(queues(root)?);
    objects.retain(|object| match &object.knob {
        Knob::Irq(number) => matcher.takes((*number).into(), irqs.name(*number)),
        Knob::QueueCpus(queue) => matcher.takes_name(&queues::name(queue)),
        _ => matcher.takes_word(DEFAULT),
    });
    matcher.check("interrupt")?;
    Ok(objects)
}

fn list(root: &Host, filter: &FilterArgs, unmovable: Option<&BTreeSet<u32>>) -> Result<Table> {
    let mut irqs = Irqs::default();
    let mut table = Table::new(&["irq", "name", "cpus", "effective", "movable"]);
    for object in chosen(root, filter, &mut irqs)? {
        let number = match &object.knob {
            Knob::Irq(number) => *number,
            knob => {
                let (irq, name) = match knob {
                    Knob::QueueCpus(queue) => ("rps", queues::name(queue)),
                    _ => (DEFAULT, String::new()),
                };
                table.row([
                    irq.into(),
                    name,
                    object.found.to_string(),
                    String::new(),
                    "yes".into(),
                ]);
                continue;
            }
        };
        let movable = match unmovable {
            None => "unknown",
            Some(unmovable) if unmovable.contains(&number) => "no",
            Some(_) => "yes",
        };
        let effective = irq::effective(root, number)?.to_string();
        table.row([
            number.to_string(),
            irqs.name(number).into(),
            object.found.to_string(),
            effective,
            movable.into(),
        ]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn command_line_is_valid() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_read_only_file_means_not_movable() {
        let dir = tempfile::tempdir().unwrap();
        let root = Host::new(dir.path());
        for number in [1, 24] {
            let irq = dir.path().join(format!("proc/irq/{number}"));
            fs::create_dir_all(&irq).unwrap();
            fs::write(irq.join("smp_affinity_list"), "0-3\n").unwrap();
        }
        fs::write(dir.path().join("proc/interrupts"), "CPU0\n").unwrap();
        fs::write(dir.path().join("proc/irq/default_smp_affinity"), "f\n").unwrap();
        let movable = || -> Vec<String> {
            let table = list(
                &root,
                &FilterArgs::default(),
                unmovable(&root).unwrap().as_ref(),
            )
            .unwrap();
            serde_json::to_value(table.to_json())
                .unwrap()
                .as_array()
                .unwrap()
                .iter()
                .map(|row| row["movable"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(movable(), ["yes", "unknown", "unknown"]);
        let file = dir.path().join("proc/irq/24/smp_affinity_list");
        fs::set_permissions(file, Permissions::from_mode(0o444)).unwrap();
        assert_eq!(movable(), ["yes", "yes", "no"]);
    }
}

//! pci-reset: removes PCI functions and rescans the bus, which resets devices that have no other
//! reset.
//!
//! Some devices, mainly graphics cards, do not work in a second guest until the host has found them
//! again.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Parser};
use pinfold_core::cli::{self, Common};
use pinfold_core::state::save::{self, Entry};
use pinfold_core::sys::pci::{self, PciAddress, PciSelector};
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Applied, Exit, Host, Knob, Outcome, Report, Result, Table};

mod devices;
mod in_use;
mod reset;

use in_use::InUse;

pub use devices::{PassedThrough, expand, functions_of, functions_of_vm, kept, passed_through};
pub use reset::{check, obstacles, plan, reset};

const TOOL: &str = "pci-reset";

/// How long functions may take to disappear, and then to come back, in seconds.
pub const DEFAULT_DEADLINE: u64 = 10;

/// Remove PCI functions and rescan the bus, which resets them
///
/// A function that is in use is not removed: one behind a mounted filesystem, swap or a network
/// interface that is up, the boot display, or one of a running VM. At the end, functions that did
/// not come back are listed. --list prints the ways in which the kernel can reset each function
/// itself (its reset_method), which `reset_pci` in hook's settings can choose instead.
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["vmid", "device", "list", "restore"])))]
pub struct Args {
    /// Reset the hostpci devices of this VM
    vmid: Option<VmId>,

    /// Reset these devices, as in 0000:01:00.0, or 01:00 for all functions of one
    #[arg(long, value_name = "ADDR", num_args = 1.., conflicts_with = "vmid")]
    device: Vec<PciSelector>,

    /// Also remove functions that are in use
    #[arg(long)]
    force: bool,

    /// How long to wait for functions to disappear, and then to come back
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_DEADLINE)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,

    #[command(flatten)]
    common: Common,
}

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(knob, Knob::PciFunction(_) | Knob::PciDriver(_))
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let Args {
        vmid,
        device,
        force,
        deadline,
        common,
    } = args;
    let root = common.output.root();
    let mut report = common.output.report(TOOL);
    if let Some(exit) = common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let functions = match vmid {
        Some(vmid) => functions_of_vm(&root, vmid, &vm::conf(&root, vmid)?)?,
        None if device.is_empty() => pci::addresses(&root)?,
        None => expand(&root, &device)?,
    };
    for address in functions
        .iter()
        .filter(|address| !pci::is_present(&root, address))
    {
        report.note(&format!("PCI {address}: not present; a rescan may find it"));
    }
    if common.list {
        if cli::check_root(&root).is_err() {
            report.note(
                "without root, devices reserved for VMs and disks used by ZFS and other exclusive users are not detected",
            );
        }
        return Ok(cli::listed(&mut report, &list(&root, &functions)?));
    }
    if let (Some(vmid), []) = (vmid, functions.as_slice()) {
        report.note(&format!(
            "VM {vmid}: no PCI device is passed through to it alone; nothing to do"
        ));
    }
    if common.dry_run {
        if !force {
            check(&root, &functions)?;
        }
        return Ok(dry_run(&root, &functions, &mut report));
    }
    cli::check_root(&root)?;
    if let Some(path) = &common.save {
        save::write(
            path,
            TOOL,
            plan(&root, &functions).iter().map(Entry::from).collect(),
        )?;
    }
    let done = reset(
        &root,
        &functions,
        force,
        Duration::from_secs(deadline),
        &mut report,
    );
    // What failed has been printed, function by function.
    match done {
        Err(error) if report.failures() == 0 => Err(error.into()),
        _ => Ok(report.finish()),
    }
}

fn dry_run(root: &Host, functions: &[PciAddress], report: &mut Report) -> Exit {
    let planned = |change| Applied {
        change,
        outcome: Outcome::Planned,
    };
    let removals: Vec<_> = plan(root, functions).into_iter().map(planned).collect();
    let returns: Vec<_> = removals
        .iter()
        .rev()
        .map(|done| planned(reset::back(&done.change)))
        .collect();
    report.changes(&removals);
    report.changes(&returns);
    report.finish()
}

fn list(root: &Host, functions: &[PciAddress]) -> Result<Table> {
    let mut table = Table::new(&[
        "address",
        "class",
        "id",
        "driver",
        "reset methods",
        "guarded by",
    ]);
    let in_use = InUse::read(root, functions)?;
    for address in functions {
        let found = match pci::function(root, *address) {
            Ok(found) => found,
            Err(error) if error.is_gone() => continue,
            Err(error) => return Err(error),
        };
        table.row([
            address.to_string(),
            format!("{:06x}", found.class),
            format!("{:04x}:{:04x}", found.vendor, found.device),
            found.driver.unwrap_or_default(),
            pci::reset_methods(root, address)?.join(" "),
            in_use.reasons(address).join("; "),
        ]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn command_line_is_valid() {
        super::Args::command().debug_assert();
    }
}

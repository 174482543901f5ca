//! The costs of all commands on hosts of three sizes, as a table.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::scale::command::{COMMANDS, HostState, POST_START};
use crate::scale::peers;
use crate::scale::tree::{self, Counts};

/// The hosts: a desktop, a server, and the largest that Proxmox VE runs on.
const HOSTS: [Counts; 4] = [
    Counts {
        cpus: 24,
        kthreads: 300,
        threads: 500,
        irqs: 100,
        vms: 2,
        vm_cores: None,
        pci: 32,
        settled: true,
    },
    // The host by which post-start is compared from version to version.
    Counts {
        cpus: 128,
        kthreads: 2000,
        threads: 2000,
        irqs: 2000,
        vms: 1,
        vm_cores: None,
        pci: 32,
        settled: true,
    },
    Counts {
        cpus: 512,
        kthreads: 5000,
        threads: 12_000,
        irqs: 4000,
        vms: 10,
        vm_cores: None,
        pci: 256,
        settled: true,
    },
    LARGEST,
];

/// The largest host.
pub const LARGEST: Counts = Counts {
    cpus: 2048,
    kthreads: 20_000,
    threads: 50_000,
    irqs: 16_000,
    vms: 40,
    vm_cores: None,
    pci: 1024,
    settled: true,
};

/// Measures and prints, a table for each host.
pub fn print(bins: &Path, out: &mut impl Write) -> Result<()> {
    for counts in HOSTS {
        host(bins, counts, out)?;
    }
    peers::print_live(out)
}

fn host(bins: &Path, counts: Counts, out: &mut impl Write) -> Result<()> {
    let scratch = TempDir::new().context("no folder for the measurements")?;
    let scratch = scratch.path();
    let made = || -> Result<TempDir> {
        let folder = TempDir::new().context("no folder for a host")?;
        tree::write(folder.path(), counts)?;
        Ok(folder)
    };
    let Counts {
        cpus,
        kthreads,
        threads,
        irqs,
        vms,
        pci,
        ..
    } = counts;
    writeln!(
        out,
        "\n{cpus} CPUs, {kthreads} kernel threads, {threads} threads, {irqs} IRQs, {vms} VMs, {pci} PCI functions\n"
    )?;
    writeln!(
        out,
        "| command | objects | calls | calls per object | instructions, M | peak memory, MiB |\n\
         |---|--:|--:|--:|--:|--:|"
    )?;
    let mut tree = made()?;
    let mut is_fenced = false;
    for command in COMMANDS {
        let run = |tree: &TempDir| command.run(bins, tree.path());
        let (calls, instructions, peak) = match command.host {
            HostState::Changed => (
                run(&made()?).calls(scratch)?,
                run(&made()?).instructions(scratch)?,
                run(&made()?).peak(scratch)?,
            ),
            state => {
                if state == HostState::Fenced && !is_fenced {
                    POST_START.run(bins, tree.path()).calls(scratch)?;
                    is_fenced = true;
                }
                let run = run(&tree);
                (
                    run.calls(scratch)?,
                    run.instructions(scratch)?,
                    run.peak(scratch)?,
                )
            }
        };
        let objects = (command.objects)(counts);
        line(out, &command.name(), objects, calls, instructions, peak)?;
    }
    tree = made()?;
    for (name, run) in peers::on_tree(tree.path()) {
        // One that is not installed is left out.
        if let Ok(calls) = run.calls(scratch) {
            let (instructions, peak) = (run.instructions(scratch)?, run.peak(scratch)?);
            line(out, name, counts.cpus, calls, instructions, peak)?;
        }
    }
    Ok(())
}

fn line(
    out: &mut impl Write,
    name: &str,
    objects: u32,
    calls: u64,
    instructions: u64,
    peak: u64,
) -> Result<()> {
    let per_object = ratio(calls, u64::from(objects.max(1)));
    let (instructions, peak) = (ratio(instructions, 1_000_000), ratio(peak, 1024));
    writeln!(
        out,
        "| `{name}` | {objects} | {calls} | {per_object:.1} | {instructions:.1} | {peak:.1} |"
    )?;
    Ok(out.flush()?)
}

/// A quotient for people.
#[expect(
    clippy::cast_precision_loss,
    reason = "shown with a digit after the point"
)]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

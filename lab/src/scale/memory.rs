//! Bound: no command takes more than 40 MB of memory on the largest host.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::scale::command::{COMMANDS, FOR_MEMORY};
use crate::scale::table::LARGEST;
use crate::scale::tree;

/// 40 MB.
const LIMIT_KIB: u64 = 40_000_000 / 1024;

/// Runs all commands on the largest host and prints their peak memory; an error that names those
/// that take more than the limit.
pub fn check(bins: &Path, out: &mut impl Write) -> Result<()> {
    let folder = TempDir::new().context("no folder for a host")?;
    let scratch = TempDir::new().context("no folder for the measurements")?;
    tree::write(folder.path(), LARGEST)?;
    let mut commands: Vec<_> = COMMANDS.iter().chain(&FOR_MEMORY).collect();
    // The one that changes the host is between those that need it before and after.
    commands.sort_by_key(|command| command.host);
    writeln!(out, "\npeak memory on {} CPUs, MiB", LARGEST.cpus)?;
    let mut faults = Vec::new();
    for command in commands {
        let kib = command.run(bins, folder.path()).peak(scratch.path())?;
        let line = format!(
            "{:<28} {:>6}.{}",
            command.name(),
            kib / 1024,
            kib % 1024 * 10 / 1024
        );
        writeln!(out, "{line}")?;
        out.flush()?;
        if kib > LIMIT_KIB {
            faults.push(line);
        }
    }
    ensure!(
        faults.is_empty(),
        "more memory than {} MiB:\n{}",
        LIMIT_KIB / 1024,
        faults.join("\n")
    );
    Ok(())
}

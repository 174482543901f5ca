//! Ends the hosts that a command started when the command ends: normally, by an error, or
//! by Ctrl-C.
//!
//! A process in a process group of its own waits for the end of its stdin, a pipe that only the
//! command holds open.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::host::{all_slots, lock_if_free};

/// While it lives, so do the hosts; dropping it ends them.
#[derive(Debug)]
pub struct Lifeline(Child);

impl Lifeline {
    /// Hosts that are started from now on end with it; those that run already stay.
    pub fn start() -> Result<Self> {
        let cache = Cache::open()?;
        let running = all_slots(&cache)
            .into_iter()
            .filter(|(_, slot)| slot.pid().is_some())
            .map(|(name, _)| name);
        let lab = std::env::current_exe().context("cannot find our own program")?;
        let child = Command::new(lab)
            .arg("end-hosts")
            .args(running)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("cannot start the process that ends the hosts")?;
        Ok(Self(child))
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // What it could not do, it has reported.
        let _ = self.0.wait();
    }
}

/// Waits for the end of `stdin`, then ends all running hosts that no other process uses, except
/// `kept`.
pub fn end_hosts(mut stdin: impl Read, kept: &[String]) -> Result<()> {
    stdin
        .read_to_end(&mut Vec::new())
        .context("cannot wait for the end of stdin")?;
    let cache = Cache::open()?;
    for (name, slot) in all_slots(&cache) {
        if kept.contains(&name) || slot.pid().is_none() {
            continue;
        }
        if let Some(_lock) = lock_if_free(&cache, &slot)? {
            slot.kill().with_context(|| format!("host {name}"))?;
        }
    }
    Ok(())
}

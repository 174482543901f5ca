//! irqbalance, which moves IRQs between CPUs, and the CPUs that it moves them to, asked for by its
//! socket.
//!
//! The socket is /run/irqbalance/irqbalancePID.sock. irqbalance reads one command of at most 500
//! bytes, checks that root has sent it by credentials that the kernel adds (SO_PASSCRED), answers
//! and closes it (irqbalance 1.9, irqbalance.c, `init_socket` and `sock_handle`).

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::task::{self, Task, TaskId};
use super::{cpu, socket};
use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

const FOLDER: &str = "run/irqbalance";

/// How long an answer may take: irqbalance does one thing after another.
const PATIENCE: Duration = Duration::from_secs(3);

/// A longer command is not read whole.
const MAX_COMMAND: usize = 499;
/// A longer answer is not one to `setup`.
const MAX_ANSWER: usize = 1 << 20;
/// A mask of this length is cut off.
const MAX_MASK: usize = 511;

/// The running irqbalances that have a socket.
///
/// # Errors
/// If /proc or the folder cannot be read.
pub fn running(root: &Sysroot) -> Result<Vec<Task>> {
    let names = match root.names(FOLDER) {
        Err(error) if error.is_gone() => return Ok(Vec::new()),
        names => names?,
    };
    let pid = |name: &String| {
        let pid = name.strip_prefix("irqbalance")?.strip_suffix(".sock")?;
        pid.parse::<i32>().ok()
    };
    names
        .iter()
        .filter_map(pid)
        .map(|pid| task::task(root, pid, pid))
        .filter(|task| !matches!(task, Err(error) if error.is_gone()))
        .collect()
}

/// The CPUs that it moves IRQs to, after its last round; `None` if it has ended. A change shows with
/// the next round, within ten seconds unless it was started with another interval.
///
/// # Errors
/// If it does not answer: it answers only to root.
pub(crate) fn cpus(root: &Sysroot, task: &TaskId) -> Result<Option<CpuSet>> {
    task::check_start(root, task)?;
    let path = root.path(format!("{FOLDER}/irqbalance{}.sock", task.pid));
    let failed = |source| Error::io(&path, "ask irqbalance", source);
    let answer = match send(root, task, "setup") {
        // It has ended, and left its socket.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        answer => answer.map_err(failed)?,
    };
    match banned(&answer) {
        Some(banned) => Ok(Some(&cpu::present(root)? - &banned)),
        None => Err(failed(io::Error::other("it does not list the CPUs"))),
    }
}

/// Sends a command and returns the answer, which is empty for most.
///
/// # Errors
/// If it does not take the command or does not close the connection in time.
pub(crate) fn send(root: &Sysroot, task: &TaskId, command: &str) -> io::Result<String> {
    if command.len() > MAX_COMMAND {
        return Err(io::Error::other(
            "the CPUs are more ranges than irqbalance reads",
        ));
    }
    let path = root.path(format!("{FOLDER}/irqbalance{}.sock", task.pid));
    let until = Instant::now() + PATIENCE;
    let mut stream = socket::connect(&path)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(command.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || answer.len() > MAX_ANSWER {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(String::from_utf8_lossy(&answer).into_owned()),
            Ok(read) => answer.extend_from_slice(&chunk[..read]),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                _ => return Err(error),
            },
        }
    }
}

/// The CPUs in the answer to `setup`: `SLEEP 10 IRQ 24 LOAD 0 DIFF 0 CLASS 3 BANNED 00fc0fc0`.
pub fn banned(answer: &str) -> Option<CpuSet> {
    let (_, mask) = answer.rsplit_once("BANNED ")?;
    let mask = mask.trim_end_matches('\0');
    (mask.len() < MAX_MASK)
        .then(|| CpuSet::from_mask(mask).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_banned_cpus_are_the_last_word() {
        let long = "f".repeat(MAX_MASK);
        for (answer, cpus) in [
            ("SLEEP 10 BANNED 00fc0fc0", Some("6-11,18-23")),
            (
                "SLEEP 1 IRQ 4 LOAD 0 DIFF 1 CLASS 0 BANNED 00000001,00000000",
                Some("32"),
            ),
            ("SLEEP 10 BANNED 00000000", Some("")),
            ("SLEEP 10 BANNED 00fc0fc0\n", Some("6-11,18-23")),
            ("SLEEP 10 BANNED 00fc0fc0\0", Some("6-11,18-23")),
            ("", None),
            ("SLEEP 10 BANNED ", None),
            ("SLEEP 10 BANNED 0-5", None),
            (&format!("BANNED {long}"), None),
        ] {
            let found = banned(answer).map(|cpus| cpus.to_string());
            assert_eq!(found.as_deref(), cpus, "{answer:?}");
        }
    }
}

//! What a program costs: system calls by strace(1), instructions by callgrind, peak memory by
//! getrusage(2).

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};

/// The Debian packages that measuring takes.
const NEEDED: [&str; 2] = ["strace", "valgrind"];

/// Stops early, with what to install, instead of in the middle.
pub fn check_tools() -> Result<()> {
    for package in NEEDED {
        let found = Command::new(package)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        ensure!(
            found.is_ok_and(|status| status.success()),
            "{package}: not found; install it: apt-get install {}",
            NEEDED.join(" ")
        );
    }
    Ok(())
}

/// A program with its arguments, and the exit codes it may have.
#[derive(Debug, Clone)]
pub struct Run {
    /// The program's path, or a name on PATH.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The exit codes that mean that it did its work.
    pub codes: &'static [i32],
}

impl Run {
    fn under(&self, wrapper: &[&str]) -> Result<()> {
        let mut words = wrapper.iter().copied().chain([&*self.program]);
        let first = words.next().context("no program")?;
        let mut command = Command::new(first);
        command.args(words).args(&self.args);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let output = command
            .output()
            .with_context(|| format!("{first}: cannot run"))?;
        self.check(output.status, &String::from_utf8_lossy(&output.stderr))
    }

    fn check(&self, status: ExitStatus, stderr: &str) -> Result<()> {
        if status.code().is_some_and(|code| self.codes.contains(&code)) {
            return Ok(());
        }
        let end: Vec<&str> = stderr.lines().rev().take(5).collect();
        let end: Vec<&str> = end.into_iter().rev().collect();
        bail!(
            "{} {}: {status}\n{}",
            self.program,
            self.args.join(" "),
            end.join("\n")
        )
    }

    /// System calls, those of its threads and children too.
    pub fn calls(&self, scratch: &Path) -> Result<u64> {
        let file = scratch.join("strace");
        let path = file.display().to_string();
        self.under(&["strace", "-f", "-c", "-o", &path])?;
        let text = fs::read_to_string(&file).with_context(|| format!("{path}: cannot read"))?;
        total_calls(&text).with_context(|| format!("{path}: no total"))
    }

    /// Instructions in user space.
    pub fn instructions(&self, scratch: &Path) -> Result<u64> {
        let file = scratch.join("callgrind");
        let log = format!("--log-file={}", file.display());
        self.under(&[
            "valgrind",
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            &log,
        ])?;
        let text = fs::read_to_string(&file)
            .with_context(|| format!("{}: cannot read", file.display()))?;
        collected(&text).with_context(|| format!("{}: no count", file.display()))
    }

    /// The most memory that it had resident, in KiB, by a run of our own program: the kernel has
    /// one figure for all children that were waited for.
    pub fn peak(&self, scratch: &Path) -> Result<u64> {
        let file = scratch.join("peak");
        let lab = std::env::current_exe().context("cannot find our own program")?;
        let (lab, path) = (lab.display().to_string(), file.display().to_string());
        self.under(&[&lab, "peak", &path, "--"])?;
        let text = fs::read_to_string(&file).with_context(|| format!("{path}: cannot read"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{path}: {text}"))
    }
}

/// Runs a command and writes its peak memory to a file, in KiB; its exit code.
pub fn peak_of(file: &Path, command: &[String]) -> Result<i32> {
    let [program, args @ ..] = command else {
        bail!("no program")
    };
    let status = Command::new(program)
        .args(args)
        .status()
        .with_context(|| format!("{program}: cannot run"))?;
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    fs::write(file, usage.max_rss().to_string())
        .with_context(|| format!("{}: cannot write", file.display()))?;
    Ok(status.code().unwrap_or(1))
}

/// The sum in the last line of `strace -c`: percent, seconds, microseconds per call, calls, errors
/// if any, `total`.
fn total_calls(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .rev()
        .find(|line| line.trim_end().ends_with(" total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// The count in callgrind's `==PID== Collected : N`.
fn collected(text: &str) -> Option<u64> {
    let (_, count) = text.split_once("Collected : ")?;
    count.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found() {
        let text = "% time     seconds  usecs/call     calls    errors syscall\n\
                    100.00    0.000000           0         1           getrandom\n\
                    ------ ----------- ----------- --------- --------- ------------------\n\
                    100.00    1.305996           8    152773        37 total\n";
        assert_eq!(total_calls(text), Some(152_773));
        assert_eq!(
            collected("==1== Events    : Ir\n==1== Collected : 1741799835\n==1==\n"),
            Some(1_741_799_835)
        );
        assert_eq!(total_calls(""), None);
        assert_eq!(collected(""), None);
    }
}

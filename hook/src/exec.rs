//! Runs other programs: argv without a shell, a deadline, and the program's message in the error.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pinfold_core::sys::task;
use pinfold_core::{Host, last_line};

/// How often a program that has closed its output is asked whether it has ended.
const ENDED_INTERVAL: Duration = Duration::from_millis(2);

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// An error in words (`systemctl set-property …: exit code 1: Unit x.slice not found.`) if it
/// cannot be started, does not end before the deadline (it is killed then) or ends with anything
/// but success.
pub(crate) fn run(program: &str, args: &[&str], deadline: Duration) -> io::Result<String> {
    let until = Instant::now() + deadline;
    let named = |why: String| io::Error::other(format!("{program} {}: {why}", args.join(" ")));
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| named(pinfold_core::os_text(&error)))?;
    match collect(&mut child, until) {
        Ok(Some((status, stdout, _))) if status.success() => Ok(stdout),
        Ok(Some((status, _, stderr))) => {
            // `exit status: 1`, `signal: 9 (SIGKILL)`
            let last = last_line(&stderr).unwrap_or("no error message");
            Err(named(format!("{status}: {last}")))
        }
        ended => {
            // It has not ended: kill it, so that no process waits for its pipes.
            let _ = child.kill();
            let _ = child.wait();
            match ended {
                Err(error) => Err(named(pinfold_core::os_text(&error))),
                _ => Err(named(format!(
                    "no answer within {} s; it was killed",
                    deadline.as_secs_f64()
                ))),
            }
        }
    }
}

/// How long a program that was killed may take to end.
const KILLED_WITHIN: Duration = Duration::from_secs(1);

/// Runs a program that may hang in the kernel: nothing waits for its output, of which the last line
/// is in the error. It is killed in time to be gone at the deadline; one that even SIGKILL does not
/// end keeps running.
///
/// # Errors
/// In words, if it cannot be started, takes too long or ends with anything but success.
pub(crate) fn run_apart(program: &Path, args: &[&str], deadline: Duration) -> io::Result<()> {
    let until = Instant::now() + deadline;
    let line = format!("{} {}", program.display(), args.join(" "));
    let named = |why: String| io::Error::other(format!("{line}: {why}"));
    let in_words = |error: io::Error| named(pinfold_core::os_text(&error));
    let (mut messages, stderr) = io::pipe().map_err(in_words)?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(in_words)?;
    let ended = wait_until(
        &mut child,
        until.checked_sub(KILLED_WITHIN).unwrap_or(until),
    );
    match ended.map_err(|error| named(pinfold_core::os_text(&error)))? {
        Some(status) if status.success() => return Ok(()),
        Some(status) => {
            let why =
                last_message(&mut messages).map_or_else(String::new, |line| format!(": {line}"));
            return Err(named(format!("{status}{why}")));
        }
        None => {}
    }
    // It may have ended just now.
    let _ = child.kill();
    Err(named(match wait_until(&mut child, until) {
        Ok(Some(_)) => format!(
            "not finished within {} s; it was killed",
            deadline.as_secs_f64()
        ),
        _ => format!(
            "process {} did not end within {} s and cannot be killed; it keeps running",
            child.id(),
            deadline.as_secs_f64()
        ),
    }))
}

/// The last line of what is in a pipe, which others may hold open.
fn last_message(pipe: &mut io::PipeReader) -> Option<String> {
    let has_text = |pipe: &io::PipeReader| {
        let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
            && polled[0].any().unwrap_or_default()
    };
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    while has_text(pipe) {
        match pipe.read(&mut part) {
            Ok(used @ 1..) => text.extend_from_slice(&part[..used]),
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&text);
    last_line(&text).map(|line| line.trim_start_matches("hook: ").to_owned())
}

/// How often a script's end is polled, and how long after its end its last output is awaited.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// How a script ended, and what it left.
#[derive(Debug)]
pub(crate) struct Script {
    /// None if it did not end in time, and was killed.
    pub status: Option<std::process::ExitStatus>,
    /// Processes that it started and that still run: `1234 (sleep)`.
    pub left: Vec<String>,
}

/// Runs a script with an empty stdin and hands on its lines as they come. Its end is awaited, not
/// that of its pipes, which processes that it leaves behind may hold.
///
/// # Errors
/// In words, if it cannot be started.
pub(crate) fn run_script(
    program: &Path,
    args: &[&str],
    deadline: Duration,
    mut each: impl FnMut(&str),
) -> io::Result<Script> {
    let until = Instant::now() + deadline;
    // Orphans of the script become children of this process, which makes them known.
    nix::sys::prctl::set_child_subreaper(true)?;
    let before = children();
    let start = |mut command: Command| {
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let mut child = match start(Command::new(program)) {
        // A script without `#!` is one of the shell's, as for exec(3), by which Proxmox VE starts it.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOEXEC) => {
            let mut shell = Command::new("/bin/sh");
            shell.arg(program);
            start(shell)?
        }
        started => started?,
    };
    let (lines, read) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, lines.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, lines);
    }
    let status = loop {
        match read.recv_timeout(LOOK_INTERVAL) {
            Ok(line) => each(&line),
            // Both pipes are closed: without this it would not wait.
            Err(mpsc::RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK_INTERVAL),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = wait_until(&mut child, Instant::now() + KILLED_WITHIN);
            break None;
        }
    };
    while let Ok(line) = read.recv_timeout(LOOK_INTERVAL) {
        each(&line);
    }
    let mut left = children();
    left.retain(|process| !before.contains(process));
    Ok(Script { status, left })
}

/// Sends the lines of a pipe until that is closed, which may be after all who listen have gone.
fn forward(pipe: impl Read + Send + 'static, lines: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(pipe.read_until(b'\n', &mut line), Ok(used) if used > 0) {
            let text = String::from_utf8_lossy(&line);
            if lines.send(text.trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
}

/// The children of this process that run, as `PID (NAME)`.
fn children() -> Vec<String> {
    let live = Host::new("/");
    let own = std::process::id().cast_signed();
    let tids = task::tasks(&live, own).unwrap_or_default();
    let of_thread = |tid: i32| {
        let file = format!("proc/{own}/task/{tid}/children");
        live.read(file).unwrap_or_default()
    };
    let pids: Vec<i32> = tids
        .iter()
        .flat_map(|thread| {
            let pids = of_thread(thread.id.tid);
            let pids = pids.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<i32>>()
        })
        .collect();
    // What has ended has no command line.
    let runs = |pid: &i32| {
        let words = live.read(format!("proc/{pid}/cmdline"));
        words.is_ok_and(|words| !words.is_empty())
    };
    let name = |pid: i32| {
        Some(format!(
            "{pid} ({})",
            task::task(&live, pid, pid).ok()?.name
        ))
    };
    pids.into_iter().filter(runs).filter_map(name).collect()
}

fn wait_until(child: &mut Child, until: Instant) -> io::Result<Option<std::process::ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        std::thread::sleep(ENDED_INTERVAL);
    }
}

type Ended = (std::process::ExitStatus, String, String);

/// Reads both pipes until the program has closed them and ended; `None` if time runs out before.
fn collect(child: &mut Child, until: Instant) -> io::Result<Option<Ended>> {
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(io::Error::other("its output cannot be read"));
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let Some(left) = until.checked_duration_since(Instant::now()) else {
            return Ok(None);
        };
        let mut fds = Vec::with_capacity(2);
        if out_open {
            fds.push(PollFd::new(stdout.as_fd(), PollFlags::POLLIN));
        }
        if err_open {
            fds.push(PollFd::new(stderr.as_fd(), PollFlags::POLLIN));
        }
        let timeout =
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let (out_ready, err_ready) = (
            out_open && ready[0],
            err_open && ready[usize::from(out_open)],
        );
        if out_ready {
            out_open = read_some(&mut stdout, &mut out)?;
        }
        if err_ready {
            err_open = read_some(&mut stderr, &mut err)?;
        }
    }
    loop {
        if let Some(status) = child.try_wait()? {
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            return Ok(Some((status, text(out), text(err))));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        std::thread::sleep(ENDED_INTERVAL);
    }
}

fn read_some(from: &mut impl Read, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut chunk = [0; 4096];
    let used = from.read(&mut chunk)?;
    into.extend_from_slice(&chunk[..used]);
    Ok(used > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn output_and_failures() {
        assert_eq!(run("printf", &["a b"], SOON).unwrap(), "a b");
        assert_eq!(
            run("pinfold-no-such-program", &["x"], SOON)
                .unwrap_err()
                .to_string(),
            "pinfold-no-such-program x: No such file or directory"
        );
        let failed = run("sh", &["-c", "echo one >&2; echo two >&2; exit 3"], SOON)
            .unwrap_err()
            .to_string();
        assert!(failed.ends_with(": exit status: 3: two"), "{failed}");
    }

    #[test]
    fn what_runs_apart_is_bounded_and_holds_no_pipe() {
        run_apart(Path::new("true"), &[], SOON).unwrap();
        let began = Instant::now();
        let why = |program: &str, args: &[&str], deadline| {
            let ended = run_apart(Path::new(program), args, Duration::from_millis(deadline));
            ended.unwrap_err().to_string()
        };
        assert_eq!(why("false", &[], 20_000), "false : exit status: 1");
        assert_eq!(
            why("sleep", &["1000"], 1200),
            "sleep 1000: not finished within 1.2 s; it was killed"
        );
        assert!(began.elapsed() < Duration::from_secs(10));
        let gone = why("pinfold-no-such-program", &[], 20_000);
        assert!(gone.contains("No such file or directory"), "{gone}");
    }

    #[test]
    fn one_that_hangs_is_killed() {
        let error = run("sleep", &["1000"], Duration::from_millis(50))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "sleep 1000: no answer within 0.05 s; it was killed");
        let error = run(
            "sh",
            &["-c", "exec >&- 2>&-; exec sleep 1000"],
            Duration::from_millis(50),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("no answer within"), "{error}");
    }
}

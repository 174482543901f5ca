//! Running another program: argv without a shell, a deadline, and its words in the error.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

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
            let last = stderr
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or("it said nothing");
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

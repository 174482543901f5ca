//! Running the programs that the lab is made with, by argv, with errors that carry their output.

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};

/// How many lines of a failed program's output an error shows.
const SHOWN_LINES: usize = 12;

/// Runs to the end with stdin closed; what it printed, or an error with its last lines.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{name}: cannot run"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = [output.stdout, output.stderr].concat();
    bail!(
        "{name}: {}\n{}",
        output.status,
        tail(&String::from_utf8_lossy(&text), SHOWN_LINES)
    )
}

/// The last lines of a text, as they are.
pub fn tail(text: &str, lines: usize) -> &str {
    let text = text.trim_end();
    let start = text
        .rmatch_indices('\n')
        .nth(lines.saturating_sub(1))
        .map_or(0, |(at, _)| at + 1);
    text.get(start..).unwrap_or_default()
}

/// A command run as root: as we are, or through `sudo -n`.
pub fn as_root(program: &str) -> Result<Command> {
    if nix::unistd::geteuid().is_root() {
        return Ok(Command::new(program));
    }
    let sudo = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match sudo {
        Ok(status) if status.success() => {
            let mut command = Command::new("sudo");
            command.args(["-n", "--", program]);
            Ok(command)
        }
        Ok(_) => {
            bail!(
                "{program}: must run as root, and sudo asks for a password: run `sudo -v` first, or `lab` as root"
            )
        }
        Err(_) => bail!("{program}: must run as root, and there is no sudo: run `lab` as root"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_last_lines() {
        for (text, lines, wanted) in [
            ("", 2, ""),
            ("a", 2, "a"),
            ("a\nb\nc\n", 2, "b\nc"),
            ("a\nb", 5, "a\nb"),
        ] {
            assert_eq!(tail(text, lines), wanted);
        }
    }

    #[test]
    fn a_failure_shows_the_output() {
        let err = run(Command::new("sh").args(["-c", "echo reason >&2; exit 4"])).unwrap_err();
        assert_eq!(err.to_string(), "sh: exit status: 4\nreason");
        let err = run(&mut Command::new("/no/such")).unwrap_err();
        assert_eq!(
            format!("{err:#}"),
            "/no/such: cannot run: No such file or directory (os error 2)"
        );
    }
}

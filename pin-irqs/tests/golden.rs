//! The command's face: what is typed and what comes back, on a captured host. A case is a file.

#![allow(clippy::disallowed_methods)]

#[test]
fn golden() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    use std::fs::OpenOptions;
    use std::process::{Command, Stdio};

    let run = |args: &[&str], stdout: Stdio| {
        let output = Command::new(env!("CARGO_BIN_EXE_pin-irqs"))
            .args(["--sysroot", "tests/cmd/apply.in"])
            .args(args)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        (
            output.status.code(),
            stderr.lines().last().map(str::to_owned),
        )
    };
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    for args in [
        &["--list"] as &[_],
        &["--list", "--json"],
        &["-n", "0-5"],
        &["-n", "0-5", "--json"],
    ] {
        let (code, error) = run(args, full().into());
        assert_eq!(code, Some(1), "{args:?}");
        assert_eq!(
            error.unwrap(),
            "pin-irqs: stdout: write: No space left on device"
        );
        // A reader that has gone is not a failure.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(run(args, writer.into()).0, Some(0), "{args:?}");
    }
}

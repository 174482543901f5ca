//! `hook status --watch` as a program: what becomes of it when nobody reads any more.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

#[test]
fn watching_ends_with_its_reader() {
    let host = tempfile::tempdir().unwrap();
    let machines = machine::all();
    machine::expand(
        &machines.iter().find(|(name, _)| name == "5900x").unwrap().1,
        host.path(),
    );
    let mut hook = Command::new(env!("CARGO_BIN_EXE_hook"))
        .args(["status", "--watch", "1", "--sysroot"])
        .arg(host.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let screens = BufReader::new(hook.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    // A pipe has one screen behind the other, in plain text.
    let lines: Vec<String> = screens.take(18).collect();
    assert_eq!(
        lines
            .iter()
            .filter(|line| *line == "no CPU is isolated")
            .count(),
        2,
        "{lines:?}"
    );
    assert!(lines.iter().all(|line| !line.contains('\x1b')), "{lines:?}");
    let until = Instant::now() + Duration::from_secs(20);
    let exit = loop {
        match hook.try_wait().unwrap() {
            Some(exit) => break exit,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            None => {
                hook.kill().unwrap();
                panic!("it watches on, and nobody reads");
            }
        }
    };
    assert_eq!(exit.code(), Some(0), "{exit}");
}

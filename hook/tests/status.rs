//! hook as a program: stdout that cannot be written, and text that must not reach a terminal.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

/// A Ryzen 9 5900X with VM 100.
fn host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    let machines = machine::all();
    let (_, text) = machines.iter().find(|(name, _)| name == "5900x").unwrap();
    machine::expand(text, host.path());
    let confs = host.path().join("etc/pve/qemu-server");
    fs::create_dir_all(&confs).unwrap();
    fs::write(
        confs.join("100.conf"),
        "cores: 4\nhookscript: local:\x1b[31mred\x1b[0m\n",
    )
    .unwrap();
    host
}

fn hook(host: &Path, words: &str) -> Command {
    let mut hook = Command::new(env!("CARGO_BIN_EXE_hook"));
    hook.arg("--sysroot").arg(host).args(words.split(' '));
    hook
}

#[test]
fn a_full_disk_is_a_failure() {
    let host = host();
    for words in [
        "status",
        "status --json",
        "layout",
        "layout --json",
        "init 100 --print",
        "check 100",
        "plan 100",
    ] {
        let full = fs::File::create("/dev/full").unwrap();
        let output = hook(host.path(), words).stdout(full).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words}: {stderr}");
        if words != "plan 100" {
            assert!(
                stderr.ends_with("stdout: write: No space left on device\n"),
                "{words}: {stderr}"
            );
        }
    }
}

/// Otherwise Proxmox VE would not start a VM because its log cannot be written.
#[test]
fn a_full_disk_does_not_fail_a_phase() {
    let host = host();
    let containers = host.path().join("etc/pve/lxc");
    fs::create_dir_all(&containers).unwrap();
    fs::write(containers.join("200.conf"), "arch: amd64\n").unwrap();
    for words in [
        "200 pre-start --json",
        "200 post-stop --json",
        "recover --json",
    ] {
        let full = fs::File::create("/dev/full").unwrap();
        let output = hook(host.path(), words).stdout(full).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{words}: {stderr}");
    }
}

#[test]
fn control_characters_are_escaped() {
    let host = host();
    for words in ["check 100", "init 100"] {
        let output = hook(host.path(), words).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(
            text.contains("\\u{1b}[31mred") && !text.contains('\x1b'),
            "{words}: {text}"
        );
    }
}

#[test]
fn watching_ends_with_its_reader() {
    let host = host();
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

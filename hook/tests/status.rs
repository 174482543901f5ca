//! hook as a program: stdout that cannot be written, and text that must not reach a terminal.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pinfold_core::testutils::{container_conf, machine, vm_conf};

/// A Ryzen 9 5900X with VM 100.
fn host() -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    machine::expand(&machine::text("5900x"), host.path());
    let conf = "cores: 4\nhookscript: local:\x1b[31mred\x1b[0m\n";
    vm_conf(host.path(), 100, conf);
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
        "layout --map",
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

/// Monitoring has to distinguish a fault from what could not be read.
#[test]
fn what_cannot_be_read_has_an_exit_code_of_its_own() {
    let run = |host: &Path, words: &str| {
        let output = hook(host, words).output().unwrap();
        let all = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(all).unwrap())
    };
    let settings = "isolated = \"6-9\"\npins = \"auto\"\n";
    for (unreadable, command, code) in [
        ("", "status", 0),
        ("", "check 100", 0),
        ("", "check 101", 1),
        ("run/pinfold/state.json", "status", 3),
        ("run/pinfold/state.json", "status --json", 3),
        ("proc/cmdline", "check 100", 3),
        // It cannot be trusted, which every phase would refuse.
        ("run/pinfold/state.json", "check 100", 1),
        ("etc/pve/qemu-server/100.conf", "check 100", 3),
        // An error that is sure comes before what is not.
        ("proc/cmdline", "check 101", 1),
    ] {
        let host = host();
        vm_conf(host.path(), 100, "cores: 4\n");
        vm_conf(host.path(), 101, "cores: 99\n");
        let path = host.path().join("etc/pinfold/100.toml");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, settings).unwrap();
        for (path, text) in [
            ("sys/fs/cgroup/cgroup.controllers", "cpuset\n"),
            ("proc/cmdline", "quiet\n"),
        ] {
            let path = host.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        for cpu in 1..24 {
            let online = format!("sys/devices/system/cpu/cpu{cpu}/online");
            fs::write(host.path().join(online), "1\n").unwrap();
        }
        if !unreadable.is_empty() {
            // No user can read a folder as a file.
            let path = host.path().join(unreadable);
            let _ = fs::remove_file(&path);
            fs::create_dir_all(&path).unwrap();
        }
        let (found, text) = run(host.path(), command);
        assert_eq!(found, Some(code), "{unreadable}: {command}: {text}");
        assert!(code != 3 || text.contains(unreadable), "{text}");
    }
}

#[test]
fn only_root_installs_and_removes() {
    // The program where every user can run it.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("hook");
    fs::copy(env!("CARGO_BIN_EXE_hook"), &program).unwrap();
    for words in ["install 100", "remove 100", "remove --all"] {
        let mut user = Command::new("setpriv");
        user.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        let is_root = nix::unistd::geteuid().is_root();
        let mut hook = if is_root { user } else { Command::new("env") };
        let output = hook.arg(&program).args(words.split(' ')).output().unwrap();
        assert_eq!(
            String::from_utf8(output.stderr).unwrap(),
            "hook: this needs root; -n prints the steps without it\n",
            "{words}"
        );
        assert_eq!(output.status.code(), Some(1), "{words}");
    }
}

/// Otherwise Proxmox VE would not start a VM because its log cannot be written.
#[test]
fn a_full_disk_does_not_fail_a_phase() {
    let host = host();
    container_conf(host.path(), 200, "arch: amd64\n");
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
                panic!("it goes on though its output has no reader");
            }
        }
    };
    assert_eq!(exit.code(), Some(0), "{exit}");
}

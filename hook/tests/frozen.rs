//! State that earlier versions saved is still read.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use pinfold_core::testutils::{assert_restored, frozen, thread, write};

/// A host of 24 CPUs with kthreadd and without other processes or IRQs, and this state.
fn host(state: &Path) -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("sys/devices/system/cpu/present", "0-23\n"),
        ("sys/devices/system/cpu/online", "0-23\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpuset\n"),
        ("proc/interrupts", "CPU0\n"),
        ("proc/irq/default_smp_affinity", "03f03f\n"),
        ("proc/sys/kernel/osrelease", "6.12.0\n"),
        ("proc/2/task/2/children", "\n"),
    ] {
        write(host.path(), path, text);
    }
    let no_fork_kthread = 0x0020_8040;
    thread(host.path(), 2, 2, "kthreadd", "0-5,12-17", no_fork_kthread);
    let folder = host.path().join("run/pinfold");
    fs::create_dir_all(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let copy = folder.join("state.json");
    fs::copy(state, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).unwrap();
    host
}

fn hook(host: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hook"))
        .args(args)
        .arg("--sysroot")
        .arg(host)
        .output()
        .unwrap()
}

#[test]
fn state_of_earlier_versions_is_read_and_settled() {
    for state in frozen("state") {
        let name = state.file_stem().unwrap().to_str().unwrap();
        let host = host(&state);
        let output = hook(host.path(), &["status", "--json"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{name}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        // `METHOD-PHASE.json`
        let (method, phase) = name.split_once('-').unwrap();
        let vm = &status["vms"]["100"];
        assert_eq!(vm["phase"], phase, "{name}");
        assert_eq!(vm["isolation"], method, "{name}");
        // Its QEMU is gone, and everything that could be put back.
        let output = hook(host.path(), &["recover", "--quiet"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        if phase == "idle" {
            // It ends, though VMs cannot be started here.
            assert!(stderr.contains("not below --sysroot"), "{name}: {stderr}");
            continue;
        }
        assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{name}");
        assert!(
            !host.path().join("run/pinfold/state.json").exists(),
            "{name}"
        );
    }
}

#[test]
fn files_of_earlier_versions_are_restored() {
    let hook = env!("CARGO_BIN_EXE_hook");
    assert_restored("hook", hook, &["step", "stat-interval"]);
}

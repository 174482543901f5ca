//! State that earlier versions saved is still read.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const KTHREADD: &str = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 42 0 0 \
    18446744073709551615 0 0 0 0 0 0 0 2147483647 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";

/// The files in this folder of each earlier version.
fn frozen(folder: &str) -> Vec<PathBuf> {
    let versions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/tests/frozen");
    let mut files: Vec<PathBuf> = fs::read_dir(versions)
        .unwrap()
        .flat_map(|version| fs::read_dir(version.unwrap().path().join(folder)).unwrap())
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

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
        ("proc/2/stat", KTHREADD),
        ("proc/2/task/2/stat", KTHREADD),
        ("proc/2/task/2/status", "Cpus_allowed_list:\t0-5,12-17\n"),
    ] {
        let path = host.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
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
    let host = tempfile::tempdir().unwrap();
    for file in frozen("saved") {
        if !fs::read_to_string(&file)
            .unwrap()
            .contains("\"tool\": \"hook\"")
        {
            continue;
        }
        let args = ["step", "stat-interval", "--dry-run", "--restore"];
        let output = hook(
            host.path(),
            &[&args[..], &[file.to_str().unwrap()]].concat(),
        );
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), &*stderr),
            (Some(0), ""),
            "{}",
            file.display()
        );
    }
}

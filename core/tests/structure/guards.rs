//! Breaks copies of the workspace, to see that `make lint` and the structure test fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{rules, workspace};

/// What git ignores.
const NOT_COPIED: [&str; 6] = [".git", ".ci", "target", "artifacts", "coverage", "corpus"];

/// A copy of the workspace in cargo's folder for tests. It keeps its path, and unchanged files keep
/// their times, so that cargo does not check everything again.
struct Copy {
    folder: PathBuf,
}

impl Copy {
    fn new(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        sync(workspace(), &folder);
        Self { folder }
    }

    fn append(&self, file: &str, text: &str) {
        let path = self.folder.join(file);
        let old = fs::read_to_string(&path).unwrap();
        fs::write(path, old + text).unwrap();
    }

    /// What `make lint` prints, and whether it succeeds.
    fn lint(&self) -> (bool, String) {
        let output = Command::new("make")
            .arg("lint")
            .current_dir(&self.folder)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            // Not that of this workspace: cargo takes packages of the same names in another folder for these.
            .env(
                "CARGO_TARGET_DIR",
                Path::new(env!("CARGO_TARGET_TMPDIR")).join("lint-target"),
            )
            .env("CARGO_TERM_COLOR", "never")
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }
}

/// Makes `to` equal to `from`.
fn sync(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(to).unwrap() {
        let entry = entry.unwrap();
        if fs::symlink_metadata(from.join(entry.file_name())).is_err() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
    }
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let copy = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if NOT_COPIED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        if kind.is_dir() {
            sync(&entry.path(), &copy);
        } else if kind.is_file() {
            let content = fs::read(entry.path()).unwrap();
            if fs::read(&copy).ok().as_ref() != Some(&content) {
                fs::write(&copy, content).unwrap();
            }
        }
    }
}

/// Appends a function to a file and checks that clippy rejects the call in it.
fn assert_rejected(copy: &Copy, file: &str, call: &str, method: &str) {
    let function = format!("\n/// Planted.\npub(crate) fn planted() {{\n    let _ = {call};\n}}\n");
    copy.append(file, &function);
    let (succeeded, text) = copy.lint();
    assert!(!succeeded, "{file}: {call} was accepted");
    let message = format!("use of a disallowed method `{method}`");
    let has_location = text
        .split("error: ")
        .any(|error| error.starts_with(&message) && error.contains(&format!("--> {file}:")));
    assert!(has_location, "{file}: {call}: {text}");
}

#[test]
fn lint_rejects_writes_outside_of_the_writers() {
    let copy = Copy::new("lint");
    let call = "std::fs::write(\"/proc/sys/vm/stat_interval\", \"1\")";
    assert_rejected(&copy, "core/src/sys/cpu.rs", call, "std::fs::write");

    let copy = Copy::new("lint");
    let call =
        "nix::sched::sched_setaffinity(nix::unistd::Pid::this(), &nix::sched::CpuSet::new())";
    assert_rejected(
        &copy,
        "hook/src/phases/recover.rs",
        call,
        "nix::sched::sched_setaffinity",
    );
}

#[test]
fn structure_test_reports_a_planted_circle_and_an_upward_import() {
    let copy = Copy::new("structure");
    let before = rules::violations(&copy.folder);
    copy.append(
        "core/src/sys/irq.rs",
        "\nuse crate::knob::Knob as Planted;\n",
    );
    copy.append("lab/src/cpus.rs", "\nuse crate::host::Host as Planted;\n");
    copy.append("lab/src/host.rs", "\nuse crate::cpus as planted;\n");
    let after = rules::violations(&copy.folder);
    let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
    let upward = new.iter().any(|line| {
        line.starts_with("core/src/sys/irq.rs:")
            && line.ends_with(": upward import of core/src/knob/mod.rs")
    });
    let circle = new
        .iter()
        .any(|line| line.starts_with("circle of") && line.contains("lab/src/cpus.rs:"));
    assert!(upward && circle, "{new:#?}");
}

//! Files that earlier versions saved, in core/tests/frozen.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files in this folder of each earlier version.
///
/// # Panics
/// If there is none.
pub fn frozen(folder: &str) -> Vec<PathBuf> {
    let versions = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frozen");
    let mut files: Vec<PathBuf> = fs::read_dir(versions)
        .unwrap()
        .flat_map(|version| fs::read_dir(version.unwrap().path().join(folder)).unwrap())
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no file in {folder}");
    files
}

/// Has `program` restore, on a host without anything, what earlier versions of `tool` saved with
/// `--save`; `verb` is what comes before the options.
///
/// # Panics
/// If there is no such file, or the program fails or warns.
pub fn assert_restored(tool: &str, program: &str, verb: &[&str]) {
    let empty_host = tempfile::tempdir().unwrap();
    let mut restored = 0;
    for file in frozen("saved") {
        let text = fs::read_to_string(&file).unwrap();
        if !text.contains(&format!("\"tool\": \"{tool}\"")) {
            continue;
        }
        let output = Command::new(program)
            .args(verb)
            .args(["--dry-run", "--restore"])
            .args([&*file, Path::new("--sysroot"), empty_host.path()])
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let result = (output.status.code(), &*stderr);
        assert_eq!(result, (Some(0), ""), "{}", file.display());
        restored += 1;
    }
    assert!(restored > 0, "there is no file of {tool}");
}

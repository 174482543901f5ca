//! Files that earlier versions saved can still be restored.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn files_of_earlier_versions_are_restored() {
    let empty_host = Path::new(env!("CARGO_TARGET_TMPDIR")).join("empty-host");
    fs::create_dir_all(&empty_host).unwrap();
    let versions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/tests/frozen");
    let mut restored = 0;
    for version in fs::read_dir(versions).unwrap() {
        for file in fs::read_dir(version.unwrap().path().join("saved")).unwrap() {
            let file = file.unwrap().path();
            let text = fs::read_to_string(&file).unwrap();
            if !text.contains("\"tool\": \"pci-reset\"") {
                continue;
            }
            let output = Command::new(env!("CARGO_BIN_EXE_pci-reset"))
                .args(["--dry-run", "--restore"])
                .args([&*file, Path::new("--sysroot"), &empty_host])
                .output()
                .unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(
                (output.status.code(), &*stderr),
                (Some(0), ""),
                "{}",
                file.display()
            );
            restored += 1;
        }
    }
    assert!(restored > 0, "there is no file of pci-reset");
}

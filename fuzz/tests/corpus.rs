//! Replays the corpus without libFuzzer. `good-*` has to be taken and `bad-*` refused; of
//! everything else, regressions above all, it is enough that nothing that the target promises is
//! broken.

use std::fs;
use std::path::{Path, PathBuf};

use pinfold_fuzz as fuzz;

fn replay(target: &str, body: fn(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let (mut good, mut bad) = (0, 0);
    for path in &files {
        let taken = body(&fs::read(path).unwrap());
        let name = path.file_name().unwrap().to_string_lossy();
        if name.starts_with("good-") {
            good += 1;
            assert!(taken, "{} is refused", path.display());
        } else if name.starts_with("bad-") {
            bad += 1;
            assert!(!taken, "{} is taken", path.display());
        }
    }
    assert!(
        good > 0 && bad > 0,
        "{} needs good-* and bad-*, both",
        folder.display()
    );
}

/// A test per target, whose corpus has the target's name.
macro_rules! targets {
    ($($target:ident)*) => {
        $(
            #[test]
            fn $target() {
                replay(stringify!($target), fuzz::$target);
            }
        )*

        const TARGETS: &[&str] = &[$(stringify!($target)),*];
    };
}

targets!(cpu_list cpu_mask proc_stat trace_record vm_conf pci_mapping pci_claims qmp_reply settings state saved);

#[test]
fn memory_is_held() {
    assert!(Vec::<u8>::new().try_reserve(fuzz::MEMORY).is_err());
}

/// A target that is not replayed, or a corpus without a target, would go unnoticed.
#[test]
fn nothing_is_left_out() {
    let names = |folder: &str| {
        let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .unwrap()
                    .path()
                    .file_stem()
                    .unwrap()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort_unstable();
        names
    };
    let mut targets = TARGETS.to_vec();
    targets.sort_unstable();
    assert_eq!(names("corpus"), targets);
    assert_eq!(names("fuzz_targets"), targets);
}

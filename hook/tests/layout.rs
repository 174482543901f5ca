//! `hook layout` on the captured machines of core's tests. A case is a file; the machines are folders beside one another.

#![allow(clippy::unwrap_used)]

#[path = "../../core/tests/machine/mod.rs"]
mod machine;

#[test]
fn golden() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in machine::all() {
        machine::expand(&text, &folder.path().join(name));
    }
    // Cases name machines by relative paths. This is the one test of its process.
    std::env::set_current_dir(folder.path()).unwrap();
    trycmd::TestCases::new().case(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/layout/*.trycmd"));
}

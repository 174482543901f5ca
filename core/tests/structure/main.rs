//! The structure of the whole workspace: no circle of files in any crate, imports that lead
//! downwards only, dependencies between crates. The rules are in rules.rs.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

mod guards;
mod imports;
mod rules;

use std::fs;
use std::path::Path;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn the_workspace_keeps_the_rules() {
    let violations = rules::violations(workspace());
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

/// A small workspace that keeps the rules.
fn small_workspace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in [
        (
            "Cargo.toml",
            "[workspace]\nmembers = [\n    \"core\",\n    \"pin-irqs\",\n    \"hook\",\n    \"lab\",\n]\n",
        ),
        (
            "fuzz/Cargo.toml",
            "[dependencies]\nhook = { path = \"../hook\" }\npinfold-core = { path = \"../core\" }\n",
        ),
        ("fuzz/src/lib.rs", ""),
        ("core/Cargo.toml", "[dependencies]\nnix.workspace = true\n"),
        (
            "core/src/lib.rs",
            "mod error;\nmod knob;\nmod sys;\n#[cfg(feature = \"testutils\")]\npub mod testutils;\n\
             pub use error::Error;\npub use knob::Knob;\n",
        ),
        ("core/src/error.rs", "pub struct Error;\n"),
        ("core/src/testutils.rs", ""),
        ("core/src/sys/mod.rs", "pub mod cpu;\npub mod irq;\n"),
        ("core/src/sys/cpu.rs", "use crate::error::Error;\n"),
        ("core/src/sys/irq.rs", "use super::cpu;\n"),
        (
            "core/src/knob/mod.rs",
            "mod file;\nuse crate::sys::{cpu, irq};\npub use file::Knob;\n",
        ),
        (
            "core/src/knob/file.rs",
            "pub(in crate::knob) struct Knob;\n",
        ),
        (
            "pin-irqs/Cargo.toml",
            "[dependencies]\npinfold-core.workspace = true\n",
        ),
        (
            "pin-irqs/src/lib.rs",
            "mod plan;\n\npub fn main() {\n    plan::run();\n}\n",
        ),
        (
            "pin-irqs/src/plan.rs",
            "pub fn run() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::main;\n}\n",
        ),
        (
            "pin-irqs/src/main.rs",
            "fn main() {\n    pin_irqs::main()\n}\n",
        ),
        (
            "hook/Cargo.toml",
            "[dependencies]\npin-irqs.workspace = true\npinfold-core.workspace = true\n",
        ),
        ("hook/src/lib.rs", "mod commands;\nmod settings;\n"),
        ("hook/src/settings.rs", ""),
        ("hook/src/commands.rs", "use crate::settings;\n"),
        ("lab/Cargo.toml", "[dependencies]\nnix.workspace = true\n"),
        ("lab/src/lib.rs", "mod host;\n"),
        ("lab/src/host.rs", ""),
        (
            "lab/tests/stories/main.rs",
            "mod support;\nuse support::start;\n",
        ),
        ("lab/tests/stories/support.rs", ""),
    ] {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

/// The violations after `text` was appended to a file of the small workspace.
fn violations_with(file: &str, text: &str) -> Vec<String> {
    let folder = small_workspace();
    let path = folder.path().join(file);
    let old = fs::read_to_string(&path).unwrap();
    fs::write(path, old + text).unwrap();
    rules::violations(folder.path())
}

#[test]
fn allowed_uses_are_not_reported() {
    for (file, text) in [
        ("core/src/lib.rs", ""),
        ("core/src/knob/file.rs", "use crate::sys::irq;\n"),
        (
            "core/src/error.rs",
            "#[cfg(test)]\nuse crate::knob::Knob;\n",
        ),
        (
            "core/src/error.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::knob::Knob;\n}\n",
        ),
        ("core/src/testutils.rs", "use crate::knob::Knob;\n"),
        (
            "core/src/error.rs",
            "use std::fmt;\nfn f() {\n    knob::Knob;\n}\n",
        ),
        (
            "core/src/error.rs",
            "/// Like crate::knob::Knob.\nfn f() {\n    \"crate::knob::Knob\";\n}\n",
        ),
        (
            "core/src/sys/cpu.rs",
            "impl A {\n    #[cfg(test)]\n    fn f() {\n        crate::knob::g()\n    }\n}\n",
        ),
    ] {
        assert_eq!(violations_with(file, text), [""; 0], "{file}: {text}");
    }
}

#[test]
fn a_circle_of_files_is_reported_with_its_lines() {
    let in_room = "circle of 2 files: core/src/sys/cpu.rs:2 uses core/src/sys/irq.rs, \
                   core/src/sys/irq.rs:1 uses core/src/sys/cpu.rs";
    let with_mod = "circle of 2 files: core/src/knob/file.rs:2 uses core/src/knob/mod.rs, \
                    core/src/knob/mod.rs:3 uses core/src/knob/file.rs";
    for (file, text, expected) in [
        (
            "core/src/sys/cpu.rs",
            "use crate::sys::irq::Irq;\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "use super::irq as interrupt;\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "use super::{irq::{Irq, list}};\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "fn f() -> super::irq::Irq {}\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "fn f() { print!(\"{}\", super::irq::list()) }\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "mod a { fn f() { super::super::irq::list() } }\n",
            in_room,
        ),
        (
            "core/src/sys/cpu.rs",
            "fn f() { use super::irq; }\n",
            in_room,
        ),
        ("core/src/knob/file.rs", "use super::Change;\n", with_mod),
        ("core/src/knob/file.rs", "use crate::knob::*;\n", with_mod),
        (
            "pin-irqs/src/plan.rs",
            "use crate::main;\n",
            "circle of 2 files: pin-irqs/src/lib.rs:4 uses pin-irqs/src/plan.rs, \
             pin-irqs/src/plan.rs:7 uses pin-irqs/src/lib.rs",
        ),
        (
            "lab/tests/stories/support.rs",
            "use crate::story;\n",
            "circle of 2 files: lab/tests/stories/main.rs:2 uses lab/tests/stories/support.rs, \
             lab/tests/stories/support.rs:1 uses lab/tests/stories/main.rs",
        ),
    ] {
        assert_eq!(violations_with(file, text), [expected], "{file}: {text}");
    }
}

#[test]
fn a_path_through_an_imported_module_counts() {
    let text = "use crate::sys;\nfn f() {\n    sys::irq::list()\n}\n";
    let violations = violations_with("core/src/error.rs", text);
    let expected = "core/src/error.rs:4: upward import of core/src/sys/irq.rs";
    assert!(violations.contains(&expected.to_owned()), "{violations:?}");
}

#[test]
fn an_upward_import_is_reported() {
    for (file, text, expected) in [
        (
            "core/src/sys/cpu.rs",
            "use crate::knob::Change;\n",
            "core/src/sys/cpu.rs:2: upward import of core/src/knob/mod.rs",
        ),
        (
            "core/src/sys/irq.rs",
            "fn f() { vec![crate::knob::Knob] }\n",
            "core/src/sys/irq.rs:2: upward import of core/src/knob/mod.rs",
        ),
        (
            "core/src/sys/mod.rs",
            "use crate::Knob;\n",
            "core/src/sys/mod.rs:3: upward import of core/src/lib.rs",
        ),
        (
            "core/src/error.rs",
            "#[cfg(feature = \"testutils\")]\nuse crate::testutils;\n",
            "core/src/error.rs:3: upward import of core/src/testutils.rs",
        ),
        (
            "hook/src/settings.rs",
            "use crate::commands;\n",
            "hook/src/settings.rs:1: upward import of hook/src/commands.rs",
        ),
    ] {
        let violations = violations_with(file, text);
        assert!(
            violations.contains(&expected.to_owned()),
            "{file}: {text}: {violations:?}"
        );
    }
}

#[test]
fn a_kernel_file_opened_by_absolute_path_is_reported() {
    let text = "fn f() {\n    File::open(\"/proc/stat\")\n}\n";
    for (file, expected) in [
        (
            "hook/src/settings.rs",
            &["hook/src/settings.rs:2: absolute path of a kernel file"][..],
        ),
        ("lab/src/host.rs", &[]),
    ] {
        assert_eq!(violations_with(file, text), expected);
    }
    let quoted = "/// \"/proc/stat\"\nfn f() {\n    open(\"proc/stat\"); \"see /proc/stat\"\n}\n";
    assert_eq!(violations_with("hook/src/settings.rs", quoted), [""; 0]);
}

#[test]
fn a_path_of_proxmox_outside_of_vm_is_reported() {
    for literal in ["\"/etc/pve/{id}.conf\"", "r#\"run/qemu-server/\"#"] {
        let text = format!("fn f() {{\n    open({literal})\n}}\n");
        let expected =
            "hook/src/settings.rs:2: a path of Proxmox VE; add it to core/src/vm/proxmox";
        assert_eq!(violations_with("hook/src/settings.rs", &text), [expected]);
        assert_eq!(violations_with("lab/src/host.rs", &text), [""; 0]);
    }
    let printed = "/// etc/pve\nfn f() {\n    \"see /etc/pve\"\n}\n";
    assert_eq!(violations_with("hook/src/settings.rs", printed), [""; 0]);
}

#[test]
fn a_module_without_a_layer_and_a_missing_file_are_reported() {
    assert_eq!(
        violations_with("core/src/lib.rs", "mod missing;\n"),
        ["core/src/missing.rs: not found"]
    );
    let folder = small_workspace();
    let library = folder.path().join("hook/src/lib.rs");
    fs::write(library, "mod commands;\nmod settings;\nmod other;\n").unwrap();
    fs::write(folder.path().join("hook/src/other.rs"), "").unwrap();
    let expected = "hook/src/other.rs: no layer; add its module to core/tests/structure/rules.rs";
    assert_eq!(rules::violations(folder.path()), [expected]);
}

#[test]
fn a_dependency_against_the_rules_is_reported() {
    for (file, name, expected) in [
        (
            "core/Cargo.toml",
            "pin-irqs",
            "core/Cargo.toml: core may not depend on pin-irqs",
        ),
        (
            "pin-irqs/Cargo.toml",
            "governor",
            "pin-irqs/Cargo.toml: pin-irqs may not depend on governor",
        ),
        (
            "lab/Cargo.toml",
            "pinfold-core",
            "lab/Cargo.toml: lab may not depend on pinfold-core",
        ),
        (
            "hook/Cargo.toml",
            "pinfold-lab",
            "hook/Cargo.toml: hook may not depend on pinfold-lab",
        ),
    ] {
        assert_eq!(
            violations_with(file, &format!("{name}.workspace = true\n")),
            [expected]
        );
    }
}

#[test]
fn testutils_in_a_program_are_reported() {
    let enabled = "pinfold-core = { workspace = true, features = [\"testutils\"] }\n";
    for (file, text, expected) in [
        (
            "hook/Cargo.toml",
            enabled.to_owned(),
            &["hook/Cargo.toml:4: testutils is for dev-dependencies only"][..],
        ),
        (
            "Cargo.toml",
            "[workspace.dependencies]\n".to_owned() + enabled,
            &["Cargo.toml:9: testutils is for dev-dependencies only"],
        ),
        (
            "core/Cargo.toml",
            "[features]\ndefault = [\"testutils\"]\n".to_owned(),
            &["core/Cargo.toml:4: testutils is for dev-dependencies only"],
        ),
        (
            "core/Cargo.toml",
            "[features]\ntestutils = [\"dep:tempfile\"]\n".to_owned(),
            &[],
        ),
        (
            "lab/Cargo.toml",
            "\n[dev-dependencies]\n".to_owned() + enabled,
            &[],
        ),
    ] {
        assert_eq!(violations_with(file, &text), expected, "{file}: {text}");
    }
}

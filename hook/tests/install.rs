//! `make install` and `make uninstall`, in folders of their own with stand-ins for the programs.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const TOOLS: [&str; 9] = [
    "cg-slice",
    "cpu-hotplug",
    "governor",
    "hook",
    "pci-reset",
    "pin-irqs",
    "pin-kthreads",
    "pin-vcpu",
    "pinfold",
];

/// A folder with stand-ins for the programs, and a DESTDIR.
struct Target {
    folder: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let programs = folder.path().join("programs");
        fs::create_dir(&programs).unwrap();
        for tool in TOOLS {
            fs::write(programs.join(tool), format!("{tool}\n")).unwrap();
        }
        fs::create_dir(folder.path().join("root")).unwrap();
        let pvesm = folder.path().join("path/pvesm");
        fs::create_dir(pvesm.parent().unwrap()).unwrap();
        let text = format!("#!/bin/sh\necho {}/$2\n", folder.path().display());
        fs::write(&pvesm, text).unwrap();
        fs::set_permissions(&pvesm, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Where programs are looked for: first those of this folder.
    fn path(&self) -> OsString {
        let mut path = self.folder.path().join("path").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        path
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Runs make in the workspace, with DESTDIR unless `variables` has one.
    fn make(&self, goal: &str, variables: &[&str]) -> Output {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        Command::new("make")
            .current_dir(workspace)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .env("PATH", self.path())
            .arg(goal)
            .arg(format!("DESTDIR={}", self.root().display()))
            .arg(format!("BINDIR={}/programs", self.folder.path().display()))
            .args(variables)
            .output()
            .unwrap()
    }

    fn succeed(&self, goal: &str, variables: &[&str]) -> String {
        let output = self.make(goal, variables);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "make {goal}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fail(&self, goal: &str) -> String {
        let output = self.make(goal, &[]);
        assert!(!output.status.success(), "make {goal} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Every path below the root, and the content of each file.
    fn tree(&self) -> BTreeMap<PathBuf, Option<String>> {
        let mut tree = BTreeMap::new();
        let mut folders = vec![self.root()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let text = path.is_file().then(|| fs::read_to_string(&path).unwrap());
                if path.is_dir() {
                    folders.push(path.clone());
                }
                tree.insert(path.strip_prefix(self.root()).unwrap().to_owned(), text);
            }
        }
        tree
    }

    fn files_named(&self, name: &str) -> Vec<PathBuf> {
        let tree = self.tree().into_keys();
        tree.filter(|path| path.file_name().unwrap() == name)
            .collect()
    }
}

#[test]
fn installs_each_file_once_and_hook_also_as_snippet() {
    for (prefix, units, hook) in [
        (
            "/usr/local",
            "usr/local/lib/systemd/system",
            "usr/local/sbin/hook",
        ),
        ("/usr", "usr/lib/systemd/system", "usr/sbin/hook"),
        (
            "/opt/pinfold",
            "etc/systemd/system",
            "opt/pinfold/sbin/hook",
        ),
    ] {
        let target = Target::new();
        target.succeed("install", &[&format!("PREFIX={prefix}")]);
        let service = Path::new(units).join("pinfold-recover.service");
        let path = Path::new(units).join("pinfold-recover.path");
        assert_eq!(target.files_named("pinfold-recover.service"), [&*service]);
        assert_eq!(target.files_named("pinfold-recover.path"), [&*path]);
        let text = fs::read_to_string(target.root().join(&service)).unwrap();
        assert!(
            text.contains(&format!("\nExecStart=/{hook} recover\n")),
            "{text}"
        );
        for tool in TOOLS {
            let program = PathBuf::from(hook).with_file_name(tool);
            if tool == "pinfold" {
                // A folder of files has this name too.
                assert!(target.root().join(program).is_file());
                continue;
            }
            let mut found = vec![program];
            if tool == "hook" {
                found.push("var/lib/vz/snippets/hook".into());
            }
            assert_eq!(target.files_named(tool), found);
        }
    }
}

#[test]
fn uninstall_removes_what_install_made_and_nothing_else() {
    let empty = Target::new();
    let used = Target::new();
    used.write("var/lib/vz/snippets/other.pl", "not ours\n");
    used.write("usr/local/sbin/other", "not ours\n");
    fs::create_dir_all(used.root().join("usr/local/share")).unwrap();
    used.write(
        "etc/pve/qemu-server/100.conf",
        "cores: 4\n\n[snap]\nhookscript: local:snippets/hook\n",
    );
    used.write(
        "etc/pve/qemu-server/101.conf",
        "hookscript: local:snippets/other.pl\n",
    );
    for target in [empty, used] {
        for prefix in ["PREFIX=/usr/local", "PREFIX=/usr", "PREFIX=/opt/pinfold"] {
            let before = target.tree();
            target.succeed("install", &[prefix]);
            let installed = target.tree();
            assert_ne!(installed, before);
            target.succeed("install", &[prefix]);
            assert_eq!(target.tree(), installed, "installed twice");
            target.succeed("uninstall", &[prefix]);
            assert_eq!(target.tree(), before, "{prefix}");
            // The installed script does the same.
            target.succeed("install", &[prefix]);
            let prefix = prefix.trim_start_matches("PREFIX=");
            let script = format!(
                "{}{prefix}/share/pinfold/install.sh",
                target.root().display()
            );
            let status = Command::new("sh")
                .args([&script, "uninstall"])
                .env("DESTDIR", target.root())
                .env("PREFIX", prefix)
                .status()
                .unwrap();
            assert!(status.success());
            assert_eq!(target.tree(), before, "{prefix}");
        }
    }
}

#[test]
fn uninstall_refuses_while_a_guest_needs_hook() {
    for (path, text, reason) in [
        ("run/pinfold/state.json", "{}", "run hook recover"),
        (
            "etc/pve/qemu-server/100.conf",
            "hookscript: local:snippets/hook\n",
            "the guests 100 have",
        ),
        (
            "etc/pve/lxc/200.conf",
            "hookscript: nas:snippets/hook\n",
            "the guests 200 have",
        ),
        (
            "etc/systemd/system/multi-user.target.wants/pinfold-recover.path",
            "",
            "systemctl disable --now pinfold-recover.path",
        ),
    ] {
        let target = Target::new();
        target.succeed("install", &[]);
        target.write(path, text);
        let before = target.tree();
        let message = target.fail("uninstall");
        assert!(message.contains(reason), "{path}: {message}");
        assert_eq!(target.tree(), before, "{path}");
        fs::remove_file(target.root().join(path)).unwrap();
        target.succeed("uninstall", &[]);
    }
}

#[test]
fn uninstall_passes_over_another_script_of_that_name() {
    for (text, needs_hook) in [
        ("#!/bin/sh\nlogger x\n", false),
        ("\u{7f}ELF pinfold hook", true),
    ] {
        let target = Target::new();
        target.succeed("install", &[]);
        target.write(
            "etc/pve/qemu-server/100.conf",
            "hookscript: nas:snippets/hook\n[before]\nhookscript: local:snippets/hook\n",
        );
        fs::create_dir(target.folder.path().join("nas:snippets")).unwrap();
        fs::write(target.folder.path().join("nas:snippets/hook"), text).unwrap();
        match needs_hook {
            true => assert!(target.fail("uninstall").contains("the guests 100 have")),
            false => drop(target.succeed("uninstall", &[])),
        }
    }
}

#[test]
fn uninstall_without_an_installation_is_an_error() {
    let message = Target::new().fail("uninstall");
    assert!(
        message.contains("nothing is installed with PREFIX=/usr/local"),
        "{message}"
    );
}

#[test]
fn a_missing_program_is_named_before_anything_is_installed() {
    let target = Target::new();
    fs::remove_file(target.folder.path().join("programs/pin-vcpu")).unwrap();
    let message = target.fail("install");
    assert!(
        message.contains("pin-vcpu: not found; run make release first"),
        "{message}"
    );
    assert!(target.tree().is_empty());
}

#[test]
fn without_a_snippets_folder_install_prints_how_to_copy_hook() {
    let target = Target::new();
    let root = target.root();
    let prefix = format!("PREFIX={}/usr", root.display());
    let units = format!("UNITDIR={}/units", root.display());
    let snippets = format!("SNIPPETS={}/snippets", root.display());
    let stdout = target.succeed("install", &[&prefix, &units, &snippets, "DESTDIR="]);
    let copy = format!(
        "install -m 0755 {}/usr/sbin/hook STORAGE/snippets/hook",
        root.display()
    );
    assert!(stdout.contains(&copy), "{stdout}");
    assert_eq!(target.files_named("hook").len(), 1);
}

#[test]
fn a_unit_that_overrides_the_installed_one_is_named() {
    let target = Target::new();
    target.write("etc/systemd/system/pinfold-recover.service", "[Service]\n");
    let stdout = target.succeed("install", &[]);
    assert!(
        stdout.contains(
            "/etc/systemd/system/pinfold-recover.service: overrides /usr/local/lib/systemd/system/"
        ),
        "{stdout}"
    );
}

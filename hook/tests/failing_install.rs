//! What `hook install` prints when a step fails for reasons that a unit test cannot make: a full disk, and a user who is not
//! root.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::print_stdout)]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use pinfold_core::testutils::MadeUpHost;

/// The user `nobody`.
const NOBODY: u32 = 65_534;

const STORAGES: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,snippets";

fn host() -> MadeUpHost {
    let host = MadeUpHost::new("5900x");
    host.conf(100, "cores: 2");
    host.file("etc/pve/storage.cfg", STORAGES);
    host.file("usr/sbin/hook", "#!/bin/sh\n# pinfold hook stub");
    for folder in ["etc/pinfold", "var/lib/vz/snippets"] {
        fs::create_dir_all(host.root.path(folder)).unwrap();
    }
    host
}

/// What is printed, with paths from the host's root.
fn printed(host: &MadeUpHost, output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let base = host.root.path("").display().to_string();
    String::from_utf8(text)
        .unwrap()
        .replace(base.trim_end_matches('/'), "")
}

/// Runs `hook install 100` with a full file system at `folder`, in a mount namespace of its own; none if
/// there cannot be one here.
fn install_with_full(host: &MadeUpHost, folder: &str) -> Option<Output> {
    // A tmpfs of two inodes: its root and a file that fills its only page.
    let script = "mount -t tmpfs -o size=4k,nr_inodes=2,mode=755 full \"$1\" || exit 99\n\
                  head -c 4096 /dev/zero >\"$1/ballast\" || exit 99\n\
                  shift; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(host.root.path(folder))
        .arg(env!("CARGO_BIN_EXE_hook"))
        .arg("--sysroot")
        .arg(host.root.path(""))
        .args(["install", "100"])
        .output();
    match output {
        Ok(output) if output.status.code() == Some(1) => Some(output),
        other => {
            println!("skipped: no file system can be mounted here: {other:?}");
            None
        }
    }
}

#[test]
fn a_full_disk_is_named_and_the_vm_stays_as_it_was() {
    for (folder, expected) in [
        (
            "etc/pinfold",
            "settings of VM 100 in /etc/pinfold/100.toml: hook init 100\n\
             hook: /etc/pinfold/100.toml: write: No space left on device\n",
        ),
        (
            "var/lib/vz/snippets",
            "settings of VM 100 in /etc/pinfold/100.toml: hook init 100\n\
             wrote /etc/pinfold/100.toml: VM 100 gets CPU 10-11,22-23\n\
             its 2 vCPUs are pinned to 10,11\n\
             the host and other guests keep CPU 0-9,12-21\n\
             hook among the snippets: ln -s /usr/sbin/hook /var/lib/vz/snippets/hook\n\
             hook: /var/lib/vz/snippets/hook: link: No space left on device\n",
        ),
    ] {
        let host = host();
        let Some(output) = install_with_full(&host, folder) else {
            return;
        };
        assert_eq!(printed(&host, &output), expected, "{folder}");
        let conf = host.root.read("etc/pve/qemu-server/100.conf").unwrap();
        assert_eq!(conf, "cores: 2\n", "the VM is as it was");
        let settings = host.root.path("etc/pinfold/100.toml");
        assert_eq!(settings.exists(), folder != "etc/pinfold");
    }
}

#[test]
fn only_root_can_install() {
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    open(folder.path());
    let program = folder.path().join("hook");
    fs::copy(env!("CARGO_BIN_EXE_hook"), &program).unwrap();
    open(&program);
    let mut command = Command::new(&program);
    command.args(["install", "100"]).current_dir("/");
    if nix::unistd::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(
        stderr,
        "hook: this needs root; -n prints the steps without it\n"
    );
}

//! Whether Proxmox VE calls this hook for a VM, and can.

use std::fs::Metadata;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{bail, ensure};
use pinfold_core::state::trust;
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{Host, os_text};

use super::finding::Finding;

const CHECK: &str = "hookscript";

/// By this hook knows itself and its version in a file: the text is in the program.
const MARK: &str = concat!("pinfold hook ", env!("CARGO_PKG_VERSION"));

/// The findings about a VM's hookscript.
pub(crate) fn findings(root: &Host, vmid: VmId, conf: &VmConf) -> Vec<Finding> {
    let Some(volume) = &conf.hookscript else {
        let fix = format!("hook install {vmid}");
        return vec![Finding::warn(
            CHECK,
            "not set: Proxmox VE does not call hook for this VM",
            fix,
        )];
    };
    let mut findings = Vec::new();
    let in_storage = vm::snippet(root, volume);
    if let Some((storage, _)) = &in_storage
        && !storage.has_snippets()
    {
        let content = storage.content.join(",");
        findings.push(Finding::warn(
            "storage",
            format!("storage {} does not allow snippets", storage.id),
            format!("pvesm set {} --content {content},snippets", storage.id),
        ));
    }
    let path = match in_storage {
        Some((_, path)) => Some(path),
        None => volume.starts_with('/').then(|| volume.clone()),
    };
    findings.extend(match path {
        Some(path) => of_file(root, vmid, volume, &path),
        None if is_hook_by_name(volume) => vec![Finding::ok(
            CHECK,
            format!("{volume}; not checked: its storage is unknown"),
        )],
        None => vec![foreign(vmid, volume)],
    });
    findings
}

/// Whether a volume has hook's name.
pub(super) fn is_hook_by_name(volume: &str) -> bool {
    volume.rsplit('/').next() == Some("hook")
}

/// Another script. It is not replaced: hook can run it too.
fn foreign(vmid: VmId, shown: &str) -> Finding {
    Finding::warn(
        CHECK,
        format!("{shown} is not hook: nothing is isolated for this VM"),
        format!("let hook run it too: hook install {vmid}"),
    )
}

/// The findings about the file that Proxmox VE runs.
fn of_file(root: &Host, vmid: VmId, volume: &str, path: &str) -> Vec<Finding> {
    let full = root.path(path);
    let shown = full.display();
    let file = match full.metadata() {
        Ok(file) => file,
        Err(_) if !is_hook_by_name(volume) => return vec![foreign(vmid, volume)],
        Err(error) => {
            return vec![Finding::error(
                CHECK,
                format!("{shown}: {}", os_text(&error)),
                format!("hook install {vmid}"),
            )];
        }
    };
    if !file.is_file() {
        return vec![Finding::error(
            CHECK,
            format!("{shown}: not a regular file"),
            "install hook there",
        )];
    }
    let mut findings = Vec::new();
    let mode = file.permissions().mode();
    if mode & 0o111 == 0 {
        findings.push(Finding::error(
            CHECK,
            format!("{shown}: not executable"),
            format!("chmod 0755 {shown}"),
        ));
    }
    findings.extend(not_roots(CHECK, &full, &file));
    let text = match root.read(path) {
        Ok(text) => text,
        Err(error) => {
            findings.push(Finding {
                unread: true,
                ..Finding::warn(CHECK, error.to_string(), "")
            });
            return findings;
        }
    };
    match identity(&text) {
        Identity::Foreign => findings.push(foreign(vmid, &shown.to_string())),
        Identity::Other(version) => findings.push(Finding::warn(
            CHECK,
            format!(
                "{shown} is hook {version}, and this is {}",
                env!("CARGO_PKG_VERSION")
            ),
            format!("install -m 0755 $(command -v hook) {shown}"),
        )),
        Identity::Hook if findings.is_empty() => findings.push(Finding::ok(CHECK, volume)),
        Identity::Hook => {}
    }
    findings
}

/// That others can change a file that root runs.
fn not_roots(check: &'static str, path: &Path, file: &Metadata) -> Option<Finding> {
    let why = trust::is_roots(file).err()?;
    let shown = path.display();
    Some(Finding::warn(
        check,
        format!("{shown}: {why}, and root runs it"),
        format!("chown root: {shown} && chmod 0755 {shown}"),
    ))
}

/// Whether a file, below the root, is hook or calls it. One that cannot be read is not.
pub(crate) fn is_hook(root: &Host, path: &str) -> bool {
    let text = root.read(path).unwrap_or_default();
    identity(&text) != Identity::Foreign
}

/// The version of the hook in a file, below the root; none if it is another program. A script that
/// calls hook has this one's.
pub(crate) fn version(root: &Host, path: &str) -> Option<String> {
    match identity(&root.read(path).ok()?) {
        Identity::Hook => Some(env!("CARGO_PKG_VERSION").to_owned()),
        Identity::Other(version) => Some(version),
        Identity::Foreign => None,
    }
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Identity {
    /// This hook, or a script that calls hook.
    Hook,
    /// A hook of another version.
    Other(String),
    Foreign,
}

/// What a file is, by its text.
fn identity(text: &str) -> Identity {
    let (name, own) = MARK.split_at(MARK.len() - env!("CARGO_PKG_VERSION").len());
    let versions: Vec<String> = text
        .split(name)
        .skip(1)
        .map(|rest| {
            let is_version = |c: &char| c.is_ascii_digit() || *c == '.';
            rest.chars().take_while(is_version).collect::<String>()
        })
        .filter(|version| version.contains('.'))
        .collect();
    match versions.first() {
        // Other texts may follow it in a program.
        Some(_) if versions.iter().any(|version| version.starts_with(own)) => Identity::Hook,
        Some(version) => Identity::Other(version.clone()),
        None if text.contains(name.trim_end()) || calls_hook(text) => Identity::Hook,
        None => Identity::Foreign,
    }
}

/// Whether a script calls hook: by its place, in a line that is no comment.
fn calls_hook(text: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .any(|line| {
            ["snippets/hook", "sbin/hook"].iter().any(|place| {
                let mut after = line.split(place).skip(1);
                after.any(|rest| !rest.starts_with(is_name))
            })
        })
}

/// The file of a script, below the root, as Proxmox VE would run it.
///
/// # Errors
/// Why it cannot be run.
pub(crate) fn file(root: &Host, volume: &str) -> anyhow::Result<String> {
    let Some((_, path)) = vm::snippet(root, volume) else {
        bail!("not found in any storage");
    };
    let full = root.path(&path);
    let file = full.metadata();
    let file = file.map_err(|error| anyhow::anyhow!("{}: {}", full.display(), os_text(&error)))?;
    ensure!(file.is_file(), "{}: not a regular file", full.display());
    let is_executable = file.permissions().mode() & 0o111 != 0;
    ensure!(is_executable, "{}: not executable", full.display());
    ensure!(
        !is_hook(root, &path),
        "{}: it is hook itself, or calls it",
        full.display()
    );
    if let Some(name) = interpreter(root, &path).filter(|name| name.ends_with('\r')) {
        bail!("{}: {}", full.display(), missing(&name));
    }
    Ok(path)
}

/// The interpreter that a script's first line names.
fn interpreter(root: &Host, path: &str) -> Option<String> {
    let text = root.read(path).ok()?;
    let line = text.strip_prefix("#!")?.split('\n').next()?;
    let name = line.trim_start().split([' ', '\t']).next()?;
    Some(name.to_owned())
}

/// Why a script, which exists, cannot be started if its interpreter does not exist.
pub(crate) fn lacks_interpreter(root: &Host, path: &str) -> Option<String> {
    interpreter(root, path).map(|name| missing(&name))
}

/// Why a script with this interpreter cannot be started.
fn missing(name: &str) -> String {
    match name.ends_with('\r') {
        true => format!(
            "its lines end as on Windows, so that the interpreter {name:?} is not found; remove the \
             carriage returns"
        ),
        false => format!("its interpreter {name} does not exist"),
    }
}

/// The findings about the other hookscripts that hook runs for a VM.
pub(super) fn chain(root: &Host, scripts: &[String]) -> Vec<Finding> {
    const CHECK: &str = "chain";
    let mut findings = Vec::new();
    for (at, volume) in scripts.iter().enumerate() {
        let path = match file(root, volume) {
            Ok(path) => path,
            Err(error) => {
                let what = format!("{volume}: {error:#}");
                findings.push(Finding::error(CHECK, what, "correct or remove it in chain"));
                continue;
            }
        };
        let full = root.path(&path);
        let file = full.metadata().ok();
        findings.push(match file.and_then(|file| not_roots(CHECK, &full, &file)) {
            Some(fault) => fault,
            None if scripts[..at].contains(volume) => {
                let what = format!("{volume} is listed twice, and runs twice");
                Finding::warn(CHECK, what, "remove one of them")
            }
            None => Finding::ok(CHECK, format!("{volume} runs too")),
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognized() {
        let own = format!("\u{fffd}ELF\0{MARK}\0");
        for (text, expected) in [
            (own.as_str(), Identity::Hook),
            ("#!/bin/sh\n# pinfold hook stub\n", Identity::Hook),
            (
                "#!/bin/sh\n/var/lib/vz/snippets/hook \"$@\"\n",
                Identity::Hook,
            ),
            ("x pinfold hook 0.0.1y", Identity::Other("0.0.1".into())),
            ("#!/bin/bash\n", Identity::Foreign),
            ("#!/bin/sh\nexec /usr/sbin/hook \"$@\"\n", Identity::Hook),
            // Proxmox VE's example has its own name in a comment.
            (
                "#!/usr/bin/perl\n# qm set <vmid> -hookscript local:snippets/hookscript.pl\n",
                Identity::Foreign,
            ),
            (
                "#!/bin/sh\n# instead of snippets/hook\nlogger pinfold\n",
                Identity::Foreign,
            ),
            ("#!/bin/sh\n/root/snippets/hook-old.sh\n", Identity::Foreign),
            ("", Identity::Foreign),
        ] {
            assert_eq!(identity(text), expected, "{text:?}");
        }
    }
}

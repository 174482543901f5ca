//! The lines of VMID.conf that a bug report needs, without what is secret or names something.

use super::paths::conf_file;
use crate::error::Result;
use crate::sysroot::Sysroot;
use crate::vm::id::VmId;

/// Keys whose values are numbers and words of Proxmox VE.
const WHOLE: [&str; 22] = [
    "affinity",
    "balloon",
    "bios",
    "cores",
    "cpu",
    "cpulimit",
    "cpuunits",
    "freeze",
    "hotplug",
    "hugepages",
    "keephugepages",
    "lock",
    "machine",
    "memory",
    "numa",
    "onboot",
    "ostype",
    "scsihw",
    "smp",
    "sockets",
    "template",
    "vcpus",
];

/// Devices, each with the options that are shown of it; their names end in a number.
const DEVICES: [(&str, &[&str]); 8] = [
    (
        "hostpci",
        &["host", "pcie", "x-vga", "driver", "rombar", "mdev"],
    ),
    ("ide", &["iothread"]),
    ("numa", &["cpus", "hostnodes", "memory", "policy"]),
    ("sata", &["iothread"]),
    ("scsi", &["iothread", "queues"]),
    ("tpmstate", &["version"]),
    ("virtio", &["iothread", "queues"]),
    ("virtiofs", &[]),
];

/// Options of QEMU in `args` that are shown, with their values.
const ARGS: [&str; 3] = ["smp", "cpu", "machine"];

/// The lines of a VM's own settings that matter for its CPUs. Of others only their number is shown:
/// names, descriptions, keys and passwords of cloud-init, networks, paths of disks.
///
/// # Errors
/// If the file cannot be read.
pub fn outline(root: &Sysroot, vmid: VmId) -> Result<String> {
    Ok(outlined(&root.read(conf_file(vmid))?))
}

fn outlined(text: &str) -> String {
    let (mut shown, mut left_out) = (String::new(), 0);
    for line in text.lines().take_while(|line| !line.starts_with('[')) {
        // A description is untrusted text of the VM's users.
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let shown_line = line
            .split_once(':')
            .and_then(|(key, value)| outlined_line(key.trim(), value.trim()));
        match shown_line {
            Some(line) => shown += &format!("{line}\n"),
            None => left_out += 1,
        }
    }
    if left_out > 0 {
        shown += &format!("({left_out} other lines left out)\n");
    }
    shown
}

fn outlined_line(key: &str, value: &str) -> Option<String> {
    if WHOLE.contains(&key) {
        return is_plain(value).then(|| format!("{key}: {value}"));
    }
    match key {
        "args" => return Some(format!("args: {}", outlined_args(value))),
        "hookscript" => {
            let name = value.rsplit('/').next()?;
            let volume = if name == "hook" {
                value
            } else {
                "(another script)"
            };
            return Some(format!("hookscript: {volume}"));
        }
        _ => {}
    }
    let kind = key.trim_end_matches(|c: char| c.is_ascii_digit());
    let (_, options) = DEVICES
        .iter()
        .find(|(name, _)| *name == kind && kind != key)?;
    Some(format!("{key}: {}", outlined_options(kind, value, options)))
}

/// The options of a device; the others by their number.
fn outlined_options(kind: &str, value: &str, names: &[&str]) -> String {
    let mut left_out = 0;
    let mut shown = Vec::new();
    for (at, option) in value.split(',').enumerate() {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, value),
            // A host PCI address has no name in the first place.
            None if at == 0 && kind == "hostpci" => ("host", option),
            None => ("", option),
        };
        match names.contains(&name) && is_plain(value) {
            true => shown.push(option),
            false => left_out += 1,
        }
    }
    let more = format!("({left_out} more)");
    if left_out > 0 {
        shown.push(&more);
    }
    shown.join(",")
}

/// `-smp`, `-cpu` and `-machine` of QEMU's arguments; anything else may be a path or a password.
fn outlined_args(text: &str) -> String {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let (mut shown, mut at, mut left_out) = (Vec::new(), 0, 0);
    while let Some(word) = words.get(at) {
        let name = word.trim_start_matches('-');
        match words.get(at + 1).filter(|value| is_plain(value)) {
            Some(value) if word.starts_with('-') && ARGS.contains(&name) => {
                shown.push(format!("-{name} {value}"));
                at += 2;
            }
            _ => {
                left_out += 1;
                at += 1;
            }
        }
    }
    if left_out > 0 {
        shown.push(format!("({left_out} other words left out)"));
    }
    shown.join(" ")
}

/// Whether a value has only the characters of numbers, words and lists of them; no path.
fn is_plain(value: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ",.;:=+-_ ".contains(c);
    value.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown() {
        let text = "\
#a description%3A password hunter2
agent: 1
args: -smp 12,sockets=1,cores=6,threads=2 -device vnc,password=hunter2 -cpu host,topoext=on
cicustom: user=local:snippets/hunter2.yml
cipassword: $5$hunter2
cores: 12
cpu: host,flags=+pcid
description: hunter2
hookscript: local:snippets/hook
hostpci0: 0000:0b:00,pcie=1,romfile=hunter2.rom
hostpci1: mapping=hunter2,x-vga=1
ide2: nas:hunter2/vm-100-cloudinit,media=cdrom
machine: /hunter2
memory: 8192
name: hunter2
net0: virtio=BC:24:11:00:00:01,bridge=hunter2
numa: 1
numa0: cpus=0-7,hostnodes=1,memory=4096,policy=bind
scsi0: local:100/hunter2.raw,iothread=1,serial=hunter2
smbios1: uuid=hunter2
sshkeys: ssh-ed25519%20hunter2
tags: hunter2
[hunter2]
cores: 4
";
        let shown = outlined(text);
        assert!(!shown.contains("hunter2"), "{shown}");
        assert_eq!(
            shown,
            "\
args: -smp 12,sockets=1,cores=6,threads=2 -cpu host,topoext=on (2 other words left out)
cores: 12
cpu: host,flags=+pcid
hookscript: local:snippets/hook
hostpci0: 0000:0b:00,pcie=1,(1 more)
hostpci1: x-vga=1,(1 more)
ide2: (2 more)
memory: 8192
numa: 1
numa0: cpus=0-7,hostnodes=1,memory=4096,policy=bind
scsi0: iothread=1,(2 more)
(10 other lines left out)
"
        );
    }
}

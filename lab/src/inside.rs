//! What a guest sees of its CPUs: the kernel of an image, started with the options of a VM, and asked from inside.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::guest::Guest;
use crate::image::Image;
use crate::setup;

/// A guest that has not printed its CPUs by then hangs. It takes ten seconds, more on a busy machine.
const SECONDS: &str = "300";

/// Its init: prints a line `CPU,CORE,SOCKET,NODE` for each CPU and, when the console has it, resets the machine, which ends
/// QEMU.
const KERNEL_LINE: &str = "root=/dev/vda ro console=ttyS0 quiet panic=-1 mitigations=off init=/bin/sh -- -c \
    \"mount -t sysfs sysfs /sys; mount -t proc proc /proc; lscpu -p=CPU,CORE,SOCKET,NODE; echo END; sleep 1; echo b > /proc/sysrq-trigger\"";

/// A CPU as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Its number, which is the vCPU's.
    pub cpu: usize,
    /// Its core, counted over all sockets.
    pub core: usize,
    /// Its socket.
    pub socket: usize,
    /// Its NUMA node.
    pub node: usize,
}

/// The guest's CPUs, and what QEMU printed.
#[derive(Debug)]
pub struct View {
    /// By number.
    pub cpus: Vec<Cpu>,
    /// Warnings of QEMU.
    pub warnings: String,
}

/// Starts a guest with these options of QEMU for its CPUs and memory nodes, and asks what it sees.
///
/// # Errors
/// If QEMU or the guest fails.
pub fn look(guest: Guest, options: &[&str]) -> Result<View> {
    let image = Image::ensure(&Cache::open()?, guest)?;
    let disk = format!(
        "if=virtio,format=qcow2,snapshot=on,file={}",
        image.disk().display()
    );
    let output = setup::command("timeout")
        .args([
            SECONDS,
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=single",
            "-m",
            "1G",
            "-display",
            "none",
        ])
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initrd())
        .args(["-append", KERNEL_LINE, "-drive", &disk, "-serial", "stdio"])
        .args(options)
        .stdin(Stdio::null())
        .output()
        .context("qemu-system-x86_64: cannot run")?;
    let (console, warnings) = (
        String::from_utf8_lossy(&output.stdout).replace('\r', ""),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    ensure!(
        console.contains("\nEND\n"),
        "the guest did not print its CPUs, QEMU: {}\n{console}\n{warnings}",
        output.status
    );
    let cpus = console.lines().filter_map(parse).collect();
    Ok(View { cpus, warnings })
}

/// A line of `lscpu -p=CPU,CORE,SOCKET,NODE`; without nodes the last field is empty.
fn parse(line: &str) -> Option<Cpu> {
    let mut fields = line.split(',');
    let mut number = || fields.next()?.parse().ok();
    let (cpu, core, socket) = (number()?, number()?, number()?);
    let node = fields.next()?;
    Some(Cpu {
        cpu,
        core,
        socket,
        node: if node.is_empty() {
            0
        } else {
            node.parse().ok()?
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_lscpu() {
        let cpu = |cpu, core, socket, node| Cpu {
            cpu,
            core,
            socket,
            node,
        };
        assert_eq!(parse("3,1,0,1"), Some(cpu(3, 1, 0, 1)));
        assert_eq!(parse("3,1,0,"), Some(cpu(3, 1, 0, 0)));
        for line in ["# CPU,Core,Socket,Node", "", "END", "1,2"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}

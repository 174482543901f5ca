//! `lab demo`: the main job on a real host, before, during and after.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::{Guest, Host, VmSpec};

const ISOLATED: &str = "6-11,18-23";

/// How the host looks: who may run where, counted by CPU.
const LOOK: &str = "/usr/local/lib/pinfold-lab/lab-agent map";

/// Shows it, telling on `out` what is done.
pub fn run(bins: &Path, out: &mut impl Write) -> Result<()> {
    let began = Instant::now();
    writeln!(
        out,
        "# a host of 24 CPUs, Debian 13, under QEMU (the first time its image is made and it boots: some minutes)"
    )?;
    let host = Host::acquire(Guest::Trixie, bins)?;
    writeln!(
        out,
        "# it runs after {} s: {}",
        began.elapsed().as_secs(),
        host.ok("uname -sr; nproc")?.trim().replace('\n', ", CPUs: ")
    )?;
    host.ok("mkdir -p /var/lib/vz/snippets && cp $(command -v hook) /var/lib/vz/snippets/hook")?;
    // Another VM, which makes qemu.slice and is to be kept off.
    host.start_vm(&VmSpec { cores: 4, ..VmSpec::new(101) })?;
    let before = host.snapshot()?;

    writeln!(out, "\n# before: what may run on each CPU")?;
    show(&host, out, LOOK)?;

    writeln!(out, "\n# qm start 100: 12 vCPUs, 2 iothreads, hookscript: local:snippets/hook")?;
    let vm = VmSpec { hookscript: Some("local:snippets/hook".into()), ..VmSpec::new(100) };
    write!(out, "{}", host.start_vm(&vm)?)?;
    writeln!(out, "\n# during: the same, with VM 100 fenced")?;
    show(&host, out, LOOK)?;
    show(&host, out, "pin-vcpu 100 --list")?;
    show(&host, out, "hook status")?;
    let strays = host.strays(ISOLATED, &[100])?;
    ensure!(strays.is_clean(), "strays on CPU {ISOLATED}: {strays:#?}");
    writeln!(out, "# looked for independently of hook: no user task, kernel thread or IRQ strays onto CPU {ISOLATED}")?;

    writeln!(out, "\n# qm stop 100")?;
    write!(out, "{}", host.stop_vm(100)?)?;
    writeln!(out, "\n# after")?;
    show(&host, out, LOOK)?;
    let difference = before.not_restored(&host.snapshot()?);
    ensure!(difference.is_empty(), "the host is not what it was:\n{}", difference);
    let lines = before.lines().len();
    writeln!(
        out,
        "# the host is what it was before: {lines} lines of its state (masks, cgroups, drop-ins, governors,"
    )?;
    writeln!(out, "# sysctls, PCI devices, kernel threads), none differs")?;
    Ok(())
}

fn show(host: &Host, out: &mut impl Write, command: &str) -> Result<()> {
    writeln!(out, "$ {command}\n{}", host.ok(command)?.trim_end())?;
    Ok(())
}

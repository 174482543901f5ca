//! `lab demo`: the main job on a real host, before, during and after.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::lifeline::Lifeline;
use crate::{Guest, Host, VmSpec, svg};

const ISOLATED: &str = "6-11,18-23";

/// Shows the host: what may run on each CPU, counted.
const LOOK: &str = "/usr/local/lib/pinfold-lab/lab-agent map";

/// Runs it and prints each step to `out`.
pub fn run(bins: &Path, out: &mut impl Write) -> Result<()> {
    let began = Instant::now();
    writeln!(
        out,
        "# a host of 24 CPUs, Debian 13, under QEMU (the first time its image is made and it boots: some minutes)"
    )?;
    // Dropped after the host, so that its lock is free by then.
    let _lifeline = Lifeline::start()?;
    let host = Host::acquire(Guest::Trixie, bins)?;
    writeln!(
        out,
        "# it runs after {} s: {}",
        began.elapsed().as_secs(),
        host.ok("uname -sr; nproc")?
            .trim()
            .replace('\n', ", CPUs: ")
    )?;
    host.ok("mkdir -p /var/lib/vz/snippets && cp $(command -v hook) /var/lib/vz/snippets/hook")?;
    // Another VM, which makes qemu.slice and is to be kept off.
    host.start_vm(&VmSpec {
        cores: 4,
        ..VmSpec::new(101)
    })?;
    let before = host.snapshot()?;

    writeln!(out, "\n# before: what may run on each CPU")?;
    show(&host, out, LOOK)?;

    writeln!(
        out,
        "\n# qm start 100: 12 vCPUs, 2 iothreads, hookscript: local:snippets/hook"
    )?;
    let vm = VmSpec {
        busy: true,
        hookscript: Some("local:snippets/hook".into()),
        ..VmSpec::new(100)
    };
    write!(out, "{}", host.start_vm(&vm)?)?;
    writeln!(out, "\n# during: the same, with VM 100 fenced")?;
    show(&host, out, LOOK)?;
    show(&host, out, "pin-vcpu 100 --list")?;
    show(&host, out, "hook status")?;
    let strays = host.strays(ISOLATED, &[100])?;
    ensure!(strays.is_clean(), "strays on CPU {ISOLATED}: {strays:#?}");
    writeln!(
        out,
        "# looked for independently of hook: no user task, kernel thread or IRQ strays onto CPU {ISOLATED}"
    )?;

    writeln!(out, "\n# qm stop 100")?;
    write!(out, "{}", host.stop_vm(100)?)?;
    writeln!(out, "\n# after")?;
    show(&host, out, LOOK)?;
    let difference = before.not_restored(&host.snapshot()?);
    ensure!(
        difference.is_empty(),
        "the host is not what it was:\n{}",
        difference
    );
    let lines = before.lines().len();
    writeln!(
        out,
        "# the host is what it was before: {lines} lines of its state (masks, cgroups, drop-ins, governors,"
    )?;
    writeln!(out, "# sysctls, PCI devices, kernel threads), none differs")?;
    Ok(())
}

/// Draws `hook status` as it is while a VM is fenced, another starts, and something strays.
pub fn picture(bins: &Path, file: &Path) -> Result<()> {
    let host = Host::acquire(Guest::Trixie, bins)?;
    host.ok("mkdir -p /var/lib/vz/snippets /etc/pinfold && cp $(command -v hook) /var/lib/vz/snippets/hook")?;
    let settings = "isolated = \"8-11,20-23\"\npins = \"8,20,9,21,10,22\"\nmethod = \"hotplug\"\n";
    host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644)?;
    host.put(
        "/etc/pinfold/101.toml",
        b"isolated = \"6-7,18-19\"\npins = \"6,18,7,19\"\nmethod = \"hotplug\"\n",
        0o644,
    )?;
    let vm = |id, cores| VmSpec {
        cores,
        hookscript: Some("local:snippets/hook".into()),
        ..VmSpec::new(id)
    };
    host.start_vm(&vm(100, 6))?;
    let starting = VmSpec {
        hookscript: None,
        ..vm(101, 4)
    };
    host.put(&starting.conf_path(), starting.conf().as_bytes(), 0o640)?;
    // The kernel has taken the folders away that were mounted over those of CPUs that were offline.
    host.renew_topology()?;
    let status = "taskset -pc 11 $(pgrep -x kswapd0) > /dev/null; hook 101 pre-start -q && \
                  CLICOLOR_FORCE=1 hook status";
    // Its exit code is 1, for the stray.
    let text = host.sh(status)?.stdout;
    fs::write(file, svg::draw("hook status", &text))
        .with_context(|| format!("{}: cannot write", file.display()))
}

fn show(host: &Host, out: &mut impl Write, command: &str) -> Result<()> {
    writeln!(out, "$ {command}\n{}", host.ok(command)?.trim_end())?;
    Ok(())
}

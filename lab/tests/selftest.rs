//! The lab proves itself before it proves anything else.

#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used)]

use pinfold_lab::{Guest, Host, VmSpec};
use std::path::Path;

/// VM 100's threads by name.
fn threads(host: &Host) -> Vec<String> {
    let names = host
        .ok("cat /proc/$(cat /run/qemu-server/100.pid)/task/*/comm")
        .unwrap();
    names.lines().map(str::to_owned).collect()
}

fn a_host_is_real_and_comes_back(guest: Guest) {
    let agent = Path::new(env!("CARGO_BIN_EXE_lab-agent"));
    assert!(agent.exists());
    let empty = tempfile::tempdir().unwrap();
    let mut host = Host::acquire(guest, empty.path()).unwrap_or_else(|err| panic!("{err:#}"));
    assert_eq!(host.ok("nproc").unwrap(), "24\n");

    // Files, exit codes and signals come through.
    host.put("/root/x", b"\x00\xff\n", 0o600).unwrap();
    assert_eq!(host.get("/root/x").unwrap(), b"\x00\xff\n");
    let output = host.sh("echo out; echo err >&2; exit 3").unwrap();
    assert_eq!(
        (output.code, output.stdout.as_str(), output.stderr.as_str()),
        (Some(3), "out\n", "err\n")
    );
    assert_eq!(host.sh("kill -TERM $$").unwrap().signal, Some(15));

    // An idle host does not change under our eyes.
    let before = host.snapshot().unwrap();
    let again = host.snapshot().unwrap();
    assert_eq!(before.diff(&again), "");
    let strays = host.strays("6-11,18-23", &[]).unwrap();
    assert!(
        !strays.threads.is_empty() && !strays.kthreads.is_empty() && !strays.irqs.is_empty(),
        "{strays:?}"
    );
    assert!(
        strays
            .kernel_bound
            .iter()
            .any(|name| name.starts_with("irq ")),
        "no managed IRQ"
    );

    // A VM as PVE starts it, with true KVM threads, and the way back.
    host.start_vm(&VmSpec {
        tpm: true,
        ..VmSpec::new(100)
    })
    .unwrap();
    let vcpus = threads(&host)
        .iter()
        .filter(|name| name.starts_with("CPU ") && name.ends_with("/KVM"))
        .count();
    assert_eq!(vcpus, 12);
    assert_eq!(host.ok("qm status 100").unwrap(), "status: running\n");
    assert_eq!(
        host.ok("systemctl show -P Slice 100.scope").unwrap(),
        "qemu.slice\n"
    );

    // The same with a kept state: the VM still runs in it, and answers.
    host.save("with-vm").unwrap();
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, true).unwrap();
    assert_eq!(host.ok("qm status 100").unwrap(), "status: stopped\n");
    host.load("with-vm").unwrap();
    assert_eq!(threads(&host).len(), threads(&host).len());
    host.stop_vm(100).unwrap();

    // Every slot of the machine can be emptied and filled, both functions of the last with it.
    let devices = "ls /sys/bus/pci/devices";
    let all = host.ok(devices).unwrap();
    host.ok("for f in 0 1; do echo 1 > /sys/bus/pci/devices/0000:04:00.$f/remove; done")
        .unwrap();
    assert!(!host.ok(devices).unwrap().contains("0000:04:00"));
    host.ok("echo 1 > /sys/bus/pci/rescan; udevadm settle")
        .unwrap();
    assert_eq!(host.ok(devices).unwrap(), all);

    // CPUs go and come, and nothing of all this is left after a reset.
    host.ok("cd /sys/devices/system/cpu; for c in 6 18; do echo 0 > cpu$c/online; echo 1 > cpu$c/online; done")
        .unwrap();
    host.reset().unwrap();
    assert_eq!(before.diff(&host.snapshot().unwrap()), "");
    assert!(host.get("/root/x").is_err());
}

#[test]
fn trixie() {
    a_host_is_real_and_comes_back(Guest::Trixie);
}

#[test]
fn bookworm() {
    a_host_is_real_and_comes_back(Guest::Bookworm);
}

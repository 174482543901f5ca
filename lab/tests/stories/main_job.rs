//! The main job: a VM's CPUs are fenced off when it starts, and the host is put back when it stops.

use pinfold_lab::{Host, VmSpec};

use crate::stories;
use crate::support::{
    Call, PINS, assert_fenced, assert_restored, expect, install_hook, kill_at, vm,
};

stories![
    start_and_stop_as_pve_does,
    killed_without_pre_stop,
    post_stop_never_comes,
    the_documented_order,
    once_more_changes_nothing,
    killed_half_way,
];

/// A line of VMID.conf: six cores of two threads.
const SMT: &str = "args: -smp 12,sockets=1,cores=6,threads=2\n";

fn start_and_stop_as_pve_does(host: &mut Host) {
    install_hook(host);
    // The first start makes qemu.slice, which stays: the host to come back to has it.
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    let log = host.start_vm(&vm()).unwrap();
    assert!(
        log.contains("CPU 6-11,18-23 reserved for VM 100, from the built-in layout 5900x"),
        "{log}"
    );
    assert!(log.contains("isolating CPU 6-11,18-23 for VM 100"), "{log}");
    assert_fenced(host);
    let (status, _) = expect(host, "hook status", 0);
    assert!(status.contains("\nVM 100 has CPU 6-11,18-23\n"), "{status}");
    for (vcpu, cpu) in PINS.iter().enumerate() {
        assert!(
            status.contains(&format!(" {cpu} 100:v{vcpu} "))
                || status.contains(&format!(" {cpu} 100:v{vcpu}\n")),
            "{status}"
        );
    }
    assert!(
        status.contains("\nstrays (could be elsewhere): 0\n"),
        "{status}"
    );
    // Linux 6.1 names rescuers after their queues, and has no idle_inject.
    let of_cpu_6 = status
        .split("\nkernel-bound threads: ")
        .nth(1)
        .and_then(|list| list.split("\n  CPU ").nth(1))
        .unwrap();
    let bound = |kind: &str| of_cpu_6.starts_with('6') && of_cpu_6.contains(kind);
    assert!(
        bound("cpuhp") && bound("ksoftirqd") && bound("migration"),
        "what the kernel binds is listed: {status}"
    );

    let log = host.stop_vm(100).unwrap();
    assert!(log.contains("CPU 6-11,18-23 released by VM 100"), "{log}");
    assert_restored(host, &before);
    expect(host, "test ! -e /run/pinfold/state.json", 0);
}

/// With the settings that `hook init` writes for a guest with SMT: the second CCD, a core for each
/// of the guest's.
fn killed_without_pre_stop(host: &mut Host) {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let spec = VmSpec {
        more: SMT.into(),
        ..vm()
    };
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    let (written, _) = expect(host, "hook init 100", 0);
    assert!(
        written.starts_with("wrote /etc/pinfold/100.toml: VM 100 gets llc:1, CPU 6-11,18-23\n"),
        "{written}"
    );
    let before = host.snapshot().unwrap();
    let log = host.start_vm(&spec).unwrap();
    assert!(
        log.contains("CPU 6-11,18-23 reserved for VM 100, from /etc/pinfold/100.toml"),
        "{log}"
    );
    assert_fenced(host);
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, true).unwrap();
    assert_restored(host, &before);
}

fn post_stop_never_comes(host: &mut Host) {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    host.start_vm(&vm()).unwrap();
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, false).unwrap();
    let (_, notes) = expect(host, "hook recover", 0);
    assert!(
        notes.contains("VM 100 has ended; releasing its CPUs"),
        "{notes}"
    );
    assert_restored(host, &before);
}

fn the_documented_order(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let (trace, _) = expect(
        host,
        "hook 100 pre-start -q && hook 100 post-start --json",
        0,
    );
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let mut steps = Vec::new();
    for change in trace["changes"].as_array().unwrap() {
        let step = change["step"].as_str().unwrap();
        if change["outcome"] == "changed" && steps.last() != Some(&step) {
            steps.push(step);
        }
    }
    let order = [
        "slices", "offline", "irqs", "kthreads", "online", "pace", "decouple", "pins",
    ];
    assert_eq!(steps[..order.len()], order);
    // What came back with the CPUs is looked at again, and nothing else.
    assert!(
        steps[order.len()..]
            .iter()
            .all(|step| matches!(*step, "irqs" | "kthreads")),
        "{steps:?}"
    );
    // vCPUs are pinned before the other threads of QEMU.
    let pins: Vec<bool> = (trace["changes"].as_array().unwrap().iter())
        .filter(|change| change["step"] == "pins")
        .map(|change| change["object"].as_str().unwrap().starts_with("vCPU"))
        // The second look begins with the vCPUs again.
        .take(15)
        .collect();
    assert_eq!(pins.iter().filter(|vcpu| **vcpu).count(), 12);
    assert!(pins.is_sorted_by(|a, b| a >= b), "{pins:?}");
}

/// The settings leave the order of the pins to hook, and VMID.conf has changed since QEMU was
/// started: QEMU itself reports its guest's cores.
fn once_more_changes_nothing(host: &mut Host) {
    host.start_vm(&VmSpec {
        more: SMT.into(),
        ..VmSpec::new(100)
    })
    .unwrap();
    let spec = VmSpec::new(100);
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    host.ok("mkdir -p /etc/pinfold").unwrap();
    host.put(
        "/etc/pinfold/100.toml",
        b"isolated = \"llc:1\"\npins = \"auto\"\n",
        0o644,
    )
    .unwrap();
    expect(host, "hook 100 pre-start && hook 100 post-start", 0);
    let fenced = host.snapshot().unwrap();
    let (trace, _) = expect(host, "hook 100 post-start --json", 0);
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    for change in trace["changes"].as_array().unwrap() {
        assert_ne!(change["outcome"], "changed", "{change}");
    }
    assert_restored(host, &fenced);
    assert_fenced(host);
}

/// Killed at some point of its run, hook leaves what its next run needs.
fn killed_half_way(host: &mut Host) {
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    for nth in [14, 90] {
        host.start_vm(&VmSpec::new(100)).unwrap();
        expect(host, "hook 100 pre-start -q", 0);
        assert!(
            kill_at(host, &Call::nth("write", nth), "hook 100 post-start"),
            "the {nth}th write was reached"
        );
        host.kill_vm(100).unwrap();
        host.cleanup_vm(100, false).unwrap();
        expect(host, "hook 100 post-stop", 0);
        assert_restored(host, &before);
    }
}

//! Containers, whose CPUs pvestatd chooses: while a VM is fenced each has as many CPUs as before, and
//! afterwards exactly those that it had.

use pinfold_lab::{Host, VmSpec};

use crate::events::settings;
use crate::stories;
use crate::support::{
    Call, HOUSEKEEPING, assert_clean, assert_fenced, assert_restored, expect, install_hook,
    kill_at, vm,
};

stories![only trixie: containers_by_hotplug, containers_by_partition];

/// One round of pvestatd's: what it logs.
const PVESTATD: &str = "/usr/local/lib/pinfold-lab/lab-agent pvestatd";

/// Number, settings and CPUs: with isolated CPUs, pinned to such by its settings, with all CPUs, with
/// others.
const CONTAINERS: [(u32, &str, &str); 4] = [
    (201, "cores: 2", "6,18"),
    (202, "lxc.cgroup2.cpuset.cpus: 8-9", "8-9"),
    (203, "hostname: all", "0-23"),
    (204, "cores: 2", "0-1"),
];

/// As LXC makes them, each with a process.
fn make(host: &Host) {
    host.ok(
        "mkdir /etc/pve/nodes/pve1/lxc && ln -s nodes/pve1/lxc /etc/pve/lxc && mkdir /sys/fs/cgroup/lxc && \
         echo +cpuset > /sys/fs/cgroup/cgroup.subtree_control && \
         echo +cpuset > /sys/fs/cgroup/lxc/cgroup.subtree_control",
    )
    .unwrap();
    for (id, conf, cpus) in CONTAINERS {
        host.ok(&format!(
            "echo '{conf}' > /etc/pve/lxc/{id}.conf; cd /sys/fs/cgroup/lxc && mkdir -p {id}/ns && \
             echo +cpuset > {id}/cgroup.subtree_control && \
             echo {cpus} > {id}/cpuset.cpus && echo {cpus} > {id}/ns/cpuset.cpus && \
             (sh -c 'echo $$ > {id}/ns/cgroup.procs; exec setsid sleep 1000{id} > /dev/null 2>&1' &); \
             until pgrep -xf 'sleep 1000{id}' > /dev/null; do sleep 0.1; done"
        ))
        .unwrap();
    }
}

/// The sets of all containers, the outer one as that within.
fn sets(host: &Host) -> Vec<String> {
    let set = |(id, ..): (u32, &str, &str)| {
        let read = |file: &str| {
            let path = format!("/sys/fs/cgroup/lxc/{id}/{file}");
            host.ok(&format!("cat {path}")).unwrap().trim().to_owned()
        };
        assert_eq!(read("cpuset.cpus"), read("ns/cpuset.cpus"), "{id}");
        read("cpuset.cpus")
    };
    CONTAINERS.map(set).to_vec()
}

/// Where their processes may run.
fn processes(host: &Host) -> Vec<String> {
    let cpus = |(id, ..): (u32, &str, &str)| {
        let script = format!(
            "sed -n 's/^Cpus_allowed_list:\t//p' /proc/$(pgrep -xf 'sleep 1000{id}')/status"
        );
        host.ok(&script).unwrap().trim().to_owned()
    };
    CONTAINERS.map(cpus).to_vec()
}

const BEFORE: [&str; 4] = ["6,18", "8-9", "0-23", "0-1"];
const MEANWHILE: [&str; 4] = ["2-3", "8-9", HOUSEKEEPING, "0-1"];
/// Of a set without any CPU that is left the kernel makes all that are.
const ALLOWED: [&str; 4] = ["2-3", HOUSEKEEPING, HOUSEKEEPING, "0-1"];

fn containers_by_hotplug(host: &mut Host) {
    containers(host, "hotplug");
}

fn containers_by_partition(host: &mut Host) {
    containers(host, "partition");
}

fn containers(host: &Host, method: &str) {
    install_hook(host);
    host.ok("mkdir -p /etc/pinfold").unwrap();
    settings(host, method);
    host.start_vm(&VmSpec::new(101)).unwrap();
    make(host);
    assert_eq!(
        host.ok(PVESTATD).unwrap(),
        "",
        "they are as pvestatd has them"
    );
    // The controller stays on, and what had no set and has processes has all CPUs from then on.
    host.start_vm(&vm()).unwrap();
    host.stop_vm(100).unwrap();
    assert_eq!(sets(host), BEFORE);
    let before = host.snapshot().unwrap();

    let log = host.start_vm(&vm()).unwrap();
    assert!(log.contains("containers: 4 changed"), "{log}");
    assert_fenced(host);
    assert_eq!(sets(host), MEANWHILE);
    assert_eq!(processes(host), ALLOWED);
    let (trace, _) = expect(host, "hook 100 post-start --json", 0);
    assert!(
        !trace.contains("\"changed\""),
        "once more changes nothing: {trace}"
    );
    // By partition pvestatd has nothing to change; by hotplug it sees all CPUs.
    for round in 0..3 {
        let log = host.ok(PVESTATD).unwrap();
        let modified: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("modified"))
            .collect();
        match (method, round) {
            ("hotplug", 0) => assert_eq!(modified, ["modified cpu set for lxc/203: 0-23"], "{log}"),
            _ => assert!(modified.is_empty(), "{log}"),
        }
        println!(
            "pvestatd by {method}, round {round}: {} lines\n{log}",
            log.lines().count()
        );
    }
    assert_eq!(processes(host), ALLOWED);
    let log = host.stop_vm(100).unwrap();
    assert!(!log.contains("something else"), "{log}");
    assert_eq!(sets(host), BEFORE);
    assert_restored(host, &before);

    // A hook that is killed while it gives them back, and one that is killed with its VM.
    host.start_vm(&vm()).unwrap();
    let file = "/sys/fs/cgroup/lxc/201/ns/cpuset.cpus".to_owned();
    let call = Call {
        name: "write".to_owned(),
        nth: 1,
        file: Some(file),
    };
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, false).unwrap();
    assert!(kill_at(host, &call, "hook 100 post-stop -q"));
    assert_ne!(sets_of_both(host, 201), ["6,18", "6,18"]);
    expect(host, "hook recover -q", 0);
    assert_eq!(sets(host), BEFORE);
    assert_restored(host, &before);

    // One that has ended meanwhile, and one that pvestatd has moved.
    host.start_vm(&vm()).unwrap();
    host.ok("pkill -xf 'sleep 1000204'; cd /sys/fs/cgroup/lxc; \
         until rmdir 204/ns 204 2> /dev/null; do sleep 0.1; done; rm /etc/pve/lxc/204.conf; \
         echo 4,19 | tee 201/cpuset.cpus > 201/ns/cpuset.cpus")
        .unwrap();
    expect(host, "hook 100 post-start -q", 0);
    assert_eq!(sets_of_both(host, 201), ["0,4", "0,4"]);
    assert_clean(host, crate::support::ISOLATED, &[100]);
    host.stop_vm(100).unwrap();
    assert_eq!(sets_of_both(host, 201), ["4,19", "4,19"]);
    expect(host, "test ! -e /run/pinfold/state.json", 0);
}

fn sets_of_both(host: &Host, id: u32) -> [String; 2] {
    ["", "/ns"].map(|folder| {
        let path = format!("/sys/fs/cgroup/lxc/{id}{folder}/cpuset.cpus");
        host.ok(&format!("cat {path}")).unwrap().trim().to_owned()
    })
}

//! A host whose administrator keeps CPUs for something else: by `isolcpus=`, and by a partition of
//! his own.

use pinfold_lab::{Guest, Host, HostState, VmSpec};

use crate::support::{ISOLATED, PINS, assert_clean, expect, install_hook, threads, vm};

mod isolcpus {
    #[test]
    fn what_others_keep_stays_theirs() {
        crate::support::run(
            pinfold_lab::Guest::Isolcpus,
            super::what_others_keep_stays_theirs,
        );
    }
}

/// User threads that may run on some CPUs.
fn users_of(host: &Host, cpus: &str) -> Vec<String> {
    let strays = host.strays(cpus, &[]).unwrap();
    let threads = strays.threads.iter();
    let mut lines: Vec<_> = threads
        .map(|thread| format!("{} {}", thread.comm, thread.cpus))
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

/// Fences VM 100: only these are on the administrator's CPUs, and the host is restored.
fn fence(host: &Host, method: &str, theirs: &str, users: &[&str], common: &str) {
    println!("by {method}, beside CPU {theirs}");
    let pins: Vec<String> = PINS.iter().map(ToString::to_string).collect();
    let pins = pins.join(",");
    let text = format!("isolated = \"{ISOLATED}\"\npins = \"{pins}\"\nmethod = \"{method}\"\n");
    host.put("/etc/pinfold/100.toml", text.as_bytes(), 0o644)
        .unwrap();
    let before = host.snapshot().unwrap();
    let log = host.start_vm(&vm()).unwrap();
    assert!(
        !log.contains("WARN") && !log.contains("something else"),
        "{log}"
    );
    assert_clean(host, ISOLATED, &[100]);
    for (name, cpus) in threads(host, 100) {
        if !name.starts_with("CPU ") {
            assert_eq!(cpus, common, "{name}");
        }
    }
    assert_eq!(users_of(host, theirs), users);
    // Another run finds nothing that something else has set.
    let (_, notes) = expect(host, "hook 100 post-start", 0);
    assert!(!notes.contains("something else"), "{notes}");
    let log = host.stop_vm(100).unwrap();
    assert!(!log.contains("something else"), "{log}");
    // A cgroup with processes gets all CPUs that it may have, in so many words, and so do workqueues.
    // psimon is born anew each time that systemd reloads.
    let same = |state: &HostState| {
        let lines = state.lines().iter();
        let text: String = lines
            .filter(|line| !line.starts_with("kthread \"psimon\""))
            .map(|line| format!("{line}\n"))
            .collect();
        let text = text.replace("cpuset.cpus=\"0-2,4-14,16-23\"", "cpuset.cpus=\"\"");
        HostState::parse(&text.replace(
            "cpumask_requested=\"ffbffb\"",
            "cpumask_requested=\"ff3ff3\"",
        ))
    };
    let difference = same(&before).not_restored(&same(&host.snapshot().unwrap()));
    assert!(difference.is_empty(), "{difference}");
}

fn what_others_keep_stays_theirs(host: &mut Host) {
    assert_eq!(host.guest, Guest::Isolcpus);
    install_hook(host);
    // The first start makes qemu.slice, which stays.
    host.start_vm(&VmSpec::new(101)).unwrap();
    host.ok(
        "mkdir -p /etc/pinfold; (taskset -c 2 sleep 10002 >/dev/null 2>&1 &); \
         (taskset -c 2,6 sleep 10026 >/dev/null 2>&1 &); until [ \"$(pgrep -c '^sleep$')\" = 2 ]; do sleep 0.1; done",
    )
    .unwrap();
    assert_eq!(users_of(host, "2,14"), ["sleep 2", "sleep 2,6"]);
    fence(host, "hotplug", "2,14", &["sleep 2"], "0-1,3-5,12-13,15-17");
    host.ok(
        "systemctl set-property --runtime admin.slice AllowedCPUs=3,15 && systemd-run -q --slice=admin.slice sleep 10003 && \
         echo isolated > /sys/fs/cgroup/admin.slice/cpuset.cpus.partition && systemctl daemon-reload",
    )
    .unwrap();
    for method in ["partition", "hotplug"] {
        let users = ["sleep 2", "sleep 3,15"];
        fence(host, method, "2-3,14-15", &users, "0-1,4-5,12-13,16-17");
        let partition = host
            .ok("cat /sys/fs/cgroup/admin.slice/cpuset.cpus.partition")
            .unwrap();
        assert_eq!(partition, "isolated\n");
    }
}

//! The isolation method `partition`: one write of the kernel's in the VM's own scope.

use pinfold_lab::{Guest, Host, VmSpec};

use crate::stories;
use crate::support::{
    HOUSEKEEPING, ISOLATED, assert_clean, assert_fenced, assert_restored, expect, install_hook,
    refuses, threads, vm,
};
use crate::tools::there_and_back;

stories![with partitions:
    a_vm_has_a_partition,
    cpu_0_by_its_name,
    init_sets_what_suits_the_vm,
    a_partition_by_hand,
    two_vms_and_others,
    one_is_killed_and_the_other_stops,
    what_partition_refuses,
    meddled_with,
];

mod bookworm {
    #[test]
    fn too_old_a_kernel() {
        crate::support::run(pinfold_lab::Guest::Bookworm, super::too_old_a_kernel);
    }
}

/// VM 100's settings: the layout's CPUs, by this method.
fn settings(host: &Host, method: &str) {
    host.ok("mkdir -p /etc/pinfold").unwrap();
    let text = format!("layout = \"5900x\"\nmethod = \"{method}\"\n");
    host.put("/etc/pinfold/100.toml", text.as_bytes(), 0o644)
        .unwrap();
}

/// VM 102 on one core, by partition.
fn small(host: &Host) -> VmSpec {
    let text = "isolated = \"5,17\"\npins = \"5,17\"\nmethod = \"partition\"\n";
    host.put("/etc/pinfold/102.toml", text.as_bytes(), 0o644)
        .unwrap();
    VmSpec {
        cores: 2,
        hookscript: vm().hookscript,
        ..VmSpec::new(102)
    }
}

fn value(host: &Host, file: &str) -> String {
    host.ok(&format!("cat {file}")).unwrap().trim().to_owned()
}

/// VM 100 is fenced as by hotplug, and its QEMU stayed in its scope, whose slice and all others are
/// as they were.
fn assert_partitioned(host: &Host) {
    assert_fenced(host);
    let scope = "/sys/fs/cgroup/qemu.slice/100.scope";
    assert_eq!(
        value(host, &format!("{scope}/vcpu/cpuset.cpus.partition")),
        "isolated"
    );
    assert_eq!(
        value(host, &format!("{scope}/cpuset.cpus.effective")),
        HOUSEKEEPING
    );
    let vcpus = host
        .ok(&format!("wc -l < {scope}/vcpu/cgroup.threads"))
        .unwrap();
    assert_eq!(vcpus.trim(), "12", "vCPU threads, and no others");
    expect(host, "test ! -d /sys/fs/cgroup/qemu-decoupled.slice", 0);
    let (dropped_in, _) = expect(
        host,
        "find /run/systemd -path '*.slice.d/50-AllowedCPUs.conf'",
        0,
    );
    assert_eq!(dropped_in, "", "no slice is narrowed");
}

/// Start, stop; start, killed: fenced, then restored.
fn a_vm_has_a_partition(host: &mut Host) {
    install_hook(host);
    settings(host, "partition");
    // The first start makes qemu.slice, which stays.
    host.start_vm(&VmSpec::new(101)).unwrap();
    // Masks of the admin's: the kernel moves these too, and must be treated like the rest.
    let admins = "taskset -pc 0-3,8 $(pgrep -x kswapd0) && taskset -pc 9 $(pgrep -x ksmd)";
    host.ok(admins).unwrap();
    let before = host.snapshot().unwrap();
    let log = host.start_vm(&vm()).unwrap();
    assert!(log.contains("isolating CPU 6-11,18-23 for VM 100"), "{log}");
    assert_partitioned(host);
    let (status, _) = expect(host, "hook status", 0);
    assert!(
        status.contains("\nVM 100 has CPU 6-11,18-23, by partition\n"),
        "{status}"
    );
    assert!(
        status.contains("\nstrays (could be elsewhere): 0\n"),
        "{status}"
    );
    let (shown, _) = expect(host, "cg-slice partition show", 0);
    let row = shown
        .lines()
        .find(|line| line.starts_with("/qemu.slice/100.scope/vcpu"))
        .unwrap();
    let words: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(
        words[1..],
        ["isolated", ISOLATED, ISOLATED, ISOLATED],
        "{shown}"
    );
    // A kernel thread that is born now starts beside the partition.
    host.ok("truncate -s 1M /tmp/image && losetup -f --direct-io=off /tmp/image && dd if=/dev/loop0 of=/dev/null")
        .unwrap();
    assert_clean(host, ISOLATED, &[100]);
    host.ok("losetup -D && rm /tmp/image").unwrap();

    let (trace, _) = expect(host, "hook 100 post-start --json", 0);
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    for change in trace["changes"].as_array().unwrap() {
        assert_ne!(
            change["outcome"], "changed",
            "once more changes nothing: {change}"
        );
    }
    let log = host.stop_vm(100).unwrap();
    assert!(log.contains("CPU 6-11,18-23 released by VM 100"), "{log}");
    assert_restored(host, &before);
    expect(host, "test ! -e /run/pinfold/state.json", 0);

    host.start_vm(&vm()).unwrap();
    assert_partitioned(host);
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, false).unwrap();
    let (_, notes) = expect(host, "hook recover", 0);
    assert!(notes.contains("VM 100 has ended"), "{notes}");
    assert!(
        !notes.contains("something else has set"),
        "a change by the kernel is taken for that of a program: {notes}"
    );
    assert_restored(host, &before);

    // Taken back while the VM runs on.
    host.start_vm(&VmSpec {
        hookscript: None,
        ..vm()
    })
    .unwrap();
    let running = threads(host, 100);
    host.ok("qm stop 100 2>&1").unwrap();
    host.start_vm(&vm()).unwrap();
    expect(host, "hook 100 post-stop -q", 0);
    assert_eq!(threads(host, 100), running);
    expect(
        host,
        "test ! -d /sys/fs/cgroup/qemu.slice/100.scope/vcpu",
        0,
    );
    host.ok("qm stop 100 2>&1").unwrap();
    assert_restored(host, &before);
}

/// The core of CPU 0 and the rest of its LLC domain: isolated like others, if the list names it; and
/// restored. By hotplug it stays the host's.
fn cpu_0_by_its_name(host: &mut Host) {
    const WITH_0: &str = "0-5,12-17";
    install_hook(host);
    host.ok("mkdir -p /etc/pinfold").unwrap();
    let settings = |isolated: &str, method: &str| {
        let text = format!("isolated = \"{isolated}\"\npins = \"auto\"\nmethod = \"{method}\"\n");
        host.put("/etc/pinfold/100.toml", text.as_bytes(), 0o644)
            .unwrap();
    };
    host.put(&vm().conf_path(), vm().conf().as_bytes(), 0o640)
        .unwrap();
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    for (isolated, method, why) in [
        (
            "llc:0",
            "partition",
            "isolated: CPU 0 is in llc:0, but not named",
        ),
        (
            WITH_0,
            "hotplug",
            "isolated: CPU 0 cannot be isolated by hotplug",
        ),
    ] {
        settings(isolated, method);
        let (_, message) = expect(host, "hook 100 pre-start", 1);
        assert!(message.contains(why), "{message}");
    }
    settings("core:0,1-5,13-17", "auto");
    let log = host.start_vm(&vm()).unwrap();
    let stays = "CPU 0 is isolated: timekeeping, IRQs that cannot be moved and the kernel's work for the boot CPU";
    assert!(log.contains(stays), "{log}");
    let fenced = || {
        let scope = "/sys/fs/cgroup/qemu.slice/100.scope";
        let made = value(host, &format!("{scope}/vcpu/cpuset.cpus.partition"));
        assert_eq!(made, "isolated");
        assert_eq!(value(host, "/sys/fs/cgroup/cpuset.cpus.isolated"), WITH_0);
        assert_clean(host, WITH_0, &[100]);
        // The core of CPU 0 is the last to be filled.
        let threads = threads(host, 100);
        let vcpu = threads.iter().find(|(name, _)| name.starts_with("CPU 5/"));
        assert_eq!(vcpu.map(|(_, cpus)| cpus.as_str()), Some("0"));
        let (status, _) = expect(host, "hook status", 0);
        assert!(
            status.contains("\nstrays (could be elsewhere): 0\n"),
            "{status}"
        );
    };
    fenced();
    let (trace, _) = expect(host, "hook 100 post-start --json", 0);
    assert!(
        !trace.contains("\"changed\""),
        "once more changes nothing: {trace}"
    );
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);

    host.start_vm(&vm()).unwrap();
    fenced();
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, false).unwrap();
    expect(host, "hook recover", 0);
    assert_restored(host, &before);
}

/// `hook init --apply` changes VM 103 by `qm set` so that its CPUs suit it; then check has nothing to
/// say of them, and the VM starts with them.
fn init_sets_what_suits_the_vm(host: &mut Host) {
    const CONF: &str = "/etc/pve/qemu-server/103.conf";
    install_hook(host);
    let conf =
        "affinity: 0-3\nargs: -name kept\ncores: 12\nhookscript: local:snippets/hook\nmemory: 64\n";
    host.put(CONF, conf.as_bytes(), 0o644).unwrap();
    let command = "qm set 103 --cores 11 --delete affinity";
    let (shown, _) = expect(host, "hook init 103 --apply -n", 0);
    assert!(
        shown.contains(&format!("would run: {command}\n")),
        "{shown}"
    );
    assert_eq!(value(host, CONF), conf.trim());
    expect(host, "test ! -e /etc/pinfold/103.toml", 0);

    let (shown, notes) = expect(host, "hook init 103 --apply", 0);
    assert!(
        shown.contains(&format!("running: {command}\n")),
        "{shown}{notes}"
    );
    assert_eq!(
        value(host, CONF),
        "args: -name kept\ncores: 11\nhookscript: local:snippets/hook\nmemory: 64"
    );
    for check in [
        "isolated",
        "pins",
        "SMT",
        "L3",
        "NUMA",
        "vCPUs",
        "guest cores",
        "kinds",
        "affinity",
    ] {
        assert!(
            !shown.contains(&format!("hook check: {check}: ")),
            "{shown}"
        );
    }
    host.ok("qm start 103 2>&1").unwrap();
    assert_clean(host, "1-11,13-23", &[103]);
    // While it runs its settings would not change.
    host.ok("rm /etc/pinfold/103.toml").unwrap();
    let (_, message) = expect(host, "hook init 103 --apply", 1);
    assert!(
        message.contains("it is running, and changes apply"),
        "{message}"
    );
    host.ok("qm stop 103 2>&1").unwrap();
}

/// The tool by itself, on a cgroup that is not a VM's.
fn a_partition_by_hand(host: &mut Host) {
    host.ok(
        "mkdir /sys/fs/cgroup/pen && (sh -c 'echo $$ > /sys/fs/cgroup/pen/cgroup.procs; \
         exec setsid sleep 1000 > /dev/null 2>&1' &); \
         until pgrep -xf 'sleep 1000' > /dev/null; do sleep 0.1; done",
    )
    .unwrap();
    there_and_back(host, "cg-slice partition", "make pen 7-8", || {
        assert_eq!(value(host, "/sys/fs/cgroup/cpuset.cpus.isolated"), "7-8");
        assert_eq!(
            value(
                host,
                "/proc/$(pgrep -xf 'sleep 1000')/status | grep -o '7-8$'"
            ),
            "7-8"
        );
        let (shown, _) = expect(host, "cg-slice partition show", 0);
        assert_eq!(shown.lines().count(), 2, "{shown}");
    });
    let before = host.snapshot().unwrap();
    expect(
        host,
        "cg-slice partition make /pen 7-8 -q && cg-slice partition undo /pen -q",
        0,
    );
    expect(
        host,
        "test $(cat /sys/fs/cgroup/pen/cpuset.cpus.partition) = member",
        0,
    );
    host.ok("echo -cpuset > /sys/fs/cgroup/cgroup.subtree_control")
        .unwrap();
    assert_restored(host, &before);
    refuses(
        host,
        "cg-slice partition make nowhere 7-8",
        1,
        "cg-slice: cgroup /nowhere: no such cgroup; see `systemd-cgls`",
    );
    refuses(
        host,
        "cg-slice partition undo pen",
        1,
        "cg-slice: cgroup /pen: not a partition; see `cg-slice partition show`",
    );
}

/// Two VMs by partition, another VM and a container that start meanwhile: each one's CPUs stay its
/// own.
fn two_vms_and_others(host: &mut Host) {
    install_hook(host);
    settings(host, "auto");
    let second = small(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    let log = host.start_vm(&vm()).unwrap();
    assert!(log.contains("method auto: using partition"), "{log}");
    host.start_vm(&second).unwrap();
    let both = "5-11,17-23";
    assert_clean(host, both, &[100, 102]);
    assert_eq!(value(host, "/sys/fs/cgroup/cpuset.cpus.isolated"), both);
    assert!(
        threads(host, 102)
            .iter()
            .any(|(name, cpus)| name.starts_with("CPU 1/") && cpus == "17")
    );

    // As PVE's containers are: a tree of its own beside systemd's, without cpusets and with.
    host.ok("mkdir -p /sys/fs/cgroup/lxc/200 && sh -c 'echo $$ > \
             /sys/fs/cgroup/lxc/200/cgroup.procs; exec setsid sleep 1000 > /dev/null 2>&1 &'")
        .unwrap();
    host.start_vm(&VmSpec {
        cores: 2,
        ..VmSpec::new(103)
    })
    .unwrap();
    assert_clean(host, both, &[100, 102]);
    host.ok("pkill -x sleep; while ! rmdir /sys/fs/cgroup/lxc/200 /sys/fs/cgroup/lxc 2> /dev/null; do sleep 0.1; done")
        .unwrap();
    host.stop_vm(103).unwrap();

    // In either order.
    host.stop_vm(100).unwrap();
    assert_clean(host, "5,17", &[102]);
    assert_eq!(
        value(host, "/sys/fs/cgroup/qemu.slice/cpuset.cpus.exclusive"),
        "5,17"
    );
    host.start_vm(&vm()).unwrap();
    host.kill_vm(102).unwrap();
    host.cleanup_vm(102, true).unwrap();
    let (status, _) = expect(host, "hook status", 0);
    assert!(!status.contains("VM 102"), "{status}");
    assert_partitioned(host);
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

/// With a partition that goes the kernel gives kernel threads and workqueues what the rest leave,
/// with the last one it does not: no other process has set what they have then.
fn one_is_killed_and_the_other_stops(host: &mut Host) {
    install_hook(host);
    settings(host, "partition");
    let (mine, small) = (vm(), small(host));
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    host.start_vm(&mine).unwrap();
    host.start_vm(&small).unwrap();
    host.kill_vm(102).unwrap();
    host.cleanup_vm(102, false).unwrap();
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

/// What is impossible is reported before anything is changed.
fn what_partition_refuses(host: &mut Host) {
    small(host);
    host.start_vm(&VmSpec::new(100)).unwrap();
    host.start_vm(&VmSpec {
        cores: 2,
        ..VmSpec::new(102)
    })
    .unwrap();
    // The scope that systemd is asked for on the way back has another description than PVE's.
    settings(host, "hotplug");
    expect(host, "hook 100 post-start -q && hook 100 post-stop -q", 0);
    let before = host.snapshot().unwrap();
    settings(host, "partition");
    refuses(
        host,
        "hook 100 post-start",
        1,
        "hook: 100.scope: systemd would undo a partition in it: hook's pre-start did not run \
         before this VM was started. Stop and start the VM, or use the method hotplug",
    );
    // With method auto it uses the other method, and reports why.
    settings(host, "auto");
    let (_, log) = expect(host, "hook 100 post-start", 0);
    assert!(
        log.contains("method auto: using hotplug, because partition is unavailable: 100.scope: "),
        "{log}"
    );
    assert_fenced(host);
    // The two are not mixed.
    refuses(
        host,
        "hook 102 pre-start",
        1,
        "hook: /etc/pinfold/102.toml: method: VM 100 is isolated by the other method, and the two \
         cannot be mixed; stop it first",
    );
    expect(host, "hook 100 post-stop -q", 0);
    let difference = before.not_restored(&host.snapshot().unwrap());
    assert!(difference.is_empty(), "{difference}");

    // Cgroups that have only those CPUs are named, and those that have them for a partition.
    host.ok(
        "mkdir -p /sys/fs/cgroup/lxc && echo +cpuset > /sys/fs/cgroup/cgroup.subtree_control \
             && echo 5 > /sys/fs/cgroup/lxc/cpuset.cpus",
    )
    .unwrap();
    let (_, why) = expect(host, "hook 102 pre-start", 1);
    assert!(
        why.contains("cgroup /lxc: its cpuset.cpus 5 is entirely in CPU 5,17"),
        "{why}"
    );
    host.ok("echo > /sys/fs/cgroup/lxc/cpuset.cpus").unwrap();
    expect(host, "cg-slice partition make lxc 17-18 -q", 0);
    let (_, why) = expect(host, "hook 102 pre-start", 1);
    assert!(
        why.contains("cgroup /lxc: CPU 17 is exclusive to it"),
        "{why}"
    );
    expect(host, "cg-slice partition undo lxc -q", 0);
    host.ok("rmdir /sys/fs/cgroup/lxc").unwrap();
    expect(host, "test ! -e /run/pinfold/state.json", 0);
}

/// Others touch units, scope and slices meanwhile: the partition stays.
fn meddled_with(host: &mut Host) {
    install_hook(host);
    settings(host, "partition");
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    host.start_vm(&vm()).unwrap();
    for touch in [
        "systemctl daemon-reload",
        "systemctl set-property --runtime 100.scope CPUWeight=50",
        "systemctl set-property --runtime 100.scope AllowedCPUs=0-23",
        "systemctl set-property --runtime qemu.slice CPUWeight=50",
        "systemctl set-property --runtime 101.scope CPUWeight=50",
    ] {
        host.ok(touch).unwrap();
        assert_eq!(
            value(host, "/sys/fs/cgroup/cpuset.cpus.isolated"),
            ISOLATED,
            "{touch}"
        );
    }
    assert_partitioned(host);
    // Another process makes it an ordinary cgroup: reported, and repaired by the next run.
    host.ok("echo member > /sys/fs/cgroup/qemu.slice/100.scope/vcpu/cpuset.cpus.partition")
        .unwrap();
    expect(host, "hook status", 1);
    expect(host, "hook 100 post-start -q", 0);
    assert_partitioned(host);
    host.stop_vm(100).unwrap();
    host.ok("systemctl set-property --runtime qemu.slice CPUWeight= && \
             systemctl set-property --runtime 101.scope CPUWeight=100 \
             && rm -rf /run/systemd/system.control/qemu.slice.d \
             /run/systemd/transient/101.scope.d && rmdir /run/systemd/system.control && \
             systemctl daemon-reload")
        .unwrap();
    assert_restored(host, &before);
}

/// Refused with the reason; with method auto hook uses the other method.
fn too_old_a_kernel(host: &mut Host) {
    assert_eq!(host.guest, Guest::Bookworm);
    settings(host, "partition");
    host.start_vm(&VmSpec::new(100)).unwrap();
    let release = host.ok("uname -r").unwrap();
    let why = format!(
        "kernel {}: it has no cpuset.cpus.isolated, which a partition below the root needs: Linux 6.8 or newer, \
         with the cpuset controller",
        release.trim()
    );
    refuses(host, "hook 100 pre-start", 1, &format!("hook: {why}"));
    refuses(
        host,
        "cg-slice partition make qemu.slice 6-7",
        1,
        &format!("cg-slice: {why}"),
    );
    settings(host, "auto");
    let (_, log) = expect(host, "hook 100 pre-start", 0);
    assert!(
        log.contains(&format!(
            "method auto: using hotplug, because partition is unavailable: {why}"
        )),
        "{log}"
    );
}

//! The faults of the script that Pinfold replaces (docs/design.md, "The original and its faults"),
//! each with a host on which it would show.

use std::collections::BTreeSet;

use pinfold_lab::{Host, HostState, VmSpec};

use crate::stories;
use crate::support::{
    HELPER_CGROUP, ISOLATED, assert_clean, assert_fenced, assert_restored, expect, injected,
    injected_at, install_hook, network_queues, strays, threads, two_small_vms, vm,
    with_network_queues,
};

stories![
    what_the_admin_had_set_comes_back,
    two_vms,
    a_step_that_fails_rolls_back,
    a_part_that_fails_keeps_the_fence,
    an_irq_that_refuses_is_named,
    a_scope_comes_back_with_what_it_had,
    a_pci_node_that_never_goes,
    helpers_and_containers,
    newborns,
    pinned_meanwhile,
    a_thread_that_refuses,
    irqbalance_is_named,
    irqbalance_as_advised,
    another_vm_with_affinity_is_named,
    workqueues_with_cpus_of_their_own,
    other_lives,
];

/// Undo was "all CPUs for everyone": queue spreading, NUMA masks, taskset, AllowedCPUs,
/// stat_interval, governors.
fn what_the_admin_had_set_comes_back(host: &mut Host) {
    host.start_vm(&VmSpec::new(101)).unwrap();
    with_network_queues(host);
    host.ok(
        "echo 4-7 > /proc/irq/1/smp_affinity_list; echo 6-7 > /proc/irq/12/smp_affinity_list; \
         taskset -pc 6-11,18-23 $(pgrep -x kswapd0); taskset -pc 3,8 $(pgrep -x kcompactd0); \
         (taskset -c 2,9 sleep 10000 >/dev/null 2>&1 &); (taskset -c 10 sleep 10001 >/dev/null 2>&1 &); \
         systemctl set-property --runtime user.slice AllowedCPUs=0-20; \
         mkdir -p /etc/systemd/system/system.slice.d; \
         printf '[Slice]\\nAllowedCPUs=0-22\\n' > /etc/systemd/system/system.slice.d/admin.conf; \
         systemctl daemon-reload; \
         systemctl set-property --runtime init.scope AllowedCPUs=0-23; \
         systemctl set-property --runtime init.scope AllowedCPUs=; \
         echo 7 > /proc/sys/vm/stat_interval; \
         echo powersave > /sys/devices/system/cpu/cpu8/cpufreq/scaling_governor; \
         until pgrep -fx 'sleep 10000' && pgrep -fx 'sleep 10001'; do sleep 0.1; done",
    )
    .unwrap();
    let before = host.snapshot().unwrap();
    install_hook(host);
    host.start_vm(&vm()).unwrap();
    assert_clean(host, ISOLATED, &[100]);
    assert_eq!(
        host.ok("cat /proc/irq/1/smp_affinity_list").unwrap(),
        "4-5\n",
        "narrowed, not widened"
    );
    let narrowed = "03f03f 000000 03f03f ";
    assert_eq!(network_queues(host), narrowed);
    host.stop_vm(100).unwrap();
    // Since the admin's units use the cpuset controller it stays, and the kernel does not clear
    // cpuset.cpus of a cgroup that has processes: all CPUs stand there instead of none, which is
    // the same.
    let same = |state: &HostState| {
        HostState::parse(
            &state
                .to_string()
                .replace("cpuset.cpus=\"0-23\"", "cpuset.cpus=\"\""),
        )
    };
    let difference = same(&before).not_restored(&same(&host.snapshot().unwrap()));
    assert!(difference.is_empty(), "{difference}");
}

/// No lock, no count: with two VMs the first stop freed both.
fn two_vms(host: &mut Host) {
    host.ok("mkdir -p /etc/pinfold").unwrap();
    host.put(
        "/etc/pinfold/100.toml",
        b"isolated = \"6-8\"\npins = \"6,7,8\"\nmethod = \"hotplug\"\n",
        0o644,
    )
    .unwrap();
    host.put(
        "/etc/pinfold/101.toml",
        b"isolated = \"18-20\"\npins = \"18,19,20\"\nmethod = \"hotplug\"\n",
        0o644,
    )
    .unwrap();
    host.put(
        "/etc/pinfold/102.toml",
        b"isolated = \"8-9\"\npins = \"8,9\"\nmethod = \"hotplug\"\n",
        0o644,
    )
    .unwrap();
    install_hook(host);
    let small = |id, cores| VmSpec {
        cores,
        ..VmSpec {
            id,
            name: format!("vm{id}"),
            ..vm()
        }
    };
    host.start_vm(&VmSpec::new(103)).unwrap();
    let before = host.snapshot().unwrap();
    host.start_vm(&small(100, 3)).unwrap();
    host.start_vm(&small(101, 3)).unwrap();
    assert_clean(host, "6-8,18-20", &[100, 101]);
    // A third that wants a CPU of the first is refused, by name.
    let spec = small(102, 2);
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    let (_, message) = expect(host, "hook 102 pre-start", 1);
    assert!(
        message.contains("isolated: CPU 8 is isolated for VM 100, which runs"),
        "{message}"
    );
    host.ok(&format!("rm {}", spec.conf_path())).unwrap();
    host.stop_vm(100).unwrap();
    assert_clean(host, "18-20", &[101]);
    let emulator = threads(host, 101)
        .into_iter()
        .find(|(name, _)| !name.starts_with("CPU "))
        .unwrap();
    assert_eq!(
        emulator.1, "0-17,21-23",
        "the first VM's CPUs are housekeeping again"
    );
    host.stop_vm(101).unwrap();
    assert_restored(host, &before);
}

/// No undo when a step failed half way: CPUs could stay offline.
fn a_step_that_fails_rolls_back(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let before = host.snapshot().unwrap();
    expect(host, "hook 100 pre-start -q", 0);
    // The VM cannot be taken out of its slice, late in the order.
    let file = "/sys/fs/cgroup/qemu-decoupled.slice/100.scope/cgroup.procs";
    let output = host
        .sh(&injected_at(file, "write:error=EIO", "hook 100 post-start"))
        .unwrap();
    assert_eq!(output.code, Some(1), "{output:?}");
    assert!(
        output
            .stderr
            .contains("(kvm): set to /qemu-decoupled.slice/100.scope: Input/output error"),
        "{}",
        output.stderr
    );
    assert!(
        output
            .stderr
            .contains("VM 100 runs without isolated CPUs: all changes have been undone"),
        "{}",
        output.stderr
    );
    // All but the scope's own text: emptied, it was gone, and systemd was asked for a new one.
    let after = host.snapshot().unwrap();
    let difference = before.not_restored(&after);
    let others: Vec<&str> = difference
        .lines()
        .filter(|line| !line[1..].starts_with("file /run/systemd/transient/100.scope"))
        .collect();
    assert!(
        others.is_empty(),
        "the host is not what it was:\n{}",
        others.join("\n")
    );
    expect(host, "test ! -e /run/pinfold/state.json", 0);
}

/// One governor that failed took the whole fence.
fn a_part_that_fails_keeps_the_fence(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let before = host.snapshot().unwrap();
    let file = "/sys/devices/system/cpu/cpufreq/policy11/scaling_governor";
    let output = host
        .sh(&injected_at(file, "write:error=EIO", "hook 100 post-start"))
        .unwrap();
    assert_eq!(output.code, Some(64), "{output:?}");
    for words in [
        "hook: policy11 (CPU 11): set to performance: Input/output error",
        "VM 100 has its CPUs, but one change failed; `hook 100 post-start` tries again",
    ] {
        assert!(output.stderr.contains(words), "{}", output.stderr);
    }
    assert_clean(host, ISOLATED, &[100]);
    let (status, _) = expect(host, "hook status", 0);
    assert!(
        status.contains(
            "  one change failed when it was isolated; `hook 100 post-start` tries again"
        ),
        "{status}"
    );
    expect(host, "hook 100 post-start", 0);
    assert_fenced(host);
    expect(host, "hook 100 post-stop -q", 0);
    let difference = before.not_restored(&host.snapshot().unwrap());
    let others: Vec<&str> = difference
        .lines()
        .filter(|line| !line[1..].starts_with("file /run/systemd/transient/100.scope"))
        .collect();
    assert!(others.is_empty(), "{}", others.join("\n"));
}

/// An IRQ whose chip answers EINVAL (Intel VMD), or ENOSPC, kept every VM from being fenced.
fn an_irq_that_refuses_is_named(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    for (irq, error, words) in [
        (1, "EINVAL", "Invalid argument"),
        (12, "ENOSPC", "No space left on device"),
    ] {
        let file = format!("/proc/irq/{irq}/smp_affinity_list");
        let command = injected_at(
            &file,
            &format!("write:error={error}"),
            "hook 100 post-start",
        );
        let (_, log) = expect(host, &command, 0);
        let named = format!("hook: VM 100: not moved: IRQ {irq} (");
        assert!(log.contains(&named) && log.contains(words), "{log}");
        let mut strays = strays(host, ISOLATED, &[100]);
        strays.irqs.retain(|other| other.number != irq);
        strays.moving.clear();
        assert!(strays.is_clean(), "{strays:#?}");
        expect(host, "hook 100 post-stop -q", 0);
    }
}

/// A VM that was put back into a scope had lost its weight and limit of CPU time.
fn a_scope_comes_back_with_what_it_had(host: &mut Host) {
    let more = "cpuunits: 200\ncpulimit: 1.5\n".into();
    host.start_vm(&VmSpec {
        more,
        ..VmSpec::new(100)
    })
    .unwrap();
    // What systemd was asked for, and what it makes of that.
    let show = "cat /run/systemd/transient/100.scope; systemctl show 100.scope \
                -p CPUWeight,CPUQuotaPerSecUSec,Description,Slice,KillMode,SendSIGKILL,TimeoutStopUSec,After,Before";
    // systemd lists what is in a set in any order.
    let shown = || -> BTreeSet<String> {
        let text = host.ok(show).unwrap();
        let sorted = |line: &str| {
            let mut words: Vec<&str> = line.split_inclusive([' ', '=']).map(str::trim).collect();
            words[1..].sort_unstable();
            words.join(" ")
        };
        text.lines()
            .filter(|line| !line.is_empty())
            .map(sorted)
            .collect()
    };
    let before = shown();
    for given in [
        "CPUWeight= 200",
        "CPUQuotaPerSecUSec= 1.500000s",
        "After= dbus.service",
        "Before= pve-ha-lrm.service",
        "Before= pve-guests.service",
    ] {
        assert!(before.contains(given), "{given}: {before:#?}");
    }
    expect(host, "hook 100 post-start -q", 0);
    // systemd removes it when it sees that it is empty.
    expect(
        host,
        "for try in $(seq 50); do test -e /run/systemd/transient/100.scope || exit 0; sleep 0.2; done; exit 1",
        0,
    );
    expect(host, "hook 100 post-stop -q", 0);
    assert_eq!(shown(), before);
}

/// It waited without end for a PCI node to go, then slept 2 s and hoped.
fn a_pci_node_that_never_goes(host: &mut Host) {
    let slot = host
        .ok("basename $(ls -d /sys/bus/pci/devices/*.1 | head -1) .1")
        .unwrap();
    // The write is swallowed: the kernel never hears of it.
    let file = format!("/sys/bus/pci/devices/{}.0/remove", slot.trim());
    let stuck = format!("pci-reset --device {} --deadline 2", slot.trim());
    let output = host
        .sh(&injected_at(&file, "write:retval=1", &stuck))
        .unwrap();
    // Its neighbour was reset, so some were done.
    assert_eq!(output.code, Some(64), "{output:?}");
    assert!(
        output
            .stderr
            .contains("set to absent: it is still there after 2 s"),
        "{}",
        output.stderr
    );
}

/// Only QEMU's own process was moved; swtpm stayed behind. Containers under /lxc were not held off.
fn helpers_and_containers(host: &mut Host) {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    host.ok("mkdir -p /sys/fs/cgroup/lxc/200/ns && (sh -c 'echo $$ > \
             /sys/fs/cgroup/lxc/200/ns/cgroup.procs; exec sleep 10000' >/dev/null 2>&1 &) ; \
             until pgrep -fx 'sleep 10000'; do sleep 0.1; done")
        .unwrap();
    let before = host.snapshot().unwrap();
    host.start_vm(&VmSpec { tpm: true, ..vm() }).unwrap();
    assert_fenced(host);
    assert_eq!(
        host.ok(HELPER_CGROUP).unwrap(),
        "0::/qemu-decoupled.slice/100.scope\n"
    );
    assert_eq!(
        host.ok("cat /sys/fs/cgroup/lxc/cpuset.cpus").unwrap(),
        "0-5,12-17\n"
    );
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

/// default_smp_affinity and the workqueue mask stayed open; IRQs that appeared later were never
/// looked at.
fn newborns(host: &mut Host) {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let xhci = host
        .ok("ls /sys/bus/pci/drivers/xhci_hcd | grep ^0000 | head -1")
        .unwrap();
    let unbind = format!(
        "echo {0} > /sys/bus/pci/drivers/xhci_hcd/unbind",
        xhci.trim()
    );
    let bind = unbind.replace("unbind", "bind");
    host.ok(&unbind).unwrap();
    host.start_vm(&vm()).unwrap();
    host.ok(&format!("{bind}; modprobe -q loop; sleep 1"))
        .unwrap();
    assert_clean(host, ISOLATED, &[100]);
    host.stop_vm(100).unwrap();
    // Born while the fence stood, they get what their kind starts with.
    let masks = host
        .ok("cat $(ls -d /proc/irq/*/xhci_hcd | sed 's/xhci_hcd/smp_affinity_list/') | sort -u")
        .unwrap();
    assert_eq!(masks, "0-23\n");
    assert_eq!(
        host.ok("sed -n 's/^Cpus_allowed_list:\t//p' /proc/2/status")
            .unwrap(),
        "0-23\n"
    );
}

/// Who takes CPUs for itself while a VM has some of them gets them back, though another VM came and
/// went meanwhile; Linux before 6.2 has forgotten what was asked for.
fn pinned_meanwhile(host: &mut Host) {
    let remembers = !host.ok("uname -r").unwrap().starts_with("6.1.");
    let before = two_small_vms(host);
    expect(host, "hook 101 post-start -q", 0);
    host.ok("(taskset -c 16-18 sleep 10000 >/dev/null 2>&1 &); until pgrep -fx 'sleep 10000'; do sleep 0.1; done")
        .unwrap();
    let has = |cpus: &str| {
        let found = host
            .ok("sed -n 's/^Cpus_allowed_list:\t//p' /proc/$(pgrep -fx 'sleep 10000')/status")
            .unwrap();
        assert_eq!(found.trim_end(), cpus);
    };
    has("16-17");
    expect(host, "hook 100 post-start -q", 0);
    has("16");
    expect(host, "hook 100 post-stop -q", 0);
    has("16-17");
    expect(host, "hook 101 post-stop -q", 0);
    has(if remembers { "16-18" } else { "16-17" });
    host.ok("pkill -fx 'sleep 10000'").unwrap();
    assert_restored(host, &before);
}

/// A thread that refuses a pin aborted the whole. Neither guest's kernel has such threads any more:
/// one is made to look like one, and the kernel's answer is put in its mouth.
fn a_thread_that_refuses(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    // PF_NO_SETAFFINITY among the flags, field 9 of proc_pid_stat(5).
    host.ok(
        "pid=$(cat /run/qemu-server/100.pid); awk '{ $9 += 67108864; \
             print }' /proc/$pid/stat > /tmp/stat; mount --bind /tmp/stat /proc/$pid/stat",
    )
    .unwrap();
    let refusing = injected(
        "sched_setaffinity:error=EINVAL:when=1",
        "pin-vcpu 100 --emulator 0-5 -v",
    );
    let (log, _) = expect(host, &refusing, 0);
    let refused =
        |line: &&str| line.ends_with("(kvm): refused: the kernel binds this thread itself");
    assert_eq!(log.lines().filter(refused).count(), 1, "{log}");
    let emulator: Vec<_> = threads(host, 100)
        .into_iter()
        .filter(|(name, _)| !name.starts_with("CPU "))
        .collect();
    let moved = emulator.iter().filter(|(_, cpus)| cpus == "0-5").count();
    assert!(
        moved > 1
            && emulator
                .iter()
                .any(|(name, cpus)| name == "kvm" && cpus == "0-23"),
        "{emulator:?}"
    );
}

/// Makes writeback work, and returns the CPUs of the unbound workers that can run on isolated CPUs.
fn workers_on_isolated(host: &Host) -> Vec<String> {
    host.ok("for n in 1 2 3; do dd if=/dev/zero of=/var/tmp/w bs=64k count=16 2>/dev/null; sync /var/tmp/w; done")
        .unwrap();
    let strays = host.strays(ISOLATED, &[]).unwrap().kworkers;
    strays.into_iter().map(|stray| stray.cpus).collect()
}

/// The mask of all unbound workqueues limits those that have one of their own, so that hook need not
/// set these: one with isolated CPUs only has all others meanwhile.
fn workqueues_with_cpus_of_their_own(host: &mut Host) {
    // qemu.slice stays after the last VM.
    host.start_vm(&VmSpec::new(101)).unwrap();
    let file = "/sys/devices/virtual/workqueue/writeback/cpumask";
    host.ok(&format!("echo 040040 > {file}")).unwrap();
    let before = host.snapshot().unwrap();
    assert!(workers_on_isolated(host).contains(&"6,18".to_owned()));
    install_hook(host);
    host.start_vm(&vm()).unwrap();
    // On Linux 6.1 ordered workqueues keep workers for all CPUs.
    assert!(!workers_on_isolated(host).contains(&"6,18".to_owned()));
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
    assert_eq!(host.ok(&format!("cat {file}")).unwrap(), "040040\n");
    assert!(workers_on_isolated(host).contains(&"6,18".to_owned()));
}

/// irqbalance undid the rest within 10 s, and nothing reported it.
fn irqbalance_is_named(host: &mut Host) {
    host.ok("(exec -a irqbalance sleep 10000 >/dev/null 2>&1 &); \
             cp $(command -v sleep) /tmp/irqbalance; (/tmp/irqbalance 10000 >/dev/null 2>&1 &); \
             until pgrep -fx '/tmp/irqbalance 10000'; do sleep 0.1; done")
        .unwrap();
    let spec = VmSpec::new(100);
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    let (checked, _) = expect(host, "hook check 100 -q", 0);
    assert!(
        checked.contains("  warn   irqbalance    irqbalance (process "),
        "{checked}"
    );
    let (_, message) = expect(host, "hook 100 pre-start", 0);
    assert!(
        message.contains(
            "moves IRQs back within 10 s; stop it, or set IRQBALANCE_BANNED_CPULIST=6-11,18-23"
        ),
        "{message}"
    );
}

/// Banned from the isolated CPUs, as hook advises, it may run.
fn irqbalance_as_advised(host: &mut Host) {
    host.ok(
        "IRQBALANCE_BANNED_CPULIST=6-11,18-23 setsid irqbalance --foreground --interval=1 >/dev/null 2>&1 & sleep 2",
    )
    .unwrap();
    host.start_vm(&VmSpec::new(100)).unwrap();
    let checked = host.sh("hook check 100 -v").unwrap().stdout;
    assert!(
        checked.contains(") does not use CPU 6-11,18-23"),
        "{checked}"
    );
    expect(host, "hook 100 post-start -q", 0);
    // Some of its rounds.
    host.ok("sleep 5; pgrep -x irqbalance").unwrap();
    assert_fenced(host);
}

/// While qemu.slice is narrowed another VM whose `affinity:` lies inside cannot start, and nothing
/// reported why.
fn another_vm_with_affinity_is_named(host: &mut Host) {
    let other = VmSpec {
        affinity: Some("8-9".into()),
        ..VmSpec::new(102)
    };
    host.put(&other.conf_path(), other.conf().as_bytes(), 0o640)
        .unwrap();
    let spec = VmSpec {
        affinity: Some("0-3".into()),
        ..VmSpec::new(100)
    };
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    let (_, message) = expect(host, "hook 100 pre-start", 0);
    assert!(
        message.contains(
            "VM 102 has `affinity: 8-9`, and all of these CPUs are isolated: it cannot start while VM 100 runs"
        ),
        "{message}"
    );
    assert!(
        message.contains("VM 100: `affinity: 0-3` is also set"),
        "{message}"
    );
}

/// A container's id, an unknown phase, an id without settings: what does least harm.
fn other_lives(host: &mut Host) {
    host.ok("mkdir -p /etc/pve/lxc && echo 'arch: amd64' > /etc/pve/lxc/200.conf")
        .unwrap();
    let before = host.snapshot().unwrap();
    for phase in ["pre-start", "post-start", "pre-stop", "post-stop"] {
        let (_, message) = expect(host, &format!("hook 200 {phase}"), 0);
        assert_eq!(
            message,
            "hook: 200 is a container; only VMs have vCPUs to isolate, nothing to do\n"
        );
    }
    let (_, message) = expect(host, "hook 100 pre-migrate", 0);
    assert!(
        message.contains("\"pre-migrate\" is not a phase that hook knows"),
        "{message}"
    );
    for (phase, code) in [
        ("pre-start", 1),
        ("post-start", 1),
        ("pre-stop", 0),
        ("post-stop", 0),
    ] {
        let (_, message) = expect(host, &format!("hook 998 {phase}"), code);
        assert_eq!(message.is_empty(), code == 0, "{phase}: {message}");
    }
    assert_restored(host, &before);
}

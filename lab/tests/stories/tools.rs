//! Each tool by itself: its effect, its undo, its dry run, and its messages on bad input.

use pinfold_lab::{Guest, Host, VmSpec};

use crate::stories;
use crate::support::{
    HELPER_CGROUP, HOUSEKEEPING, assert_restored, expect, injected_at, network_queues, refuses,
    threads, with_network_queues,
};

stories![
    pin_irqs,
    pin_kthreads,
    governor,
    cpu_hotplug,
    cg_slice,
    pin_vcpu,
    pci_reset,
    hook_step,
    bad_input,
    without_root,
    system_calls,
    selectors,
];

/// A dry run and `--save`, the effect, `--restore`: the host is as it was after the first and after
/// the last.
pub(crate) fn there_and_back(host: &Host, tool: &str, args: &str, effect: impl Fn()) {
    let before = host.snapshot().unwrap();
    let (planned, _) = expect(host, &format!("{tool} {args} -n"), 0);
    assert_restored(host, &before);
    let (done, _) = expect(host, &format!("{tool} {args} --save /tmp/saved"), 0);
    effect();
    // Kernel threads come and go between the two; what is planned is what is done all the same.
    let lines = |text: &str| {
        text.lines()
            .filter(|line| !line.contains("kthread"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    match host.guest {
        // Before Linux 6.12 which IRQs can be moved is not known without trying.
        Guest::Bookworm => assert!(
            lines(&done)
                .iter()
                .all(|line| lines(&planned).contains(line)),
            "{planned}{done}"
        ),
        Guest::Trixie | Guest::Backports | Guest::Isolcpus => {
            assert_eq!(lines(&planned), lines(&done));
        }
    }
    let (again, _) = expect(host, &format!("{tool} {args}"), 0);
    assert_eq!(again, "", "a second run has nothing to do");
    let (_, message) = expect(host, &format!("{tool} {args} --save /tmp/saved"), 1);
    assert!(
        message.contains(
            "/tmp/saved: save: the file holds values of an earlier run; --restore it first"
        ),
        "{message}"
    );
    let words = tool
        .split(' ')
        .take(if tool.starts_with("hook ") { 3 } else { 1 });
    expect(
        host,
        &format!(
            "{} --restore /tmp/saved",
            words.collect::<Vec<_>>().join(" ")
        ),
        0,
    );
    expect(host, "test ! -e /tmp/saved", 0);
    assert_restored(host, &before);
}

fn value(host: &Host, file: &str) -> String {
    host.ok(&format!("cat {file}")).unwrap().trim().to_owned()
}

fn pin_irqs(host: &mut Host) {
    with_network_queues(host);
    there_and_back(host, "pin-irqs", HOUSEKEEPING, || {
        assert_eq!(value(host, "/proc/irq/default_smp_affinity"), "03f03f");
        // Those that move with their next interrupt have the mask; that is what counts here.
        let strays = host.strays("6-11,18-23", &[]).unwrap();
        assert!(strays.irqs.is_empty(), "{:?}", strays.irqs);
        assert_eq!(strays.default_irq_mask, None);
        assert!(strays.queues.is_empty(), "{:?}", strays.queues);
        let narrowed = "03f03f 000000 03f03f ";
        assert_eq!(network_queues(host), narrowed);
    });
    // --narrow keeps what an IRQ had.
    host.ok("echo 4-7 > /proc/irq/1/smp_affinity_list").unwrap();
    expect(host, "pin-irqs --narrow 0-5", 0);
    assert_eq!(value(host, "/proc/irq/1/smp_affinity_list"), "4-5");
    expect(host, "pin-irqs --only i8042 3", 0);
    assert_eq!(value(host, "/proc/irq/1/smp_affinity_list"), "3");
    let (list, _) = expect(host, "pin-irqs --list", 0);
    let line = list.lines().find(|line| line.starts_with("1 ")).unwrap();
    assert!(line.contains("i8042") && line.contains(" 3 "), "{line}");
    let (json, _) = expect(host, "pin-irqs --list --json", 0);
    assert!(
        serde_json::from_str::<serde_json::Value>(&json)
            .unwrap()
            .as_array()
            .unwrap()
            .len()
            > 20
    );
}

fn pin_kthreads(host: &mut Host) {
    there_and_back(host, "pin-kthreads", HOUSEKEEPING, || {
        assert_eq!(
            value(host, "/sys/devices/virtual/workqueue/cpumask"),
            "03f03f"
        );
        let strays = host.strays("6-11,18-23", &[]).unwrap();
        assert!(strays.kthreads.is_empty(), "{:?}", strays.kthreads);
    });
    host.ok("taskset -pc 4-7 $(pgrep -x kswapd0)").unwrap();
    expect(host, "pin-kthreads --narrow 0-5 --only kswapd0", 0);
    assert_eq!(
        value(
            host,
            "/proc/$(pgrep -x kswapd0)/status | sed -n 's/^Cpus_allowed_list:\t//p'"
        ),
        "4-5"
    );
}

fn governor(host: &mut Host) {
    there_and_back(host, "governor set performance", "6-11,18-23", || {
        assert_eq!(
            value(
                host,
                "/sys/devices/system/cpu/cpu6/cpufreq/scaling_governor"
            ),
            "performance"
        );
        assert_ne!(
            value(
                host,
                "/sys/devices/system/cpu/cpu5/cpufreq/scaling_governor"
            ),
            "performance"
        );
    });
    there_and_back(host, "governor latency 20", "6-11,18-23", || {
        let latency = |cpu| {
            let file = format!("/sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us");
            value(host, &file)
        };
        assert_eq!([5, 6, 23].map(latency), ["0", "20", "20"]);
    });
    there_and_back(host, "governor latency 0", "6", || {
        let file = "/sys/devices/system/cpu/cpu6/power/pm_qos_resume_latency_us";
        assert_eq!(value(host, file), "n/a");
    });
    // One that fails stops none of the others, and the exit code shows it.
    let file = "/sys/devices/system/cpu/cpufreq/policy7/scaling_governor";
    let (done, message) = expect(
        host,
        &injected_at(file, "write:error=EIO", "governor set performance 6-8"),
        64,
    );
    assert_eq!(
        message,
        "governor: policy7 (CPU 7): set to performance: Input/output error\n"
    );
    assert_eq!(done.lines().count(), 2, "{done}");
    assert_eq!(
        value(
            host,
            "/sys/devices/system/cpu/cpu8/cpufreq/scaling_governor"
        ),
        "performance"
    );
}

fn cpu_hotplug(host: &mut Host) {
    let before = host.snapshot().unwrap();
    expect(host, "cpu-hotplug offline 6-7 -n", 0);
    assert_restored(host, &before);
    let (done, _) = expect(host, "cpu-hotplug offline 6-7 --save /tmp/saved", 0);
    assert_eq!(done, "CPU 6: online -> offline\nCPU 7: online -> offline\n");
    assert_eq!(value(host, "/sys/devices/system/cpu/online"), "0-5,8-23");
    let (list, _) = expect(host, "cpu-hotplug --list", 0);
    assert!(
        list.lines()
            .any(|line| line.starts_with("6 ") && line.contains("offline")),
        "{list}"
    );
    expect(host, "cpu-hotplug --restore /tmp/saved", 0);
    assert_eq!(value(host, "/sys/devices/system/cpu/online"), "0-23");
    let (_, message) = expect(host, "cpu-hotplug online 6 -v", 0);
    assert_eq!(message, "");
    // A task bound to what goes is named first.
    host.ok("(taskset -c 9 sleep 1000 >/dev/null 2>&1 &) ; until pgrep -fx 'sleep 1000'; do sleep 0.1; done").unwrap();
    let (_, message) = expect(host, "cpu-hotplug offline 8-9", 0);
    assert!(
        message.contains(
            "(sleep): may run on CPU 9 only; once offline, the kernel lets it run anywhere"
        ),
        "{message}"
    );
}

fn cg_slice(host: &mut Host) {
    there_and_back(host, "cg-slice allow", HOUSEKEEPING, || {
        assert_eq!(
            value(host, "/sys/fs/cgroup/system.slice/cpuset.cpus.effective"),
            HOUSEKEEPING
        );
        assert_eq!(
            value(host, "/sys/fs/cgroup/user.slice/cpuset.cpus.effective"),
            HOUSEKEEPING
        );
        let strays = host.strays("6-11,18-23", &[]).unwrap();
        assert!(strays.threads.is_empty(), "{:?}", strays.threads);
    });
    host.start_vm(&VmSpec {
        tpm: true,
        ..VmSpec::new(100)
    })
    .unwrap();
    expect(host, "cg-slice decouple 100", 0);
    let cgroup = "cat /proc/$(cat /run/qemu-server/100.pid)/cgroup";
    assert_eq!(
        host.ok(cgroup).unwrap(),
        "0::/qemu-decoupled.slice/100.scope\n"
    );
    // Its helper went along.
    assert_eq!(
        host.ok(HELPER_CGROUP).unwrap(),
        "0::/qemu-decoupled.slice/100.scope\n"
    );
    assert_eq!(expect(host, "cg-slice decouple 100", 0).0, "");
    expect(host, "cg-slice couple 100", 0);
    assert_eq!(host.ok(cgroup).unwrap(), "0::/qemu.slice/100.scope\n");
    assert_eq!(
        host.ok(HELPER_CGROUP).unwrap(),
        "0::/qemu.slice/100.scope\n"
    );
    expect(host, "test ! -e /sys/fs/cgroup/qemu-decoupled.slice", 0);
    assert_eq!(
        host.ok("systemctl is-active 100.scope").unwrap(),
        "active\n"
    );
}

fn pin_vcpu(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let pins = "100 --vcpu 0=6 --vcpu 1=18 --vcpu 2=7,19 --iothread 8 --emulator 0-5";
    there_and_back(host, "pin-vcpu", pins, || {
        let threads = threads(host, 100);
        let cpus = |name: &str| {
            threads
                .iter()
                .find(|(thread, _)| thread.starts_with(name))
                .map(|(_, cpus)| cpus.as_str())
        };
        assert_eq!(
            (
                cpus("CPU 0/"),
                cpus("CPU 1/"),
                cpus("CPU 2/"),
                cpus("CPU 3/")
            ),
            (Some("6"), Some("18"), Some("7,19"), Some("0-23"))
        );
        assert_eq!(
            threads.iter().filter(|(_, cpus)| cpus == "8").count(),
            2,
            "both iothreads: {threads:?}"
        );
        assert!(
            threads.iter().all(
                |(name, cpus)| name.starts_with("CPU ") || matches!(cpus.as_str(), "8" | "0-5")
            )
        );
    });
    there_and_back(host, "pin-vcpu", "100 --policy fifo:1", || {
        let (list, _) = expect(host, "pin-vcpu 100 --list", 0);
        let real_time = list.lines().filter(|line| line.ends_with("fifo:1"));
        let vcpus = real_time.filter(|line| line.contains("vCPU ")).count();
        assert_eq!(vcpus, 12, "{list}");
    });
    let (list, _) = expect(host, "pin-vcpu 100 --list", 0);
    assert_eq!(
        list.lines().filter(|line| line.contains("vCPU ")).count(),
        12,
        "{list}"
    );
    assert!(
        list.contains("iothread iothread-virtioscsi0"),
        "by QMP, for the kernel has lost the name: {list}"
    );
    let pid = host.ok("cat /run/qemu-server/100.pid").unwrap();
    expect(
        host,
        &format!("pin-vcpu --pid {} --vcpu 0=9", pid.trim()),
        0,
    );
}

fn pci_reset(host: &mut Host) {
    let before = host.snapshot().unwrap();
    let pair = host
        .ok("for d in /sys/bus/pci/devices/*.1; do basename $d; done | head -1")
        .unwrap();
    let slot = pair.trim().trim_end_matches(".1").to_owned();
    let script =
        format!("cat /sys/bus/pci/devices/{slot}.0/uevent /sys/bus/pci/devices/{slot}.1/uevent");
    host.ok(&script).unwrap();
    expect(host, &format!("pci-reset --device {slot} -n"), 0);
    assert_restored(host, &before);
    let (done, _) = expect(host, &format!("pci-reset --device {slot}"), 0);
    assert!(
        done.contains(&format!("{slot}.0")) && done.contains(&format!("{slot}.1")),
        "{done}"
    );
    host.ok(&script).unwrap();
    // The VM's own devices, by every form of the grammar; a snapshot's section names one that is
    // not the VM's.
    let more = format!(
        "hostpci0: {},pcie=1\n\n[before]\nhostpci1: 0000:00:00.0\n",
        slot.trim_start_matches("0000:")
    );
    let spec = VmSpec {
        more,
        ..VmSpec::new(100)
    };
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    let (planned, _) = expect(host, "pci-reset 100 -n", 0);
    assert!(
        planned.contains(&format!("{slot}.1")) && !planned.contains("00:00.0"),
        "{planned}"
    );
    expect(host, "pci-reset 100", 0);
    // The disk that the host runs from is refused.
    let disk = host
        .ok("basename $(dirname $(dirname $(dirname $(readlink -f /sys/class/block/vda))))")
        .unwrap();
    let (_, message) = expect(host, &format!("pci-reset --device {}", disk.trim()), 1);
    assert!(message.contains("--force"), "{message}");
    assert_eq!(
        host.ok("cat /sys/class/block/vda/size | wc -l").unwrap(),
        "1\n"
    );
}

fn hook_step(host: &mut Host) {
    there_and_back(host, "hook step stat-interval", "60", || {
        assert_eq!(value(host, "/proc/sys/vm/stat_interval"), "60");
    });
    there_and_back(host, "hook step halt-poll", "100000", || {
        assert_eq!(
            value(host, "/sys/module/kvm/parameters/halt_poll_ns"),
            "100000"
        );
    });
    let (done, _) = expect(host, "hook step tidy-caches", 0);
    assert_eq!(done, "vm.drop_caches: 3\nvm.compact_memory: 1\n");
}

fn bad_input(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let before = host.snapshot().unwrap();
    for (tool, value) in [
        ("pin-irqs", "24"),
        ("pin-kthreads", "24"),
        ("cpu-hotplug offline", "24"),
        ("cg-slice allow", "24"),
        ("governor set performance", "24"),
    ] {
        let name = tool.split(' ').next().unwrap();
        refuses(
            host,
            &format!("{tool} {value}"),
            1,
            &format!("{name}: CPU 24: no such CPU; this host has 0-23"),
        );
        let (_, message) = expect(host, &format!("{tool} 5-3"), 2);
        assert!(
            message.contains("\"5-3\" runs backwards; did you mean 3-5?"),
            "{message}"
        );
        let (_, message) = expect(host, &format!("{tool} ''"), 2);
        assert!(message.contains("CPU list"), "{message}");
    }
    refuses(
        host,
        "pin-vcpu 100 --vcpu 0=24",
        1,
        "pin-vcpu: CPU 24: no such CPU; this host has 0-23",
    );
    let (_, message) = expect(host, "pin-vcpu 100 --vcpu 12=6", 1);
    assert!(
        message.contains("vCPU 12: the VM has no such vCPU; there are 0-11"),
        "{message}"
    );
    for tool in ["pin-vcpu 999 --vcpu 0=6", "cg-slice decouple 999"] {
        let name = tool.split(' ').next().unwrap();
        let words = format!(
            "{name}: VM 999: no such VM on this node: there is no /etc/pve/qemu-server/999.conf"
        );
        refuses(host, tool, 1, &words);
    }
    host.put("/etc/pve/qemu-server/102.conf", b"cores: 2\n", 0o640)
        .unwrap();
    host.put("/run/qemu-server/102.pid", b"1\n", 0o600).unwrap();
    let (_, message) = expect(host, "pin-vcpu 102 --vcpu 0=6", 1);
    assert!(
        message.starts_with(
            "pin-vcpu: VM 102: not running: /run/qemu-server/102.pid is stale: process 1 is "
        ),
        "{message}"
    );
    host.ok("rm /etc/pve/qemu-server/102.conf /run/qemu-server/102.pid")
        .unwrap();
    refuses(
        host,
        "cpu-hotplug offline 0",
        1,
        "cpu-hotplug: CPU 0: cannot be taken offline: the kernel needs it; leave it out",
    );
    let (_, message) = expect(host, "governor set turbo 6", 1);
    assert!(
        message.starts_with("governor: policy6 (CPU 6): no governor \"turbo\"; it offers "),
        "{message}"
    );
    let (_, message) = expect(host, "cg-slice allow 0-5 nosuch.slice", 1);
    assert!(
        message.contains("nosuch.slice: neither a unit that systemd has loaded nor a cgroup"),
        "{message}"
    );
    assert_restored(host, &before);
}

fn without_root(host: &mut Host) {
    host.start_vm(&VmSpec::new(100)).unwrap();
    let before = host.snapshot().unwrap();
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    for look in [
        "pin-irqs --list",
        "pin-irqs -n 0-5",
        "pin-kthreads --list",
        "pin-kthreads -n 0-5",
        "pin-vcpu 100 --list",
        "governor --list",
        "governor set performance 6 -n",
        "cpu-hotplug --list",
        "cpu-hotplug offline 6 -n",
        "cg-slice --list",
        "pci-reset --list",
    ] {
        let (stdout, _) = expect(host, &format!("{user} {look}"), 0);
        assert!(!stdout.is_empty(), "{look}");
    }
    for tool in [
        "pin-irqs 0-5",
        "pin-kthreads 0-5",
        "governor set performance 6",
        "cpu-hotplug offline 6",
    ] {
        let name = tool.split(' ').next().unwrap();
        let (_, message) = expect(host, &format!("{user} {tool}"), 1);
        assert_eq!(
            message,
            format!("{name}: changing the host needs root; --list and --dry-run do not\n")
        );
    }
    // They list what they could not read.
    let (_, message) = expect(host, &format!("{user} pin-vcpu 100 --list"), 0);
    assert!(
        message.contains("its monitor cannot be reached: Permission denied"),
        "{message}"
    );
    expect(host, "hook 100 pre-start -q", 0);
    let (_, message) = expect(host, &format!("{user} hook status"), 3);
    assert_eq!(
        message,
        "hook: /run/pinfold: list: Permission denied; only root can read the reservations\n"
    );
    expect(host, "hook 100 post-stop -q", 0);
    assert_restored(host, &before);
}

/// No forks per object, and at most 8 system calls for each.
fn system_calls(host: &mut Host) {
    for (tool, objects) in [
        (
            "pin-irqs",
            "ls -d /proc/irq/* /sys/class/net/*/queues/rx-* | wc -l",
        ),
        ("pin-kthreads", "wc -w < /proc/2/task/2/children"),
    ] {
        let count = format!(
            "strace -f -c -o /tmp/calls {tool} {HOUSEKEEPING} -q; awk '$NF == \"total\" {{ print $4 }}' /tmp/calls"
        );
        let calls: f64 = host.ok(&count).unwrap().trim().parse().unwrap();
        let objects: f64 = host.ok(objects).unwrap().trim().parse().unwrap();
        println!(
            "{tool}: {calls} system calls for {objects} objects, {:.1} each",
            calls / objects
        );
        // The program's own start is within it.
        assert!(
            calls <= 8.0 * objects,
            "{tool}: {calls} system calls for {objects} objects"
        );
        let forks = host
            .ok("grep -c -E ' (clone3?|v?fork)$' /tmp/calls || true")
            .unwrap();
        assert_eq!(forks.trim(), "0", "{tool} forks");
    }
}

/// CPUs by what the machine has, on a host with the 5900X's numbering; of an offline CPU the kernel
/// prints nothing.
fn selectors(host: &mut Host) {
    let (layout, _) = expect(host, "hook layout", 0);
    assert!(
        layout.contains("llc:1          6-11,18-23  6      L3 32M\n"),
        "{layout}"
    );
    let (by_name, _) = expect(host, "cpu-hotplug offline llc:1 -n", 0);
    let (by_number, _) = expect(host, "cpu-hotplug offline 6-11,18-23 -n", 0);
    assert_eq!(by_name, by_number);
    expect(host, "pin-irqs '!llc:1' -q", 0);
    assert_eq!(value(host, "/proc/irq/default_smp_affinity"), "03f03f");
    refuses(
        host,
        "governor set performance llc:2",
        1,
        "governor: llc:2: no such LLC domain; this host has llc:0 (CPU 0-5,12-17) and llc:1 (CPU 6-11,18-23)",
    );
    expect(
        host,
        "cpu-hotplug offline 11 -q && test ! -e /sys/devices/system/cpu/cpu11/topology",
        0,
    );
    refuses(
        host,
        "governor set performance core:11",
        1,
        "governor: core:11: offline, and the kernel does not report its core; online are 0-10,12-23",
    );
    assert!(expect(host, "hook layout", 0).0.contains("offline: 11"));
    assert_eq!(
        expect(host, "cpu-hotplug online offline", 0).0,
        "CPU 11: offline -> online\n"
    );
}

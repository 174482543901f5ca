//! `hook blame` names what disturbs a VM: each disturbance planted here is in its first three lines.

use std::time::Duration;

use pinfold_lab::Host;
use serde_json::Value;

use crate::stories;
use crate::support::{assert_fenced, expect, install_hook, vm};

stories![only trixie: names_planted_disturbances, traces_and_leaves_nothing];

/// Takes a shell out of its slice, whose CPUs are restricted, onto CPU 7.
const ON_CPU_7: &str = "echo $$ > /sys/fs/cgroup/cgroup.procs; taskset -pc 7 $$ > /dev/null";

/// Plants a disturbance that ends by itself, and returns what is in the first three places.
fn blamed(host: &Host, plant: &str) -> Vec<(String, String, String)> {
    host.put("/tmp/plant.sh", plant.as_bytes(), 0o755).unwrap();
    host.ok("setsid timeout 20 bash /tmp/plant.sh > /dev/null 2>&1 < /dev/null & sleep 1")
        .unwrap();
    let (json, _) = expect(host, "hook blame 100 --seconds 4 --json", 0);
    expect(host, "pkill -f /tmp/plant[.]sh; sleep 0.2; true", 0);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["isolated"], true, "{json}");
    let disturbances = json["disturbances"].as_array().unwrap();
    let text = |it: &Value, key: &str| it[key].as_str().unwrap().to_owned();
    disturbances
        .iter()
        .take(3)
        .map(|it| (text(it, "kind"), text(it, "object"), text(it, "cpus")))
        .collect()
}

fn assert_named(found: &[(String, String, String)], kind: &str, object: &str, cpus: &str) {
    let is_named = found
        .iter()
        .any(|(k, o, c)| k == kind && o.contains(object) && c == cpus);
    assert!(is_named, "{kind} {object} on CPU {cpus}: {found:#?}");
}

fn names_planted_disturbances(host: &mut Host) {
    install_hook(host);
    host.start_vm(&vm()).unwrap();
    assert_fenced(host);
    let quiet = blamed(host, "exit");
    let is_avoidable = |(kind, ..): &(String, String, String)| {
        ["shared-cpu", "emulator", "thread"].contains(&kind.as_str())
    };
    assert!(!quiet.iter().any(is_avoidable), "{quiet:#?}");

    let task = blamed(host, &format!("{ON_CPU_7}; while :; do :; done"));
    assert_named(&task, "thread", "(bash)", "7");

    // The console's interrupt, with a writer on other CPUs.
    let irq = blamed(
        host,
        "echo 8 > /proc/irq/4/smp_affinity_list; while :; do echo > /dev/ttyS0; sleep 0.01; done",
    );
    assert_named(&irq, "irq", "IRQ 4 (ttyS0)", "8");
    host.ok("pin-irqs -q 0-5,12-17").unwrap();

    // It wakes up by timer all the time.
    let kthread = blamed(
        host,
        "taskset -pc 9 $(pgrep -x rcu_preempt); while :; do ls -R /usr/share; done",
    );
    assert_named(&kthread, "kthread", "(rcu_preempt)", "9");
    host.ok("pin-kthreads -q 0-5,12-17").unwrap();

    let qemu = "$(cat /run/qemu-server/100.pid)";
    let emulator = blamed(
        host,
        &format!("taskset -pc 10 {qemu}; while :; do pin-vcpu 100 --list; done"),
    );
    assert_named(&emulator, "emulator", "of VM 100", "10");
    host.ok(&format!("taskset -pc 0-5,12-17 {qemu}")).unwrap();

    let vcpu_1 = format!("$(grep -l 'CPU 1/' /proc/{qemu}/task/*/comm | cut -d/ -f5)");
    let shared = blamed(host, &format!("taskset -pc 6 {vcpu_1}"));
    assert_named(&shared, "shared-cpu", "vCPU 0-1 share a CPU", "6");
    host.ok(&format!("taskset -pc 18 {vcpu_1}")).unwrap();

    let softirq = blamed(
        host,
        &format!("ip link set lo up; {ON_CPU_7}; while :; do echo x > /dev/udp/127.0.0.1/9; done"),
    );
    assert_named(&softirq, "softirq", "NET_RX", "7");

    let (text, _) = expect(host, "hook blame 100 --seconds 1", 0);
    assert!(
        text.starts_with("VM 100, CPU 6-11,18-23, ") && text.contains("\nvCPUs waited for a CPU"),
        "{text}"
    );
    // Ended by the VM's stop, after some looks.
    let watch = ["hook", "blame", "100", "--seconds", "2", "--watch"];
    let watch = host.spawn(&watch, Duration::from_secs(120)).unwrap();
    host.ok("sleep 10").unwrap();
    host.stop_vm(100).unwrap();
    let watched = watch.wait().unwrap();
    assert_eq!(watched.code, Some(0), "{}", watched.stderr);
    let looks = watched.stdout.matches("VM 100, CPU 6-11,18-23, 2.").count();
    assert!(looks >= 2, "{}", watched.stdout);
    let (_, why) = expect(host, "hook blame 100", 1);
    assert!(why.contains("VM 100"), "{why}");
}

/// Sleeps a hundred times on the CPU that it is on, and prints how often it gave that CPU up.
const SLEEPER: &str = r#"sub switches {
    open my $status, "<", "/proc/self/status" or die $!;
    my $sum = 0;
    /ctxt_switches:\s*(\d+)/ and $sum += $1 while <$status>;
    return $sum;
}
my $before = switches();
select undef, undef, undef, 0.01 for 1 .. 100;
print "$$ ", switches() - $before, "\n";
"#;

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// The trace instances, once there are so many.
fn instances(host: &Host, count: usize) -> Vec<String> {
    let wait = format!(
        "until [ $(ls {INSTANCES} | wc -l) = {count} ]; do sleep 0.2; done; ls {INSTANCES}"
    );
    let (names, _) = expect(host, &format!("timeout 60 bash -c '{wait}'"), 0);
    names.lines().map(str::to_owned).collect()
}

/// Starts a trace that ends much later, and returns its instance.
fn long_trace(host: &Host) -> String {
    let command = "hook blame 100 --seconds 600 --trace";
    host.ok(&format!("setsid {command} > /dev/null 2>&1 < /dev/null &"))
        .unwrap();
    instances(host, 1).remove(0)
}

fn traces_and_leaves_nothing(host: &mut Host) {
    host.ok("mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing")
        .unwrap();
    install_hook(host);
    host.start_vm(&vm()).unwrap();
    assert_fenced(host);

    // A task that has ended when the trace does, so that /proc does not have it.
    let trace = [
        "hook",
        "blame",
        "100",
        "--seconds",
        "15",
        "--trace",
        "--json",
    ];
    let trace = host.spawn(&trace, Duration::from_secs(120)).unwrap();
    instances(host, 1);
    host.ok("sleep 3").unwrap();
    host.put("/tmp/sleeper.pl", SLEEPER.as_bytes(), 0o644)
        .unwrap();
    let sleeper = format!("bash -c '{ON_CPU_7}; exec perl /tmp/sleeper.pl'");
    let (switches, _) = expect(host, &sleeper, 0);
    let (tid, switches) = switches.trim().split_once(' ').unwrap();
    let switches: u64 = switches.parse().unwrap();
    assert!(switches >= 100, "{switches}");
    let traced = trace.wait().unwrap();
    assert_eq!(traced.code, Some(0), "{}", traced.stderr);
    let json: Value = serde_json::from_str(&traced.stdout).unwrap();
    let found = json["disturbances"].as_array().unwrap();
    let object = format!("thread {tid} (perl)");
    let place = found.iter().position(|it| it["object"] == object);
    let place = place.unwrap_or_else(|| panic!("{object}: {json:#}"));
    let it = &found[place];
    assert!(place < 3, "{json:#}");
    // Each time that it gave the CPU up it got it again; and before and after it counted.
    let count = it["count"].as_u64().unwrap();
    assert!(
        (switches..=switches + 50).contains(&count),
        "{switches}: {it:#}"
    );
    assert_eq!(it["cpus"], "7");
    assert_eq!(json["trace"]["lost"], 0, "{json:#}");
    let (longest, all) = (it["longest_ns"].as_u64(), it["ns"].as_u64());
    assert!(longest > Some(0) && longest < all, "{it:#}");
    let on_7 = json["trace"]["by_cpu"].as_array().unwrap().iter();
    let on_7 = on_7
        .filter(|on| on["cpu"] == 7)
        .map(|on| on["switches"].as_u64());
    assert!(on_7.flatten().sum::<u64>() >= count, "{json:#}");
    let is_off =
        "cd /sys/kernel/tracing/events; cat sched/sched_switch/enable irq/softirq_exit/enable";
    let assert_off = |host: &Host| {
        assert_eq!(instances(host, 0), [""; 0]);
        assert_eq!(expect(host, is_off, 0).0, "0\n0\n");
    };
    assert_off(host);

    let (text, _) = expect(host, "hook blame 100 --seconds 1 --trace", 0);
    assert!(text.contains("\nswitches to other threads: "), "{text}");
    assert_off(host);
    // What a terminal sends ends it, and its instance.
    expect(
        host,
        "timeout -s INT 10 hook blame 100 --seconds 600 --trace",
        124,
    );
    assert_off(host);

    // What a killed one has left goes with the next trace, and by recover; that of one that lives
    // does not.
    let killed = long_trace(host);
    let kill = |name: &str| {
        let pid = name.split('-').nth(1).unwrap();
        host.ok(&format!(
            "kill -KILL {pid}; while [ -e /proc/{pid} ]; do sleep 0.1; done"
        ))
        .unwrap();
    };
    for look in ["hook recover", "hook blame 100 --seconds 1 --trace"] {
        expect(host, look, 0);
        assert_eq!(instances(host, 1), [&*killed], "{look}");
    }
    kill(&killed);
    assert_eq!(instances(host, 1), [&*killed]);
    let (_, log) = expect(host, "hook recover", 0);
    assert!(log.contains("trace of process "), "{log}");
    assert_off(host);
    let killed = long_trace(host);
    kill(&killed);
    expect(host, "hook blame 100 --seconds 1 --trace", 0);
    assert_off(host);
    assert_fenced(host);
    host.stop_vm(100).unwrap();
}

//! What comes in between: phases that never come, and others who meddle.

use pinfold_lab::{Host, HostState, VmSpec};

use crate::stories;
use crate::support::{
    HOUSEKEEPING, ISOLATED, assert_clean, assert_fenced, assert_restored, expect, install_hook, threads, vm,
};

stories![only trixie:
    a_start_that_fails,
    a_backup_of_a_stopped_vm,
    the_scope_is_stopped,
    a_guest_reboots_and_a_vcpu_is_plugged_in,
    recover_comes_by_itself,
    the_state_cannot_be_saved,
    nobody_reads_what_is_said,
    a_monitor_that_does_not_answer,
    a_systemd_that_hangs,
    units_are_touched_meanwhile,
    others_set_what_is_ours,
    the_idle_vm,
    a_device_reset_on_the_way,
];

/// QMP from a shell: each argument is a command; what comes back is printed.
const QMP: &str = r#"use IO::Socket::UNIX;
my $socket = IO::Socket::UNIX->new(Peer => shift) or die "cannot connect: $!";
<$socket>;
for my $command ('{"execute": "qmp_capabilities"}', @ARGV) {
    print $socket "$command\n";
    my $line;
    do { $line = <$socket> } while ($line =~ /^\{"timestamp"/);
    print $line;
}
"#;

/// Somebody who listens on a socket and says what he is told to, or nothing.
const LISTENER: &str = r#"use IO::Socket::UNIX;
my ($path, $words) = @ARGV;
unlink $path;
my $socket = IO::Socket::UNIX->new(Local => $path, Listen => 5) or die "cannot listen: $!";
while (my $client = $socket->accept) { print $client $words; $client->flush; push @clients, $client }
"#;

/// A host with a VM that is nobody's business, and hook for VM 100.
fn ready(host: &Host) -> HostState {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    host.put("/tmp/qmp.pl", QMP.as_bytes(), 0o644).unwrap();
    host.put("/tmp/listener.pl", LISTENER.as_bytes(), 0o644).unwrap();
    host.snapshot().unwrap()
}

/// VM 100 running, fenced by nobody yet.
fn running(host: &Host) -> HostState {
    ready(host);
    host.start_vm(&VmSpec::new(100)).unwrap();
    host.snapshot().unwrap()
}

/// A listener in a socket's place until the end of the story; the other is kept beside it.
fn in_place_of(host: &Host, socket: &str, words: &str) {
    host.ok(&format!(
        "mv {socket} {socket}.kept && (setsid perl /tmp/listener.pl {socket} '{words}' >/dev/null 2>&1 &) ; \
         while ! test -S {socket}; do sleep 0.1; done"
    ))
    .unwrap();
}

/// Ends those listeners, and whoever keeps a socket busy.
fn end_listeners(host: &Host) {
    host.ok("pkill -x perl; while pgrep -x perl > /dev/null; do sleep 0.1; done").unwrap();
}

/// What pre-start reserved goes with the task that started the VM.
fn a_start_that_fails(host: &mut Host) {
    let before = ready(host);
    let spec = VmSpec::new(100);
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640).unwrap();
    expect(host, "sh -c 'hook 100 pre-start && grep -q starting /run/pinfold/state.json'", 0);
    let (_, said) = expect(host, "hook recover", 0);
    assert_eq!(said, "hook: VM 100 runs no more and no hook said so: its CPUs are given back\n");
    expect(host, "test ! -e /run/pinfold/state.json", 0);
    host.ok(&format!("rm {}", spec.conf_path())).unwrap();
    assert_restored(host, &before);
}

/// Proxmox VE starts a QEMU for it whose guest never runs.
fn a_backup_of_a_stopped_vm(host: &mut Host) {
    ready(host);
    host.put(&vm().conf_path(), vm().conf().as_bytes(), 0o640).unwrap();
    let told = host.ok("qm start 100 --paused 2>&1").unwrap();
    assert!(
        told.contains("VM 100 is in prelaunch, as for a backup: its guest will not run, nothing is isolated"),
        "{told}"
    );
    assert!(threads(host, 100).iter().all(|(_, cpus)| cpus == "0-23"));
    assert_eq!(host.ok("hook status").unwrap(), "no CPU is isolated\n");
}

fn the_scope_is_stopped(host: &mut Host) {
    let before = ready(host);
    host.start_vm(&vm()).unwrap();
    // The scope is empty and gone, the VM in its own cgroup: there is nothing for systemd to end.
    host.sh("systemctl stop 100.scope").unwrap();
    assert_fenced(host);
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

fn a_guest_reboots_and_a_vcpu_is_plugged_in(host: &mut Host) {
    let before = ready(host);
    host.start_vm(&VmSpec { vcpus: Some(2), ..vm() }).unwrap();
    let fenced = host.snapshot().unwrap();
    let qmp = |command: &str| host.ok(&format!("perl /tmp/qmp.pl /run/qemu-server/100.qmp '{command}'")).unwrap();
    qmp(r#"{"execute": "system_reset"}"#);
    host.ok("sleep 1").unwrap();
    assert_restored(host, &fenced);
    let all = qmp(r#"{"execute": "query-hotpluggable-cpus"}"#);
    let kind = all.split(r#""type": ""#).nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
    let plug = r#"{"execute": "device_add", "arguments": {"driver": "KIND", "id": "cpu2", "socket-id": 0, "core-id": 2, "thread-id": 0}}"#;
    let plug = plug.replace("KIND", &kind).replace("\"socket-id\": 0", &socket_and_more(&all));
    let answer = qmp(&plug);
    assert!(answer.contains(r#"{"return": {}}"#), "{answer}");
    expect(host, "hook 100 post-start", 0);
    let pins: Vec<_> = threads(host, 100).into_iter().filter(|(name, _)| name.starts_with("CPU 2/")).collect();
    assert_eq!(pins.iter().map(|(_, cpus)| cpus.as_str()).collect::<Vec<_>>(), ["7"], "the third vCPU's pin");
    assert_clean(host, ISOLATED, &[100]);
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

/// Newer QEMUs want the die too.
fn socket_and_more(cpus: &str) -> String {
    let die = if cpus.contains("\"die-id\"") { "\"die-id\": 0, " } else { "" };
    format!("{die}\"socket-id\": 0")
}

/// The path unit sees QEMU go.
fn recover_comes_by_itself(host: &mut Host) {
    let before = ready(host);
    let units: [(&str, &[u8]); 2] = [
        ("pinfold-recover.path", include_bytes!("../../../packaging/pinfold-recover.path")),
        ("pinfold-recover.service", include_bytes!("../../../packaging/pinfold-recover.service")),
    ];
    for (name, text) in units {
        host.put(&format!("/etc/systemd/system/{name}"), text, 0o644).unwrap();
    }
    host.ok("mkdir -p /usr/local/sbin && cp $(command -v hook) /usr/local/sbin/ && systemctl daemon-reload && systemctl start pinfold-recover.path")
        .unwrap();
    host.start_vm(&vm()).unwrap();
    // What came from the start itself has ended.
    host.ok("while test $(systemctl is-active pinfold-recover.service) != inactive; do sleep 0.2; done; sleep 1")
        .unwrap();
    assert_fenced(host);
    // QEMU holds its pid file open, so that its end is seen even where the file stays.
    let times = host
        .ok("cut -d' ' -f1 /proc/uptime; kill -KILL $(cat /run/qemu-server/100.pid); \
             while grep -q '\"100\"' /run/pinfold/state.json 2>/dev/null; do sleep 0.2; done; \
             systemctl show -P ExecMainStartTimestampMonotonic pinfold-recover.service")
        .unwrap();
    let mut times = times.lines().map(|line| line.trim().parse::<f64>().unwrap());
    let (gone, called) = (times.next().unwrap(), times.next().unwrap() / 1e6);
    println!("recover was called {:.2} s after QEMU was killed", called - gone);
    assert!((0.0..2.0).contains(&(called - gone)), "gone at {gone}, called at {called}");
    host.ok("while test $(systemctl is-active pinfold-recover.service) != inactive; do sleep 0.2; done").unwrap();
    host.cleanup_vm(100, false).unwrap();
    host.ok("systemctl stop pinfold-recover.path; rm /etc/systemd/system/pinfold-recover.*; systemctl daemon-reload")
        .unwrap();
    assert_restored(host, &before);
}

fn the_state_cannot_be_saved(host: &mut Host) {
    let before = running(host);
    host.ok("mkdir -m 700 /run/pinfold && mount -t tmpfs -o size=4k,mode=700 none /run/pinfold && head -c 4096 /dev/zero > /run/pinfold/full")
        .unwrap();
    for (make, words) in [
        ("true", "No space left on device"),
        ("rm /run/pinfold/full; mount -o remount,ro /run/pinfold", "Read-only file system"),
    ] {
        host.ok(make).unwrap();
        for phase in ["pre-start", "post-start"] {
            let (_, said) = expect(host, &format!("hook 100 {phase}"), 1);
            assert!(said.contains("/run/pinfold") && said.contains(words), "{phase}: {said}");
        }
        let difference = before.not_restored(&host.snapshot().unwrap());
        let others: Vec<&str> = difference.lines().filter(|line| !line.contains("/run/pinfold")).collect();
        assert!(others.is_empty(), "{others:#?}");
    }
    // Full once the fence stands: it is taken down all the same.
    host.ok("mount -o remount,rw,size=1m /run/pinfold").unwrap();
    expect(host, "hook 100 post-start", 0);
    assert_fenced(host);
    host.ok("head -c 2000000 /dev/zero > /run/pinfold/full 2>/dev/null; true").unwrap();
    expect(host, "hook 100 post-stop", 0);
    host.ok("umount /run/pinfold && rmdir /run/pinfold").unwrap();
    restored_but_for_the_scope(host, &before);
}

/// Emptied, VM 100's scope was gone, and systemd was asked for a new one with a description of its own.
fn restored_but_for_the_scope(host: &Host, before: &HostState) {
    let difference = before.not_restored(&host.snapshot().unwrap());
    let others: Vec<&str> =
        difference.lines().filter(|line| !line[1..].starts_with("file /run/systemd/transient/100.scope")).collect();
    assert!(others.is_empty(), "{others:#?}");
}

/// A full device, a closed stdout, a reader that has gone.
fn nobody_reads_what_is_said(host: &mut Host) {
    let before = running(host);
    for where_to in ["> /dev/full 2> /dev/full", ">&- 2>&-", "-v 2>&1 | true"] {
        host.sh(&format!("hook 100 post-start {where_to}")).unwrap();
        assert_fenced(host);
        host.sh(&format!("hook 100 post-stop {where_to}")).unwrap();
        restored_but_for_the_scope(host, &before);
    }
}

/// Busy with another client, silent, or sending what is no QMP: the threads' names do.
fn a_monitor_that_does_not_answer(host: &mut Host) {
    let before = running(host);
    let monitor = "/run/qemu-server/100.qmp";
    let busy = format!(
        "(setsid perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new(Peer => \"{monitor}\"); sleep 1000' >/dev/null 2>&1 &) ; sleep 0.5"
    );
    host.ok(&busy).unwrap();
    let busy = "its monitor is busy with another client, or QEMU hangs";
    for (words, why) in [(None, busy), (Some(""), busy), (Some("garbage\n"), "its monitor sends garbage")] {
        if let Some(words) = words {
            host.ok(&format!("if test -e {monitor}.kept; then mv {monitor}.kept {monitor}; fi")).unwrap();
            in_place_of(host, monitor, words);
        }
        let (_, said) = expect(host, "hook 100 post-start", 0);
        assert!(said.contains("going on with the threads' names from /proc") && said.contains(why), "{said}");
        assert_fenced(host);
        expect(host, "hook 100 post-stop", 0);
        end_listeners(host);
        restored_but_for_the_scope(host, &before);
    }
}

/// It is waited for once, and nothing is changed.
fn a_systemd_that_hangs(host: &mut Host) {
    let before = running(host);
    for socket in ["/run/systemd/private", "/run/dbus/system_bus_socket"] {
        in_place_of(host, socket, "");
    }
    let (times, said) =
        expect(host, "cut -d' ' -f1 /proc/uptime; hook 100 post-start -q; cut -d' ' -f1 /proc/uptime", 0);
    assert!(said.contains("systemd: ") && said.contains("no answer within 10 s"), "{said}");
    assert!(said.contains("VM 100 runs without isolated CPUs"), "{said}");
    let times: Vec<f64> = times.lines().map(|line| line.parse().unwrap()).collect();
    println!("with a systemd that hangs post-start ends after {:.1} s", times[1] - times[0]);
    assert!(times[1] - times[0] < 60.0, "{times:?}");
    host.ok("for s in /run/systemd/private /run/dbus/system_bus_socket; do mv $s.kept $s; done").unwrap();
    end_listeners(host);
    expect(host, "hook recover", 0);
    assert_restored(host, &before);
}

/// systemd reads its units again, and somebody sets ours: nothing of the fence gives, or it is told who did it.
fn units_are_touched_meanwhile(host: &mut Host) {
    let before = ready(host);
    host.start_vm(&vm()).unwrap();
    host.ok("systemctl daemon-reload").unwrap();
    assert_fenced(host);
    host.ok("systemctl set-property --runtime system.slice CPUWeight=50").unwrap();
    assert_fenced(host);
    host.ok("systemctl set-property --runtime system.slice AllowedCPUs=0-3").unwrap();
    let (_, said) = expect(host, "hook recover", 0);
    assert!(said.contains("hook: system.slice: left as it is: somebody else has set it to 0-3\n"), "{said}");
    host.stop_vm(100).unwrap();
    // Theirs stays, ours goes.
    assert_eq!(host.ok("systemctl show -P AllowedCPUs system.slice").unwrap(), "0-3\n");
    host.ok("systemctl set-property --runtime system.slice AllowedCPUs= CPUWeight=; \
             rm -r /run/systemd/system.control; systemctl daemon-reload; \
             echo > /sys/fs/cgroup/system.slice/cpuset.cpus; true")
        .unwrap();
    let after = host.snapshot().unwrap();
    let difference = before.not_restored(&after);
    let others: Vec<&str> =
        difference.lines().filter(|line| !line.contains("system.slice") && !line.contains("cgroup /")).collect();
    assert!(others.is_empty(), "{others:#?}");
}

/// What another tool has set since is left, and said; the rest comes back.
fn others_set_what_is_ours(host: &mut Host) {
    let before = ready(host);
    host.start_vm(&vm()).unwrap();
    host.ok("echo 7 > /proc/irq/1/smp_affinity_list; \
             echo powersave > /sys/devices/system/cpu/cpu6/cpufreq/scaling_governor; \
             echo 9 > /proc/sys/vm/stat_interval; \
             taskset -pc 8 $(pgrep -x kswapd0) > /dev/null")
        .unwrap();
    let (status, _) = expect(host, "hook status", 1);
    assert!(status.contains("IRQ 1 (i8042)") && status.contains("(kswapd0)"), "strays are named: {status}");
    let (_, said) = expect(host, "hook recover", 0);
    for line in [
        "IRQ 1 (i8042): left as it is: somebody else has set it to 7",
        "policy6 (CPU 6): left as it is: somebody else has set it to powersave",
        "vm.stat_interval: left as it is: somebody else has set it to 9",
        "(kswapd0): left as it is: somebody else has set it to 8",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    host.stop_vm(100).unwrap();
    assert_eq!(host.ok("cat /proc/irq/1/smp_affinity_list /proc/sys/vm/stat_interval").unwrap(), "7\n9\n");
    host.ok("echo 0-23 > /proc/irq/1/smp_affinity_list; echo 1 > /proc/sys/vm/stat_interval; \
             taskset -pc 0-23 $(pgrep -x kswapd0) > /dev/null; \
             cat /sys/devices/system/cpu/cpu5/cpufreq/scaling_governor > /sys/devices/system/cpu/cpu6/cpufreq/scaling_governor")
        .unwrap();
    assert_restored(host, &before);
}

/// It is stopped before the VM starts and started when the VM has gone, where it ran.
fn the_idle_vm(host: &mut Host) {
    install_hook(host);
    host.ok("mkdir -p /etc/pinfold").unwrap();
    host.put("/etc/pinfold/100.toml", b"layout = \"5900x\"\nidle_vm = 102\n", 0o644).unwrap();
    host.start_vm(&VmSpec { cores: 2, ..VmSpec::new(102) }).unwrap();
    let state = || host.ok("qm status 102").unwrap();
    let told = host.start_vm(&vm()).unwrap();
    assert!(told.contains("idle VM 102 stopped"), "{told}");
    assert_eq!(state(), "status: stopped\n");
    assert_fenced(host);
    let told = host.stop_vm(100).unwrap();
    assert!(told.contains("idle VM 102 started"), "{told}");
    assert_eq!(state(), "status: running\n");
    // One that did not run stays so.
    host.ok("qm stop 102").unwrap();
    host.start_vm(&vm()).unwrap();
    host.stop_vm(100).unwrap();
    assert_eq!(state(), "status: stopped\n");
    // A start that is refused gives the idle VM back.
    host.ok("qm start 102").unwrap();
    let disk = host.ok("basename $(dirname $(dirname $(dirname $(readlink -f /sys/class/block/vda))))").unwrap();
    let settings = format!("layout = \"5900x\"\nidle_vm = 102\nreset_pci = [\"{}\"]\n", disk.trim());
    host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644).unwrap();
    let told = host.sh("qm start 100").unwrap();
    assert_ne!(told.code, Some(0), "{told:?}");
    assert_eq!(state(), "status: running\n", "{told:?}");
}

/// A PCI device of the VM's is removed and found again before QEMU takes it.
fn a_device_reset_on_the_way(host: &mut Host) {
    let before = ready(host);
    let pair = host.ok("for d in /sys/bus/pci/devices/*.1; do basename $d; done | head -1").unwrap();
    let slot = pair.trim().trim_end_matches(".1");
    host.ok("mkdir -p /etc/pinfold").unwrap();
    let settings = format!("layout = \"5900x\"\nreset_pci = [\"{slot}\"]\n");
    host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644).unwrap();
    let told = host.start_vm(&vm()).unwrap();
    assert!(told.contains(slot), "{told}");
    assert_fenced(host);
    let emulator = threads(host, 100).into_iter().find(|(name, _)| !name.starts_with("CPU ")).unwrap();
    assert_eq!(emulator.1, HOUSEKEEPING);
    host.stop_vm(100).unwrap();
    host.ok("rm -r /etc/pinfold").unwrap();
    assert_restored(host, &before);
}

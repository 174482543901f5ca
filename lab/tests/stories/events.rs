//! Each way in which Proxmox VE calls a hook, or does not, by each method: the VM is fenced while
//! it runs, the host is restored afterwards, and the log is true.

use pinfold_lab::topology::AS_QEMU_HAS_IT;
use pinfold_lab::{Host, HostState, VmSpec};

use crate::stories;
use crate::support::{
    HOUSEKEEPING, ISOLATED, PINS, assert_clean, assert_fenced, assert_restored, expect,
    install_hook, threads, vm,
};

stories![only trixie:
    a_backup_in_stop_mode,
    a_backup_of_a_stopped_vm,
    a_backup_of_a_template,
    a_migration_to_this_node,
    a_migration_that_fails,
    suspended_and_resumed,
    powered_off_and_stopped,
    a_clone_and_a_start_by_ha,
    vcpus_are_plugged_in,
    continued_after_its_start,
];

/// A host as a node has it, with a VM that hook does not manage, and the path unit.
fn node(host: &Host) {
    install_hook(host);
    for (name, text) in [
        (
            "pinfold-recover.path",
            &include_bytes!("../../../packaging/pinfold-recover.path")[..],
        ),
        (
            "pinfold-recover.service",
            include_bytes!("../../../packaging/pinfold-recover.service"),
        ),
    ] {
        host.put(&format!("/etc/systemd/system/{name}"), text, 0o644)
            .unwrap();
    }
    host.ok(
        "mkdir -p /usr/local/sbin /etc/pinfold && cp $(command -v hook) /usr/local/sbin/ && systemctl daemon-reload && \
         systemctl start pinfold-recover.path",
    )
    .unwrap();
    host.start_vm(&VmSpec::new(101)).unwrap();
}

/// VM 100's settings, without names of CPUs: in the lab these are lost when a CPU goes offline.
pub(crate) fn settings(host: &Host, method: &str) {
    let pins: Vec<String> = PINS.iter().map(ToString::to_string).collect();
    let text = format!(
        "isolated = \"{ISOLATED}\"\npins = \"{}\"\nmethod = \"{method}\"\ntidy_caches = false\n",
        pins.join(",")
    );
    host.put("/etc/pinfold/100.toml", text.as_bytes(), 0o644)
        .unwrap();
}

/// Tells an event by each method, on a host with VMID.conf of VM 100.
fn by_each_method(host: &mut Host, event: fn(&Host)) {
    node(host);
    let spec = vm();
    for method in ["hotplug", "partition"] {
        println!("by {method}");
        settings(host, method);
        host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
            .unwrap();
        event(host);
    }
}

/// Waits until the path unit has nothing to do.
fn await_recover(host: &Host) {
    let ended = host
        .ok(
            "sleep 1; while systemctl is-active pinfold-recover.service | grep -qx activating; do sleep 0.2; done; \
             systemctl is-failed -q pinfold-recover.service && journalctl -q -o cat -u pinfold-recover.service; true",
        )
        .unwrap();
    assert!(ended.is_empty(), "recover failed: {ended}");
}

/// Waits until hook has forgotten VM 100, at most some seconds, and asserts that the host is
/// restored.
fn assert_restored_soon(host: &Host, before: &HostState) {
    host.ok("for try in $(seq 50); do grep -q '\"100\":' /run/pinfold/state.json 2>/dev/null || exit 0; sleep 0.2; done; exit 1")
        .unwrap();
    await_recover(host);
    assert_restored(host, before);
}

/// A guest that waited runs now: KVM has started a thread with its first vCPU, and hook has seen it.
fn assert_fenced_soon(host: &Host) {
    host.ok("for try in $(seq 60); do systemctl is-active -q pinfold-threads-100.timer || exit 0; sleep 0.5; done; exit 1")
        .unwrap();
    await_recover(host);
    assert_fenced(host);
}

/// What the journal has of hook about VM 100, since the last time.
fn journal(host: &Host) -> String {
    host.ok(
        "journalctl -q -t pinfold VMID=100 -o cat --output-fields=PRIORITY,MESSAGE --cursor-file=/tmp/cursor",
    )
    .unwrap()
}

/// Asserts that VM 100 has had its CPUs all the time, as the journal has it.
fn assert_no_lack(host: &Host) {
    let journal = journal(host);
    assert!(!journal.contains("without isolated CPUs"), "{journal}");
}

/// A task of Proxmox VE's: what its log has. All of its hooks end with 0: a failure of pre-start fails
/// the task, and of any other phase Proxmox VE warns.
fn task(host: &Host, command: &str) -> String {
    let log = host.ok(&format!("{command} 2>&1")).unwrap();
    assert_no_warning(command, &log);
    log
}

fn assert_no_warning(command: &str, log: &str) {
    assert!(!log.contains("WARN"), "{command}: {log}");
    assert!(!log.contains("without calling"), "{command}: {log}");
}

fn assert_log(log: &str, line: &str) {
    assert!(
        log.lines().any(|found| found.contains(line)),
        "{line:?} is not in:\n{log}"
    );
}

const RESERVED: &str = "CPU 6-11,18-23 reserved for VM 100, from /etc/pinfold/100.toml";
const ISOLATING: &str = "isolating CPU 6-11,18-23 for VM 100";

/// Proxmox VE stops the VM, starts it with -S, and lets it run by `cont`, for which it calls no
/// hook.
fn a_backup_in_stop_mode(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        task(host, "qm start 100");
        assert_fenced(host);
        let log = task(host, "qm vzdump-begin 100");
        assert_log(&log, RESERVED);
        assert_log(&log, ISOLATING);
        assert_fenced_soon(host);
        let log = task(host, "qm vzdump-end 100");
        assert_eq!(log, "", "it runs on");
        assert_fenced(host);
        assert_no_lack(host);
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
    });
}

fn a_backup_of_a_stopped_vm(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        let log = task(host, "qm vzdump-begin 100");
        assert_log(
            &log,
            "VM 100 was not running and is started only for a backup; nothing to prepare",
        );
        assert_log(&log, ISOLATING);
        // Somebody starts it meanwhile: `cont`, and no hook.
        assert_fenced(host);
        task(host, "qm resume 100");
        task(host, "qm vzdump-end 100");
        assert_fenced_soon(host);
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        // Nobody does.
        task(host, "qm vzdump-begin 100");
        assert_fenced(host);
        task(host, "qm vzdump-end 100");
        assert_restored_soon(host, &before);
        assert_no_lack(host);
        // Another VM has its CPUs: nothing is refused.
        let other = VmSpec {
            cores: 2,
            hookscript: vm().hookscript,
            ..VmSpec::new(102)
        };
        let method = host.ok("grep method /etc/pinfold/100.toml").unwrap();
        let text = format!("isolated = \"6,18\"\npins = \"6,18\"\n{method}");
        host.put("/etc/pinfold/102.toml", text.as_bytes(), 0o644)
            .unwrap();
        assert_no_warning("qm start 102", &host.start_vm(&other).unwrap());
        let fenced = host.snapshot().unwrap();
        let log = task(host, "qm vzdump-begin 100");
        let line = "VM 100 runs without isolated CPUs: /etc/pinfold/100.toml: isolated: CPU 6,18 is isolated for VM 102, \
                    which runs; stop it or choose others";
        assert_log(&log, line);
        assert!(journal(host).contains(line));
        assert_clean(host, "6,18", &[102]);
        task(host, "qm vzdump-end 100");
        await_recover(host);
        assert_restored(host, &fenced);
        assert_no_warning("qm stop 102", &host.stop_vm(102).unwrap());
        host.ok("rm /etc/pinfold/102.toml /etc/pve/qemu-server/102.conf")
            .unwrap();
    });
}

fn a_backup_of_a_template(host: &mut Host) {
    by_each_method(host, |host| {
        host.ok("echo 'template: 1' >> /etc/pve/qemu-server/100.conf")
            .unwrap();
        let before = host.snapshot().unwrap();
        let log = task(host, "qm vzdump-begin 100");
        assert_log(
            &log,
            "VM 100 is a template: its guest does not run, nothing is isolated",
        );
        assert!(threads(host, 100).iter().all(|(_, cpus)| cpus == "0-23"));
        let (status, _) = expect(host, "hook status", 0);
        assert!(status.ends_with("no CPU is isolated\n"), "{status}");
        task(host, "qm vzdump-end 100");
        await_recover(host);
        assert_restored(host, &before);
        assert_no_lack(host);
    });
}

/// VMID.conf lies at the other node until the migration has succeeded.
fn a_migration_to_this_node(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        // What comes from the other node.
        host.ok(
            "sed -i /hookscript/d /etc/pve/qemu-server/100.conf && qm start 100 && qm suspend 100",
        )
        .unwrap();
        let theirs = "/etc/pve/nodes/pve2/qemu-server/100.conf";
        host.ok("rm /etc/pve/qemu-server/100.conf").unwrap();
        host.put(theirs, vm().conf().as_bytes(), 0o640).unwrap();
        let log = task(host, "qm start 100 --migratedfrom=pve2 --incoming");
        assert_log(&log, RESERVED);
        assert_log(&log, ISOLATING);
        assert_fenced(host);
        host.ok(&format!(
            "mv {theirs} /etc/pve/qemu-server/ && qm resume 100"
        ))
        .unwrap();
        assert_fenced_soon(host);
        // It goes again: on the source there is no post-stop.
        host.kill_vm(100).unwrap();
        host.cleanup_vm(100, false).unwrap();
        assert_restored_soon(host, &before);
        assert_no_lack(host);
    });
}

/// The target's QEMU ends without a hook.
fn a_migration_that_fails(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        host.ok("mv /etc/pve/qemu-server/100.conf /etc/pve/nodes/pve2/qemu-server/")
            .unwrap();
        let log = task(host, "qm start 100 --migratedfrom=pve2");
        assert_log(&log, ISOLATING);
        assert_fenced(host);
        host.kill_vm(100).unwrap();
        host.ok("rm -f /run/qemu-server/100.*").unwrap();
        assert_restored_soon(host, &before);
        host.ok("rm /etc/pve/nodes/pve2/qemu-server/100.conf")
            .unwrap();
    });
}

/// Suspended to disk, resumed, and taken back to a snapshot with RAM: no pre-stop.
fn suspended_and_resumed(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        task(host, "qm start 100");
        task(host, "qm suspend 100");
        host.ok("sed -i '/^lock:/d' /etc/pve/qemu-server/100.conf")
            .unwrap();
        assert_restored_soon(host, &before);
        let log = task(host, "qm resume 100");
        assert_log(&log, RESERVED);
        assert_log(&log, ISOLATING);
        assert_fenced_soon(host);
        let log = task(host, "qm rollback 100");
        assert_log(&log, ISOLATING);
        assert_fenced_soon(host);
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        assert_no_lack(host);
    });
}

/// post-stop comes at once, or a second after the path unit has seen QEMU end.
fn powered_off_and_stopped(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        for end in ["poweroff", "stop", "shutdown"] {
            task(host, "qm start 100");
            assert_fenced(host);
            task(host, &format!("qm {end} 100"));
            assert_restored_soon(host, &before);
        }
        let recovered = host
            .ok("journalctl -q -o cat -u pinfold-recover.service")
            .unwrap();
        assert!(!recovered.contains("without calling"), "{recovered}");
    });
}

/// VMs that have no settings on this node.
fn a_clone_and_a_start_by_ha(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        let method = host.ok("grep method /etc/pinfold/100.toml").unwrap();
        host.ok("rm /etc/pinfold/100.toml && qm clone 100 103")
            .unwrap();
        // Not a 5900X any more.
        host.ok(&format!(
            "touch {AS_QEMU_HAS_IT}; umount /sys/devices/system/cpu/cpu*/topology /sys/devices/system/cpu/cpu*/cache/index3 2>/dev/null; true"
        ))
        .unwrap();
        for id in [100, 103] {
            expect(host, &format!("qm start {id}"), 1);
            assert_restored(host, &before);
            let (_, refusal) = expect(host, &format!("hook {id} pre-start"), 1);
            assert!(
                refusal.contains(&format!("write settings with `hook init {id}`")),
                "{refusal}"
            );
        }
        host.put("/etc/pinfold/default.toml", b"required = false\n", 0o644)
            .unwrap();
        let log = task(host, "qm start 100");
        let line = "VM 100 starts without isolated CPUs: /etc/pinfold/default.toml has required = false and no CPUs; \
                    `hook init 100` chooses some";
        assert_log(&log, line);
        assert_eq!(journal(host).matches(line).count(), 1);
        assert!(threads(host, 100).iter().all(|(_, cpus)| cpus == "0-23"));
        let (status, _) = expect(host, "hook status", 0);
        assert!(
            status.contains("VM 100 runs without isolated CPUs\n"),
            "{status}"
        );
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        // Of the cluster's settings, for a node with other CPUs.
        host.ok("rm /etc/pinfold/default.toml && mkdir -p /etc/pve/pinfold")
            .unwrap();
        let text = format!("required = false\nisolated = \"30-35\"\npins = \"auto\"\n{method}");
        host.put("/etc/pve/pinfold/100.toml", text.as_bytes(), 0o640)
            .unwrap();
        let log = task(host, "qm start 100");
        assert_log(
            &log,
            "VM 100 starts without isolated CPUs: /etc/pve/pinfold/100.toml: isolated: ",
        );
        assert!(journal(host).contains("VM 100 starts without isolated CPUs"));
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        host.ok("rm -r /etc/pve/pinfold /etc/pve/qemu-server/103.conf")
            .unwrap();
        host.ok(&format!("rm {AS_QEMU_HAS_IT}")).unwrap();
        host.renew_topology().unwrap();
    });
}

/// Nothing calls a hook then.
fn vcpus_are_plugged_in(host: &mut Host) {
    host.put("/tmp/qmp.pl", crate::others::QMP.as_bytes(), 0o644)
        .unwrap();
    by_each_method(host, |host| {
        let spec = VmSpec {
            vcpus: Some(2),
            more: "hotplug: cpu,disk\n".into(),
            ..vm()
        };
        host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
            .unwrap();
        let before = host.snapshot().unwrap();
        task(host, "qm start 100");
        crate::others::plug_in(host, 2);
        let pinned = "for try in $(seq 40); do for t in /proc/$(cat /run/qemu-server/100.pid)/task/*; do \
                      case $(cat $t/comm) in CPU\\ 2/*) grep -q '^Cpus_allowed_list:\t7$' $t/status && exit 0;; esac; \
                      done; sleep 0.25; done; exit 1";
        host.ok(pinned).unwrap();
        assert_clean(host, ISOLATED, &[100]);
        for (name, cpus) in threads(host, 100) {
            if !name.starts_with("CPU ") {
                assert_eq!(cpus, HOUSEKEEPING, "{name}");
            }
        }
        let logged = host
            .ok("journalctl -q -o cat _PID=1 -b | grep -c pinfold-threads-100 || true")
            .unwrap();
        assert!(
            logged.trim().parse::<usize>().unwrap() < 8,
            "it floods the journal: {logged}"
        );
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        let (units, _) = expect(
            host,
            "systemctl list-units --all --no-legend 'pinfold-threads-*'",
            0,
        );
        assert_eq!(units, "");
    });
}

/// A live restore, and a VM with `freeze: 1`: started with -S, and continued without a hook.
fn continued_after_its_start(host: &mut Host) {
    by_each_method(host, |host| {
        let before = host.snapshot().unwrap();
        let log = task(host, "qm live-restore 100");
        assert_log(&log, RESERVED);
        assert_log(&log, ISOLATING);
        assert_fenced_soon(host);
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        host.ok("echo 'freeze: 1' >> /etc/pve/qemu-server/100.conf")
            .unwrap();
        let log = task(host, "qm start 100");
        assert_log(&log, ISOLATING);
        assert_fenced(host);
        task(host, "qm resume 100");
        assert_fenced_soon(host);
        task(host, "qm stop 100");
        assert_restored_soon(host, &before);
        assert_no_lack(host);
    });
}

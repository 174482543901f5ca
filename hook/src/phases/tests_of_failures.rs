//! What a part that fails costs a VM, and what it does not.

use std::time::Duration;

use pinfold_core::knob::Value;
use pinfold_core::state::store::Store;
use pinfold_core::sys::task;
use pinfold_core::{CpuSet, Knob, Setting, Verbosity};

use super::*;
use crate::fixture::MadeUpHost;
use crate::state::reservation::{Phase, Reservation};

const SETTINGS: &str = "isolated = \"6,18\"\npins = \"6,18\"\ngovernor = \"keep\"\n\
                        [deadlines]\nqemu_exit = 0\n";

/// A host with VM 100, whose vCPUs are on these CPUs. It is out of its slice already, since no
/// process can be moved on a made-up host; nor can a thread be pinned, so that whatever has its
/// CPUs is right and all else fails.
fn host(vcpus: &[usize]) -> MadeUpHost {
    let host = MadeUpHost::new("5900x");
    host.vm(100, vcpus);
    let cgroup = "qemu-decoupled.slice/100.scope";
    host.file("proc/100/cgroup", &format!("0::/{cgroup}"));
    host.file(&format!("sys/fs/cgroup/{cgroup}/cgroup.procs"), "100");
    host.settings(100, SETTINGS);
    host
}

fn phase(host: &MadeUpHost, phase: &str) -> (anyhow::Result<Exit>, Vec<String>) {
    let mut report = Report::new("hook", Verbosity::Quiet, false);
    let mut run = Run {
        root: host.root.clone(),
        report: &mut report,
        migrated_from: None,
    };
    let vmid = "100".parse().unwrap();
    let exit = match phase {
        "pre-start" => run.pre_start(vmid),
        "post-start" => run.post_start(vmid),
        _ => run.post_stop(vmid),
    };
    (exit, report.notes().to_vec())
}

/// What comes to the journal of a host from now on, without the fields before the message.
fn journal(host: &MadeUpHost) -> impl Fn() -> Vec<String> + use<> {
    let path = host.root.path("run/systemd/journal/socket");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let socket = std::os::unix::net::UnixDatagram::bind(path).unwrap();
    socket.set_nonblocking(true).unwrap();
    move || {
        let mut bytes = vec![0; 65536];
        std::iter::from_fn(|| {
            let read = socket.recv(&mut bytes).ok()?;
            let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
            Some(
                text.replace("SYSLOG_IDENTIFIER=pinfold\n", "")
                    .replace('\n', " "),
            )
        })
        .collect()
    }
}

fn reservation(host: &MadeUpHost, id: u32) -> Option<Reservation> {
    let mut reservations = Store::<Reservation>::peek(&host.root)
        .unwrap()?
        .reservations;
    reservations.remove(&id)
}

#[test]
fn a_part_that_fails_does_not_take_the_fence() {
    let host = host(&[6, 18]);
    let journal = journal(&host);
    let (exit, notes) = phase(&host, "post-start");
    assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
    let lines = journal();
    assert!(
        lines.len() == 1
            && lines[0].starts_with("PRIORITY=4 VMID=100 MESSAGE=VM 100 has its CPUs, but ")
            && lines[0].contains(&notes[0]),
        "{lines:#?}"
    );
    let kept = reservation(&host, 100).unwrap();
    assert_eq!(kept.phase, Phase::Isolated);
    // kthreadd, kswapd0, systemd and QEMU's main thread, none of which can be pinned here.
    let failed = notes
        .iter()
        .filter(|note| note.contains("set to 0-5,7-17,19-23: "));
    assert_eq!(failed.count(), kept.failed, "{notes:#?}");
    assert!(kept.failed > 1, "{notes:#?}");
    assert!(
        notes.last().unwrap().ends_with(&format!(
            "VM 100 has its CPUs, but {} changes failed; `hook 100 post-start` tries again",
            kept.failed
        )),
        "{notes:#?}"
    );
    assert_eq!(
        host.root
            .read("sys/devices/system/cpu/cpu6/online")
            .unwrap(),
        "1"
    );
}

#[test]
fn without_its_vcpus_pins_there_is_no_fence() {
    let host = host(&[6, 3]);
    let journal = journal(&host);
    let (exit, notes) = phase(&host, "post-start");
    let lines = journal();
    assert!(
        lines.len() == 1
            && lines[0]
                .starts_with("PRIORITY=3 VMID=100 MESSAGE=VM 100 runs without isolated CPUs: "),
        "{lines:#?}"
    );
    assert_eq!(
        exit.unwrap_err().to_string(),
        "VM 100 runs without isolated CPUs: all changes have been undone",
        "{notes:#?}"
    );
    assert!(
        reservation(&host, 100).is_none_or(|kept| !kept.is_fenced()),
        "{notes:#?}"
    );
}

/// VM 101 has stopped, and a kernel thread cannot be given back what it had.
fn with_a_dead_vm(host: &MadeUpHost) {
    host.vm(101, &[7, 19]);
    host.reserve(
        101,
        Phase::Isolated,
        "isolated = \"7,19\"\npins = \"7,19\"\n",
    );
    let mut store: Store<Reservation> = Store::open(&host.root, Duration::from_secs(1)).unwrap();
    let narrow: CpuSet = "0-6,8-18,20-23".parse().unwrap();
    let kswapd = task::task(&host.root, 3, 3).unwrap().id;
    let object = Setting::new(Knob::Kthread(kswapd), "kthread 3", CpuSet::range(0, 23));
    store
        .baseline
        .plan(vec![object], |_, _| Value::from(&narrow));
    store.save().unwrap();
    host.thread(3, 3, "kswapd0", &narrow.to_string(), 0x0020_0000);
    with_a_dead_vm_of(host, 101);
}

#[test]
fn what_another_vm_left_fails_no_phase() {
    let host = host(&[6, 18]);
    with_a_dead_vm(&host);
    let journal = journal(&host);
    let (exit, notes) = phase(&host, "pre-start");
    assert_eq!(exit.unwrap(), Exit::Success, "{notes:#?}");
    assert!(
        notes
            .iter()
            .any(|note| note.starts_with("kthread 3 (kswapd0): set to 0-23: ")),
        "{notes:#?}"
    );
    assert_eq!(reservation(&host, 100).unwrap().phase, Phase::Starting);
    let line = "PRIORITY=5 VMID=101 MESSAGE=VM 101 has ended; releasing its CPUs ";
    assert_eq!(journal(), [line]);
}

#[test]
fn the_wakeup_latency_comes_back() {
    let host = host(&[6, 18]);
    let latency = |cpu| format!("sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us");
    for (cpu, before) in [(5, "0"), (6, "0"), (18, "100")] {
        host.file(&latency(cpu), before);
    }
    let all = || [5, 6, 18].map(|cpu| host.root.read_value(latency(cpu)).unwrap().unwrap());
    let settings = |microseconds: &str| {
        host.settings(100, &format!("max_latency_us = {microseconds}\n{SETTINGS}"));
    };
    settings("20");
    phase(&host, "post-start").0.unwrap();
    assert_eq!(all(), ["0", "20", "20"]);
    // What a VM has is by the settings of its start.
    settings("30");
    phase(&host, "post-start").0.unwrap();
    assert_eq!(all(), ["0", "20", "20"]);
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(all(), ["0", "0", "100"]);
    settings("0");
    phase(&host, "post-start").0.unwrap();
    assert_eq!(all(), ["0", "n/a", "n/a"]);
    // Of another program's value nothing is taken back.
    host.file(&latency(6), "50");
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(all(), ["0", "50", "100"]);
}

#[test]
fn the_cpus_of_network_queues_come_back() {
    const QUEUES: [&str; 4] = [
        "enp6s0/queues/rx-0/rps_cpus",
        "enp6s0/queues/rx-1/rps_cpus",
        "enp6s0/queues/rx-2/rps_cpus",
        "tap101i0/queues/rx-0/rps_cpus",
    ];
    let file = |queue| format!("sys/class/net/{queue}");
    let host = host(&[6, 18]);
    let all = || {
        let mask = |queue| host.root.read_value(file(queue)).unwrap();
        QUEUES.map(|queue| mask(queue).unwrap_or_default())
    };
    // The second names isolated CPUs only, the third is off.
    let before = ["00ffffff", "00040000", "00000000", "00000040"];
    for (queue, mask) in QUEUES.into_iter().zip(before) {
        host.file(&file(queue), mask);
    }
    phase(&host, "post-start").0.unwrap();
    let rest = "00fbffbf";
    assert_eq!(all(), [rest, rest, "00000000", rest]);
    // VM 101 stops, and starts again: its interface is a new one of the same name.
    std::fs::remove_dir_all(host.root.path("sys/class/net/tap101i0")).unwrap();
    let (_, notes) = phase(&host, "post-start");
    assert!(!format!("{notes:?}").contains("tap101i0"), "{notes:?}");
    host.file(&file(QUEUES[3]), "00000000");
    let (_, notes) = phase(&host, "post-stop");
    assert_eq!(all()[..3], before[..3]);
    assert_eq!(all()[3], "00000000", "it is not switched on");
    assert!(!format!("{notes:?}").contains("tap101i0"), "{notes:?}");
}

#[test]
fn what_another_vm_has_left_fails_no_stop() {
    let host = host(&[6, 18]);
    host.reserve(100, Phase::Isolated, SETTINGS);
    with_a_dead_vm(&host);
    // Its cgroup cannot be removed here, since it has files.
    let cgroup = "qemu-decoupled.slice/101.scope";
    host.file(&format!("sys/fs/cgroup/{cgroup}/cgroup.procs"), "");
    // Nothing of VM 100 is left.
    for folder in ["proc/100", "sys/fs/cgroup/qemu-decoupled.slice/100.scope"] {
        std::fs::remove_dir_all(host.root.path(folder)).unwrap();
    }
    std::fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
    // What the kernel thread had.
    host.thread(3, 3, "kswapd0", "0-23", 0x0020_0000);
    let (exit, notes) = phase(&host, "post-stop");
    let left = format!("cgroup /{cgroup}: set to absent: ");
    assert!(
        notes.iter().any(|note| note.starts_with(&left)),
        "{notes:#?}"
    );
    assert_eq!(exit.unwrap(), Exit::Success, "{notes:#?}");
}

#[test]
fn what_proxmox_ve_gave_the_scope_is_kept_meanwhile() {
    let host = host(&[6, 18]);
    host.file(
        "run/systemd/transient/100.scope",
        "[Unit]\nAfter=dbus.service\n[Scope]\nCPUWeight=50\nCPUQuota=150%",
    );
    let (exit, notes) = phase(&host, "post-start");
    assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
    let kept = reservation(&host, 100).unwrap().scope.unwrap();
    assert_eq!(kept.after, ["dbus.service"]);
    assert_eq!(kept.cpu_weight, Some(50));
    assert_eq!(kept.cpu_quota_usec, Some(1_500_000));
}

/// A file of a CPU's own cpufreq policy.
fn policy(cpu: usize, file: &str) -> String {
    format!("sys/devices/system/cpu/cpufreq/policy{cpu}/{file}")
}

fn preference(cpu: usize) -> String {
    policy(cpu, "energy_performance_preference")
}

/// Gives three CPUs a cpufreq driver with energy preferences.
fn with_preferences(host: &MadeUpHost) {
    for cpu in [5, 6, 18] {
        for (file, text) in [
            ("related_cpus", cpu.to_string().as_str()),
            ("scaling_governor", "powersave"),
            ("scaling_available_governors", "performance powersave"),
            (
                "energy_performance_available_preferences",
                "default performance balance_performance balance_power power",
            ),
            ("energy_performance_preference", "balance_power"),
        ] {
            host.file(&policy(cpu, file), text);
        }
    }
}

#[test]
fn a_vm_has_its_energy_preference() {
    for governor in ["powersave", "keep"] {
        let host = host(&[6, 18]);
        with_preferences(&host);
        let settings = |preference: &str| {
            let text = SETTINGS.replace("\"keep\"", &format!("\"{governor}\""));
            let text = format!("energy_preference = \"{preference}\"\n{text}");
            host.settings(100, &text);
        };
        let all = || [5, 6, 18].map(|cpu| host.root.read_value(preference(cpu)).unwrap().unwrap());
        settings("balance_performance");
        let (exit, notes) = phase(&host, "post-start");
        assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
        let while_it_runs = [
            "balance_power",
            "balance_performance",
            "balance_performance",
        ];
        assert_eq!(all(), while_it_runs, "{governor}");
        // Run again, it finds what it has set.
        phase(&host, "post-start").0.unwrap();
        assert_eq!(all(), while_it_runs, "{governor}");
        phase(&host, "post-stop").0.unwrap();
        assert_eq!(all(), ["balance_power"; 3], "{governor}");
        // One that the driver does not have is refused before anything is changed.
        settings("fast");
        let error = phase(&host, "pre-start").0.unwrap_err().to_string();
        assert!(error.contains("energy_preference: no \"fast\""), "{error}");
        assert_eq!(all(), ["balance_power"; 3]);
    }
}

#[test]
fn the_energy_preference_comes_back() {
    for (governor, changes) in [("performance", true), ("keep", false)] {
        let host = host(&[6, 18]);
        with_preferences(&host);
        // A value without a name is unknown, and not written back.
        std::fs::remove_file(host.root.path(preference(18))).unwrap();
        std::fs::create_dir(host.root.path(preference(18))).unwrap();
        host.settings(
            100,
            &SETTINGS.replace("\"keep\"", &format!("\"{governor}\"")),
        );
        let read = |file: String| host.root.read_value(file).unwrap().unwrap();
        let (exit, notes) = phase(&host, "post-start");
        assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
        assert_eq!(
            read(policy(6, "scaling_governor")) == "performance",
            changes
        );
        // As amd-pstate does with the governor.
        host.file(&preference(6), "performance");
        if !changes {
            // It does as a CPU goes offline too: here in a hook that was killed after it.
            let mut store: Store<Reservation> =
                Store::open(&host.root, Duration::from_secs(1)).unwrap();
            store.reservations.get_mut(&100).unwrap().phase = Phase::Isolating;
            store.save().unwrap();
            drop(store);
            let (exit, notes) = phase(&host, "post-start");
            assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
            assert_eq!(read(preference(6)), "balance_power", "{notes:#?}");
        }
        let (_, notes) = phase(&host, "post-stop");
        assert_eq!(read(policy(6, "scaling_governor")), "powersave");
        assert_eq!(read(preference(6)), "balance_power", "{notes:#?}");
        assert!(
            notes.iter().all(|note| !note.contains("policy18")),
            "{notes:#?}"
        );
    }
}

/// Each CPU's governor and energy preference.
fn tuned(host: &MadeUpHost) -> [String; 3] {
    [5, 6, 18].map(|cpu| {
        let read = |file: String| host.root.read_value(file).unwrap().unwrap();
        format!(
            "{} {}",
            read(policy(cpu, "scaling_governor")),
            read(preference(cpu))
        )
    })
}

#[test]
fn housekeeping_cpus_are_tuned_while_a_vm_asks_for_it() {
    let host = host(&[6, 18]);
    with_preferences(&host);
    for cpu in [5, 6, 18] {
        host.file(&policy(cpu, "scaling_governor"), "schedutil");
        let all = "performance powersave schedutil";
        host.file(&policy(cpu, "scaling_available_governors"), all);
    }
    let before = ["schedutil balance_power"; 3];
    let settings = |keys: &str| host.settings(100, &format!("{keys}\n{SETTINGS}"));
    settings("housekeeping_governor = \"powersave\"\nhousekeeping_energy_preference = \"power\"");
    let (exit, notes) = phase(&host, "post-start");
    assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
    assert_eq!(tuned(&host), ["powersave power", before[1], before[2]]);
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(tuned(&host), before);
    // Of two VMs that ask, the one with the lower number gets what it asks for.
    host.vm(101, &[7, 19]);
    let other = "isolated = \"7,19\"\npins = \"7,19\"\nhousekeeping_governor = \"performance\"\n";
    host.reserve(101, Phase::Isolated, other);
    phase(&host, "post-start").0.unwrap();
    assert_eq!(tuned(&host), ["powersave power", before[1], before[2]]);
    phase(&host, "post-stop").0.unwrap();
    // CPU 6 and 18 are housekeeping CPUs again.
    let governors = tuned(&host).map(|text| text.split(' ').next().unwrap().to_owned());
    assert_eq!(governors, ["performance"; 3]);
    with_a_dead_vm_of(&host, 101);
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(tuned(&host), before);
    // One of the two alone; what the governor does to the preference is undone too.
    settings("housekeeping_governor = \"performance\"");
    phase(&host, "post-start").0.unwrap();
    host.file(&preference(5), "performance");
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(tuned(&host), before);
    for (keys, why) in [
        (
            "housekeeping_governor = \"fast\"",
            "housekeeping_governor: no \"fast\"",
        ),
        (
            "housekeeping_energy_preference = \"fast\"",
            "housekeeping_energy_preference: no \"fast\"",
        ),
    ] {
        settings(keys);
        let error = phase(&host, "pre-start").0.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn halt_polling_is_set_before_the_start_and_comes_back() {
    const FILE: &str = "sys/module/kvm/parameters/halt_poll_ns";
    let host = host(&[6, 18]);
    host.file(FILE, "200000");
    let now = || host.root.read_value(FILE).unwrap().unwrap();
    let keys = "halt_poll_ns = 400000\ntidy_caches = false\n";
    host.settings(100, &format!("{keys}{SETTINGS}"));
    // The VM is not there yet.
    let pid_file = host.root.path("run/qemu-server/100.pid");
    let pid = std::fs::read(&pid_file).unwrap();
    std::fs::remove_file(&pid_file).unwrap();
    let (exit, notes) = phase(&host, "pre-start");
    assert_eq!(exit.unwrap(), Exit::Success, "{notes:#?}");
    assert_eq!(now(), "400000");
    // The task that starts it runs on.
    let mut store: Store<Reservation> = Store::open(&host.root, Duration::from_secs(1)).unwrap();
    let starter = task::task(&host.root, 1, 1).unwrap().id;
    store.reservations.get_mut(&100).unwrap().starter = Some(starter);
    store.save().unwrap();
    drop(store);
    // Another VM that stops meanwhile takes nothing away; of two that ask the longest applies.
    host.vm(101, &[7, 19]);
    let other = "isolated = \"7,19\"\npins = \"7,19\"\nhalt_poll_ns = 800000\n";
    host.reserve(101, Phase::Isolated, other);
    with_a_dead_vm_of(&host, 101);
    let mut report = Report::new("hook", Verbosity::Quiet, false);
    let mut run = Run {
        root: host.root.clone(),
        report: &mut report,
        migrated_from: None,
    };
    run.recover().unwrap();
    assert_eq!(now(), "400000");
    host.vm(101, &[7, 19]);
    host.reserve(101, Phase::Isolated, other);
    std::fs::write(&pid_file, pid).unwrap();
    phase(&host, "post-start").0.unwrap();
    assert_eq!(now(), "800000");
    with_a_dead_vm_of(&host, 101);
    phase(&host, "post-start").0.unwrap();
    assert_eq!(now(), "400000");
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(now(), "200000");
    // A start that is given up.
    std::fs::remove_file(&pid_file).unwrap();
    phase(&host, "pre-start").0.unwrap();
    assert_eq!(now(), "400000");
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(now(), "200000");
}

/// Nothing of a VM's QEMU is left.
fn with_a_dead_vm_of(host: &MadeUpHost, id: u32) {
    std::fs::remove_file(host.root.path(format!("run/qemu-server/{id}.pid"))).unwrap();
    std::fs::remove_dir_all(host.root.path(format!("proc/{id}"))).unwrap();
}

#[test]
fn a_policy_that_cannot_be_set_takes_no_fence_and_is_remembered() {
    let host = host(&[6, 18]);
    host.settings(100, &format!("vcpu_policy = \"fifo:1\"\n{SETTINGS}"));
    let (exit, notes) = phase(&host, "post-start");
    assert_eq!(exit.unwrap(), Exit::Partial, "{notes:#?}");
    let failed = |note: &&String| {
        note.contains("policy of vCPU")
            && note.contains("set to fifo:1: policies can be set on the running host only")
    };
    assert_eq!(notes.iter().filter(failed).count(), 2, "{notes:#?}");
    let before = |host: &MadeUpHost| -> Vec<String> {
        let store: Store<Reservation> = Store::open(&host.root, Duration::from_secs(1)).unwrap();
        let knobs = store.baseline.knobs();
        knobs
            .filter(|(knob, ..)| matches!(knob, Knob::ThreadPolicy(_)))
            .map(|(_, _, before)| before.to_string())
            .collect()
    };
    // It is saved before it is set, and with the fence it goes.
    assert_eq!(before(&host), ["other"; 2]);
    phase(&host, "post-stop").0.unwrap();
    assert_eq!(before(&host), [""; 0]);
}

//! Phases as Proxmox VE calls them: what a VM gets, and what is reported.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use pinfold_core::knob::Value;
use pinfold_core::state::store::Store;
use pinfold_core::{Knob, Verbosity};
use serde_json::json;

use super::*;
use crate::fixture::MadeUpHost;
use crate::state::reservation::{Backup, Phase, Reservation};

/// A 5900X with a journal, and settings for VM 100 that change nothing but CPUs.
fn host(settings: &str) -> (MadeUpHost, UnixDatagram) {
    let host = MadeUpHost::new("5900x");
    let socket = host.root.path("run/systemd/journal/socket");
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let journal = UnixDatagram::bind(socket).unwrap();
    journal.set_nonblocking(true).unwrap();
    host.settings(100, &format!("tidy_caches = false\n{settings}"));
    (host, journal)
}

const HALF: &str = "isolated = \"6-8,18-20\"\npins = \"auto\"\nmethod = \"hotplug\"\n";

fn vmid(id: u32) -> VmId {
    VmId::try_from(id).unwrap()
}

/// Runs a phase: its end, and its notes.
fn phase(host: &MadeUpHost, id: u32, phase: &str) -> (Result<Exit, String>, Vec<String>) {
    phase_from(host, id, phase, None)
}

fn phase_from(
    host: &MadeUpHost,
    id: u32,
    phase: &str,
    source: Option<&str>,
) -> (Result<Exit, String>, Vec<String>) {
    let mut report = Report::new("hook", Verbosity::Quiet, true);
    let mut run = Run {
        root: host.root.clone(),
        report: &mut report,
        migrated_from: source.map(str::to_owned),
    };
    let ended = match phase {
        "pre-start" => run.pre_start(vmid(id)),
        "post-start" => run.post_start(vmid(id)),
        _ => run.post_stop(vmid(id)),
    };
    let ended = ended.map_err(|error| format!("{error:#}"));
    (ended, report.notes().to_vec())
}

fn reservation(host: &MadeUpHost, id: u32) -> Option<Reservation> {
    let state = Store::<Reservation>::peek(&host.root).unwrap();
    state.and_then(|mut state| state.reservations.remove(&id))
}

/// The journal's messages so far.
fn messages(journal: &UnixDatagram) -> Vec<String> {
    let mut bytes = [0; 4096];
    std::iter::from_fn(|| {
        let length = journal.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..length]).replace('\n', " "))
    })
    .collect()
}

#[test]
fn a_vm_that_needs_no_cpus_starts_without() {
    for (settings, priority, why) in [
        (
            "required = false",
            5,
            "100.toml has required = false and no CPUs; `hook init 100` chooses some",
        ),
        (
            "required = false\nisolated = \"llc:7\"\npins = \"auto\"",
            4,
            "isolated: llc:7: no such LLC domain",
        ),
        (
            "required = false\nisolated = \"0,6\"\npins = \"auto\"\nmethod = \"hotplug\"",
            4,
            "isolated: CPU 0 cannot be isolated",
        ),
    ] {
        let (host, journal) = host(settings);
        host.conf(100, "cores: 2");
        let (ended, notes) = phase(&host, 100, "pre-start");
        assert_eq!(ended, Ok(Exit::Success));
        assert_eq!(notes.len(), 1, "one clear line: {notes:?}");
        assert!(
            notes[0].starts_with("VM 100 starts without isolated CPUs: "),
            "{notes:?}"
        );
        assert!(notes[0].contains(why), "{notes:?}");
        let reported = messages(&journal);
        assert_eq!(reported.len(), 1, "{reported:?}");
        assert!(
            reported[0].starts_with(&format!(
                "SYSLOG_IDENTIFIER=pinfold PRIORITY={priority} VMID=100 MESSAGE=VM 100 starts"
            )),
            "{reported:?}"
        );
        host.vm(100, &[0, 1]);
        let (ended, notes) = phase(&host, 100, "post-start");
        assert_eq!(
            (ended, notes),
            (Ok(Exit::Success), Vec::new()),
            "said already"
        );
        assert_eq!(reservation(&host, 100).unwrap().phase, Phase::Unfenced);
        fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
        fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        assert_eq!(
            phase(&host, 100, "post-stop"),
            (Ok(Exit::Success), Vec::new())
        );
        assert!(reservation(&host, 100).is_none());
    }
}

/// Changes the state as a later version of hook would have written it.
fn edit_state(host: &MadeUpHost, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = host.root.path("run/pinfold/state.json");
    let mut state = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut state);
    fs::write(&path, state.to_string()).unwrap();
}

fn on_disk(host: &MadeUpHost) -> serde_json::Value {
    let text = fs::read_to_string(host.root.path("run/pinfold/state.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_state_of_a_later_version_strands_no_vm() {
    let thread = json!({"pid": 100, "tid": 100, "start": 1, "namespace": 4});
    let entry = |knob: serde_json::Value| json!({"knob": knob, "label": "x", "before": "1", "set": ["120"]});
    type Edit<'a> = &'a dyn Fn(&mut serde_json::Value);
    // What is edited, what has to be named, whether that is kept after the end.
    let cases: [(Edit<'_>, &str, bool); 9] = [
        (
            &|state| state["boot"] = json!([1]),
            "the fields \"boot\"",
            false,
        ),
        (
            &|state| state["version"] = json!(2),
            "version 2 of the file",
            false,
        ),
        (
            &|state| state["reservations"]["100"]["ways"] = json!(3),
            "VM 100: a later version of hook has saved data unknown to this one: ways",
            false,
        ),
        (
            &|state| state["reservations"]["100"]["settings"]["deadlines"]["x"] = json!(3),
            "settings.deadlines.x",
            false,
        ),
        (
            &|state| {
                let vm = &mut state["reservations"]["100"];
                vm["phase"] = json!("frozen");
                vm["isolation"] = json!("resctrl");
                vm["settings"]["method"] = json!("resctrl");
                vm["backup"] = json!("cloned");
            },
            "phase",
            false,
        ),
        (
            &|state| {
                let entries = state["baseline"].as_array_mut().unwrap();
                entries.push(entry(json!({"l3-ways": 3})));
                entries.push(entry(json!("all-ways")));
            },
            "values of \"all-ways\" (1), \"l3-ways\" (1)",
            true,
        ),
        (
            &|state| {
                let entries = state["baseline"].as_array_mut().unwrap();
                entries.push(entry(json!({"thread": thread})));
            },
            "values of \"thread\" (1)",
            true,
        ),
        (
            &|state| {
                let entries = state["baseline"].as_array_mut().unwrap();
                entries.push(entry(json!({"cpu-online": 3})));
            },
            "values of \"cpu-online\" (1)",
            true,
        ),
        (
            &|state| state["baseline"][0]["when"] = json!("later"),
            "\"when\" of vm.stat_interval",
            false,
        ),
    ];
    for (edit, named, is_kept) in cases {
        let (host, _journal) = host(HALF);
        host.file("proc/sys/vm/stat_interval", "120");
        host.vm(100, &[6, 7]);
        host.reserve(100, Phase::Isolated, HALF);
        let interval = entry(json!({"sysctl": "vm/stat_interval"}));
        edit_state(&host, |state| {
            state["reservations"]["100"]["settings"]["stat_interval"] = json!(120);
            state["reservations"]["100"]["settings"]["governor"] = json!(null);
            state["baseline"] = json!([interval]);
            edit(state);
        });
        let edited = on_disk(&host);

        // Another VM does not pay, and keeps what the later version has there.
        host.conf(101, "cores: 2");
        host.settings(
            101,
            "isolated = \"9,21\"\npins = \"auto\"\nmethod = \"hotplug\"\ntidy_caches = false\n",
        );
        let (ended, notes) = phase(&host, 101, "pre-start");
        assert_eq!(
            (ended, notes.len()),
            (Ok(Exit::Success), 0),
            "{named}: {notes:?}"
        );
        let mut kept = on_disk(&host);
        kept["reservations"]
            .as_object_mut()
            .unwrap()
            .remove("101")
            .unwrap();
        let sorted = |state: &serde_json::Value| {
            let entries = state["baseline"].as_array().unwrap();
            let mut entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
            entries.sort_unstable();
            entries
        };
        assert_eq!(sorted(&kept), sorted(&edited), "{named}");
        kept["baseline"] = edited["baseline"].clone();
        assert_eq!(kept, edited, "{named}");
        let overlap = "isolated = \"6,18\"\npins = \"auto\"\nmethod = \"hotplug\"\n";
        host.conf(102, "cores: 2");
        host.settings(102, overlap);
        let (ended, _) = phase(&host, 102, "pre-start");
        assert!(
            ended.unwrap_err().contains("VM 100"),
            "{named}: its CPUs stay its own"
        );
        // Threads cannot be pinned on such a host, which is all that fails.
        let (ended, notes) = phase(&host, 101, "post-stop");
        assert!(ended.is_ok(), "{named}: {ended:?}");
        assert!(
            !notes.iter().any(|note| note.contains("later version")),
            "{notes:?}"
        );

        // It stops: what is known comes back, the rest is named once.
        fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
        fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        let (ended, notes) = phase(&host, 100, "post-stop");
        assert_eq!(ended, Ok(Exit::Partial), "{named}: {notes:?}");
        let about: Vec<_> = notes.iter().filter(|note| note.contains(named)).collect();
        assert_eq!(about.len(), 1, "{named}: {notes:?}");
        let interval = fs::read_to_string(host.root.path("proc/sys/vm/stat_interval"));
        assert_eq!(interval.unwrap().trim(), "1", "{named}");
        assert_eq!(
            host.root.exists("run/pinfold/state.json"),
            is_kept,
            "{named}"
        );

        // What is left is for the later version.
        let mut report = Report::new("hook", Verbosity::Quiet, true);
        let mut run = Run {
            root: host.root.clone(),
            report: &mut report,
            migrated_from: None,
        };
        let left = if is_kept {
            Exit::Partial
        } else {
            Exit::Success
        };
        assert_eq!(run.recover().unwrap(), left, "{named}");
        assert_eq!(
            host.root.exists("run/pinfold/state.json"),
            is_kept,
            "{named}"
        );
        run.discard().unwrap();
        assert!(!host.root.exists("run/pinfold/state.json"));
    }
}

/// A PCI function that the kernel can reset by two methods.
fn device(host: &MadeUpHost, address: &str) -> impl Fn() -> (String, String) + use<> {
    let folder = format!("sys/bus/pci/devices/{address}");
    for (file, text) in [
        ("class", "0x030000"),
        ("reset_method", "flr bus"),
        ("reset", ""),
    ] {
        host.file(&format!("{folder}/{file}"), text);
    }
    for folder in ["sys/class/block", "sys/class/net"] {
        fs::create_dir_all(host.root.path(folder)).unwrap();
    }
    let root = host.root.clone();
    move || {
        let read = |file: &str| fs::read_to_string(root.path(format!("{folder}/{file}"))).unwrap();
        (read("reset_method").trim().to_owned(), read("reset"))
    }
}

#[test]
fn reset_methods_come_back() {
    for (required, ends) in [("", true), (", required = true", false)] {
        let (host, _journal) = host(&format!(
            "{HALF}reset_pci = [{{ device = \"0b:00\", method = \"bus\"{required} }}]\n"
        ));
        host.conf(100, "cores: 2");
        let device = device(&host, "0000:0b:00.0");
        // The child, which would reset it, is not there in a test: the reset fails.
        let (ended, notes) = phase(&host, 100, "pre-start");
        assert_eq!(ended.is_ok(), ends, "{ended:?} {notes:?}");
        let named = notes
            .iter()
            .any(|note| note.contains("the settings do not require it"));
        assert_eq!(named, ends, "{notes:?}");
        assert_eq!(device().0, "flr bus");
        assert_eq!(host.root.exists("run/pinfold/state.json"), ends);
    }
}

#[test]
fn the_reset_method_of_a_hook_that_was_killed_comes_back() {
    let (host, _journal) = host(HALF);
    host.vm(100, &[6, 7]);
    host.reserve(100, Phase::Unfenced, HALF);
    let device = device(&host, "0000:0b:00.0");
    let mut store: Store<Reservation> = Store::open(&host.root, Duration::from_secs(1)).unwrap();
    let knob = Knob::PciResetMethod("0000:0b:00.0".into());
    let object =
        pinfold_core::Setting::new(knob.clone(), "", knob.read(&host.root).unwrap().unwrap());
    let plan = store.baseline.plan(vec![object], |_, _| Value::text("bus"));
    store.carry_out(plan, |_| ()).unwrap();
    drop(store);
    assert_eq!(device().0, "bus");
    fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
    fs::remove_dir_all(host.root.path("proc/100")).unwrap();
    let (ended, notes) = phase(&host, 100, "post-stop");
    assert_eq!((ended, notes), (Ok(Exit::Success), Vec::new()));
    assert_eq!(device().0, "flr bus");
    assert!(!host.root.exists("run/pinfold/state.json"));
}

/// A hook that was killed after it had released everything, and before it reset the devices: whoever
/// comes next does, once.
#[test]
fn a_reset_after_the_stop_survives_a_killed_hook() {
    const WHAT: &str = "the settings do not require it";
    let settings = format!(
        "{HALF}reset_pci = [{{ device = \"0b:00\", method = \"bus\", when = \"after\" }}]\n"
    );
    for next in ["recover", "post-stop", "pre-start"] {
        let (host, _journal) = host(&settings);
        host.vm(100, &[6, 7]);
        host.reserve(100, Phase::Isolated, &settings);
        let _device = device(&host, "0000:0b:00.0");
        fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
        fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        let mut report = Report::new("hook", Verbosity::Quiet, false);
        let mut run = Run {
            root: host.root.clone(),
            report: &mut report,
            migrated_from: None,
        };
        let mut store: Store<Reservation> =
            Store::open(&host.root, Duration::from_secs(1)).unwrap();
        run.drop_dead(&mut store, None).unwrap();
        // Killed here.
        drop(store);
        let resets = |notes: &[String]| notes.iter().filter(|note| note.contains(WHAT)).count();
        // The child, which would reset it, is not there in a test: the reset fails.
        let notes = if next == "recover" {
            run.recover().unwrap();
            report.notes().to_vec()
        } else {
            phase(&host, 100, next).1
        };
        assert_eq!(resets(&notes), 1, "{next}: {notes:?}");
        if next == "pre-start" {
            continue;
        }
        assert!(!host.root.exists("run/pinfold/state.json"), "{next}");
        let (_, notes) = phase(&host, 100, "post-stop");
        assert_eq!(resets(&notes), 0, "{next}: {notes:?}");
    }
}

#[test]
fn a_fenced_vm_is_left_alone_by_pre_start() {
    let (host, _journal) = host(HALF);
    host.vm(100, &[6, 7]);
    host.reserve(100, Phase::Isolated, HALF);
    let before = host.snapshot();
    assert_eq!(
        phase(&host, 100, "pre-start"),
        (Ok(Exit::Success), Vec::new())
    );
    assert_eq!(host.snapshot(), before);
}

#[test]
fn a_backup_of_a_stopped_vm_touches_and_refuses_nothing() {
    for conf in [
        "cores: 2\nlock: backup",
        "cores: 2\ntemplate: 1\nlock: backup",
        "cores: 99\nlock: backup",
    ] {
        let (host, journal) = host(HALF);
        host.conf(100, conf);
        // Another VM has the CPUs.
        host.vm(101, &[6, 7]);
        host.reserve(101, Phase::Isolated, HALF);
        let before = host.snapshot();
        assert_eq!(
            phase(&host, 100, "pre-start"),
            (Ok(Exit::Success), Vec::new()),
            "{conf}"
        );
        assert_eq!(host.snapshot(), before, "{conf}");
        host.vm(100, &[0, 1]);
        host.conf(100, conf);
        let (ended, notes) = phase(&host, 100, "post-start");
        assert_eq!(ended, Ok(Exit::Success), "{conf}");
        let reported = messages(&journal);
        if conf.contains("template") {
            assert!(
                notes.is_empty() && reported.is_empty(),
                "{notes:?} {reported:?}"
            );
            assert!(reservation(&host, 100).is_none());
            continue;
        }
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(
            notes[0].starts_with("VM 100 runs without isolated CPUs: "),
            "{notes:?}"
        );
        assert!(
            reported[0].contains("PRIORITY=4 VMID=100 MESSAGE=VM 100 runs without"),
            "{reported:?}"
        );
        assert_eq!(reservation(&host, 100).unwrap().phase, Phase::Unfenced);
        // It stops: nothing comes back.
        fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
        fs::remove_dir_all(host.root.path("proc/100")).unwrap();
        // Slices of VM 101 cannot be set without systemd.
        let _ = phase(&host, 100, "post-stop");
        assert!(reservation(&host, 100).is_none());
    }
}

#[test]
fn a_vm_that_is_stopped_for_a_backup_comes_back() {
    let (host, journal) = host(HALF);
    host.vm(100, &[0, 1]);
    host.reserve(100, Phase::Isolated, HALF);
    host.conf(100, "cores: 2\nlock: backup");
    fs::remove_file(host.root.path("run/qemu-server/100.pid")).unwrap();
    fs::remove_dir_all(host.root.path("proc/100")).unwrap();
    // Either of them may come first.
    for _ in 0..2 {
        let mut report = Report::new("hook", Verbosity::Quiet, true);
        let mut run = Run {
            root: host.root.clone(),
            report: &mut report,
            migrated_from: None,
        };
        run.recover().unwrap();
        assert!(reservation(&host, 100).unwrap().comes_back());
        let _ = phase(&host, 100, "post-stop");
        assert!(reservation(&host, 100).unwrap().comes_back());
    }
    // While recover is at it, post-stop waits for it.
    let mut leaving = reservation(&host, 100).unwrap();
    (leaving.phase, leaving.backup) = (Phase::Leaving, Some(Backup::ComesBack));
    let mut store: Store<Reservation> = Store::open(&host.root, Duration::from_secs(1)).unwrap();
    store.reservations.insert(100, leaving);
    store.save().unwrap();
    drop(store);
    let _ = phase(&host, 100, "post-stop");
    assert!(reservation(&host, 100).unwrap().comes_back());
    // With that mark pre-start prepares, and refuses nothing.
    host.settings(
        100,
        "tidy_caches = false\nisolated = \"llc:7\"\npins = \"auto\"",
    );
    let (ended, notes) = phase(&host, 100, "pre-start");
    assert_eq!(ended, Ok(Exit::Success));
    assert!(
        notes
            .iter()
            .any(|note| note.starts_with("VM 100 starts without isolated CPUs: ")),
        "{notes:?}"
    );
    let reported = messages(&journal);
    assert_eq!(reported.len(), 3, "{reported:?}");
    assert!(
        reported[0].contains("PRIORITY=5 VMID=100 MESSAGE=VM 100 has ended; "),
        "{reported:?}"
    );
    // Without the lock it is a start like any other.
    host.conf(100, "cores: 2");
    assert!(phase(&host, 100, "pre-start").0.is_err());
}

#[test]
fn what_only_warns_stops_no_start_if_it_cannot_be_read() {
    let (host, _journal) = host(&HALF.replace("auto", "6,7"));
    host.conf(100, "cores: 2");
    let siblings = "sys/devices/system/cpu/cpu6/topology/thread_siblings_list";
    host.file(siblings, "damaged\n");
    let (ended, notes) = phase(&host, 100, "pre-start");
    assert_eq!(ended, Ok(Exit::Success), "{notes:?}");
    assert!(
        notes.iter().any(|note| note.contains(siblings)),
        "{notes:?}"
    );
}

#[test]
fn a_migrated_vm_is_looked_up_at_its_source() {
    let (host, _journal) = host(HALF);
    host.file("etc/pve/nodes/pve2/qemu-server/100.conf", "cores: 2");
    let refused = phase(&host, 100, "pre-start").0.unwrap_err();
    assert!(refused.contains("no such VM on this node"), "{refused}");
    assert_eq!(
        phase_from(&host, 100, "pre-start", Some("pve2")).0,
        Ok(Exit::Success)
    );
    assert_eq!(reservation(&host, 100).unwrap().phase, Phase::Starting);
    for (source, why) in [
        ("", "not the name of a node"),
        ("../x", "not the name of a node"),
        ("pve3", "no such VM"),
    ] {
        let refused = phase_from(&host, 100, "pre-start", Some(source))
            .0
            .unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
}

/// The journal's messages of a VM's end, by the phases that Proxmox VE calls.
fn end(host: &MadeUpHost, journal: &UnixDatagram, phases: &[&str]) -> Vec<String> {
    host.vm(100, &[6, 18]);
    host.reserve(
        100,
        Phase::Isolated,
        "layout = \"5900x\"\ngovernor = \"keep\"",
    );
    for phase in phases {
        if *phase == "post-stop" {
            for path in ["proc/100", "run/qemu-server", "sys/fs/cgroup/qemu.slice"] {
                let _ = fs::remove_dir_all(host.root.path(path));
            }
        }
        let report = Report::new("hook", Verbosity::Quiet, true);
        run(host.root.clone(), report, vmid(100), phase, None).unwrap();
    }
    let mut messages = messages(journal);
    messages.retain(|message| message.contains("from its start"));
    messages
}

#[test]
fn the_last_phase_reports_how_long_the_vcpus_waited() {
    let (host, journal) = host(HALF);
    host.file("proc/uptime", "100.42 1.0");
    // A guest that powers itself off has no pre-stop, and nothing is left to read.
    let whole = ["pre-stop", "post-stop"];
    assert_eq!(end(&host, &journal, &whole[1..]), [""; 0]);
    let own =
        |vcpu: u32, text: &str| host.file(&format!("proc/100/task/1000{vcpu}/schedstat"), text);
    own(0, "1500000000 20000000 7");
    own(1, "2000000000 1234000000 9");
    let line = "MESSAGE=VM 100, from its start to its pre-stop, 100 s: 2 vCPUs ran 3.500 s and waited \
                1.254 s for a CPU, vCPU 1 longest, 1.234 s; ";
    let reported = end(&host, &journal, &whole);
    assert_eq!(reported.len(), 1, "{reported:?}");
    assert!(reported[0].contains(line), "{reported:?}");
    // It is reported once, not for a later run without pre-stop.
    assert_eq!(end(&host, &journal, &whole[1..]), [""; 0]);
    assert!(crate::state::counters::all(&host.root).unwrap()[&100].reported);
}

#[test]
fn huge_pages_that_proxmox_ve_has_to_make_stop_no_start() {
    let (host, _journal) = host(HALF);
    let reported = |conf: &str| {
        host.conf(100, &format!("cores: 6\nmemory: 2048\n{conf}"));
        let (ended, notes) = phase(&host, 100, "pre-start");
        let is_reserved = reservation(&host, 100).is_some();
        let _ = fs::remove_file(host.root.path("run/pinfold/state.json"));
        (ended, notes.join("\n"), is_reserved)
    };
    let (ended, _, is_reserved) = reported("hugepages: 2\n");
    let why = "VM 100: Proxmox VE refuses to start: hugepages needs `numa: 1`";
    assert_eq!((ended, is_reserved), (Err(why.into()), false));
    host.file("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0");
    let (ended, notes, is_reserved) = reported("hugepages: 2\nnuma: 1\n");
    assert_eq!((ended, is_reserved), (Ok(Exit::Success), true));
    assert!(
        notes.contains("node 0: 1024 huge pages of 2M wanted, 0 free")
            && notes.contains("the start may fail for lack of huge pages"),
        "{notes}"
    );
}

#[test]
fn recover_removes_the_traces_of_dead_processes() {
    let (host, _journal) = host(HALF);
    let instances = host.root.path("sys/kernel/tracing/instances");
    // Process 1 lives; 4711 does not, and foo is not Pinfold's.
    for name in ["pinfold-1-42", "pinfold-4711-42", "foo"] {
        fs::create_dir_all(instances.join(name)).unwrap();
    }
    let mut report = Report::new("hook", Verbosity::Quiet, true);
    let mut run = Run {
        root: host.root.clone(),
        report: &mut report,
        migrated_from: None,
    };
    assert_eq!(run.recover().unwrap(), Exit::Success);
    let names = host.root.names("sys/kernel/tracing/instances").unwrap();
    assert_eq!(names, ["foo", "pinfold-1-42"]);
}

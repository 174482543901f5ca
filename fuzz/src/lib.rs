//! What the fuzz targets do with their input, as plain functions: libFuzzer calls them, and so does
//! tests/corpus.rs.
//!
//! Each hands the input to a parser as the programs do (bytes that are not UTF-8 become U+FFFD) and
//! panics if the result is not as promised. It returns whether the parser accepted it.

use std::alloc::System;

use cap::Cap;
use pinfold_core::state::State;
use pinfold_core::state::save::{self, Entry, Restorable};
use pinfold_core::sys::pci::PciSelector;
use pinfold_core::sys::{task, trace};
use pinfold_core::vm::qmp;
use pinfold_core::vm::{HostDevices, PciHolder, VmConf, parse_pci_claims, parse_pci_mapping};
use pinfold_core::{CpuSet, Host, Knob, MAX_CPU, knob};
use serde_json::{Value, json};

/// No parser needs more for any input. Of a process's memory this is only Rust's part:
/// libFuzzer's own, some tens of MiB that grow with its corpus, is allocated elsewhere and so does
/// not blur it.
pub const MEMORY: usize = 64 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY);

/// The tool that the saved files of the `saved` target are from.
const TOOL: &str = "pin-irqs";

/// A CPU list.
pub fn cpu_list(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let parsed = text.parse::<CpuSet>();
    // A kernel file may be empty, a list that a user typed may not; this is the only difference.
    assert_eq!(
        CpuSet::from_kernel_list(&text).is_ok(),
        parsed.is_ok() || text.trim().is_empty()
    );
    parsed.map(|cpus| check_cpus(&cpus)).is_ok()
}

/// A CPU mask.
pub fn cpu_mask(data: &[u8]) -> bool {
    CpuSet::from_mask(&String::from_utf8_lossy(data))
        .map(|cpus| check_cpus(&cpus))
        .is_ok()
}

/// A line of /proc/PID/stat; and the input as the name of a thread, which may be anything.
pub fn proc_stat(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let named = format!(
        "17 ({text}) S 2 0 0 0 -1 69238848 0 0 0 0 0 5 0 0 20 0 1 0 42{} 17 9 0 0\n",
        " 0".repeat(15)
    );
    let task = task::parse_stat(17, &named).unwrap();
    assert_eq!(
        (
            task.name.as_str(),
            task.id.tid,
            task.id.start,
            task.last_cpu
        ),
        (&*text, 17, 42, 9)
    );

    let Ok(task) = task::parse_stat(17, &text) else {
        return false;
    };
    // Found in another way: the name is what is between the outermost brackets.
    let (tid, rest) = text.split_once(" (").unwrap();
    let (name, fields) = rest.rsplit_once(") ").unwrap();
    assert_eq!(
        (task.id.pid, task.id.tid.to_string(), task.name.as_str()),
        (17, tid.parse::<i32>().unwrap().to_string(), name)
    );
    assert!(task.id.tid >= 0);
    assert_eq!(
        Ok(task.id.start),
        fields.split(' ').nth(19).unwrap().parse()
    );
    true
}

/// A record of the kernel's trace; and the input as the name of a thread, which may be anything that
/// is not longer than the kernel's names.
pub fn trace_record(data: &[u8]) -> bool {
    const NAME: usize = 15;
    let text = String::from_utf8_lossy(data);
    let name = String::from_utf8_lossy(&data[..data.len().min(NAME)]);
    let named = format!(
        "<...>-7 [006] d..2. 1.000002: sched_switch: prev_comm={name} prev_pid=7 prev_prio=120 prev_state=S ==> \
         next_comm=x next_pid=8 next_prio=120"
    );
    let record = trace::parse_record(&named).unwrap();
    let switch = trace::Event::Switch {
        ns: 1_000_002_000,
        from: trace::Thread {
            tid: 7,
            name: &name,
        },
        to: trace::Thread { tid: 8, name: "x" },
    };
    assert_eq!((record.cpu, record.event), (6, switch));

    let Some(record) = trace::parse_record(&text) else {
        return false;
    };
    assert!(record.cpu <= MAX_CPU);
    let at = |ns: u64| {
        format!(
            "x [{}] . {}.{:06}: ",
            record.cpu,
            ns / 1_000_000_000,
            ns / 1000 % 1_000_000
        )
    };
    let handled = |work, what| match work {
        trace::Work::Irq(irq) => format!("irq_handler_{what}: irq={irq} x"),
        trace::Work::Softirq(name) => format!("softirq_{what}: vec=0 [action={name}]"),
    };
    let rendered = match record.event {
        trace::Event::Switch { ns, from, to } => format!(
            "{}sched_switch: prev_comm={} prev_pid={} prev_prio=0 prev_state=S ==> next_comm={} next_pid={} next_prio=0",
            at(ns),
            from.name,
            from.tid,
            to.name,
            to.tid
        ),
        trace::Event::Began { ns, work } => at(ns) + &handled(work, "entry"),
        trace::Event::Ended { ns, work } => at(ns) + &handled(work, "exit"),
        trace::Event::Lost(None) => format!("CPU:{} [LOST EVENTS]", record.cpu),
        trace::Event::Lost(Some(count)) => format!("CPU:{} [LOST {count} EVENTS]", record.cpu),
    };
    assert_eq!(trace::parse_record(&rendered), Some(record), "{rendered}");
    true
}

/// VMID.conf, its hostpci entries too.
pub fn vm_conf(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let mut conf = VmConf::parse(&text);
    let is_clean = conf.passed_over.is_empty() && conf.contradictions().is_empty();
    assert!(conf.vcpus() >= 1 && conf.max_vcpus() >= 1 && conf.threads_per_core() >= 1);
    assert!(
        conf.hostpci.is_sorted_by(|a, b| a.index < b.index)
            && conf.hostpci.iter().all(|entry| entry.index < 16)
    );
    for entry in &conf.hostpci {
        match &entry.devices {
            HostDevices::Addresses(selectors) => check_selectors(selectors),
            HostDevices::Mapping(id) => assert!(!id.contains(['/', '.', '\n']) && id.len() >= 2),
            HostDevices::Refused(why) => {
                assert!(!why.contains('\n') && (conf.template || !is_clean))
            }
        }
    }
    // What follows the running VM's settings changes nothing but the warnings.
    let more = VmConf::parse(&format!("{text}\n[PENDING]\ncores: x\nhostpci0: x\n"));
    assert_eq!(without_warnings(more), without_warnings(conf.clone()));
    conf.hostpci
        .retain(|entry| !matches!(entry.devices, HostDevices::Refused(_)));
    let conf = without_warnings(conf);
    let rendered = render_conf(&conf);
    assert_eq!(VmConf::parse(&rendered), conf, "{rendered}");
    is_clean
}

fn without_warnings(mut conf: VmConf) -> VmConf {
    conf.passed_over.clear();
    conf
}

/// The cluster's PCI mappings: those named `gpu`, on node `pve1`.
pub fn pci_mapping(data: &[u8]) -> bool {
    let parse = |text: &str| parse_pci_mapping(text, "gpu", "pve1");
    let text = String::from_utf8_lossy(data);
    let devices = parse(&text);
    assert_eq!(
        parse(&format!("{text}\nother\n\tmap node=pve1,path=09:00\n")),
        devices
    );
    let Some(devices) = devices else { return false };
    for selectors in &devices {
        check_selectors(selectors);
    }
    let map = |device: &Vec<PciSelector>| format!("\tmap node=pve1,path={}\n", joined(device));
    let rendered: String = devices.iter().map(map).collect();
    assert_eq!(parse(&format!("gpu\n{rendered}")).as_ref(), Some(&devices));
    !devices.is_empty()
}

/// The file of reserved PCI devices.
pub fn pci_claims(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let held = parse_pci_claims(&text);
    assert!(held.len() <= text.lines().count());
    let mut rendered = String::new();
    for reservation in &held {
        assert!((100..=999_999_999).contains(&reservation.vmid.get()));
        let holder = match reservation.holder {
            PciHolder::Pid(pid) => format!("pid:{pid}"),
            PciHolder::Until(time) => format!("time:{time}"),
        };
        rendered += &format!("{} {} {holder}\n", reservation.address, reservation.vmid);
    }
    assert_eq!(parse_pci_claims(&rendered), held);
    !held.is_empty()
}

/// What QEMU's monitor sends in a whole conversation.
pub fn qmp_reply(data: &[u8]) -> bool {
    let Ok(facts) = qmp::ThreadRoles::parse(&String::from_utf8_lossy(data)) else {
        return false;
    };
    // The numbers become a set, as large as the largest of them.
    assert!(facts.vcpus.values().all(|number| *number <= MAX_CPU));
    let cpus = facts
        .vcpus
        .iter()
        .map(|(tid, number)| json!({"thread-id": tid, "cpu-index": number}));
    let iothreads = facts
        .iothreads
        .iter()
        .map(|(tid, id)| json!({"thread-id": tid, "id": id}));
    let replies = [
        json!({}),
        cpus.collect(),
        iothreads.collect(),
        json!({"status": facts.status}),
    ];
    let rendered: String = replies
        .into_iter()
        .map(|reply| format!("{}\n", json!({"return": reply})))
        .collect();
    assert_eq!(qmp::ThreadRoles::parse(&rendered).as_ref(), Ok(&facts));
    true
}

/// A settings file of hook's, on a host with CPUs 0 to 23.
pub fn settings(data: &[u8]) -> bool {
    let root = Host::new(concat!(env!("CARGO_MANIFEST_DIR"), "/host"));
    let Ok(resolved) = hook::check_settings(&root, &String::from_utf8_lossy(data), "fuzz") else {
        return false;
    };
    let resolved: Value = serde_json::from_str(&resolved).unwrap();
    let cpus = |value: &Value| CpuSet::from_kernel_list(value.as_str().unwrap()).unwrap();
    let isolated = cpus(&resolved["isolated"]);
    // Nothing but CPUs for a VM that must have them.
    let required = resolved["required"] != false;
    assert!(!isolated.is_empty() || !required);
    check_cpus(&isolated);
    let pins: Vec<CpuSet> = resolved["pins"]
        .as_array()
        .unwrap()
        .iter()
        .map(cpus)
        .collect();
    assert!(
        pins.is_empty() == isolated.is_empty()
            && pins
                .iter()
                .all(|pin| !pin.is_empty() && pin.is_subset(&isolated))
    );
    assert!(resolved["min_housekeeping"].as_u64().unwrap() >= 1);
    // Beyond some bound a deadline is more than the clock can hold.
    assert!(
        resolved["deadlines"]
            .as_object()
            .unwrap()
            .values()
            .all(|seconds| seconds.as_u64().unwrap() <= 3600)
    );
    // They live on in the state, and have to come back from it.
    let reservation = json!({
        "phase": "isolated", "isolation": "hotplug", "settings": resolved,
        "qemu": {"pid": 1, "tid": 1, "start": 1}, "starter": null, "idle_vm_stopped": false,
    });
    let state = json!({"version": 1, "reservations": {"100": reservation}, "baseline": []});
    let kept: Value =
        serde_json::from_str(&hook::check_state(&state.to_string()).unwrap()).unwrap();
    assert_eq!(kept, state);
    true
}

/// hook's state file.
pub fn state(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let Ok(written) = hook::check_state(&text) else {
        return false;
    };
    assert_eq!(hook::check_state(&written).unwrap(), written);
    // Whatever is kept per VM, the baseline is read alike.
    let baseline = State::<Value>::parse(&text).unwrap().baseline;
    assert_eq!(State::<Value>::parse(&written).unwrap().baseline, baseline);
    for (knob, _, before) in baseline.knobs() {
        check_knob(knob);
        check_value(knob, before);
        for value in baseline.values_set(knob) {
            check_value(knob, value);
        }
    }
    true
}

/// What `--save` of pin-irqs writes.
pub fn saved(data: &[u8]) -> bool {
    let Ok(Restorable { entries, .. }) = save::parse(&String::from_utf8_lossy(data), TOOL) else {
        return false;
    };
    for Entry {
        knob, before, set, ..
    } in &entries
    {
        check_knob(knob);
        check_value(knob, before);
        check_value(knob, set);
    }
    let written = save::to_text(TOOL, entries.clone()).unwrap();
    let newer = None;
    assert_eq!(
        save::parse(&written, TOOL),
        Ok(Restorable { entries, newer })
    );
    assert!(save::parse(&written, "governor").is_err());
    true
}

fn check_cpus(cpus: &CpuSet) {
    assert!(cpus.last().is_none_or(|last| last <= MAX_CPU));
    assert_eq!(cpus.is_empty(), cpus.first().is_none());
    assert_eq!(cpus.iter().count(), cpus.len());
    let (list, mask) = (cpus.to_string(), cpus.to_mask());
    assert_eq!(CpuSet::from_kernel_list(&list).as_ref(), Ok(cpus), "{list}");
    assert_eq!(CpuSet::from_mask(&mask).as_ref(), Ok(cpus), "{mask}");
    // Canonical: one text per set.
    assert_eq!(CpuSet::from_mask(&mask).unwrap().to_string(), list);
}

fn check_selectors(selectors: &[PciSelector]) {
    assert!(!selectors.is_empty());
    for selector in selectors {
        assert_eq!(
            &selector.to_string().parse::<PciSelector>().unwrap(),
            selector
        );
        assert!(selector.matches(&selector.first()));
        assert!(selector.device < 32 && selector.function.is_none_or(|function| function < 8));
    }
}

/// A knob's name becomes a part of a path, which must not lead out of the knob's folder.
fn check_knob(knob: &Knob) {
    match knob {
        Knob::Governor(name)
        | Knob::EnergyPreference(name)
        | Knob::UnitCpus(name)
        | Knob::Delegation(name)
        | Knob::PciFunction(name)
        | Knob::PciDriver(name)
        | Knob::PciResetMethod(name)
        | Knob::PciReset(name) => {
            assert!(!name.contains('/'), "{knob:?}");
            check_path(name);
        }
        Knob::QueueCpus(queue) => {
            let (interface, queue) = queue.split_once('/').expect("two names");
            assert!(!queue.contains('/'), "{knob:?}");
            check_path(interface);
            check_path(queue);
        }
        // The root cgroup.
        Knob::ChildCpusets(path) if path.is_empty() => {}
        Knob::CgroupCpus(path)
        | Knob::ContainerCpus(path)
        | Knob::Cgroup(path)
        | Knob::ThreadedCgroup(path)
        | Knob::ChildCpusets(path)
        | Knob::ExclusiveCpus(path)
        | Knob::Partition(path)
        | Knob::Sysctl(path)
        | Knob::Trigger(path) => check_path(path),
        Knob::Irq(_)
        | Knob::DefaultIrq
        | Knob::Workqueues
        | Knob::Kthread(_)
        | Knob::Thread(_)
        | Knob::ThreadPolicy(_)
        | Knob::CpuOnline(_)
        | Knob::WakeupLatency(_)
        | Knob::HaltPolling
        | Knob::NodeCompaction(_)
        | Knob::UnitOverrides
        | Knob::CgroupOf(_)
        | Knob::CgroupOfThread(_)
        | Knob::ThreadTimer(_)
        | Knob::Trace(_) => {}
    }
}

/// So does the value of some.
fn check_value(knob: &Knob, value: &knob::Value) {
    let value = &*value.to_string();
    match knob {
        Knob::PciDriver(_) => {
            assert!(!value.contains('/'), "{knob:?} {value:?}");
            check_path(value);
        }
        Knob::CgroupOf(_) | Knob::CgroupOfThread(_) if value.trim_start_matches('/').is_empty() => {
            assert!(!value.is_empty(), "{knob:?}")
        }
        Knob::CgroupOf(_) | Knob::CgroupOfThread(_) => check_path(value.trim_start_matches('/')),
        _ => {}
    }
}

fn check_path(path: &str) {
    use std::path::{Component, Path};
    let inside = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    assert!(
        inside && !path.is_empty() && !path.contains('\0'),
        "{path:?} leaves its folder"
    );
}

fn joined(selectors: &[PciSelector]) -> String {
    selectors
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(";")
}

fn render_conf(conf: &VmConf) -> String {
    let mut text = format!(
        "template: {}\nnuma: {}\n",
        u8::from(conf.template),
        u8::from(conf.numa)
    );
    let mut line = |key: &str, value: Option<String>| {
        text.extend(value.iter().map(|value| format!("{key}: {value}\n")));
    };
    // Proxmox VE drops quotes around these.
    let quoted = |value: &Option<String>| value.as_ref().map(|value| format!("\"{value}\""));
    line("name", conf.name.clone());
    line("affinity", conf.affinity_text.clone());
    line("lock", quoted(&conf.lock));
    line("pinning", quoted(&conf.pinning));
    line("hugepages", quoted(&conf.hugepages));
    line("hookscript", conf.hookscript.clone());
    line("args", conf.args.clone());
    line("machine", conf.machine.clone());
    line("hotplug", conf.hotplug.clone());
    line("cpu", conf.cpu.clone());
    line("tpmstate0", conf.tpm.then(|| "local:x".to_owned()));
    line("virtiofs0", conf.virtiofs.then(|| "share".to_owned()));
    line("memory", conf.memory.map(|size| size.to_string()));
    for (key, count) in [
        ("sockets", conf.sockets),
        ("cores", conf.cores),
        ("vcpus", conf.vcpus),
    ] {
        line(key, count.map(|count| count.to_string()));
    }
    for node in &conf.numa_nodes {
        let set = |key: &str, numbers: &CpuSet| {
            if numbers.is_empty() {
                format!(",{key}=99999")
            } else {
                format!(",{key}={}", numbers.to_string().replace(',', ";"))
            }
        };
        let mut value = set("cpus", &node.vcpus);
        value.extend(node.memory.map(|size| format!(",memory={size}")));
        value.extend(node.host_nodes.iter().map(|nodes| set("hostnodes", nodes)));
        value.extend(node.policy.iter().map(|policy| format!(",policy={policy}")));
        line(&format!("numa{}", node.index), Some(value));
    }
    for entry in &conf.hostpci {
        let mut value = match &entry.devices {
            HostDevices::Addresses(selectors) => format!("host={}", joined(selectors)),
            HostDevices::Mapping(id) => format!("mapping={id}"),
            HostDevices::Refused(why) => unreachable!("{why}"),
        };
        value.extend(entry.mdev.iter().map(|mdev| format!(",mdev={mdev}")));
        value += if entry.keep_driver {
            ",driver=keep"
        } else {
            ""
        };
        value += if entry.pcie { ",pcie=1" } else { "" };
        line(&format!("hostpci{}", entry.index), Some(value));
    }
    text
}

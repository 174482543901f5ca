//! `hook jitter --compare` makes a fence for itself: inside is nothing that could be elsewhere, and
//! the host comes back. No time is asserted: the lab's CPUs are run in turn.

use std::time::Duration;

use pinfold_lab::{Host, VmSpec};
use serde_json::Value;

use crate::stories;
use crate::support::{assert_restored, expect, install_hook};

stories![with partitions:
    a_comparison_leaves_nothing,
    a_signal_ends_it,
];

const CPUS: &str = "6,18";

/// Waits until the loops are inside.
const INSIDE: &str = r#"for i in $(seq 600); do
    grep -Eq '"phase": ?"isolated"' /run/pinfold/state.json 2> /dev/null && exit 0
    sleep 0.1
done
exit 1"#;

fn compare(seconds: u32) -> String {
    format!("hook jitter --cpus {CPUS} --compare --seconds {seconds}")
}

/// Starts a comparison that measures for so long, and returns when it is inside its fence.
fn inside(host: &Host, seconds: u32, more: &[&str]) -> pinfold_lab::Job {
    let line = compare(seconds);
    let mut words: Vec<&str> = line.split(' ').collect();
    words.extend(more);
    let job = host.spawn(&words, Duration::from_secs(300)).unwrap();
    expect(host, INSIDE, 0);
    job
}

fn state_is_gone(host: &Host) {
    expect(host, "test ! -e /run/pinfold/state.json", 0);
}

fn a_comparison_leaves_nothing(host: &mut Host) {
    install_hook(host);
    // The first start makes qemu.slice, which stays.
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    let (text, log) = expect(
        host,
        &format!("{} --fifo --svg /tmp/jitter.svg", compare(2)),
        0,
    );
    assert!(text.contains("\nlongest gap "), "{text}");
    assert!(log.contains("isolating CPU 6,18"), "{log}");
    expect(
        host,
        "grep -q '</svg>' /tmp/jitter.svg && rm /tmp/jitter.svg",
        0,
    );
    assert_restored(host, &before);
    state_is_gone(host);

    let job = inside(host, 15, &["--json"]);
    let isolated = host.ok("cat /sys/fs/cgroup/cpuset.cpus.isolated").unwrap();
    assert_eq!(isolated.trim(), CPUS);
    let mut strays = host.strays_of(CPUS, &[]).unwrap();
    strays.threads.retain(|it| !it.comm.starts_with("loop "));
    // If no CPU goes offline, an IRQ without interrupt remapping moves with its next interrupt.
    strays.moving.clear();
    assert!(strays.is_clean(), "{strays:#?}");
    let (status, _) = expect(host, "hook status", 0);
    assert!(
        status.contains("\nhook jitter has CPU 6,18, by partition\n"),
        "{status}"
    );
    // A VM that wants these CPUs waits, and knows for what.
    host.ok("mkdir -p /etc/pinfold").unwrap();
    let settings = format!("isolated = \"{CPUS}\"\npins = \"{CPUS}\"\nmethod = \"partition\"\n");
    host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644)
        .unwrap();
    let spec = VmSpec {
        cores: 2,
        hookscript: Some("local:snippets/hook".into()),
        ..VmSpec::new(100)
    };
    let log = host.start_vm(&spec).unwrap();
    assert!(
        log.contains("waiting for the lock, which process") && log.contains("(hook jitter "),
        "{log}"
    );
    assert!(log.contains("isolating CPU 6,18 for VM 100"), "{log}");
    let ended = job.wait().unwrap();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["fenced"]["strays"], 0, "{json}");
    assert!(json["open"]["strays"].as_u64() > Some(0), "{json}");
    for (_, why) in [
        expect(host, &compare(1), 1),
        expect(host, "hook jitter 100 --compare", 1),
    ] {
        assert!(why.contains("VM 100") && why.contains("runs"), "{why}");
    }
    host.stop_vm(100).unwrap();
    let (_, why) = expect(host, "hook jitter --cpus 12 --compare", 1);
    assert!(why.contains("CPU 0,12 is the core of CPU 0"), "{why}");
    assert_restored(host, &before);
    state_is_gone(host);
}

fn a_signal_ends_it(host: &mut Host) {
    host.start_vm(&VmSpec::new(101)).unwrap();
    let before = host.snapshot().unwrap();
    for signal in ["INT", "TERM", "HUP"] {
        let job = inside(host, 8, &[]);
        host.ok(&format!("pkill -{signal} -x hook")).unwrap();
        let ended = job.wait().unwrap();
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let why = format!("interrupted by SIG{signal}");
        assert!(ended.stderr.contains(&why), "{}", ended.stderr);
        assert_restored(host, &before);
        state_is_gone(host);
    }
}

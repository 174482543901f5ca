//! The same promises under attack: hook killed at each system call that changes something, each of
//! these calls answered with an error, walks of three VMs at random, the same cycle over and over.
//!
//! `PINFOLD_TORTURE=full` (`make torture`) tries everything, which takes hours,
//! `PINFOLD_TORTURE=101-200` a part of it; without it each story takes a sample.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use pinfold_lab::{Host, HostState, Strays, VmSpec};

use crate::stories;
use crate::support::{
    Call, assert_restored, expect, install_hook, kill_at, strays, strays_of, two_small_vms, vm,
    with_network_queues,
};

stories!(only trixie:
    killed_in_post_start,
    killed_in_post_start_by_partition,
    killed_in_post_start_of_one_of_two,
    killed_with_its_vm_and_started_again,
    killed_in_post_stop,
    killed_in_post_stop_by_partition,
    killed_in_post_stop_of_one_of_two,
    each_call_fails,
    each_call_fails_by_partition,
    walk,
    walk_by_partition,
    cycles,
    twenty_at_once,
    twenty_at_once_by_partition,
);

/// The system calls that hook changes something with.
const CALLS: &str = "write,sendto,sendmsg,sched_setaffinity,rename,mkdir,rmdir,unlink";

/// What of `all` is tried, as numbers from 0: `sample` of them at even distances, the first and the
/// last among them, or what `PINFOLD_TORTURE` asks for: `full`, a number instead of `sample`, or those
/// from one to another, counted from 1.
fn extent(sample: usize, all: usize) -> Vec<usize> {
    let asked = std::env::var("PINFOLD_TORTURE").ok();
    let number = |text: &str| -> usize {
        text.parse().unwrap_or_else(|_| {
            panic!("PINFOLD_TORTURE={text}: neither full nor a number, nor 1-100")
        })
    };
    let count = match asked.as_deref().map(|text| (text, text.split_once('-'))) {
        Some((_, Some((first, last)))) => {
            return (number(first).max(1) - 1..number(last).min(all)).collect();
        }
        Some(("full", _)) => all,
        Some((count, _)) => number(count).max(2),
        None => sample,
    };
    if count >= all {
        (0..all).collect()
    } else {
        (0..count).map(|n| n * (all - 1) / (count - 1)).collect()
    }
}

/// A number from the environment.
fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: no number"))
    })
}

/// The calls of a command that change something, in their order.
fn calls(host: &Host, command: &str) -> Vec<Call> {
    expect(
        host,
        &format!("strace -f -y --seccomp-bpf -o /tmp/calls -e trace={CALLS} {command} > /dev/null"),
        0,
    );
    // Thread, call, and the file if there is one.
    let trace = host
        .ok("sed -nE 's/^([0-9]+) +([a-z_]+)\\(([0-9]+<([^>]*)>)?.*/\\1|\\2|\\4/p' /tmp/calls")
        .unwrap();
    let lines: Vec<Vec<&str>> = trace
        .lines()
        .map(|line| line.splitn(3, '|').collect())
        .collect();
    let first = lines.first().map_or("", |line| line[0]);
    let mut counts = BTreeMap::new();
    let call = |line: &Vec<&str>| {
        let count = counts
            .entry((line[0].to_owned(), line[1].to_owned()))
            .or_insert(0);
        *count += 1;
        let file = (line[0] != first).then(|| line[2].to_owned());
        Call {
            name: line[1].to_owned(),
            nth: *count,
            file,
        }
    };
    lines.iter().map(call).collect()
}

/// Those of them that are tried, see [`extent`].
fn sample<T: Clone>(all: &[T], count: usize) -> Vec<T> {
    extent(count, all.len())
        .into_iter()
        .map(|n| all[n].clone())
        .collect()
}

/// All of them with their numbers; prints its progress now and then, since all of them take
/// long.
fn counted<T>(all: &[T]) -> impl Iterator<Item = (usize, &T)> {
    all.iter().enumerate().inspect(|(n, _)| {
        if *n > 0 && n % 25 == 0 {
            println!("{n} of {}", all.len());
        }
    })
}

/// VM 100 with a core of its own: the calls are the same as for a CCD's, and emulated CPUs go
/// offline slowly.
fn small_vm(host: &Host, method: &str) -> VmSpec {
    with_network_queues(host);
    host.ok("mkdir -p /etc/pinfold").unwrap();
    let settings = format!(
        "isolated = \"6,18\"\npins = \"6,18\"\nmethod = \"{method}\"\n\
         max_latency_us = 20\nhalt_poll_ns = 100000\nvcpu_policy = \"fifo:1\"\n[deadlines]\nqemu_exit = 0\n"
    );
    host.put("/etc/pinfold/100.toml", settings.as_bytes(), 0o644)
        .unwrap();
    VmSpec {
        cores: 2,
        ..VmSpec::new(100)
    }
}

/// A host with a VM that hook does not manage and VM 100, which runs, was fenced once and is not
/// now.
fn with_vm_100(host: &Host, method: &str) -> HostState {
    host.start_vm(&VmSpec::new(101)).unwrap();
    let spec = small_vm(host, method);
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    // A partition needs a scope that pre-start has seen to.
    expect(host, "hook 100 pre-start -q", 0);
    host.start_vm(&spec).unwrap();
    // The scope that systemd is asked for on the way back has another description than PVE's.
    expect(host, "hook 100 post-start -q && hook 100 post-stop -q", 0);
    host.snapshot().unwrap()
}

/// What is wrong, for a list of all that is; printed at once too, since a run of hours may be ended.
fn fault(lost: &mut String, what: &str, difference: &str) {
    if !difference.is_empty() {
        println!("lost: {what}");
        // Writing to a String cannot fail.
        let _ = writeln!(lost, "{what}:\n{difference}");
    }
}

/// After a kill at any point of post-start: post-stop restores, or recover ends what was begun.
fn killed_in_post_start(host: &mut Host) {
    killed_in_post_start_by(host, "hotplug", 22);
}

fn killed_in_post_start_by_partition(host: &mut Host) {
    killed_in_post_start_by(host, "partition", 8);
}

fn killed_in_post_start_by(host: &Host, method: &str, count: usize) {
    let before = with_vm_100(host, method);
    let all = calls(host, "hook 100 post-start");
    expect(host, "hook 100 post-stop -q", 0);
    let tried = sample(&all, count);
    let mut lost = String::new();
    for (n, call) in counted(&tried) {
        assert!(
            kill_at(host, call, "hook 100 post-start"),
            "{call:?} was reached"
        );
        if n % 2 == 1 {
            expect(host, "hook recover -q", 0);
            let half = host.sh("hook status").unwrap();
            let strays = if half.code == Some(0) {
                String::new()
            } else {
                half.stdout
            };
            fault(
                &mut lost,
                &format!("killed at {call:?}, recovered"),
                &strays,
            );
        }
        expect(host, "hook 100 post-stop -q", 0);
        fault(
            &mut lost,
            &format!("killed at {call:?}"),
            &before.not_restored(&host.snapshot().unwrap()),
        );
    }
    println!(
        "killed in post-start by {method}: {} of {} calls tried",
        tried.len(),
        all.len()
    );
    assert!(lost.is_empty(), "{lost}");
}

/// hook is killed with a CPU offline, then the VM: its next start has its CPUs, without recover.
fn killed_with_its_vm_and_started_again(host: &mut Host) {
    let before = with_vm_100(host, "hotplug");
    let second = Call {
        file: Some("/sys/devices/system/cpu/cpu18/online".to_owned()),
        ..Call::nth("write", 1)
    };
    assert!(kill_at(host, &second, "hook 100 post-start"));
    let online = || host.ok("cat /sys/devices/system/cpu/online").unwrap();
    assert_eq!(online().trim(), "0-5,7-23");
    host.kill_vm(100).unwrap();
    host.cleanup_vm(100, false).unwrap();
    expect(
        host,
        "hook 100 pre-start -q && qm start 100 && hook 100 post-start -q",
        0,
    );
    let strays = strays_of(host, "6,18", &[(100, "6,18")]);
    assert!(strays.is_clean(), "{strays:#?}");
    assert_eq!(online().trim(), "0-23");
    expect(host, "hook 100 post-stop -q", 0);
    assert_restored(host, &before);
}

/// After a kill at any point of post-stop, of a VM that is gone: recover restores, or post-stop
/// once more.
fn killed_in_post_stop(host: &mut Host) {
    killed_in_post_stop_by(host, "hotplug", 6);
}

fn killed_in_post_stop_by_partition(host: &mut Host) {
    killed_in_post_stop_by(host, "partition", 4);
}

fn killed_in_post_stop_by(host: &Host, method: &str, count: usize) {
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let spec = VmSpec {
        hookscript: vm().hookscript,
        ..small_vm(host, method)
    };
    let before = host.snapshot().unwrap();
    let fenced_and_killed = |host: &Host| {
        host.start_vm(&spec).unwrap();
        host.kill_vm(100).unwrap();
        host.cleanup_vm(100, false).unwrap();
    };
    fenced_and_killed(host);
    let all = calls(host, "hook 100 post-stop");
    let tried = sample(&all, count);
    let (mut lost, mut missed) = (String::new(), Vec::new());
    for (n, call) in counted(&tried) {
        fenced_and_killed(host);
        if !kill_at(host, call, "hook 100 post-stop") {
            missed.push(call);
        }
        expect(
            host,
            if n % 2 == 0 {
                "hook recover -q"
            } else {
                "hook 100 post-stop -q"
            },
            0,
        );
        fault(
            &mut lost,
            &format!("killed at {call:?}"),
            &before.not_restored(&host.snapshot().unwrap()),
        );
    }
    println!(
        "killed in post-stop by {method}, the VM gone: {} of {} calls tried",
        tried.len() - missed.len(),
        all.len()
    );
    // The kernel moves some by itself, not the same ones each time: kernel threads of a partition,
    // IRQs as CPUs come. How often hook has to differs, so that such a call may not come again.
    let differing = if method == "partition" {
        "sched_setaffinity"
    } else {
        "write"
    };
    let are_few =
        missed.len() <= 1 + tried.len() / 12 && missed.iter().all(|call| call.name == differing);
    assert!(lost.is_empty() && are_few, "{missed:?} not reached; {lost}");
}

/// What may run on VM 101's CPU and is not its own, in words.
fn strays_of_101(host: &Host) -> String {
    in_words(&strays(host, "18", &[101]))
}

/// As [`strays_of_101`], right after a kill.
fn strays_after_kill(host: &Host) -> String {
    in_words(&strays(host, "18", &[101]).but_spread_anew())
}

fn in_words(strays: &Strays) -> String {
    if strays.is_clean() {
        String::new()
    } else {
        format!("strays: {strays:#?}")
    }
}

/// Wherever one VM's post-start is killed, another's CPUs stay its own, at once and when either is
/// fenced again or stops.
fn killed_in_post_start_of_one_of_two(host: &mut Host) {
    let before = two_small_vms(host);
    expect(host, "hook 101 post-start -q", 0);
    let all = calls(host, "hook 100 post-start");
    expect(host, "hook 100 post-stop -q", 0);
    let tried = sample(&all, 10);
    let mut lost = String::new();
    for (n, call) in counted(&tried) {
        assert!(
            kill_at(host, call, "hook 100 post-start"),
            "{call:?} was reached"
        );
        fault(
            &mut lost,
            &format!("killed at {call:?}"),
            &strays_after_kill(host),
        );
        if n % 2 == 0 {
            // The other starts again, onto CPUs that the killed one's threads may have.
            expect(host, "hook 101 post-stop -q && hook 101 post-start -q", 0);
            fault(
                &mut lost,
                &format!("killed at {call:?}, 101 anew"),
                &strays_of_101(host),
            );
        } else {
            expect(host, "hook 100 post-start -q", 0);
            fault(
                &mut lost,
                &format!("killed at {call:?}, fenced anew"),
                &in_words(&strays_of(host, "17-18", &[(100, "17"), (101, "18")])),
            );
        }
        expect(host, "hook 100 post-stop -q", 0);
        fault(
            &mut lost,
            &format!("killed at {call:?}, stopped"),
            &strays_of_101(host),
        );
    }
    expect(host, "hook 101 post-stop -q", 0);
    fault(
        &mut lost,
        "in the end",
        &before.not_restored(&host.snapshot().unwrap()),
    );
    println!(
        "killed in post-start, another VM fenced: {} of {} calls tried",
        tried.len(),
        all.len()
    );
    assert!(lost.is_empty(), "{lost}");
}

/// The same for post-stop, its QEMU alive.
fn killed_in_post_stop_of_one_of_two(host: &mut Host) {
    let before = two_small_vms(host);
    expect(host, "hook 101 post-start -q && hook 100 post-start -q", 0);
    let all = calls(host, "hook 100 post-stop");
    let tried = sample(&all, 10);
    let mut lost = String::new();
    for (_, call) in counted(&tried) {
        expect(host, "hook 100 post-start -q", 0);
        assert!(
            kill_at(host, call, "hook 100 post-stop"),
            "{call:?} was reached"
        );
        fault(
            &mut lost,
            &format!("killed at {call:?}"),
            &strays_after_kill(host),
        );
        expect(host, "hook 100 post-stop -q", 0);
        fault(
            &mut lost,
            &format!("killed at {call:?}, once more"),
            &strays_of_101(host),
        );
        expect(
            host,
            "test -d /sys/fs/cgroup/qemu.slice/100.scope && test ! -d /sys/fs/cgroup/qemu-decoupled.slice/100.scope",
            0,
        );
    }
    expect(host, "hook 101 post-stop -q", 0);
    fault(
        &mut lost,
        "in the end",
        &before.not_restored(&host.snapshot().unwrap()),
    );
    println!(
        "killed in post-stop, the VM alive: {} of {} calls tried",
        tried.len(),
        all.len()
    );
    assert!(lost.is_empty(), "{lost}");
}

/// If any call of post-start fails, hook reports it. It takes back what it did if the fence depends on
/// it, keeps the fence otherwise, and succeeds only if the VM is fenced; post-stop restores.
fn each_call_fails(host: &mut Host) {
    each_call_fails_by(host, "hotplug", 16);
}

fn each_call_fails_by_partition(host: &mut Host) {
    each_call_fails_by(host, "partition", 11);
}

fn each_call_fails_by(host: &Host, method: &str, count: usize) {
    const ERRORS: [(&str, &str); 5] = [
        ("EIO", "Input/output error"),
        ("EINVAL", "Invalid argument"),
        ("EPERM", "Operation not permitted"),
        ("ENOSPC", "No space left on device"),
        ("ENOENT", "No such file or directory"),
    ];
    let before = with_vm_100(host, method);
    let all = calls(host, "hook 100 post-start");
    expect(host, "hook 100 post-stop -q", 0);
    let each: Vec<(Call, (&str, &str))> = all
        .iter()
        .flat_map(|call| ERRORS.iter().map(move |error| (call.clone(), *error)))
        .collect();
    // At even distances that are not a multiple of five, every error comes.
    let tried = sample(&each, count);
    let (mut lost, mut log, mut kept) = (String::new(), 0, 0);
    for (_, (call, (error, words))) in counted(&tried) {
        let what = format!("{call:?} answers {error}");
        let output = host
            .sh(&format!(
                "{} > /dev/null",
                call.failing(error, "hook 100 post-start")
            ))
            .unwrap();
        let fenced = || strays_of(host, "6,18", &[(100, "6,18")]);
        match output.code {
            Some(1) => {
                log += usize::from(output.stderr.contains("all changes have been undone"));
                assert!(output.stderr.contains(words), "{what}: {output:?}");
            }
            // The fence was kept: its CPUs are online, the vCPUs on them. What failed is named, and
            // the next post-start sets it.
            Some(64) => {
                kept += 1;
                assert!(
                    output.stderr.contains(words)
                        && output.stderr.contains("VM 100 has its CPUs, but "),
                    "{what}: {output:?}"
                );
                let first = fenced();
                let status = host.sh("hook status").unwrap().stdout;
                let online = host.ok("cat /sys/devices/system/cpu/online").unwrap();
                assert!(
                    first.vcpus.is_empty()
                        && online.trim() == "0-23"
                        && status.contains(" failed when it was isolated"),
                    "{what}: {first:#?}\n{status}"
                );
                expect(host, "hook 100 post-start -q", 0);
                fault(&mut lost, &format!("{what}, again"), &in_words(&fenced()));
                expect(host, "hook 100 post-stop -q", 0);
            }
            // It was about nothing that counts: a line of the report, an IRQ that stays.
            Some(0) => {
                let mut strays = fenced();
                strays.irqs.retain(|irq| {
                    let label = format!("IRQ {} (", irq.number);
                    let named = output.stderr.contains(&label);
                    // One of these errors is what the kernel answers for an IRQ that never moves.
                    let unmovable = matches!(*error, "EIO" | "EPERM");
                    !(named || unmovable)
                });
                fault(&mut lost, &format!("{what}, exit 0"), &in_words(&strays));
                expect(host, "hook 100 post-stop -q", 0);
            }
            _ => panic!("{what}: {output:?}"),
        }
        fault(
            &mut lost,
            &what,
            &before.not_restored(&host.snapshot().unwrap()),
        );
        expect(host, "test ! -e /run/pinfold/state.json", 0);
    }
    println!(
        "errors in post-start by {method}: {} tried, {log} reported and taken back, {kept} reported with the fence kept",
        tried.len()
    );
    assert!(log > 0 && lost.is_empty(), "{lost}");
}

/// Numbers that look random and come again with their seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
        usize::try_from(high).unwrap() % end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// It does not run, and nothing is reserved for it.
    Off,
    /// It runs, fenced.
    Fenced,
    /// It runs, and a hook of it was killed.
    Half,
    /// Its QEMU was killed and no hook was called.
    Dead,
    /// As `Dead`, and a hook of it had been killed before.
    HalfDead,
}

impl Life {
    /// A killed hook's work is not finished: CPUs may be offline, and no hook has looked since at
    /// what the kernel spread anew.
    fn is_unfinished(self) -> bool {
        matches!(self, Self::Half | Self::HalfDead)
    }
}

/// The VMs of a walk, with the CPUs of each.
const WALKERS: [(u32, &str); 3] = [(100, "6-8"), (101, "18-20"), (102, "9-11,21-23")];

/// Describes them, and starts a VM that hook does not manage.
fn walkers(host: &Host, method: &str) {
    with_network_queues(host);
    host.ok("mkdir -p /etc/pinfold").unwrap();
    for (id, cpus) in WALKERS {
        let settings = format!(
            "isolated = \"{cpus}\"\npins = [\"{cpus}\", \"{cpus}\"]\nmethod = \"{method}\"\ntidy_caches = false\n\
             max_latency_us = 20\nhalt_poll_ns = 100000\nvcpu_policy = \"fifo:1\"\nhousekeeping_governor = \"performance\"\n[deadlines]\nlock = 600\nqemu_exit = 1\n"
        );
        host.put(
            &format!("/etc/pinfold/{id}.toml"),
            settings.as_bytes(),
            0o644,
        )
        .unwrap();
        let spec = VmSpec {
            cores: 2,
            ..VmSpec::new(id)
        };
        host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
            .unwrap();
    }
    host.start_vm(&VmSpec {
        cores: 2,
        ..VmSpec::new(103)
    })
    .unwrap();
}

/// Three VMs on CPUs of their own start, stop and die, and hooks of theirs are killed. After every
/// step the CPUs of each fenced VM are free of strays; with none left the host is as it was.
/// `PINFOLD_SEED` and `PINFOLD_STEPS` repeat it.
fn walk(host: &mut Host) {
    walk_by(host, "hotplug", 16);
}

fn walk_by_partition(host: &mut Host) {
    walk_by(host, "partition", 12);
}

fn walk_by(host: &Host, method: &str, count: usize) {
    let seed = asked("PINFOLD_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        now.as_secs()
    });
    let steps = asked("PINFOLD_STEPS").unwrap_or_else(|| extent(count, 300).len() as u64);
    println!("walk by {method}: PINFOLD_SEED={seed} PINFOLD_STEPS={steps}");
    let mut random = Random(seed.max(1));
    walkers(host, method);
    let before = host.snapshot().unwrap();
    let mut lives = [Life::Off; 3];
    let mut story = String::new();
    for step in 1..=steps {
        let which = random.below(3);
        let id = WALKERS[which].0;
        let (what, next) = match (lives[which], random.below(4)) {
            (Life::Off | Life::Dead | Life::HalfDead, 0) => {
                (half(host, &mut random, id, "start"), Life::Half)
            }
            (Life::Off | Life::Dead | Life::HalfDead, 1 | 2) => (start(host, id), Life::Fenced),
            (life @ (Life::Fenced | Life::Half), 0) => {
                host.kill_vm(id).unwrap();
                host.cleanup_vm(id, false).unwrap();
                let next = match life {
                    Life::Half => Life::HalfDead,
                    _ => Life::Dead,
                };
                (format!("kill {id}"), next)
            }
            (Life::Fenced | Life::Half, 1) => {
                host.ok(&format!("qm stop {id} 2>&1")).unwrap();
                expect(host, &format!("hook {id} post-stop -q"), 0);
                (format!("stop {id}"), Life::Off)
            }
            (Life::Fenced, 2) => (half(host, &mut random, id, "post-start again"), Life::Half),
            (Life::Half | Life::Fenced, _) => {
                expect(host, &format!("hook {id} post-start -q"), 0);
                (format!("post-start {id}"), Life::Fenced)
            }
            (Life::Dead | Life::HalfDead, _) => {
                expect(host, &format!("hook {id} post-stop -q"), 0);
                (format!("post-stop {id}"), Life::Off)
            }
            (Life::Off, _) => {
                expect(host, "hook recover -q", 0);
                // One whose hook was killed before it had saved what it was about to do stays as it
                // is.
                for life in &mut lives {
                    if matches!(life, Life::Dead | Life::HalfDead) {
                        *life = Life::Off;
                    }
                }
                ("recover".to_owned(), Life::Off)
            }
        };
        lives[which] = next;
        let _ = writeln!(story, "{step}: {what} -> {lives:?}");
        check(host, &lives, &before, &story);
    }
    // All come home.
    for ((id, _), life) in WALKERS.iter().zip(&mut lives) {
        if matches!(life, Life::Fenced | Life::Half) {
            host.ok(&format!("qm stop {id} 2>&1")).unwrap();
        }
        expect(host, &format!("hook {id} post-stop -q"), 0);
        *life = Life::Off;
    }
    check(host, &lives, &before, &story);
}

fn start(host: &Host, id: u32) -> String {
    expect(
        host,
        &format!("hook {id} pre-start -q && qm start {id} && hook {id} post-start -q"),
        0,
    );
    format!("start {id}")
}

/// A post-start killed somewhere; of a VM that runs already, or is started for it.
fn half(host: &Host, random: &mut Random, id: u32, what: &str) -> String {
    if what == "start" {
        expect(host, &format!("hook {id} pre-start -q && qm start {id}"), 0);
    }
    let names: Vec<&str> = CALLS.split(',').collect();
    let (call, nth) = (names[random.below(names.len())], 1 + random.below(60));
    let reached = kill_at(
        host,
        &Call::nth(call, nth),
        &format!("hook {id} post-start"),
    );
    format!("{what} {id}, killed at {call} {nth}: {reached}")
}

fn check(host: &Host, lives: &[Life; 3], before: &HostState, story: &str) {
    let fenced: Vec<(u32, &str)> = WALKERS
        .iter()
        .zip(lives)
        .filter(|(_, life)| **life == Life::Fenced)
        .map(|(walker, _)| *walker)
        .collect();
    if !fenced.is_empty() {
        let cpus: Vec<&str> = fenced.iter().map(|(_, cpus)| *cpus).collect();
        println!("{}", story.lines().last().unwrap_or_default());
        let mut strays = strays_of(host, &cpus.join(","), &fenced);
        if lives.iter().any(|life| life.is_unfinished()) {
            strays = strays.but_spread_anew();
        }
        assert!(strays.is_clean(), "{story}{strays:#?}");
    }
    if lives.iter().all(|life| *life == Life::Off) {
        let difference = before.not_restored(&host.snapshot().unwrap());
        assert!(difference.is_empty(), "{story}{difference}");
    }
}

/// Start and stop, again and again: nothing grows.
fn cycles(host: &mut Host) {
    let count = extent(6, 200).len().max(6);
    install_hook(host);
    host.start_vm(&VmSpec::new(101)).unwrap();
    let cycle = |host: &Host| {
        host.start_vm(&VmSpec {
            busy: false,
            ..vm()
        })
        .unwrap();
        host.stop_vm(100).unwrap();
    };
    // The first makes what stays: hook's folder, systemd's memory of the slices.
    cycle(host);
    let before = host.snapshot().unwrap();
    let sizes = "ls /run/pinfold | wc -l; ls /proc/1/fd | wc -l; find /sys/fs/cgroup -type d | wc -l; \
                 find /run/systemd -name '*.conf' | wc -l; systemctl list-units --all --no-legend | wc -l";
    let size = |host: &Host| -> Vec<u32> {
        host.ok(sizes)
            .unwrap()
            .lines()
            .map(|line| line.trim().parse().unwrap())
            .collect()
    };
    let first = size(host);
    for _ in counted(&vec![(); count]) {
        cycle(host);
    }
    let last = size(host);
    println!(
        "{count} cycles: state files, systemd's open files, cgroups, drop-ins, units: {first:?} -> {last:?}"
    );
    let grown = grown(&first, &last, count);
    assert!(grown.is_none(), "{first:?} -> {last:?}: {grown:?}");
    assert_restored(host, &before);
}

/// The first of these sizes that has grown, if there is one: by more than what the host itself has
/// open at one moment and not at another, and by no more than a leak of one in two cycles does.
fn grown(first: &[u32], last: &[u32], cycles: usize) -> Option<usize> {
    const ALLOWED: u32 = 2;
    assert!(
        cycles / 2 > ALLOWED as usize,
        "too few cycles to see a leak"
    );
    first
        .iter()
        .zip(last)
        .position(|(first, last)| *last > first + ALLOWED)
}

#[test]
fn a_leak_of_one_in_two_cycles_is_seen() {
    assert_eq!(grown(&[2, 50], &[2, 53], 6), Some(1));
    assert_eq!(grown(&[2, 50], &[2, 52], 6), None);
    assert_eq!(grown(&[2, 50], &[4, 150], 200), Some(1));
}

/// Twenty hooks of three VMs, released together, wait for each other; the end is the same: all
/// fenced, and then all restored.
fn twenty_at_once(host: &mut Host) {
    twenty_at_once_by(host, "hotplug");
}

fn twenty_at_once_by_partition(host: &mut Host) {
    twenty_at_once_by(host, "partition");
}

fn twenty_at_once_by(host: &Host, method: &str) {
    walkers(host, method);
    // The scopes that systemd is asked for on the way back have another description than PVE's.
    for (id, _) in WALKERS {
        start(host, id);
    }
    for (id, _) in WALKERS {
        expect(host, &format!("hook {id} post-stop -q"), 0);
    }
    let before = host.snapshot().unwrap();
    let released = |phase: &str| {
        let all = format!(
            "rm -f /tmp/go /tmp/ended; for n in 1 2 3 4; \
             do for what in '100 {phase}' '101 {phase}' '102 {phase}' recover '999 post-stop'; do \
             (while test ! -e /tmp/go; do sleep 0.1; done; hook $what > /tmp/message 2>&1; \
             echo \"$? $what\" >> /tmp/ended) & \
             done; done; sleep 1; touch /tmp/go; wait; sort /tmp/ended | uniq -c"
        );
        let job = host
            .spawn(
                &["/bin/sh", "-c", &all],
                std::time::Duration::from_secs(900),
            )
            .unwrap();
        let ended = job.wait().unwrap().stdout;
        for what in [
            &format!("100 {phase}"),
            &format!("101 {phase}"),
            &format!("102 {phase}"),
            "recover",
            "999 post-stop",
        ] {
            assert!(
                ended
                    .lines()
                    .any(|line| line.trim() == format!("4 0 {what}")),
                "{ended}"
            );
        }
    };
    released("post-start");
    let strays = strays_of(host, "6-11,18-23", &WALKERS);
    assert!(strays.is_clean(), "{strays:#?}");
    released("post-stop");
    let difference = before.not_restored(&host.snapshot().unwrap());
    assert!(difference.is_empty(), "{difference}");
}

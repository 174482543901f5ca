//! `hook blame`: what disturbs a VM's CPUs, measured over some seconds without changing any of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{self, print, print_json, try_json, try_out};
use pinfold_core::state::Store;
use pinfold_core::sys::activity::{self, RunTime, Source};
use pinfold_core::sys::{cpu, cpufreq, irq, task};
use pinfold_core::vm::{self, Qemu, Role, VmId};
use pinfold_core::{CpuSet, Exit, Host, Knob, Result, Table, TaskId, printable};
use serde::Serialize;
use serde_json::json;

use super::status::redrawn;
use super::traced::{OTHERS, OnCpu, Recorder, Taken, Traced};
use crate::checks::finding::EXPLAINED;
use crate::own_steps;
use crate::settings::Settings;
use crate::state::reservation::Reservation;

/// What an interrupt or a softirq costs a CPU at the least, in nanoseconds: only to sort them among
/// threads, whose time is measured.
const INTERRUPT: u64 = 2_000;

/// How many times a second a vCPU wakes up when the cost of that matters.
const MANY_WAKE_UPS: u64 = 1_000;
/// The part of the vCPUs' time that bound kernel threads take when it matters.
const MUCH_BOUND: f64 = 0.0005;
/// The part of the time that vCPUs run when they are busy.
const BUSY: f64 = 0.5;

/// The options of `hook blame`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    vmid: VmId,

    /// How long to watch
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = super::seconds)]
    seconds: u64,

    /// Repeat until interrupted, and print the result each time
    #[arg(long)]
    watch: bool,

    /// Have the kernel record each switch to another thread, each interrupt of a device and each
    /// softirq on these CPUs, by a tracefs instance of this command's own. Counts and times are then
    /// exact, and the longest run of each is shown. Needs root. Switching it on and off interrupts
    /// each CPU of the host a few times, the VM's too, and each switch there takes slightly longer
    /// meanwhile. If the command is killed, `hook recover` or the next --trace removes the instance
    #[arg(long)]
    trace: bool,
}

/// What takes time from vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// vCPUs that may run on one CPU only, the same.
    SharedCpu,
    /// A thread of the VM's QEMU that is not a vCPU.
    Emulator,
    /// Another program's thread.
    Thread,
    Kthread,
    Irq,
    /// An interrupt that a CPU's own parts or other CPUs send.
    LocalInterrupt,
    Softirq,
}

/// Something that ran on the VM's CPUs.
#[derive(Debug, Serialize)]
struct Disturbance {
    kind: Kind,
    object: String,
    cpus: CpuSet,
    /// How many times.
    count: u64,
    /// The time it took, in nanoseconds: measured for threads, estimated for interrupts unless they
    /// are traced.
    ns: u64,
    measured: bool,
    /// The longest of these times, in nanoseconds, if they are traced.
    longest_ns: Option<u64>,
    /// Whether it could be elsewhere.
    avoidable: bool,
    advice: String,
}

/// What a vCPU got.
#[derive(Debug, Serialize)]
struct Vcpu {
    vcpu: usize,
    cpus: CpuSet,
    run_ns: u64,
    /// What the guest sees as steal time.
    steal_ns: u64,
    slices: u64,
}

/// The command's whole run.
///
/// # Errors
/// If the VM does not run, or /proc cannot be read, or with `--trace` the kernel cannot record.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    let qemu = vm::require_running(&root, args.vmid)?;
    let vcpus = vcpu_threads(&root, &qemu)?;
    ensure!(
        !vcpus.is_empty(),
        "VM {}: QEMU has no vCPU threads",
        args.vmid
    );
    let settings = settings(&root, args.vmid)?;
    let isolated = settings.as_ref().map(|settings| settings.isolated.clone());
    let cpus = isolated.clone().unwrap_or_else(|| {
        let places = vcpus.values().map(|(_, allowed)| allowed);
        places.fold(CpuSet::new(), |all, allowed| &all | allowed)
    });

    let watch = Watch {
        root: &root,
        vmid: args.vmid,
        qemu: &qemu,
        vcpus: &vcpus,
        settings: settings.as_ref(),
        cpus: &cpus,
        elsewhere: &cpu::present(&root)? - &cpus,
    };
    if !args.trace {
        watch.repeat(args, output.json, None)?;
        return Ok(Exit::Success);
    }
    let own = vcpus.keys().map(|id| id.tid).collect();
    let mut recorder = Recorder::start(&root, &cpus, own)?;
    let watched = watch.repeat(args, output.json, Some(&mut recorder));
    match (watched, recorder.end()) {
        (Err(watched), Err(ended)) => Err(anyhow!("{watched:#}; {ended:#}")),
        (watched, ended) => watched.and(ended).map(|()| Exit::Success),
    }
}

/// What was seen between two samples.
struct Seen<'a> {
    vmid: VmId,
    is_isolated: bool,
    cpus: &'a CpuSet,
    seconds: f64,
    vcpus: Vec<Vcpu>,
    disturbances: Vec<Disturbance>,
    /// Settings that matter here and that the VM does not use.
    hints: Vec<String>,
    /// How often the vCPUs left the guest, by reason, if KVM counts it.
    exits: Option<BTreeMap<String, u64>>,
    traced: Option<Traced>,
}

impl Seen<'_> {
    fn print(&self, json: bool) -> anyhow::Result<()> {
        match json {
            true => print_json(&self.to_json()),
            false => print(&self.to_text()),
        }
    }

    /// Prints it over the last one on a terminal; false if the reader has gone.
    fn repeat(&self, json: bool) -> anyhow::Result<bool> {
        let shown = match terminal::size() {
            _ if json => try_json(&self.to_json()).and_then(|()| try_out("\n")),
            Some((_, rows)) => try_out(&redrawn(&self.to_text(), rows)),
            None => try_out(&(self.to_text() + "\n")),
        };
        match shown {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
            shown => shown.map(|()| true).context("stdout"),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let trace = self.traced.as_ref().map(|traced| {
            let by_cpu: Vec<&OnCpu> = traced.by_cpu.values().collect();
            json!({"by_cpu": by_cpu, "lost": traced.lost})
        });
        json!({
            "vm": self.vmid, "isolated": self.is_isolated, "cpus": self.cpus, "seconds": self.seconds,
            "vcpus": self.vcpus, "exits": self.exits, "trace": trace, "disturbances": self.disturbances,
            "hints": self.hints,
        })
    }

    fn to_text(&self) -> String {
        let heads = [
            self.head(),
            self.waited(),
            self.exits.as_ref().map_or_else(String::new, exits_text),
            self.traced.as_ref().map_or_else(String::new, trace_text),
        ];
        let hints = self.hints.iter().map(|hint| format!("{hint}\n"));
        let text = heads.concat() + &self.table() + &hints.collect::<String>();
        printable(&text).into_owned()
    }

    fn head(&self) -> String {
        let (vmid, cpus, seconds) = (self.vmid, self.cpus, self.seconds);
        let isolated = if self.is_isolated {
            ""
        } else {
            "; its CPUs are not isolated"
        };
        format!("VM {vmid}, CPU {cpus}, {seconds:.1} s{isolated}\n")
    }

    fn waited(&self) -> String {
        let stolen: u64 = self.vcpus.iter().map(|vcpu| vcpu.steal_ns).sum();
        let whole = self.seconds * 1e9 * self.vcpus.len() as f64;
        let mut text = format!(
            "vCPUs waited for a CPU (steal time in the guest): {} in all, {:.3} % of the time",
            time(stolen),
            stolen as f64 / whole * 100.0
        );
        let worst = self.vcpus.iter().max_by_key(|vcpu| vcpu.steal_ns);
        if let Some(worst) = worst.filter(|worst| worst.steal_ns > 0) {
            text += &format!(
                "; most vCPU {} on CPU {}: {}",
                worst.vcpu,
                worst.cpus,
                time(worst.steal_ns)
            );
        }
        text + "\n"
    }

    fn table(&self) -> String {
        if self.disturbances.is_empty() {
            return "nothing else ran on these CPUs\n".to_owned();
        }
        let mut table = match self.traced {
            Some(_) => Table::new(&["time", "longest", "times", "cpu", "what", "what to do"]),
            None => Table::new(&["time", "times", "cpu", "what", "what to do"]),
        };
        for it in &self.disturbances {
            let about = if it.measured { "" } else { "~" };
            let took = format!("{about}{}", time(it.ns));
            let (count, cpus) = (it.count.to_string(), it.cpus.to_string());
            let (object, advice) = (it.object.clone(), it.advice.clone());
            if self.traced.is_none() {
                table.row([took, count, cpus, object, advice]);
            } else {
                let longest = it.longest_ns.map_or_else(|| "-".to_owned(), time);
                table.row([took, longest, count, cpus, object, advice]);
            }
        }
        table.to_text()
    }
}

/// A line with how often vCPUs left the guest, the most frequent reasons first.
fn exits_text(exits: &BTreeMap<String, u64>) -> String {
    let mut reasons: Vec<(&String, &u64)> = exits
        .iter()
        .filter(|(name, count)| *name != "all" && **count > 0)
        .collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let reasons: Vec<String> = reasons
        .iter()
        .map(|(name, count)| format!(", {name} {count}"))
        .collect();
    let all = exits.get("all").copied().unwrap_or(0);
    format!("vCPUs left the guest: {all} times{}\n", reasons.concat())
}

/// A line with how often other threads got a CPU, and where most often.
fn trace_text(traced: &Traced) -> String {
    let by_cpu = traced.by_cpu.values();
    let all: u64 = by_cpu.clone().map(|on| on.switches).sum();
    let mut text = format!("switches to other threads: {all}");
    if let Some(most) = by_cpu.clone().max_by_key(|on| on.switches) {
        text += &format!(", most on CPU {}: {}", most.cpu, most.switches);
    }
    if let Some(longest) = by_cpu.clone().max_by_key(|on| on.longest_ns) {
        let (cpu, ns) = (longest.cpu, longest.longest_ns);
        text += &format!("; the longest ran for {} on CPU {cpu}", time(ns));
    }
    if traced.lost > 0 {
        text += &format!(
            "; {} events or more were lost, so the counts are too low",
            traced.lost
        );
    }
    text + "\n"
}

/// The settings of a VM whose CPUs hook has isolated.
fn settings(root: &Host, vmid: VmId) -> Result<Option<Settings>> {
    let reservations = Store::<Reservation>::peek(root)?
        .unwrap_or_default()
        .reservations;
    Ok(reservations
        .get(&vmid.into())
        .filter(|reservation| reservation.is_fenced())
        .map(|reservation| reservation.settings.clone()))
}

type VcpuThreads = BTreeMap<TaskId, (usize, CpuSet)>;

fn vcpu_threads(root: &Host, qemu: &Qemu) -> Result<VcpuThreads> {
    let threads = vm::threads(root, qemu, vm::qmp::DEFAULT_BUDGET)?.threads;
    Ok(threads
        .into_iter()
        .filter_map(|thread| match thread.role {
            Role::Vcpu(vcpu) => Some((thread.id, (vcpu, thread.allowed))),
            Role::Iothread(_) | Role::Emulator => None,
        })
        .collect())
}

/// Another thread that may run on the VM's CPUs.
#[derive(Debug)]
struct Other {
    name: String,
    kernel: bool,
    bound: bool,
    /// Those of the VM's CPUs that it may use.
    cpus: CpuSet,
    /// Whether it may use others too.
    is_free: bool,
    last_cpu: usize,
    time: RunTime,
}

/// The counters at one time.
#[derive(Debug)]
struct Sample {
    vcpus: BTreeMap<TaskId, RunTime>,
    others: BTreeMap<TaskId, Other>,
    interrupts: Vec<Source>,
    softirqs: Vec<Source>,
    exits: Option<BTreeMap<String, u64>>,
}

impl Sample {
    fn take(root: &Host, qemu: &Qemu, cpus: &CpuSet, vcpus: &VcpuThreads) -> Result<Self> {
        let mut sample = Self {
            vcpus: BTreeMap::new(),
            others: BTreeMap::new(),
            exits: activity::kvm_exits(root, qemu.id.pid),
            interrupts: activity::interrupts(root, cpus)?,
            softirqs: activity::softirqs(root, cpus)?,
        };
        for id in vcpus.keys() {
            sample.vcpus.insert(*id, activity::run_time(root, id)?);
        }
        for pid in task::pids(root)? {
            let threads = match task::tasks(root, pid) {
                Err(error) if error.is_gone() => continue,
                threads => threads?,
            };
            for thread in threads.into_iter().filter(|it| !vcpus.contains_key(&it.id)) {
                match Other::read(root, cpus, &thread) {
                    Err(error) if error.is_gone() => {}
                    other => {
                        sample.others.extend(other?.map(|other| (thread.id, other)));
                    }
                }
            }
        }
        Ok(sample)
    }
}

impl Other {
    /// None if the thread may not run on `cpus`.
    fn read(root: &Host, cpus: &CpuSet, thread: &task::Task) -> Result<Option<Self>> {
        let allowed = task::affinity(root, &thread.id)?;
        if !allowed.intersects(cpus) {
            return Ok(None);
        }
        Ok(Some(Self {
            name: thread.name.clone(),
            kernel: thread.kernel,
            bound: thread.bound,
            is_free: !allowed.is_subset(cpus),
            cpus: &allowed & cpus,
            last_cpu: thread.last_cpu,
            time: activity::run_time(root, &thread.id)?,
        }))
    }
}

fn vcpus_between(threads: &VcpuThreads, before: &Sample, after: &Sample) -> Vec<Vcpu> {
    let mut vcpus: Vec<Vcpu> = threads
        .iter()
        .filter_map(|(id, (vcpu, cpus))| {
            let time = after.vcpus.get(id)?.since(before.vcpus.get(id)?);
            Some(Vcpu {
                vcpu: *vcpu,
                cpus: cpus.clone(),
                run_ns: time.run,
                steal_ns: time.wait,
                slices: time.slices,
            })
        })
        .collect();
    vcpus.sort_by_key(|vcpu| vcpu.vcpu);
    vcpus
}

/// What the disturbances are judged by.
struct Watch<'a> {
    root: &'a Host,
    vmid: VmId,
    qemu: &'a Qemu,
    vcpus: &'a VcpuThreads,
    /// Of an isolated VM.
    settings: Option<&'a Settings>,
    cpus: &'a CpuSet,
    /// The host's other CPUs.
    elsewhere: CpuSet,
}

impl Watch<'_> {
    /// Watches and prints, once or until the VM or the reader has gone.
    fn repeat(
        &self,
        args: &Args,
        json: bool,
        mut recorder: Option<&mut Recorder<'_>>,
    ) -> anyhow::Result<()> {
        let time = Duration::from_secs(args.seconds);
        let mut before = self.sample()?;
        loop {
            let began = Instant::now();
            let traced = match &mut recorder {
                None => {
                    std::thread::sleep(time);
                    None
                }
                Some(recorder) => match recorder.watch(time)? {
                    None => return Ok(()),
                    traced => traced,
                },
            };
            let after = match self.sample() {
                Err(error) if args.watch && error.is_gone() => return Ok(()),
                after => after?,
            };
            let seconds = began.elapsed().as_secs_f64();
            let seen = self.seen(seconds, &before, &after, traced)?;
            if !args.watch {
                return seen.print(json);
            }
            if !seen.repeat(json)? {
                return Ok(());
            }
            before = after;
        }
    }

    fn sample(&self) -> Result<Sample> {
        Sample::take(self.root, self.qemu, self.cpus, self.vcpus)
    }

    /// What happened between two samples.
    fn seen(
        &self,
        seconds: f64,
        before: &Sample,
        after: &Sample,
        traced: Option<Traced>,
    ) -> Result<Seen<'_>> {
        let vcpus = vcpus_between(self.vcpus, before, after);
        let disturbances = self.disturbances(&vcpus, before, after, traced.as_ref())?;
        let hints = self.settings.map_or(Ok(Vec::new()), |settings| {
            self.hints(settings, seconds, &vcpus, &disturbances)
        })?;
        Ok(Seen {
            vmid: self.vmid,
            is_isolated: self.settings.is_some(),
            cpus: self.cpus,
            seconds,
            disturbances,
            hints,
            vcpus,
            exits: exits_between(before, after),
            traced,
        })
    }

    /// What happened between two samples: first what could be elsewhere, and by the time it took.
    fn disturbances(
        &self,
        vcpus: &[Vcpu],
        before: &Sample,
        after: &Sample,
        traced: Option<&Traced>,
    ) -> Result<Vec<Disturbance>> {
        let mut found = self.shared(vcpus);
        found.extend(self.threads(before, after, traced));
        found.extend(self.interrupts(&before.interrupts, &after.interrupts, traced)?);
        found.extend(self.softirqs(&before.softirqs, &after.softirqs, traced)?);
        found.sort_by_key(|it| std::cmp::Reverse((it.avoidable, it.ns)));
        Ok(found)
    }

    /// When a setting that the VM does not use matters.
    fn hints(
        &self,
        settings: &Settings,
        seconds: f64,
        vcpus: &[Vcpu],
        disturbances: &[Disturbance],
    ) -> Result<Vec<String>> {
        let mut hints = Vec::new();
        let rate = |vcpu: &Vcpu| (vcpu.slices as f64 / seconds) as u64;
        if let Some(busiest) = vcpus.iter().max_by_key(|vcpu| vcpu.slices)
            && rate(busiest) >= MANY_WAKE_UPS
        {
            let often = format!(
                "vCPU {} woke up {} times a second",
                busiest.vcpu,
                rate(busiest)
            );
            if settings.halt_poll_ns.is_none()
                && let Some(polling) = own_steps::halt_polling(self.root)?
            {
                let now = polling.found;
                hints.push(format!(
                    "{often}: halt_poll_ns (now {now}) spares it those that come within that time"
                ));
            }
            if settings.max_latency_us.is_none() {
                hints.push(format!(
                    "{often}: max_latency_us limits how long its CPU takes to leave an idle state"
                ));
            }
        }
        let whole = seconds * 1e9 * vcpus.len() as f64;
        let is_bound = |it: &&Disturbance| it.kind == Kind::Kthread && !it.avoidable;
        let bound: u64 = (disturbances.iter().filter(is_bound)).map(|it| it.ns).sum();
        if settings.vcpu_policy.is_none() && bound as f64 > whole * MUCH_BOUND {
            hints.push(format!(
                "kernel threads that must run here took {}: vcpu_policy = \"fifo:1\" puts vCPUs before them; \
                 with it, hook check {} lists what waits then",
                time(bound),
                self.vmid
            ));
        }
        let ran: u64 = vcpus.iter().map(|vcpu| vcpu.run_ns).sum();
        if ran as f64 > whole * BUSY {
            let policies = cpufreq::policies(self.root)?;
            let at_full_power = |policy: &&cpufreq::Policy| {
                let fast = Some("performance");
                !policy.cpus.intersects(self.cpus)
                    && (policy.governor == "performance" || policy.preference.as_deref() == fast)
            };
            let is_set = settings.housekeeping_governor.is_some()
                || settings.housekeeping_energy_preference.is_some();
            if !is_set && policies.iter().any(|policy| at_full_power(&policy)) {
                hints.push(
                    "the vCPUs compute, and other CPUs are set to performance too: housekeeping_governor or \
                     housekeeping_energy_preference leave the VM's CPUs more of the processor's power"
                        .into(),
                );
            }
            let is_saving = |policy: &&cpufreq::Policy| {
                policy.cpus.intersects(self.cpus) && policy.governor != "performance"
            };
            let keeps = settings.governor.is_none() && settings.energy_preference.is_none();
            if let Some(policy) = policies.iter().find(is_saving).filter(|_| keeps) {
                hints.push(format!(
                    "the vCPUs compute by the governor {}: governor or energy_preference raise their clock sooner",
                    policy.governor
                ));
            }
        }
        Ok(hints)
    }

    /// vCPUs that have only one CPU, and the same.
    fn shared(&self, vcpus: &[Vcpu]) -> Vec<Disturbance> {
        let mut by_cpu: BTreeMap<usize, Vec<&Vcpu>> = BTreeMap::new();
        for vcpu in vcpus.iter().filter(|vcpu| vcpu.cpus.len() == 1) {
            by_cpu
                .entry(vcpu.cpus.first().unwrap_or(0))
                .or_default()
                .push(vcpu);
        }
        by_cpu
            .into_iter()
            .filter(|(_, sharers)| sharers.len() > 1)
            .map(|(cpu, sharers)| {
                let numbers: CpuSet = sharers.iter().map(|vcpu| vcpu.vcpu).collect();
                Disturbance {
                    kind: Kind::SharedCpu,
                    object: format!("vCPU {numbers} share a CPU"),
                    cpus: [cpu].into_iter().collect(),
                    count: sharers.iter().map(|vcpu| vcpu.slices).sum(),
                    ns: sharers.iter().map(|vcpu| vcpu.steal_ns).sum(),
                    measured: true,
                    longest_ns: None,
                    avoidable: true,
                    advice: format!("give each vCPU a CPU: hook check {}", self.vmid),
                }
            })
            .collect()
    }

    fn threads(
        &self,
        before: &Sample,
        after: &Sample,
        traced: Option<&Traced>,
    ) -> Vec<Disturbance> {
        let mut exact = traced.map(|traced| traced.threads.clone());
        let mut found = Vec::new();
        for (id, now) in &after.others {
            let earlier = before
                .others
                .get(id)
                .map(|other| other.time)
                .unwrap_or_default();
            let time = now.time.since(&earlier);
            if let Some(exact) = &mut exact {
                if let Some(taken) = exact.remove(&id.tid) {
                    found.push(self.thread(id, now, taken));
                    continue;
                }
                // It was elsewhere, unless it ran all the time.
                if time.slices > 0 {
                    continue;
                }
            }
            // One that may run elsewhere too was probably there, unless it was last seen here.
            let was_here = !now.is_free || self.cpus.contains(now.last_cpu);
            if time.run == 0 || !was_here {
                continue;
            }
            let cpus = if now.is_free {
                [now.last_cpu].into_iter().collect()
            } else {
                now.cpus.clone()
            };
            let taken = Taken {
                cpus,
                count: time.slices,
                ns: time.run,
                ..Taken::default()
            };
            let longest_ns = exact.is_some().then_some(time.run);
            found.push(Disturbance {
                longest_ns,
                ..self.thread(id, now, taken)
            });
        }
        let gone = exact.into_iter().flatten();
        found.extend(gone.map(|(tid, taken)| {
            let known = before.others.iter().find(|(id, _)| id.tid == tid);
            let found = match known {
                Some((id, other)) => self.thread(id, other, taken),
                None => unknown_thread(tid, taken),
            };
            let advice = "it has ended or moved since".to_owned();
            Disturbance { advice, ..found }
        }));
        found
    }

    /// A thread, and what it took.
    fn thread(&self, id: &TaskId, thread: &Other, taken: Taken) -> Disturbance {
        let (kind, object, advice) = self.named(id, thread);
        Disturbance {
            avoidable: !thread.bound && !self.elsewhere.is_empty(),
            advice,
            ..exact(kind, object, taken)
        }
    }

    fn named(&self, id: &TaskId, thread: &Other) -> (Kind, String, String) {
        let (elsewhere, vmid) = (&self.elsewhere, self.vmid);
        let (tid, name) = (id.tid, &thread.name);
        if thread.kernel {
            let advice = if is_unbound_worker(thread) {
                format!("pin-kthreads --only workqueues {elsewhere}")
            } else if thread.bound {
                "bound by the kernel; harmless if rare".to_owned()
            } else {
                format!("pin-kthreads {elsewhere}")
            };
            (Kind::Kthread, format!("kthread {tid} ({name})"), advice)
        } else if id.pid == self.qemu.id.pid {
            let object = format!("thread {tid} ({name}) of VM {vmid}");
            let advice = format!("pin-vcpu {vmid} --emulator {elsewhere}");
            (Kind::Emulator, object, advice)
        } else {
            let advice = format!("taskset -pc {elsewhere} {tid}");
            (Kind::Thread, format!("thread {tid} ({name})"), advice)
        }
    }

    fn interrupts(
        &self,
        before: &[Source],
        after: &[Source],
        traced: Option<&Traced>,
    ) -> Result<Vec<Disturbance>> {
        let mut found = Vec::new();
        for counted in between(before, after) {
            let Source { name, what, .. } = counted.source;
            found.push(match name.parse() {
                Ok(number) => {
                    let taken = traced.and_then(|traced| traced.irqs.get(&number));
                    self.irq(counted, number)?.measured(taken)
                }
                Err(_) => {
                    let object = format!("{name} ({what})");
                    counted.disturbance(Kind::LocalInterrupt, object, false, self.on_local(name))
                }
            });
        }
        Ok(found)
    }

    fn irq(&self, counted: Counted<'_>, number: u32) -> Result<Disturbance> {
        let devices = irq::devices(&counted.source.what)
            .map(|devices| format!(" ({devices})"))
            .unwrap_or_default();
        let is_movable = !irq::is_unmovable(self.root, number)?;
        let advice = if is_movable {
            format!("pin-irqs --only {number} {}", self.elsewhere)
        } else {
            format!(
                "kernel-managed; isolcpus=managed_irq, or fewer queues of the device; {EXPLAINED}"
            )
        };
        let object = format!("IRQ {number}{devices}");
        Ok(counted.disturbance(Kind::Irq, object, is_movable, advice))
    }

    fn on_local(&self, name: &str) -> String {
        match name {
            "LOC" => format!(
                "timer tick; kernel option nohz_full={}; {EXPLAINED}",
                self.cpus
            ),
            "NMI" | "PMI" => "profiling or the watchdog; kernel option nmi_watchdog=0".to_owned(),
            _ => "sent by other CPUs; harmless if rare".to_owned(),
        }
    }

    fn softirqs(
        &self,
        before: &[Source],
        after: &[Source],
        traced: Option<&Traced>,
    ) -> Result<Vec<Disturbance>> {
        between(before, after)
            .into_iter()
            .map(|counted| {
                let name = counted.source.name.clone();
                let (avoidable, advice) = self.on_softirq(&name, &counted.cpus)?;
                let taken = traced.and_then(|traced| traced.softirqs.get(&name));
                let object = format!("softirq {name}");
                let found = counted.disturbance(Kind::Softirq, object, avoidable, advice);
                Ok(found.measured(taken))
            })
            .collect()
    }

    /// Whether a softirq on these CPUs could be avoided, and how.
    fn on_softirq(&self, name: &str, cpus: &CpuSet) -> Result<(bool, String)> {
        let (own, elsewhere) = (self.cpus, &self.elsewhere);
        let from = match name {
            "NET_RX" => hands_on_to(self.root, cpus)?,
            _ => None,
        };
        Ok(match (name, from) {
            ("TIMER" | "HRTIMER" | "SCHED", _) => (
                false,
                format!("comes with the timer tick; kernel option nohz_full={own}; {EXPLAINED}"),
            ),
            ("RCU", _) => (false, format!("kernel option rcu_nocbs={own}; {EXPLAINED}")),
            (_, Some(interface)) => (
                true,
                format!(
                    "RPS of {interface} hands packets on to it; pin-irqs --only {interface} {elsewhere}"
                ),
            ),
            _ => (
                true,
                "comes with the interrupts of its device or with a thread here".to_owned(),
            ),
        })
    }
}

/// Whether a thread works for unbound workqueues. It cannot be moved, and follows their mask, also if its
/// workqueue has one of its own.
fn is_unbound_worker(thread: &Other) -> bool {
    thread.kernel && thread.name.starts_with("kworker/u")
}

/// The first interface that hands received packets on to one of these CPUs.
fn hands_on_to(root: &Host, cpus: &CpuSet) -> Result<Option<String>> {
    let queues = pin_irqs::queues(root)?;
    let interfaces = queues.iter().filter_map(|queue| match &queue.knob {
        Knob::QueueCpus(name) => {
            let is_there = queue.found.cpus()?.intersects(cpus);
            is_there.then(|| name.split('/').next())?
        }
        _ => None,
    });
    Ok(interfaces.map(str::to_owned).next())
}

impl Disturbance {
    /// With the times that were recorded, if any were.
    fn measured(self, taken: Option<&Taken>) -> Self {
        match taken {
            None => self,
            Some(taken) => Self {
                ns: taken.ns,
                measured: true,
                longest_ns: Some(taken.longest_ns),
                ..self
            },
        }
    }
}

/// Something of which each run was recorded.
fn exact(kind: Kind, object: String, taken: Taken) -> Disturbance {
    Disturbance {
        kind,
        object,
        cpus: taken.cpus,
        count: taken.count,
        ns: taken.ns,
        measured: true,
        longest_ns: Some(taken.longest_ns),
        avoidable: true,
        advice: String::new(),
    }
}

/// A thread that /proc has not had at either time.
fn unknown_thread(tid: i32, taken: Taken) -> Disturbance {
    let object = match tid {
        OTHERS => taken.name.clone(),
        _ => format!("thread {tid} ({})", taken.name),
    };
    exact(Kind::Thread, object, taken)
}

/// How often vCPUs left the guest between two samples.
fn exits_between(before: &Sample, after: &Sample) -> Option<BTreeMap<String, u64>> {
    let earlier = before.exits.as_ref()?;
    let added = after.exits.as_ref()?.iter().map(|(reason, count)| {
        let known = earlier.get(reason).copied().unwrap_or(0);
        (reason.clone(), count.saturating_sub(known))
    });
    Some(added.collect())
}

/// What was counted between two readings.
struct Counted<'a> {
    source: &'a Source,
    /// The CPUs on which.
    cpus: CpuSet,
    /// How many times in all.
    count: u64,
}

impl Counted<'_> {
    /// Its time is estimated.
    fn disturbance(
        self,
        kind: Kind,
        object: String,
        avoidable: bool,
        advice: String,
    ) -> Disturbance {
        Disturbance {
            kind,
            object,
            cpus: self.cpus,
            count: self.count,
            ns: self.count * INTERRUPT,
            measured: false,
            longest_ns: None,
            avoidable,
            advice,
        }
    }
}

/// The sources that have counted something between two readings.
fn between<'a>(before: &[Source], after: &'a [Source]) -> Vec<Counted<'a>> {
    let earlier: BTreeMap<&str, BTreeMap<usize, u64>> = before
        .iter()
        .map(|source| {
            (
                source.name.as_str(),
                source.counts.iter().copied().collect(),
            )
        })
        .collect();
    let mut found = Vec::new();
    for source in after {
        let (mut cpus, mut sum) = (CpuSet::new(), 0);
        for (cpu, count) in &source.counts {
            let known = earlier
                .get(source.name.as_str())
                .and_then(|counts| counts.get(cpu));
            let added = count.saturating_sub(known.copied().unwrap_or(0));
            if added > 0 {
                cpus.insert(*cpu);
                sum += added;
            }
        }
        if sum > 0 {
            found.push(Counted {
                source,
                cpus,
                count: sum,
            });
        }
    }
    found
}

/// The sources that were added to on a CPU between two readings, with how many, the most first.
pub(super) fn added_on(cpu: usize, before: &[Source], after: &[Source]) -> Vec<(String, u64)> {
    let on = |sources: &[Source]| -> Vec<Source> {
        let mut own = sources.to_vec();
        own.iter_mut()
            .for_each(|source| source.counts.retain(|(counted, _)| *counted == cpu));
        own
    };
    let (before, after) = (on(before), on(after));
    let mut found: Vec<(String, u64)> = between(&before, &after)
        .into_iter()
        .map(|counted| {
            let Source { name, what, .. } = counted.source;
            let label = match name.parse::<u32>() {
                Ok(number) => match irq::devices(what) {
                    Some(devices) => format!("IRQ {number} ({devices})"),
                    None => format!("IRQ {number}"),
                },
                Err(_) => format!("{name} ({what})"),
            };
            (label, counted.count)
        })
        .collect();
    found.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    found
}

/// Nanoseconds for people.
fn time(ns: u64) -> String {
    match ns {
        0..1_000_000 => format!("{:.0} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;

    fn source(name: &str, counts: &[(usize, u64)]) -> Source {
        Source {
            name: name.to_owned(),
            what: String::new(),
            counts: counts.to_vec(),
        }
    }

    #[test]
    fn only_what_was_added_counts() {
        let before = [
            source("47", &[(6, 10), (7, 5)]),
            source("LOC", &[(6, 100), (7, 100)]),
        ];
        let after = [
            source("47", &[(6, 10), (7, 5)]),
            source("LOC", &[(6, 150), (7, 100)]),
            // It appeared in between.
            source("48", &[(6, 3), (7, 0)]),
        ];
        let found: Vec<_> = between(&before, &after)
            .into_iter()
            .map(|it| (it.source.name.as_str(), it.cpus.to_string(), it.count))
            .collect();
        assert_eq!(
            found,
            [("LOC", "6".to_owned(), 50), ("48", "6".to_owned(), 3)]
        );
    }

    fn other(tid: i32, name: &str, run: u64, slices: u64, is_free: bool) -> (TaskId, Other) {
        let id = TaskId {
            pid: tid,
            tid,
            start: 42,
        };
        let other = Other {
            name: name.to_owned(),
            kernel: name.starts_with('k'),
            bound: name.starts_with('k'),
            cpus: CpuSet::range(6, 7),
            is_free,
            last_cpu: 7,
            time: RunTime {
                run,
                wait: 0,
                slices,
            },
        };
        (id, other)
    }

    fn sample(others: [(TaskId, Other); 5]) -> Sample {
        Sample {
            vcpus: BTreeMap::new(),
            others: others.into(),
            interrupts: Vec::new(),
            softirqs: Vec::new(),
            exits: None,
        }
    }

    #[test]
    fn recorded_runs_take_the_place_of_what_proc_suggests() {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[6, 7]);
        let vmid = "100".parse().unwrap();
        let qemu = vm::require_running(&host.root, vmid).unwrap();
        let (vcpus, cpus) = (VcpuThreads::new(), CpuSet::range(6, 7));
        let watch = Watch {
            root: &host.root,
            vmid,
            qemu: &qemu,
            vcpus: &vcpus,
            settings: None,
            cpus: &cpus,
            elsewhere: CpuSet::range(0, 5),
        };
        let before = sample([
            other(50, "bash", 0, 0, true),
            other(51, "elsewhere", 0, 0, true),
            other(52, "hog", 0, 3, true),
            other(53, "kworker/6:1", 0, 0, false),
            other(54, "ended", 0, 0, true),
        ]);
        let after = sample([
            other(50, "bash", 9_000, 9, true),
            other(51, "elsewhere", 7_000, 7, true),
            other(52, "hog", 5_000, 3, true),
            other(53, "kworker/6:1", 8_000, 8, false),
            other(55, "idle", 0, 0, true),
        ]);
        let shown = |traced: Option<&Traced>| {
            let found = watch.threads(&before, &after, traced);
            let shown = found.into_iter().map(|it| {
                let (object, cpus, times) = (it.object, it.cpus, (it.count, it.ns, it.longest_ns));
                (format!("{object} {cpus} {times:?}"), it.avoidable)
            });
            shown.collect::<Vec<_>>()
        };
        let expected = [
            ("thread 50 (bash) 7 (9, 9000, None)", true),
            ("thread 51 (elsewhere) 7 (7, 7000, None)", true),
            ("thread 52 (hog) 7 (0, 5000, None)", true),
            ("kthread 53 (kworker/6:1) 6-7 (8, 8000, None)", false),
        ];
        let expected = expected.map(|(text, avoidable)| (text.to_owned(), avoidable));
        assert_eq!(shown(None), expected);

        let taken = |name: &str, count, ns| Taken {
            name: name.to_owned(),
            cpus: CpuSet::range(6, 6),
            count,
            ns,
            longest_ns: 300,
        };
        let traced = Traced {
            threads: [
                (OTHERS, taken("other threads", 70, 700)),
                (50, taken("sh", 2, 400)),
                (53, taken("kworker/6:1", 8, 800)),
                (54, taken("ended", 1, 300)),
                (99, taken("short", 1, 300)),
            ]
            .into(),
            ..Traced::default()
        };
        // 51 was switched and not here; 52 ran all the time, so it was not switched.
        let expected = [
            ("thread 50 (bash) 6 (2, 400, Some(300))", true),
            ("thread 52 (hog) 7 (0, 5000, Some(5000))", true),
            ("kthread 53 (kworker/6:1) 6 (8, 800, Some(300))", false),
            ("other threads 6 (70, 700, Some(300))", true),
            ("thread 54 (ended) 6 (1, 300, Some(300))", true),
            ("thread 99 (short) 6 (1, 300, Some(300))", true),
        ];
        let expected = expected.map(|(text, avoidable)| (text.to_owned(), avoidable));
        assert_eq!(shown(Some(&traced)), expected);
    }

    #[test]
    fn exits_for_people() {
        let exits = [("all", 1200), ("halt", 200), ("io", 900), ("nmi", 0)];
        let exits = exits.map(|(name, count)| (name.to_owned(), count)).into();
        assert_eq!(
            exits_text(&exits),
            "vCPUs left the guest: 1200 times, io 900, halt 200\n"
        );
    }

    #[test]
    fn an_interface_that_hands_packets_on_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = Host::new(dir.path());
        for (file, mask) in [
            ("lo/queues/rx-0/rps_cpus", "00"),
            ("enp6s0/queues/rx-0/rps_cpus", "ff"),
        ] {
            pinfold_core::testutils::write(dir.path(), &format!("sys/class/net/{file}"), mask);
        }
        let from = |cpus: &str| hands_on_to(&root, &cpus.parse().unwrap()).unwrap();
        assert_eq!(from("6").as_deref(), Some("enp6s0"));
        assert_eq!(from("8"), None);
    }

    #[test]
    fn times_for_people() {
        for (ns, text) in [
            (0, "0 us"),
            (2_500, "2 us"),
            (3_400_000, "3.4 ms"),
            (2_500_000_000, "2.50 s"),
        ] {
            assert_eq!(time(ns), text);
        }
    }

    #[test]
    fn a_setting_is_named_when_it_matters_and_is_not_used() {
        let host = MadeUpHost::new("5900x");
        host.file("sys/module/kvm/parameters/halt_poll_ns", "200000");
        for (cpu, governor) in [(0, "performance"), (6, "powersave")] {
            let policy = format!("sys/devices/system/cpu/cpufreq/policy{cpu}");
            host.file(&format!("{policy}/related_cpus"), &cpu.to_string());
            host.file(&format!("{policy}/scaling_governor"), governor);
        }
        host.vm(100, &[6]);
        let vmid = "100".parse().unwrap();
        let qemu = vm::require_running(&host.root, vmid).unwrap();
        let cpus: CpuSet = "6".parse().unwrap();
        let watch = Watch {
            root: &host.root,
            vmid,
            qemu: &qemu,
            vcpus: &VcpuThreads::new(),
            settings: None,
            elsewhere: &CpuSet::range(0, 23) - &cpus,
            cpus: &cpus,
        };
        let hints = |keys: &str, slices: u64, run_ns: u64, bound: u64| -> Vec<String> {
            let text = format!("isolated = \"6\"\npins = \"6\"\n{keys}");
            let settings = crate::settings::resolve(&host.root, &text, "test", 1).unwrap();
            let vcpu = Vcpu {
                vcpu: 0,
                cpus: cpus.clone(),
                run_ns,
                steal_ns: 0,
                slices,
            };
            let kthread = Disturbance {
                kind: Kind::Kthread,
                object: "kthread 50 (kworker/6:1)".into(),
                cpus: cpus.clone(),
                count: 1,
                ns: bound,
                measured: true,
                longest_ns: None,
                avoidable: false,
                advice: String::new(),
            };
            let hints = watch.hints(&settings, 2.0, &[vcpu], &[kthread]).unwrap();
            let keys = |hint: &String| {
                let keys = [
                    "halt_poll_ns",
                    "max_latency_us",
                    "vcpu_policy",
                    "housekeeping_governor",
                    "governor or energy_preference",
                ];
                keys.iter()
                    .find(|key| hint.contains(*key))
                    .unwrap()
                    .to_string()
            };
            hints.iter().map(keys).collect()
        };
        assert_eq!(hints("", 1_999, 999_999_999, 999_999), [""; 0]);
        assert_eq!(hints("", 2_000, 0, 0), ["halt_poll_ns", "max_latency_us"]);
        assert_eq!(
            hints("halt_poll_ns = 0\nmax_latency_us = 1", 2_000, 0, 0),
            [""; 0]
        );
        assert_eq!(hints("", 0, 0, 1_000_001), ["vcpu_policy"]);
        assert_eq!(hints("vcpu_policy = \"fifo:1\"", 0, 0, 1_000_001), [""; 0]);
        assert_eq!(hints("", 0, 1_000_000_001, 0), ["housekeeping_governor"]);
        assert_eq!(
            hints(
                "governor = \"keep\"\nhousekeeping_governor = \"powersave\"",
                0,
                1_000_000_001,
                0
            ),
            ["governor or energy_preference"]
        );
    }
}

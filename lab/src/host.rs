//! A lab host in use: boot, snapshots, commands, files.
//!
//! Three layers, each kept until what it was made from changes: the guest's image; a disk with the
//! snapshot `booted`, made once per image and machine; and in each slot's copy of that disk a
//! snapshot `ready-KEY` with the agent and the product's programs of that key in place.

use crate::cache::{self, Cache, Lock};
use crate::channel::{Channel, Pending};
use crate::guest::Guest;
use crate::image::Image;
use crate::progress::Progress;
use crate::protocol::{Answer, Ask, Bytes, Run};
use crate::qemu::{self, Slot, Threads};
use crate::snapshot::HostState;
use crate::strays::Strays;
use crate::vm::VmSpec;
use crate::{setup, tool};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Slots for each guest, unless `PINFOLD_LAB_SLOTS` is set.
const SLOTS: usize = 2;
/// A boot takes two minutes; two at a time on a busy machine take longer.
const BOOT_PATIENCE: Duration = Duration::from_secs(420);
/// In some boots an emulated CPU halts forever inside its timer interrupt (QEMU 10.0, TCG: its
/// local APIC has vector 236 in service and further ones pending), and whoever needs that CPU waits
/// without end. So each is tried before the snapshot is taken, which would keep that for all
/// stories; later it was never seen.
const BOOT_TRIES: usize = 4;
/// What the kernel prints then, two minutes later.
const HUNG: &str = "blocked for more than";
/// For everything that takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long `acquire` waits for another test to give a slot back.
const SLOT_PATIENCE: Duration = Duration::from_secs(1800);
/// Time limit of a command unless another is given.
const RUN_PATIENCE: Duration = Duration::from_secs(300);
/// How long an agent that may have gone is asked.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(200);
const CONSOLE_LINES: usize = 25;
const BOOTED: &str = "booted";
const AGENT: &str = "lab-agent";
const AGENT_PATH: &str = "/usr/local/lib/pinfold-lab/lab-agent";

/// After the boot: everything that would otherwise first happen in a test.
const SETTLE: &str = "\
set -e
state=$(systemctl is-system-running --wait || true)
[ \"$state\" = running ] || { echo \"system is $state\"; systemctl --failed --no-legend; exit 1; }
udevadm settle
[ -e /dev/kvm ] || { echo 'no /dev/kvm: kvm-amd is not loaded'; exit 1; }
[ \"$(ls -d /sys/devices/system/cpu/cpufreq/policy* | wc -l)\" = 24 ] || { echo 'not 24 cpufreq policies'; exit 1; }
timeout 60 qemu-system-x86_64 -accel kvm -smp 2 -m 64M -nodefaults -display none -S -daemonize -pidfile /run/warm.pid
pid=$(cat /run/warm.pid)
kill $pid
while kill -0 $pid 2>/dev/null; do sleep 0.1; done
# One VM of KVM's, empty, for good (ioctl KVM_CREATE_VM): with the first and after the last the kernel patches its
# context switch, and see EMULATOR_FAULT.
systemd-run -q --unit lab-kvm perl -e 'open my $kvm, \"+<\", \"/dev/kvm\" or die $!; ioctl $kvm, 0xae01, 0 or die $!; $0 = \"lab-kvm\"; sleep'
until pgrep -x lab-kvm > /dev/null; do sleep 0.1; done
# Every CPU runs and has a timer; see BOOT_TRIES.
for cpu in $(seq 0 23); do taskset -c $cpu sh -c \"sleep 0.1; echo $cpu >> /run/alive\" & done
for try in $(seq 100); do [ \"$(cat /run/alive | wc -l)\" = 24 ] && break; sleep 0.2; done
[ \"$(cat /run/alive | wc -l)\" = 24 ] || { echo \"of 24 CPUs run: $(sort -n /run/alive | tr '\\n' ' ')\"; exit 1; }
rm /run/alive
";

/// Folders as on a node of Proxmox VE: that of the VMs is a link, and root's group is www-data's.
const NODE: &str = "\
set -e
mkdir -p /etc/pve/nodes/pve1 /etc/pve/nodes/pve2/qemu-server
[ -L /etc/pve/qemu-server ] || {
    if [ -d /etc/pve/qemu-server ]; then mv /etc/pve/qemu-server /etc/pve/nodes/pve1; else mkdir /etc/pve/nodes/pve1/qemu-server; fi
    ln -s nodes/pve1/qemu-server /etc/pve/qemu-server
    ln -s nodes/pve1 /etc/pve/local
}
chgrp -R www-data /etc/pve
chmod -R o= /etc/pve
install -d -m 0750 -g www-data /run/qemu-server
";

/// A kernel that patches its code puts a breakpoint there for a moment. Under TCG a CPU may run
/// into it when it is gone, and then that is a bug to the kernel, which kills the process or panics
/// (<https://bugzilla.redhat.com/2216496>).
const EMULATOR_FAULT: &str = "int3: 0000";

/// How a command in the lab host ended, and its output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// It was killed for running longer than its time.
    pub timed_out: bool,
    /// It ended, but left something behind that holds its stdout or stderr open.
    pub left_open: bool,
    /// Standard output, what is not UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Output {
    /// Exited with 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// A command under way in the lab host.
#[derive(Debug)]
pub struct Job {
    pending: Pending,
    patience: Duration,
    slot: Slot,
}

impl Job {
    /// Waits for its end.
    pub fn wait(self) -> Result<Output> {
        // The agent kills it in time; this is for an agent that does not.
        let answer = self
            .pending
            .wait(self.patience + PATIENCE)
            .with_context(|| state_of(&self.slot));
        let done = match answer? {
            Answer::Done(done) => done,
            other => bail!("the agent: no end of a command but {other:?}"),
        };
        Ok(Output {
            code: done.code,
            signal: done.signal,
            timed_out: done.timed_out,
            left_open: done.left_open,
            stdout: String::from_utf8_lossy(&done.stdout.0).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr.0).into_owned(),
        })
    }
}

/// A running lab host, used only by us until dropped. Between uses its CPUs are stopped.
#[derive(Debug)]
pub struct Host {
    /// What it runs.
    pub guest: Guest,
    slot: Slot,
    channel: Option<Channel>,
    ready: String,
    image: Image,
    threads: Threads,
    _lock: Lock,
}

impl Host {
    /// A host in the state `ready`, with the programs found in `bins` on its PATH. Waits for a free
    /// slot.
    pub fn acquire(guest: Guest, bins: &Path) -> Result<Self> {
        Self::open(guest, None, Some(bins), false)
    }

    /// A host as its last user left it if it is still running, else in the state `ready`.
    /// `slot` is its number; none takes any that is free, a running one first.
    pub fn attach(guest: Guest, slot: Option<usize>, bins: Option<&Path>) -> Result<Self> {
        Self::open(guest, slot, bins, true)
    }

    fn open(
        guest: Guest,
        slot: Option<usize>,
        bins: Option<&Path>,
        as_it_is: bool,
    ) -> Result<Self> {
        let cache = Cache::open()?;
        let payload = Payload::collect(bins)?;
        let booted = Booted::ensure(&cache, guest)?;
        let (slot, lock) = take_slot(&cache, guest, slot)?;
        let ready = format!("ready-{}", payload.key);
        let image = booted.image.clone();
        let mut host = Self {
            guest,
            slot,
            channel: None,
            ready,
            image,
            threads: Threads::One,
            _lock: lock,
        };
        let _progress = Progress::start(&format!("{guest}: resuming a host"));
        host.up(&booted, &payload, as_it_is)
            .with_context(|| format!("{guest}: no lab host"))?;
        Ok(host)
    }

    /// Back to the state `ready`: nothing that ran or was changed since is left.
    pub fn reset(&mut self) -> Result<()> {
        let ready = self.ready.clone();
        self.load(&ready)
    }

    /// The same, with a thread of QEMU's for each CPU from now on, see [`Threads`].
    pub fn reset_in_parallel(&mut self) -> Result<()> {
        self.threads = Threads::Each;
        self.reset()
    }

    /// Keeps the present state under a name, until the lab's programs change.
    pub fn save(&mut self, name: &str) -> Result<()> {
        let mut qmp = self.slot.qmp()?;
        qmp.hmp_quiet(&format!("savevm {name}"))
    }

    /// Whether a state of this name is kept.
    pub fn has(&self, name: &str) -> Result<bool> {
        Ok(self.states()?.iter().any(|tag| tag == name))
    }

    fn states(&self) -> Result<Vec<String>> {
        let listing = tool::run(
            setup::command("qemu-img")
                .args(["snapshot", "-U", "-l"])
                .arg(self.slot.disk()),
        )?;
        Ok(tags(&listing))
    }

    /// Back to the state kept under this name.
    ///
    /// In a new process: QEMU's emulated TSC never goes back within one (`cpu_ticks_prev` in its
    /// cpu-timers.c), so that after a mere `loadvm` the guest's clock would leap ahead of its
    /// timers.
    pub fn load(&mut self, name: &str) -> Result<()> {
        self.channel = None;
        self.slot.kill()?;
        self.slot.start(self.guest, &self.image, self.threads)?;
        let mut qmp = self.slot.qmp()?;
        qmp.hmp_quiet(&format!("loadvm {name}"))?;
        qmp.execute("cont", json!({}))?;
        drop(qmp);
        self.connect(PATIENCE)
    }

    /// Runs a program; its exit code is the caller's business.
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        self.spawn(argv, RUN_PATIENCE)?.wait()
    }

    /// Runs a shell script.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.run(&["/bin/sh", "-c", script])
    }

    /// Runs a shell script that must exit with 0; what it printed.
    pub fn ok(&self, script: &str) -> Result<String> {
        let output = self.sh(script)?;
        if !output.success() {
            bail!("in the lab host, `{script}`: {}", outcome(&output));
        }
        Ok(output.stdout)
    }

    /// Starts a program and goes on; it is killed after `patience`.
    pub fn spawn(&self, argv: &[&str], patience: Duration) -> Result<Job> {
        let argv = argv.iter().map(|&word| word.to_owned()).collect();
        self.start(
            Run {
                argv,
                ..Run::default()
            },
            patience,
        )
    }

    /// Starts a program with input and variables of its own.
    pub fn start(&self, run: Run, patience: Duration) -> Result<Job> {
        let timeout_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let pending = self.channel()?.ask(Ask::Run(Run { timeout_ms, ..run }))?;
        Ok(Job {
            pending,
            patience,
            slot: self.slot.clone(),
        })
    }

    /// Writes a file in the lab host; one under /proc or /sys must be there already.
    pub fn put(&self, path: &str, data: &[u8], mode: u32) -> Result<()> {
        let ask = Ask::Put {
            path: path.to_owned(),
            mode,
            data: Bytes(data.to_vec()),
        };
        self.channel()?.ask(ask)?.wait(PATIENCE)?;
        Ok(())
    }

    /// Reads a file in the lab host.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        match self
            .channel()?
            .ask(Ask::Get {
                path: path.to_owned(),
            })?
            .wait(PATIENCE)?
        {
            Answer::Content(Bytes(data)) => Ok(data),
            other => bail!("the agent: no content of {path} but {other:?}"),
        }
    }

    /// Describes a VM and starts it as PVE does, hook and all.
    pub fn start_vm(&self, spec: &VmSpec) -> Result<String> {
        self.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)?;
        self.ok(&format!("qm start {} 2>&1", spec.id))
    }

    /// Stops a VM, hook and all; what the task log would show.
    pub fn stop_vm(&self, id: u32) -> Result<String> {
        self.ok(&format!("qm stop {id} 2>&1"))
    }

    /// Kills a VM's QEMU and cleans up nothing else.
    pub fn kill_vm(&self, id: u32) -> Result<()> {
        let pid_file = format!("/run/qemu-server/{id}.pid");
        self.ok(&format!(
            "pid=$(cat {pid_file}) && kill -KILL $pid && while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
        ))?;
        Ok(())
    }

    /// Does what PVE does after a QEMU has gone by itself; `hook` is whether post-stop is called.
    pub fn cleanup_vm(&self, id: u32, hook: bool) -> Result<String> {
        self.ok(&format!(
            "qm cleanup {id} {} 2>&1",
            if hook { "" } else { "--no-hook" }
        ))
    }

    /// The state of the whole host now.
    pub fn snapshot(&self) -> Result<HostState> {
        Ok(HostState::parse(
            &self.ok(&format!("{AGENT_PATH} snapshot"))?,
        ))
    }

    /// What may still run on these CPUs but for the vCPU threads of these VMs, and what of these
    /// may run elsewhere.
    pub fn strays(&self, cpus: &str, vms: &[u32]) -> Result<Strays> {
        let vms: Vec<(u32, &str)> = vms.iter().map(|vm| (*vm, cpus)).collect();
        self.strays_of(cpus, &vms)
    }

    /// The same for VMs with these CPUs each.
    pub fn strays_of(&self, cpus: &str, vms: &[(u32, &str)]) -> Result<Strays> {
        let vms: String = vms
            .iter()
            .map(|(vm, own)| format!(" --vm {vm}={own}"))
            .collect();
        let json = self.ok(&format!("{AGENT_PATH} strays {cpus}{vms}"))?;
        serde_json::from_str(&json).context("the agent's list of strays: not as expected")
    }

    /// The kernel's report if it broke since the host was reset, through no fault of its own
    /// but of the emulator's.
    pub fn emulator_fault(&self) -> Option<String> {
        fault_in(&self.slot.console_tail(1000))
    }

    /// Renews the 5900X numbering, which CPU hotplug takes away.
    pub fn renew_topology(&self) -> Result<()> {
        self.ok(&format!("{AGENT_PATH} topology")).map(drop)
    }

    /// The folder of its files: socket of the console, its log.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    fn channel(&self) -> Result<&Channel> {
        self.channel
            .as_ref()
            .ok_or_else(|| anyhow!("the lab host lost its agent: reset it"))
    }

    fn connect(&mut self, patience: Duration) -> Result<()> {
        self.channel = Some(
            Channel::connect(&self.slot.agent(), patience).with_context(|| state_of(&self.slot))?,
        );
        Ok(())
    }

    /// Running, with the wanted programs in it.
    fn up(&mut self, booted: &Booted, payload: &Payload, as_it_is: bool) -> Result<()> {
        let key = self.slot.folder().join("key");
        if !fs::read_to_string(&key).is_ok_and(|found| found == booted.key) {
            self.slot.kill()?;
            // Removed first and written last, so that an incomplete copy is not taken for a disk.
            let _ = fs::remove_file(&key);
            cache::make(self.slot.folder())?;
            let mut copy = setup::command("cp");
            copy.args(["--reflink=auto", "--sparse=always"])
                .args([&booted.disk, &self.slot.disk()]);
            tool::run(&mut copy)?;
            cache::write(&key, &booted.key)?;
        }
        if !self.has(&self.ready)? {
            return self
                .make_ready(payload)
                .with_context(|| state_of(&self.slot));
        }
        if as_it_is && self.slot.pid().is_some() {
            self.slot.qmp()?.execute("cont", json!({}))?;
            if self.connect(GREETING_PATIENCE).is_ok() {
                return Ok(());
            }
            // What an interrupted user left may not answer.
        }
        self.reset()
    }

    fn make_ready(&mut self, payload: &Payload) -> Result<()> {
        self.slot.kill()?;
        for tag in self.states()?.iter().filter(|tag| *tag != BOOTED) {
            tool::run(
                setup::command("qemu-img")
                    .args(["snapshot", "-d", tag])
                    .arg(self.slot.disk()),
            )?;
        }
        payload.hand_in(&self.slot)?;
        self.load(BOOTED)?;
        // The restart ends the agent before it can answer.
        self.ok("rm -rf /opt/pinfold/bin/*")?;
        drop(self.spawn(
            &["systemctl", "restart", "--no-block", "lab-agent"],
            PATIENCE,
        )?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The old agent may still answer, or be gone in the middle of it.
            self.channel = None;
            match Channel::connect(&self.slot.agent(), GREETING_PATIENCE) {
                Ok(channel) if channel.payload == payload.key => {
                    self.channel = Some(channel);
                    break;
                }
                _ if Instant::now() < deadline => thread::sleep(POLL),
                Ok(_) => bail!("the agent in the lab host was not replaced within {PATIENCE:?}"),
                Err(err) => return Err(err.context("the new agent does not answer")),
            }
        }
        self.renew_topology()?;
        self.ok(NODE)?;
        self.ok("qm list >/dev/null && sync")?;
        let ready = self.ready.clone();
        self.save(&ready)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.channel = None;
        // An idle host need not use the machine; a dead one cannot.
        let _ = self
            .slot
            .qmp()
            .and_then(|mut qmp| qmp.execute("stop", json!({})));
    }
}

/// A disk with the snapshot of a host just booted.
struct Booted {
    key: String,
    disk: PathBuf,
    image: Image,
}

impl Booted {
    fn ensure(cache: &Cache, guest: Guest) -> Result<Self> {
        setup::ensure(cache)?;
        let image = Image::ensure(cache, guest)?;
        let protocol = include_str!("protocol.rs");
        let key = cache::key([
            image.key.as_str(),
            &qemu::machine_key(guest)?,
            protocol,
            SETTLE,
        ]);
        let disk = cache.path(format!("booted/{guest}-{key}.qcow2"));
        let booted = Self { key, disk, image };
        if !booted.disk.exists() {
            let _booter = cache.lock(&format!("booted/{guest}.lock"), SLOT_PATIENCE)?;
            if !booted.disk.exists() {
                let _progress = Progress::start(&format!("{guest}: booting a host"));
                booted
                    .boot(cache, guest)
                    .with_context(|| format!("{guest}: cannot boot"))?;
            }
        }
        Ok(booted)
    }

    fn boot(&self, cache: &Cache, guest: Guest) -> Result<()> {
        let slot = Slot::new(cache.path(format!("booted/{guest}")));
        slot.kill()?;
        Payload::collect(None)?.hand_in(&slot)?;
        let mut create = setup::command("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&self.image.disk(), &slot.disk()]);
        for tries_left in (0..BOOT_TRIES).rev() {
            tool::run(&mut create)?;
            slot.start(guest, &self.image, Threads::One)?;
            let booted = settle(&slot).with_context(|| state_of(&slot));
            slot.kill()?;
            match booted {
                Err(_) if tries_left > 0 => {}
                booted => {
                    booted?;
                    break;
                }
            }
        }
        fs::rename(slot.disk(), &self.disk)
            .with_context(|| format!("{}: cannot make", self.disk.display()))
    }
}

fn settle(slot: &Slot) -> Result<()> {
    slot.qmp()?.execute("cont", json!({}))?;
    let deadline = Instant::now() + BOOT_PATIENCE;
    let channel = loop {
        match Channel::connect(&slot.agent(), GREETING_PATIENCE) {
            Err(error) if Instant::now() > deadline || slot.console_tail(1000).contains(HUNG) => {
                return Err(error);
            }
            Err(_) => thread::sleep(POLL),
            Ok(channel) => break channel,
        }
    };
    let argv = ["/bin/sh", "-c", SETTLE].map(str::to_owned).to_vec();
    let timeout_ms = u64::try_from(BOOT_PATIENCE.as_millis()).unwrap_or(u64::MAX);
    let pending = channel.ask(Ask::Run(Run {
        argv,
        timeout_ms,
        ..Run::default()
    }))?;
    let output = Job {
        pending,
        patience: BOOT_PATIENCE,
        slot: slot.clone(),
    }
    .wait()?;
    if !output.success() {
        bail!("it did not settle: {}", outcome(&output));
    }
    slot.qmp()?.hmp_quiet(&format!("savevm {BOOTED}"))
}

/// The files a host is given: the agent, its key, the product's programs.
struct Payload {
    key: String,
    /// Source and the path in the guest, relative to the root.
    files: Vec<(PathBuf, PathBuf)>,
}

impl Payload {
    fn collect(bins: Option<&Path>) -> Result<Self> {
        let mut files = vec![(
            agent_binary()?,
            PathBuf::from("usr/local/lib/pinfold-lab/lab-agent"),
        )];
        for program in bins.map_or_else(|| Ok(Vec::new()), programs)? {
            let name = program.file_name().unwrap_or_default();
            let place = Path::new("opt/pinfold/bin").join(name);
            files.push((program, place));
        }
        let mut parts = Vec::new();
        for (source, place) in &files {
            parts.push(place.as_os_str().as_encoded_bytes().to_vec());
            parts.push(cache::read(source)?);
        }
        Ok(Self {
            key: cache::key(parts),
            files,
        })
    }

    fn hand_in(&self, slot: &Slot) -> Result<()> {
        let tree = slot.folder().join("payload");
        // Left by one who was killed.
        let _ = fs::remove_dir_all(&tree);
        for (source, place) in &self.files {
            let target = tree.join(place);
            target.parent().map_or(Ok(()), cache::make)?;
            fs::copy(source, &target)
                .with_context(|| format!("{}: cannot copy", source.display()))?;
        }
        cache::write(&tree.join("usr/local/lib/pinfold-lab/key"), &self.key)?;
        slot.write_payload(&tree)?;
        fs::remove_dir_all(&tree).with_context(|| format!("{}: cannot remove", tree.display()))
    }
}

/// The programs in a build folder: executable files without an extension, the lab's own left out.
fn programs(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("{}: cannot list the programs to test", folder.display()))?;
    let executable = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let own = |path: &PathBuf| {
        path.extension().is_some()
            || [Some(OsStr::new("lab")), Some(OsStr::new(AGENT))].contains(&path.file_name())
    };
    let mut programs = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("{}: cannot list", folder.display()))?
            .path();
        if executable(&path) && !own(&path) {
            programs.push(path);
        }
    }
    programs.sort();
    Ok(programs)
}

/// The agent: built beside the program we are, or beside the folder of the test we are.
fn agent_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PINFOLD_LAB_AGENT") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("cannot find this program's own path")?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(AGENT))
        .find(|path| path.is_file());
    found.ok_or_else(|| {
        anyhow!(
            "{AGENT}: not built beside {}: run `cargo build -p pinfold-lab`",
            own.display()
        )
    })
}

fn slots() -> usize {
    std::env::var("PINFOLD_LAB_SLOTS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(SLOTS)
        .max(1)
}

fn slot_folder(guest: Guest, number: usize) -> String {
    format!("hosts/{guest}-{number}")
}

fn take_slot(cache: &Cache, guest: Guest, wanted: Option<usize>) -> Result<(Slot, Lock)> {
    let slot = |number| Slot::new(cache.path(slot_folder(guest, number)));
    let lock_name = |number| format!("{}.lock", slot_folder(guest, number));
    if let Some(number) = wanted {
        return Ok((slot(number), cache.lock(&lock_name(number), SLOT_PATIENCE)?));
    }
    let mut numbers: Vec<usize> = (0..slots()).collect();
    numbers.sort_by_key(|&number| slot(number).pid().is_none());
    let deadline = Instant::now() + SLOT_PATIENCE;
    loop {
        for &number in &numbers {
            if let Some(lock) = cache.try_lock(lock_name(number))? {
                return Ok((slot(number), lock));
            }
        }
        if Instant::now() > deadline {
            bail!(
                "{guest}: all {} lab hosts are in use for {SLOT_PATIENCE:?} now: `lab status` lists them",
                numbers.len()
            );
        }
        thread::sleep(POLL);
    }
}

/// All slots, with the process of each that runs.
pub fn all_slots(cache: &Cache) -> Vec<(String, Slot)> {
    let folders = ["hosts", "booted"]
        .into_iter()
        .filter_map(|parent| fs::read_dir(cache.path(parent)).ok());
    let folders = folders
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir());
    let mut slots: Vec<_> = folders
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                Slot::new(entry.path()),
            )
        })
        .collect();
    slots.sort_by(|a, b| a.0.cmp(&b.0));
    slots
}

/// The lock of a slot, if no other process holds it.
pub(crate) fn lock_if_free(cache: &Cache, slot: &Slot) -> Result<Option<Lock>> {
    cache.try_lock(slot.folder().with_extension("lock"))
}

fn outcome(output: &Output) -> String {
    let end = match (output.timed_out, output.code, output.signal) {
        (true, ..) => "killed at its time limit".to_owned(),
        (_, Some(code), _) => format!("exit code {code}"),
        (_, _, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    format!(
        "{end}\nstdout: {}\nstderr: {}",
        output.stdout.trim_end(),
        output.stderr.trim_end()
    )
}

/// What a host last showed, for an error.
fn state_of(slot: &Slot) -> String {
    let life = if slot.pid().is_some() {
        "runs"
    } else {
        "is gone"
    };
    let (log, shown) = (slot.last_words(), slot.console_tail(CONSOLE_LINES));
    format!("its QEMU {life}; QEMU's last messages:\n{log}\nlast lines of its console:\n{shown}\n")
}

/// The kernel's report of [`EMULATOR_FAULT`], its first lines.
fn fault_in(console: &str) -> Option<String> {
    let report = console
        .lines()
        .skip_while(|line| !line.contains(EMULATOR_FAULT));
    let text = report.take(4).collect::<Vec<_>>().join("\n");
    (!text.is_empty()).then_some(text)
}

/// The tags in what `qemu-img snapshot -l` prints, in lines of `ID TAG SIZE DATE ...`.
fn tags(listing: &str) -> Vec<String> {
    let lines = listing
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let snapshots = lines.filter(|words| words.len() > 4 && words.first() != Some(&"ID"));
    snapshots
        .filter_map(|words| words.get(1).map(|&tag| tag.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_tags_are_read() {
        let listing = "Snapshot list:\n\
            ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT\n\
            1         booted            642 MiB 2026-01-02 03:04:05 00:01:42.043\n\
            2         ready-00ff        650 MiB 2026-01-02 03:04:05 00:01:44.043\n";
        assert_eq!(tags(listing), ["booted", "ready-00ff"]);
        assert!(tags("").is_empty());
    }

    #[test]
    fn the_emulators_fault_is_distinguished_from_the_kernels_own() {
        let console = "[    1.0] Linux\n[   97.1] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n[   97.1] CPU: 2\n";
        assert_eq!(fault_in(console).unwrap().lines().count(), 2);
        assert_eq!(
            fault_in("[   97.1] BUG: kernel NULL pointer dereference\n[   97.1] Oops: 0002 [#1]\n"),
            None
        );
    }

    #[test]
    fn programs_are_distinguished_from_other_files() {
        let folder = tempfile::tempdir().unwrap();
        for (name, mode) in [
            ("hook", 0o755),
            ("pin-irqs", 0o755),
            ("hook.d", 0o755),
            ("notes", 0o644),
            ("lab", 0o755),
        ] {
            let path = folder.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let found = programs(folder.path()).unwrap();
        assert_eq!(
            found,
            ["hook", "pin-irqs"].map(|name| folder.path().join(name))
        );
    }
}

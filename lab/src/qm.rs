//! A stand-in for Proxmox VE's `qm`, run inside the lab host.
//!
//! It starts, ends and reports VMs the way `PVE::QemuServer` does, as far as a tool that watches
//! from outside can observe: the VM's lock, the hook's phases and who sees their failure, the
//! scope in qemu.slice, the pid file, the QMP socket, threads and helper processes. The disks are
//! null devices and the guest is only firmware.
//!
//! What only happens in a cluster or with storage is reduced to what a hook sees of it: a migration
//! that comes from another node is a start from a state in a file, with VMID.conf at that node;
//! `vzdump-begin` and `vzdump-end` are a backup without its data.

use crate::cache;
use crate::qmp::Qmp;
use crate::tool;
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const CONFS: &str = "/etc/pve/qemu-server";
const NODES: &str = "/etc/pve/nodes";
const RUN: &str = "/run/qemu-server";
const LOCKS: &str = "/run/lock/qemu-server";
const SNIPPETS: &str = "/var/lib/vz/snippets";
const HELPER: &str = "/usr/local/lib/pinfold-lab/swtpm";
/// Firmware that halts.
const HALT_ROM: &str = "/usr/local/lib/pinfold-lab/halt.rom";
/// As PVE's own.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const SCOPE_PATIENCE: Duration = Duration::from_secs(60);
const QMP_PATIENCE: Duration = Duration::from_secs(20);
/// A guest without an operating system never obeys the power button: this long after it QEMU is
/// asked to quit.
const POWERDOWN_GRACE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(50);
/// How often PVE looks whether a QEMU that it stops has gone.
const LOOK: Duration = Duration::from_secs(1);
/// Where a VM's RAM is kept while it is suspended, or migrated.
const STATES: &str = "/var/lib/pinfold-lab";
/// For a VM's RAM to be written or read.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// `qm COMMAND [VMID] [OPTION…]`.
pub fn main(args: &[&str]) -> Result<()> {
    if let ["set", id, options @ ..] = args
        && !options.contains(&"--hookscript")
        && *options != ["--delete", "hookscript"]
    {
        let vm = Vm::new(id)?;
        return vm.locked(|| {
            vm.check_lock()?;
            vm.set(options)
        });
    }
    // A powered down VM of the lab is never waited for so long that a time of one's own would
    // count.
    let args = args
        .iter()
        .enumerate()
        .filter(|(at, _)| *at == 0 || args[at - 1] != "--timeout")
        .map(|(_, word)| *word);
    let (words, options): (Vec<&str>, Vec<&str>) = args.partition(|word| !word.starts_with("--"));
    let option = |name: &str| options.contains(&name);
    let value = |name: &str| {
        let value = |option: &&str| {
            option
                .strip_prefix(name)?
                .strip_prefix('=')
                .map(str::to_owned)
        };
        options.iter().find_map(value)
    };
    let start = || Start {
        paused: option("--paused"),
        incoming: option("--incoming"),
        migrated_from: value("--migratedfrom"),
    };
    match words.as_slice() {
        ["list"] => list(),
        ["set", id, value] => {
            let vm = Vm::new(id)?;
            vm.locked(|| vm.set_hookscript(Some(*value).filter(|_| !option("--delete"))))
        }
        ["clone", id, new] => Vm::new(id)?.clone_to(&Vm::new(new)?),
        [command, id] => {
            let vm = Vm::new(id)?;
            match *command {
                "start" => vm.locked(|| {
                    vm.check_lock()?;
                    vm.start(&start())
                }),
                "stop" => vm.locked(|| {
                    vm.check_lock()?;
                    vm.stop(false)
                }),
                "shutdown" => vm.locked(|| {
                    vm.check_lock()?;
                    vm.stop(true)
                }),
                "poweroff" => vm.power_off(),
                "suspend" => vm.locked(|| vm.suspend(Some("suspended"))),
                "resume" => vm.locked(|| vm.resume()),
                "rollback" => vm.locked(|| vm.roll_back()),
                "live-restore" => vm.locked(|| vm.live_restore()),
                "vzdump-begin" => vm.locked(|| vm.begin_backup()),
                "vzdump-end" => vm.locked(|| vm.end_backup()),
                "status" => vm.status(),
                "cleanup" => vm.locked(|| vm.cleanup(!option("--no-hook"))),
                "scope" => vm.enter(&start()),
                _ => usage(),
            }
        }
        _ => usage(),
    }
}

fn usage() -> Result<()> {
    bail!(
        "usage: qm start VMID [--paused] [--incoming] [--migratedfrom=NODE] | stop VMID | shutdown VMID | poweroff VMID | \
         suspend VMID | resume VMID | rollback VMID | clone VMID NEWID | live-restore VMID | vzdump-begin VMID | \
         vzdump-end VMID | status VMID | cleanup VMID [--no-hook] | set VMID --KEY VALUE | \
         set VMID --delete KEYS | list"
    )
}

/// How a VM is started.
#[derive(Debug, Default)]
struct Start {
    /// QEMU waits for `cont`.
    paused: bool,
    /// From the RAM that [`Vm::suspend`] has kept.
    incoming: bool,
    /// The node that still has VMID.conf.
    migrated_from: Option<String>,
}

impl Start {
    fn options(&self) -> Vec<String> {
        let source = self.migrated_from.as_ref();
        [
            self.paused.then(|| "--paused".to_owned()),
            self.incoming.then(|| "--incoming".to_owned()),
            source.map(|source| format!("--migratedfrom={source}")),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// The helper's whole life: until the QEMU that holds the other end of its stdin is gone.
pub fn helper() -> Result<()> {
    let mut rest = Vec::new();
    std::io::stdin()
        .read_to_end(&mut rest)
        .context("stdin: cannot read")?;
    Ok(())
}

struct Vm {
    id: u32,
}

impl Vm {
    fn new(id: &str) -> Result<Self> {
        match id.parse() {
            Ok(id @ 100..=999_999_999) => Ok(Self { id }),
            _ => bail!("400 Parameter verification failed: vmid: {id}: not a VMID"),
        }
    }

    fn conf_path(&self) -> String {
        format!("{CONFS}/{}.conf", self.id)
    }

    fn conf(&self) -> Result<Conf> {
        self.conf_at(self.conf_path())
    }

    /// The settings as a start reads them: at the node that a migration comes from.
    fn conf_for(&self, start: &Start) -> Result<Conf> {
        match &start.migrated_from {
            None => self.conf(),
            Some(node) => self.conf_at(format!("{NODES}/{node}/qemu-server/{}.conf", self.id)),
        }
    }

    fn conf_at(&self, path: String) -> Result<Conf> {
        let text = fs::read_to_string(&path);
        Ok(Conf::parse(&text.with_context(|| {
            format!("Configuration file '{path}' does not exist")
        })?))
    }

    fn file(&self, extension: &str) -> PathBuf {
        Path::new(RUN).join(format!("{}.{extension}", self.id))
    }

    /// The living QEMU, checked as PVE does: the pid file's process is a kvm with this very pid
    /// file.
    fn pid(&self) -> Option<Pid> {
        let pid: i32 = fs::read_to_string(self.file("pid"))
            .ok()?
            .trim()
            .parse()
            .ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let own = self.file("pid");
        command
            .split(|&byte| byte == 0)
            .any(|word| word == own.as_os_str().as_encoded_bytes())
            .then(|| Pid::from_raw(pid))
    }

    fn locked<T>(&self, action: impl FnOnce() -> Result<T>) -> Result<T> {
        cache::make(Path::new(LOCKS))?;
        let path = format!("{LOCKS}/lock-{}.conf", self.id);
        let deadline = Instant::now() + LOCK_PATIENCE;
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| path.clone())?;
        let _lock: Flock<File> = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = back,
                Err((_, Errno::EWOULDBLOCK)) => bail!("can't lock file '{path}' - got timeout"),
                Err((_, errno)) => return Err(errno).context(path),
            }
            thread::sleep(POLL);
        };
        action()
    }

    /// Refuses while another task holds the VM, which `--skiplock` would ignore.
    fn check_lock(&self) -> Result<()> {
        // What is missing is found later.
        match self
            .conf()
            .ok()
            .and_then(|conf| conf.get("lock").map(str::to_owned))
        {
            Some(lock) => bail!("VM is locked ({lock})"),
            None => Ok(()),
        }
    }

    /// Writes `lock:` into VMID.conf, or takes it out.
    fn set_lock(&self, lock: Option<&str>) -> Result<()> {
        let path = self.conf_path();
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let rest = text.lines().filter(|line| !line.starts_with("lock: "));
        let rest: String = rest.map(|line| format!("{line}\n")).collect();
        let lock = lock
            .map(|lock| format!("lock: {lock}\n"))
            .unwrap_or_default();
        cache::write(Path::new(&path), lock + &rest)
    }

    /// Sets keys of VMID.conf, and removes those of `--delete`; of a VM that runs below `[PENDING]`,
    /// since all that is taken here needs a new QEMU.
    fn set(&self, options: &[&str]) -> Result<()> {
        let (mut set, mut delete) = (Vec::new(), Vec::new());
        for option in options.chunks(2) {
            let [name, value] = option else {
                bail!("400 not enough arguments");
            };
            match name.strip_prefix("--") {
                Some("delete") => delete.extend(value.split(',')),
                Some(key) if is_known(key) => {
                    check_value(key, value)?;
                    set.push((key, *value));
                }
                _ => bail!("Unknown option: {name}\n400 unable to parse option"),
            }
        }
        if let Some((key, _)) = set.iter().find(|(key, _)| delete.contains(key)) {
            bail!(
                "400 Parameter verification failed.\n{key}: cannot set and delete at the same time"
            );
        }
        let path = self.conf_path();
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        let words: Vec<String> = set
            .iter()
            .map(|(key, value)| format!("-{key} {value}"))
            .collect();
        self.report(&format!("update VM {}: {}", self.id, words.join(" ")));
        if self.pid().is_some() {
            let pending = set.iter().map(|(key, value)| format!("{key}: {value}\n"));
            let deleted = match delete[..] {
                [] => String::new(),
                _ => format!("delete: {}\n", delete.join(",")),
            };
            let pending = deleted + &pending.collect::<String>();
            return cache::write(Path::new(&path), text + "\n[PENDING]\n" + &pending);
        }
        let (main, sections) = match text.find("\n[") {
            Some(at) => text.split_at(at + 1),
            None => (text.as_str(), ""),
        };
        let key_of = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
        let mut lines: Vec<String> = main
            .lines()
            .filter(|line| !line.is_empty())
            .filter(|line| {
                let key = key_of(line);
                !delete.contains(&key.as_str()) && !set.iter().any(|(set, _)| *set == key)
            })
            .map(str::to_owned)
            .collect();
        lines.extend(set.iter().map(|(key, value)| format!("{key}: {value}")));
        // Proxmox VE writes the keys in order, comments first.
        lines.sort_by_key(|line| (!line.starts_with('#'), key_of(line)));
        let lines: String = lines.into_iter().map(|line| line + "\n").collect();
        cache::write(Path::new(&path), lines + sections)
    }

    fn start(&self, start: &Start) -> Result<()> {
        let conf = self.conf_for(start)?;
        if self.pid().is_some() {
            bail!("VM {} already running", self.id);
        }
        self.hook(&conf, "pre-start", start.migrated_from.as_deref())?;
        self.await_scope_gone()?;
        cache::make(Path::new(RUN))?;
        let mut scope = Command::new("systemd-run");
        scope.args([
            "--quiet",
            "--scope",
            "--slice=qemu.slice",
            &format!("--unit={}", self.id),
            &format!("--description=Proxmox VE VM {}", self.id),
        ]);
        // What PVE::QemuServer gives its scopes.
        scope.args([
            "-pKillMode=process",
            "-pSendSIGKILL=no",
            "-pTimeoutStopSec=infinity",
            "-pAfter=dbus.service",
            "-pBefore=pve-ha-lrm.service pve-guests.service",
        ]);
        scope.arg(format!(
            "-pCPUWeight={}",
            conf.get("cpuunits").unwrap_or("100")
        ));
        if let Some(quota) = conf.cpu_quota() {
            scope.arg(format!("-pCPUQuota={quota}%"));
        }
        scope
            .args(["qm", "scope", &self.id.to_string()])
            .args(start.options());
        tool::run(&mut scope).with_context(|| format!("start failed: VM {}", self.id))?;
        let started = self.hook(&conf, "post-start", start.migrated_from.as_deref());
        self.warn(started, "post-start");
        Ok(())
    }

    /// Inside the scope: the helper, then QEMU in our place.
    fn enter(&self, start: &Start) -> Result<()> {
        let conf = self.conf_for(start)?;
        // Held open by QEMU: its end ends the helper.
        let _alive = conf.get("tpmstate0").map(|_| start_helper()).transpose()?;
        let mut words = conf.affinity_prefix();
        words.extend(self.command(&conf)?);
        if start.paused || start.incoming || conf.get("freeze") == Some("1") {
            words.push("-S".to_owned());
        }
        if start.incoming {
            words.extend(["-incoming".to_owned(), format!("exec:cat {}", self.state())]);
        } else if start.migrated_from.is_some() {
            // Nothing comes: the source gives up.
            words.extend(["-incoming", "defer"].map(str::to_owned));
        }
        let [program, args @ ..] = words.as_slice() else {
            bail!("no program")
        };
        Err(Command::new(program).args(args).exec())
            .with_context(|| format!("{program}: cannot run"))
    }

    /// The file with the VM's RAM.
    fn state(&self) -> String {
        format!("{STATES}/{}.state", self.id)
    }

    fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.file("qmp"), QMP_PATIENCE)
    }

    /// The guest switches its machine off: qmeventd sees QEMU's socket close and has `qm cleanup`
    /// call post-stop at once, without a pre-stop.
    fn power_off(&self) -> Result<()> {
        self.qmp()?.execute("quit", json!({}))?;
        self.locked(|| self.cleanup(true))
    }

    /// Keeps the VM's RAM in a file and ends it: post-stop without a pre-stop.
    fn suspend(&self, lock: Option<&str>) -> Result<()> {
        cache::make(Path::new(STATES))?;
        let mut qmp = self.qmp()?;
        qmp.execute("stop", json!({}))?;
        let uri = format!("exec:cat > {}", self.state());
        qmp.execute("migrate", json!({"uri": uri}))?;
        self.await_migration(&mut qmp, "completed")?;
        qmp.execute("quit", json!({}))?;
        drop(qmp);
        self.set_lock(lock)?;
        self.cleanup(true)
    }

    fn await_migration(&self, qmp: &mut Qmp, state: &str) -> Result<()> {
        let mut last = String::new();
        let done = wait_until(STATE_PATIENCE, || {
            let answer = qmp.execute("query-migrate", json!({}));
            last = answer.map_or_else(|error| format!("{error:#}"), |answer| answer.to_string());
            last.contains(&format!("\"status\":\"{state}\""))
        });
        match done {
            true => Ok(()),
            false => bail!("VM {}: its RAM was not moved: {last}", self.id),
        }
    }

    /// From a file if it is suspended; else only `cont`, for which there is no hook.
    fn resume(&self) -> Result<()> {
        if self.pid().is_none() {
            return self.resume_from_file();
        }
        self.run_guest()
    }

    fn resume_from_file(&self) -> Result<()> {
        self.set_lock(None)?;
        self.start(&Start {
            incoming: true,
            ..Start::default()
        })?;
        self.run_guest()
    }

    /// Lets a guest run that waits, once its RAM is there.
    fn run_guest(&self) -> Result<()> {
        let mut qmp = self.qmp()?;
        let mut waits = true;
        wait_until(STATE_PATIENCE, || {
            let status = qmp.execute("query-status", json!({}));
            waits = status.is_ok_and(|status| status.to_string().contains("inmigrate"));
            !waits
        });
        qmp.execute("cont", json!({})).map(drop)
    }

    /// A snapshot with RAM is taken, and the VM goes back to it.
    fn roll_back(&self) -> Result<()> {
        self.suspend(Some("rollback"))?;
        self.resume_from_file()
    }

    /// The clone has all of the settings at PVE, the hookscript too.
    fn clone_to(&self, new: &Self) -> Result<()> {
        let text = fs::read_to_string(self.conf_path()).with_context(|| self.conf_path())?;
        let text = text.replace(&format!("vm{}", self.id), &format!("vm{}", new.id));
        cache::write(Path::new(&new.conf_path()), text)
    }

    /// `qm set --hookscript` and `--delete hookscript`, with the check of `check_hookscript` in
    /// PVE::GuestHelpers.
    fn set_hookscript(&self, volume: Option<&str>) -> Result<()> {
        if let Some(volume) = volume {
            let Some(name) = volume.strip_prefix("local:snippets/") else {
                bail!("400 Parameter verification failed. hookscript: {volume}: not a volume");
            };
            let path = Path::new(SNIPPETS).join(name);
            let mode = fs::metadata(&path).map_or(0, |file| file.permissions().mode());
            if mode & 0o111 == 0 {
                bail!("script '{volume}' does not exist or is not executable");
            }
        }
        let text = fs::read_to_string(self.conf_path()).with_context(|| self.conf_path())?;
        let (now, snapshots) = match text.find("\n[") {
            Some(at) => text.split_at(at + 1),
            None => (text.as_str(), ""),
        };
        let mut new: String = now
            .lines()
            .filter(|line| !line.starts_with("hookscript:"))
            .map(|line| format!("{line}\n"))
            .collect();
        if let Some(volume) = volume {
            new += &format!("hookscript: {volume}\n");
        }
        cache::write(Path::new(&self.conf_path()), new + snapshots)
    }

    /// The VM runs while its disks are still being read from the backup: started paused, and continued
    /// without a hook.
    fn live_restore(&self) -> Result<()> {
        self.set_lock(Some("create"))?;
        self.start(&Start {
            paused: true,
            ..Start::default()
        })?;
        self.run_guest()?;
        self.set_lock(None)
    }

    /// vzdump in stop mode, until the guest runs again; a VM that did not run, and a template, is
    /// started for it and waits.
    fn begin_backup(&self) -> Result<()> {
        self.check_lock()?;
        let ran = self.pid().is_some();
        self.set_lock(Some("backup"))?;
        if ran {
            self.stop(true)?;
        }
        self.start(&Start {
            paused: true,
            ..Start::default()
        })?;
        match ran {
            true => self.run_guest(),
            false => Ok(()),
        }
    }

    /// The end of the backup: a guest that was not started meanwhile is ended.
    fn end_backup(&self) -> Result<()> {
        let status = self.qmp()?.execute("query-status", json!({}))?;
        if status.to_string().contains("prelaunch") {
            self.stop(false)?;
        }
        self.set_lock(None)
    }

    fn command(&self, conf: &Conf) -> Result<Vec<String>> {
        let number = |key: &str, default: u32| match conf.get(key) {
            Some(value) => value
                .parse::<u32>()
                .map_err(|_| anyhow!("{key}: {value}: not a number")),
            None => Ok(default),
        };
        let id = self.id;
        let (sockets, cores) = (number("sockets", 1)?, number("cores", 1)?);
        let max = sockets * cores;
        let default_name = format!("vm{id}");
        let name = conf.get("name").unwrap_or(&default_name);
        let mut words = vec!["/usr/bin/kvm".to_owned()];
        let mut push = |option: &str, value: String| words.extend([option.to_owned(), value]);
        push("-name", format!("{name},debug-threads=on"));
        push(
            "-chardev",
            format!("socket,id=qmp,path={RUN}/{id}.qmp,server=on,wait=off"),
        );
        push("-mon", "chardev=qmp,mode=control".to_owned());
        push("-pidfile", self.file("pid").display().to_string());
        push("-accel", "kvm".to_owned());
        push(
            "-smp",
            match conf.get("template") {
                // Started for a backup only.
                Some("1") => "1,sockets=1,cores=1,maxcpus=1".to_owned(),
                _ => format!(
                    "{},sockets={sockets},cores={cores},maxcpus={max}",
                    number("vcpus", max)?
                ),
            },
        );
        push("-m", number("memory", 512)?.to_string());
        push("-display", "none".to_owned());
        // A value of the lab's own; Proxmox VE has seabios and ovmf.
        if conf.get("bios") == Some("halt") {
            push("-bios", HALT_ROM.to_owned());
        }
        for (disk, options) in conf.disks() {
            let controller = disk.strip_prefix("scsi").map(|n| format!("virtioscsi{n}"));
            let owner = controller.as_deref().unwrap_or(disk);
            let thread = options
                .split(',')
                .any(|option| option == "iothread=1")
                .then(|| format!("iothread-{owner}"));
            let on_thread = thread
                .as_ref()
                .map(|thread| format!(",iothread={thread}"))
                .unwrap_or_default();
            if let Some(thread) = &thread {
                push("-object", format!("iothread,id={thread}"));
            }
            push(
                "-blockdev",
                format!("driver=null-co,node-name=drive-{disk},size=1073741824,read-zeroes=on"),
            );
            if let Some(controller) = &controller {
                push(
                    "-device",
                    format!("virtio-scsi-pci,id={controller}{on_thread}"),
                );
                push(
                    "-device",
                    format!("scsi-hd,bus={controller}.0,drive=drive-{disk},id={disk}"),
                );
            } else {
                push(
                    "-device",
                    format!("virtio-blk-pci,drive=drive-{disk},id={disk}{on_thread}"),
                );
            }
        }
        words.extend(["-nodefaults", "-daemonize"].map(str::to_owned));
        words.extend(
            conf.get("args")
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned),
        );
        Ok(words)
    }

    fn stop(&self, politely: bool) -> Result<()> {
        let conf = self.conf()?;
        let Some(pid) = self.pid() else {
            bail!("VM {} not running", self.id)
        };
        self.warn(self.hook(&conf, "pre-stop", None), "pre-stop");
        let asked = self.qmp().and_then(|mut qmp| {
            if politely {
                qmp.execute("system_powerdown", json!({}))?;
                thread::sleep(POWERDOWN_GRACE);
            }
            qmp.execute("quit", json!({}))
        });
        if asked.is_err() {
            // It may have gone meanwhile; if not, the wait below shows it.
            let _ = kill(pid, Signal::SIGTERM);
        }
        let gone = || self.pid().is_none_or(|now| now != pid);
        if !wait_looking(LOOK, STOP_PATIENCE, gone) {
            self.report("VM still running - terminating now with SIGKILL");
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.cleanup(true)
    }

    /// After QEMU's end, as qmeventd has `qm cleanup` do it: files, then post-stop.
    fn cleanup(&self, hook: bool) -> Result<()> {
        if !wait_until(STOP_PATIENCE, || self.pid().is_none()) {
            bail!("VM {} still running", self.id);
        }
        for extension in ["pid", "qmp"] {
            // QEMU removes them itself, unless it was killed.
            let _ = fs::remove_file(self.file(extension));
        }
        let result = self.await_scope_gone();
        if hook {
            self.warn(self.hook(&self.conf()?, "post-stop", None), "post-stop");
        }
        result
    }

    fn status(&self) -> Result<()> {
        self.conf()?;
        let status = if self.pid().is_some() {
            "running"
        } else {
            "stopped"
        };
        Ok(writeln!(std::io::stdout(), "status: {status}")?)
    }

    /// systemd unloads a scope a moment after its last process went.
    fn await_scope_gone(&self) -> Result<()> {
        let unit = format!("/run/systemd/transient/{}.scope", self.id);
        if !wait_until(SCOPE_PATIENCE, || !Path::new(&unit).exists()) {
            bail!(
                "timeout waiting on systemd: {}.scope is still there",
                self.id
            );
        }
        Ok(())
    }

    /// Runs the hook as `PVE::GuestHelpers::exec_hookscript` does: an empty stdin, and both outputs
    /// read line by line until both are closed, however long that takes.
    fn hook(&self, conf: &Conf, phase: &str, migrated_from: Option<&str>) -> Result<()> {
        let Some(volume) = conf.get("hookscript") else {
            return Ok(());
        };
        let path = volume.strip_prefix("local:snippets/").map_or_else(
            || PathBuf::from(volume),
            |name| Path::new(SNIPPETS).join(name),
        );
        if !path.is_file() {
            bail!("hookscript {}: no such file", path.display());
        }
        let mut child = Command::new(&path)
            .args([&self.id.to_string(), phase])
            .envs(migrated_from.map(|node| ("PVE_MIGRATED_FROM", node)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("hookscript {}: cannot run", path.display()))?;
        drop(child.stdin.take());
        let outputs = [
            child.stdout.take().map(forward),
            child.stderr.take().map(forward),
        ];
        for output in outputs.into_iter().flatten() {
            // A thread that only copies has no way to fail.
            let _ = output.join();
        }
        let status = child.wait().context("hookscript: cannot wait for it")?;
        if status.success() {
            Ok(())
        } else {
            bail!(
                "hookscript error for {} on {phase}: command '{} {} {phase}' failed: {status}",
                self.id,
                path.display(),
                self.id
            )
        }
    }

    fn warn(&self, result: Result<()>, phase: &str) {
        if let Err(err) = result {
            self.report(&format!("WARN: {phase}: {err:#}"));
        }
    }

    fn report(&self, text: &str) {
        // A closed stderr is not a reason to stop half way.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Copies lines to our stdout, which is the task log; threads because two pipes are read at once.
fn forward(pipe: impl Read + Send + 'static) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut line = Vec::new();
        let mut pipe = BufReader::new(pipe);
        while let Ok(1..) = pipe.read_until(b'\n', &mut line) {
            // A closed stdout must not block the hook.
            let _ = std::io::stdout().lock().write_all(&line);
            line.clear();
        }
    })
}

/// A process beside QEMU; what is returned keeps it alive as long as any process holds it.
fn start_helper() -> Result<impl Sized> {
    if !Path::new(HELPER).exists() {
        std::os::unix::fs::symlink("lab-agent", HELPER)
            .with_context(|| format!("{HELPER}: cannot make"))?;
    }
    let (read, write) = std::io::pipe().context("cannot make a pipe")?;
    let mut helper = Command::new(HELPER);
    helper
        .stdin(read)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    helper
        .spawn()
        .with_context(|| format!("{HELPER}: cannot run"))?;
    // dup clears close-on-exec: this one goes on to QEMU.
    nix::unistd::dup(&write).context("cannot keep the pipe for QEMU")
}

fn list() -> Result<()> {
    let mut ids: Vec<u32> = Vec::new();
    for entry in fs::read_dir(CONFS).with_context(|| format!("{CONFS}: cannot list"))? {
        let name = entry
            .with_context(|| format!("{CONFS}: cannot list"))?
            .file_name();
        ids.extend(
            name.to_str()
                .and_then(|name| name.strip_suffix(".conf")?.parse::<u32>().ok()),
        );
    }
    ids.sort_unstable();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:>10} {:<20} {:<10} {:<10} PID",
        "VMID", "NAME", "STATUS", "MEM(MB)"
    )?;
    for vm in ids.into_iter().map(|id| Vm { id }) {
        let conf = vm.conf()?;
        let (name, memory) = (
            conf.get("name").unwrap_or_default(),
            conf.get("memory").unwrap_or("512"),
        );
        let (status, pid) = vm
            .pid()
            .map_or(("stopped", 0), |pid| ("running", pid.as_raw()));
        writeln!(
            out,
            "{:>10} {name:<20} {status:<10} {memory:<10} {pid}",
            vm.id
        )?;
    }
    Ok(())
}

/// Whether `qm set` takes a key here.
fn is_known(key: &str) -> bool {
    const KEYS: [&str; 10] = [
        "cores",
        "sockets",
        "vcpus",
        "args",
        "numa",
        "hugepages",
        "hotplug",
        "affinity",
        "cpu",
        "memory",
    ];
    KEYS.contains(&key) || is_numa_node(key)
}

fn is_numa_node(key: &str) -> bool {
    key.strip_prefix("numa")
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// What Proxmox VE refuses of a value.
fn check_value(key: &str, value: &str) -> Result<()> {
    let is_number = |value: &str| value.parse::<u32>().is_ok_and(|number| number > 0);
    let is_right = match key {
        "cores" | "sockets" | "vcpus" | "memory" => is_number(value),
        "numa" => ["0", "1"].contains(&value),
        "hugepages" => ["any", "2", "1024"].contains(&value),
        _ if is_numa_node(key) => value.split(',').all(|part| {
            let known = ["cpus=", "hostnodes=", "memory=", "policy="];
            known.iter().any(|known| part.starts_with(known))
        }),
        _ => true,
    };
    match is_right {
        true => Ok(()),
        false => bail!("400 Parameter verification failed.\n{key}: invalid format - {value}"),
    }
}

fn wait_until(patience: Duration, done: impl FnMut() -> bool) -> bool {
    wait_looking(POLL, patience, done)
}

fn wait_looking(each: Duration, patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(each);
    }
    true
}

/// The part of VMID.conf that describes the running VM.
struct Conf(Vec<(String, String)>);

impl Conf {
    fn parse(text: &str) -> Self {
        let main = text
            .lines()
            .take_while(|line| !line.starts_with('['))
            .filter(|line| !line.starts_with('#'));
        let pairs = main.filter_map(|line| line.split_once(':'));
        Self(
            pairs
                .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
                .collect(),
        )
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(found, _)| found == key)
            .map(|(_, value)| value.as_str())
    }

    /// `scsiN` and `virtioN` with their options.
    fn disks(&self) -> impl Iterator<Item = (&str, &str)> {
        let numbered = |key: &str, prefix| {
            key.strip_prefix(prefix)
                .is_some_and(|n| n.parse::<u32>().is_ok())
        };
        let disks = self
            .0
            .iter()
            .filter(move |(key, _)| numbered(key, "scsi") || numbered(key, "virtio"));
        disks.map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// `cpulimit` in percent of a CPU, as PVE hands it to systemd.
    fn cpu_quota(&self) -> Option<u32> {
        let limit = self.get("cpulimit")?;
        let (whole, part) = limit.split_once('.').unwrap_or((limit, ""));
        let part: u32 = format!("{part:0<2}").get(..2)?.parse().ok()?;
        let quota = whole.parse::<u32>().ok()? * 100 + part;
        (quota > 0).then_some(quota)
    }

    fn affinity_prefix(&self) -> Vec<String> {
        let words = |cpus: &str| {
            ["taskset", "--cpu-list", "--all-tasks", cpus]
                .map(str::to_owned)
                .to_vec()
        };
        self.get("affinity").map(words).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmSpec;

    fn command(spec: &VmSpec) -> String {
        Vm { id: spec.id }
            .command(&Conf::parse(&spec.conf()))
            .unwrap()
            .join(" ")
    }

    #[test]
    fn a_vm_is_started_as_pve_does() {
        let words = command(&VmSpec {
            iothreads: 1,
            busy: true,
            ..VmSpec::new(100)
        });
        assert_eq!(
            words,
            "/usr/bin/kvm -name vm100,debug-threads=on \
             -chardev socket,id=qmp,path=/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
             -pidfile /run/qemu-server/100.pid -accel kvm -smp 12,sockets=1,cores=12,maxcpus=12 -m 64 -display none \
             -object iothread,id=iothread-virtioscsi0 \
             -blockdev driver=null-co,node-name=drive-scsi0,size=1073741824,read-zeroes=on \
             -device virtio-scsi-pci,id=virtioscsi0,iothread=iothread-virtioscsi0 \
             -device scsi-hd,bus=virtioscsi0.0,drive=drive-scsi0,id=scsi0 -nodefaults -daemonize"
        );
    }

    #[test]
    fn only_the_main_section_counts() {
        let conf = Conf::parse(
            "#cores: 1\ncores: 2\nscsihw: x\nvirtio0: a,iothread=1\n[snap]\ncores: 3\n",
        );
        assert_eq!(conf.get("cores"), Some("2"));
        assert_eq!(
            conf.disks().collect::<Vec<_>>(),
            [("virtio0", "a,iothread=1")]
        );
    }

    #[test]
    fn a_limit_is_a_quota() {
        for (limit, quota) in [
            ("2", Some(200)),
            ("1.5", Some(150)),
            ("0", None),
            ("x", None),
        ] {
            let conf = Conf::parse(&format!("cpulimit: {limit}\n"));
            assert_eq!(conf.cpu_quota(), quota, "{limit}");
        }
    }

    #[test]
    fn affinity_is_a_prefix_for_the_whole_process() {
        let spec = VmSpec {
            affinity: Some("6-11".to_owned()),
            ..VmSpec::new(100)
        };
        assert_eq!(
            Conf::parse(&spec.conf()).affinity_prefix().join(" "),
            "taskset --cpu-list --all-tasks 6-11"
        );
    }

    #[test]
    fn invalid_vmids_are_refused() {
        for id in ["", "99", "x", "1000000000", "-100"] {
            assert!(Vm::new(id).is_err(), "{id}");
        }
    }
}

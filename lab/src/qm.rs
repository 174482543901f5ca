//! A stand-in for Proxmox VE's `qm`, run inside the lab host.
//!
//! It starts, ends and reports VMs the way `PVE::QemuServer` does, as far as a tool that watches
//! from outside can observe: the VM's lock, the hook's phases and who sees their failure, the
//! scope in qemu.slice, the pid file, the QMP socket, threads and helper processes. The disks are
//! null devices and the guest is only firmware.

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
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const CONFS: &str = "/etc/pve/qemu-server";
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

/// `qm COMMAND [VMID] [OPTION…]`.
pub fn main(args: &[&str]) -> Result<()> {
    // A powered down VM of the lab is never waited for so long that a time of one's own would
    // count.
    let args = args
        .iter()
        .enumerate()
        .filter(|(at, _)| *at == 0 || args[at - 1] != "--timeout")
        .map(|(_, word)| *word);
    let (words, options): (Vec<&str>, Vec<&str>) = args.partition(|word| !word.starts_with("--"));
    let option = |name: &str| options.contains(&name);
    match words.as_slice() {
        ["list"] => list(),
        [command, id] => {
            let vm = Vm::new(id)?;
            match *command {
                "start" => vm.start(option("--paused")),
                "stop" => vm.stop(false),
                "shutdown" => vm.stop(true),
                "status" => vm.status(),
                "cleanup" => vm.locked(|| vm.cleanup(!option("--no-hook"))),
                "scope" => vm.enter(option("--paused")),
                _ => usage(),
            }
        }
        _ => usage(),
    }
}

fn usage() -> Result<()> {
    bail!(
        "usage: qm start VMID [--paused] | stop VMID | shutdown VMID | status VMID | cleanup VMID [--no-hook] | list"
    )
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

    fn conf(&self) -> Result<Conf> {
        let path = format!("{CONFS}/{}.conf", self.id);
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

    fn start(&self, paused: bool) -> Result<()> {
        self.locked(|| {
            let conf = self.conf()?;
            if self.pid().is_some() {
                bail!("VM {} already running", self.id);
            }
            self.hook(&conf, "pre-start")?;
            self.await_scope_gone()?;
            cache::make(Path::new(RUN))?;
            let mut scope = Command::new("systemd-run");
            scope.args([
                "--quiet",
                "--scope",
                "--slice=qemu.slice",
                &format!("--unit={}", self.id),
            ]);
            // What PVE::QemuServer gives its scopes.
            scope.args([
                "-pKillMode=process",
                "-pSendSIGKILL=no",
                "-pTimeoutStopSec=infinity",
            ]);
            scope
                .args(["qm", "scope", &self.id.to_string()])
                .args(paused.then_some("--paused"));
            tool::run(&mut scope).with_context(|| format!("start failed: VM {}", self.id))?;
            self.warn(self.hook(&conf, "post-start"), "post-start");
            Ok(())
        })
    }

    /// Inside the scope: the helper, then QEMU in our place.
    fn enter(&self, paused: bool) -> Result<()> {
        let conf = self.conf()?;
        // Held open by QEMU: its end ends the helper.
        let _alive = conf.get("tpmstate0").map(|_| start_helper()).transpose()?;
        let words = conf
            .affinity_prefix()
            .into_iter()
            .chain(self.command(&conf)?);
        let words: Vec<String> = words.chain(paused.then(|| "-S".to_owned())).collect();
        let [program, args @ ..] = words.as_slice() else {
            bail!("no program")
        };
        Err(Command::new(program).args(args).exec())
            .with_context(|| format!("{program}: cannot run"))
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
            format!(
                "{},sockets={sockets},cores={cores},maxcpus={max}",
                number("vcpus", max)?
            ),
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
        self.locked(|| {
            let conf = self.conf()?;
            let Some(pid) = self.pid() else {
                bail!("VM {} not running", self.id)
            };
            self.warn(self.hook(&conf, "pre-stop"), "pre-stop");
            let asked = Qmp::connect(&self.file("qmp"), QMP_PATIENCE).and_then(|mut qmp| {
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
            if !wait_until(STOP_PATIENCE, || self.pid().is_none_or(|now| now != pid)) {
                self.report("VM still running - terminating now with SIGKILL");
                let _ = kill(pid, Signal::SIGKILL);
            }
            self.cleanup(true)
        })
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
            self.warn(self.hook(&self.conf()?, "post-stop"), "post-stop");
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
        match wait_until(SCOPE_PATIENCE, || !Path::new(&unit).exists()) {
            true => Ok(()),
            false => bail!(
                "timeout waiting on systemd: {}.scope is still there",
                self.id
            ),
        }
    }

    /// Runs the hook as `PVE::GuestHelpers::exec_hookscript` does: an empty stdin, and both outputs
    /// read line by line until both are closed, however long that takes.
    fn hook(&self, conf: &Conf, phase: &str) -> Result<()> {
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

fn wait_until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(POLL);
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

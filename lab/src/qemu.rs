//! The QEMU process that is a lab host: its arguments, its files, its life.

use crate::cache;
use crate::guest::Guest;
use crate::image::Image;
use crate::protocol::PORT;
use crate::qmp::Qmp;
use crate::{setup, tool};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

/// CPUs of a lab host.
pub const CPUS: u16 = 24;
/// The disk that files are handed in by always has this size.
const PAYLOAD_SIZE: u64 = 1 << 30;
/// savevm and loadvm take seconds, more on a busy machine.
const QMP_PATIENCE: Duration = Duration::from_secs(120);
const START_PATIENCE: Duration = Duration::from_secs(60);
const QUIT_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

const KERNEL_LINE: &str = "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off nowatchdog \
    tsc=reliable udev.children_max=4 module_blacklist=iTCO_wdt,lpc_ich,pcspkr,psmouse systemd.show_status=0";

/// The machine: what the guest sees, the same for every slot.
const MACHINE: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-machine",
    "q35,sata=off,smbus=off",
    "-cpu",
    "EPYC-Milan,+svm,+npt",
    "-smp",
    "24,sockets=1,dies=2,cores=6,threads=2",
    "-m",
    "4G",
    "-display",
    "none",
    "-vga",
    "none",
    // A queue, and so a managed IRQ, for each CPU; and one with IRQs that span six CPUs each.
    "-device",
    "virtio-blk-pci,drive=root,num-queues=24",
    "-device",
    "virtio-blk-pci,drive=payload,num-queues=4",
    "-device",
    "virtio-serial-pci",
    "-device",
    "virtserialport,chardev=agent,name=pinfold.lab",
    // IRQs that can be moved.
    "-netdev",
    "user,id=net0,restrict=on",
    "-device",
    "virtio-net-pci,netdev=net0",
    // Devices to remove and rescan, the last slot with two functions.
    "-device",
    "pcie-root-port,id=port1,chassis=1",
    "-device",
    "nec-usb-xhci,bus=port1",
    "-netdev",
    "user,id=net1,restrict=on",
    "-device",
    "pcie-root-port,id=port2,chassis=2",
    "-device",
    "e1000e,bus=port2,netdev=net1",
    "-device",
    "pcie-root-port,id=port3,chassis=3",
    "-device",
    "edu,bus=port3",
    "-netdev",
    "user,id=net2,restrict=on",
    "-device",
    "pcie-root-port,id=port4,chassis=4",
    "-device",
    "e1000e,bus=port4,addr=0.0,multifunction=on,netdev=net2",
    "-device",
    "nec-usb-xhci,bus=port4,addr=0.1",
];

/// How QEMU runs the machine's CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// All in one thread, in turn: what one CPU does, no other meets half done.
    One,
    /// Each in a thread of its own, so that if one waits for another, as for a grace period of
    /// RCU's, it waits as briefly as on real hardware. But then QEMU 10.0 breaks now and then
    /// (docs/design.md, "The lab itself").
    Each,
}

impl Threads {
    fn accelerator(self) -> &'static str {
        match self {
            Self::One => "tcg,thread=single",
            Self::Each => "tcg,thread=multi",
        }
    }
}

/// What decides whether a snapshot fits: the machine, its kernel line and the program that emulates
/// it.
pub fn machine_key(guest: Guest) -> Result<String> {
    let version = tool::run(setup::command("qemu-system-x86_64").arg("--version"))?;
    let parts = MACHINE
        .iter()
        .copied()
        .chain([KERNEL_LINE, version.as_str(), PORT])
        .chain(guest.kernel_line());
    Ok(cache::key(
        parts.chain([crate::acpi::source(CPUS).as_str()]),
    ))
}

/// A folder with all that one host process has.
#[derive(Debug, Clone)]
pub struct Slot(PathBuf);

impl Slot {
    /// The slot in this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// The root disk, with the snapshots in it.
    pub fn disk(&self) -> PathBuf {
        self.0.join("disk.qcow2")
    }

    /// The tar file that the guest sees as /dev/vdb.
    pub fn payload(&self) -> PathBuf {
        self.0.join("payload.tar")
    }

    /// The agent's socket.
    pub fn agent(&self) -> PathBuf {
        self.0.join("agent.sock")
    }

    /// The serial console's socket.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.sock")
    }

    /// The last lines of the serial console.
    pub fn console_tail(&self, lines: usize) -> String {
        let log = fs::read(self.0.join("console.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).replace('\r', "");
        tool::tail(&log, lines).to_owned()
    }

    /// Starts QEMU in the background with its CPUs stopped; `cont` or `loadvm` sets it going.
    pub fn start(&self, guest: Guest, image: &Image, threads: Threads) -> Result<()> {
        cache::make(&self.0)?;
        let longest = self.console();
        if longest.as_os_str().len() > 107 {
            bail!(
                "{}: too long for a socket's path: set PINFOLD_LAB_CACHE to a shorter one",
                longest.display()
            );
        }
        if !self.0.join("cpufreq.aml").exists() {
            crate::acpi::compile(CPUS, &self.0)?;
        }
        let payload = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.payload());
        let payload = payload.and_then(|file| file.set_len(PAYLOAD_SIZE));
        payload.with_context(|| format!("{}: cannot make", self.payload().display()))?;
        let path = |name: &str| self.0.join(name).display().to_string().replace(',', ",,");
        let kernel_line = std::iter::once(KERNEL_LINE).chain(guest.kernel_line());
        let kernel_line = kernel_line.collect::<Vec<_>>().join(" ");
        let options = [
            ("-accel", threads.accelerator().to_owned()),
            ("-kernel", image.kernel().display().to_string()),
            ("-initrd", image.initrd().display().to_string()),
            ("-append", kernel_line),
            ("-acpitable", format!("file={}", path("cpufreq.aml"))),
            (
                "-drive",
                format!(
                    "if=none,id=root,file={},format=qcow2,discard=unmap,cache=unsafe",
                    path("disk.qcow2")
                ),
            ),
            (
                "-drive",
                format!(
                    "if=none,id=payload,file={},format=raw,readonly=on",
                    path("payload.tar")
                ),
            ),
            (
                "-chardev",
                format!(
                    "socket,id=agent,path={},server=on,wait=off",
                    path("agent.sock")
                ),
            ),
            (
                "-chardev",
                format!(
                    "socket,id=console,path={0},server=on,wait=off,logfile={1}",
                    path("console.sock"),
                    path("console.log")
                ),
            ),
            ("-serial", "chardev:console".to_owned()),
            (
                "-qmp",
                format!("unix:{},server=on,wait=off", path("qmp.sock")),
            ),
            ("-pidfile", self.pid_file().display().to_string()),
        ];
        let log = fs::File::create(self.log())
            .with_context(|| format!("{}: cannot make", self.log().display()))?;
        let errors = log.try_clone().context("cannot share the log")?;
        // In a session of its own it outlives us. -daemonize would do that too, but QEMU's last
        // messages would be lost.
        let mut command = setup::command("setsid");
        command
            .args(["--fork", "qemu-system-x86_64", "-S"])
            .args(MACHINE);
        for (option, value) in options {
            command.args([option, &value]);
        }
        let started = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .status();
        started.context("setsid: cannot run")?;
        let deadline = Instant::now() + START_PATIENCE;
        while self.pid().is_none() || self.qmp().is_err() {
            let failed = self.pid().is_none() && !self.last_words().is_empty();
            if failed || Instant::now() > deadline {
                bail!("QEMU does not start: {}", self.last_words());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// QEMU's own last messages, warnings about CPU features left out.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<_> = log
            .lines()
            .filter(|line| !line.contains(": warning: "))
            .collect();
        tool::tail(&lines.join("\n"), 10).to_owned()
    }

    fn log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }

    /// The process, if this lab started it and it runs.
    pub fn pid(&self) -> Option<Pid> {
        let pid: i32 = fs::read_to_string(self.pid_file())
            .ok()?
            .trim()
            .parse()
            .ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let own = self.pid_file();
        command
            .split(|&byte| byte == 0)
            .any(|word| word == own.as_os_str().as_encoded_bytes())
            .then(|| Pid::from_raw(pid))
    }

    /// Ends the process, if there is one.
    pub fn kill(&self) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        // A QEMU that does not answer is killed.
        let _ = Qmp::connect(&self.qmp_socket(), QUIT_PATIENCE)
            .and_then(|mut qmp| qmp.execute("quit", json!({})));
        for signal in [None, Some(Signal::SIGKILL)] {
            // It may have ended just now.
            let _ = kill(pid, signal);
            let deadline = Instant::now() + QUIT_PATIENCE;
            while self.pid().is_some() && Instant::now() < deadline {
                thread::sleep(POLL);
            }
        }
        if self.pid().is_some() {
            bail!("QEMU, process {pid}: does not end")
        } else {
            Ok(())
        }
    }

    /// Its control socket.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_socket(), QMP_PATIENCE)
    }

    fn qmp_socket(&self) -> PathBuf {
        self.0.join("qmp.sock")
    }

    fn pid_file(&self) -> PathBuf {
        self.0.join("pid")
    }

    /// Hands files in: they stand on the guest's /dev/vdb as a tar archive from now on.
    pub fn write_payload(&self, tree: &Path) -> Result<()> {
        cache::make(&self.0)?;
        let files = tool::run(
            std::process::Command::new("find")
                .args([".", "-type", "f", "-printf", "%P\\n"])
                .current_dir(tree),
        )?;
        let mut tar = setup::command("tar");
        tar.args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
            .arg(self.payload())
            .arg("-C")
            .arg(tree);
        tool::run(tar.args(files.lines()))?;
        let payload = fs::OpenOptions::new().write(true).open(self.payload());
        let payload =
            payload.with_context(|| format!("{}: cannot open", self.payload().display()))?;
        if payload.metadata().map_or(0, |file| file.len()) > PAYLOAD_SIZE {
            bail!(
                "{}: the programs are larger than {PAYLOAD_SIZE} bytes",
                self.payload().display()
            );
        }
        payload
            .set_len(PAYLOAD_SIZE)
            .with_context(|| format!("{}: cannot size", self.payload().display()))
    }
}

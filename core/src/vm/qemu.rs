//! Virtual machines: from Proxmox VE's number to the QEMU process and the roles of its threads.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cpuset::{CpuSet, MAX_CPU};
use crate::error::{Error, Result, is_gone};
use crate::knob::TaskId;
use crate::sys::pci::PciSelector;
use crate::sys::task::{self, Task};
use crate::sysroot::Sysroot;
use crate::vm::proxmox::conf::{self as vmconf, PciHolder, PciReservation, VmConf};
use crate::vm::qmp;
use crate::vm::smp;

/// Where Proxmox VE keeps the VMs' settings.
const CONFS: &str = "etc/pve/qemu-server";

/// Where Proxmox VE keeps pid files and sockets; /var/run is a link to /run.
const RUN: &str = "run/qemu-server";

/// A VM's number: 100 to 999999999, as in Proxmox VE (`pve-vmid` in `PVE::JSONSchema`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct VmId(u32);

impl VmId {
    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for VmId {
    type Error = Error;

    fn try_from(number: u32) -> Result<Self> {
        if (100..=999_999_999).contains(&number) {
            Ok(Self(number))
        } else {
            Err(Error::malformed(
                number.to_string(),
                "no VM's number; they run from 100 to 999999999",
            ))
        }
    }
}

impl From<VmId> for u32 {
    fn from(vmid: VmId) -> Self {
        vmid.0
    }
}

impl FromStr for VmId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // One spelling only: what gets into file names is what was typed.
        match text.parse::<u32>() {
            Ok(number) if number.to_string() == text => number.try_into(),
            _ => Err(Error::malformed(
                format!("{text:?}"),
                "no VM's number; they run from 100 to 999999999",
            )),
        }
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// The process, for good.
    pub id: TaskId,
    /// Its VM, where Proxmox VE started it.
    pub vmid: Option<VmId>,
    /// The path of its QMP socket, on the host, where it has one.
    pub monitor: Option<String>,
    /// The threads of each core of its guest.
    pub threads_per_core: usize,
    /// What it said when it was first asked; an answer takes it a while.
    said: OnceCell<qmp::Facts>,
}

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vmid {
            Some(vmid) => write!(f, "VM {vmid}"),
            None => write!(f, "QEMU {}", self.id.pid),
        }
    }
}

/// Whether a VM runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It does.
    Running(Qemu),
    /// It does not, for this reason: there is no pid file, or a stale one.
    Stopped(String),
}

/// The path of a VM's pid file, below the sysroot.
pub fn pid_file(vmid: VmId) -> String {
    format!("{RUN}/{vmid}.pid")
}

/// Looks whether a VM runs, as Proxmox VE does (`PVE::QemuServer::Helpers::vm_running_locally`):
/// the process that the pid file names must be a QEMU that was started with that very pid file.
///
/// # Errors
/// Where /run or /proc cannot be read.
pub fn look_up(root: &Sysroot, vmid: VmId) -> Result<Lookup> {
    let file = pid_file(vmid);
    let shown = root.path(&file).display().to_string();
    let stale = |why: String| Ok(Lookup::Stopped(format!("{shown} is stale: {why}")));
    let text = match root.read_value(&file) {
        // QEMU makes it for root alone; other users can find the process by what it was started
        // with.
        Err(error) if error.is_denied() => return by_pid_file(root, vmid, &file, error),
        other => other?,
    };
    let Some(text) = text else {
        return Ok(Lookup::Stopped(format!("there is no {shown}")));
    };
    let Some(pid) = text.parse::<i32>().ok().filter(|pid| *pid > 0) else {
        return stale(format!("{text:?} is no process id"));
    };
    let Some((id, args)) = process_with_args(root, pid)? else {
        return stale(format!("process {pid} is gone"));
    };
    if !is_qemu(&args) {
        let program = args.first().map_or("a kernel thread", String::as_str);
        return stale(format!("process {pid} is {program}, no QEMU"));
    }
    if !options(&args, "pidfile").any(|path| in_run(path) == file) {
        return stale(format!("process {pid} is another QEMU"));
    }
    Ok(Lookup::Running(of_vm(vmid, id, &args)))
}

/// Looks through all processes for the QEMU that was started with this pid file.
fn by_pid_file(root: &Sysroot, vmid: VmId, file: &str, denied: Error) -> Result<Lookup> {
    for pid in task::pids(root)? {
        if let Some((id, args)) = process_with_args(root, pid)?
            && is_qemu(&args)
            && options(&args, "pidfile").any(|path| in_run(path) == file)
        {
            return Ok(Lookup::Running(of_vm(vmid, id, &args)));
        }
    }
    Ok(Lookup::Stopped(denied.to_string()))
}

fn of_vm(vmid: VmId, id: TaskId, args: &[String]) -> Qemu {
    let monitor = monitor(args).unwrap_or_else(|| format!("/{RUN}/{vmid}.qmp"));
    let threads_per_core = smp::threads(options(args, "smp"));
    Qemu {
        id,
        vmid: Some(vmid),
        monitor: Some(monitor),
        threads_per_core,
        said: OnceCell::new(),
    }
}

/// A VM's QEMU; `None` where it does not run.
///
/// # Errors
/// As [`look_up`].
pub fn find(root: &Sysroot, vmid: VmId) -> Result<Option<Qemu>> {
    Ok(match look_up(root, vmid)? {
        Lookup::Running(qemu) => Some(qemu),
        Lookup::Stopped(_) => None,
    })
}

/// The QEMU of a VM that must run.
///
/// # Errors
/// [`Error::Unusable`] that says why it does not: a container, no such VM, no pid file, a stale
/// one.
pub fn running(root: &Sysroot, vmid: VmId) -> Result<Qemu> {
    match look_up(root, vmid)? {
        Lookup::Running(qemu) => Ok(qemu),
        Lookup::Stopped(why) => {
            check_exists(root, vmid)?;
            let why = format!("it does not run: {why}; qm start {vmid} starts it");
            Err(Error::unusable(format!("VM {vmid}"), why))
        }
    }
}

/// The QEMU with a process id, whoever started it.
///
/// # Errors
/// [`Error::Unusable`] where there is no such process, or where it is no QEMU.
pub fn by_pid(root: &Sysroot, pid: i32) -> Result<Qemu> {
    let unusable = |why: String| Error::unusable(format!("process {pid}"), why);
    let Some((id, args)) = process_with_args(root, pid)? else {
        return Err(unusable("no such process".into()));
    };
    if !is_qemu(&args) {
        return Err(unusable(format!(
            "it is {}, no QEMU",
            args.first().map_or("a kernel thread", String::as_str)
        )));
    }
    let threads_per_core = smp::threads(options(&args, "smp"));
    Ok(Qemu {
        id,
        vmid: None,
        monitor: monitor(&args),
        threads_per_core,
        said: OnceCell::new(),
    })
}

/// The QEMU of a VM that was found before, though its pid file may have gone since.
///
/// # Errors
/// One that [is gone](Error::is_gone) where that process has ended.
pub fn by_task(root: &Sysroot, vmid: VmId, id: TaskId) -> Result<Qemu> {
    task::check_start(root, &id)?;
    let args = parse_cmdline(&root.read(format!("proc/{}/cmdline", id.pid))?);
    Ok(of_vm(vmid, id, &args))
}

/// A VM's settings.
///
/// # Errors
/// [`Error::Unusable`] where it is a container or where there is no such VM, [`Error::Malformed`]
/// where a setting cannot be read.
pub fn conf(root: &Sysroot, vmid: VmId) -> Result<VmConf> {
    check_exists(root, vmid)?;
    let path = conf_path(vmid);
    VmConf::parse(&root.read(&path)?)
        .map_err(|error| Error::malformed(root.path(path).display().to_string(), error.to_string()))
}

/// The VMs of this node, by their numbers; none where it is no node of Proxmox VE.
pub fn all(root: &Sysroot) -> Vec<VmId> {
    let names = root.names(CONFS).unwrap_or_default();
    names
        .iter()
        .filter_map(|name| name.strip_suffix(".conf")?.parse().ok())
        .collect()
}

/// Makes sure that the number is a VM's.
///
/// # Errors
/// [`Error::Unusable`] where it is a container's, or nobody's on this node.
pub fn check_exists(root: &Sysroot, vmid: VmId) -> Result<()> {
    if is_container(root, vmid) {
        return Err(Error::unusable(
            vmid.to_string(),
            "it is a container; only VMs have a QEMU",
        ));
    }
    let path = root.path(conf_path(vmid));
    match path.symlink_metadata() {
        Ok(_) => Ok(()),
        Err(error) if is_gone(&error) => {
            let why = format!("no such VM on this node: there is no {}", path.display());
            Err(Error::unusable(format!("VM {vmid}"), why))
        }
        Err(error) => Err(Error::io(path, "look", error)),
    }
}

/// Whether the number is a container's.
pub fn is_container(root: &Sysroot, vmid: VmId) -> bool {
    root.exists(format!("etc/pve/lxc/{vmid}.conf"))
}

fn conf_path(vmid: VmId) -> String {
    format!("{CONFS}/{vmid}.conf")
}

/// The PCI functions that VMs hold or are about to, by Proxmox VE's own file; stale lines are left
/// out.
///
/// # Errors
/// Where the file cannot be read. None there is fine.
pub fn pci_reservations(root: &Sysroot) -> Result<Vec<PciReservation>> {
    let path = format!("{RUN}/pci-id-reservations");
    let mut reservations = match root.read(&path) {
        Ok(text) => vmconf::parse_pci_reservations(&text),
        Err(error) if error.is_gone() => Vec::new(),
        Err(error) => return Err(error),
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    reservations.retain(|reservation| match reservation.holder {
        PciHolder::Pid(pid) => root.exists(format!("proc/{pid}")),
        PciHolder::Until(time) => time > now,
    });
    Ok(reservations)
}

/// The devices that a mapping of the cluster offers on this node: of them one is chosen when a VM
/// starts.
///
/// # Errors
/// [`Error::Unusable`] where there is no such mapping, or none for this node.
pub fn pci_mapping(root: &Sysroot, id: &str) -> Result<Vec<Vec<PciSelector>>> {
    let path = "etc/pve/mapping/pci.cfg";
    let node = root.read("proc/sys/kernel/hostname")?;
    let node = node.trim().split('.').next().unwrap_or_default().to_owned();
    let text = match root.read(path) {
        Err(error) if error.is_gone() => String::new(),
        other => other?,
    };
    match vmconf::parse_pci_mapping(&text, id, &node) {
        Some(devices) if !devices.is_empty() => Ok(devices),
        found => {
            let lacks = if found.is_some() {
                format!("offers nothing on node {node}")
            } else {
                "is not there".into()
            };
            Err(Error::unusable(
                format!("PCI mapping {id}"),
                format!("it {lacks}; see {}", root.path(path).display()),
            ))
        }
    }
}

/// What a thread of QEMU is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It runs the vCPU of this number.
    Vcpu(usize),
    /// It does the disks' work, by the iothread's id.
    Iothread(String),
    /// Anything else: the main loop, workers, vhost.
    Emulator,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(number) => write!(f, "vCPU {number}"),
            Self::Iothread(id) => write!(f, "iothread {id}"),
            Self::Emulator => write!(f, "emulator"),
        }
    }
}

/// A thread of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuThread {
    /// The thread, for good.
    pub id: TaskId,
    /// What it is for.
    pub role: Role,
    /// Its name, 15 bytes at most.
    pub name: String,
    /// The CPUs it may run on.
    pub allowed: CpuSet,
    /// The CPU it ran on last.
    pub last_cpu: usize,
}

/// The threads of a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Threads {
    /// In the order of their ids.
    pub threads: Vec<QemuThread>,
    /// The state of the guest (`running`, `prelaunch`, …), where QEMU told it.
    pub status: Option<String>,
    /// Remarks for the user: that QEMU could not be asked, and roles are from the threads' names.
    pub notes: Vec<String>,
}

impl Threads {
    /// The numbers of the vCPUs, as a list for people: `0-11`.
    pub fn vcpus(&self) -> CpuSet {
        let number = |thread: &QemuThread| {
            if let Role::Vcpu(number) = thread.role {
                Some(number)
            } else {
                None
            }
        };
        self.threads.iter().filter_map(number).collect()
    }
}

/// The threads of a QEMU with their roles; those that end meanwhile are left out.
///
/// QEMU is asked which thread is which, for at most `budget`; what it says holds for this [`Qemu`]
/// from then on. Where it does not answer, names tell the vCPUs; most iothreads are emulator
/// threads then, for the kernel has lost names of over 15 bytes.
///
/// # Errors
/// One that [is gone](Error::is_gone) where QEMU has ended.
pub fn threads(root: &Sysroot, qemu: &Qemu, budget: Duration) -> Result<Threads> {
    let facts = match (qemu.said.get(), &qemu.monitor) {
        (Some(facts), _) => Ok(facts),
        (None, Some(path)) if root.is_live() => qmp::ask(&root.path(path), budget)
            .map(|facts| qemu.said.get_or_init(|| facts))
            .map_err(|error| error.to_string()),
        (None, Some(_)) => Err("its monitor is not asked under --sysroot".into()),
        (None, None) => Err("it has no QMP monitor".into()),
    };
    task::check_start(root, &qemu.id)?;
    let tasks = task::tasks(root, qemu.id.pid)?;
    let facts = facts.and_then(|facts| {
        // A QEMU in a container's pid namespace speaks of ids that mean other threads here.
        let known = facts.vcpus.is_empty()
            || tasks
                .iter()
                .any(|task| facts.vcpus.contains_key(&task.id.tid));
        if known {
            Ok(facts)
        } else {
            Err("its monitor speaks of other threads".into())
        }
    });
    let role = |task: &Task| match &facts {
        Ok(facts) => role_by_facts(facts, task.id.tid),
        Err(_) => role_by_name(&task.name),
    };
    let mut threads = Vec::with_capacity(tasks.len());
    for task in tasks {
        match task::affinity(root, &task.id) {
            Ok(allowed) => {
                let role = role(&task);
                threads.push(QemuThread {
                    id: task.id,
                    role,
                    name: task.name,
                    allowed,
                    last_cpu: task.last_cpu,
                });
            }
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    let (status, notes) = match facts {
        Ok(facts) => (Some(facts.status.clone()), Vec::new()),
        Err(why) => (
            None,
            vec![format!(
                "{qemu}: {why}; going on with the threads' names from /proc"
            )],
        ),
    };
    Ok(Threads {
        threads,
        status,
        notes,
    })
}

fn role_by_facts(facts: &qmp::Facts, tid: i32) -> Role {
    match (facts.vcpus.get(&tid), facts.iothreads.get(&tid)) {
        (Some(number), _) => Role::Vcpu(*number),
        (None, Some(id)) => Role::Iothread(id.clone()),
        (None, None) => Role::Emulator,
    }
}

/// The role of a thread by the name that QEMU gives it: `CPU 3/KVM`, `IO io1`. Names cost QEMU's
/// monitor nothing.
pub fn role_by_name(name: &str) -> Role {
    let number = || {
        let digits = name
            .strip_prefix("CPU ")?
            .strip_suffix("/KVM")
            .or_else(|| name.strip_prefix("CPU ")?.strip_suffix("/TCG"))?;
        let number = digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())?;
        // Anybody may name a thread so, and the numbers become a set.
        number.filter(|number| *number <= MAX_CPU)
    };
    // QEMU's own iothread for the monitor, which QMP does not list either.
    let id = name.strip_prefix("IO ").filter(|id| *id != "mon_iothread");
    match (number(), id) {
        (Some(number), _) => Role::Vcpu(number),
        (None, Some(id)) => Role::Iothread(id.to_owned()),
        (None, None) => Role::Emulator,
    }
}

/// A process and its arguments; `None` where it is gone.
fn process_with_args(root: &Sysroot, pid: i32) -> Result<Option<(TaskId, Vec<String>)>> {
    let read = || -> Result<_> {
        let task = task::task(root, pid, pid)?;
        Ok((
            task.id,
            parse_cmdline(&root.read(format!("proc/{pid}/cmdline"))?),
        ))
    };
    match read() {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses /proc/PID/cmdline: arguments, each ended by a NUL; empty for a kernel thread or a zombie.
fn parse_cmdline(text: &str) -> Vec<String> {
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// Whether the program is QEMU by the name Proxmox VE starts it under: `kvm`, or `qemu-system-…`.
fn is_qemu(args: &[String]) -> bool {
    let program = args
        .first()
        .map_or("", String::as_str)
        .rsplit('/')
        .next()
        .unwrap_or_default();
    program.ends_with("kvm") || program.starts_with("qemu-system-")
}

/// The values of an option, `-name VALUE` or `--name VALUE`.
pub(crate) fn options<'a>(args: &'a [String], name: &'a str) -> impl Iterator<Item = &'a str> {
    let is_option = move |arg: &str| {
        arg.strip_prefix('-')
            .is_some_and(|rest| rest.strip_prefix('-').unwrap_or(rest) == name)
    };
    args.windows(2)
        .filter(move |pair| is_option(&pair[0]))
        .map(|pair| pair[1].as_str())
}

/// A path below /run without its leading part: Proxmox VE writes /var/run, which is a link to /run.
fn in_run(path: &str) -> String {
    let path = PathBuf::from(path);
    let relative = path
        .strip_prefix("/var")
        .or_else(|_| path.strip_prefix("/"))
        .unwrap_or(&path);
    relative.display().to_string()
}

/// The path of the QMP socket: of a `-chardev socket` that a `-mon …,mode=control` uses, or of
/// `-qmp unix:…`.
fn monitor(args: &[String]) -> Option<String> {
    let fields = |text: &'_ str| -> BTreeMap<String, String> {
        text.split(',')
            .filter_map(|field| field.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    };
    let monitors: Vec<_> = options(args, "mon")
        .map(fields)
        .filter(|mon| mon.get("mode").is_some_and(|mode| mode == "control"))
        .collect();
    // The first one: Proxmox VE's second is for events, and its daemon keeps it.
    let by_chardev = monitors.iter().find_map(|mon| {
        let chardev = options(args, "chardev")
            .map(fields)
            .find(|chardev| chardev.get("id") == mon.get("chardev"))?;
        chardev.get("path").cloned()
    });
    by_chardev.or_else(|| {
        let path = options(args, "qmp")
            .find_map(|text| text.strip_prefix("unix:"))?
            .split(',')
            .next()?;
        Some(path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn args(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn vm_numbers() {
        for text in ["100", "999999999"] {
            assert_eq!(text.parse::<VmId>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "99",
            "0100",
            "+100",
            " 100",
            "100\n",
            "1000000000",
            "-1",
            "../100",
            "100/..",
            "1e3",
            "١٠٠",
        ] {
            let error = text.parse::<VmId>().unwrap_err().to_string();
            assert!(
                error.ends_with("no VM's number; they run from 100 to 999999999"),
                "{error}"
            );
        }
        assert_eq!(serde_json::to_string(&VmId(100)).unwrap(), "100");
        assert!(serde_json::from_str::<VmId>("7").is_err());
    }

    #[test]
    fn roles_by_name() {
        for (name, role) in [
            ("CPU 0/KVM", Role::Vcpu(0)),
            ("CPU 11/TCG", Role::Vcpu(11)),
            ("IO io1", Role::Iothread("io1".into())),
            ("kvm", Role::Emulator),
            ("IO mon_iothread", Role::Emulator),
            ("vhost-1234", Role::Emulator),
            ("", Role::Emulator),
            ("CPU /KVM", Role::Emulator),
            ("CPU +1/KVM", Role::Emulator),
            ("CPU 1/KVM) S", Role::Emulator),
            ("ALL CPUs/TCG", Role::Emulator),
            ("CPU 99999999999999999999/KVM", Role::Emulator),
        ] {
            assert_eq!(role_by_name(name), role, "{name:?}");
        }
    }

    #[test]
    fn qemu_by_its_arguments() {
        for (program, qemu) in [
            ("/usr/bin/kvm", true),
            ("kvm", true),
            ("/usr/bin/qemu-system-x86_64", true),
            ("qemu-kvm", true),
            ("/usr/bin/qemu-img", false),
            ("/kvm/bash", false),
            ("", false),
        ] {
            assert_eq!(is_qemu(&args(program)), qemu, "{program}");
        }
        assert!(!is_qemu(&[]));
        assert_eq!(
            parse_cmdline("kvm\0-name\0\0x\0"),
            ["kvm", "-name", "", "x"]
        );
        assert!(parse_cmdline("").is_empty());
        let line = args("kvm -pidfile /var/run/a.pid --pidfile b -pidfile");
        assert_eq!(
            options(&line, "pidfile").collect::<Vec<_>>(),
            ["/var/run/a.pid", "b"]
        );
        assert_eq!(
            in_run("/var/run/qemu-server/100.pid"),
            "run/qemu-server/100.pid"
        );
        assert_eq!(
            in_run("/run/qemu-server/100.pid"),
            "run/qemu-server/100.pid"
        );
    }

    #[test]
    fn monitors_by_arguments() {
        for (line, path) in [
            (
                "kvm -chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
                 -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock -mon chardev=qmp-event,mode=control",
                Some("/var/run/qemu-server/100.qmp"),
            ),
            (
                "kvm -chardev socket,id=hmp,path=/a -mon chardev=hmp,mode=readline -qmp unix:/b,server,nowait",
                Some("/b"),
            ),
            ("kvm -qmp tcp:localhost:4444", None),
            ("kvm -mon chardev=x,mode=control", None),
            ("kvm", None),
        ] {
            assert_eq!(monitor(&args(line)).as_deref(), path, "{line}");
        }
    }

    /// A host with VM 100 running as process 4711, VM 102 stopped, and container 101.
    fn host() -> (tempfile::TempDir, Sysroot) {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| write(dir.path(), path, text);
        write("etc/pve/qemu-server/100.conf", "cores: 2\n");
        write("etc/pve/qemu-server/102.conf", "cores: x\n");
        write("etc/pve/lxc/101.conf", "");
        write("run/qemu-server/100.pid", "4711\n");
        write(
            "proc/4711/cmdline",
            "/usr/bin/kvm\0-id\0VM\0-smp\0cpus=2,threads=2\0-pidfile\0/var/run/qemu-server/100.pid\0",
        );
        thread(dir.path(), 4711, 4711, "kvm", "0-5");
        thread(dir.path(), 4711, 4712, "CPU 0/KVM", "6");
        thread(dir.path(), 4711, 4713, "CPU 1/KVM", "0-23");
        write(
            "proc/4711/task/4714/comm",
            "a thread that went while being read\n",
        );
        write("proc/900/cmdline", "/bin/bash\0");
        thread(dir.path(), 900, 900, "bash", "0-23");
        let root = Sysroot::new(dir.path());
        (dir, root)
    }

    fn write(base: &Path, path: &str, text: &str) {
        let path = base.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn thread(base: &Path, pid: i32, tid: i32, name: &str, allowed: &str) {
        let stat = format!(
            "{tid} ({name}) S 1 0 0 0 -1 64 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 18446744073709551615 0 0 0 0 0 0 0 \
             2147483647 0 0 0 0 17 9 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
        );
        write(base, &format!("proc/{pid}/task/{tid}/stat"), &stat);
        write(
            base,
            &format!("proc/{pid}/task/{tid}/status"),
            &format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n"),
        );
        if pid == tid {
            write(base, &format!("proc/{pid}/stat"), &stat);
        }
    }

    #[test]
    fn a_vm_is_found_and_its_threads_have_roles() {
        let (_dir, root) = host();
        let qemu = running(&root, VmId(100)).unwrap();
        assert_eq!(
            (qemu.id.pid, qemu.id.start, qemu.threads_per_core),
            (4711, 42, 2)
        );
        assert_eq!(qemu.monitor.as_deref(), Some("/run/qemu-server/100.qmp"));
        let found = threads(&root, &qemu, Duration::ZERO).unwrap();
        let shown: Vec<_> = found
            .threads
            .iter()
            .map(|thread| format!("{} {} {}", thread.id.tid, thread.role, thread.allowed))
            .collect();
        assert_eq!(
            shown,
            ["4711 emulator 0-5", "4712 vCPU 0 6", "4713 vCPU 1 0-23"]
        );
        assert_eq!(found.vcpus().to_string(), "0-1");
        assert_eq!(
            found.notes,
            [
                "VM 100: its monitor is not asked under --sysroot; going on with the threads' names from /proc"
            ]
        );
        let other = by_pid(&root, 4711).unwrap();
        assert_eq!(
            (other.id, other.to_string().as_str()),
            (qemu.id, "QEMU 4711")
        );
        assert_eq!(by_task(&root, VmId(100), qemu.id).unwrap(), qemu);
        let reused = TaskId {
            start: 41,
            ..qemu.id
        };
        assert!(by_task(&root, VmId(100), reused).unwrap_err().is_gone());
    }

    #[test]
    fn what_does_not_run_says_why() {
        let (dir, root) = host();
        let run = dir.path().join("run/qemu-server");
        let shown = run.join("102.pid").display().to_string();
        let why = |pid_file: &str| {
            fs::write(run.join("102.pid"), pid_file).unwrap();
            assert_eq!(find(&root, VmId(102)).unwrap(), None);
            running(&root, VmId(102)).unwrap_err().to_string()
        };
        for (text, reason) in [
            ("900\n", "process 900 is /bin/bash, no QEMU"),
            ("4711", "process 4711 is another QEMU"),
            ("5555\n", "process 5555 is gone"),
            ("", "\"\" is no process id"),
            ("-1\n", "\"-1\" is no process id"),
            ("../1\n", "\"../1\" is no process id"),
        ] {
            assert_eq!(
                why(text),
                format!(
                    "VM 102: it does not run: {shown} is stale: {reason}; qm start 102 starts it"
                )
            );
        }
        fs::remove_file(run.join("102.pid")).unwrap();
        assert_eq!(
            running(&root, VmId(102)).unwrap_err().to_string(),
            format!("VM 102: it does not run: there is no {shown}; qm start 102 starts it")
        );
        assert_eq!(
            running(&root, VmId(101)).unwrap_err().to_string(),
            "101: it is a container; only VMs have a QEMU"
        );
        assert_eq!(
            running(&root, VmId(103)).unwrap_err().to_string(),
            format!(
                "VM 103: no such VM on this node: there is no {}",
                dir.path().join("etc/pve/qemu-server/103.conf").display()
            )
        );
        assert_eq!(
            by_pid(&root, 900).unwrap_err().to_string(),
            "process 900: it is /bin/bash, no QEMU"
        );
        assert_eq!(
            by_pid(&root, 5555).unwrap_err().to_string(),
            "process 5555: no such process"
        );
    }

    #[test]
    fn without_the_pid_file_the_process_tells() {
        let (_dir, root) = host();
        let denied = || {
            Error::io(
                "/run/qemu-server/100.pid",
                "read",
                std::io::ErrorKind::PermissionDenied.into(),
            )
        };
        let found = by_pid_file(&root, VmId(100), &pid_file(VmId(100)), denied()).unwrap();
        assert_eq!(found, look_up(&root, VmId(100)).unwrap());
        let none = by_pid_file(&root, VmId(102), &pid_file(VmId(102)), denied()).unwrap();
        assert_eq!(
            none,
            Lookup::Stopped("/run/qemu-server/100.pid: read: permission denied".into())
        );
    }

    #[test]
    fn settings_of_a_vm() {
        let (dir, root) = host();
        assert_eq!(conf(&root, VmId(100)).unwrap().vcpus(), 2);
        assert_eq!(
            conf(&root, VmId(102)).unwrap_err().to_string(),
            format!(
                "{}: cores: \"x\" is no count",
                dir.path().join("etc/pve/qemu-server/102.conf").display()
            )
        );
        assert!(conf(&root, VmId(101)).is_err());
        write(dir.path(), "etc/pve/qemu-server/99.conf.tmp", "");
        assert_eq!(all(&root), [VmId(100), VmId(102)]);
        assert!(all(&Sysroot::new("/nonexistent")).is_empty());
    }

    #[test]
    fn reservations_and_mappings_of_this_node() {
        let (dir, root) = host();
        assert!(pci_reservations(&root).unwrap().is_empty());
        write(
            dir.path(),
            "run/qemu-server/pci-id-reservations",
            "0000:01:00.0 100 pid:4711\n0000:02:00.0 102 pid:5555\n0000:03:00.0 102 time:1\n0000:04:00.0 102 time:99999999999\n",
        );
        let held: Vec<_> = pci_reservations(&root)
            .unwrap()
            .iter()
            .map(|held| held.address.to_string())
            .collect();
        assert_eq!(held, ["0000:01:00.0", "0000:04:00.0"]);

        write(dir.path(), "proc/sys/kernel/hostname", "pve1.example.org\n");
        let error = |id: &str| pci_mapping(&root, id).unwrap_err().to_string();
        let file = dir
            .path()
            .join("etc/pve/mapping/pci.cfg")
            .display()
            .to_string();
        assert_eq!(
            error("gpu"),
            format!("PCI mapping gpu: it is not there; see {file}")
        );
        write(
            dir.path(),
            "etc/pve/mapping/pci.cfg",
            "gpu\n\tmap node=pve1,path=0000:01:00\n\nnic\n\tmap node=x,path=0000:01:00\n",
        );
        assert_eq!(
            pci_mapping(&root, "gpu").unwrap(),
            [["01:00".parse().unwrap()]]
        );
        assert_eq!(
            error("nic"),
            format!("PCI mapping nic: it offers nothing on node pve1; see {file}")
        );
    }
}

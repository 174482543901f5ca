//! Writes a made-up host for `--sysroot`: the files of /proc, /sys, /run and /etc that Pinfold,
//! lscpu and lstopo read, for any number of CPUs, kernel threads, threads, IRQs, VMs and PCI
//! functions.

use std::fmt::Write;
use std::fs;
use std::io::{BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cache;
use crate::cpus::Cpus;

/// PF_KTHREAD.
const KTHREAD: u32 = 0x0020_0000;
/// PF_NO_SETAFFINITY.
const BOUND: u32 = 0x0400_0000;
/// hook refuses CPUs from this number on, since threads cannot be pinned to them.
const PINNABLE: u32 = 1024;
/// CPUs that share an L3 cache, if the host has that many.
const L3_CPUS: u32 = 16;
/// CPUs of a package.
const PACKAGE_CPUS: u32 = 256;
/// Threads of each user process.
const PROCESS_THREADS: u32 = 16;
/// The first pid of user processes; kernel threads are below.
const FIRST_USER_PID: u32 = 100_000;
/// The first pid of QEMU processes, with room for their threads.
const FIRST_QEMU_PID: u32 = 1_000_000;
const QEMU_PIDS: u32 = 10_000;
const FIRST_VMID: u32 = 100;
const CPU_FOLDER: &str = "sys/devices/system/cpu";

/// The number of objects of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::Args)]
pub struct Counts {
    /// CPUs, an even number: SMT siblings are N and N + half of them, or 2 N and 2 N + 1 above 1,024
    #[arg(long, default_value_t = 24)]
    pub cpus: u32,
    /// Kernel threads; one of four is bound by the kernel
    #[arg(long, default_value_t = 300)]
    pub kthreads: u32,
    /// Threads of user processes, sixteen in each
    #[arg(long, default_value_t = 500)]
    pub threads: u32,
    /// IRQs; one of four is managed by the kernel
    #[arg(long, default_value_t = 100)]
    pub irqs: u32,
    /// Running VMs; their settings divide the upper half of the CPUs
    #[arg(long, default_value_t = 1)]
    pub vms: u32,
    /// Cores that each VM's settings isolate, instead of its share of the upper half
    #[arg(long)]
    pub vm_cores: Option<u32>,
    /// PCI functions; one of eight is an NVMe disk, one of eight a network interface
    #[arg(long, default_value_t = 32)]
    pub pci: u32,
    /// Kernel threads and VMs' threads have the CPUs already that post-start sets, since threads
    /// cannot be set under --sysroot
    #[arg(long)]
    pub settled: bool,
}

/// Writes the host below `root`; how long its files are in all.
pub fn write(root: &Path, counts: Counts) -> Result<u64> {
    ensure!(
        counts.cpus >= 4 && counts.cpus.is_multiple_of(2),
        "{} CPUs: not an even number from 4 on",
        counts.cpus
    );
    ensure!(
        counts.kthreads + 3 < FIRST_USER_PID,
        "{} kernel threads: too many",
        counts.kthreads
    );
    let mut tree = Tree::new(root, counts);
    tree.cpus()?;
    tree.system()?;
    tree.kthreads()?;
    tree.threads()?;
    tree.irqs()?;
    tree.pci()?;
    tree.vms()?;
    Ok(tree.bytes)
}

/// The CPUs that a VM's settings isolate: its share of the cores in the upper half of the host, as
/// far as threads can be pinned to them.
pub fn isolated(counts: Counts, vm: u32) -> Vec<u32> {
    let cores = counts.cpus.min(PINNABLE) / 2;
    let upper = cores - cores / 2;
    let share = counts.vm_cores.unwrap_or(upper / counts.vms.max(1)).max(1);
    let first = cores / 2 + vm * share % upper;
    cpus_of_cores(counts.cpus, first..(first + share).min(cores))
}

/// The CPUs of cores, ascending: N and N + half of them, or on hosts with more CPUs than threads can
/// be pinned to 2 N and 2 N + 1, so that VMs can have whole cores.
fn cpus_of_cores(cpus: u32, cores: Range<u32>) -> Vec<u32> {
    if cpus > PINNABLE {
        return (2 * cores.start..2 * cores.end).collect();
    }
    let second = cores.start + cpus / 2..cores.end + cpus / 2;
    cores.chain(second).collect()
}

fn core_of(cpus: u32, cpu: u32) -> u32 {
    if cpus > PINNABLE {
        cpu / 2
    } else {
        cpu % (cpus / 2)
    }
}

struct Tree<'a> {
    root: &'a Path,
    counts: Counts,
    /// The folder that was made last; most files have neighbours.
    folder: PathBuf,
    /// The length of all files so far.
    bytes: u64,
    all: String,
    all_mask: String,
}

impl<'a> Tree<'a> {
    fn new(root: &'a Path, counts: Counts) -> Self {
        let all: Vec<u32> = (0..counts.cpus).collect();
        Self {
            root,
            counts,
            folder: PathBuf::new(),
            bytes: 0,
            all: list(&all),
            all_mask: mask(&all, counts.cpus),
        }
    }

    fn file(&mut self, path: &str, text: &str) -> Result<()> {
        let path = self.root.join(path);
        if let Some(parent) = path.parent()
            && parent != self.folder
        {
            cache::make(parent)?;
            self.folder = parent.to_owned();
        }
        self.bytes += text.len() as u64 + 1;
        cache::write(&path, format!("{text}\n"))
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let path = self.root.join(path);
        path.parent().map_or(Ok(()), cache::make)?;
        symlink(target, &path).with_context(|| format!("{}: cannot link", path.display()))
    }

    fn mode(&self, path: &str, mode: u32) -> Result<()> {
        let path = self.root.join(path);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("{}: cannot set the mode", path.display()))
    }

    /// The CPUs of `cpu`'s group, if each has `size` CPUs, siblings together.
    fn group(&self, cpu: u32, size: u32) -> (u32, Vec<u32>) {
        let cores = self.counts.cpus / 2;
        let size = (size / 2).clamp(1, cores);
        let number = core_of(self.counts.cpus, cpu) / size;
        let first = number * size;
        let group = first..(first + size).min(cores);
        (number, cpus_of_cores(self.counts.cpus, group))
    }

    fn cpus(&mut self) -> Result<()> {
        let cpus = self.counts.cpus;
        let all = self.all.clone();
        for file in ["present", "possible", "online"] {
            self.file(&format!("{CPU_FOLDER}/{file}"), &all)?;
        }
        for file in ["offline", "isolated", "nohz_full"] {
            self.file(&format!("{CPU_FOLDER}/{file}"), "")?;
        }
        self.file(&format!("{CPU_FOLDER}/kernel_max"), "8191")?;
        // As a 5900X has it, if the host is that small.
        let l3 = if cpus <= 32 { cpus / 2 } else { L3_CPUS };
        let mut cpuinfo = String::new();
        for cpu in 0..cpus {
            let folder = format!("{CPU_FOLDER}/cpu{cpu}");
            if cpu > 0 {
                self.file(&format!("{folder}/online"), "1")?;
            }
            let (core, siblings) = self.group(cpu, 2);
            let (package, in_package) = self.group(cpu, PACKAGE_CPUS);
            let (domain, in_domain) = self.group(cpu, l3);
            let files = [
                ("physical_package_id", package.to_string()),
                ("die_id", "0".to_owned()),
                ("core_id", core.to_string()),
                ("thread_siblings_list", list(&siblings)),
                ("thread_siblings", mask(&siblings, cpus)),
                ("core_cpus_list", list(&siblings)),
                ("core_cpus", mask(&siblings, cpus)),
                ("core_siblings_list", list(&in_package)),
                ("core_siblings", mask(&in_package, cpus)),
                ("package_cpus_list", list(&in_package)),
                ("package_cpus", mask(&in_package, cpus)),
            ];
            for (file, text) in files {
                self.file(&format!("{folder}/topology/{file}"), &text)?;
            }
            let caches = [
                ("1", "Data", "32K", core, &siblings),
                ("1", "Instruction", "32K", core, &siblings),
                ("2", "Unified", "512K", core, &siblings),
                ("3", "Unified", "32768K", domain, &in_domain),
            ];
            for (index, (level, kind, size, id, shared)) in caches.into_iter().enumerate() {
                let files = [
                    ("level", level.to_owned()),
                    ("type", kind.to_owned()),
                    ("size", size.to_owned()),
                    ("id", id.to_string()),
                    ("shared_cpu_list", list(shared)),
                    ("shared_cpu_map", mask(shared, cpus)),
                    ("coherency_line_size", "64".to_owned()),
                    ("ways_of_associativity", "8".to_owned()),
                    ("number_of_sets", "64".to_owned()),
                    ("physical_line_partition", "1".to_owned()),
                ];
                for (file, text) in files {
                    self.file(&format!("{folder}/cache/index{index}/{file}"), &text)?;
                }
            }
            let policy = format!("{CPU_FOLDER}/cpufreq/policy{cpu}");
            let files = [
                ("related_cpus", cpu.to_string()),
                ("affected_cpus", cpu.to_string()),
                ("scaling_governor", "schedutil".to_owned()),
                (
                    "scaling_available_governors",
                    "performance schedutil".to_owned(),
                ),
            ];
            for (file, text) in files {
                self.file(&format!("{policy}/{file}"), &text)?;
            }
            self.link(
                &format!("{folder}/cpufreq"),
                &format!("../cpufreq/policy{cpu}"),
            )?;
            write!(
                cpuinfo,
                "processor\t: {cpu}\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 33\n\
                 model name\t: made up\nphysical id\t: {package}\ncore id\t\t: {core}\n\
                 siblings\t: {}\ncpu cores\t: {}\nflags\t\t: fpu\n\n",
                in_package.len(),
                in_package.len() / 2
            )?;
        }
        self.file("proc/cpuinfo", cpuinfo.trim_end())?;
        let packages = (cpus / 2).div_ceil(PACKAGE_CPUS / 2);
        for node in 0..packages {
            let of_node = cpus_of_cores(cpus, node * PACKAGE_CPUS / 2..cpus / 2);
            let (_, cpus_of) = self.group(of_node[0], PACKAGE_CPUS);
            let folder = format!("sys/devices/system/node/node{node}");
            self.file(&format!("{folder}/cpulist"), &list(&cpus_of))?;
            self.file(&format!("{folder}/cpumap"), &mask(&cpus_of, cpus))?;
            self.file(
                &format!("{folder}/meminfo"),
                &format!("Node {node} MemTotal:       67108864 kB"),
            )?;
            let pages = format!("{folder}/hugepages/hugepages-1048576kB/nr_hugepages");
            self.file(&pages, "0")?;
        }
        let nodes: Vec<u32> = (0..packages).collect();
        for file in ["online", "possible", "has_cpu"] {
            self.file(&format!("sys/devices/system/node/{file}"), &list(&nodes))?;
        }
        Ok(())
    }

    fn system(&mut self) -> Result<()> {
        let (all, all_mask) = (self.all.clone(), self.all_mask.clone());
        for (path, text) in [
            (
                "proc/cmdline",
                "BOOT_IMAGE=/boot/vmlinuz root=/dev/mapper/pve-root quiet",
            ),
            ("proc/sys/kernel/osrelease", "6.12.57-1-pve"),
            ("proc/sys/kernel/hostname", "made-up"),
            ("proc/sys/kernel/timer_migration", "1"),
            ("proc/sys/kernel/watchdog_cpumask", &all),
            ("proc/sys/vm/stat_interval", "1"),
            ("proc/sys/vm/nr_hugepages", "0"),
            (
                "proc/meminfo",
                "MemTotal:       67108864 kB\nMemFree:        60000000 kB\n\
                 HugePages_Total:       0\nHugepagesize:       2048 kB",
            ),
            (
                "proc/swaps",
                "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority",
            ),
            (
                "proc/self/mountinfo",
                "23 1 253:0 / / rw,relatime shared:1 - ext4 /dev/mapper/pve-root rw",
            ),
            ("sys/devices/virtual/workqueue/cpumask", &all_mask),
            ("proc/irq/default_smp_affinity", &all_mask),
        ] {
            self.file(path, text)?;
        }
        self.cgroup("", "cpuset cpu memory", &[])?;
        self.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory")?;
        self.file("sys/fs/cgroup/cpuset.cpus.isolated", "")?;
        self.cgroup("lxc", "cpuset cpu memory", &[])?;
        for folder in ["run/systemd", "run/qemu-server", "etc/pve/lxc"] {
            cache::make(&self.root.join(folder))?;
        }
        Ok(())
    }

    fn cgroup(&mut self, path: &str, controllers: &str, pids: &[u32]) -> Result<()> {
        let folder = format!("sys/fs/cgroup/{path}");
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let all = self.all.clone();
        for (file, text) in [
            ("cgroup.procs", pids.join("\n")),
            ("cgroup.threads", pids.join("\n")),
            ("cgroup.subtree_control", controllers.to_owned()),
            ("cgroup.type", "domain".to_owned()),
            ("cpuset.cpus", String::new()),
            ("cpuset.cpus.effective", all),
            ("cpuset.cpus.exclusive", String::new()),
            ("cpuset.cpus.partition", "member".to_owned()),
        ] {
            self.file(&format!("{folder}/{file}"), &text)?;
        }
        Ok(())
    }

    /// A thread's files, and its process's if it is the first of one.
    fn thread(&mut self, pid: u32, tid: u32, task: &Task<'_>) -> Result<()> {
        let parent = if task.flags & KTHREAD == 0 { 1 } else { 2 };
        let stat = format!(
            "{tid} ({}) S {parent} 0 0 0 -1 {} 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 18446744073709551615 0 0 0 0 0 0 0 \
             2147483647 0 0 0 0 17 {} 0 0 0 0 0 0 0 0 0 0 0 0 0",
            task.name,
            task.flags,
            tid % self.counts.cpus
        );
        // Of the length that the kernel's have.
        let status = format!(
            "Name:\t{}\nUmask:\t0000\nState:\tS (sleeping)\nTgid:\t{pid}\nNgid:\t0\nPid:\t{tid}\nPPid:\t{parent}\n\
             TracerPid:\t0\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nFDSize:\t64\nGroups:\t \n\
             NStgid:\t{pid}\nNSpid:\t{tid}\n\
             NSpgid:\t0\nNSsid:\t0\nKthread:\t{}\nThreads:\t1\nSigQ:\t0/256000\nSigPnd:\t0000000000000000\n\
             ShdPnd:\t0000000000000000\nSigBlk:\t0000000000000000\nSigIgn:\tffffffffffffffff\n\
             SigCgt:\t0000000000000000\n\
             CapInh:\t0000000000000000\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\n\
             CapBnd:\t000001ffffffffff\n\
             CapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t0\nSeccomp_filters:\t0\n\
             Speculation_Store_Bypass:\tthread vulnerable\nSpeculationIndirectBranch:\tconditional enabled\n\
             Cpus_allowed:\t{}\nCpus_allowed_list:\t{}\nMems_allowed:\t00000001\nMems_allowed_list:\t0\n\
             voluntary_ctxt_switches:\t100\nnonvoluntary_ctxt_switches:\t1",
            task.name,
            u32::from(task.flags & KTHREAD != 0),
            task.mask,
            task.cpus
        );
        let cgroup = format!("0::{}", task.cgroup);
        let mut folders = vec![format!("proc/{pid}/task/{tid}")];
        if pid == tid {
            folders.push(format!("proc/{pid}"));
            self.file(&format!("proc/{pid}/cmdline"), task.cmdline)?;
        }
        for folder in folders {
            for (file, text) in [
                ("stat", &*stat),
                ("status", &*status),
                ("comm", task.name),
                ("cgroup", &*cgroup),
            ] {
                self.file(&format!("{folder}/{file}"), text)?;
            }
        }
        Ok(())
    }

    /// The CPUs of a thread that is not bound to any.
    fn free(&self) -> Vec<u32> {
        let Counts { cpus, settled, .. } = self.counts;
        let is_lower = |cpu: &u32| core_of(cpus, *cpu) < cpus.min(PINNABLE) / 4;
        (0..cpus).filter(|cpu| !settled || is_lower(cpu)).collect()
    }

    fn kthreads(&mut self) -> Result<()> {
        let (all, all_mask, cpus) = (self.all.clone(), self.all_mask.clone(), self.counts.cpus);
        let free = self.free();
        let kthread = Task {
            name: "kthreadd",
            flags: KTHREAD,
            cpus: &list(&free),
            mask: &mask(&free, cpus),
            cgroup: "/",
            cmdline: "",
        };
        let init = Task {
            name: "systemd",
            flags: 0,
            cpus: &all,
            mask: &all_mask,
            cgroup: "/init.scope",
            cmdline: "/sbin/init",
        };
        self.thread(1, 1, &init)?;
        self.thread(2, 2, &kthread)?;
        for n in 0..self.counts.kthreads {
            let pid = n + 3;
            if n % 4 == 3 {
                let cpu = n / 4 % cpus;
                let (name, mask) = (
                    format!("kworker/{cpu}:{}", n / 4 / cpus),
                    mask(&[cpu], cpus),
                );
                let bound = Task {
                    cpus: &cpu.to_string(),
                    mask: &mask,
                    name: &name,
                    flags: KTHREAD | BOUND,
                    ..kthread
                };
                self.thread(pid, pid, &bound)?;
            } else {
                let name = format!("kthread-{n}");
                let free = Task {
                    name: &name,
                    ..kthread
                };
                self.thread(pid, pid, &free)?;
            }
        }
        let children: Vec<String> = (0..self.counts.kthreads)
            .map(|n| (n + 3).to_string())
            .collect();
        self.file("proc/2/task/2/children", &(children.join(" ") + " "))
    }

    fn threads(&mut self) -> Result<()> {
        let (all, all_mask) = (self.all.clone(), self.all_mask.clone());
        for n in 0..self.counts.threads {
            let pid = FIRST_USER_PID + n / PROCESS_THREADS * PROCESS_THREADS;
            let name = format!("user-{}", n / PROCESS_THREADS);
            let task = Task {
                name: &name,
                flags: 0,
                cpus: &all,
                mask: &all_mask,
                cgroup: "/system.slice/user.service",
                cmdline: "/usr/bin/user\0",
            };
            self.thread(pid, FIRST_USER_PID + n, &task)?;
        }
        Ok(())
    }

    fn irqs(&mut self) -> Result<()> {
        let Counts { cpus, irqs, .. } = self.counts;
        let (all, all_mask) = (self.all.clone(), self.all_mask.clone());
        for n in 0..irqs {
            let folder = format!("proc/irq/{}", n + 24);
            let managed = n % 4 == 3;
            let cpu = n / 4 % cpus;
            let files = if managed {
                [
                    ("smp_affinity_list", cpu.to_string()),
                    ("smp_affinity", mask(&[cpu], cpus)),
                ]
            } else {
                [
                    ("smp_affinity_list", all.clone()),
                    ("smp_affinity", all_mask.clone()),
                ]
            };
            for (file, text) in files {
                self.file(&format!("{folder}/{file}"), &text)?;
            }
            self.file(
                &format!("{folder}/effective_affinity_list"),
                &cpu.to_string(),
            )?;
            self.file(&format!("{folder}/effective_affinity"), &mask(&[cpu], cpus))?;
            if managed {
                self.mode(&format!("{folder}/smp_affinity_list"), 0o444)?;
            }
        }
        // Too large to be put together in memory: 16,000 lines of 2,048 counters are 360 MB.
        let path = self.root.join("proc/interrupts");
        let file =
            fs::File::create(&path).with_context(|| format!("{}: cannot make", path.display()))?;
        let mut file = BufWriter::new(file);
        // As show_interrupts of kernel/irq/proc.c has them, for IRQ numbers of eight digits.
        let mut head = " ".repeat(16);
        for cpu in 0..cpus {
            head += &format!("{:<11}", format!("CPU{cpu}"));
        }
        writeln!(file, "{head}")?;
        let counters = format!(" {:>10}", 0).repeat(usize::try_from(cpus)?);
        for n in 0..irqs {
            writeln!(
                file,
                "{:>8}:{counters}  IR-PCI-MSIX-0000:{:02x}:00.0 {:>4}-edge      device{}q{}",
                n + 24,
                n / 64 % 256,
                n % 64,
                n / 64,
                n % 64
            )?;
        }
        writeln!(file, "     NMI:{counters}   Non-maskable interrupts")?;
        file.flush()
            .with_context(|| format!("{}: cannot write", path.display()))?;
        self.bytes += path.metadata()?.len();
        Ok(())
    }

    fn pci(&mut self) -> Result<()> {
        self.file("sys/bus/pci/rescan", "")?;
        for driver in ["nvme", "e1000e", "vfio-pci"] {
            cache::make(&self.root.join(format!("sys/bus/pci/drivers/{driver}")))?;
        }
        for folder in ["sys/class/net", "sys/class/block", "sys/bus/pci/devices"] {
            cache::make(&self.root.join(folder))?;
        }
        for n in 0..self.counts.pci {
            let address = format!("{:04x}:{:02x}:{:02x}.0", n / 8192, n / 32 % 256, n % 32);
            let below = format!("devices/pci{:04x}:{:02x}/{address}", n / 8192, n / 32 % 256);
            let folder = format!("sys/{below}");
            let (class, driver) = match n % 8 {
                0 => ("0x010802", "nvme"),
                1 => ("0x020000", "e1000e"),
                _ => ("0x030200", "vfio-pci"),
            };
            for (file, text) in [
                ("class", class),
                ("vendor", "0x1022"),
                ("device", "0x1453"),
                ("remove", ""),
            ] {
                self.file(&format!("{folder}/{file}"), text)?;
            }
            self.link(
                &format!("{folder}/driver"),
                &format!("../../../bus/pci/drivers/{driver}"),
            )?;
            let group = format!("sys/kernel/iommu_groups/{n}");
            cache::make(&self.root.join(&group))?;
            self.link(
                &format!("{folder}/iommu_group"),
                &format!("../../../kernel/iommu_groups/{n}"),
            )?;
            self.link(
                &format!("sys/bus/pci/devices/{address}"),
                &format!("../../../{below}"),
            )?;
            match n % 8 {
                0 => {
                    let disk = format!("{below}/nvme/nvme{n}/nvme{n}n1");
                    self.file(&format!("sys/{disk}/dev"), &format!("259:{n}"))?;
                    self.link(
                        &format!("sys/class/block/nvme{n}n1"),
                        &format!("../../{disk}"),
                    )?;
                }
                1 => {
                    let interface = format!("{below}/net/eth{n}");
                    self.file(&format!("sys/{interface}/flags"), "0x1002")?;
                    self.link(
                        &format!("sys/class/net/eth{n}"),
                        &format!("../../{interface}"),
                    )?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The CPUs of the nodes of these, without these: where a VM's other threads are to run.
    fn beside(&self, isolated: &[u32]) -> Vec<u32> {
        let mut nodes: Vec<u32> = (isolated.iter())
            .flat_map(|cpu| self.group(*cpu, PACKAGE_CPUS).1)
            .filter(|cpu| !isolated.contains(cpu))
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    fn vms(&mut self) -> Result<()> {
        let (count, settled) = (self.counts.cpus, self.counts.settled);
        self.cgroup("qemu.slice", "cpuset cpu memory", &[])?;
        if settled {
            // A folder that is made in a tree has no files of a cgroup's.
            self.cgroup("qemu-decoupled.slice", "cpuset cpu memory", &[])?;
            self.cgroup("qemu-decoupled.slice/100.scope", "", &[])?;
        }
        for vm in 0..self.counts.vms {
            let id = FIRST_VMID + vm;
            let pid = FIRST_QEMU_PID + vm * QEMU_PIDS;
            let isolated = isolated(self.counts, vm);
            self.file(
                &format!("etc/pve/qemu-server/{id}.conf"),
                &format!(
                    "name: vm{id}\nsockets: 1\ncores: {}\nmemory: 1024\nhookscript: local:snippets/hook",
                    isolated.len()
                ),
            )?;
            let settings = format!("etc/pinfold/{id}.toml");
            let cpus = list(&isolated);
            self.file(
                &settings,
                &format!("isolated = \"{cpus}\"\npins = \"{cpus}\""),
            )?;
            self.mode(&settings, 0o644)?;
            self.file(&format!("run/qemu-server/{id}.pid"), &pid.to_string())?;
            let scope = format!("qemu.slice/{id}.scope");
            self.cgroup(&scope, "", &[pid])?;
            let cmdline = format!(
                "/usr/bin/kvm\0-id\0{id}\0-name\0vm{id},debug-threads=on\0-chardev\0\
                 socket,id=qmp,path=/var/run/qemu-server/{id}.qmp,server=on,wait=off\0-mon\0chardev=qmp,mode=control\0\
                 -pidfile\0/var/run/qemu-server/{id}.pid\0-smp\0{},sockets=1,cores={0},maxcpus={0}\0",
                isolated.len()
            );
            let names = [
                "kvm".to_owned(),
                "call_rcu".to_owned(),
                "IO mon_iothread".to_owned(),
            ]
            .into_iter()
            .chain((0..isolated.len()).map(|vcpu| format!("CPU {vcpu}/KVM")));
            for (tid, name) in (pid..).zip(names) {
                let vcpu = (tid - pid)
                    .checked_sub(3)
                    .and_then(|n| isolated.get(usize::try_from(n).ok()?));
                let on: Vec<u32> = match vcpu {
                    Some(cpu) if settled => vec![*cpu],
                    None if settled => self.beside(&isolated),
                    _ => (0..count).collect(),
                };
                let task = Task {
                    name: &name,
                    flags: 0,
                    cpus: &list(&on),
                    mask: &mask(&on, count),
                    cgroup: &format!("/{scope}"),
                    cmdline: &cmdline,
                };
                self.thread(pid, tid, &task)?;
            }
        }
        Ok(())
    }
}

/// The contents of a thread's files.
#[derive(Clone, Copy)]
struct Task<'a> {
    name: &'a str,
    flags: u32,
    cpus: &'a str,
    mask: &'a str,
    cgroup: &'a str,
    cmdline: &'a str,
}

fn list(cpus: &[u32]) -> String {
    Cpus(cpus.iter().copied().collect()).to_string()
}

/// A mask of the kernel's, of as many words as the host's CPUs take.
fn mask(cpus: &[u32], of: u32) -> String {
    let mut words = vec![0_u32; usize::try_from(of.div_ceil(32)).unwrap_or_default()];
    for cpu in cpus {
        if let Some(word) = usize::try_from(cpu / 32)
            .ok()
            .and_then(|n| words.get_mut(n))
        {
            *word |= 1 << (cpu % 32);
        }
    }
    let words: Vec<String> = words
        .iter()
        .rev()
        .map(|word| format!("{word:08x}"))
        .collect();
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_a_word_for_each_32_cpus() {
        assert_eq!(mask(&[0, 33], 64), "00000002,00000001");
        assert_eq!(mask(&[5], 24), "00000020");
    }

    #[test]
    fn vms_divide_the_upper_half() {
        let counts = Counts {
            cpus: 24,
            kthreads: 0,
            threads: 0,
            irqs: 0,
            vms: 2,
            vm_cores: None,
            pci: 0,
            settled: false,
        };
        assert_eq!(list(&isolated(counts, 0)), "6-8,18-20");
        assert_eq!(list(&isolated(counts, 1)), "9-11,21-23");
        let one = Counts { vms: 1, ..counts };
        assert_eq!(list(&isolated(one, 0)), "6-11,18-23");
        // One of a given size has it, however many there are.
        for vms in [1, 2, 4] {
            let sized = Counts {
                vms,
                vm_cores: Some(1),
                ..counts
            };
            assert_eq!(list(&isolated(sized, 0)), "6,18");
        }
        let large = Counts {
            cpus: 2048,
            vms: 40,
            ..counts
        };
        assert_eq!(list(&isolated(large, 0)), "512-523");
        assert_eq!(list(&isolated(large, 39)), "980-991");
        let many = Counts { vms: 40, ..counts };
        assert!((0..40).all(|vm| !isolated(many, vm).is_empty()));
    }

    #[test]
    fn a_host_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let counts = Counts {
            cpus: 24,
            kthreads: 8,
            threads: 20,
            irqs: 8,
            vms: 1,
            vm_cores: None,
            pci: 8,
            settled: false,
        };
        write(dir.path(), counts).unwrap();
        let read = |path: &str| fs::read_to_string(dir.path().join(path)).unwrap();
        assert_eq!(read("sys/devices/system/cpu/online"), "0-23\n");
        assert_eq!(
            read("sys/devices/system/cpu/cpu7/cache/index3/shared_cpu_list"),
            "6-11,18-23\n"
        );
        assert_eq!(read("proc/2/task/2/children"), "3 4 5 6 7 8 9 10 \n");
        assert_eq!(read("proc/irq/27/smp_affinity_list"), "0\n");
        assert_eq!(
            read("etc/pinfold/100.toml"),
            "isolated = \"6-11,18-23\"\npins = \"6-11,18-23\"\n"
        );
        assert!(read("proc/1000000/cmdline").starts_with("/usr/bin/kvm\0"));
        assert!(
            dir.path()
                .join("sys/bus/pci/devices/0000:00:00.0/driver")
                .exists()
        );
    }
}

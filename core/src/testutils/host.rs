//! A made-up host: a machine with processes, IRQs, cgroups and VMs.

use std::fs;
use std::path::Path;

use super::{files, machine};
use crate::host::Host;
use crate::sys::cpu;

/// `PF_KTHREAD`, and `PF_NO_SETAFFINITY` with it.
const KTHREAD: u32 = 0x0020_0000;
const BOUND: u32 = 0x0420_0000;

/// A host in a folder that is removed with this value.
#[derive(Debug)]
pub struct MadeUpHost {
    dir: tempfile::TempDir,
    /// The host.
    pub root: Host,
}

impl MadeUpHost {
    /// A host with a machine's CPUs and what every host has.
    ///
    /// # Panics
    /// If there is no such machine.
    pub fn new(machine: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&machine::text(machine), dir.path());
        let root = Host::new(dir.path());
        let host = Self { dir, root };
        let present = cpu::present(&host.root).unwrap();
        let all = present.to_string();
        for cpu in present.iter().skip(1) {
            host.file(&format!("sys/devices/system/cpu/cpu{cpu}/online"), "1");
        }
        host.thread(1, 1, "systemd", &all, 0);
        host.thread(2, 2, "kthreadd", &all, KTHREAD);
        host.thread(3, 3, "kswapd0", &all, KTHREAD);
        host.file("proc/2/task/2/children", "3 40");
        host.thread(40, 40, "ksoftirqd/6", "6", BOUND);
        host.cgroup("", &[]);
        host.cgroup("system.slice", &[]);
        host.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory");
        host.file("sys/devices/virtual/workqueue/cpumask", &present.to_mask());
        host.file("proc/irq/default_smp_affinity", &present.to_mask());
        host.file("proc/irq/24/smp_affinity_list", &all);
        host.file(
            "proc/interrupts",
            "      CPU0\n 24:      3  PCI-MSI 524288-edge      nvme0q0\n",
        );
        host.file("proc/sys/vm/stat_interval", "1");
        host.file("proc/sys/kernel/osrelease", "6.1.0-44-amd64");
        host.file(
            "proc/cmdline",
            "BOOT_IMAGE=/boot/vmlinuz root=/dev/sda1 quiet",
        );
        fs::create_dir(host.root.path("run")).unwrap();
        host
    }

    /// A file of one or more lines.
    pub fn file(&self, path: &str, text: &str) {
        files::write(self.dir.path(), path, &format!("{text}\n"));
    }

    /// A thread, as [`files::thread`] has it, in system.slice.
    pub fn thread(&self, pid: i32, tid: i32, name: &str, cpus: &str, flags: u32) {
        files::thread(self.dir.path(), pid, tid, name, cpus, flags);
        if pid == tid {
            self.file(&format!("proc/{pid}/comm"), name);
            self.file(&format!("proc/{pid}/cgroup"), "0::/system.slice");
        }
    }

    fn cgroup(&self, path: &str, pids: &[i32]) {
        let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
        self.file(
            &format!("sys/fs/cgroup/{path}/cgroup.procs"),
            &pids.join("\n"),
        );
        self.file(&format!("sys/fs/cgroup/{path}/cpuset.cpus"), "");
    }

    /// VMID.conf of a VM that does not run.
    pub fn conf(&self, vmid: u32, conf: &str) {
        files::vm_conf(self.dir.path(), vmid, &format!("{conf}\n"));
    }

    /// A VM that runs: its QEMU is process `vmid`, with a thread per vCPU on these CPUs.
    pub fn vm(&self, vmid: u32, cpus: &[usize]) {
        let all = cpu::present(&self.root).unwrap().to_string();
        self.conf(vmid, &format!("cores: {}", cpus.len()));
        self.file(&format!("run/qemu-server/{vmid}.pid"), &vmid.to_string());
        let pid = vmid.cast_signed();
        self.thread(pid, pid, "kvm", &all, 0);
        for (vcpu, on) in (0..).zip(cpus) {
            self.thread(
                pid,
                pid * 100 + vcpu,
                &format!("CPU {vcpu}/KVM"),
                &on.to_string(),
                0,
            );
        }
        self.file(
            &format!("proc/{vmid}/cmdline"),
            &format!("/usr/bin/kvm\0-pidfile\0/var/run/qemu-server/{vmid}.pid\0"),
        );
        self.file(
            &format!("proc/{vmid}/cgroup"),
            &format!("0::/qemu.slice/{vmid}.scope"),
        );
        self.cgroup("qemu.slice", &[]);
        self.cgroup(&format!("qemu.slice/{vmid}.scope"), &[pid]);
    }

    /// Every file with its text, in order.
    pub fn snapshot(&self) -> Vec<(String, String)> {
        fn walk(folder: &Path, files: &mut Vec<(String, String)>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                files.push((
                    path.display().to_string(),
                    fs::read_to_string(&path).unwrap_or_default(),
                ));
                if path.is_dir() {
                    walk(&path, files);
                }
            }
        }
        let mut files = Vec::new();
        walk(self.dir.path(), &mut files);
        files.sort();
        files
    }
}

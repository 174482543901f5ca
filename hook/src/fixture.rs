//! A made-up host for tests: a machine of core's tests with processes, IRQs, cgroups and VMs on it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use pinfold_core::state::Store;
use pinfold_core::sys::{cpu, task};
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Host, Knob};

use crate::machine;
use crate::settings;
use crate::state::reservation::{Isolation, Phase, Reservation};

/// PF_KTHREAD, and PF_NO_SETAFFINITY with it.
const KTHREAD: u32 = 0x0020_0000;
const BOUND: u32 = 0x0420_0000;

pub(crate) struct MadeUpHost {
    dir: tempfile::TempDir,
    pub root: Host,
}

impl MadeUpHost {
    /// A host with a machine's CPUs and what every host has.
    pub(crate) fn new(machine: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_, text) = machine::all()
            .into_iter()
            .find(|(name, _)| name == machine)
            .unwrap();
        machine::expand(&text, dir.path());
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

    pub(crate) fn file(&self, path: &str, text: &str) {
        let path = self.root.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    pub(crate) fn thread(&self, pid: i32, tid: i32, name: &str, cpus: &str, flags: u32) {
        let stat = format!(
            "{tid} ({name}) S 1 0 0 0 -1 {flags} 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 18446744073709551615 0 0 0 0 0 0 0 \
             2147483647 0 0 0 0 17 9 0 0 0 0 0 0 0 0 0 0 0 0 0"
        );
        self.file(&format!("proc/{pid}/task/{tid}/stat"), &stat);
        self.file(
            &format!("proc/{pid}/task/{tid}/status"),
            &format!("Cpus_allowed_list:\t{cpus}"),
        );
        if pid == tid {
            self.file(&format!("proc/{pid}/stat"), &stat);
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
    pub(crate) fn conf(&self, vmid: u32, conf: &str) {
        self.file(&format!("etc/pve/qemu-server/{vmid}.conf"), conf);
    }

    /// A VM's settings, which must be root's alone.
    pub(crate) fn settings(&self, vmid: u32, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = format!("etc/pinfold/{vmid}.toml");
        self.file(&path, text);
        fs::set_permissions(self.root.path(path), fs::Permissions::from_mode(0o644)).unwrap();
    }

    /// A VM that runs: its QEMU is process `vmid`, with a thread per vCPU on these CPUs.
    pub(crate) fn vm(&self, vmid: u32, cpus: &[usize]) {
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

    /// The state that hook has for a VM, with its threads' CPUs as those that hook has set.
    pub(crate) fn reserve(&self, vmid: u32, phase: Phase, settings: &str) {
        let mut store: Store<Reservation> =
            Store::open(&self.root, Duration::from_secs(1)).unwrap();
        let qemu = vm::find(&self.root, VmId::try_from(vmid).unwrap())
            .unwrap()
            .map(|qemu| qemu.id);
        let settings = settings::resolve(&self.root, settings, "test", 1).unwrap();
        for task in qemu
            .iter()
            .flat_map(|qemu| task::tasks(&self.root, qemu.pid).unwrap())
        {
            let found = task::affinity(&self.root, &task.id).unwrap();
            let object = pinfold_core::Setting::new(Knob::Thread(task.id), "", found.clone());
            store.baseline.plan(vec![object], |_, _| (&found).into());
        }
        let isolation = Isolation::Hotplug;
        let reservation = Reservation {
            phase,
            isolation,
            settings,
            qemu,
            starter: None,
            idle_vm_stopped: false,
        };
        store.reservations.insert(vmid, reservation);
        store.save().unwrap();
    }

    /// Every file with its text, in order.
    pub(crate) fn snapshot(&self) -> Vec<(String, String)> {
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

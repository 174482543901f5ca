//! What a VM's vCPUs had of their CPUs in a whole run: read while its QEMU still runs, and kept under
//! /run/pinfold, since nothing is left to read when post-stop comes.

use std::collections::BTreeMap;

use pinfold_core::state::store::{self, Store};
use pinfold_core::sys::{activity, task};
use pinfold_core::vm::{self, Role, VmId};
use pinfold_core::{Error, Host, Result, TaskId};
use serde::{Deserialize, Serialize};

use super::reservation::Reservation;

/// The file beside the state.
const FILE: &str = "counters.json";

/// What happened to the vCPUs of a QEMU since it was started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counters {
    /// How many seconds before they were read QEMU was started.
    pub seconds: u64,
    /// How many vCPUs there were.
    pub vcpus: usize,
    /// Their time on CPUs, in nanoseconds.
    pub run_ns: u64,
    /// How long they could have run and waited: what the guest sees as steal time.
    pub steal_ns: u64,
    /// The vCPU that waited longest, and how long.
    pub longest_vcpu: usize,
    pub longest_ns: u64,
    /// What could run on the VM's CPUs and could be elsewhere when they were read.
    pub strays: Option<usize>,
    /// Whether post-stop has reported it.
    #[serde(default)]
    pub reported: bool,
}

impl Counters {
    /// Reads them; `None` if the process has no vCPU threads any more.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub(crate) fn read(root: &Host, qemu: &TaskId) -> Result<Option<Self>> {
        let tasks = match task::tasks(root, qemu.pid) {
            Err(error) if error.is_gone() => return Ok(None),
            tasks => tasks?,
        };
        let mut found = Self {
            seconds: age(root, qemu)?,
            vcpus: 0,
            run_ns: 0,
            steal_ns: 0,
            longest_vcpu: 0,
            longest_ns: 0,
            strays: None,
            reported: false,
        };
        for task in tasks {
            let Role::Vcpu(vcpu) = vm::role_by_name(&task.name) else {
                continue;
            };
            let time = match activity::run_time(root, &task.id) {
                Err(error) if error.is_gone() => continue,
                time => time?,
            };
            found.vcpus += 1;
            found.run_ns += time.run;
            found.steal_ns += time.wait;
            if time.wait > found.longest_ns {
                (found.longest_vcpu, found.longest_ns) = (vcpu, time.wait);
            }
        }
        Ok((found.vcpus > 0).then_some(found))
    }

    /// In one line.
    pub(crate) fn to_line(&self, vmid: VmId) -> String {
        let Self { seconds, vcpus, .. } = self;
        let in_seconds = |ns: u64| {
            let ms = ns / 1_000_000;
            format!("{}.{:03} s", ms / 1000, ms % 1000)
        };
        let (run, steal) = (in_seconds(self.run_ns), in_seconds(self.steal_ns));
        let longest = match self.longest_ns {
            0 => String::new(),
            ns => format!(", vCPU {} longest, {}", self.longest_vcpu, in_seconds(ns)),
        };
        let strays = match self.strays {
            None => String::new(),
            Some(1) => "; 1 stray".to_owned(),
            Some(count) => format!("; {count} strays"),
        };
        format!(
            "VM {vmid}, from its start to its pre-stop, {seconds} s: {vcpus} vCPUs ran {run} and waited \
             {steal} for a CPU{longest}{strays}"
        )
    }
}

/// How many seconds ago a process was started.
fn age(root: &Host, process: &TaskId) -> Result<u64> {
    // proc_pid_stat(5): in clock ticks, of which there are 100 in a second for programs.
    const TICKS: u64 = 100;
    const UPTIME: &str = "proc/uptime";
    let text = root.read(UPTIME)?;
    let uptime = text
        .split('.')
        .next()
        .and_then(|text| text.parse::<u64>().ok());
    let uptime = uptime.ok_or_else(|| Error::malformed(UPTIME, "not seconds"))?;
    Ok(uptime.saturating_sub(process.start / TICKS))
}

/// Saves a VM's counters in place of earlier ones.
///
/// # Errors
/// If the file cannot be written. One that cannot be read is replaced.
pub(crate) fn keep(store: &Store<Reservation>, vmid: VmId, counters: Counters) -> Result<()> {
    let mut all = all(store.root()).unwrap_or_default();
    all.insert(vmid.into(), counters);
    let text =
        serde_json::to_string(&all).map_err(|error| Error::io(FILE, "save", error.into()))?;
    store.keep(FILE, &text)
}

/// The counters of all VMs' last runs that ended with a pre-stop.
///
/// # Errors
/// If the file exists and cannot be parsed.
pub(crate) fn all(root: &Host) -> Result<BTreeMap<u32, Counters>> {
    let Some(text) = store::kept(root, FILE)? else {
        return Ok(BTreeMap::new());
    };
    serde_json::from_str(&text).map_err(|error| Error::malformed(FILE, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;

    #[test]
    fn vcpus_are_added_up() {
        let host = MadeUpHost::new("5900x");
        host.vm(100, &[6, 18]);
        host.file("proc/uptime", "7380.42 1.0");
        let qemu = TaskId {
            pid: 100,
            tid: 100,
            start: 38_000,
        };
        assert_eq!(Counters::read(&host.root, &qemu).unwrap(), None);
        host.file("proc/100/task/100/schedstat", "9 9 9");
        host.file("proc/100/task/10000/schedstat", "1500000000 20000000 7");
        host.file("proc/100/task/10001/schedstat", "2000000000 1234000000 9");
        let mut counters = Counters::read(&host.root, &qemu).unwrap().unwrap();
        let line = |counters: &Counters| counters.to_line(100.try_into().unwrap());
        assert_eq!(
            line(&counters),
            "VM 100, from its start to its pre-stop, 7000 s: 2 vCPUs ran 3.500 s and waited 1.254 s for a \
             CPU, vCPU 1 longest, 1.234 s"
        );
        counters.strays = Some(1);
        assert!(line(&counters).ends_with(", 1.234 s; 1 stray"));
        counters.strays = Some(0);
        counters.longest_ns = 0;
        assert!(line(&counters).ends_with(" for a CPU; 0 strays"));
    }
}

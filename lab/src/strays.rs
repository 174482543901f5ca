//! What may still run on a set of CPUs, looked up independently of the product: the tests'
//! yardstick.

use crate::cpus::Cpus;
use crate::proc::{self, names, read};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

/// What may still run on the CPUs asked about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strays {
    /// User threads, but for the vCPU threads of the VMs named.
    pub threads: Vec<Stray>,
    /// vCPU threads of the VMs named that may run elsewhere than on their VM's CPUs.
    #[serde(default)]
    pub vcpus: Vec<Stray>,
    /// Kernel threads that the kernel would let be moved.
    pub kthreads: Vec<Stray>,
    /// Unbound kworkers, which follow only the workqueues' mask.
    pub kworkers: Vec<Stray>,
    /// Movable IRQs with one of the CPUs in their mask.
    pub irqs: Vec<Irq>,
    /// IRQs with none of the CPUs in their mask, but with the next interrupt, which moves them,
    /// still to come there.
    pub moving: Vec<Irq>,
    /// `/proc/irq/default_smp_affinity`, if one of the CPUs is in it.
    pub default_irq_mask: Option<String>,
    /// The unbound workqueues' mask, if one of the CPUs is in it.
    pub workqueue_mask: Option<String>,
    /// Network queues that hand received packets on to one of the CPUs.
    #[serde(default)]
    pub queues: Vec<String>,
    /// What the kernel binds there itself: no strays.
    pub kernel_bound: Vec<String>,
}

/// A thread that may run on CPUs that it should not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stray {
    /// Its process.
    pub pid: i32,
    /// The thread.
    pub tid: i32,
    /// Its name.
    pub comm: String,
    /// The CPUs on which it may run.
    pub cpus: String,
    /// Its cgroup.
    pub cgroup: String,
}

/// An IRQ that may come to CPUs that it should not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Irq {
    /// Its number.
    pub number: u32,
    /// Who handles it.
    pub name: String,
    /// CPUs it may be sent to.
    pub cpus: String,
    /// The CPU it is sent to now.
    pub effective: String,
}

impl Strays {
    /// Nothing that could have been kept away is left.
    pub fn is_clean(&self) -> bool {
        let Self {
            threads,
            vcpus,
            kthreads,
            kworkers,
            irqs,
            moving,
            default_irq_mask,
            workqueue_mask,
            queues,
            kernel_bound: _,
        } = self;
        threads.is_empty()
            && vcpus.is_empty()
            && kthreads.is_empty()
            && kworkers.is_empty()
            && irqs.is_empty()
            && moving.is_empty()
            && default_irq_mask.is_none()
            && workqueue_mask.is_none()
            && queues.is_empty()
    }

    /// Except what the kernel itself spreads again when CPUs go offline or come online: virtio_net's IRQs over all
    /// that are online (`virtnet_cpu_online`), RCU's expedited workers over their leaf's
    /// (`rcutree_affinity_setting`). hook moves them again at the end; one that is killed before
    /// cannot.
    pub fn but_spread_anew(mut self) -> Self {
        self.irqs
            .retain(|irq| !irq.name.contains("-input.") && !irq.name.contains("-output."));
        self.kthreads
            .retain(|thread| !thread.comm.starts_with("rcu_exp_par_gp_"));
        self
    }
}

/// Looks for strays on these CPUs. The vCPU threads of `vms` belong there: each on its own VM's
/// CPUs, where they are given, and on no other.
pub fn find(cpus: &Cpus, vms: &[(u32, Option<Cpus>)]) -> Result<Strays> {
    let mut found = Strays::default();
    let mut qemus = BTreeMap::new();
    for (vm, own) in vms {
        qemus.insert(qemu_pid(*vm)?, own.as_ref().unwrap_or(cpus));
    }
    for thread in proc::threads() {
        let may_run_on = thread.cpus.parse::<Cpus>()?;
        let home = qemus.get(&thread.pid).filter(|_| is_vcpu(&thread.comm));
        let is_stray = match home {
            Some(own) => !may_run_on.are_within(own),
            None => may_run_on.meets(cpus),
        };
        if !is_stray {
            continue;
        }
        let stray = Stray {
            pid: thread.pid,
            tid: thread.tid,
            cgroup: proc::cgroup(thread.pid, thread.tid),
            comm: thread.comm,
            cpus: thread.cpus,
        };
        if home.is_some() {
            found.vcpus.push(stray);
            continue;
        }
        match (thread.kernel, thread.bound) {
            (false, false) => found.threads.push(stray),
            (true, false) => found.kthreads.push(stray),
            (true, true) if stray.comm.starts_with("kworker/u") => found.kworkers.push(stray),
            // Among them the io_uring threads of older kernels.
            (_, true) => found
                .kernel_bound
                .push(format!("{} {}", stray.comm, stray.cpus)),
        }
    }
    irqs(cpus, &mut found)?;
    let outside = |path: &str| -> Result<Option<String>> {
        let Some(mask) = read(path) else {
            return Ok(None);
        };
        Ok(Cpus::from_mask(&mask)?.meets(cpus).then_some(mask))
    };
    found.default_irq_mask = outside("/proc/irq/default_smp_affinity")?;
    found.workqueue_mask = outside("/sys/devices/virtual/workqueue/cpumask")?;
    let interfaces = Path::new("/sys/class/net");
    for interface in names(interfaces) {
        let queues = interfaces.join(&interface).join("queues");
        for queue in names(&queues) {
            let file = queues.join(&queue).join("rps_cpus");
            if let Some(mask) = file.to_str().map_or(Ok(None), outside)? {
                found.queues.push(format!("{interface} {queue} {mask}"));
            }
        }
    }
    Ok(found)
}

fn irqs(cpus: &Cpus, found: &mut Strays) -> Result<()> {
    let folder = Path::new("/proc/irq");
    for number in names(folder)
        .iter()
        .filter_map(|name| name.parse::<u32>().ok())
    {
        let own = folder.join(number.to_string());
        let actions: Vec<_> = names(&own)
            .into_iter()
            .filter(|name| own.join(name).is_dir())
            .collect();
        let (Some(mask), Some(effective)) = (
            read(own.join("smp_affinity_list")),
            read(own.join("effective_affinity_list")),
        ) else {
            continue;
        };
        // One without a handler gets its place when a driver asks for it.
        let meant = mask.parse::<Cpus>()?.meets(cpus);
        if actions.is_empty() || !(meant || effective.parse::<Cpus>()?.meets(cpus)) {
            continue;
        }
        let name = actions.join(" ");
        if movable(&own.join("smp_affinity_list"), &mask) {
            let irq = Irq {
                number,
                name,
                cpus: mask,
                effective,
            };
            if meant {
                found.irqs.push(irq)
            } else {
                found.moving.push(irq)
            }
        } else {
            found
                .kernel_bound
                .push(format!("irq {number} {name} {mask}"));
        }
    }
    Ok(())
}

/// The kernel shows it by refusing to set the value that is set already.
fn movable(path: &Path, mask: &str) -> bool {
    OpenOptions::new()
        .write(true)
        .open(path)
        .is_ok_and(|mut file| file.write_all(mask.as_bytes()).is_ok())
}

fn qemu_pid(vm: u32) -> Result<i32> {
    let path = format!("/run/qemu-server/{vm}.pid");
    let text = read(&path).with_context(|| format!("{path}: cannot read"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path}: no process id"))
}

/// `CPU n/KVM`, or `/TCG` without KVM.
fn is_vcpu(comm: &str) -> bool {
    let number = comm.strip_prefix("CPU ").and_then(|rest| {
        rest.strip_suffix("/KVM")
            .or_else(|| rest.strip_suffix("/TCG"))
    });
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_threads_are_found_by_name() {
        for (comm, vcpu) in [
            ("CPU 0/KVM", true),
            ("CPU 11/TCG", true),
            ("CPU /KVM", false),
            ("kvm", false),
            ("CPU 1/KVMx", false),
        ] {
            assert_eq!(is_vcpu(comm), vcpu, "{comm}");
        }
    }

    #[test]
    fn kernel_bound_threads_are_not_strays() {
        let mut strays = Strays {
            kernel_bound: vec!["migration/6 6".to_owned()],
            ..Strays::default()
        };
        assert!(strays.is_clean());
        strays.workqueue_mask = Some("ffffff".to_owned());
        assert!(!strays.is_clean());
        let unpinned = Stray {
            pid: 1,
            tid: 2,
            comm: "CPU 0/KVM".to_owned(),
            cpus: "0-23".to_owned(),
            cgroup: String::new(),
        };
        let strays = Strays {
            vcpus: vec![unpinned],
            ..Strays::default()
        };
        assert!(!strays.is_clean());
    }
}

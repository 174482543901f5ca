//! Every knob. To add one, add a variant: the compiler then lists all places that need an arm for
//! it.

use serde::{Deserialize, Serialize};

use crate::sys::task::TaskId;

/// The value of a drop-in that is not there although its folder is.
pub(super) const EMPTIED: &str = "emptied";
/// The driver of a PCI function that is not bound to any.
pub const NO_DRIVER: &str = "none";

/// One settable value of the kernel or of systemd.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Knob {
    /// An IRQ's CPUs: /proc/irq/N/smp_affinity_list (Documentation/core-api/irq/irq-affinity.rst).
    Irq(u32),
    /// The CPUs that new IRQs start with: /proc/irq/default_smp_affinity.
    DefaultIrq,
    /// The CPUs of a network interface's queue, by both their names, `enp6s0/rx-0`: those to which the
    /// packets that it receives are handed on (rps_cpus; none: the one with the interrupt); see
    /// networking/scaling.rst.
    QueueCpus(String),
    /// The CPUs of all unbound workqueues: /sys/devices/virtual/workqueue/cpumask
    /// (core-api/workqueue.rst).
    Workqueues,
    /// A kernel thread's CPUs, by sched_setaffinity(2).
    Kthread(TaskId),
    /// A user thread's CPUs, by sched_setaffinity(2).
    Thread(TaskId),
    /// A user thread's scheduling policy, as [`SchedPolicy`](crate::sys::sched::SchedPolicy) has it:
    /// `other`, `fifo:1` (sched(7)). Set by chrt(1).
    ThreadPolicy(TaskId),
    /// `1` if the CPU is online, else `0`: /sys/devices/system/cpu/cpuN/online
    /// (core-api/cpu_hotplug.rst).
    CpuOnline(usize),
    /// A cpufreq policy's governor, by the policy's folder name, `policy6`
    /// (admin-guide/pm/cpufreq.rst).
    Governor(String),
    /// A cpufreq policy's energy_performance_preference, by the policy's folder name
    /// (admin-guide/pm/amd-pstate.rst, intel_pstate.rst). The kernel changes it too: with the
    /// governor performance, and when a CPU goes offline.
    #[serde(rename = "energy-performance-preference")]
    EnergyPreference(String),
    /// The longest that a CPU may take to wake up, in microseconds, which keeps it out of deeper
    /// idle states: `0` for any time, `n/a` for no time at all, which leaves none
    /// (ABI/testing/sysfs-devices-power, pm_qos_resume_latency_us).
    WakeupLatency(usize),
    /// For how long at most KVM polls before a vCPU that halts gives its CPU away, in nanoseconds:
    /// /sys/module/kvm/parameters/halt_poll_ns (virt/kvm/halt-polling.rst).
    HaltPolling,
    /// A systemd unit's AllowedCPUs=, empty if unset; see systemd.resource-control(5). Set at
    /// run time only.
    UnitCpus(String),
    /// The units with AllowedCPUs= overridden until the next boot, by name, separated by spaces:
    /// what `systemctl set-property --runtime` leaves below /run/systemd. Taking a unit out removes
    /// its override.
    UnitOverrides,
    /// cpuset.cpus of a cgroup that is not a systemd unit, by its path below the cgroup root
    /// (cgroup-v2.rst).
    CgroupCpus(String),
    /// cpuset.cpus of a container's cgroup, by its path below the cgroup root: `lxc/101`,
    /// `lxc/101/ns`. Proxmox VE's pvestatd sets it too.
    ContainerCpus(String),
    /// A cgroup folder: `present` or `absent`.
    Cgroup(String),
    /// The cgroup a process is in, as in /proc/PID/cgroup: `/qemu.slice/100.scope`.
    CgroupOf(TaskId),
    /// The cgroup a thread is in, within the threaded cgroups of its process (cgroup-v2.rst,
    /// "Threads").
    CgroupOfThread(TaskId),
    /// A cgroup of threads, not processes: `threaded`, `absent`, or another type as in
    /// cgroup.type. Made and removed as a whole, since a threaded cgroup stays one.
    ThreadedCgroup(String),
    /// Whether the children of a cgroup have the cpuset controller: `present` or `absent` in
    /// cgroup.subtree_control. The root cgroup is the empty path.
    ChildCpusets(String),
    /// cpuset.cpus.exclusive of a cgroup: the CPUs that it may give to a partition below
    /// (cgroup-v2.rst).
    ExclusiveCpus(String),
    /// cpuset.cpus.partition of a cgroup: `member`, `root` or `isolated`, with ` invalid (why)`
    /// if the kernel cannot.
    Partition(String),
    /// Whether hook has systemd delegate the cpuset controller to a scope that is yet to be made:
    /// `present` or `absent`.
    Delegation(String),
    /// Whether systemd has hook look for new threads of this VM every few seconds: `present` or
    /// `absent`. A transient timer.
    ThreadTimer(u32),
    /// A sysctl by its path below /proc/sys: `vm/stat_interval`.
    Sysctl(String),
    /// `1` written to a file below /proc/sys that triggers an action and has no state:
    /// `vm/compact_memory`.
    Trigger(String),
    /// `1` written to the file that compacts the memory of a NUMA node, which has no state:
    /// /sys/devices/system/node/nodeN/compact.
    NodeCompaction(usize),
    /// A PCI function, by its full address: `present`, or `absent` (removed until a rescan).
    PciFunction(String),
    /// The name of the driver a PCI function is bound to, or `none`.
    PciDriver(String),
    /// The ways of resetting a PCI function that the kernel uses, in their order, separated by
    /// spaces: its reset_method (ABI/testing/sysfs-bus-pci, since Linux 5.15).
    PciResetMethod(String),
    /// `1` written to a PCI function's reset, which has no state: the kernel resets it by the first
    /// of its methods that works.
    PciReset(String),
    /// The CPUs of which the kernel records what runs there, for a process to read: a tracefs
    /// instance of the process's own, which does not exist if empty (trace/ftrace.rst, "Instances").
    Trace(TaskId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knobs_survive_json() {
        let task = TaskId {
            pid: 100,
            tid: 101,
            start: 7,
        };
        for knob in [
            Knob::Irq(24),
            Knob::DefaultIrq,
            Knob::QueueCpus("enp6s0/rx-0".into()),
            Knob::Thread(task),
            Knob::Governor("policy6".into()),
            Knob::EnergyPreference("policy6".into()),
            Knob::WakeupLatency(6),
            Knob::CgroupCpus("lxc".into()),
            Knob::ContainerCpus("lxc/101".into()),
        ] {
            let json = serde_json::to_string(&knob).unwrap();
            assert_eq!(serde_json::from_str::<Knob>(&json).unwrap(), knob, "{json}");
        }
    }
}

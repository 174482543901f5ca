//! Readers of the kernel: a file per surface, none of which writes.

pub mod activity;
pub mod cgroup;
pub mod cpu;
pub mod cpufreq;
pub mod irq;
pub(crate) mod locks;
pub mod net;
pub mod pci;
pub mod sched;
pub mod task;
pub mod topology;
pub mod trace;

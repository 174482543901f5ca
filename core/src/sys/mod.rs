//! Readers of the kernel: a file per surface, none of which writes.

pub mod cgroup;
pub mod cpu;
pub mod cpufreq;
pub mod irq;
pub mod pci;
pub mod task;
pub mod topology;

//! The host as a picture: what may run on each CPU.

use std::fmt::Write;

use anyhow::Result;

use crate::cpus::Cpus;
use crate::proc::{self, names, read};

/// What may run on a CPU and could be elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Cpu {
    threads: usize,
    kthreads: usize,
    irqs: usize,
    /// The vCPUs pinned to it.
    vcpus: Vec<String>,
}

/// The picture of the running host, a CCD of the 5900X beside the other.
pub fn draw() -> Result<String> {
    let mut host = vec![Cpu::default(); 24];
    for thread in proc::threads() {
        let cpus: Cpus = thread.cpus.parse()?;
        let pinned = cpus.0.len() == 1 && thread.comm.starts_with("CPU ");
        for (_, cpu) in host
            .iter_mut()
            .enumerate()
            .filter(|(number, _)| has(&cpus, *number))
        {
            match (thread.kernel, thread.bound, pinned) {
                (true, true, _) => {}
                (true, false, _) => cpu.kthreads += 1,
                (false, _, true) => cpu.vcpus.push(vcpu(&thread.comm)),
                (false, _, false) => cpu.threads += 1,
            }
        }
    }
    for irq in names("/proc/irq")
        .iter()
        .filter(|name| name.parse::<u32>().is_ok())
    {
        let own = format!("/proc/irq/{irq}");
        let handled = names(&own)
            .iter()
            .any(|name| std::path::Path::new(&own).join(name).is_dir());
        // A managed queue's file is read-only, or it has one CPU and its neighbours the others.
        let movable = std::fs::metadata(format!("{own}/smp_affinity_list"))
            .is_ok_and(|file| !file.permissions().readonly());
        let cpus: Cpus = read(format!("{own}/smp_affinity_list"))
            .unwrap_or_default()
            .parse()?;
        if handled && movable {
            for (number, cpu) in host.iter_mut().enumerate() {
                if has(&cpus, number) {
                    cpu.irqs += 1;
                }
            }
        }
    }
    Ok(picture(&host))
}

fn has(cpus: &Cpus, number: usize) -> bool {
    u32::try_from(number).is_ok_and(|number| cpus.0.contains(&number))
}

/// `CPU 3/KVM` is vCPU 3.
fn vcpu(comm: &str) -> String {
    let number = comm
        .trim_start_matches("CPU ")
        .split('/')
        .next()
        .unwrap_or_default();
    format!("vCPU {number}")
}

fn picture(host: &[Cpu]) -> String {
    let head = format!(
        "{:>3} {:>7} {:>8} {:>4}  {:<8}",
        "CPU", "threads", "kthreads", "IRQs", ""
    );
    let mut text = format!("{head} | {}\n", head.trim_end());
    let cell = |number: usize| {
        let Cpu {
            threads,
            kthreads,
            irqs,
            vcpus,
        } = &host[number];
        format!(
            "{number:>3} {threads:>7} {kthreads:>8} {irqs:>4}  {:<8}",
            vcpus.join(" ")
        )
    };
    for row in (0..6).chain(12..18) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} | {}", cell(row), cell(row + 6).trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_ccd_beside_the_other() {
        let mut host = vec![Cpu::default(); 24];
        host[18].vcpus.push(vcpu("CPU 1/KVM"));
        host[0].threads = 61;
        let text = picture(&host);
        assert_eq!(text.lines().count(), 13);
        assert!(
            text.contains("\n  0      61        0    0           |   6       0        0    0\n"),
            "{text}"
        );
        assert!(
            text.contains(" |  18       0        0    0  vCPU 1\n"),
            "{text}"
        );
    }
}

//! CPUs: which are present, and which are online; see Documentation/core-api/cpu_hotplug.rst and
//! Documentation/admin-guide/cputopology.rst.

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::sysroot::{Sysroot, cpu_list};

const CPUS: &str = "sys/devices/system/cpu";

/// The CPU that the kernel boots on. It stays with the host: the kernel runs work of its own on it,
/// and few machines can take it offline.
pub const BOOT_CPU: usize = 0;

fn list(root: &Sysroot, file: &str) -> Result<CpuSet> {
    let path = format!("{CPUS}/{file}");
    cpu_list(&path, &root.read_record(&path)?)
}

/// The CPUs that are in the machine.
///
/// # Errors
/// If the kernel's list cannot be read.
pub fn present(root: &Sysroot) -> Result<CpuSet> {
    list(root, "present")
}

/// The CPUs that are online.
///
/// # Errors
/// If the kernel's list cannot be read.
pub fn online(root: &Sysroot) -> Result<CpuSet> {
    list(root, "online")
}

/// The CPUs that the kernel's command line isolates (`isolcpus=`).
///
/// # Errors
/// If the kernel's list cannot be understood.
pub fn isolated_at_boot(root: &Sysroot) -> Result<CpuSet> {
    let path = format!("{CPUS}/isolated");
    match root.read_value(&path)? {
        Some(text) => cpu_list(&path, &text),
        None => Ok(CpuSet::new()),
    }
}

/// The SMT siblings of a CPU, itself among them; only itself if the kernel does not list them
/// (offline).
///
/// # Errors
/// If the kernel's list cannot be understood.
pub fn siblings(root: &Sysroot, cpu: usize) -> Result<CpuSet> {
    let path = format!("{CPUS}/cpu{cpu}/topology/thread_siblings_list");
    match root.read_value(&path)? {
        Some(text) if !text.is_empty() => cpu_list(&path, &text),
        _ => Ok([cpu].into_iter().collect()),
    }
}

/// Checks that all CPUs exist.
///
/// # Errors
/// [`Error::Unusable`] naming those that do not, and those that do.
pub fn check_present(root: &Sysroot, cpus: &CpuSet) -> Result<()> {
    check_among(cpus, &present(root)?, "no such CPU", "this host has")
}

/// Checks that all CPUs are online.
///
/// # Errors
/// [`Error::Unusable`] naming those that are not, and those that are.
pub fn check_online(root: &Sysroot, cpus: &CpuSet) -> Result<()> {
    check_present(root, cpus)?;
    check_among(cpus, &online(root)?, "offline", "online are")
}

/// Checks that all CPUs exist and something can run on them.
///
/// # Errors
/// [`Error::Unusable`] naming those that do not exist, or all of them if none is online.
pub fn check_usable(root: &Sysroot, cpus: &CpuSet) -> Result<()> {
    check_present(root, cpus)?;
    let now = online(root)?;
    if cpus.intersects(&now) {
        return Ok(());
    }
    let all = if cpus.len() == 1 {
        "offline"
    } else {
        "all offline"
    };
    Err(Error::unusable(
        format!("CPU {cpus}"),
        format!("{all}; online are {now}"),
    ))
}

fn check_among(cpus: &CpuSet, among: &CpuSet, fault: &str, there_are: &str) -> Result<()> {
    let others = cpus - among;
    if others.is_empty() {
        return Ok(());
    }
    Err(Error::unusable(
        format!("CPU {others}"),
        format!("{fault}; {there_are} {among}"),
    ))
}

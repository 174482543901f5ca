//! What pre-start checks: everything that could fail later.

use std::collections::BTreeMap;

use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::vmconf::VmConf;
use pinfold_core::{CpuSet, Error, Result, Sysroot, cgroup, cpu, cpufreq, process};

use crate::reservation::{Isolation, Reservation};
use crate::settings::{Method, Settings};

/// Checks the settings against the host and the VM. Returns what does not stop the start and should be known.
///
/// # Errors
/// [`Error::Unusable`] that names the setting, the host's side of it, and the next step.
pub(crate) fn before_start(root: &Sysroot, vmid: VmId, conf: &VmConf, settings: &Settings) -> Result<Vec<String>> {
    let isolated = &settings.isolated;
    let wrong = |why: String| Error::unusable(&settings.source, why);
    cpu::check_online(root, isolated).map_err(|error| wrong(format!("isolated: {error}")))?;
    if isolated.contains(0) {
        return Err(wrong("isolated: CPU 0 cannot be isolated, the kernel needs it for itself; choose others".into()));
    }
    let housekeeping = &cpu::online(root)? - isolated;
    if housekeeping.len() < settings.min_housekeeping {
        return Err(wrong(format!(
            "isolated: {isolated} leaves {} housekeeping CPUs, fewer than min_housekeeping = {}",
            housekeeping.len(),
            settings.min_housekeeping
        )));
    }
    for (key, cpus) in settings
        .emulator
        .iter()
        .map(|cpus| ("emulator", cpus))
        .chain(settings.iothreads.iter().map(|cpus| ("iothreads", cpus)))
    {
        cpu::check_online(root, cpus).map_err(|error| wrong(format!("{key}: {error}")))?;
    }
    if let Some(cpus) = settings.emulator.as_ref().filter(|cpus| cpus.intersects(isolated)) {
        return Err(wrong(format!("emulator: CPU {} is isolated; emulator threads belong on others", cpus & isolated)));
    }
    let vcpus = conf.vcpus() as usize;
    pins_suffice(settings, vcpus, vcpus.checked_sub(1))?;
    if let Some(governor) = &settings.governor {
        check_governor(root, isolated, governor).map_err(wrong)?;
    }
    notes(root, vmid, conf, isolated)
}

/// Every vCPU needs a pin, up to the `last` by its number: with some unplugged that is more than there are.
///
/// # Errors
/// [`Error::Unusable`] with both counts.
pub(crate) fn pins_suffice(settings: &Settings, vcpus: usize, last: Option<usize>) -> Result<()> {
    let pins = settings.pins.len();
    if last.is_none_or(|last| last < pins) {
        return Ok(());
    }
    let why = match settings.auto_pins {
        Some(_) => format!("isolated: the VM has {vcpus} vCPUs and these are {pins} CPUs; add CPUs or take vCPUs away"),
        None => format!("the VM has {vcpus} vCPUs and there are pins for {pins}; add pins or take vCPUs away"),
    };
    Err(Error::unusable(&settings.source, why))
}

/// No CPU for two VMs.
///
/// # Errors
/// [`Error::Unusable`] that names the other VM and the CPUs.
pub(crate) fn no_overlap(reservations: &BTreeMap<u32, Reservation>, vmid: VmId, settings: &Settings) -> Result<()> {
    let others = || reservations.iter().filter(|(other, claim)| **other != u32::from(vmid) && claim.is_claim());
    for (other, reservation) in others() {
        let shared = &reservation.settings.isolated & &settings.isolated;
        if !shared.is_empty() {
            let why = format!("isolated: CPU {shared} belongs to VM {other} while that runs; stop it or choose others");
            return Err(Error::unusable(&settings.source, why));
        }
    }
    let taken =
        others().fold(settings.isolated.clone(), |taken, (_, reservation)| &taken | &reservation.settings.isolated);
    for (_, reservation) in others() {
        if let Some(emulator) = reservation.settings.emulator.as_ref().filter(|cpus| cpus.is_subset(&taken)) {
            let why = format!("isolated: it would take CPU {emulator}, all that another VM's emulator threads have");
            return Err(Error::unusable(&settings.source, why));
        }
    }
    Ok(())
}

/// How this VM's CPUs are to be isolated, and why so where the settings leave it open. `qemu` is its QEMU, once that runs.
///
/// # Errors
/// [`Error::Unusable`] that says why the method of the settings cannot be had.
pub(crate) fn isolation(
    root: &Sysroot,
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
    qemu: Option<&Qemu>,
) -> Result<(Isolation, Option<String>)> {
    // What hotplug does to slices and CPUs would reach into a partition.
    let not_beside = |isolation: Isolation| {
        let other = reservations
            .iter()
            .find(|(id, other)| **id != u32::from(vmid) && (other.is_claim()) && other.isolation != isolation);
        other.map_or(Ok(()), |(id, _)| {
            let why =
                format!("method: VM {id} is isolated by the other method while that runs; the two cannot be mixed");
            Err(Error::unusable(&settings.source, why))
        })
    };
    let partition =
        || not_beside(Isolation::Partition).and_then(|()| check_partition(root, vmid, &settings.isolated, qemu));
    let hotplug = || not_beside(Isolation::Hotplug).and_then(|()| check_hotplug(root, &settings.isolated));
    Ok(match settings.method {
        Method::Hotplug => hotplug().map(|()| (Isolation::Hotplug, None))?,
        Method::Partition => partition().map(|()| (Isolation::Partition, None))?,
        Method::Auto => match partition() {
            Ok(()) => (Isolation::Partition, Some("method auto: by partition".into())),
            Err(why) => {
                hotplug()?;
                (Isolation::Hotplug, Some(format!("method auto: by hotplug, since partition cannot be: {why}")))
            }
        },
    })
}

fn check_partition(root: &Sysroot, vmid: VmId, isolated: &CpuSet, qemu: Option<&Qemu>) -> Result<()> {
    let scope = match qemu {
        Some(qemu) => cg_slice::scope(root, vmid, qemu)?,
        None => cg_slice::usual_scope(vmid),
    };
    cg_slice::partition::check(root, &cg_slice::partition::vcpu_cgroup(&scope), isolated)?;
    if qemu.is_some() { cg_slice::partition::check_delegated(root, vmid) } else { Ok(()) }
}

fn check_hotplug(root: &Sysroot, isolated: &CpuSet) -> Result<()> {
    cgroup::check_unified(root)?;
    match cpu_hotplug::objects(root, isolated) {
        Ok(objects) if objects.len() == isolated.len() => Ok(()),
        Ok(_) => Err(Error::unusable(format!("CPU {isolated}"), "this kernel cannot take all of them offline")),
        Err(error) => Err(error),
    }
}

fn check_governor(root: &Sysroot, isolated: &CpuSet, governor: &str) -> std::result::Result<(), String> {
    let policies = cpufreq::policies(root).map_err(|error| error.to_string())?;
    // A host without cpufreq (a VM, a BIOS that keeps it) has nothing to set, which is no reason to stay off.
    for policy in policies.iter().filter(|policy| policy.cpus.intersects(isolated)) {
        if !policy.available.iter().any(|name| name == governor) {
            return Err(format!(
                "governor: no {governor:?} for CPU {}; there is {}",
                policy.cpus,
                policy.available.join(", ")
            ));
        }
    }
    Ok(())
}

/// What may go wrong with others meanwhile.
fn notes(root: &Sysroot, vmid: VmId, conf: &VmConf, isolated: &CpuSet) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    if let Some(affinity) = &conf.affinity {
        notes.push(format!(
            "VM {vmid}: `affinity: {affinity}` is set as well; the pins win. Remove it: qm set {vmid} --delete affinity"
        ));
    }
    for other in vm::all(root).into_iter().filter(|other| *other != vmid) {
        let Some(affinity) = vm::conf(root, other).ok().and_then(|conf| conf.affinity) else { continue };
        if affinity.parse::<CpuSet>().is_ok_and(|cpus| cpus.is_subset(isolated)) {
            notes.push(format!(
                "VM {other} has `affinity: {affinity}`, all of it isolated now: it cannot start while VM {vmid} runs"
            ));
        }
    }
    for pid in process::user_pids(root)? {
        // Those that have ended have no business here.
        if root.read_value(format!("proc/{pid}/comm")).ok().flatten().as_deref() == Some("irqbalance") {
            notes.push(format!(
                "irqbalance (process {pid}) moves IRQs back within 10 s; stop it, or set IRQBALANCE_BANNED_CPULIST={isolated}"
            ));
        }
    }
    if !siblings_inside(root, isolated)? {
        notes.push(format!("CPU {isolated} leaves SMT siblings outside: what runs there slows the VM's cores"));
    }
    Ok(notes)
}

fn siblings_inside(root: &Sysroot, isolated: &CpuSet) -> Result<bool> {
    for cpu in isolated.iter() {
        if !cpu::siblings(root, cpu)?.is_subset(isolated) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::resolve;

    #[test]
    fn too_few_cpus_are_told_with_both_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (_, text) = crate::machine::all().into_iter().find(|(name, _)| name == "5900x").unwrap();
        crate::machine::expand(&text, dir.path());
        let root = Sysroot::new(dir.path());
        for (pins, why) in [
            ("\"auto\"", "isolated: the VM has 5 vCPUs and these are 4 CPUs; add CPUs or take vCPUs away"),
            ("[6, 6, 7, 7]", "the VM has 5 vCPUs and there are pins for 4; add pins or take vCPUs away"),
        ] {
            let settings = resolve(&root, &format!("isolated = \"core:6-7\"\npins = {pins}"), "test", 2).unwrap();
            assert!(pins_suffice(&settings, 4, Some(3)).is_ok());
            assert_eq!(pins_suffice(&settings, 5, Some(4)).unwrap_err().to_string(), format!("test: {why}"));
        }
    }
}

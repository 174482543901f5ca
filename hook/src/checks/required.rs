//! What pre-start checks: everything that could fail later. The first error stops the start,
//! warnings become notes.

use std::collections::BTreeMap;

use pinfold_core::sys::{cgroup, cpu, cpufreq, task};
use pinfold_core::vm::VmConf;
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Error, Host, Result};

use super::finding::{Finding, Level};
use crate::settings::{Method, Settings};
use crate::state::reservation::{Isolation, Reservation};

/// Checks the settings against the host and the VM. Returns the warnings.
///
/// # Errors
/// [`Error::Unusable`] that names the setting, the host's side of it, and the next step.
pub(crate) fn before_start(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<String>> {
    let findings = findings(root, vmid, conf, settings)?;
    refuse(&findings, settings)?;
    let warnings = findings
        .iter()
        .filter(|finding| finding.level == Level::Warn);
    Ok(warnings.map(ToString::to_string).collect())
}

/// The first error there is.
fn refuse(findings: &[Finding], settings: &Settings) -> Result<()> {
    match findings
        .iter()
        .find(|finding| finding.level == Level::Error)
    {
        Some(error) => Err(Error::unusable(
            &settings.source,
            format!("{}: {error}", error.check),
        )),
        None => Ok(()),
    }
}

/// All checks of pre-start, in order, except for other VMs' reservations ([`overlap`]).
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn findings(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let isolated = &settings.isolated;
    let mut findings = vec![isolated_cpus(root, settings)?];
    let places = settings.emulator.iter().map(|cpus| ("emulator", cpus));
    for (key, cpus) in places.chain(settings.iothreads.iter().map(|cpus| ("iothreads", cpus))) {
        findings.push(match cpu::check_online(root, cpus) {
            Err(error) => Finding::error(key, error.to_string(), ""),
            Ok(()) if key == "emulator" && cpus.intersects(isolated) => {
                let what = format!("CPU {} is isolated", cpus & isolated);
                Finding::error(key, what, "emulator threads belong on others")
            }
            Ok(()) => Finding::ok(key, format!("CPU {cpus}")),
        });
    }
    let vcpus = conf.vcpus() as usize;
    findings.push(pins(settings, vcpus, vcpus.checked_sub(1)));
    if let Some(governor) = &settings.governor {
        findings.push(check_governor(root, isolated, governor)?);
    }
    findings.extend(others(root, vmid, conf, isolated)?);
    Ok(findings)
}

/// Whether the isolated CPUs are online, and leave enough housekeeping CPUs.
fn isolated_cpus(root: &Host, settings: &Settings) -> Result<Finding> {
    const CHECK: &str = "isolated";
    let isolated = &settings.isolated;
    if let Err(error) = cpu::check_online(root, isolated) {
        return Ok(Finding::error(CHECK, error.to_string(), ""));
    }
    if isolated.contains(0) {
        return Ok(Finding::error(
            CHECK,
            "CPU 0 cannot be isolated, the kernel needs it",
            "choose others",
        ));
    }
    let housekeeping = &cpu::online(root)? - isolated;
    if housekeeping.len() < settings.min_housekeeping {
        let what = format!(
            "{isolated} leaves {} housekeeping CPUs, fewer than min_housekeeping = {}",
            housekeeping.len(),
            settings.min_housekeeping
        );
        return Ok(Finding::error(CHECK, what, "isolate fewer"));
    }
    Ok(Finding::ok(
        CHECK,
        format!("CPU {isolated}, leaves CPU {housekeeping} for housekeeping"),
    ))
}

/// Whether every vCPU up to number `last` has a pin. With vCPUs unplugged, `last` may exceed their
/// count.
fn pins(settings: &Settings, vcpus: usize, last: Option<usize>) -> Finding {
    let pins = settings.pins.len();
    if last.is_none_or(|last| last < pins) {
        return Finding::ok("pins", format!("{pins}, for {vcpus} vCPUs"));
    }
    match settings.auto_pins {
        Some(_) => {
            let what = format!("the VM has {vcpus} vCPUs but only {pins} CPUs");
            Finding::error("isolated", what, "add CPUs or remove vCPUs")
        }
        None => {
            let what = format!("the VM has {vcpus} vCPUs but only {pins} pins");
            Finding::error("pins", what, "add pins or remove vCPUs")
        }
    }
}

/// Makes sure that each vCPU has a pin.
///
/// # Errors
/// [`Error::Unusable`] with both counts.
pub(crate) fn pins_suffice(settings: &Settings, vcpus: usize, last: Option<usize>) -> Result<()> {
    refuse(&[pins(settings, vcpus, last)], settings)
}

/// No CPU for two VMs.
///
/// # Errors
/// [`Error::Unusable`] that names the other VM and the CPUs.
pub(crate) fn no_overlap(
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
) -> Result<()> {
    refuse(&[overlap(reservations, vmid, settings)], settings)
}

/// Whether another VM has some of the CPUs.
pub(crate) fn overlap(
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
) -> Finding {
    const CHECK: &str = "isolated";
    let others = || {
        reservations
            .iter()
            .filter(|(other, claim)| **other != u32::from(vmid) && claim.is_claim())
    };
    for (other, reservation) in others() {
        let shared = &reservation.settings.isolated & &settings.isolated;
        if !shared.is_empty() {
            let what = format!("CPU {shared} is isolated for VM {other}, which runs");
            return Finding::error(CHECK, what, "stop it or choose others");
        }
    }
    let taken = others().fold(settings.isolated.clone(), |taken, (_, reservation)| {
        &taken | &reservation.settings.isolated
    });
    for (_, reservation) in others() {
        if let Some(emulator) = reservation
            .settings
            .emulator
            .as_ref()
            .filter(|cpus| cpus.is_subset(&taken))
        {
            let what = format!(
                "it would take CPU {emulator}, all that another VM's emulator threads have"
            );
            return Finding::error(CHECK, what, "");
        }
    }
    Finding::ok(CHECK, "no running VM has any of them")
}

/// How this VM's CPUs are to be isolated, and why so where the settings leave it open. `qemu` is
/// its QEMU, once that runs.
///
/// # Errors
/// [`Error::Unusable`] that says why the method of the settings cannot be had.
pub(crate) fn isolation(
    root: &Host,
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
    qemu: Option<&Qemu>,
) -> Result<(Isolation, Option<String>)> {
    // What hotplug does to slices and CPUs would reach into a partition.
    let not_beside = |isolation: Isolation| {
        let other = reservations.iter().find(|(id, other)| {
            **id != u32::from(vmid) && (other.is_claim()) && other.isolation != isolation
        });
        other.map_or(Ok(()), |(id, _)| {
            let why =
                format!("method: VM {id} is isolated by the other method, and the two cannot be mixed; stop it first");
            Err(Error::unusable(&settings.source, why))
        })
    };
    let partition = || {
        not_beside(Isolation::Partition)
            .and_then(|()| check_partition(root, vmid, &settings.isolated, qemu))
    };
    let hotplug =
        || not_beside(Isolation::Hotplug).and_then(|()| check_hotplug(root, &settings.isolated));
    Ok(match settings.method {
        Method::Hotplug => hotplug().map(|()| (Isolation::Hotplug, None))?,
        Method::Partition => partition().map(|()| (Isolation::Partition, None))?,
        Method::Auto => match partition() {
            Ok(()) => (
                Isolation::Partition,
                Some("method auto: using partition".into()),
            ),
            Err(why) => {
                hotplug()?;
                (
                    Isolation::Hotplug,
                    Some(format!(
                        "method auto: using hotplug, because partition is unavailable: {why}"
                    )),
                )
            }
        },
    })
}

fn check_partition(root: &Host, vmid: VmId, isolated: &CpuSet, qemu: Option<&Qemu>) -> Result<()> {
    let scope = match qemu {
        Some(qemu) => cg_slice::scope(root, vmid, qemu)?,
        None => cg_slice::usual_scope(vmid),
    };
    cg_slice::partition::check(root, &cg_slice::partition::vcpu_cgroup(&scope), isolated)?;
    if qemu.is_some() {
        cg_slice::partition::check_delegated(root, vmid)
    } else {
        Ok(())
    }
}

fn check_hotplug(root: &Host, isolated: &CpuSet) -> Result<()> {
    cgroup::check_unified(root)?;
    match cpu_hotplug::settings(root, isolated) {
        Ok(settings) if settings.len() == isolated.len() => Ok(()),
        Ok(_) => Err(Error::unusable(
            format!("CPU {isolated}"),
            "this kernel cannot take all of them offline",
        )),
        Err(error) => Err(error),
    }
}

fn check_governor(root: &Host, isolated: &CpuSet, governor: &str) -> Result<Finding> {
    const CHECK: &str = "governor";
    let failed = |error: Error| Ok(Finding::error(CHECK, error.to_string(), ""));
    let policies = match cpufreq::policies(root) {
        Ok(policies) => policies,
        Err(error) => return failed(error),
    };
    // A host without cpufreq (a VM, or a BIOS that sets the clock) is not a reason to stop a start.
    match governor::not_offered(root, &policies, governor, isolated) {
        Ok(None) => {}
        Ok(Some(lacking)) => {
            return Ok(Finding::error(
                CHECK,
                format!("no {governor:?} for CPU {}", lacking.policy.cpus),
                format!("there is {}", lacking.available.join(", ")),
            ));
        }
        Err(error) => return failed(error),
    }
    Ok(Finding::ok(
        CHECK,
        if policies.is_empty() {
            "this host has no cpufreq governors"
        } else {
            governor
        },
    ))
}

/// What may interfere while the VM runs.
fn others(root: &Host, vmid: VmId, conf: &VmConf, isolated: &CpuSet) -> Result<Vec<Finding>> {
    let mut findings = vec![match &conf.affinity {
        None => Finding::ok("affinity", "not set, so the pins are the only affinity"),
        Some(affinity) => Finding::warn(
            "affinity",
            format!("VM {vmid}: `affinity: {affinity}` is also set; the pins take precedence"),
            format!("remove it: qm set {vmid} --delete affinity"),
        ),
    }];
    let mut shut_out = Vec::new();
    for other in vm::all(root).into_iter().filter(|other| *other != vmid) {
        let Some(affinity) = vm::conf(root, other).ok().and_then(|conf| conf.affinity) else {
            continue;
        };
        if !affinity.is_empty() && affinity.is_subset(isolated) {
            shut_out.push(Finding::warn(
                "other VMs",
                format!(
                    "VM {other} has `affinity: {affinity}`, and all of these CPUs are isolated: it cannot start while VM {vmid} runs"
                ),
                format!("use other CPUs: qm set {other} --affinity LIST"),
            ));
        }
    }
    if shut_out.is_empty() {
        shut_out.push(Finding::ok(
            "other VMs",
            "none is confined to the isolated CPUs by `affinity:`",
        ));
    }
    findings.append(&mut shut_out);
    let mut balancers = Vec::new();
    for pid in task::user_pids(root)? {
        // Processes that have ended are skipped.
        if root
            .read_value(format!("proc/{pid}/comm"))
            .ok()
            .flatten()
            .as_deref()
            == Some("irqbalance")
        {
            balancers.push(if isolated.is_subset(&banned(root, pid)) {
                Finding::ok(
                    "irqbalance",
                    format!("irqbalance (process {pid}) does not use CPU {isolated}"),
                )
            } else {
                Finding::warn(
                    "irqbalance",
                    format!("irqbalance (process {pid}) moves IRQs back within 10 s"),
                    format!("stop it, or set IRQBALANCE_BANNED_CPULIST={isolated}"),
                )
            });
        }
    }
    if balancers.is_empty() {
        balancers.push(Finding::ok("irqbalance", "not running"));
    }
    findings.append(&mut balancers);
    findings.push(if siblings_inside(root, isolated)? {
        Finding::ok("SMT", "whole cores are isolated")
    } else {
        let what = format!(
            "CPU {isolated} does not include all SMT siblings: what runs on them slows the VM's cores"
        );
        Finding::warn("SMT", what, "isolate whole cores; `hook layout` shows them")
    });
    Ok(findings)
}

/// The CPUs that an irqbalance does not use, from its environment; none if that cannot be read. See
/// irqbalance(1) and its cputree.c, `setup_banned_cpus`: the list takes precedence.
fn banned(root: &Host, pid: i32) -> CpuSet {
    let environ = root.read(format!("proc/{pid}/environ")).unwrap_or_default();
    let value = |name: &str| {
        environ
            .split('\0')
            .find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    };
    let list = value("IRQBALANCE_BANNED_CPULIST").map(|list| CpuSet::from_kernel_list(list).ok());
    let mask = || value("IRQBALANCE_BANNED_CPUS").map(|mask| CpuSet::from_mask(mask).ok());
    list.or_else(mask).flatten().unwrap_or_default()
}

fn siblings_inside(root: &Host, isolated: &CpuSet) -> Result<bool> {
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
    use crate::fixture::MadeUpHost;
    use crate::settings;

    #[test]
    fn pre_start_refuses_with_the_first_error_and_notes_the_warnings() {
        let host = MadeUpHost::new("5900x");
        let vmid = "100".parse().unwrap();
        let told = |conf: &str, text: &str| {
            let settings = settings::resolve(&host.root, text, "test", 1).unwrap();
            before_start(&host.root, vmid, &VmConf::parse(conf), &settings)
        };
        assert_eq!(told("cores: 12", "layout = \"5900x\"").unwrap(), [""; 0]);
        let notes = told("affinity: 0-3", "isolated = \"6\"\npins = [6]").unwrap();
        assert_eq!(
            notes,
            [
                "VM 100: `affinity: 0-3` is also set; the pins take precedence; remove it: qm set 100 --delete affinity",
                "CPU 6 does not include all SMT siblings: what runs on them slows the VM's cores; isolate whole cores; \
                 `hook layout` shows them"
            ]
        );
        for (conf, text, why) in [
            (
                "cores: 99",
                "isolated = \"0,6\"\npins = [6]",
                "test: isolated: CPU 0 cannot be isolated, the kernel needs it",
            ),
            (
                "cores: 13",
                "layout = \"5900x\"",
                "test: pins: the VM has 13 vCPUs but only 12 pins; add pins or remove vCPUs",
            ),
        ] {
            let error = told(conf, text).unwrap_err().to_string();
            assert!(error.starts_with(why), "{error}");
        }
    }
}

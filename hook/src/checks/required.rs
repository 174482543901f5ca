//! What pre-start checks: everything that could fail later. The first error stops the start,
//! warnings become notes.

use std::collections::BTreeMap;

use cg_slice::partition::Siblings;
use pinfold_core::sys::{cgroup, cpu};
use pinfold_core::vm::{self, Qemu, VmConf, VmId};
use pinfold_core::{CpuSet, Error, Host, Result};

use super::advice;
use super::finding::{Finding, Level};
use super::script;
use super::shared_readings::SharedReadings;
use crate::choice;
use crate::own_steps;
use crate::settings::{Method, Settings};
use crate::state::reservation::{Isolation, Reservation, owner};

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
    let around = SharedReadings::new(root);
    let findings = findings(&around, vmid, conf, settings)?;
    refuse(&findings, settings)?;
    // A check that only warns does not stop a start, even if it fails.
    let interference = advice::interference(&around, vmid, conf, &settings.isolated)
        .unwrap_or_else(|error| vec![Finding::warn("host", error.to_string(), "")]);
    let warnings = findings
        .iter()
        .chain(&interference)
        .filter(|finding| finding.level == Level::Warn);
    let notes = boot_cpu_stays(&settings.isolated).map(str::to_owned);
    Ok(notes
        .into_iter()
        .chain(warnings.map(ToString::to_string))
        .collect())
}

/// Fails with the first error.
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

/// Whether iothreads have CPUs of vCPUs.
fn iothreads(settings: &Settings, vcpus: usize, what: String, cpus: &CpuSet) -> Finding {
    const CHECK: &str = "iothreads";
    let pins = settings.pins.iter().take(vcpus);
    let shared = &pins.flat_map(CpuSet::iter).collect() & cpus;
    if shared.is_empty() {
        return Finding::ok(CHECK, what);
    }
    let why = match settings.vcpu_policy {
        Some(policy) => format!("with vcpu_policy {policy} they wait while the vCPU computes"),
        None => "each delays the other".to_owned(),
    };
    let what = format!("{what}; CPU {shared} is a vCPU's: {why}");
    Finding::warn(CHECK, what, "give iothreads housekeeping CPUs")
}

/// All checks of pre-start, in order, except for other VMs' reservations ([`overlap`]).
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn findings(
    around: &SharedReadings<'_>,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let (root, isolated) = (around.root, &settings.isolated);
    let vcpus = conf.vcpus() as usize;
    let mut findings = vec![isolated_cpus(root, settings)?];
    let places = settings.emulator.iter().map(|cpus| ("emulator", cpus));
    for (key, cpus) in places.chain(settings.iothreads.iter().map(|cpus| ("iothreads", cpus))) {
        findings.push(match cpu::check_online(root, cpus) {
            Err(error) => Finding::error(key, error.to_string(), ""),
            Ok(()) if key == "emulator" && cpus.intersects(isolated) => {
                let what = format!("CPU {} is isolated", cpus & isolated);
                Finding::error(key, what, "give emulator threads housekeeping CPUs")
            }
            Ok(()) if key == "iothreads" => iothreads(settings, vcpus, format!("CPU {cpus}"), cpus),
            Ok(()) => Finding::ok(key, format!("CPU {cpus}")),
        });
    }
    for (id, cpus) in &settings.iothread {
        let what = format!("{id}: CPU {cpus}");
        findings.push(match cpu::check_online(root, cpus) {
            Err(error) => Finding::error("iothreads", format!("{id}: {error}"), ""),
            Ok(()) => iothreads(settings, vcpus, what, cpus),
        });
    }
    findings.push(pins(settings, vcpus, vcpus.checked_sub(1)));
    let rest = left_to_the_host(root, isolated)?;
    let tuned = [
        (
            "governor",
            "energy_preference",
            isolated,
            &settings.governor,
            &settings.energy_preference,
        ),
        (
            "housekeeping_governor",
            "housekeeping_energy_preference",
            &rest,
            &settings.housekeeping_governor,
            &settings.housekeeping_energy_preference,
        ),
    ];
    for (governor_key, preference_key, cpus, governor, preference) in tuned {
        if let Some(governor) = governor {
            findings.push(check_governor(around, governor_key, cpus, governor)?);
        }
        if let Some(preference) = preference {
            let governor = (governor_key, governor.as_deref());
            findings.push(check_preference(
                around,
                preference_key,
                cpus,
                governor,
                preference,
            )?);
        }
    }
    if settings.max_latency_us.is_some() {
        findings.push(check_latency(root, isolated));
    }
    if settings.halt_poll_ns.is_some() {
        findings.push(check_halt_polling(root));
    }
    findings.extend(script::chain(root, &settings.chain));
    if let Some(idle) = settings.idle_vm {
        findings.push(idle_vm(root, vmid, idle));
    }
    Ok(findings)
}

/// Why no VM gets [`cpu::BOOT_CPU`] by hotplug.
const BOOT_CPU_IS_NEEDED: &str =
    "CPU 0 cannot be isolated by hotplug, since the kernel needs it online";

/// What stays on [`cpu::BOOT_CPU`], if it is isolated.
pub(crate) fn boot_cpu_stays(isolated: &CpuSet) -> Option<&'static str> {
    isolated.contains(cpu::BOOT_CPU).then_some(
        "CPU 0 is isolated: timekeeping, IRQs that cannot be moved and the kernel's work for the boot CPU stay there",
    )
}

/// nix's set of CPUs for sched_setaffinity(2) ends here.
const LAST_PINNABLE: usize = 1023;

/// Whether the isolated CPUs are online, and leave enough housekeeping CPUs.
fn isolated_cpus(root: &Host, settings: &Settings) -> Result<Finding> {
    const CHECK: &str = "isolated";
    let isolated = &settings.isolated;
    if let Err(error) = cpu::check_online(root, isolated) {
        return Ok(Finding::error(CHECK, error.to_string(), ""));
    }
    if let Some(last) = isolated.last().filter(|last| *last > LAST_PINNABLE) {
        let what =
            format!("CPU {last} is beyond {LAST_PINNABLE}, the last that threads can be pinned to");
        return Ok(Finding::error(CHECK, what, "choose others"));
    }
    if isolated.contains(cpu::BOOT_CPU) && settings.method == Method::Hotplug {
        let fix = "choose others, or method = \"partition\"";
        return Ok(Finding::error(CHECK, BOOT_CPU_IS_NEEDED, fix));
    }
    let housekeeping = left_to_the_host(root, isolated)?;
    if housekeeping.len() < settings.min_housekeeping {
        let what = format!(
            "{isolated} leaves {} housekeeping CPUs, fewer than min_housekeeping = {}",
            housekeeping.len(),
            settings.min_housekeeping
        );
        return Ok(Finding::error(CHECK, what, "isolate fewer"));
    }
    let mut what = format!("CPU {isolated}, leaves CPU {housekeeping} for housekeeping");
    if let Some(stays) = boot_cpu_stays(isolated) {
        what += &format!("; {stays}");
    }
    Ok(Finding::ok(CHECK, what))
}

/// The CPUs for everything else while VMs have these: without those that the kernel's command line
/// isolates.
fn left_to_the_host(root: &Host, taken: &CpuSet) -> Result<CpuSet> {
    Ok(&(&cpu::online(root)? - taken) - &cpu::isolated_at_boot(root)?)
}

/// Whether every vCPU up to number `last` has a pin. With vCPUs unplugged, `last` may exceed their
/// count.
fn pins(settings: &Settings, vcpus: usize, last: Option<usize>) -> Finding {
    let pins = settings.pins.len();
    if last.is_none_or(|last| last < pins) {
        let shared = settings.sharing(vcpus);
        if shared.is_empty() {
            return Finding::ok(
                "pins",
                format!("{pins}, for {}", choice::counted(vcpus, "vCPU")),
            );
        }
        let shared: Vec<String> = shared
            .iter()
            .map(|(cpu, vcpus)| format!("{vcpus} share CPU {cpu}"))
            .collect();
        return Finding::warn(
            "pins",
            format!("vCPUs {}", shared.join(", ")),
            "give each vCPU a CPU of its own, or write pins = \"auto\"",
        );
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

/// Whether the VM that is stopped for this one is another one of this node.
fn idle_vm(root: &Host, vmid: VmId, idle: u32) -> Finding {
    const CHECK: &str = "idle_vm";
    if idle == u32::from(vmid) {
        return Finding::error(
            CHECK,
            format!("VM {idle} is this VM itself"),
            "name another one",
        );
    }
    let found = VmId::try_from(idle).and_then(|idle| vm::check_exists(root, idle));
    match found {
        Ok(()) => Finding::ok(CHECK, format!("VM {idle} is stopped while this VM runs")),
        Err(error) => Finding::warn(
            CHECK,
            error.to_string(),
            "`qm list` shows the VMs of this node",
        ),
    }
}

/// Checks that each vCPU has a pin.
///
/// # Errors
/// [`Error::Unusable`] with both counts.
pub(crate) fn pins_suffice(settings: &Settings, vcpus: usize, last: Option<usize>) -> Result<()> {
    refuse(&[pins(settings, vcpus, last)], settings)
}

/// Checks that no CPU is isolated for two VMs.
///
/// # Errors
/// [`Error::Unusable`] that names the other VM and the CPUs.
pub(crate) fn no_overlap(
    root: &Host,
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
) -> Result<()> {
    refuse(&[overlap(root, reservations, vmid, settings)?], settings)
}

/// Whether another VM has some of the CPUs, or all of them leave too few to the host.
///
/// # Errors
/// If the host's CPUs cannot be read.
pub(crate) fn overlap(
    root: &Host,
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
) -> Result<Finding> {
    const CHECK: &str = "isolated";
    let others = || {
        reservations
            .iter()
            .filter(|(other, claim)| **other != u32::from(vmid) && claim.is_claim())
    };
    for (other, reservation) in others() {
        let shared = &reservation.settings.isolated & &settings.isolated;
        if !shared.is_empty() {
            let what = format!("CPU {shared} is isolated for {}, which runs", owner(*other));
            let fix = if settings.is_built_in() {
                format!("stop it, or choose others with `hook init {vmid}`")
            } else {
                "stop it or choose others".to_owned()
            };
            return Ok(Finding::error(CHECK, what, fix));
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
                "it would isolate CPU {emulator}, the only CPUs of another VM's emulator threads"
            );
            return Ok(Finding::error(CHECK, what, ""));
        }
    }
    // Each VM's limit holds for what all of them take.
    let least = others()
        .map(|(_, reservation)| reservation.settings.min_housekeeping)
        .fold(settings.min_housekeeping, usize::max);
    let left = left_to_the_host(root, &taken)?;
    if others().next().is_some() && left.len() < least {
        let what = format!(
            "with those of other VMs, CPU {taken} leave {} housekeeping CPUs, fewer than min_housekeeping = {least}",
            left.len()
        );
        return Ok(Finding::error(CHECK, what, "isolate fewer"));
    }
    Ok(Finding::ok(CHECK, "no running VM uses them"))
}

/// How this VM's CPUs are to be isolated, and why if the settings leave it open. `qemu` is
/// its QEMU, once that runs; `known` has what was read for other VMs.
///
/// # Errors [`Error::Unusable`] with the reason why the method of the settings cannot be used.
pub(crate) fn isolation(
    root: &Host,
    known: &Siblings,
    reservations: &BTreeMap<u32, Reservation>,
    vmid: VmId,
    settings: &Settings,
    qemu: Option<&Qemu>,
) -> Result<(Isolation, Option<String>)> {
    // Hotplug changes slices and CPUs in a way that affects partitions.
    let not_beside = |isolation: Isolation| {
        let other = reservations.iter().find(|(id, other)| {
            **id != u32::from(vmid) && (other.is_claim()) && other.isolation != isolation
        });
        other.map_or(Ok(()), |(id, _)| {
            let why =
                format!("method: {} is isolated by the other method, and the two cannot be mixed; stop it first", owner(*id));
            Err(Error::unusable(&settings.source, why))
        })
    };
    let partition = || {
        not_beside(Isolation::Partition)
            .and_then(|()| check_partition(root, known, vmid, &settings.isolated, qemu))
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
            Err(why) if settings.isolated.contains(cpu::BOOT_CPU) => {
                let why = format!(
                    "isolated: {BOOT_CPU_IS_NEEDED}, and partition is unavailable: {why}; choose others"
                );
                return Err(Error::unusable(&settings.source, why));
            }
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

/// Checks that this host can isolate CPUs for a VM by partition.
///
/// # Errors
/// Why it cannot.
pub(crate) fn partition_for(root: &Host, vmid: VmId, isolated: &CpuSet) -> Result<()> {
    check_partition(root, &Siblings::default(), vmid, isolated, None)
}

fn check_partition(
    root: &Host,
    known: &Siblings,
    vmid: VmId,
    isolated: &CpuSet,
    qemu: Option<&Qemu>,
) -> Result<()> {
    let scope = match qemu {
        Some(qemu) => cg_slice::scope(root, vmid, qemu)?,
        None => cg_slice::usual_scope(vmid),
    };
    let cgroup = cg_slice::partition::vcpu_cgroup(&scope);
    cg_slice::partition::check_beside(known, root, &cgroup, isolated)?;
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

fn check_governor(
    around: &SharedReadings<'_>,
    key: &'static str,
    cpus: &CpuSet,
    governor: &str,
) -> Result<Finding> {
    let failed = |error: Error| Ok(Finding::error(key, error.to_string(), ""));
    let policies = match around.policies() {
        Ok(policies) => policies,
        Err(error) => return failed(error),
    };
    // A host without cpufreq (a VM, or a BIOS that sets the clock) is not a reason to stop a start.
    match governor::not_offered(around.root, policies, governor, cpus) {
        Ok(None) => {}
        Ok(Some(lacking)) => {
            return Ok(Finding::error(
                key,
                format!("no {governor:?} for CPU {}", lacking.policy.cpus),
                format!("available: {}", lacking.available.join(", ")),
            ));
        }
        Err(error) => return failed(error),
    }
    Ok(Finding::ok(
        key,
        if policies.is_empty() {
            "this host has no cpufreq governors"
        } else {
            governor
        },
    ))
}

/// Whether these CPUs can have this energy preference, with that governor of that key. Where they have none at all, or the
/// governor decides, the VM can start all the same.
fn check_preference(
    around: &SharedReadings<'_>,
    key: &'static str,
    cpus: &CpuSet,
    (governor_key, governor): (&str, Option<&str>),
    preference: &str,
) -> Result<Finding> {
    let policies = match around.policies() {
        Ok(policies) => policies.iter(),
        Err(error) => return Ok(Finding::error(key, error.to_string(), "")),
    };
    let mut policies = policies.filter(|policy| policy.cpus.intersects(cpus));
    let Some(policy) = policies.next() else {
        let what = "this host has no cpufreq driver that has one";
        return Ok(Finding::warn(key, what, format!("leave {key} out")));
    };
    let available = policy.available_preferences(around.root)?;
    if available.is_empty() {
        let what = "the cpufreq driver of these CPUs has none";
        return Ok(Finding::warn(key, what, format!("leave {key} out")));
    }
    // Drivers take numbers as well (admin-guide/pm/intel_pstate.rst).
    let is_number = preference.parse::<u8>().is_ok();
    if !is_number && !available.iter().any(|name| name == preference) {
        return Ok(Finding::error(
            key,
            format!("no {preference:?} for CPU {cpus}"),
            format!("available: {}", available.join(", ")),
        ));
    }
    if governor == Some("performance") && preference != "performance" {
        return Ok(Finding::warn(
            key,
            "with the governor performance the kernel allows no other than performance",
            format!("{governor_key} = \"powersave\", or leave {key} out"),
        ));
    }
    Ok(Finding::ok(key, preference))
}

/// Whether there is a KVM that polls. Without one the VM can start all the same.
fn check_halt_polling(root: &Host) -> Finding {
    const CHECK: &str = "halt_poll_ns";
    match own_steps::halt_polling(root) {
        Ok(Some(_)) => Finding::ok(CHECK, "for all VMs of this host while the VM runs"),
        Ok(None) => {
            let what = "this host has no /sys/module/kvm/parameters/halt_poll_ns";
            Finding::warn(
                CHECK,
                what,
                "load the module kvm, or leave halt_poll_ns out",
            )
        }
        Err(error) => Finding::of_error(CHECK, &error),
    }
}

/// Whether the isolated CPUs have a wake-up latency. Without one the VM can start all the same.
fn check_latency(root: &Host, isolated: &CpuSet) -> Finding {
    const CHECK: &str = "max_latency_us";
    match governor::latencies(root, isolated) {
        Ok(found) if found.len() == isolated.len() => Finding::ok(CHECK, "all isolated CPUs"),
        Ok(_) => Finding::warn(CHECK, governor::NO_LATENCY, "leave max_latency_us out"),
        Err(error) => Finding::of_error(CHECK, &error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use crate::settings;
    use crate::state::reservation::Phase;
    use pinfold_core::state::Store;

    #[test]
    fn pre_start_refuses_with_the_first_error_and_notes_the_warnings() {
        let host = MadeUpHost::new("5900x");
        let vmid = "100".parse().unwrap();
        let reported = |conf: &str, text: &str| {
            let settings = settings::resolve(&host.root, text, "test", 1).unwrap();
            before_start(&host.root, vmid, &VmConf::parse(conf), &settings)
        };
        assert_eq!(
            reported("cores: 12", "layout = \"5900x\"").unwrap(),
            [""; 0]
        );
        let notes = reported("affinity: 0-3", "isolated = \"6\"\npins = [6]").unwrap();
        assert_eq!(
            notes,
            [
                "VM 100: `affinity: 0-3` is also set; the pins take precedence; \
                 remove it: qm set 100 --delete affinity",
                "CPU 6 does not include all SMT siblings: what runs on them slows the VM's cores; isolate whole cores; \
                 `hook layout` shows them"
            ]
        );
        for (conf, text, why) in [
            (
                "cores: 99",
                "isolated = \"0,6\"\npins = [6]\nmethod = \"hotplug\"",
                "test: isolated: CPU 0 cannot be isolated by hotplug, since the kernel needs it online; \
                 choose others, or method = \"partition\"",
            ),
            (
                "cores: 13",
                "layout = \"5900x\"",
                "test: pins: the VM has 13 vCPUs but only 12 pins; add pins or remove vCPUs",
            ),
        ] {
            let error = reported(conf, text).unwrap_err().to_string();
            assert!(error.starts_with(why), "{error}");
        }
    }

    #[test]
    fn cpu_0_by_partition_only() {
        let host = MadeUpHost::new("5900x");
        let vmid: VmId = "100".parse().unwrap();
        let settings = |rest: &str| {
            let text = format!("isolated = \"0-5,12-17\"\npins = \"auto\"\n{rest}");
            settings::resolve(&host.root, &text, "test", 1).unwrap()
        };
        let isolation_by = |rest: &str| {
            let none = BTreeMap::new();
            isolation(
                &host.root,
                &Siblings::default(),
                &none,
                vmid,
                &settings(rest),
                None,
            )
            .map(|(isolation, _)| isolation)
            .map_err(|error| error.to_string())
        };
        // Linux 6.1 has no partitions below the top.
        let error = isolation_by("").unwrap_err();
        assert!(
            error.starts_with("test: isolated: CPU 0 cannot be isolated by hotplug")
                && error.contains("and partition is unavailable: kernel 6.1.0-44-amd64: "),
            "{error}"
        );
        host.file("sys/fs/cgroup/cpuset.cpus.isolated", "");
        assert_eq!(isolation_by(""), Ok(Isolation::Partition));
        assert!(isolation_by("method = \"hotplug\"").is_err());
        // What stays there is reported at the start, and by check.
        let conf = VmConf::parse("cores: 6");
        let notes = before_start(&host.root, vmid, &conf, &settings("")).unwrap();
        assert_eq!(
            notes,
            [
                "CPU 0 is isolated: timekeeping, IRQs that cannot be moved and the kernel's work for the boot CPU \
                 stay there"
            ]
        );
        let around = SharedReadings::new(&host.root);
        let found = findings(&around, "100".parse().unwrap(), &conf, &settings("")).unwrap();
        assert!(
            found[0].level == Level::Ok && found[0].what.ends_with("boot CPU stay there"),
            "{found:?}"
        );
        let least = "min_housekeeping = 13";
        assert!(before_start(&host.root, vmid, &conf, &settings(least)).is_err());
    }

    #[test]
    fn min_housekeeping_holds_over_all_vms() {
        let host = MadeUpHost::new("5900x");
        let vmid = "100".parse().unwrap();
        for (own, other, refused) in [(12, 12, None), (12, 13, Some(13)), (14, 1, Some(14))] {
            let text = |cpus: &str, least: usize| {
                format!("isolated = \"{cpus}\"\npins = \"auto\"\nmin_housekeeping = {least}\n")
            };
            let settings = settings::resolve(&host.root, &text("6-8,18-20", own), "test", 1);
            let settings = settings.unwrap();
            host.reserve(101, Phase::Starting, &text("9-11,21-23", other));
            let state = Store::<Reservation>::peek(&host.root).unwrap().unwrap();
            let reservations = state.reservations;
            let found = no_overlap(&host.root, &reservations, vmid, &settings);
            let why = found.err().map(|error| error.to_string());
            assert_eq!(
                why,
                refused.map(|least| format!(
                    "test: isolated: with those of other VMs, CPU 6-11,18-23 leave 12 housekeeping CPUs, \
                     fewer than min_housekeeping = {least}; isolate fewer"
                ))
            );
        }
    }

    #[test]
    fn cpus_of_the_command_line_are_not_left_to_the_host() {
        let host = MadeUpHost::new("5900x");
        host.file("sys/devices/system/cpu/isolated", "2,14\n");
        let check = |least: usize| {
            let text =
                format!("isolated = \"6-11,18-23\"\npins = \"auto\"\nmin_housekeeping = {least}\n");
            let settings = settings::resolve(&host.root, &text, "test", 1).unwrap();
            isolated_cpus(&host.root, &settings).unwrap().to_string()
        };
        assert!(
            check(10).contains("leaves CPU 0-1,3-5,12-13,15-17 for housekeeping"),
            "{}",
            check(10)
        );
        assert!(
            check(11).contains("leaves 10 housekeeping CPUs"),
            "{}",
            check(11)
        );
    }

    #[test]
    fn iothreads_by_id_and_cpus_beyond_the_last_are_checked() {
        let host = MadeUpHost::new("5900x-offline");
        let refusal = |text: &str| {
            let settings = settings::resolve(&host.root, text, "test", 1).unwrap();
            let vmid = "100".parse().unwrap();
            let refused = before_start(&host.root, vmid, &VmConf::parse("cores: 1"), &settings);
            refused.unwrap_err().to_string()
        };
        let why = refusal("isolated = \"6\"\npins = \"6\"\niothreads = { a = \"3\", b = \"2\" }");
        assert!(
            why.starts_with("test: iothreads: b: ") && why.contains("offline"),
            "{why}"
        );
        host.file("sys/devices/system/cpu/present", "0-2047");
        host.file("sys/devices/system/cpu/online", "0-2047");
        assert_eq!(
            refusal("isolated = \"1000,1024\"\npins = \"1024\""),
            "test: isolated: CPU 1024 is beyond 1023, the last that threads can be pinned to; choose others"
        );
    }
}

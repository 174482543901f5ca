//! What else on this host affects a VM's CPUs: the kernel's command line, containers, programs that
//! tune the host, ZFS; and whether a VM that ends without hook is noticed.

use pinfold_core::sys::cpu;
use pinfold_core::vm::{VmConf, VmId};
use pinfold_core::{CpuSet, CpuSetError, Host, MAX_CPU, Result};

use super::finding::{EXPLAINED, Finding};
use super::shared_readings::{Balancer, Program, SharedReadings};

/// The findings about the host around a VM.
///
/// # Errors
/// If the host cannot be read.
pub(super) fn findings(
    around: &SharedReadings<'_>,
    vmid: VmId,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Vec<Finding>> {
    let root = around.root;
    let last = cpu::present(root)?.last().unwrap_or(0);
    let mut findings = command_line(&root.read("proc/cmdline")?, isolated, last);
    if let Some(pinning) = &conf.pinning {
        findings.push(Finding::warn(
            "pinning",
            format!("VM {vmid}: `pinning: {pinning}` is also set; the pins take precedence"),
            format!("remove it: qm set {vmid} --delete pinning"),
        ));
    }
    let everywhere = cpu::online(root)?;
    findings.push(containers(
        around.pinned_containers(),
        isolated,
        &everywhere,
    ));
    findings.push(profiles(around)?);
    findings.extend(zfs(root, isolated)?);
    findings.push(recover(root));
    Ok(findings)
}

/// CPUs that the kernel's command line isolates permanently (admin-guide/kernel-parameters.txt).
fn command_line(text: &str, isolated: &CpuSet, last: usize) -> Vec<Finding> {
    const CHECK: &str = "command line";
    const NAMES: [&str; 4] = ["isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity"];
    let words = text
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    let mut findings = Vec::new();
    for (name, value) in words.filter(|(name, _)| NAMES.contains(name)) {
        // isolcpus may begin with flags: `managed_irq,domain,2-3`.
        let is_flag = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_lowercase()) && !word.starts_with("all")
        };
        let words: Vec<&str> = value.split(',').collect();
        let flags = words
            .iter()
            .take_while(|word| name == "isolcpus" && is_flag(word));
        let (flags, list) = words.split_at(flags.count());
        let Ok(cpus) = kernel_cpus(list, last) else {
            findings.push(Finding::warn(
                CHECK,
                format!("{name}={value} contains CPUs that the kernel cannot parse"),
                "correct or remove it",
            ));
            continue;
        };
        let covers = isolated.is_subset(&cpus);
        // With only these flags it keeps ticks or managed IRQs away, not threads.
        let is_permanent = !["nohz", "managed_irq"]
            .iter()
            .any(|flag| flags.contains(flag))
            || flags.contains(&"domain");
        findings.push(match name {
            "isolcpus" if is_permanent => {
                let others = &cpus - isolated;
                let too = match others.is_empty() {
                    true => String::new(),
                    false => format!(", and takes CPU {others} from the host too"),
                };
                Finding::warn(
                    CHECK,
                    format!("{name}={value} isolates these CPUs even while the VM does not run{too}"),
                    "remove it: hook isolates them while the VM runs",
                )
            }
            "irqaffinity" if cpus.intersects(isolated) => Finding::warn(
                CHECK,
                format!(
                    "{name}={value} puts new IRQs on CPU {}, which are isolated",
                    &cpus & isolated
                ),
                format!("set {name}={}, or remove it", &CpuSet::range(0, last) - isolated),
            ),
            "irqaffinity" => Finding::ok(CHECK, format!("{name}={value} has no isolated CPUs")),
            _ if covers => Finding::ok(
                CHECK,
                format!("{name}={value} includes all isolated CPUs"),
            ),
            _ => Finding::warn(
                CHECK,
                format!("{name}={value} includes only some of the isolated CPUs, so vCPUs behave differently"),
                format!(
                    "set {name}={}, or remove it; {EXPLAINED}",
                    [flags, &[&isolated.to_string()]].concat().join(",")
                ),
            ),
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "isolates no CPUs"));
    }
    findings
}

/// CPUs as the kernel's command line has them: `all`, `N` for the last one, and `0-31:1/4` for the
/// first of every four (core-api/cpu lists in admin-guide/kernel-parameters.rst).
fn kernel_cpus(parts: &[&str], last: usize) -> std::result::Result<CpuSet, CpuSetError> {
    let bad = |part: &str| CpuSetError::Token {
        token: part.to_owned(),
        text: parts.join(","),
    };
    let number = |text: &str| match text {
        "N" => Ok(last),
        text => text
            .parse::<usize>()
            .ok()
            .filter(|number| *number <= MAX_CPU)
            .ok_or_else(|| bad(text)),
    };
    let mut cpus = CpuSet::new();
    for part in parts {
        let (range, every) = part.split_once(':').unwrap_or((part, ""));
        let (first, end) = match range {
            "all" => (0, last),
            range => match range.split_once('-') {
                Some((first, end)) => (number(first)?, number(end)?),
                None => (number(range)?, number(range)?),
            },
        };
        let (used, of) = match every.split_once('/') {
            Some((used, of)) => (number(used)?, number(of)?),
            None if every.is_empty() => (1, 1),
            None => return Err(bad(part)),
        };
        if end < first || of == 0 || used > of {
            return Err(bad(part));
        }
        // The kernel ignores CPUs that there cannot be.
        let within = first..=end.min(MAX_CPU);
        cpus = &cpus | &within.filter(|cpu| (cpu - first) % of < used).collect();
    }
    Ok(cpus)
}

/// Containers that are pinned to isolated CPUs.
fn containers(pinned: &[(VmId, CpuSet)], isolated: &CpuSet, everywhere: &CpuSet) -> Finding {
    const CHECK: &str = "containers";
    let inside: Vec<_> = pinned
        .iter()
        // Containers that may run everywhere lose nothing that they count on.
        .filter(|(_, cpus)| cpus.intersects(isolated) && !everywhere.is_subset(cpus))
        .collect();
    let Some((container, cpus)) = inside.first() else {
        return Finding::ok(CHECK, "none is pinned to the isolated CPUs");
    };
    let others = match inside.len() {
        1 => String::new(),
        count => format!(", and {} more", count - 1),
    };
    let rest = match cpus.is_subset(isolated) {
        true => "all of these are isolated",
        false => "some of these are isolated",
    };
    Finding::warn(
        CHECK,
        format!("container {container} is pinned to CPU {cpus}, and {rest}{others}"),
        "give it others: lxc.cgroup2.cpuset.cpus in its settings",
    )
}

/// Programs that set governors and masks of the whole host.
fn profiles(around: &SharedReadings<'_>) -> Result<Finding> {
    const CHECK: &str = "profiles";
    Ok(match around.tuners()?.next() {
        Some(Program { pid, name }) => Finding::warn(
            CHECK,
            format!("{name} (process {pid}) may overwrite the isolated CPUs' governors and masks"),
            format!("systemctl disable --now {name}; hook sets the governor while the VM runs"),
        ),
        None => Finding::ok(CHECK, "neither tuned nor power-profiles-daemon runs"),
    })
}

/// Whether irqbalance moves IRQs to the isolated CPUs.
///
/// # Errors
/// If /proc cannot be read.
pub(super) fn irqbalance(around: &SharedReadings<'_>, isolated: &CpuSet) -> Result<Vec<Finding>> {
    let mut balancers = Vec::new();
    for Balancer { pid, banned } in around.balancers()? {
        balancers.push(if isolated.is_subset(banned) {
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
    if balancers.is_empty() {
        balancers.push(Finding::ok("irqbalance", "not running"));
    }
    Ok(balancers)
}

/// Threads of ZFS that are bound to isolated CPUs.
fn zfs(root: &Host, isolated: &CpuSet) -> Result<Option<Finding>> {
    const CHECK: &str = "zfs";
    let bind = root.read_value("sys/module/spl/parameters/spl_taskq_thread_bind")?;
    Ok(match bind.as_deref() {
        None => None,
        Some("0") => Some(Finding::ok(CHECK, "its threads are not bound to CPUs")),
        Some(value) => Some(Finding::warn(
            CHECK,
            format!(
                "spl_taskq_thread_bind={value} binds threads of ZFS to CPUs, CPU {isolated} among them; they cannot be moved"
            ),
            "write `options spl spl_taskq_thread_bind=0` to /etc/modprobe.d/spl.conf, update-initramfs -u, and restart the host",
        )),
    })
}

/// Whether the unit is enabled that notices VMs that end without hook.
fn recover(root: &Host) -> Finding {
    const CHECK: &str = "recover";
    const UNIT: &str = "pinfold-recover.path";
    let is_enabled = [
        "etc/systemd/system",
        "usr/lib/systemd/system",
        "lib/systemd/system",
    ]
    .iter()
    .any(|folder| {
        let link = format!("{folder}/multi-user.target.wants/{UNIT}");
        root.path(link).symlink_metadata().is_ok()
    });
    match is_enabled {
        true => Finding::ok(CHECK, format!("{UNIT} is enabled")),
        false => Finding::warn(
            CHECK,
            format!(
                "{UNIT} is not enabled: CPUs of a VM that is killed stay isolated until hook runs again"
            ),
            format!("systemctl enable --now {UNIT}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_of_the_command_line() {
        for (text, cpus) in [
            ("6-N", Some("6-23")),
            ("all", Some("0-23")),
            ("0-15", Some("0-15")),
            ("N", Some("23")),
            ("6-11,18-N", Some("6-11,18-23")),
            ("0-23:2/6", Some("0-1,6-7,12-13,18-19")),
            ("x", None),
            ("5-3", None),
            ("1-3:1/0", None),
            ("1-3:", Some("1-3")),
            ("", None),
            ("99999999999999999999", None),
        ] {
            let parts: Vec<&str> = text.split(',').collect();
            let found = kernel_cpus(&parts, 23).ok().map(|cpus| cpus.to_string());
            assert_eq!(found.as_deref(), cpus, "{text:?}");
        }
    }
}

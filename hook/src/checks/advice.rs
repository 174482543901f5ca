//! The checks of `hook check` that pre-start does not make: none of them stops a start by itself.

use std::os::unix::fs::PermissionsExt;

use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::VmConf;
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Host, Result};

use super::finding::Finding;
use crate::settings::Settings;

/// Where Proxmox VE keeps the snippets of the storage `local`.
const SNIPPETS: &str = "var/lib/vz/snippets";

/// All advice for a VM with settings.
///
/// # Errors
/// If the host cannot be read.
pub(crate) fn findings(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    let topology = Topology::read(root)?;
    let mut findings = command_line(&root.read("proc/cmdline")?, &settings.isolated);
    findings.push(llc(&topology, &settings.isolated));
    findings.push(spare_pins(conf, settings));
    findings.push(guest_cores(root, vmid, conf, settings)?);
    findings.push(hugepages(root, &topology, conf, &settings.isolated)?);
    findings.push(helpers(conf, settings));
    Ok(findings)
}

/// Whether Proxmox VE runs hook for the VM, and can.
pub(crate) fn hookscript(root: &Host, vmid: VmId, conf: &VmConf) -> Finding {
    const CHECK: &str = "hookscript";
    let Some(volume) = &conf.hookscript else {
        let fix = format!("qm set {vmid} --hookscript local:snippets/hook");
        return Finding::warn(
            CHECK,
            "not set: Proxmox VE does not call hook for this VM",
            fix,
        );
    };
    let path = match volume.strip_prefix("local:snippets/") {
        Some(name) => format!("{SNIPPETS}/{name}"),
        None if volume.starts_with('/') => volume.clone(),
        None => {
            return Finding::ok(
                CHECK,
                format!("{volume}; not checked, only storage local is"),
            );
        }
    };
    let path = root.path(path);
    let shown = path.display();
    match path.metadata() {
        Err(error) => {
            let what = format!("{shown}: {}", pinfold_core::os_text(&error));
            Finding::error(
                CHECK,
                what,
                format!("copy hook there: install -m 0755 $(command -v hook) {shown}"),
            )
        }
        Ok(file) if !file.is_file() => Finding::error(
            CHECK,
            format!("{shown}: not a plain file"),
            "install hook there",
        ),
        Ok(file) if file.permissions().mode() & 0o111 == 0 => Finding::error(
            CHECK,
            format!("{shown}: not executable"),
            format!("chmod 0755 {shown}"),
        ),
        Ok(_) => Finding::ok(CHECK, volume),
    }
}

/// CPUs that the kernel's command line isolates permanently (admin-guide/kernel-parameters.txt).
fn command_line(text: &str, isolated: &CpuSet) -> Vec<Finding> {
    const CHECK: &str = "command line";
    let words = || {
        text.split_whitespace()
            .filter_map(|word| word.split_once('='))
    };
    let mut findings = Vec::new();
    for (name, value) in
        words().filter(|(name, _)| matches!(*name, "isolcpus" | "nohz_full" | "rcu_nocbs"))
    {
        // isolcpus may begin with flags: `managed_irq,domain,2-3`.
        let is_flag = |word: &&str| word.starts_with(|c: char| c.is_ascii_alphabetic());
        let list = value
            .split(',')
            .skip_while(is_flag)
            .collect::<Vec<_>>()
            .join(",");
        let covers = CpuSet::from_kernel_list(&list).is_ok_and(|cpus| isolated.is_subset(&cpus));
        findings.push(match name {
            "isolcpus" => Finding::warn(
                CHECK,
                format!(
                    "{name}={value} isolates these CPUs even while the VM does not run"
                ),
                "remove it: hook isolates them while the VM runs",
            ),
            _ if covers => Finding::ok(
                CHECK,
                format!("{name}={value} includes all isolated CPUs"),
            ),
            _ => Finding::warn(
                CHECK,
                format!("{name}={value} includes only some of the isolated CPUs, so vCPUs behave differently"),
                format!("set {name}={isolated}, or remove it"),
            ),
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "isolates no CPUs"));
    }
    findings
}

/// Whether the isolated CPUs are in as few LLC domains as possible.
fn llc(topology: &Topology, isolated: &CpuSet) -> Finding {
    const CHECK: &str = "L3";
    let mut sizes: Vec<usize> = topology
        .domains(Kind::Llc)
        .iter()
        .map(|llc| llc.cpus.len())
        .collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let mut room = 0;
    let needed = sizes.iter().take_while(|size| {
        let more = room < isolated.len();
        room += **size;
        more
    });
    let needed = needed.count();
    let own = topology
        .domains(Kind::Llc)
        .iter()
        .filter(|llc| llc.cpus.intersects(isolated));
    let own: Vec<String> = own.map(|llc| format!("llc:{}", llc.number)).collect();
    if own.len() <= needed {
        return Finding::ok(CHECK, format!("in {}", own.join(", ")));
    }
    let what = format!(
        "CPU {isolated} is split across {}: vCPUs share caches with the host",
        own.join(", ")
    );
    Finding::warn(
        CHECK,
        what,
        format!("{needed} would be enough; `hook layout` shows which CPUs share one"),
    )
}

/// Pins without a vCPU.
fn spare_pins(conf: &VmConf, settings: &Settings) -> Finding {
    let vcpus = conf.vcpus() as usize;
    let used: CpuSet = settings
        .pins
        .iter()
        .take(vcpus)
        .flat_map(CpuSet::iter)
        .collect();
    let spare: CpuSet = settings
        .pins
        .iter()
        .skip(vcpus)
        .flat_map(CpuSet::iter)
        .collect();
    let spare = &spare - &used;
    if spare.is_empty() {
        return Finding::ok("vCPUs", format!("{vcpus}, each with a pin"));
    }
    let what = format!(
        "{vcpus}, but {} pins: CPU {spare} is isolated but unused",
        settings.pins.len()
    );
    Finding::warn(
        "vCPUs",
        what,
        "give the VM more cores, or isolate fewer CPUs",
    )
}

/// Whether the guest knows which of its vCPUs are threads of one core.
fn guest_cores(root: &Host, vmid: VmId, conf: &VmConf, settings: &Settings) -> Result<Finding> {
    const CHECK: &str = "guest cores";
    let vcpus = conf.vcpus() as usize;
    let single = |pin: &CpuSet| pin.first().filter(|_| pin.len() == 1);
    let pins: Vec<usize> = settings.pins.iter().take(vcpus).map_while(single).collect();
    if pins.len() < vcpus || vcpus < 2 {
        return Ok(Finding::ok(
            CHECK,
            "not checked: not every vCPU has a CPU of its own",
        ));
    }
    let mut cores = Vec::with_capacity(vcpus);
    for cpu in &pins {
        cores.push(cpu::siblings(root, *cpu)?);
    }
    let together = cores.iter().any(|core| core.len() > 1);
    let paired =
        together && vcpus.is_multiple_of(2) && cores.chunks(2).all(|pair| pair[0] == pair[1]);
    Ok(match (paired, conf.threads_per_core() == 2) {
        (true, true) => Finding::ok(
            CHECK,
            "two vCPUs per core, on the two threads of one host core",
        ),
        (true, false) => Finding::warn(
            CHECK,
            "vCPUs 0 and 1, 2 and 3, … are threads of one core, but the guest sees each as a core of its own",
            format!(
                "qm set {vmid} --args '-smp {vcpus},sockets=1,cores={},threads=2'",
                vcpus / 2
            ),
        ),
        (false, true) => {
            let mut pins = pins;
            pins.sort_by_key(|cpu| (cores_first(&cores, *cpu), *cpu));
            let pins: Vec<String> = pins.iter().map(ToString::to_string).collect();
            Finding::warn(
                CHECK,
                "the guest sees vCPUs 0 and 1, 2 and 3, … as threads of one core, but their pins are on two cores",
                format!(
                    "put the threads of a core next to each other: pins = \"{}\"",
                    pins.join(",")
                ),
            )
        }
        (false, false) => Finding::ok(CHECK, "one vCPU per core"),
    })
}

/// The first thread of a CPU's core.
fn cores_first(cores: &[CpuSet], cpu: usize) -> usize {
    cores
        .iter()
        .find(|core| core.contains(cpu))
        .and_then(CpuSet::first)
        .unwrap_or(cpu)
}

/// Whether huge pages are on the nodes of the isolated CPUs (admin-guide/mm/hugetlbpage.rst).
fn hugepages(
    root: &Host,
    topology: &Topology,
    conf: &VmConf,
    isolated: &CpuSet,
) -> Result<Finding> {
    const CHECK: &str = "hugepages";
    let sizes: &[u32] = match conf.hugepages.as_deref() {
        None => return Ok(Finding::ok(CHECK, "not configured")),
        Some("2") => &[2048],
        Some("1024") => &[1_048_576],
        Some(_) => &[1_048_576, 2048],
    };
    let nodes = topology.domains(Kind::Node);
    let (mut near, mut far) = (0, Vec::new());
    for node in nodes {
        for size in sizes {
            let path = format!(
                "sys/devices/system/node/node{}/hugepages/hugepages-{size}kB/nr_hugepages",
                node.number
            );
            let pages: u64 = root
                .read_value(path)?
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            if node.cpus.intersects(isolated) {
                near += pages;
            } else if pages > 0 {
                far.push(format!("node {}", node.number));
            }
        }
    }
    far.dedup();
    let own: Vec<String> = nodes
        .iter()
        .filter(|node| node.cpus.intersects(isolated))
        .map(|node| node.number.to_string())
        .collect();
    Ok(if near == 0 && !far.is_empty() {
        let what = format!(
            "all on {}, but the isolated CPUs are on node {}",
            far.join(", "),
            own.join(", ")
        );
        let file = format!(
            "/sys/devices/system/node/node{}/hugepages/hugepages-{}kB/nr_hugepages",
            own.join(","),
            sizes[0]
        );
        Finding::warn(CHECK, what, format!("reserve them there, in {file}"))
    } else {
        Finding::ok(
            CHECK,
            format!(
                "on node {}, like the isolated CPUs, or not reserved yet",
                own.join(", ")
            ),
        )
    })
}

/// Where the processes beside QEMU run.
fn helpers(conf: &VmConf, settings: &Settings) -> Finding {
    let names = [("swtpm", conf.tpm), ("virtiofsd", conf.virtiofs)];
    let names: Vec<&str> = names
        .iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| *name)
        .collect();
    let go = if names.len() > 1 { "go" } else { "goes" };
    let names = names.join(" and ");
    let what = match &settings.emulator {
        _ if names.is_empty() => "none".into(),
        Some(cpus) => format!("{names} {go} with the emulator threads to CPU {cpus}"),
        None => format!("{names} {go} with the emulator threads to the housekeeping CPUs"),
    };
    Finding::ok("helpers", what)
}

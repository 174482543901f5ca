//! `hook init`: chooses CPUs for a VM on this host and writes its settings.

use std::collections::BTreeMap;

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::print;
use pinfold_core::state::Store;
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Domain, Kind, Topology};
use pinfold_core::vm::{self, VmId};
use pinfold_core::{CpuSet, Error, Exit, Host, Report, Result, Selector};
use serde_json::json;

use crate::checks::required;
use crate::settings;
use crate::state::reservation::Reservation;
use crate::steps::TOOL;

/// How many domains a message lists.
const MAX_LISTED: usize = 8;

/// The keys that are not chosen here, with their defaults.
const OTHER_KEYS: &str = "\
#method = \"hotplug\"            # or \"partition\"; \"auto\": partition if this host supports it
#governor = \"performance\"      # or \"keep\"
#stat_interval = 120           # vm.stat_interval in seconds
#idle_vm = 107                 # a VM to stop before this one starts and to start after it stops; default: none
#reset_pci = false             # true: reset the VM's hostpci devices before it starts; or a list of PCI addresses
#tidy_caches = true            # drop caches and compact memory before the start
#min_housekeeping = 1          # how many CPUs must remain for the host

#[deadlines]                   # the longest waits, in seconds
#lock = 120                    # for another hook to end
#systemd = 10                  # for one call to systemd
#reload = 60                   # for systemd to read all units again
#qmp = 5                       # for QEMU's monitor
#pci = 10                      # for PCI functions to disappear, and to reappear
#idle_vm = 60                  # for the idle VM to shut down, or to start
#qemu_exit = 10                # for QEMU to exit in post-stop
";

/// The options of `hook init`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    pub vmid: VmId,
    /// The CPUs to isolate, by logical number or selector, as in 6-11,18-23 or llc:1 [default: an
    /// LLC domain that fits]
    #[arg(long, conflicts_with = "vcache")]
    pub cpus: Option<Selector>,
    /// Choose among the LLC domains with a larger L3 (3D V-Cache)
    #[arg(long)]
    pub vcache: bool,
    /// Print the settings and write nothing
    #[arg(long)]
    pub print: bool,
}

/// What the VM needs.
#[derive(Debug, Clone, Copy)]
struct Guest {
    vcpus: usize,
    /// The threads of each of its cores.
    threads: usize,
}

/// The chosen CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Filter {
    /// As written to the file.
    isolated: String,
    cpus: CpuSet,
    /// Why these, and what else was considered: lines of the file's comment.
    why: Vec<String>,
}

/// The command's whole run.
///
/// # Errors
/// If there is no such VM, no domain has room for it, it has settings already, or they cannot be
/// written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let (root, report) = (&output.root(), &mut output.report(TOOL));
    let vmid = args.vmid;
    let conf = vm::conf(root, vmid)?;
    if !args.print {
        settings::no_own_file(root, vmid)?;
    }
    let guest = Guest {
        vcpus: conf.vcpus().max(conf.max_vcpus()) as usize,
        threads: conf.threads_per_core(),
    };
    let others = others(root, report, vmid);
    let topology = Topology::read(root)?;
    let mut choice = match &args.cpus {
        Some(expr) => from_option(root, expr, guest)?,
        None => {
            if args.vcache {
                // Fails with a list of the domains if none has a larger L3.
                "vcache".parse::<Selector>()?.resolve(root)?;
            }
            choose(&topology, guest, args.vcache, &others)
                .map_err(|why| Error::unusable(format!("VM {vmid}"), why))?
        }
    };
    for shared in shared(&choice.cpus, &others) {
        let only_one = format!("{shared}: only one of the two VMs can run at a time");
        report.note(&only_one);
        choice.why.push(format!("{only_one}."));
    }
    let text = text(vmid, guest, &choice, &(&topology.online - &choice.cpus));
    let source = settings::node_file(root, vmid).display().to_string();
    let settings = settings::resolve(root, &text, &source, guest.threads)?;
    required::pins_suffice(&settings, guest.vcpus, guest.vcpus.checked_sub(1))?;
    if args.print {
        print(&text)?;
        return Ok(Exit::Success);
    }
    let path = settings::create(root, vmid, &text)?;
    let pins: Vec<String> = settings
        .pins
        .iter()
        .take(guest.vcpus)
        .map(ToString::to_string)
        .collect();
    if output.json {
        let told =
            json!({"path": path, "isolated": choice.isolated, "cpus": choice.cpus, "pins": pins});
        print(&format!("{told:#}\n"))?;
        return Ok(Exit::Success);
    }
    report.line(&format!(
        "wrote {}: VM {vmid} gets {}",
        path.display(),
        in_words(&choice)
    ));
    report.line(&format!(
        "its {} vCPUs are pinned to {}",
        guest.vcpus,
        pins.join(",")
    ));
    match &conf.hookscript {
        None => report.line(&format!(
            "next: qm set {vmid} --hookscript local:snippets/hook"
        )),
        Some(volume) => report.line(&format!("its hookscript is {volume}")),
    }
    report.line("once it runs, hook status shows what can still run on its CPUs");
    Ok(report.finish())
}

fn in_words(choice: &Filter) -> String {
    let Filter { isolated, cpus, .. } = choice;
    if *isolated == cpus.to_string() {
        format!("CPU {cpus}")
    } else {
        format!("{isolated}, CPU {cpus}")
    }
}

/// The CPUs that other VMs have, or will have when they start.
fn others(root: &Host, report: &mut Report, vmid: VmId) -> BTreeMap<VmId, CpuSet> {
    let mut others: BTreeMap<VmId, CpuSet> = BTreeMap::new();
    let mut add = |other: VmId, cpus: &CpuSet| {
        let all = others.entry(other).or_default();
        *all = &*all | cpus;
    };
    match Store::<Reservation>::peek(root) {
        Ok(state) => {
            let (reservations, _) = state.unwrap_or_default();
            for (id, reservation) in reservations
                .iter()
                .filter(|(_, reservation)| reservation.is_claim())
            {
                if let Ok(other) = VmId::try_from(*id) {
                    add(other, &reservation.settings.isolated);
                }
            }
        }
        Err(error) => report.note(&format!("the CPUs of running VMs are unknown: {error}")),
    }
    for other in vm::all(root) {
        // A VM without hook may have settings for later; a VM with hook always has settings.
        let has_hook = || {
            vm::conf(root, other)
                .is_ok_and(|conf| conf.hookscript.is_some_and(|at| at.ends_with("/hook")))
        };
        let own = settings::own_file(root, other);
        if own.is_none() && !has_hook() {
            continue;
        }
        match settings::load(root, other, 1) {
            Ok(settings) => add(other, &settings.isolated),
            // Without a file of its own it has the built-in layout, which may not fit this host.
            Err(_) if own.is_none() => {}
            Err(error) => report.note(&format!("the CPUs of VM {other} are unknown: {error}")),
        }
    }
    others.remove(&vmid);
    others
}

/// The CPUs of --cpus.
fn from_option(root: &Host, expr: &Selector, guest: Guest) -> Result<Filter> {
    let cpus = expr.resolve(root)?;
    let unusable = |why: String| Error::unusable(format!("CPU {cpus}"), why);
    cpu::check_online(root, &cpus)?;
    if cpus.contains(0) {
        return Err(unusable(
            "CPU 0 cannot be isolated, the kernel needs it; leave it out".into(),
        ));
    }
    if cpus.len() < guest.vcpus {
        return Err(unusable(format!(
            "{} CPUs are too few for the VM's {} vCPUs",
            cpus.len(),
            guest.vcpus
        )));
    }
    let isolated = expr.to_string();
    let why = if isolated == cpus.to_string() {
        Vec::new()
    } else {
        vec![format!("{isolated} is CPU {cpus}.")]
    };
    Ok(Filter {
        isolated,
        cpus,
        why,
    })
}

/// What an LLC domain has for the VM.
#[derive(Debug)]
struct Candidate<'a> {
    domain: &'a Domain,
    cpus: CpuSet,
    /// Whether small cores are among them.
    small: bool,
    /// Whether CPU 0, the host's own, is in the domain.
    beside_host: bool,
}

/// Chooses CPUs for a guest in an LLC domain with room for it. Preferred are, in this order, a
/// domain that is not used by other VMs, with enough fast cores, without CPU 0, and a small one
/// (docs/design.md, "What init chooses").
///
/// # Errors
/// That no domain has room for it, with what each has.
fn choose(
    topology: &Topology,
    guest: Guest,
    vcache: bool,
    others: &BTreeMap<VmId, CpuSet>,
) -> std::result::Result<Filter, String> {
    let taken = others.values().fold(CpuSet::new(), |all, cpus| &all | cpus);
    let domains = if vcache {
        topology.vcache()
    } else {
        topology.domains(Kind::Llc).iter().collect()
    };
    let candidates = |taken: &CpuSet| {
        let candidates = domains
            .iter()
            .filter_map(|domain| candidate(topology, domain, taken, guest));
        let mut candidates: Vec<Candidate<'_>> = candidates.collect();
        candidates.sort_by_key(|candidate| {
            (
                candidate.small,
                candidate.beside_host,
                candidate.domain.cpus.len(),
                candidate.domain.number,
            )
        });
        candidates
    };
    let (free, all) = (candidates(&taken), candidates(&CpuSet::new()));
    let Some(best) = free.first().or(all.first()) else {
        let list = domains
            .iter()
            .take(MAX_LISTED)
            .map(|domain| size(topology, domain))
            .collect::<Vec<_>>()
            .join(", ");
        let more = if domains.len() > MAX_LISTED {
            " and more (`hook layout` shows all)"
        } else {
            ""
        };
        return Err(format!(
            "no LLC domain has room for {} vCPUs: {list}{more}; remove vCPUs, or choose CPUs of several domains with --cpus",
            guest.vcpus
        ));
    };
    let Candidate { domain, cpus, .. } = best;
    // The CPUs of a selector change when CPUs come online.
    let whole = *cpus == domain.cpus && domain.sure && topology.offline().is_empty();
    let name = format!("llc:{}", domain.number);
    let isolated = if whole {
        name.clone()
    } else {
        cpus.to_string()
    };
    let cores = topology
        .cores
        .iter()
        .filter(|core| core.intersects(cpus))
        .count();
    let part = if *cpus == domain.cpus {
        "all"
    } else {
        "a part"
    };
    let cores_there = format!("{cores} {}", if cores == 1 { "core" } else { "cores" });
    let mut why = vec![format!(
        "{name} is CPU {}, {}. The VM gets {part} of it: {cores_there}.",
        domain.cpus, domain.extent
    )];
    if best.beside_host {
        why.push(
            "CPU 0, which stays with the host, is in it too: the VM shares the cache with the host.".into(),
        );
    }
    if cores == guest.vcpus && cpus.len() > cores {
        why.push("Each vCPU has a core of its own; the second threads stay idle.".into());
    }
    // Domains with the same reason share a line.
    let mut rest: Vec<(String, Vec<&Domain>)> = Vec::new();
    for other in domains
        .iter()
        .copied()
        .filter(|other| other.number != domain.number)
    {
        let is_it = |candidate: &&Candidate<'_>| candidate.domain.number == other.number;
        let verdict = match (free.iter().find(is_it), all.iter().find(is_it)) {
            (Some(candidate), _) => why_not(candidate, best).to_owned(),
            (None, Some(_)) => shared(&other.cpus, others).join(", "),
            (None, None) => "too few CPUs".to_owned(),
        };
        match rest.iter_mut().find(|(said, _)| *said == verdict) {
            Some((_, domains)) => domains.push(other),
            None => rest.push((verdict, vec![other])),
        }
    }
    if !rest.is_empty() {
        why.push("Also considered:".into());
    }
    for (verdict, domains) in rest {
        let which = match domains[..] {
            [domain] => size(topology, domain),
            _ => format!(
                "llc:{}",
                domains
                    .iter()
                    .map(|domain| domain.number)
                    .collect::<CpuSet>()
            ),
        };
        why.push(format!("  {which}: {verdict}"));
    }
    Ok(Filter {
        isolated,
        cpus: cpus.clone(),
        why,
    })
}

/// Why a candidate is not the best.
fn why_not(candidate: &Candidate<'_>, best: &Candidate<'_>) -> &'static str {
    if candidate.small && !best.small {
        "includes small cores"
    } else if candidate.beside_host && !best.beside_host {
        "shares its cache with the host"
    } else if candidate.domain.cpus.len() > best.domain.cpus.len() {
        "larger"
    } else {
        "as good"
    }
}

/// Which of some CPUs other VMs have.
fn shared(cpus: &CpuSet, others: &BTreeMap<VmId, CpuSet>) -> Vec<String> {
    let shared = others
        .iter()
        .map(|(other, theirs)| (other, theirs & cpus))
        .filter(|(_, shared)| !shared.is_empty());
    shared
        .map(|(other, shared)| format!("CPU {shared} belongs to VM {other}"))
        .collect()
}

/// `llc:1 (CPU 6-11,18-23) has 12 CPUs`: how many a VM can have.
fn size(topology: &Topology, domain: &Domain) -> String {
    let cpus: usize = cores(topology, &domain.cpus).map(CpuSet::len).sum();
    let less = if domain.cpus.contains(0) {
        " beside the core of CPU 0"
    } else {
        ""
    };
    format!(
        "llc:{} (CPU {}) has {cpus} CPUs{less}",
        domain.number, domain.cpus
    )
}

/// The whole cores within some CPUs that a VM may have: all except that of CPU 0.
fn cores<'a>(
    topology: &'a Topology,
    within: &'a CpuSet,
) -> impl DoubleEndedIterator<Item = &'a CpuSet> {
    topology
        .cores
        .iter()
        .filter(|core| core.is_subset(within) && !core.contains(0))
}

/// What a domain has for a guest; none if that is too little.
///
/// Only whole cores are chosen, the last ones first. A guest without SMT gets a core for each vCPU
/// if there are enough. Small cores are only chosen if there are too few fast ones.
fn candidate<'a>(
    topology: &Topology,
    domain: &'a Domain,
    taken: &CpuSet,
    guest: Guest,
) -> Option<Candidate<'a>> {
    let free = &domain.cpus - taken;
    let (small, fast): (Vec<&CpuSet>, Vec<&CpuSet>) = cores(topology, &free)
        .rev()
        .partition(|core| core.intersects(&topology.ecores));
    let all = [fast.clone(), small].concat();
    let fill = |cores: &[&CpuSet], vcpus_of: fn(&CpuSet) -> usize| {
        let (mut cpus, mut vcpus) = (CpuSet::new(), 0);
        for core in cores {
            if vcpus < guest.vcpus {
                cpus = &cpus | core;
                vcpus += vcpus_of(core);
            }
        }
        (vcpus >= guest.vcpus).then_some(cpus)
    };
    let within = |cores: &[&CpuSet]| {
        let alone = if guest.threads == 1 {
            fill(cores, |_| 1)
        } else {
            None
        };
        alone.or_else(|| fill(cores, CpuSet::len))
    };
    let cpus = within(&fast).or_else(|| within(&all))?;
    let (small, beside_host) = (cpus.intersects(&topology.ecores), domain.cpus.contains(0));
    Some(Candidate {
        domain,
        cpus,
        small,
        beside_host,
    })
}

/// The text of the settings file.
fn text(vmid: VmId, guest: Guest, choice: &Filter, housekeeping: &CpuSet) -> String {
    let cores = match guest.threads {
        1 => String::new(),
        threads => format!(", {threads} threads per core"),
    };
    let mut text = format!(
        "# VM {vmid} on this host, by `hook init`: {} vCPUs{cores}.\n",
        guest.vcpus
    );
    for line in &choice.why {
        text += &format!("# {line}\n");
    }
    text += &format!("isolated = \"{}\"\n\n", choice.isolated);
    text += "# hook orders the pins by the guest's cores; pin-vcpu --list shows them while the VM runs.\n";
    text += "pins = \"auto\"\n\n";
    text += "# The other keys with their defaults. README.md, \"Settings\", explains them.\n";
    let (emulator, iothreads) = (
        format!("#emulator = \"{housekeeping}\""),
        format!("#iothreads = \"{housekeeping}\""),
    );
    text += &format!("{emulator:30} # all housekeeping CPUs\n");
    text += &format!("{iothreads:30} # like the emulator; or {{ iothread-virtioscsi0 = \"0\" }}\n");
    text + OTHER_KEYS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine;
    use crate::settings::Settings;

    /// A captured machine with VMs.
    fn host(name: &str, vms: &[(u32, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let (_, text) = machine::all()
            .into_iter()
            .find(|(known, _)| known == name)
            .unwrap();
        machine::expand(&text, dir.path());
        let confs = dir.path().join("etc/pve/qemu-server");
        std::fs::create_dir_all(&confs).unwrap();
        for (id, conf) in vms {
            std::fs::write(confs.join(format!("{id}.conf")), conf).unwrap();
        }
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn init(root: &Host, id: u32, cpus: Option<&str>) -> std::result::Result<Settings, String> {
        let vmid = VmId::try_from(id).unwrap();
        let output = Output {
            json: false,
            verbose: false,
            quiet: true,
            sysroot: root.path(""),
        };
        let args = Args {
            vmid,
            cpus: cpus.map(|text| text.parse().unwrap()),
            vcache: false,
            print: false,
        };
        run(&args, &output).map_err(|error| error.to_string())?;
        Ok(settings::load(root, vmid, vm::conf(root, vmid).unwrap().threads_per_core()).unwrap())
    }

    fn guest(vcpus: usize, threads: usize) -> Guest {
        Guest { vcpus, threads }
    }

    #[test]
    fn choices() {
        for (name, vcpus, threads, isolated) in [
            ("5900x", 12, 2, "llc:1"),
            ("5900x", 12, 1, "llc:1"),
            ("5900x", 6, 1, "llc:1"),
            ("5900x", 4, 1, "8-11,20-23"),
            ("5900x", 4, 2, "10-11,22-23"),
            ("5900x", 5, 2, "9-11,21-23"),
            ("5900x", 8, 1, "8-11,20-23"),
            ("7950x3d", 16, 2, "llc:1"),
            ("one-l3", 8, 2, "4-7,12-15"),
            ("one-l3", 14, 1, "1-7,9-15"),
            ("two-sockets", 16, 1, "none"),
            ("two-sockets", 8, 1, "llc:1"),
            ("epyc-7763", 16, 2, "llc:1"),
            ("epyc-fenced", 16, 2, "8-15,72-79"),
            ("hybrid", 4, 1, "8-15"),
            ("hybrid", 10, 1, "6-15"),
            ("hybrid", 14, 1, "2-15"),
            ("hybrid", 16, 1, "2-15,22-23"),
            ("hybrid", 15, 2, "2-15,23"),
            ("meteor-lake", 2, 1, "4-7"),
            ("meteor-lake", 9, 1, "2-7,9-11"),
            ("big-little", 4, 1, "4-7"),
            ("big-little", 5, 1, "3-7"),
            ("smt-off", 6, 2, "6-11"),
            ("no-l3", 4, 1, "llc:1"),
            ("bare", 3, 1, "1-3"),
            ("bare", 4, 1, "none"),
        ] {
            let (_dir, root) = host(name, &[]);
            let choice = choose(
                &Topology::read(&root).unwrap(),
                guest(vcpus, threads),
                false,
                &BTreeMap::new(),
            );
            let chosen = choice.map_or("none".to_owned(), |choice| choice.isolated);
            assert_eq!(
                chosen, isolated,
                "{name}: {vcpus} vCPUs, {threads} threads per core"
            );
        }
    }

    /// What is written for any guest on any machine can be loaded, and keeps its promises.
    #[test]
    fn what_is_written_loads() {
        for (name, _) in machine::all() {
            let (_dir, root) = host(&name, &[]);
            let topology = Topology::read(&root).unwrap();
            let mut fits = 0;
            for (vcpus, threads) in (1..=16).flat_map(|vcpus| [(vcpus, 1), (vcpus, 2)]) {
                let Ok(choice) = choose(&topology, guest(vcpus, threads), false, &BTreeMap::new())
                else {
                    continue;
                };
                fits += 1;
                let text = text(
                    "100".parse().unwrap(),
                    guest(vcpus, threads),
                    &choice,
                    &CpuSet::new(),
                );
                let text = text.replace("\"\"", "\"0\"");
                let settings = settings::resolve(&root, &text, "test", threads).unwrap();
                let told = format!(
                    "{name}: {vcpus} vCPUs, {threads} threads per core: {}",
                    choice.isolated
                );
                assert_eq!(settings.isolated, choice.cpus, "{told}");
                assert!(
                    settings.pins.len() >= vcpus && settings.isolated.is_subset(&topology.online),
                    "{told}"
                );
                assert!(!settings.isolated.contains(0), "{told}");
                let is_whole =
                    |core: &&CpuSet| !core.intersects(&choice.cpus) || core.is_subset(&choice.cpus);
                assert!(topology.cores.iter().all(|core| is_whole(&core)), "{told}");
                let is_in = |llc: &&Domain| choice.cpus.is_subset(&llc.cpus);
                assert_eq!(
                    topology.domains(Kind::Llc).iter().filter(is_in).count(),
                    1,
                    "{told}"
                );
            }
            assert!(fits > 0, "{name}");
        }
    }

    #[test]
    fn the_other_keys_are_shown_with_their_defaults() {
        let (_dir, root) = host("5900x", &[(100, "cores: 12\n")]);
        let as_written = init(&root, 100, None).unwrap();
        let path = settings::node_file(&root, as_vmid(100));
        let text = std::fs::read_to_string(path).unwrap();
        let set: Vec<&str> = text
            .lines()
            .map(|line| line.strip_prefix('#').unwrap_or(line))
            .collect();
        let set: String = set
            .iter()
            .filter(|line| !line.starts_with(' '))
            .map(|line| format!("{line}\n"))
            .collect();
        let mut all_set = settings::resolve(&root, &set, &as_written.source, 1).unwrap();
        assert_eq!((all_set.idle_vm, as_written.idle_vm), (Some(107), None));
        let housekeeping = Some("0-5,12-17".parse().unwrap());
        assert_eq!(
            (&all_set.emulator, &all_set.iothreads),
            (&housekeeping, &housekeeping)
        );
        (all_set.idle_vm, all_set.emulator, all_set.iothreads) = (None, None, None);
        assert_eq!(all_set, as_written);
        for key in settings::known_keys() {
            let is_told = set.lines().any(|line| {
                line.starts_with(&format!("{key} =")) || line.starts_with(&format!("[{key}]"))
            });
            assert!(is_told || key == "layout", "{key} is not in the file");
        }
    }

    fn as_vmid(id: u32) -> VmId {
        id.try_into().unwrap()
    }

    #[test]
    fn cpus_of_other_vms_are_avoided() {
        let vms = [
            (100, "cores: 4\n"),
            (101, "cores: 12\n"),
            (102, "cores: 5\n"),
            (103, "cores: 12\n"),
        ];
        let (dir, root) = host("5900x", &vms);
        assert_eq!(
            init(&root, 100, None).unwrap().isolated.to_string(),
            "8-11,20-23"
        );
        assert_eq!(
            init(&root, 102, None).unwrap().isolated.to_string(),
            "1-5,13-17",
            "a part of llc:1 is taken"
        );
        // There is no room but beside others.
        let settings = init(&root, 101, None).unwrap();
        assert_eq!(settings.isolated.to_string(), "6-11,18-23");
        let text = std::fs::read_to_string(&settings.source).unwrap();
        assert!(
            text.contains(
                "# CPU 8-11,20-23 belongs to VM 100: only one of the two VMs can run at a time.\n"
            ),
            "{text}"
        );
        // One with hook and no file has the built-in layout.
        std::fs::remove_dir_all(dir.path().join("etc/pinfold")).unwrap();
        let hook = "cores: 12\nhookscript: local:snippets/hook\n";
        std::fs::write(dir.path().join("etc/pve/qemu-server/103.conf"), hook).unwrap();
        assert_eq!(
            init(&root, 100, None).unwrap().isolated.to_string(),
            "2-5,14-17"
        );
    }

    #[test]
    fn no_file_is_overwritten() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, root) = host("5900x", &[(100, "cores: 12\n")]);
        for own in ["etc/pve/pinfold/100.toml", "etc/pinfold/100.toml"] {
            let path = dir.path().join(own);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "mine").unwrap();
            let error = init(&root, 100, None).unwrap_err();
            assert!(
                error.starts_with(&format!(
                    "{}: VM 100 has these settings already",
                    path.display()
                )),
                "{error}"
            );
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
            std::fs::remove_file(&path).unwrap();
        }
        // A link that leads nowhere would be written through.
        let path = dir.path().join("etc/pinfold/100.toml");
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(
            init(&root, 100, None).is_err() && !dir.path().join("etc/pinfold/elsewhere").exists()
        );
        std::fs::remove_file(&path).unwrap();
        // What is for all VMs is no VM's own.
        std::fs::write(
            dir.path().join("etc/pinfold/default.toml"),
            "layout = \"5900x\"",
        )
        .unwrap();
        init(&root, 100, None).unwrap();
        assert_eq!(
            path.metadata().unwrap().permissions().mode() & 0o7133,
            0,
            "0644, or less where the umask says so"
        );
    }

    #[test]
    fn cpus_by_name() {
        let vms = [
            (100, "cores: 4\n"),
            (101, "cores: 4\n"),
            (102, "cores: 2\n"),
        ];
        let (_dir, root) = host("7950x3d", &vms);
        let settings = init(&root, 100, Some("vcache,!core:0")).unwrap();
        assert_eq!(settings.isolated.to_string(), "1-7,17-23");
        let text = std::fs::read_to_string(&settings.source).unwrap();
        assert!(
            text.contains("# vcache,!core:0 is CPU 1-7,17-23.\nisolated = \"vcache,!core:0\"\n"),
            "{text}"
        );
        for (cpus, why) in [
            ("vcache", "CPU 0-7,16-23: CPU 0 cannot be isolated"),
            ("8-10", "CPU 8-10: 3 CPUs are too few for the VM's 4 vCPUs"),
            ("llc:2", "llc:2: no such LLC domain"),
            ("40-47", "CPU 40-47: no such CPU"),
        ] {
            let error = init(&root, 101, Some(cpus)).unwrap_err();
            assert!(error.starts_with(why), "{cpus}: {error}");
        }
        assert!(
            !settings::node_file(&root, as_vmid(101)).exists(),
            "nothing is written where it fails"
        );
    }
}

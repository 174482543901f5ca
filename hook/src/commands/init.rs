//! `hook init`: chooses CPUs for a VM on this host and writes its settings.

use std::path::PathBuf;

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{coloured, print, print_json};
use pinfold_core::sys::cpu;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{CpuSet, Error, Exit, Host, Report, Result, Selector, printable};
use serde_json::json;

use super::machine::{self, Machine};
use super::{check, drawing, needs_root};
use crate::checks::qm_set::QmSet;
use crate::checks::vm_settings::Vm;
use crate::checks::{memory, required, vm_settings};
use crate::choice::{
    self, Areas, Choice, Claim, Claimed, Guest, NoRoom, Question, VcacheRoom, WITH_CPU_0,
};
use crate::claims;
use crate::own_steps::{self, TOOL};
use crate::settings::{self, Deadlines, Loaded, Method, Settings, default};

/// The options of `hook init`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    pub vmid: VmId,
    /// The CPUs to isolate, by logical number or selector, as in 6-11,18-23 or llc:1 [default:
    /// cores of one LLC domain, or of neighbouring ones]
    #[arg(long, conflicts_with = "vcache")]
    pub cpus: Option<Selector>,
    /// Choose among the LLC domains with 3D V-Cache
    #[arg(long)]
    pub vcache: bool,
    /// Print the settings and write nothing
    #[arg(long)]
    pub print: bool,
    /// Print which CPUs are chosen, and why, and write nothing
    #[arg(long, conflicts_with = "print")]
    pub explain: bool,
    /// Draw the CPUs chosen on the map of `hook layout --map`, and write nothing
    #[arg(long, conflicts_with = "print")]
    pub map: bool,
    /// Adapt the VM to its CPUs with `qm set`, after printing the command: the number of vCPUs if
    /// they do not have a core each, and the memory's node and huge pages. The VM must be stopped.
    /// Existing settings of hook are not changed
    #[arg(long, conflicts_with_all = ["print", "explain", "map"])]
    pub apply: bool,
    /// Print what would be written and, with --apply, set; change nothing
    #[arg(short = 'n', long, conflicts_with_all = ["print", "explain", "map"])]
    pub dry_run: bool,
    /// Print nothing of what `hook install` does next.
    #[arg(skip)]
    pub by_install: bool,
}

impl Args {
    /// To choose CPUs for a VM and write its settings.
    fn for_vm(vmid: VmId) -> Self {
        Self {
            vmid,
            cpus: None,
            vcache: false,
            print: false,
            explain: false,
            map: false,
            apply: false,
            dry_run: false,
            by_install: false,
        }
    }

    /// The same as a step of `hook install`, or only what it would choose.
    pub(super) fn by_install(vmid: VmId, dry_run: bool) -> Self {
        Self {
            dry_run,
            by_install: true,
            ..Self::for_vm(vmid)
        }
    }
}

/// The chosen CPUs with how they are written.
#[derive(Debug)]
struct Chosen {
    choice: Choice,
    /// As written to the file.
    isolated: String,
    /// What was done to the CPUs that were asked for.
    remarks: Vec<String>,
}

/// The command's whole run.
///
/// # Errors
/// If there is no such VM, the host has no room for it, other CPUs are asked for than its settings
/// have, or these cannot be written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let (root, report) = (&output.root(), &mut output.report(TOOL));
    let vmid = args.vmid;
    let mut conf = vm::conf(root, vmid)?;
    let writes = !args.print && !args.explain && !args.map && !args.dry_run;
    let mut kept = None;
    // Once chosen, CPUs stay, so that it can be run again.
    if (writes || args.dry_run) && args.cpus.is_none() && !args.vcache {
        kept = kept_settings(root, vmid, &conf)?;
    }
    if writes {
        needs_root(root, args.dry_run)?;
    }
    if (writes || args.dry_run) && kept.is_none() {
        settings::no_own_file(root, vmid)?;
    }
    let place = Place::of(args, kept.as_ref());
    let topology = Topology::read(root)?;
    let (claims, notes) = claims::of_others(root, vmid);
    notes.iter().for_each(|note| report.note(note));
    let (areas, claimed) = (Areas::new(&topology), Claimed::by(&claims));
    let choose_anew = anew(root, vmid, &place, (&topology, &areas), (&claims, &claimed));
    let mut command = None;
    if args.apply {
        let (set, expected) = best(root, vmid, &topology, &conf, &choose_anew)?;
        conf = expected;
        if let Some(settings) = &kept {
            let vcpus = conf.vcpus().max(conf.max_vcpus()) as usize;
            required::pins_suffice(settings, vcpus, vcpus.checked_sub(1))?;
        }
        if set.is_empty() {
            report.line(&format!("--apply has nothing to set on VM {vmid}"));
        } else {
            let line = set.command(vmid);
            let doing = if writes { "running" } else { "would run" };
            report.line(&printable(&format!("{doing}: {line}")));
            command = Some(line);
        }
        if writes {
            conf = apply(root, &set, &conf, vmid)?;
        }
    }
    let guest = guest(root, report, vmid, &conf);
    let question = Question {
        topology: &topology,
        areas: &areas,
        guest: &guest,
        claimed: &claimed,
        within: None,
    };
    let mut chosen = choose(root, vmid, &place, &conf, &question, &claims)?;
    let isolated = &chosen.choice.isolated;
    let is_short = memory::too_small_nodes(root, &topology, &conf, isolated);
    chosen.remarks.extend(is_short);
    let Chosen {
        choice, remarks, ..
    } = &chosen;
    let shared = choice.reasons.iter().filter(|reason| {
        matches!(reason, choice::Reason::Shared(_)) || matches!(reason, choice::Reason::HasCpu0)
    });
    for note in remarks
        .iter()
        .cloned()
        .chain(shared.map(ToString::to_string))
    {
        report.note(note.trim_end_matches('.'));
    }
    let text = text(vmid, &guest, &chosen, &topology);
    let source = settings::node_file(root, vmid).display().to_string();
    let settings = settings::resolve(root, &text, &source, guest.threads)?;
    if kept.is_none() {
        required::pins_suffice(&settings, guest.vcpus, guest.vcpus.checked_sub(1))?;
    }
    let new_file = (kept.is_none() && writes).then(|| settings::node_file(root, vmid));
    let again = new_file.map(|file| {
        let option = if args.vcache { " --vcache" } else { "" };
        format!("rm {} && hook init {vmid}{option}", file.display())
    });
    let advice = vm_settings::advice(
        &Vm {
            root,
            vmid,
            text: &root.read(vm::conf_file(vmid))?,
            conf: &conf,
            topology: &topology,
            guest: &guest,
            choice,
            choose: &|conf| choose_anew(conf).ok(),
        },
        again.as_deref(),
    );
    let path = match (&kept, writes) {
        (Some(settings), true) => Some(PathBuf::from(&settings.source)),
        (None, true) => Some(settings::create(root, vmid, &text)?),
        (_, false) => None,
    };
    let changed = writes && (kept.is_none() || command.is_some());
    let findings = match &path {
        Some(_) => check::faults(root, vmid),
        None => Vec::new(),
    };
    if output.json {
        let passed_over: Vec<_> = choice
            .passed_over
            .iter()
            .map(|one| {
                json!({
                    "llc": one.llc, "cpus": one.cpus, "free_cores": one.free_cores,
                    "why": one.verdict.to_string(),
                })
            })
            .collect();
        let mut json = json!({
            "isolated": choice.isolated, "cpus": choice.isolated, "as_written": chosen.isolated, "pins": choice.pins,
            "why": why(&chosen), "passed_over": passed_over, "advice": advice, "changed": changed,
        });
        if let Some(command) = &command {
            json["command"] = json!(command);
        }
        if let Some(path) = &path {
            json["path"] = json!(path);
            json["findings"] = check::keyed(&findings);
        }
        print_json(&json)?;
        return Ok(Exit::Success);
    }
    if args.print {
        print(&text)?;
        return Ok(Exit::Success);
    }
    let pins: Vec<String> = choice.pins.iter().map(ToString::to_string).collect();
    match (&kept, &path) {
        (Some(settings), _) => report.line(&format!(
            "VM {vmid} has {} from {}, which is not changed",
            in_words(&chosen),
            settings.source
        )),
        (None, Some(path)) => report.line(&format!(
            "wrote {}: VM {vmid} gets {}",
            path.display(),
            in_words(&chosen)
        )),
        (None, None) => report.line(&format!("VM {vmid} would get {}", in_words(&chosen))),
    }
    if kept.is_none() {
        report.line(&format!(
            "its {} {} pinned to {}",
            choice::counted(guest.vcpus, "vCPU"),
            if guest.vcpus == 1 { "is" } else { "are" },
            pins.join(",")
        ));
        report.line(&format!(
            "the host and other guests keep CPU {}",
            &topology.online - &choice.isolated
        ));
    }
    if args.explain {
        for line in why(&chosen).into_iter().chain(considered(choice)) {
            report.line(&line);
        }
    }
    if args.map {
        let machine = Machine::read(root, &topology)?;
        let devices = pci_reset::passed_through(root, vmid, &conf);
        let drawn = machine::Chosen {
            vmid,
            choice,
            devices: &devices.map(|found| found.functions).unwrap_or_default(),
            memory: guest.memory_nodes(),
        };
        let map = machine.draw(&claims, Some(&drawn), drawing::columns());
        report.drawing(&coloured(&map));
    }
    for one in &advice {
        report.line(&printable(&format!("advice: {one}")));
    }
    if path.is_none() || args.by_install {
        return Ok(report.finish());
    }
    match &conf.hookscript {
        None => report.line(&format!("next: hook install {vmid}")),
        Some(volume) => report.line(&format!("its hookscript is {volume}")),
    }
    for finding in &findings {
        // This is what the line above prints.
        if finding.check != "hookscript" || conf.hookscript.is_some() {
            report.line(&printable(&format!(
                "hook check: {}: {finding}",
                finding.check
            )));
        }
    }
    report.line(&format!("changed: {changed}"));
    report.line("once it runs, hook status shows what can still run on its CPUs");
    Ok(report.finish())
}

/// The settings that a VM has already, if there is a file of its own.
///
/// # Errors
/// If they cannot be read, or give it no CPUs.
fn kept_settings(root: &Host, vmid: VmId, conf: &VmConf) -> Result<Option<Settings>> {
    if settings::own_file(root, vmid).is_none() {
        return Ok(None);
    }
    match settings::load(root, vmid, conf.threads_per_core(), &choice::cells(conf))? {
        Loaded::Fenced(settings) => Ok(Some(settings)),
        Loaded::Unfenced { settings, why, .. } => Err(Error::unusable(settings.source, why)),
    }
}

/// Where CPUs are looked for.
enum Place<'a> {
    /// On the whole host.
    Host,
    /// In the LLC domains with 3D V-Cache.
    Vcache,
    /// These CPUs.
    Given(&'a Selector),
    /// The CPUs of the VM's settings.
    Kept(&'a CpuSet),
}

impl<'a> Place<'a> {
    fn of(args: &'a Args, kept: Option<&'a Settings>) -> Self {
        match (&args.cpus, kept) {
            (Some(cpus), _) => Self::Given(cpus),
            (None, _) if args.vcache => Self::Vcache,
            (None, Some(settings)) => Self::Kept(&settings.isolated),
            (None, None) => Self::Host,
        }
    }
}

/// What `qm set` is to change, so that the VM suits its CPUs best, and the VM's settings after it.
///
/// # Errors
/// If the VM runs, or has no room.
fn best(
    root: &Host,
    vmid: VmId,
    topology: &Topology,
    conf: &VmConf,
    choose: &dyn Fn(&VmConf) -> Result<(Guest, Choice)>,
) -> Result<(QmSet, VmConf)> {
    if vm::find(root, vmid)?.is_some() {
        let why = "it is running, and changes apply only after it has stopped; stop it first";
        return Err(Error::unusable(format!("VM {vmid}"), why));
    }
    let text = root.read(vm::conf_file(vmid))?;
    let (guest, choice) = choose(conf)?;
    let size = vm_settings::best_size(&Vm {
        root,
        vmid,
        text: &text,
        conf,
        topology,
        guest: &guest,
        choice: &choice,
        choose: &|conf| choose(conf).ok(),
    });
    let (size, resized, guest, choice) = match size {
        Some(changed) => (changed.set, changed.conf, changed.guest, changed.choice),
        None => (QmSet::default(), conf.clone(), guest, choice),
    };
    let memory = vm_settings::memory(root, topology, &resized, &guest, &choice);
    let set = size.and(memory.set);
    let expected = VmConf::parse(&set.applied_to(&text));
    Ok((set, expected))
}

/// Chooses CPUs for other settings of a VM.
fn anew<'a>(
    root: &'a Host,
    vmid: VmId,
    place: &'a Place<'a>,
    (topology, areas): (&'a Topology, &'a Areas),
    (claims, claimed): (&'a [Claim], &'a Claimed),
) -> impl Fn(&VmConf) -> Result<(Guest, Choice)> + 'a {
    move |conf| {
        let device_nodes = vm_settings::device_nodes(root, vmid, conf).unwrap_or_default();
        let guest = Guest::new(conf, device_nodes);
        let question = Question {
            topology,
            areas,
            guest: &guest,
            claimed,
            within: None,
        };
        let chosen = choose(root, vmid, place, conf, &question, claims)?;
        Ok((guest, chosen.choice))
    }
}

/// Runs `qm set` and reads the VM's settings again.
///
/// # Errors
/// If `qm` fails, or the VM's settings are not as expected after it.
fn apply(root: &Host, set: &QmSet, expected: &VmConf, vmid: VmId) -> Result<VmConf> {
    if !set.is_empty() {
        own_steps::set_on_vm(root, &set.words(vmid))?;
    }
    let conf = vm::conf(root, vmid)?;
    let size = |conf: &VmConf| (conf.vcpus(), conf.threads_per_core(), choice::cells(conf));
    match size(&conf) == size(expected) {
        true => Ok(conf),
        false => Err(Error::unusable(
            format!("VM {vmid}"),
            "qm set did not change its settings as expected; see `qm config`",
        )),
    }
}

fn guest(root: &Host, report: &mut Report, vmid: VmId, conf: &VmConf) -> Guest {
    let device_nodes = vm_settings::device_nodes(root, vmid, conf).unwrap_or_else(|error| {
        report.note(&format!(
            "the NUMA nodes of the VM's devices are unknown: {error}"
        ));
        CpuSet::new()
    });
    Guest::new(conf, device_nodes)
}

fn in_words(chosen: &Chosen) -> String {
    let cpus = chosen.choice.isolated.to_string();
    if chosen.isolated == cpus {
        format!("CPU {cpus}")
    } else {
        format!("{}, CPU {cpus}", chosen.isolated)
    }
}

fn choose(
    root: &Host,
    vmid: VmId,
    place: &Place<'_>,
    conf: &VmConf,
    question: &Question<'_>,
    claims: &[Claim],
) -> Result<Chosen> {
    let by_vcache = matches!(place, Place::Vcache);
    let answer = match place {
        Place::Given(expr) => return from_option(root, vmid, conf, expr, question, claims),
        Place::Kept(cpus) => {
            return Ok(Chosen {
                choice: choice::given(question, claims, (*cpus).clone()),
                isolated: cpus.to_string(),
                remarks: Vec::new(),
            });
        }
        Place::Vcache => {
            // Fails with a list of the domains if none has V-Cache.
            let vcache = "vcache".parse::<Selector>();
            let within = match vcache {
                Ok(vcache) => vcache.resolve(root)?,
                Err(error) => return Err(Error::unusable("vcache", error.to_string())),
            };
            let question = Question {
                within: Some(&within),
                ..*question
            };
            choice::choose(&question, claims)
        }
        Place::Host => choice::choose(question, claims),
    };
    let choice = answer.map_err(|no_room| {
        if !by_vcache {
            return refused(vmid, conf, &no_room, "this host", "");
        }
        let mut others = String::new();
        if choice::room_by_vcache(question) == VcacheRoom::WithCpu0 {
            others += &with_cpu_0(vmid, WITH_CPU_0);
        }
        if choice::choose(question, claims).is_ok() {
            others += &format!("; or choose on the whole host: hook init {vmid}");
        }
        refused(vmid, conf, &no_room, "the V-Cache of this host", &others)
    })?;
    let isolated = as_written(question.topology, &choice);
    let facts = &choice.facts;
    let lacks_core = by_vcache && facts.beside_host && facts.doubled > 0;
    let remarks = lacks_core.then(|| left_out(question.topology, &question.areas.vcache, "vcache"));
    Ok(Chosen {
        choice,
        isolated,
        remarks: remarks.into_iter().collect(),
    })
}

/// A refusal for lack of CPUs, with a command that makes the VM fit.
fn refused(vmid: VmId, conf: &VmConf, no_room: &NoRoom, place: &str, more: &str) -> Error {
    let NoRoom { usable, vcpus } = no_room;
    let is_host = more.is_empty();
    let threads = conf.threads_per_core().max(1);
    let most = usable.len() / threads * threads;
    let what = format!(
        "{place} has {} for VMs{}, too few for {}",
        choice::counted(usable.len(), "CPU"),
        match usable.is_empty() {
            true => String::new(),
            false if is_host => format!(" (CPU {usable}; the core of CPU 0 stays with the host)"),
            false => format!(" (CPU {usable})"),
        },
        choice::counted(*vcpus, "vCPU"),
    );
    let fix = match vm_settings::resized(conf, most, threads) {
        _ if most == 0 => String::new(),
        Some(set) => format!("; give the VM fewer: {}", set.command(vmid)),
        None => "; give the VM fewer vCPUs".to_owned(),
    };
    Error::unusable(format!("VM {vmid}"), format!("{what}{fix}{more}"))
}

/// Whole LLC domains by their names, if these are certain; else CPUs by number. The CPUs of a
/// selector change when CPUs come online.
fn as_written(topology: &Topology, choice: &Choice) -> String {
    let llcs = topology.domains(Kind::Llc).iter();
    let llcs: Vec<_> = llcs
        .filter(|llc| choice.facts.llcs.contains(llc.number))
        .collect();
    let all: CpuSet = llcs.iter().flat_map(|llc| llc.cpus.iter()).collect();
    let is_sure = llcs.iter().all(|llc| llc.sure) && topology.offline().is_empty();
    match is_sure && all == choice.isolated {
        true => format!("llc:{}", choice.facts.llcs),
        false => choice.isolated.to_string(),
    }
}

/// The CPUs of --cpus. The core of CPU 0 is left out if it was not named by number, or if this host
/// cannot isolate it.
fn from_option(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    expr: &Selector,
    question: &Question<'_>,
    claims: &[Claim],
) -> Result<Chosen> {
    let (topology, guest) = (question.topology, question.guest);
    let asked = expr.resolve(root)?;
    cpu::check_online(root, &asked)?;
    let mut isolated = expr.to_string();
    let mut cpus = asked.clone();
    let mut remarks = Vec::new();
    if asked.contains(cpu::BOOT_CPU) {
        let host_core = host_core(topology);
        let without = &asked - &host_core;
        let list = match isolated.parse::<CpuSet>() {
            Ok(_) => without.to_string(),
            Err(_) => settings::joined(&isolated, "!core:0"),
        };
        let leave_out = match without.is_empty() {
            true => "choose others".to_owned(),
            false => format!("leave its core out: hook init {vmid} --cpus '{list}'"),
        };
        let refused = |why: &str| {
            let why = format!("{why}; {leave_out}");
            Err(Error::unusable(format!("CPU {asked}"), why))
        };
        if expr.names_cpu(cpu::BOOT_CPU) {
            if let Err(error) = required::partition_for(root, vmid, &asked) {
                return refused(&format!(
                    "CPU 0 can be isolated by partition only, and that is unavailable: {error}"
                ));
            }
        } else if without.is_empty() {
            return refused("CPU 0 stays with the host unless the list names it");
        } else {
            remarks.push(left_out(topology, &asked, &isolated));
            (cpus, isolated) = (without, list);
        }
    }
    if topology.online.is_subset(&cpus) {
        let why = format!(
            "these are all CPUs: none is left to the host; choose fewer, or let hook choose: hook init {vmid}"
        );
        return Err(Error::unusable(format!("CPU {asked}"), why));
    }
    if cpus.len() < guest.vcpus {
        let no_room = NoRoom {
            usable: cpus.clone(),
            vcpus: guest.vcpus,
        };
        let mut more = String::new();
        if asked.len() >= guest.vcpus && !topology.online.is_subset(&asked) {
            more += &with_cpu_0(
                vmid,
                &format!("'{}'", settings::joined(&expr.to_string(), "core:0")),
            );
        }
        more += &format!("; or let hook choose: hook init {vmid}");
        return Err(refused(vmid, conf, &no_room, &isolated, &more));
    }
    Ok(Chosen {
        choice: choice::given(question, claims, cpus),
        isolated,
        remarks,
    })
}

/// The core of CPU 0; empty if it is not known.
fn host_core(topology: &Topology) -> CpuSet {
    let core = topology
        .cores
        .iter()
        .find(|core| core.contains(cpu::BOOT_CPU));
    core.cloned().unwrap_or_default()
}

/// How to choose CPUs with the core of CPU 0.
fn with_cpu_0(vmid: VmId, list: &str) -> String {
    format!("; or with the core of CPU 0, by partition: hook init {vmid} --cpus {list}")
}

/// That the core of CPU 0 is in a list, but not among the CPUs chosen.
fn left_out(topology: &Topology, asked: &CpuSet, list: &str) -> String {
    let core = host_core(topology);
    let stays = format!("CPU {core}, the core of CPU 0, is left out: it stays with the host");
    if topology.online.is_subset(&(asked | &core)) {
        return stays;
    }
    let list = settings::joined(list, "core:0");
    format!("{stays}; --cpus '{list}' includes it, by partition")
}

/// The reasons as lines.
fn why(chosen: &Chosen) -> Vec<String> {
    let Chosen {
        choice,
        isolated,
        remarks,
    } = chosen;
    let mut lines: Vec<String> = Vec::new();
    let llcs = format!("llc:{}", choice.facts.llcs);
    // The first reason lists the CPUs of the LLC domains.
    if *isolated != choice.isolated.to_string() && *isolated != llcs {
        lines.push(format!("{isolated} is CPU {}.", choice.isolated));
    }
    lines.extend(remarks.iter().map(|remark| format!("{remark}.")));
    lines.extend(choice.reasons.iter().map(ToString::to_string));
    lines
}

/// What was passed over, as lines.
fn considered(choice: &Choice) -> Vec<String> {
    let mut lines = Vec::new();
    for line in choice::listed(&choice.passed_over) {
        if lines.is_empty() {
            lines.push("Also considered:".to_owned());
        }
        lines.push(format!("  {line}"));
    }
    lines
}

/// The text of the settings file.
fn text(vmid: VmId, guest: &Guest, chosen: &Chosen, topology: &Topology) -> String {
    let cores = match guest.threads {
        1 => String::new(),
        threads => format!(", {threads} threads per core"),
    };
    let mut text = format!(
        "# VM {vmid} on this host, by `hook init`: {}{cores}.\n",
        choice::counted(guest.vcpus, "vCPU")
    );
    for line in why(chosen).into_iter().chain(considered(&chosen.choice)) {
        text += &format!("# {line}\n");
    }
    text += &format!("isolated = \"{}\"\n\n", chosen.isolated);
    text += "# hook orders the pins by the guest's cores; pin-vcpu --list shows them while the VM runs.\n";
    text += "pins = \"auto\"\n\n";
    if chosen.choice.facts.has_cpu_0 {
        text += "# CPU 0 cannot be isolated by hotplug.\n";
        text += &format!("method = {}\n\n", json!(Method::Partition));
    } else {
        text +=
            "# partition if this host supports it, else hotplug; man pinfold.toml compares them.\n";
        text += &format!("method = {}\n\n", json!(default::METHOD));
    }
    text += "# The other keys with their defaults; man pinfold.toml explains them.\n";
    let housekeeping = &topology.online - &chosen.choice.isolated;
    let near = &housekeeping & &choice::cpus_of_nodes(topology, &chosen.choice.facts.nodes);
    let (cpus, what) = match near == housekeeping || near.is_empty() {
        true => (&housekeeping, "all housekeeping CPUs"),
        false => (&near, "the housekeeping CPUs of its NUMA nodes"),
    };
    let one_line = |key: &str| format!("{:30}", format!("{key} = \"{cpus}\""));
    let emulator = one_line("#emulator");
    text += &format!("{emulator} # {what}\n");
    let iothreads = one_line("#iothreads");
    text += &format!("{iothreads} # like the emulator; or {{ iothread-virtioscsi0 = \"0\" }}\n");
    text + &other_keys()
}

/// The keys that are not chosen here, with their defaults.
fn other_keys() -> String {
    let key = |name: &str, value: serde_json::Value, what: &str| {
        format!("{:30} # {what}\n", format!("#{name} = {value}"))
    };
    let deadlines = Deadlines::default();
    [
        key(
            "required",
            json!(default::REQUIRED),
            "false: the VM starts without isolated CPUs if it cannot have them",
        ),
        key("governor", json!(default::GOVERNOR), "or \"keep\""),
        key(
            "energy_preference",
            json!("balance_performance"),
            "the energy_performance_preference of the VM's CPUs; default: the governor's",
        ),
        key(
            "max_latency_us",
            json!(20),
            "the longest that the VM's CPUs may take to wake up, in microseconds; default: any",
        ),
        key(
            "halt_poll_ns",
            json!(400_000),
            "for how long KVM polls before a halted vCPU gives its CPU away; for all VMs; default: unchanged",
        ),
        key(
            "vcpu_policy",
            json!("fifo:1"),
            "a real-time policy for the vCPUs, which starves what must run on their CPUs; default: none",
        ),
        key(
            "housekeeping_governor",
            json!("powersave"),
            "the governor of the other CPUs while the VM runs; default: unchanged",
        ),
        key(
            "housekeeping_energy_preference",
            json!("power"),
            "their energy_performance_preference; default: unchanged",
        ),
        key(
            "stat_interval",
            json!(default::STAT_INTERVAL),
            "vm.stat_interval in seconds",
        ),
        key(
            "idle_vm",
            json!(107),
            "a VM to stop before this one starts and to start after it stops; default: none",
        ),
        key(
            "reset_pci",
            json!(default::RESET_PCI),
            "true: reset the VM's hostpci devices before it starts; or a list of PCI addresses",
        ),
        key(
            "tidy_caches",
            json!(true),
            "compact memory and drop caches before the start; default: if its huge pages need it",
        ),
        key(
            "min_housekeeping",
            json!(default::MIN_HOUSEKEEPING),
            "how many CPUs must remain for the host",
        ),
        key(
            "chain",
            json!([]),
            "other hookscripts to run too, as in [\"local:snippets/old.pl\"]",
        ),
        key(
            "ignore",
            json!([]),
            "warnings of hook check to mute, by their keys, as in [\"smt\"]",
        ),
        format!("\n{:30} # the longest waits, in seconds\n", "#[deadlines]"),
        key("lock", json!(deadlines.lock), "for another hook to end"),
        key(
            "systemd",
            json!(deadlines.systemd),
            "for one call to systemd",
        ),
        key(
            "reload",
            json!(deadlines.reload),
            "for systemd to read all units again",
        ),
        key("qmp", json!(deadlines.qmp), "for QEMU's monitor"),
        key(
            "pci",
            json!(deadlines.pci),
            "for PCI functions to disappear, and to reappear",
        ),
        key(
            "caches",
            json!(deadlines.caches),
            "for memory to be compacted and caches to be dropped",
        ),
        key(
            "idle_vm",
            json!(deadlines.idle_vm),
            "for the idle VM to shut down, or to start",
        ),
        key(
            "qemu_exit",
            json!(deadlines.qemu_exit),
            "for QEMU to exit in post-stop",
        ),
        key(
            "chain",
            json!(deadlines.chain),
            "for each hookscript of chain to end",
        ),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::quiet;
    use pinfold_core::testutils::{machine, vm_conf};

    /// A captured machine with VMs.
    fn host(name: &str, vms: &[(u32, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&machine::text(name), dir.path());
        for (id, conf) in vms {
            vm_conf(dir.path(), *id, conf);
        }
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn init(root: &Host, id: u32, cpus: Option<&str>) -> std::result::Result<Settings, String> {
        init_with(root, id, cpus, false)
    }

    fn init_with(
        root: &Host,
        id: u32,
        cpus: Option<&str>,
        vcache: bool,
    ) -> std::result::Result<Settings, String> {
        let vmid = VmId::try_from(id).unwrap();
        let args = Args {
            cpus: cpus.map(|text| text.parse().unwrap()),
            vcache,
            ..Args::for_vm(vmid)
        };
        run(&args, &quiet(root)).map_err(|error| error.to_string())?;
        let threads = vm::conf(root, vmid).unwrap().threads_per_core();
        settings::load(root, vmid, threads, &[]).unwrap().fenced()
    }

    /// VMID.conf of a guest with SMT.
    fn smt(vcpus: usize, threads: usize) -> String {
        format!(
            "cores: {vcpus}\nargs: -smp {vcpus},sockets=1,cores={},threads={threads},maxcpus={vcpus}\n",
            vcpus / threads
        )
    }

    /// What an expert would choose, from the field: isolated CPUs and pins.
    /// What is to be set on a VM without others.
    fn best_alone(
        root: &Host,
        vmid: VmId,
        place: &Place<'_>,
        topology: &Topology,
        conf: &VmConf,
    ) -> Result<(QmSet, VmConf)> {
        let (areas, claimed) = (Areas::new(topology), Claimed::default());
        let choose = anew(root, vmid, place, (topology, &areas), (&[], &claimed));
        best(root, vmid, topology, conf, &choose)
    }

    #[test]
    fn cases_from_the_field() {
        let gpu = "file sys/bus/pci/devices/0000:0b:00.0/numa_node 1";
        let bound = "machine: q35\nmemory: 65536\nhostpci0: 0000:0b:00,pcie=1\nnuma: 1\n\
                     numa0: cpus=0-7,hostnodes=1,memory=65536,policy=bind\nhugepages: 1024\n";
        let cells = "sockets: 2\ncores: 8\nmemory: 65536\nnuma: 1\n\
                     numa0: cpus=0-7,hostnodes=0,memory=32768,policy=bind\n\
                     numa1: cpus=8-15,hostnodes=1,memory=32768,policy=bind\n";
        let node_2 = "cores: 8\nmemory: 16384\nnuma: 1\nnuma0: cpus=0-7,hostnodes=2,memory=16384,policy=bind\n";
        for (machine, conf, options, isolated, pins) in [
            (
                "13900k",
                "cores: 16\n".to_owned(),
                "",
                "2-15,30-31",
                "2,4,6,8,10,12,14,3,5,7,9,11,13,15,30,31",
            ),
            (
                "13900k",
                "cores: 8\n".into(),
                "",
                "2-15",
                "2,4,6,8,10,12,14,3",
            ),
            (
                "13900k",
                "cores: 8\n".into(),
                "pcores",
                "2-15",
                "2,4,6,8,10,12,14,3",
            ),
            (
                "9950x3d",
                "cores: 8\n".into(),
                "--vcache",
                "1-7,17-23",
                "1,2,3,4,5,6,7,17",
            ),
            (
                "9950x3d",
                "cores: 8\n".into(),
                "",
                "8-15,24-31",
                "8,9,10,11,12,13,14,15",
            ),
            (
                "3900",
                smt(12, 2),
                "",
                "6-11,18-23",
                "6,18,7,19,8,20,9,21,10,22,11,23",
            ),
            (
                "epyc7343",
                smt(16, 2),
                "",
                "8-15,24-31",
                "8,24,9,25,10,26,11,27,12,28,13,29,14,30,15,31",
            ),
            (
                "3960x",
                smt(16, 2),
                "",
                "9-14,16-17,33-38,40-41",
                "9,33,10,34,11,35,12,36,13,37,14,38,16,40,17,41",
            ),
            (
                "epyc-7451",
                smt(12, 2),
                "",
                "6-11,54-59",
                "6,54,7,55,8,56,9,57,10,58,11,59",
            ),
            (
                "epyc2x7313",
                smt(8, 2) + bound,
                "",
                "16-19,48-51",
                "16,48,17,49,18,50,19,51",
            ),
            (
                "epyc2x7313",
                "cores: 4\nhostpci0: 0000:0b:00\n".into(),
                "",
                "16-19,48-51",
                "16,17,18,19",
            ),
            (
                "epyc2x7313",
                cells.into(),
                "llc:2-3,llc:6-7",
                "8-15,24-31,40-47,56-63",
                "8,9,10,11,12,13,14,15,24,25,26,27,28,29,30,31",
            ),
            // The same without a list: each cell on its node, away from CPU 0.
            (
                "epyc2x7313",
                cells.into(),
                "",
                "8-15,16-23,40-47,48-55",
                "8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
            ),
            (
                "epyc9354nps4",
                node_2.into(),
                "",
                "16-23,48-55",
                "16,17,18,19,20,21,22,23",
            ),
            (
                "xeon-6230-snc2",
                "cores: 4\n".into(),
                "",
                "25,29,33,37,65,69,73,77",
                "25,29,33,37",
            ),
            ("hx370", "cores: 3\n".into(), "", "1-3,13-15", "1,2,3"),
            ("hx370", "cores: 4\n".into(), "", "1-3,13-15", "1,2,3,13"),
            (
                "dgx-gb10",
                "cores: 8\n".into(),
                "",
                "7-9,15-19",
                "7,8,9,15,16,17,18,19",
            ),
            (
                "alderlake-no-pmu",
                "cores: 4\n".into(),
                "",
                "4-11",
                "4,6,8,10",
            ),
            (
                "7800x3d",
                "cores: 4\n".into(),
                "--vcache",
                "4-7,12-15",
                "4,5,6,7",
            ),
            (
                "265k-interleaved",
                "cores: 6\n".into(),
                "",
                "6-9,18-19",
                "6,7,8,9,18,19",
            ),
            // Others of the same kinds.
            (
                "epyc2x7313",
                "cores: 4\n".into(),
                "",
                "4-7,36-39",
                "4,5,6,7",
            ),
            (
                "hx370",
                "cores: 8\n".into(),
                "",
                "1-3,10-11,13-15,22-23",
                "1,2,3,13,14,15,10,11",
            ),
            (
                "dellx",
                "cores: 4\n".into(),
                "",
                "5,7,9,11,17,19,21,23",
                "5,7,9,11",
            ),
            ("285k", smt(8, 2), "", "1-7,23", "1,2,3,4,5,6,7,23"),
        ] {
            let (dir, root) = host(machine, &[(100, &conf)]);
            let device = dir.path().join("sys/bus/pci/devices/0000:0b:00.0");
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("numa_node"), gpu.rsplit(' ').next().unwrap()).unwrap();
            let vcache = options == "--vcache";
            let cpus = Some(options).filter(|options| !options.is_empty() && !vcache);
            let settings = init_with(&root, 100, cpus, vcache).unwrap();
            let shown: Vec<String> = settings
                .pins
                .iter()
                .take(vm::conf(&root, as_vmid(100)).unwrap().vcpus() as usize)
                .map(ToString::to_string)
                .collect();
            let right: CpuSet = isolated.parse().unwrap();
            assert_eq!(
                (settings.isolated, shown.join(",").as_str()),
                (right, pins),
                "{machine}: {conf:?} {options}"
            );
        }
    }

    #[test]
    fn text_of_the_settings_file() {
        for (machine, conf, sentences) in [
            (
                "13900k",
                "cores: 16\n",
                &[
                    "7 of the 9 cores run several vCPUs, by second threads",
                    "vCPUs 14-15 are on small cores (E cores), CPU 30-31",
                ][..],
            ),
            (
                "9950x3d",
                "cores: 8\n",
                &["llc:0 (CPU 0-7,16-23) has 3D V-Cache, L3 96M; --vcache chooses there."],
            ),
            (
                "9950x3d",
                "cores: 15\n",
                &[
                    "llc:0-1 is CPU 0-31. The VM gets a part of it: 15 cores.",
                    "Their caches differ: llc:0 L3 96M, V-Cache; llc:1 L3 32M.",
                ],
            ),
            (
                "3960x",
                "cores: 3\n",
                &["llc:1 is CPU 3-5,27-29, L3 16M. The VM gets all of it: 3 cores."],
            ),
            (
                "big-little",
                "cores: 4\n",
                &["CPU 0, which stays with the host, is in it too.\n"],
            ),
        ] {
            let (_dir, root) = host(machine, &[(100, conf)]);
            init(&root, 100, None).unwrap();
            let text = std::fs::read_to_string(settings::node_file(&root, as_vmid(100))).unwrap();
            for sentence in sentences {
                assert!(text.contains(sentence), "{machine}: {sentence}\n{text}");
            }
        }
        let (_dir, root) = host("hx370", &[(100, "cores: 4\n")]);
        init(&root, 100, None).unwrap();
        let text = std::fs::read_to_string(settings::node_file(&root, as_vmid(100))).unwrap();
        assert!(!text.contains("V-Cache"), "{text}");
    }

    #[test]
    fn a_refusal_has_a_command_that_works() {
        for (machine, conf, options, command) in [
            ("bare", "cores: 4\n", "", "qm set 100 --cores 3"),
            (
                "5900x",
                &smt(24, 2),
                "",
                "qm set 100 --cores 22 --args '-smp 22,sockets=1,cores=11,threads=2,maxcpus=22'",
            ),
            ("9950x3d", "cores: 16\n", "--vcache", "hook init 100"),
            (
                "13900k",
                "cores: 8\n",
                "0-15",
                "hook init 100 --cpus '2-15'",
            ),
            (
                "13900k",
                "cores: 2\n",
                "core:0",
                "CPU 0 can be isolated by partition only, and that is unavailable",
            ),
            ("13900k", "cores: 1\n", "pcores&0-1&!1", "choose others"),
            (
                "13900k",
                "cores: 8\n",
                "core:0,core:4",
                "hook init 100 --cpus 'core:0,core:4,!core:0'",
            ),
            ("13900k", "cores: 24\n", "pcores", "qm set 100 --cores 14"),
        ] {
            let (_dir, root) = host(machine, &[(100, conf)]);
            let vcache = options == "--vcache";
            let cpus = Some(options).filter(|options| !options.is_empty() && !vcache);
            let error = init_with(&root, 100, cpus, vcache).unwrap_err();
            assert!(error.contains(command), "{machine}: {error}");
        }
    }

    #[test]
    fn the_other_keys_are_shown_with_their_defaults() {
        use pinfold_core::sys::sched::SchedPolicy;
        let (_dir, root) = host("5900x", &[(100, "cores: 6\n")]);
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
        assert_eq!(
            (all_set.tidy_caches.take(), as_written.tidy_caches),
            (Some(true), None)
        );
        assert_eq!(
            (
                all_set.energy_preference.take().as_deref(),
                &as_written.energy_preference
            ),
            (Some("balance_performance"), &None)
        );
        assert_eq!(
            (all_set.max_latency_us.take(), as_written.max_latency_us),
            (Some(20), None)
        );
        assert_eq!(all_set.halt_poll_ns.take(), Some(400_000));
        assert_eq!(all_set.vcpu_policy.take(), Some(SchedPolicy::Fifo(1)));
        assert_eq!(
            (
                all_set.housekeeping_governor.take().as_deref(),
                all_set.housekeeping_energy_preference.take().as_deref()
            ),
            (Some("powersave"), Some("power"))
        );
        assert_eq!(all_set, as_written);
        for key in settings::known_keys() {
            let is_listed = set.lines().any(|line| {
                line.starts_with(&format!("{key} =")) || line.starts_with(&format!("[{key}]"))
            });
            assert!(is_listed || key == "layout", "{key} is not in the file");
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
        vm_conf(dir.path(), 103, hook);
        assert_eq!(
            init(&root, 100, None).unwrap().isolated.to_string(),
            "2-5,14-17"
        );
    }

    /// What --apply sets, and that init and check have nothing to add once it is set.
    #[test]
    fn what_is_applied() {
        const OF_INIT: [&str; 9] = [
            "isolated",
            "pins",
            "SMT",
            "L3",
            "NUMA",
            "vCPUs",
            "guest cores",
            "kinds",
            "hugepages",
        ];
        let bound = "memory: 8192\nnuma: 1\nnuma1: cpus=0-7,hostnodes=0,memory=8192,policy=bind\n";
        for (machine, conf, vcache, pages, command) in [
            ("5900x", "cores: 4\n".to_owned(), false, "", "qm set 100"),
            (
                "9950x3d",
                "cores: 8\n".into(),
                true,
                "",
                "qm set 100 --cores 7",
            ),
            (
                "5900x",
                "cores: 12\n".into(),
                false,
                "",
                "qm set 100 --cores 11",
            ),
            (
                "13900k",
                "cores: 16\nargs: -device ivshmem\nhotplug: disk,cpu\n".into(),
                false,
                "",
                "qm set 100 --cores 14 --args '-device ivshmem -smp 14,sockets=1,cores=7,threads=2,maxcpus=14' \
                 --hotplug disk",
            ),
            (
                "13900k",
                "cores: 8\n".into(),
                false,
                "",
                "qm set 100 --cores 7",
            ),
            (
                "5900x",
                "cores: 4\naffinity: 0-3\n".into(),
                false,
                "",
                "qm set 100 --delete affinity",
            ),
            (
                "5900x",
                "cores: 4\nmemory: 4096\n".into(),
                false,
                "node0/hugepages/hugepages-2048kB/free_hugepages 2048",
                "qm set 100 --numa 1 --hugepages 2",
            ),
            (
                "epyc2x7313",
                "cores: 4\nmemory: 8192\naffinity: 0-3\n".into(),
                false,
                "",
                "qm set 100 --numa 1 --numa0 cpus=0-3,hostnodes=0,memory=8192,policy=bind --delete affinity",
            ),
            (
                "epyc2x7313",
                "cores: 4\nmemory: 8192\nhostpci0: 0000:0b:00\n".into(),
                false,
                "node1/hugepages/hugepages-1048576kB/free_hugepages 8",
                "qm set 100 --numa 1 --numa0 cpus=0-3,hostnodes=1,memory=8192,policy=bind --hugepages 1024",
            ),
            // Too large for a node.
            (
                "epyc2x7313",
                "cores: 40\nmemory: 65536\n".into(),
                false,
                "",
                "qm set 100 --sockets 2 --cores 20 --numa 1 \
                 --numa0 cpus=0-19,hostnodes=0,memory=32768,policy=bind \
                 --numa1 cpus=20-39,hostnodes=1,memory=32768,policy=bind",
            ),
            // The node is smaller than the VM; affinity keeps its memory where it is.
            (
                "epyc2x7313",
                "cores: 4\nmemory: 8192\naffinity: 0-3\n".into(),
                false,
                "node0/meminfo Node 0 MemTotal: 4194304 kB",
                "qm set 100",
            ),
            // Its memory is bound already, for as many vCPUs as there are cores then.
            (
                "epyc2x7313",
                format!("cores: 24\n{}", bound.replace("0-7", "0-23")),
                false,
                "",
                "qm set 100 --cores 15 --numa1 cpus=0-14,hostnodes=0,memory=8192,policy=bind",
            ),
        ] {
            let (dir, root) = host(machine, &[(100, &conf)]);
            let device = dir.path().join("sys/bus/pci/devices/0000:0b:00.0");
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("numa_node"), "1").unwrap();
            for nodes in [0, 1] {
                let node = dir
                    .path()
                    .join(format!("sys/devices/system/node/node{nodes}/hugepages"));
                std::fs::create_dir_all(node.join("hugepages-2048kB")).unwrap();
                std::fs::create_dir_all(node.join("hugepages-1048576kB")).unwrap();
            }
            if let Some((file, text)) = pages.split_once(' ') {
                let nodes = dir.path().join("sys/devices/system/node");
                std::fs::write(nodes.join(file), text).unwrap();
            }
            let args = Args {
                vcache,
                apply: true,
                dry_run: true,
                ..Args::for_vm(as_vmid(100))
            };
            let topology = Topology::read(&root).unwrap();
            let before = vm::conf(&root, args.vmid).unwrap();
            let (set, expected) = best_alone(
                &root,
                args.vmid,
                &Place::of(&args, None),
                &topology,
                &before,
            )
            .unwrap();
            assert_eq!(set.command(args.vmid), command, "{machine}: {conf}");
            // Nothing but qm itself runs below --sysroot.
            run(&args, &quiet(&root)).unwrap();
            assert!(!settings::node_file(&root, args.vmid).exists());

            vm_conf(dir.path(), 100, &set.applied_to(&conf));
            assert_eq!(vm::conf(&root, args.vmid).unwrap(), expected);
            let (again, _) = best_alone(
                &root,
                args.vmid,
                &Place::of(&args, None),
                &topology,
                &expected,
            )
            .unwrap();
            assert!(again.is_empty(), "{machine}: {conf}: again: {again:?}");
            init_with(&root, 100, None, vcache).unwrap();
            for finding in check::faults(&root, args.vmid) {
                assert!(
                    !OF_INIT.contains(&finding.check),
                    "{machine}: {conf}: {finding:?}"
                );
            }
        }
    }

    /// A VM with settings keeps them, and gets what is missing, once.
    #[test]
    fn what_is_applied_beside_settings() {
        for (machine, conf, vcache, command) in [
            ("5900x", "cores: 4\n", false, "qm set 100"),
            ("5900x", "cores: 12\n", false, "qm set 100 --cores 11"),
            ("9950x3d", "cores: 8\n", true, "qm set 100 --cores 7"),
            (
                "epyc2x7313",
                "cores: 4\nmemory: 8192\naffinity: 0-3\n",
                false,
                "qm set 100 --numa 1 --numa0 cpus=0-3,hostnodes=0,memory=8192,policy=bind --delete affinity",
            ),
        ] {
            let (dir, root) = host(machine, &[(100, conf)]);
            init_with(&root, 100, None, vcache).unwrap();
            let file = settings::node_file(&root, as_vmid(100));
            let text = std::fs::read_to_string(&file).unwrap();
            let topology = Topology::read(&root).unwrap();
            let args = Args {
                apply: true,
                dry_run: true,
                ..Args::for_vm(as_vmid(100))
            };
            let set = || {
                let conf = vm::conf(&root, args.vmid).unwrap();
                run(&args, &quiet(&root)).unwrap();
                let kept = kept_settings(&root, args.vmid, &conf).unwrap();
                let place = Place::of(&args, kept.as_ref());
                best_alone(&root, args.vmid, &place, &topology, &conf)
                    .unwrap()
                    .0
            };
            let missing = set();
            assert_eq!(missing.command(args.vmid), command, "{machine}: {conf}");
            vm_conf(dir.path(), 100, &missing.applied_to(conf));
            assert!(set().is_empty(), "{machine}: {conf}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
            // Other CPUs would have to be written to the file.
            let other = Args {
                apply: true,
                cpus: Some("2-3".parse().unwrap()),
                ..Args::for_vm(as_vmid(100))
            };
            let error = run(&other, &quiet(&root)).unwrap_err().to_string();
            assert!(error.contains("has these settings already"), "{error}");
        }
    }

    #[test]
    fn a_vm_that_runs_is_not_set() {
        let host = crate::fixture::MadeUpHost::new("5900x");
        host.vm(100, &[0; 12]);
        let args = Args {
            apply: true,
            ..Args::for_vm(as_vmid(100))
        };
        let error = run(&args, &quiet(&host.root)).unwrap_err().to_string();
        assert!(
            error.contains("it is running, and changes apply"),
            "{error}"
        );
        assert!(!settings::node_file(&host.root, args.vmid).exists());
    }

    #[test]
    fn cpu_0_by_its_name_only() {
        for (cpus, isolated, written) in [
            ("0-7,16-23", "0-7,16-23", "0-7,16-23"),
            ("vcache,core:0", "0-7,16-23", "vcache,core:0"),
            ("vcache", "1-7,17-23", "vcache,!core:0"),
            ("llc:0", "1-7,17-23", "llc:0,!core:0"),
            ("node:0,!llc:1", "1-7,17-23", "(node:0,!llc:1),!core:0"),
            ("--vcache", "1-7,17-23", "1-7,17-23"),
        ] {
            // With --vcache only if the core is missed.
            let cores = if cpus == "--vcache" { 8 } else { 7 };
            let (dir, root) = host("7950x3d", &[(100, &format!("cores: {cores}\n"))]);
            for (file, text) in [
                ("cgroup.controllers", "cpuset"),
                ("cpuset.cpus.isolated", ""),
                ("cgroup.procs", ""),
            ] {
                let cgroups = dir.path().join("sys/fs/cgroup");
                std::fs::create_dir_all(&cgroups).unwrap();
                std::fs::write(cgroups.join(file), text).unwrap();
            }
            let vcache = cpus == "--vcache";
            let settings = init_with(&root, 100, Some(cpus).filter(|_| !vcache), vcache).unwrap();
            assert_eq!(settings.isolated.to_string(), isolated, "{cpus}");
            let text = std::fs::read_to_string(&settings.source).unwrap();
            assert!(
                text.contains(&format!("\nisolated = \"{written}\"\n")),
                "{cpus}: {text}"
            );
            let by_partition = text.contains("\nmethod = \"partition\"\n");
            assert_eq!(
                by_partition,
                settings.isolated.contains(0),
                "{cpus}: {text}"
            );
            let words = text.contains(",core:0' includes it, by partition.");
            assert_eq!(words, !by_partition, "{cpus}: {text}");
            let stays =
                text.contains("# CPU 0 is among them: timekeeping, IRQs that cannot be moved");
            assert_eq!(stays, by_partition, "{cpus}: {text}");
        }
    }

    #[test]
    fn no_file_is_overwritten() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, root) = host("5900x", &[(100, "cores: 12\n")]);
        for own in ["etc/pve/pinfold/100.toml", "etc/pinfold/100.toml"] {
            let path = dir.path().join(own);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "mine").unwrap();
            for (cpus, why) in [
                (Some("6-11,18-23"), "VM 100 has these settings already"),
                (None, ""),
            ] {
                let error = init(&root, 100, cpus).unwrap_err();
                let start = format!("{}: {why}", path.display());
                assert!(error.starts_with(&start), "{error}");
                assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
            }
            std::fs::remove_file(&path).unwrap();
        }
        // A link that leads nowhere would be written through.
        let path = dir.path().join("etc/pinfold/100.toml");
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(
            init(&root, 100, None).is_err() && !dir.path().join("etc/pinfold/elsewhere").exists()
        );
        std::fs::remove_file(&path).unwrap();
        // A file for all VMs is not a VM's own.
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
            text.contains("# vcache,!core:0 is CPU 1-7,17-23.\n")
                && text.contains("\nisolated = \"vcache,!core:0\"\n"),
            "{text}"
        );
        for (cpus, why) in [
            (
                "0-7,16-23",
                "CPU 0-7,16-23: CPU 0 can be isolated by partition only",
            ),
            ("8-10", "VM 101: 8-10 has 3 CPUs for VMs (CPU 8-10"),
            ("llc:2", "llc:2: no such LLC domain"),
            ("40-47", "CPU 40-47: no such CPU"),
        ] {
            let error = init(&root, 101, Some(cpus)).unwrap_err();
            assert!(error.starts_with(why), "{cpus}: {error}");
        }
        assert!(
            !settings::node_file(&root, as_vmid(101)).exists(),
            "nothing is written if it fails"
        );
    }
}

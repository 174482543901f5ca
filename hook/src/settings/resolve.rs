//! From the text of a settings file to the settings of a VM on this host.

use std::collections::BTreeMap;
use std::time::Duration;

use pinfold_core::selector::Resolver;
use pinfold_core::sys::cpu;
use pinfold_core::sys::sched::SchedPolicy;
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Error, Host, Result, Selector, nearest};

use super::deadlines::Deadlines;
use super::file::{find, node_file};
use super::pins::{Pins, cpus};
use super::schema::{
    BUILT_IN, DEFAULT_LAYOUT, File, Iothreads, KEEP, ResetPci, Settings, default, layout,
};
use crate::choice::{self, Cell};

/// A VM's settings on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// It has these CPUs.
    Fenced(Settings),
    /// It starts without isolated CPUs, since `required = false` allows it.
    Unfenced {
        /// The settings, without CPUs.
        settings: Settings,
        /// Why it has none.
        why: String,
        /// Whether its settings give it some.
        is_lack: bool,
    },
}

impl Loaded {
    /// The settings with CPUs.
    ///
    /// # Errors
    /// Why there are none.
    #[cfg(test)]
    pub(crate) fn fenced(self) -> std::result::Result<Settings, String> {
        match self {
            Self::Fenced(settings) => Ok(settings),
            Self::Unfenced { why, .. } => Err(why),
        }
    }
}

/// Finds and resolves a VM's settings; `threads_per_core` is of its guest, which has the NUMA
/// `cells`, for pins whose order is left to hook.
///
/// # Errors
/// If there are none, or if a file is not root's alone, cannot be parsed, or asks for what this
/// host does not have and does not have `required = false`.
pub(crate) fn load(
    root: &Host,
    vmid: VmId,
    threads_per_core: usize,
    cells: &[Cell],
) -> Result<Loaded> {
    load_on(root, &Resolver::new(root), vmid, threads_per_core, cells)
}

/// As [`load`], for several VMs of a host, whose topology is read once.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_on(
    root: &Host,
    host: &Resolver<'_>,
    vmid: VmId,
    threads_per_core: usize,
    cells: &[Cell],
) -> Result<Loaded> {
    let fenced = |file: File, path: &str| {
        let mut settings = resolve_file(root, host, file, path, threads_per_core)?;
        settings.fit_cells(host, cells)?;
        // Without them emulator threads have all housekeeping CPUs, which is no reason to stop a
        // start.
        settings.near = host.near(&settings.isolated).unwrap_or_default();
        Ok(Loaded::Fenced(settings))
    };
    if let Some((path, text)) = find(root, vmid)? {
        let file = parse(&text, &path)?;
        if file.required != Some(false) {
            return fenced(file, &path);
        }
        let is_lack = file.has_cpus();
        let why = if is_lack {
            match fenced(file.clone(), &path) {
                Ok(loaded) => return Ok(loaded),
                Err(error) => error.to_string(),
            }
        } else {
            format!("{path} has required = false and no CPUs; `hook init {vmid}` chooses some")
        };
        let without_cpus = File {
            layout: None,
            isolated: None,
            pins: None,
            emulator: None,
            iothreads: None,
            energy_preference: None,
            max_latency_us: None,
            halt_poll_ns: None,
            vcpu_policy: None,
            housekeeping_governor: None,
            housekeeping_energy_preference: None,
            stat_interval: None,
            ..file
        };
        let settings = resolve_file(root, host, without_cpus, &path, threads_per_core)?;
        return Ok(Loaded::Unfenced {
            settings,
            why,
            is_lack,
        });
    }
    built_in(root, host, threads_per_core)
        .map(Loaded::Fenced)
        .map_err(|why| {
            let advice = format!(
                "write settings with `hook init {vmid}`; or let it start without isolated CPUs by \
                 required = false in {} or default.toml",
                node_file(root, vmid).display()
            );
            Error::unusable(format!("VM {vmid} has no settings file, and {why}"), advice)
        })
}

/// The settings of a VM without a file, or why there are none on this host.
fn built_in(
    root: &Host,
    host: &Resolver<'_>,
    threads_per_core: usize,
) -> std::result::Result<Settings, String> {
    let source = format!("{BUILT_IN} {DEFAULT_LAYOUT}");
    let misfit = layout(DEFAULT_LAYOUT)?.misfit(root, host);
    if let Some(why) = misfit.map_err(|error| error.to_string())? {
        return Err(format!("{source} is for {why}"));
    }
    // The documented order.
    let text = format!("layout = \"{DEFAULT_LAYOUT}\"\nmethod = \"hotplug\"");
    resolve(root, &text, &source, threads_per_core).map_err(|error| error.to_string())
}

/// A VM's deadlines, without a look at the host. Settings with an error have the default ones:
/// [`load`] reports the error.
pub(crate) fn deadlines(root: &Host, vmid: VmId) -> Deadlines {
    let file = find(root, vmid)
        .ok()
        .flatten()
        .and_then(|(_, text)| toml::from_str::<File>(&text).ok());
    file.map(|file| file.deadlines).unwrap_or_default()
}

/// The other hookscripts of a VM, as volumes, and how long each may take, by its settings file.
/// None if that has an error: [`load`] reports it.
pub(crate) fn chain(root: &Host, vmid: VmId) -> (Vec<String>, Duration) {
    let file = find(root, vmid)
        .ok()
        .flatten()
        .and_then(|(_, text)| toml::from_str::<File>(&text).ok())
        .unwrap_or_default();
    (file.chain, Duration::from_secs(file.deadlines.chain))
}

/// As [`chain`], for a step that depends on it.
///
/// # Errors
/// If the settings file cannot be read.
pub(crate) fn chain_of(root: &Host, vmid: VmId) -> Result<Vec<String>> {
    match find(root, vmid)? {
        Some((path, text)) => Ok(parse(&text, &path)?.chain),
        None => Ok(Vec::new()),
    }
}

/// Resolves the text of a settings file, for a guest with so many threads per core.
pub(crate) fn resolve(
    root: &Host,
    text: &str,
    source: &str,
    threads_per_core: usize,
) -> Result<Settings> {
    let host = Resolver::new(root);
    resolve_file(root, &host, parse(text, source)?, source, threads_per_core)
}

fn parse(text: &str, source: &str) -> Result<File> {
    toml::from_str(text).map_err(|error| Error::malformed(source, in_words(text, &error)))
}

/// An error of the TOML parser in words of the documentation, with what was probably meant.
fn in_words(text: &str, error: &toml::de::Error) -> String {
    let mut words = error.to_string().trim_end().to_owned();
    for (parsers, ours) in [
        ("unknown field", "unknown key"),
        (
            "expected a boolean",
            "expected true or false, without quotes",
        ),
        ("expected u32", "expected a number, 0 or more"),
        ("expected u64", "expected a number, 0 or more"),
        ("expected usize", "expected a number, 0 or more"),
    ] {
        words = words.replace(parsers, ours);
    }
    let message = error.message();
    if let Some(names) = message.strip_prefix("unknown field ") {
        // The unknown one, then those that there are.
        let mut names = names.split('`').skip(1).step_by(2);
        let unknown = names.next().unwrap_or_default();
        if let Some(known) = nearest(unknown, names) {
            words += &format!("; did you mean {known}?");
        }
        return words;
    }
    let line = error.span().and_then(|span| {
        let start = text.get(..span.start)?.rfind('\n').map_or(0, |end| end + 1);
        text[start..].lines().next()
    });
    if let Some((key, value)) = line.and_then(|line| line.split_once('='))
        && ["isolated", "pins", "emulator", "iothreads"].contains(&key.trim())
        && !value.trim_start().starts_with(['"', '\'', '{'])
    {
        words += &format!(
            "; CPUs are written in quotes: {} = \"6-11,18-23\"",
            key.trim()
        );
    }
    words
}

fn resolve_file(
    root: &Host,
    host: &Resolver<'_>,
    file: File,
    source: &str,
    threads_per_core: usize,
) -> Result<Settings> {
    let wrong = |why: String| Error::malformed(source, why);
    let read =
        |key: &str, text: &str| cpus(host, text).map_err(|why| wrong(format!("{key}: {why}")));
    let required = file.required.unwrap_or(default::REQUIRED);
    let has_cpus = file.has_cpus();
    let mut isolated = file
        .isolated
        .as_deref()
        .map(|text| read("isolated", text))
        .transpose()?;
    if let (Some(text), Some(cpus)) = (&file.isolated, &isolated) {
        boot_cpu_is_named(text, cpus).map_err(&wrong)?;
    }
    let mut pins = file.pins;
    if let Some(name) = &file.layout {
        let layout = layout(name).map_err(&wrong)?;
        if let Some(why) = layout.misfit(root, host)? {
            return Err(Error::unusable(
                source,
                format!("layout {name} is for {why}"),
            ));
        }
        isolated = isolated.or(Some(layout.isolated));
        pins = pins.or(Some(layout.pins));
    }
    let isolated = isolated.filter(|cpus| !cpus.is_empty());
    let isolated = match isolated {
        None if !required && !has_cpus => CpuSet::new(),
        cpus => cpus.ok_or_else(|| {
            wrong(
                "isolated: the VM's CPUs are missing; `hook init VMID --print` chooses some, as in \
                 isolated = \"4-7\""
                    .into(),
            )
        })?,
    };
    let pins = match pins {
        None if isolated.is_empty() => Pins::PerVcpu(Vec::new()),
        pins => pins.ok_or_else(|| {
            wrong(
                "pins: missing; write pins = \"auto\", or a CPU per vCPU, as in pins = \"4,5,6,7\""
                    .into(),
            )
        })?,
    };
    let auto_pins = pins.are_auto().then_some(threads_per_core);
    let pins = match auto_pins {
        Some(threads) => choice::in_vcpu_order(host.topology()?, &isolated, threads, &[]),
        None if isolated.is_empty() => Vec::new(),
        None => pins
            .resolve(host)
            .map_err(|why| wrong(format!("pins: {why}")))?,
    };
    for (vcpu, cpus) in pins.iter().enumerate() {
        let outside = cpus - &isolated;
        if !outside.is_empty() {
            return Err(wrong(format!(
                "pins: vCPU {vcpu}: CPU {outside} is not among the isolated {isolated}"
            )));
        }
    }
    // An empty text is a mistake: a key without a value would be left out.
    let some = |key: &str, text: &str| match read(key, text)? {
        cpus if cpus.is_empty() => Err(wrong(format!(
            "{key}: an empty CPU list; leave it out for all housekeeping CPUs"
        ))),
        cpus => Ok(cpus),
    };
    let emulator = file
        .emulator
        .map(|text| some("emulator", &text))
        .transpose()?;
    let (mut iothreads, mut iothread) = (None, BTreeMap::new());
    match file.iothreads {
        None => {}
        Some(Iothreads::All(text)) => iothreads = Some(some("iothreads", &text)?),
        Some(Iothreads::ById(by_id)) => {
            for (id, text) in by_id {
                let cpus = some(&format!("iothreads: {id}"), &text)?;
                iothread.insert(id, cpus);
            }
        }
    }
    if file.stat_interval == Some(0) {
        return Err(wrong(format!(
            "stat_interval: 0 s is not an interval; leave it out for {}",
            default::STAT_INTERVAL
        )));
    }
    let vcpu_policy = file.vcpu_policy.map(|text| vcpu_policy(&text));
    let vcpu_policy = vcpu_policy.transpose().map_err(&wrong)?;
    let is_volume = |volume: &&String| volume.contains(":snippets/");
    if let Some(other) = file.chain.iter().find(|volume| !is_volume(volume)) {
        return Err(wrong(format!(
            "chain: {other:?} is not a hookscript's volume, as in \"local:snippets/old.pl\""
        )));
    }
    let longest = governor::LONGEST_LATENCY;
    if let Some(asked) = file.max_latency_us.filter(|asked| *asked > longest) {
        return Err(wrong(format!(
            "max_latency_us: {asked} is too long; the longest is {longest}, or leave it out for any"
        )));
    }
    Ok(Settings {
        source: source.to_owned(),
        isolated,
        required,
        pins,
        auto_pins,
        near: CpuSet::new(),
        emulator,
        iothreads,
        iothread,
        method: file.method.unwrap_or(default::METHOD),
        governor: Some(file.governor.unwrap_or_else(|| default::GOVERNOR.into()))
            .filter(|name| name != KEEP),
        energy_preference: file.energy_preference,
        max_latency_us: file.max_latency_us,
        halt_poll_ns: file.halt_poll_ns,
        vcpu_policy,
        housekeeping_governor: file.housekeeping_governor.filter(|name| name != KEEP),
        housekeeping_energy_preference: file.housekeeping_energy_preference,
        stat_interval: Some(file.stat_interval.unwrap_or(default::STAT_INTERVAL)),
        idle_vm: file.idle_vm,
        reset_pci: file.reset_pci.unwrap_or(ResetPci::OfVm(default::RESET_PCI)),
        tidy_caches: file.tidy_caches,
        min_housekeeping: file
            .min_housekeeping
            .unwrap_or(default::MIN_HOUSEKEEPING)
            .max(1),
        chain: file.chain,
        ignore: file.ignore,
        deadlines: file.deadlines,
    })
}

/// Threaded interrupts have this real-time priority (kernel/irq/manage.c).
const PRIORITY_OF_IRQS: u8 = 50;

/// Parses the policy of vCPUs: a real-time one.
///
/// # Errors
/// What to write instead.
fn vcpu_policy(text: &str) -> std::result::Result<SchedPolicy, String> {
    let policy: Option<SchedPolicy> = text.parse().ok();
    let is_below = |policy: &SchedPolicy| {
        policy
            .priority()
            .is_some_and(|priority| priority < PRIORITY_OF_IRQS)
    };
    policy.filter(is_below).ok_or_else(|| {
        format!(
            "vcpu_policy: {text:?} is not a policy that vCPUs can have; write \"fifo:1\", at most fifo:49 or rr:49, or leave it out"
        )
    })
}

/// Checks that CPU 0 is among the isolated CPUs only if the list names it: the kernel keeps work
/// there that no other CPU has, so it must not be isolated just because a larger part contains it.
///
/// # Errors
/// What to write instead.
fn boot_cpu_is_named(text: &str, isolated: &CpuSet) -> std::result::Result<(), String> {
    let is_named = |list: Selector| list.names_cpu(cpu::BOOT_CPU);
    if !isolated.contains(cpu::BOOT_CPU) || text.parse().is_ok_and(is_named) {
        return Ok(());
    }
    Err(format!(
        "isolated: CPU 0 is in {text}, but not named, and stays with the host; leave its core out: \
         \"{}\"; or name it, which needs the method partition: \"{}\"",
        joined(text, "!core:0"),
        joined(text, "core:0")
    ))
}

/// A list of CPUs with another term.
pub(crate) fn joined(list: &str, term: &str) -> String {
    match list.contains(['&', '!']) {
        true => format!("({list}),{term}"),
        false => format!("{list},{term}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::schema::known_keys;
    use crate::settings::{Method, own_file};
    use pinfold_core::testutils::machine;
    use proptest::prelude::*;
    use std::fs;

    fn host(present: &str) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let cpus = dir.path().join("sys/devices/system/cpu");
        fs::create_dir_all(&cpus).unwrap();
        fs::write(cpus.join("present"), present).unwrap();
        let root = Host::new(dir.path());
        (dir, root)
    }

    /// A captured machine.
    fn machine(name: &str) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        machine::expand(&machine::text(name), dir.path());
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn vm() -> VmId {
        "100".parse().unwrap()
    }

    #[test]
    fn without_a_file_the_5900x() {
        // Also while some CPUs are offline: hook checks those that it needs.
        for name in ["5900x", "5900x-offline"] {
            let (_dir, root) = machine(name);
            let settings = load(&root, vm(), 1, &[]).unwrap().fenced().unwrap();
            assert_eq!(settings.isolated.to_string(), "6-11,18-23");
            let pins: Vec<String> = settings.pins.iter().map(ToString::to_string).collect();
            assert_eq!(pins.join(" "), "6 18 7 19 8 20 9 21 10 22 11 23");
            assert_eq!(
                (settings.governor.as_deref(), settings.stat_interval),
                (Some("performance"), Some(120))
            );
            assert_eq!(
                (settings.idle_vm, settings.reset_pci, settings.tidy_caches),
                (None, ResetPci::OfVm(false), None)
            );
            // The documented order, while files have another default.
            assert_eq!(
                (settings.method, settings.required),
                (Method::Hotplug, true)
            );
        }
    }

    #[test]
    fn without_a_file_other_machines_are_refused() {
        for (name, why) in [
            (
                "285k",
                "an L3 for each of CPU 0-5,12-17 and 6-11,18-23; this one has one for CPU 0-23",
            ),
            (
                "dellx",
                "an L3 for each of CPU 0-5,12-17 and 6-11,18-23; this one has one for each of CPU \
                 0,2,4,6,8,10,12,14,16,18,20,22 and 1,3,5,7,9,11,13,15,17,19,21,23",
            ),
            (
                "hybrid",
                "an L3 for each of CPU 0-5,12-17 and 6-11,18-23; this one has one for CPU 0-23",
            ),
            ("bare", "a host with CPU 0-23; this one has 0-3"),
        ] {
            let (_dir, root) = machine(name);
            let error = load(&root, vm(), 1, &[]).unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
            assert!(
                error.contains("write settings with `hook init 100`"),
                "{error}"
            );
        }
        // The caches of a 5900X, and siblings that are not.
        let (dir, root) = machine("5900x");
        for (cpu, core) in [(6, "6-7"), (7, "6-7"), (18, "18-19"), (19, "18-19")] {
            let file = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            fs::write(dir.path().join(file), core).unwrap();
        }
        let error = load(&root, vm(), 1, &[]).unwrap_err().to_string();
        assert!(
            error.contains("with the cores 0,12 and 1,13 and so on; this one has core 6-7"),
            "{error}"
        );
    }

    #[test]
    fn the_most_specific_file_wins() {
        let (dir, root) = host("0-7");
        // As on a node of Proxmox VE.
        fs::create_dir_all(dir.path().join("etc/pve/nodes/pve1")).unwrap();
        std::os::unix::fs::symlink("nodes/pve1", dir.path().join("etc/pve/local")).unwrap();
        for (cpu, file) in (1..).zip([
            "etc/pve/pinfold/default.toml",
            "etc/pinfold/default.toml",
            "etc/pve/local/pinfold/default.toml",
            "etc/pve/pinfold/100.toml",
            "etc/pinfold/100.toml",
            "etc/pve/local/pinfold/100.toml",
        ]) {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("isolated = \"{cpu}\"\npins = [{cpu}]")).unwrap();
            let settings = load(&root, vm(), 1, &[]).unwrap().fenced().unwrap();
            assert_eq!(settings.isolated.first(), Some(cpu), "{file}");
            let own = own_file(&root, vm());
            assert_eq!(own.is_some(), cpu > 3, "{file}");
            assert_eq!(settings.method, Method::Auto);
        }
    }

    #[test]
    fn what_is_not_required_may_be_missing() {
        let (dir, root) = machine("5900x");
        let file = |name: &str, text: &str| {
            let path = dir.path().join("etc/pinfold").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let loaded = || load(&root, vm(), 1, &[]);
        file("default.toml", "required = false\nidle_vm = 107\n");
        let Loaded::Unfenced {
            settings,
            why,
            is_lack,
        } = loaded().unwrap()
        else {
            panic!("fenced without CPUs")
        };
        assert!(
            why.ends_with(
                "default.toml has required = false and no CPUs; `hook init 100` chooses some"
            ),
            "{why}"
        );
        assert_eq!((settings.idle_vm, is_lack), (Some(107), false));
        assert!(settings.isolated.is_empty() && settings.pins.is_empty());
        // The VM's own file decides, and files are not merged.
        file("100.toml", "isolated = \"llc:2\"\npins = \"auto\"\n");
        assert!(loaded().is_err());
        file(
            "100.toml",
            "required = false\nisolated = \"llc:2\"\npins = \"auto\"\n",
        );
        let Loaded::Unfenced { why, is_lack, .. } = loaded().unwrap() else {
            panic!("fenced on CPUs that are not there")
        };
        assert!(
            why.contains("isolated: llc:2: no such LLC domain") && is_lack,
            "{why}"
        );
        file(
            "100.toml",
            "required = false\nisolated = \"llc:1\"\npins = \"auto\"\n",
        );
        let settings = loaded().unwrap().fenced().unwrap();
        assert_eq!((settings.isolated.len(), settings.required), (12, false));
        let kept = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&kept).unwrap(), settings);
        // Settings that cannot be parsed do not allow it.
        for text in [
            "required = false\nisolate = \"llc:1\"",
            "required = 0",
            "pins = \"auto\"",
            "",
        ] {
            file("100.toml", text);
            assert!(loaded().is_err(), "{text}");
        }
    }

    #[test]
    fn pins_in_both_forms() {
        let (_dir, root) = host("0-23");
        for (pins, resolved) in [
            ("\"6,18,7-8\"", "6 18 7 8"),
            ("[6, 18]", "6 18"),
            ("[\"6-7\", 18, \"8,20\"]", "6-7 18 8,20"),
        ] {
            let settings = resolve(
                &root,
                &format!("isolated = \"6-11,18-23\"\npins = {pins}"),
                "test",
                1,
            )
            .unwrap();
            let got: Vec<String> = settings.pins.iter().map(ToString::to_string).collect();
            assert_eq!(got.join(" "), resolved);
        }
    }

    #[test]
    fn selectors_stand_for_this_hosts_cpus() {
        let (_dir, root) = machine("5900x");
        let text = "isolated = \"llc:1\"\npins = [\"core:6\", 18, \"smt:7&!7\", \"8-9\"]\nemulator = \"!llc:1\"\n\
                    iothreads = { a = \"first-threads&llc:0\", b = \"4\" }";
        let settings = resolve(&root, text, "test", 1).unwrap();
        let shown = |cpus: &Option<CpuSet>| cpus.as_ref().map(ToString::to_string);
        assert_eq!(
            (
                settings.isolated.to_string().as_str(),
                shown(&settings.iothreads)
            ),
            ("6-11,18-23", None)
        );
        let pins: Vec<String> = settings.pins.iter().map(ToString::to_string).collect();
        assert_eq!(pins, ["6,18", "18", "19", "8-9"]);
        assert_eq!(shown(&settings.emulator).as_deref(), Some("0-5,12-17"));
        let iothread: Vec<String> = settings
            .iothread
            .iter()
            .map(|(id, cpus)| format!("{id}={cpus}"))
            .collect();
        assert_eq!(iothread, ["a=0-5", "b=4"]);
        let kept = serde_json::to_value(&settings).unwrap();
        assert_eq!(
            (&kept["isolated"], &kept["pins"][0]),
            (&"6-11,18-23".into(), &"6,18".into()),
            "kept as CPUs"
        );
        let settings = resolve(
            &root,
            "layout = \"5900x\"\niothreads = \"core:4\"",
            "test",
            1,
        )
        .unwrap();
        assert_eq!(shown(&settings.iothreads).as_deref(), Some("4,16"));
    }

    #[test]
    fn pins_are_ordered_for_the_guest() {
        let (_dir, root) = machine("5900x");
        let text = "isolated = \"llc:1\"\npins = \"auto\"";
        let pins = |settings: &Settings| {
            settings
                .pins
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(",")
        };
        let (alone, paired) = (
            "6,7,8,9,10,11,18,19,20,21,22,23",
            "6,18,7,19,8,20,9,21,10,22,11,23",
        );
        let mut settings = resolve(&root, text, "test", 1).unwrap();
        assert_eq!(
            (pins(&settings).as_str(), settings.auto_pins),
            (alone, Some(1))
        );
        let kept = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&kept).unwrap(), settings);
        settings.fit_guest(&root, 2, &[]).unwrap();
        assert_eq!(settings, resolve(&root, text, "test", 2).unwrap());
        assert_eq!(pins(&settings), paired);
        // Nothing is read if nothing has to be ordered.
        settings
            .fit_guest(&Host::new("/nonexistent"), 2, &[])
            .unwrap();
        let mut written = resolve(
            &root,
            &format!("isolated = \"llc:1\"\npins = \"{alone}\""),
            "test",
            2,
        )
        .unwrap();
        written.fit_guest(&root, 2, &[]).unwrap();
        assert_eq!((pins(&written).as_str(), written.auto_pins), (alone, None));
        let error = resolve(&root, "pins = \"auto\"", "test", 1)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("isolated: the VM's CPUs are missing"),
            "{error}"
        );
        let auto = resolve(&root, "layout = \"5900x\"\npins = \" auto \"", "test", 2).unwrap();
        assert_eq!(pins(&auto), paired);
    }

    #[test]
    fn a_state_of_before_is_read() {
        let (_dir, root) = machine("5900x");
        let mut kept =
            serde_json::to_value(resolve(&root, "layout = \"5900x\"", "test", 1).unwrap()).unwrap();
        assert!(kept.get("auto_pins").is_none());
        assert_eq!(
            serde_json::from_value::<Settings>(kept.clone())
                .unwrap()
                .auto_pins,
            None
        );
        kept["auto_pins"] = 2.into();
        assert_eq!(
            serde_json::from_value::<Settings>(kept).unwrap().auto_pins,
            Some(2)
        );
    }

    #[test]
    fn cpu_0_is_isolated_only_by_its_name() {
        let (_dir, root) = machine("7950x3d");
        for text in ["vcache", "llc:0", "node:0", "!llc:1", "all", "llc:0&0-3"] {
            let settings = format!("isolated = \"{text}\"\npins = \"auto\"");
            let resolved = resolve(&root, &settings, "test", 1);
            let named = text == "llc:0&0-3";
            assert_eq!(resolved.is_ok(), named, "{text}");
            let Err(error) = resolved else { continue };
            // Both ways out are settings that work.
            let words: Vec<&str> = error.to_string().leak().split('"').collect();
            let (without, with) = (words[1], words[3]);
            for (list, has_it) in [(without, false), (with, true)] {
                let settings = format!("isolated = \"{list}\"\npins = \"auto\"");
                let settings = resolve(&root, &settings, "test", 1).unwrap();
                assert_eq!(settings.isolated.contains(0), has_it, "{list}");
                assert_eq!(settings.isolated.contains(16), has_it, "{list}");
            }
        }
        for text in ["0", "core:0", "0-7,16-23", "vcache,core:0"] {
            let settings = format!("isolated = \"{text}\"\npins = \"auto\"");
            let settings = resolve(&root, &settings, "test", 1).unwrap();
            assert!(settings.isolated.contains(0), "{text}");
        }
    }

    #[test]
    fn slips_in_the_file_get_the_right_form() {
        let (_dir, root) = machine("5900x");
        let quotes = "; CPUs are written in quotes: isolated = \"6-11,18-23\"";
        for (text, end) in [
            ("isolated = 6-11\n", quotes),
            ("isolated = 6-11,18-23\n", quotes),
            ("isolated = [6, 7]\n", quotes),
            (
                "pins = auto\n",
                "; CPUs are written in quotes: pins = \"6-11,18-23\"",
            ),
            ("isolate = \"6\"\n", "; did you mean isolated?"),
            ("[deadline]\nlock = 1\n", "; did you mean deadlines?"),
            (
                "required = \"no\"\n",
                "expected true or false, without quotes",
            ),
            ("max_latency_us = -1\n", "expected a number, 0 or more"),
            (
                "isolated = \"6\"\npins = \"aut\"\n",
                "write CPUs as in 0-5,12, or \"auto\"",
            ),
        ] {
            let error = resolve(&root, text, "test", 1).unwrap_err().to_string();
            assert!(error.ends_with(end), "{text}: {error}");
        }
    }

    #[test]
    fn vcpus_have_a_real_time_policy_below_interrupts_or_none() {
        let (_dir, root) = machine("5900x");
        for (text, is_one) in [
            ("fifo:1", true),
            ("rr:49", true),
            ("fifo:50", false),
            ("other", false),
            ("deadline", false),
            ("fifo", false),
            ("", false),
        ] {
            let file = format!("isolated = \"6\"\npins = \"6\"\nvcpu_policy = {text:?}");
            match resolve(&root, &file, "test", 1) {
                Ok(settings) => {
                    let policy = settings.vcpu_policy.map(|policy| policy.to_string());
                    assert_eq!((policy.as_deref(), is_one), (Some(text), true));
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains("write \"fifo:1\"") && !is_one, "{error}");
                }
            }
        }
    }

    #[test]
    fn wrong_selectors_name_the_key_and_the_token() {
        let (_dir, root) = machine("5900x");
        for (text, why) in [
            (
                "isolated = \"lcl:1\"",
                "test: isolated: \"lcl\" in \"lcl:1\" (character 1) is not a selector; selectors are llc:N",
            ),
            (
                "isolated = \"llc:2\"",
                "test: isolated: llc:2: no such LLC domain; this host has llc:0 (CPU 0-5,12-17) and",
            ),
            (
                "isolated = \"vcache\"",
                "test: isolated: vcache: no L3 has 3D V-Cache (AMD, 64M or more, 8M or more per core)",
            ),
            (
                "isolated = \"llc:1&0\"",
                "test: isolated: llc:1&0: it selects no CPU",
            ),
            (
                "isolated = \"!vm:101\"",
                "test: isolated: !vm:101: the CPUs of a VM's vCPUs change",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\nemulator = \"node:1\"",
                "test: emulator: node:1: no such NUMA node",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\niothreads = \"core:24\"",
                "test: iothreads: CPU 24: no such CPU",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\niothreads = { io1 = \"cor:4\" }",
                "test: iothreads: io1: \"cor\" in \"cor:4\"",
            ),
            (
                "isolated = \"6\"\npins = [6, \"core:\"]",
                "test: pins: vCPU 1: \"\" in \"core:\" (character 6) is not a number",
            ),
            (
                "isolated = \"6\"\npins = [\"llc:0\"]",
                "test: pins: vCPU 0: CPU 0-5,12-17 is not among the isolated 6",
            ),
            (
                "isolated = \"6,18\"\npins = \"6,core:6\"",
                "test: pins: \"core:6\" in \"6,core:6\" has no order; write \"auto\", CPUs in",
            ),
            (
                "isolated = \"llc:1\"\npins = \"llc:1,!6\"",
                "test: pins: \"llc:1\" in \"llc:1,!6\" has no order; write \"auto\", CPUs in",
            ),
            (
                "isolated = \"6,18\"\npins = \"6,cor:6\"",
                "test: pins: \"cor:6\" is not a CPU number or range",
            ),
        ] {
            let error = resolve(&root, text, "test", 1).unwrap_err().to_string();
            assert!(error.starts_with(why), "{text:?}: {error}");
        }
    }

    #[test]
    fn deadlines_need_no_host() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/pinfold")).unwrap();
        let root = Host::new(dir.path());
        let lock = || deadlines(&root, vm()).lock;
        assert_eq!(lock(), 120, "no file");
        let file = dir.path().join("etc/pinfold/100.toml");
        for (text, seconds) in [
            ("isolated = \"llc:1\"\n[deadlines]\nlock = 5", 5),
            ("[deadlines]\nlock = x", 120),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(lock(), seconds);
        }
    }

    #[test]
    fn wrong_settings_name_the_key() {
        let (_dir, root) = host("0-23");
        for (text, why) in [
            ("isolated = \"6\"", "pins: missing"),
            ("pins = \"6\"", "isolated: the VM's CPUs are missing"),
            ("isolated = \"6-5\"\npins = \"6\"", "runs backwards"),
            (
                "isolated = \"6\"\npins = \"7\"",
                "pins: vCPU 0: CPU 7 is not among the isolated 6",
            ),
            (
                "isolated = \"6\"\npins = \"6,\"",
                "pins: \"\" is an empty CPU list",
            ),
            (
                "isolated = \"6\"\npins = 6",
                "CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU",
            ),
            ("isolated = \"6\"\npins = []", "pins: no CPU at all"),
            ("isolated = \"6\"\npins = [\"\"]", "pins: vCPU 0 has no CPU"),
            (
                "isolated = \"6\"\npins = \"6\"\ncolour = 1",
                "unknown key `colour`",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\nmethod = \"magic\"",
                "unknown variant `magic`",
            ),
            ("layout = \"9999x\"", "no \"9999x\"; available: 5900x"),
            (
                "isolated = \"6\"\npins = \"6\"\nemulator = \"\"",
                "emulator: an empty CPU list",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\niothreads = { a = \"0\", b = \" \" }",
                "iothreads: b: an empty CPU list",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\niothreads = 4",
                "CPUs by iothread, as in { iothread-virtioscsi0 = \"4\" }",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\nstat_interval = 0",
                "stat_interval: 0 s",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\n[deadlines]\nqmp = -1",
                "qmp",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\n[deadlines]\nlock = 3601",
                "the longest deadline is 3600",
            ),
            (
                "isolated = \"6\"\npins = [9223372036854775807]",
                "pins: CPU 9223372036854775807 is beyond 8191",
            ),
            (
                "isolated = \"6\"\npins = \"0-8191,0-8191\"",
                "pins: more than 8192",
            ),
            (
                &format!("isolated = \"6\"\npins = [{}]", "6,".repeat(8193)),
                "pins: more than 8192",
            ),
            ("=", "test: "),
        ] {
            let error = resolve(&root, text, "test", 1).unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn pins_come_through(cpus in prop::collection::vec(0..24usize, 1..30)) {
            let (_dir, root) = host("0-23");
            let numbers: Vec<String> = cpus.iter().map(ToString::to_string).collect();
            let pins: Vec<CpuSet> = cpus.iter().map(|cpu| [*cpu].into_iter().collect()).collect();
            let list = numbers.join(",");
            let quoted = format!("\"{}\"", numbers.join("\",\""));
            for text in [format!("\"{list}\""), format!("[{list}]"), format!("[{quoted}]")] {
                let settings = resolve(&root, &format!("isolated = \"0-23\"\npins = {text}"), "test", 1).unwrap();
                prop_assert_eq!(&settings.pins, &pins);
                let kept = serde_json::to_string(&settings).unwrap();
                prop_assert_eq!(serde_json::from_str::<Settings>(&kept).unwrap(), settings);
            }
        }

        #[test]
        fn no_settings_panic(
            key in "isolated|pins|emulator|iothreads|stat_interval|reset_pci|idle_vm",
            value in "\\PC*|-?[0-9]{1,20}|\\[\\PC*\\]|\"[0-9,-]*\"|\"auto\"\
                      |\"(llc:|core:|vm:10|all|!|&|[0-9,()-]){0,8}\"",
        ) {
            let _ = toml::from_str::<File>(&format!("{key} = {value}"));
            let _ = resolve(&Host::new("/nonexistent"), &format!("{key} = {value}\nisolated = \"6\""), "test", 1);
        }
    }

    /// The settings that the README shows are settings, all keys are among them, and the defaults
    /// are as it lists them.
    #[test]
    fn the_readme_shows_every_key_with_its_default() {
        let readme = include_str!("../../../README.md");
        let blocks: Vec<&str> = readme
            .split("```toml\n")
            .skip(1)
            .map(|rest| rest.split("```").next().unwrap())
            .collect();
        assert!(blocks.len() > 1, "README.md has no settings any more");
        let (_dir, root) = machine("5900x");
        for block in &blocks {
            resolve(&root, block, "README.md", 1).unwrap();
        }
        let example = include_str!("../../../docs/example.toml");
        resolve(&root, example, "docs/example.toml", 1).unwrap();
        let all = blocks[0];
        for key in known_keys() {
            let is_shown = |line: &str| {
                line.contains(&format!("{key} =")) || line.starts_with(&format!("[{key}]"))
            };
            assert!(all.lines().any(is_shown), "README.md does not show {key}");
        }
        let shown = resolve(&root, all, "", 1).unwrap();
        let default = resolve(&root, "isolated = \"6\"\npins = \"6\"", "", 1).unwrap();
        assert_eq!(
            (
                shown.required,
                shown.method,
                shown.governor,
                shown.stat_interval,
                shown.deadlines
            ),
            (
                default.required,
                default.method,
                default.governor,
                default.stat_interval,
                default.deadlines
            ),
        );
        let layout = resolve(&root, "layout = \"5900x\"", "", 1).unwrap();
        assert_eq!((shown.isolated, shown.pins), (layout.isolated, layout.pins));
        for (key, is_default) in [
            ("idle_vm = 107", default.idle_vm.is_none()),
            (
                "reset_pci = true",
                default.reset_pci == ResetPci::OfVm(false),
            ),
            ("min_housekeeping = 2", default.min_housekeeping == 1),
            ("tidy_caches = true", default.tidy_caches.is_none()),
            (
                "energy_preference = \"balance_performance\"",
                default.energy_preference.is_none(),
            ),
            ("max_latency_us = 20", default.max_latency_us.is_none()),
            ("vcpu_policy = \"fifo:1\"", default.vcpu_policy.is_none()),
            ("halt_poll_ns = 400000", default.halt_poll_ns.is_none()),
            (
                "housekeeping_governor = \"powersave\"",
                default.housekeeping_governor.is_none(),
            ),
            (
                "housekeeping_energy_preference = \"power\"",
                default.housekeeping_energy_preference.is_none(),
            ),
        ] {
            let line = all.lines().find(|line| line.starts_with(key)).unwrap();
            assert!(is_default && line.contains("default: "), "{line}");
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, root) = host("0-23");
        fs::create_dir_all(dir.path().join("etc/pinfold")).unwrap();
        let path = dir.path().join("etc/pinfold/100.toml");
        fs::write(&path, "isolated = \"6\"\npins = \"6\"").unwrap();
        for (mode, refused) in [(0o644, false), (0o664, true), (0o602, true), (0o600, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(load(&root, vm(), 1, &[]).is_err(), refused, "{mode:o}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(
            load(&root, vm(), 1, &[])
                .unwrap_err()
                .to_string()
                .contains("it is a symbolic link")
        );
    }
}

//! From the text of a settings file to the settings of a VM on this host.

use std::collections::BTreeMap;

use pinfold_core::selector;
use pinfold_core::sys::topology::Topology;
use pinfold_core::vm::VmId;
use pinfold_core::{Error, Host, Result};

use super::deadlines::Deadlines;
use super::file::{candidates, find};
use super::pins::{self, cpus};
use super::schema::{DEFAULT_LAYOUT, File, Iothreads, KEEP, Method, ResetPci, Settings, layout};

/// Finds and resolves a VM's settings; `threads_per_core` is of its guest, for pins whose order is
/// left to hook.
///
/// # Errors
/// Where a file is not root's alone, cannot be read or says something wrong, or the layout is not
/// for this machine.
pub(crate) fn load(root: &Host, vmid: VmId, threads_per_core: usize) -> Result<Settings> {
    if let Some((path, text)) = find(root, vmid)? {
        return resolve(root, &text, &path, threads_per_core);
    }
    let (text, source) = (
        format!("layout = \"{DEFAULT_LAYOUT}\""),
        format!("the built-in layout {DEFAULT_LAYOUT}"),
    );
    resolve(root, &text, &source, threads_per_core).map_err(|error| {
        let [_, first, _] = candidates(vmid).map(|path| root.path(path));
        let advice = format!(
            "write your CPUs to {}, as in\n  isolated = \"4-7\"\n  pins = \"auto\"",
            first.display()
        );
        Error::unusable(
            format!("VM {vmid} has no settings file and {error}"),
            advice,
        )
    })
}

/// A VM's deadlines, without a look at the host. Settings with a fault have the usual ones:
/// [`load`] tells the fault.
pub(crate) fn deadlines(root: &Host, vmid: VmId) -> Deadlines {
    let file = find(root, vmid)
        .ok()
        .flatten()
        .and_then(|(_, text)| toml::from_str::<File>(&text).ok());
    file.map(|file| file.deadlines).unwrap_or_default()
}

/// Resolves the text of a settings file, for a guest with so many threads per core.
pub(crate) fn resolve(
    root: &Host,
    text: &str,
    source: &str,
    threads_per_core: usize,
) -> Result<Settings> {
    let file: File = toml::from_str(text)
        .map_err(|error| Error::malformed(source, error.to_string().trim_end().to_owned()))?;
    let wrong = |why: String| Error::malformed(source, why);
    let host = selector::Resolver::new(root);
    let read =
        |key: &str, text: &str| cpus(&host, text).map_err(|why| wrong(format!("{key}: {why}")));
    let mut isolated = file
        .isolated
        .map(|text| read("isolated", &text))
        .transpose()?;
    let mut pins = file.pins;
    if let Some(name) = &file.layout {
        let layout = layout(name).map_err(&wrong)?;
        let present = pinfold_core::sys::cpu::present(root)?;
        if present != layout.present {
            let why = format!(
                "layout {name} is for a host with CPUs {}; this one has {present}",
                layout.present
            );
            return Err(Error::unusable(source, why));
        }
        isolated = isolated.or(Some(layout.isolated));
        pins = pins.or(Some(layout.pins));
    }
    let isolated = isolated.filter(|cpus| !cpus.is_empty());
    let isolated = isolated.ok_or_else(|| {
        wrong("isolated: the VM's CPUs are missing; write isolated = \"4-7\"".into())
    })?;
    let pins = pins.ok_or_else(|| {
        wrong(
            "pins: missing; write pins = \"auto\", or a CPU per vCPU, as in pins = \"4,5,6,7\""
                .into(),
        )
    })?;
    let auto_pins = pins.are_auto().then_some(threads_per_core);
    let pins = match auto_pins {
        Some(threads) => pins::auto(&Topology::read(root)?, &isolated, threads),
        None => pins
            .resolve(&host)
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
    // An empty text is a slip, since leaving the key out says more.
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
        return Err(wrong(
            "stat_interval: 0 s is no interval; leave it out for 120".into(),
        ));
    }
    Ok(Settings {
        source: source.to_owned(),
        isolated,
        pins,
        auto_pins,
        emulator,
        iothreads,
        iothread,
        method: file.method.unwrap_or(Method::Hotplug),
        governor: Some(file.governor.unwrap_or_else(|| "performance".into()))
            .filter(|name| name != KEEP),
        stat_interval: Some(file.stat_interval.unwrap_or(120)),
        idle_vm: file.idle_vm,
        reset_pci: file.reset_pci.unwrap_or(ResetPci::OfVm(false)),
        tidy_caches: file.tidy_caches.unwrap_or(true),
        min_housekeeping: file.min_housekeeping.unwrap_or(1).max(1),
        deadlines: file.deadlines,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine;
    use crate::settings::schema::known_keys;
    use pinfold_core::CpuSet;
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
        let (_, text) = machine::all()
            .into_iter()
            .find(|(known, _)| known == name)
            .unwrap();
        machine::expand(&text, dir.path());
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn vm() -> VmId {
        "100".parse().unwrap()
    }

    #[test]
    fn without_a_file_the_5900x() {
        let (_dir, root) = host("0-23");
        let settings = load(&root, vm(), 1).unwrap();
        assert_eq!(settings.isolated.to_string(), "6-11,18-23");
        let pins: Vec<String> = settings.pins.iter().map(ToString::to_string).collect();
        assert_eq!(pins.join(" "), "6 18 7 19 8 20 9 21 10 22 11 23");
        assert_eq!(
            (settings.governor.as_deref(), settings.stat_interval),
            (Some("performance"), Some(120))
        );
        assert_eq!(
            (settings.idle_vm, settings.reset_pci, settings.tidy_caches),
            (None, ResetPci::OfVm(false), true)
        );
    }

    #[test]
    fn where_the_layout_does_not_fit_it_says_what_to_write() {
        let (_dir, root) = host("0-7");
        let error = load(&root, vm(), 1).unwrap_err().to_string();
        assert!(
            error.contains("layout 5900x is for a host with CPUs 0-23; this one has 0-7"),
            "{error}"
        );
        assert!(
            error.contains("etc/pinfold/100.toml, as in\n  isolated = \"4-7\"\n  pins = \"auto\""),
            "{error}"
        );
    }

    #[test]
    fn the_nearest_file_wins() {
        let (dir, root) = host("0-7");
        for (folder, file, cpu) in [
            ("etc/pinfold", "default.toml", 1),
            ("etc/pinfold", "100.toml", 2),
            ("etc/pve/pinfold", "100.toml", 3),
        ] {
            let folder = dir.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(
                folder.join(file),
                format!("isolated = \"{cpu}\"\npins = [{cpu}]"),
            )
            .unwrap();
            assert_eq!(load(&root, vm(), 1).unwrap().isolated.first(), Some(cpu));
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
        settings.fit_guest(&root, 2).unwrap();
        assert_eq!(settings, resolve(&root, text, "test", 2).unwrap());
        assert_eq!(pins(&settings), paired);
        // Nothing is looked at where nothing is to be done.
        settings.fit_guest(&Host::new("/nonexistent"), 2).unwrap();
        let mut written = resolve(
            &root,
            &format!("isolated = \"llc:1\"\npins = \"{alone}\""),
            "test",
            2,
        )
        .unwrap();
        written.fit_guest(&root, 2).unwrap();
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
    fn wrong_selectors_name_the_key_and_the_token() {
        let (_dir, root) = machine("5900x");
        for (text, why) in [
            (
                "isolated = \"lcl:1\"",
                "test: isolated: \"lcl\" in \"lcl:1\" (character 1) is no selector; there are llc:N",
            ),
            (
                "isolated = \"llc:2\"",
                "test: isolated: llc:2: no such LLC domain; this host has llc:0 (CPU 0-5,12-17) and",
            ),
            (
                "isolated = \"vcache\"",
                "test: isolated: vcache: no L3 is larger than the others",
            ),
            (
                "isolated = \"llc:1&0\"",
                "test: isolated: llc:1&0: there is no CPU in it",
            ),
            (
                "isolated = \"!vm:101\"",
                "test: isolated: !vm:101: where a VM's vCPUs may run changes",
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
                "test: pins: vCPU 1: \"\" in \"core:\" (character 6) is no number",
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
                "test: pins: \"cor:6\" in \"cor:6\" is no CPU number or range",
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
                "unknown field `colour`",
            ),
            (
                "isolated = \"6\"\npins = \"6\"\nmethod = \"magic\"",
                "unknown variant `magic`",
            ),
            ("layout = \"9999x\"", "no \"9999x\"; there is 5900x"),
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
        fn no_settings_panic(key in "isolated|pins|emulator|iothreads|stat_interval|reset_pci|idle_vm", value in "\\PC*|-?[0-9]{1,20}|\\[\\PC*\\]|\"[0-9,-]*\"|\"auto\"|\"(llc:|core:|vm:10|all|!|&|[0-9,()-]){0,8}\"") {
            let _ = toml::from_str::<File>(&format!("{key} = {value}"));
            let _ = resolve(&Host::new("/nonexistent"), &format!("{key} = {value}\nisolated = \"6\""), "test", 1);
        }
    }

    /// The settings that the README shows are settings, all keys are among them, and the defaults
    /// are as it says.
    #[test]
    fn the_readme_tells_the_truth() {
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
            let is_told = |line: &str| {
                line.contains(&format!("{key} =")) || line.starts_with(&format!("[{key}]"))
            };
            assert!(all.lines().any(is_told), "README.md does not show {key}");
        }
        let shown = resolve(&root, all, "", 1).unwrap();
        let default = resolve(&root, "isolated = \"6\"\npins = \"6\"", "", 1).unwrap();
        assert_eq!(
            (
                shown.method,
                shown.governor,
                shown.stat_interval,
                shown.tidy_caches,
                shown.deadlines
            ),
            (
                default.method,
                default.governor,
                default.stat_interval,
                default.tidy_caches,
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
            assert_eq!(load(&root, vm(), 1).is_err(), refused, "{mode:o}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(
            load(&root, vm(), 1)
                .unwrap_err()
                .to_string()
                .contains("no plain file")
        );
    }
}

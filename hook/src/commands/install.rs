//! `hook install`: everything between a VM and its first fenced start.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use anyhow::{bail, ensure};
use cg_slice::partition::Siblings;
use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{print, print_json};
use pinfold_core::sys::{cgroup, cpu};
use pinfold_core::vm::{self, LOCAL, Storage, VmConf, VmId};
use pinfold_core::{Exit, Host, printable};
use serde_json::json;

use super::{check, init, needs_root};
use crate::checks::finding::Level;
use crate::checks::required;
use crate::exec;
use crate::settings::{self, Loaded};
use crate::snippet::{self, Found};

/// The options of `hook install`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    pub vmid: VmId,
    /// The storage for the hookscript [default: one that allows snippets, `local` first]
    #[arg(long, value_name = "ID")]
    pub storage: Option<String>,
    /// Allow snippets in the storage if it does not
    #[arg(short, long)]
    pub yes: bool,
    /// Print the steps and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// How long a call of Proxmox VE's programs may take.
const PROGRAM_DEADLINE: Duration = Duration::from_secs(60);

/// Runs a program of Proxmox VE with arguments.
pub(super) type Programs<'a> = &'a dyn Fn(&str, &[&str]) -> io::Result<()>;

/// Runs programs on the running host only.
pub(super) fn programs(root: &Host) -> impl Fn(&str, &[&str]) -> io::Result<()> {
    let is_live = root.is_live();
    move |program, args| {
        if !is_live {
            let why = format!("{program} works on the running host only, not below --sysroot");
            return Err(io::Error::other(why));
        }
        exec::run(program, args, PROGRAM_DEADLINE).map(drop)
    }
}

/// Steps, each printed before it is done.
pub(super) struct Steps<'a> {
    pub output: &'a Output,
    pub dry_run: bool,
    pub done: Vec<String>,
}

impl<'a> Steps<'a> {
    pub(super) fn new(output: &'a Output, dry_run: bool) -> Self {
        Self {
            output,
            dry_run,
            done: Vec::new(),
        }
    }

    /// Prints a line for people.
    pub(super) fn line(&self, text: &str) -> anyhow::Result<()> {
        if self.output.json || self.output.quiet {
            return Ok(());
        }
        print(&format!("{}\n", printable(text)))
    }

    /// A step: what it is, the command that does the same, and what does it.
    pub(super) fn step(
        &mut self,
        what: &str,
        command: &str,
        run: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.line(&format!("{what}: {command}"))?;
        self.done.push(command.to_owned());
        if self.dry_run {
            return Ok(());
        }
        run()
    }

    /// The line at the end: whether anything was done.
    pub(super) fn changed(&self) -> bool {
        !self.done.is_empty() && !self.dry_run
    }
}

/// The command's whole run.
///
/// # Errors
/// What keeps the VM from being installed; what was done before stays, and the next run goes on
/// there.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    needs_root(&root, args.dry_run)?;
    install(&root, args, output, &programs(&root))
}

fn install(
    root: &Host,
    args: &Args,
    output: &Output,
    programs: Programs<'_>,
) -> anyhow::Result<Exit> {
    let vmid = args.vmid;
    let conf = vm::conf(root, vmid)?;
    check_host(root, vmid, &conf)?;
    let target = target(root, args, &conf)?;
    if let Some(content) = target
        .content
        .as_ref()
        .filter(|_| !args.yes && !args.dry_run)
    {
        bail!(
            "storage {id} does not allow snippets, from where Proxmox VE runs hookscripts; \
             run `pvesm set {id} --content {content}`, or let hook do so: hook install {vmid} --yes",
            id = target.storage
        );
    }
    let mut steps = Steps::new(output, args.dry_run);
    let needs_settings = needs_settings(root, vmid, &conf)?;
    if needs_settings {
        let file = settings::node_file(root, vmid).display().to_string();
        let what = format!("settings of VM {vmid} in {file}");
        let choose = || {
            let output = Output {
                quiet: output.quiet || output.json,
                json: false,
                ..output.clone()
            };
            init::run(&init::Args::by_install(vmid, args.dry_run), &output).map(drop)
        };
        steps.step(&what, &format!("hook init {vmid}"), choose)?;
        if args.dry_run {
            choose()?;
        }
    }
    let earlier = conf.hookscript.clone();
    if let Some(earlier) = earlier.filter(|volume| *volume != target.volume) {
        keep_earlier(root, vmid, &earlier, needs_settings, &mut steps)?;
    }
    if let Some(content) = &target.content {
        let id = &target.storage;
        let command = format!("pvesm set {id} --content {content}");
        steps.step(
            &format!("snippets in storage {id}, for all nodes"),
            &command,
            || Ok(programs("pvesm", &["set", id, "--content", content])?),
        )?;
    }
    if let Some(path) = &target.link {
        let program = snippet::program(root);
        let full = root.path(path);
        let command = format!("ln -s {} {}", program.display(), full.display());
        steps.step("hook among the snippets", &command, || {
            Ok(snippet::link(root, path)?)
        })?;
    }
    if conf.hookscript.as_ref() != Some(&target.volume) {
        let (id, volume) = (vmid.to_string(), &target.volume);
        let command = format!("qm set {id} --hookscript {volume}");
        steps.step(&format!("hookscript of VM {vmid}"), &command, || {
            Ok(programs("qm", &["set", &id, "--hookscript", volume])?)
        })?;
    }

    let changed = steps.changed();
    let findings = match args.dry_run {
        true => Vec::new(),
        false => check::faults(root, vmid),
    };
    if output.json {
        let (chain, _) = settings::chain(root, vmid);
        let json = json!({
            "vm": vmid, "changed": changed, "dry_run": args.dry_run,
            "steps": steps.done, "settings": settings::own_file(root, vmid),
            "hookscript": target.volume, "chain": chain, "findings": check::keyed(&findings),
        });
        print_json(&json)?;
        return Ok(Exit::Success);
    }
    for finding in &findings {
        steps.line(&format!("hook check: {}: {finding}", finding.check))?;
    }
    steps.line(&format!("changed: {changed}"))?;
    let fails = findings.iter().any(|finding| finding.level == Level::Error);
    if fails {
        steps.line(&format!(
            "next: correct the errors above; hook check {vmid}"
        ))?;
        return Ok(Exit::Partial);
    }
    if !args.dry_run {
        steps.line(&format!(
            "next: hook plan {vmid}; qm start {vmid}; hook status"
        ))?;
    }
    Ok(Exit::Success)
}

/// Checks what no step could repair.
fn check_host(root: &Host, vmid: VmId, conf: &VmConf) -> anyhow::Result<()> {
    ensure!(
        !conf.template,
        "VM {vmid} is a template, whose guest never runs; install hook for its clones"
    );
    ensure!(
        !vm::lacks_quorum(root),
        "/{} is read-only: the cluster has no quorum (pvecm status)",
        vm::SHARED_FOLDER
    );
    cgroup::check_unified(root)?;
    // Whether there is a method at all; `hook check` judges the VM's own CPUs.
    let online = cpu::online(root)?;
    let last = online.iter().last().unwrap_or(cpu::BOOT_CPU);
    let any = format!("isolated = \"{last}\"\npins = \"{last}\"\n");
    let any = settings::resolve(root, &any, &format!("VM {vmid}"), 1)?;
    required::isolation(
        root,
        &Siblings::default(),
        &BTreeMap::new(),
        vmid,
        &any,
        None,
    )?;
    Ok(())
}

/// Whether the VM has no settings that give it CPUs, and no file of its own.
fn needs_settings(root: &Host, vmid: VmId, conf: &VmConf) -> anyhow::Result<bool> {
    let has_own = settings::own_file(root, vmid).is_some();
    match settings::load(root, vmid, conf.threads_per_core(), &[]) {
        Ok(Loaded::Fenced(settings)) => Ok(settings.is_built_in()),
        Ok(Loaded::Unfenced { .. }) => Ok(!has_own),
        Err(error) if has_own => Err(error.into()),
        Err(_) => Ok(true),
    }
}

/// Where the hookscript is to be, and what that takes.
#[derive(Debug)]
struct Target {
    storage: String,
    volume: String,
    /// What the storage has to be set to.
    content: Option<String>,
    /// The path of the link to make, below the root.
    link: Option<String>,
}

fn target(root: &Host, args: &Args, conf: &VmConf) -> anyhow::Result<Target> {
    let storages = vm::storages(root)?;
    let node = vm::node(root).unwrap_or_default();
    let usable = |storage: &&Storage| storage.is_on(&node) && storage.path.is_some();
    let named = |id: &str| {
        let mut usable = storages.iter().filter(usable);
        usable.find(|storage| storage.id == id)
    };
    // A hook that is set already stays where it is.
    let current = conf.hookscript.as_deref().and_then(|volume| {
        let (id, name) = volume.split_once(":snippets/")?;
        let storage = named(id)?;
        let is_hook = match snippet::look(root, &storage.snippet(name)?) {
            Found::Hook | Found::Link => true,
            Found::Nothing => name == snippet::NAME,
            Found::Other => false,
        };
        is_hook.then_some((storage, name))
    });
    let (storage, name) = match (current, &args.storage) {
        (Some(current), None) => current,
        (_, Some(id)) => match named(id) {
            Some(storage) => (storage, snippet::NAME),
            None => {
                let ids = storages.iter().filter(usable).map(|one| one.id.as_str());
                bail!(
                    "storage {id}: not a storage of this node with a folder; there is {}",
                    ids.collect::<Vec<_>>().join(", ")
                )
            }
        },
        (None, None) => {
            let with = |storage: &&Storage| storage.has_snippets();
            let first = storages.iter().filter(usable).find(with);
            let local = named(LOCAL);
            match local.filter(with).or(first).or(local) {
                Some(storage) => (storage, snippet::NAME),
                None => bail!(
                    "no storage of this node has a folder for snippets, from where Proxmox VE runs hookscripts; \
                     add one: pvesm add dir snippets --path /var/lib/snippets --content snippets"
                ),
            }
        }
    };
    let Some(path) = storage.snippet(name) else {
        bail!("storage {}: it has no folder", storage.id);
    };
    let link = match snippet::look(root, &path) {
        Found::Hook | Found::Link => None,
        Found::Nothing => Some(path),
        Found::Other => bail!(
            "{}: this file is not hook; remove it, or choose another storage with --storage",
            root.path(path).display()
        ),
    };
    let content = (!storage.has_snippets()).then(|| {
        let mut content = storage.content.clone();
        content.retain(|what| what != "none");
        content.push("snippets".to_owned());
        content.join(",")
    });
    Ok(Target {
        storage: storage.id.clone(),
        volume: format!("{}:snippets/{name}", storage.id),
        content,
        link,
    })
}

/// Makes the hookscript that the VM has one that hook runs.
fn keep_earlier(
    root: &Host,
    vmid: VmId,
    earlier: &str,
    is_new: bool,
    steps: &mut Steps<'_>,
) -> anyhow::Result<()> {
    if vm::snippet(root, earlier)
        .is_some_and(|(_, path)| matches!(snippet::look(root, &path), Found::Hook | Found::Link))
    {
        return Ok(());
    }
    if settings::chain(root, vmid)
        .0
        .iter()
        .any(|known| known == earlier)
    {
        return Ok(());
    }
    let file = settings::own_file(root, vmid).unwrap_or_else(|| settings::node_file(root, vmid));
    let what = format!(
        "earlier hookscript, which hook runs too, in {}",
        file.display()
    );
    // Only printed, a new file is not there.
    if !(is_new && steps.dry_run) {
        settings::with_chain(root, vmid, earlier)?;
    }
    steps.step(&what, &format!("chain = [{earlier:?}]"), || {
        Ok(settings::add_chain(root, vmid, earlier)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{MadeUpHost, quiet};
    use crate::snippet::NAME;
    use std::cell::RefCell;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    const CONF: &str = "etc/pve/qemu-server/100.conf";
    const OLD: &str = "var/lib/vz/snippets/old.pl";

    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.conf(100, "cores: 4");
        host.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory");
        host.file("usr/sbin/hook", "pinfold hook");
        for cpu in 1..24 {
            let online = format!("sys/devices/system/cpu/cpu{cpu}/online");
            host.file(&online, "1");
        }
        host
    }

    fn old_script(host: &MadeUpHost) {
        host.conf(100, "cores: 4\nhookscript: local:snippets/old.pl");
        host.file(OLD, "#!/usr/bin/perl\n");
        host.mode(OLD, 0o755);
    }

    /// What Proxmox VE's programs were called with; they do as the real ones.
    fn install_on(host: &MadeUpHost, more: &[&str]) -> (Result<(), String>, Vec<String>) {
        let calls = RefCell::new(Vec::new());
        let programs = |program: &str, args: &[&str]| {
            calls
                .borrow_mut()
                .push(format!("{program} {}", args.join(" ")));
            if let ["set", "100", "--hookscript", volume] = args {
                let conf = host.root.read(CONF).unwrap();
                let kept = conf.lines().filter(|line| !line.starts_with("hookscript"));
                let kept: String = kept.map(|line| format!("{line}\n")).collect();
                host.file(CONF, &format!("{kept}hookscript: {volume}\n"));
            }
            Ok(())
        };
        let args = Args {
            vmid: "100".parse().unwrap(),
            storage: more
                .first()
                .filter(|it| !it.starts_with('-'))
                .map(|it| (*it).to_owned()),
            yes: more.contains(&"--yes"),
            dry_run: more.contains(&"-n"),
        };
        let ended = install(&host.root, &args, &quiet(&host.root), &programs);
        let ended = ended.map(drop).map_err(|error| {
            let base = format!("{}/", host.root.path("").display()).replace("//", "/");
            format!("{error:#}").replace(&base, "/")
        });
        (ended, calls.into_inner())
    }

    #[test]
    fn a_vm_is_installed_once() {
        let host = host();
        let before = host.snapshot();
        assert_eq!(install_on(&host, &["-n"]), (Ok(()), Vec::new()));
        assert_eq!(host.snapshot(), before);
        let set = "qm set 100 --hookscript local:snippets/hook".to_owned();
        assert_eq!(install_on(&host, &[]), (Ok(()), vec![set]));
        let link = host.root.path(format!("var/lib/vz/snippets/{NAME}"));
        assert_eq!(link.read_link().unwrap(), PathBuf::from("/usr/sbin/hook"));
        assert!(host.root.exists("etc/pinfold/100.toml"));
        let before = host.snapshot();
        assert_eq!(install_on(&host, &[]), (Ok(()), Vec::new()));
        assert_eq!(host.snapshot(), before);
    }

    #[test]
    fn a_hookscript_is_kept() {
        let host = host();
        old_script(&host);
        let set = "qm set 100 --hookscript local:snippets/hook".to_owned();
        assert_eq!(install_on(&host, &[]), (Ok(()), vec![set]));
        let text = host.root.read("etc/pinfold/100.toml").unwrap();
        assert!(
            text.starts_with("chain = [\"local:snippets/old.pl\"]\n"),
            "{text}"
        );
        assert!(settings::load(&host.root, "100".parse().unwrap(), 1, &[]).is_ok());
        assert_eq!(install_on(&host, &[]), (Ok(()), Vec::new()));
    }

    #[test]
    fn snippets_are_where_a_storage_allows_them() {
        let storages = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,backup\n\n\
                        dir: own\n\tpath /srv\n\tcontent-dirs snippets=scripts\n\tcontent snippets\n";
        let host = host();
        host.file("etc/pve/storage.cfg", storages);
        let set = "qm set 100 --hookscript own:snippets/hook".to_owned();
        assert_eq!(install_on(&host, &[]), (Ok(()), vec![set]));
        assert!(host.root.path("srv/scripts/hook").read_link().is_ok());
        let (ended, calls) = install_on(&host, &["local", "--yes"]);
        assert_eq!(ended, Ok(()));
        assert_eq!(
            calls,
            [
                "pvesm set local --content iso,backup,snippets",
                "qm set 100 --hookscript local:snippets/hook"
            ]
        );
    }

    type Spoil = fn(&MadeUpHost);

    /// The texts of steps that fail, word for word.
    #[test]
    fn failures_name_the_next_step() {
        let cases: &[(Spoil, &[&str], &str)] = &[
            (
                |host| {
                    host.file(
                        "etc/pve/storage.cfg",
                        "dir: local\n\tpath /var/lib/vz\n\tdisable\n",
                    )
                },
                &[],
                "no storage of this node has a folder for snippets, from where Proxmox VE runs hookscripts; \
                 add one: pvesm add dir snippets --path /var/lib/snippets --content snippets",
            ),
            (
                |host| host.file("etc/pve/storage.cfg", "dir: local\n\tcontent iso,backup\n"),
                &[],
                "storage local does not allow snippets, from where Proxmox VE runs hookscripts; \
                 run `pvesm set local --content iso,backup,snippets`, or let hook do so: hook install 100 --yes",
            ),
            (
                |_| {},
                &["nas"],
                "storage nas: not a storage of this node with a folder; there is local",
            ),
            (
                |host| fs::remove_file(host.root.path("sys/fs/cgroup/cgroup.controllers")).unwrap(),
                &[],
                "/sys/fs/cgroup/cgroup.controllers: no unified cgroup hierarchy (v2) here; \
                 boot without systemd.unified_cgroup_hierarchy=0",
            ),
            (
                |host| {
                    fs::remove_file(host.root.path("sys/devices/system/cpu/cpu23/online")).unwrap()
                },
                &[],
                "CPU 23: this kernel cannot take all of them offline",
            ),
            (
                |host| host.file("var/lib/vz/snippets/hook", "#!/bin/sh\n"),
                &[],
                "/var/lib/vz/snippets/hook: this file is not hook; remove it, or choose another storage with --storage",
            ),
            (
                |host| host.file("etc/pve/.members", "{\"cluster\": {\"quorate\": 0}}"),
                &[],
                "/etc/pve is read-only: the cluster has no quorum (pvecm status)",
            ),
            (
                |host| host.conf(100, "template: 1"),
                &[],
                "VM 100 is a template, whose guest never runs; install hook for its clones",
            ),
            (
                |host| fs::remove_file(host.root.path(CONF)).unwrap(),
                &[],
                "VM 100: no such VM on this node: there is no /etc/pve/qemu-server/100.conf",
            ),
            (
                |host| {
                    old_script(host);
                    let text = "isolated = \"6-9\"\npins = \"auto\"\n";
                    host.file("etc/pinfold/default.toml", text);
                    let mode = fs::Permissions::from_mode(0o644);
                    fs::set_permissions(host.root.path("etc/pinfold/default.toml"), mode).unwrap();
                },
                &[],
                "VM 100: without a settings file of its own, its earlier hookscript cannot be kept; \
                 write one: hook init 100",
            ),
        ];
        for (spoil, more, expected) in cases {
            let host = host();
            spoil(&host);
            let before = host.snapshot();
            let (ended, calls) = install_on(&host, more);
            assert_eq!(ended.unwrap_err(), *expected);
            assert_eq!(host.snapshot(), before, "{expected}");
            assert!(calls.is_empty(), "{calls:?}");
        }
    }

    #[test]
    fn below_another_root_no_program_is_run() {
        let host = host();
        let error = programs(&host.root)("qm", &["set"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "qm works on the running host only, not below --sysroot"
        );
    }
}

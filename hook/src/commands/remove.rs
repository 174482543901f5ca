//! `hook remove`: back to a VM, or a node, without hook.

use std::collections::BTreeMap;

use pinfold_core::cli::terminal::print_json;
use pinfold_core::cli::{Output, print_error};
use pinfold_core::state::Store;
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{Exit, Host};
use serde_json::json;

use super::install::{Programs, Steps, programs};
use super::needs_root;
use crate::own_steps::TOOL;
use crate::phases::Run;
use crate::settings;
use crate::snippet::{self, Found};
use crate::state::reservation::Reservation;

/// The options of `hook remove`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM's number
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub vmid: Option<VmId>,
    /// All VMs of this node that use hook, and its link among the snippets
    #[arg(long)]
    pub all: bool,
    /// Remove the VM's settings on this node too
    #[arg(long)]
    pub purge: bool,
    /// Print the steps and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// The command's whole run.
///
/// # Errors
/// What keeps a VM from being removed; what was done before stays, and the next run goes on there.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let root = output.root();
    needs_root(&root, args.dry_run)?;
    remove(&root, args, output, &programs(&root))
}

fn remove(
    root: &Host,
    args: &Args,
    output: &Output,
    programs: Programs<'_>,
) -> anyhow::Result<Exit> {
    let reserved = Store::<Reservation>::peek(root)?
        .unwrap_or_default()
        .reservations;
    let vmids = match args.vmid {
        Some(vmid) => {
            vm::check_exists(root, vmid)?;
            vec![vmid]
        }
        None => {
            let calls_hook = |vmid: &VmId| {
                vm::conf(root, *vmid).is_ok_and(|conf| hook_of(root, &conf).is_some())
            };
            let mut vmids = vm::all(root)?;
            vmids.retain(|vmid| {
                calls_hook(vmid)
                    || reserved.contains_key(&(*vmid).into())
                    || args.purge && !settings::node_files(root, *vmid).is_empty()
            });
            vmids.sort_unstable();
            vmids
        }
    };
    let mut steps = Steps::new(output, args.dry_run);
    let mut gone = Vec::new();
    let mut exit = Exit::Success;
    for vmid in &vmids {
        match remove_vm(root, args, *vmid, &reserved, programs, &mut steps) {
            Ok(removed) => gone.extend(removed),
            Err(error) if args.all => {
                print_error(TOOL, &error);
                exit = Exit::Partial;
            }
            Err(error) => return Err(error),
        }
    }
    if args.all {
        remove_links(root, &gone, &mut steps)?;
    }
    let changed = steps.changed();
    if output.json {
        let vmids: Vec<u32> = vmids.into_iter().map(u32::from).collect();
        let json = json!({
            "vms": vmids, "changed": changed, "dry_run": args.dry_run, "steps": steps.done,
        });
        print_json(&json)?;
    } else {
        if steps.done.is_empty() {
            steps.line(&match args.vmid {
                Some(vmid) => format!("VM {vmid} does not use hook; nothing to do"),
                None => "no VM of this node uses hook; nothing to do".to_owned(),
            })?;
        }
        steps.line(&format!("changed: {changed}"))?;
    }
    Ok(exit)
}

/// The volume of a VM's hookscript, if that is hook.
fn hook_of(root: &Host, conf: &VmConf) -> Option<String> {
    let volume = conf.hookscript.clone()?;
    let name = volume.rsplit('/').next();
    let is_hook = match vm::snippet(root, &volume) {
        Some((_, path)) => match snippet::look(root, &path) {
            Found::Hook | Found::Link => true,
            Found::Nothing => name == Some(snippet::NAME),
            Found::Other => false,
        },
        None => name == Some(snippet::NAME),
    };
    is_hook.then_some(volume)
}

/// Removes a VM; returns the volume that it no longer names.
fn remove_vm(
    root: &Host,
    args: &Args,
    vmid: VmId,
    reserved: &BTreeMap<u32, Reservation>,
    programs: Programs<'_>,
    steps: &mut Steps<'_>,
) -> anyhow::Result<Option<(VmId, String)>> {
    let id = vmid.to_string();
    let conf = vm::conf(root, vmid)?;
    let volume = hook_of(root, &conf);
    // Before anything is released: without it the VM would lose its earlier hookscript.
    let chain = match (reserved.get(&vmid.into()), &volume) {
        (_, None) => Vec::new(),
        (Some(reservation), _) => reservation.settings.chain.clone(),
        (None, _) => settings::chain_of(root, vmid)?,
    };
    if let [first, _, ..] = chain.as_slice() {
        anyhow::bail!(
            "VM {vmid} has {} other hookscripts, and Proxmox VE calls only one: choose it \
             (qm set {id} --hookscript {first}), then run this again",
            chain.len()
        );
    }
    if let Some(reservation) = reserved.get(&vmid.into()) {
        let what = match reservation.is_fenced() {
            true => format!("CPU {} of VM {vmid}", reservation.settings.isolated),
            false => format!("reservation of VM {vmid}"),
        };
        let output = steps.output;
        steps.step(&what, "release", || {
            let mut report = Output {
                json: false,
                ..output.clone()
            }
            .report(TOOL)
            .for_log();
            let mut run = Run {
                root: root.clone(),
                report: &mut report,
                migrated_from: None,
            };
            run.unfence(vmid)?;
            match report.failures() {
                0 => Ok(()),
                _ => anyhow::bail!("VM {vmid}: not all of its CPUs' state could be restored"),
            }
        })?;
    }
    if volume.is_some() {
        let what = format!("hookscript of VM {vmid}");
        match chain.first() {
            None => steps.step(&what, &format!("qm set {id} --delete hookscript"), || {
                Ok(programs("qm", &["set", &id, "--delete", "hookscript"])?)
            })?,
            Some(earlier) => {
                steps.step(
                    &what,
                    &format!("qm set {id} --hookscript {earlier}"),
                    || Ok(programs("qm", &["set", &id, "--hookscript", earlier])?),
                )?;
            }
        }
    }
    if args.purge {
        for file in settings::node_files(root, vmid) {
            let shown = file.display().to_string();
            steps.step(
                &format!("settings of VM {vmid}"),
                &format!("rm {shown}"),
                || Ok(settings::remove(&file)?),
            )?;
        }
    }
    Ok(volume.map(|volume| (vmid, volume)))
}

/// Removes the links to this program that no guest of any node names, but for those named by VMs
/// that are `gone`.
fn remove_links(root: &Host, gone: &[(VmId, String)], steps: &mut Steps<'_>) -> anyhow::Result<()> {
    let guests = vm::guests(root);
    let node = vm::node(root).unwrap_or_default();
    for storage in vm::storages(root)? {
        let Some(path) = storage
            .snippet(snippet::NAME)
            .filter(|_| storage.is_on(&node))
        else {
            continue;
        };
        let volume = format!("{}:snippets/{}", storage.id, snippet::NAME);
        let is_gone = |vmid| {
            gone.iter()
                .any(|(known, named)| *known == vmid && *named == volume)
        };
        let names_it = |guest: &&vm::Guest| guest.hookscript.as_ref() == Some(&volume);
        let user = guests
            .iter()
            .filter(names_it)
            .find(|guest| !is_gone(guest.vmid));
        if snippet::look(root, &path) != Found::Link {
            continue;
        }
        if let Some(user) = user {
            let place = user.node.as_deref().filter(|_| !user.is_here);
            let place = place
                .map(|node| format!(" on node {node}"))
                .unwrap_or_default();
            steps.line(&format!(
                "{volume} stays: guest {}{place} names it",
                user.vmid
            ))?;
            continue;
        }
        let full = root.path(&path);
        let command = format!("rm {}", full.display());
        steps.step("hook among the snippets", &command, || {
            Ok(snippet::unlink(root, &path)?)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{MadeUpHost, quiet};
    use crate::state::reservation::Phase;
    use std::cell::RefCell;

    const SETTINGS: &str = "isolated = \"6,18\"\npins = \"6,18\"\ngovernor = \"keep\"\n";

    fn host() -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        host.file("usr/sbin/hook", "pinfold hook");
        snippet::link(&host.root, "var/lib/vz/snippets/hook").unwrap();
        for id in [100, 101] {
            host.conf(id, "cores: 2\nhookscript: local:snippets/hook");
        }
        host.conf(102, "cores: 2\nhookscript: local:snippets/other.pl");
        host.settings(100, SETTINGS);
        host.settings(
            101,
            &format!("chain = [\"local:snippets/old.pl\"]\n{SETTINGS}"),
        );
        host
    }

    fn remove_on(host: &MadeUpHost, vmid: Option<u32>, purge: bool) -> Vec<String> {
        let calls = RefCell::new(Vec::new());
        let programs = |program: &str, args: &[&str]| {
            calls
                .borrow_mut()
                .push(format!("{program} {}", args.join(" ")));
            let script = match args {
                ["set", _, "--hookscript", volume] => format!("\nhookscript: {volume}"),
                _ => String::new(),
            };
            host.conf(args[1].parse().unwrap(), &format!("cores: 2{script}"));
            Ok(())
        };
        let args = Args {
            vmid: vmid.map(|id| id.try_into().unwrap()),
            all: vmid.is_none(),
            purge,
            dry_run: false,
        };
        remove(&host.root, &args, &quiet(&host.root), &programs).unwrap();
        calls.into_inner()
    }

    #[test]
    fn a_vm_gets_back_its_earlier_hookscript() {
        let host = host();
        assert_eq!(
            remove_on(&host, Some(101), false),
            ["qm set 101 --hookscript local:snippets/old.pl"]
        );
        assert!(host.root.exists("etc/pinfold/101.toml"));
        assert_eq!(remove_on(&host, Some(101), false), [""; 0]);
        assert_eq!(
            remove_on(&host, Some(100), true),
            ["qm set 100 --delete hookscript"]
        );
        assert!(!host.root.exists("etc/pinfold/100.toml"));
        assert!(
            host.root
                .path("var/lib/vz/snippets/hook")
                .read_link()
                .is_ok()
        );
    }

    #[test]
    fn all_of_them_and_the_link() {
        let host = host();
        host.file(
            "etc/pve/nodes/pve2/qemu-server/110.conf",
            "hookscript: local:snippets/hook\n",
        );
        let link = host.root.path("var/lib/vz/snippets/hook");
        assert_eq!(
            remove_on(&host, None, false),
            [
                "qm set 100 --delete hookscript",
                "qm set 101 --hookscript local:snippets/old.pl"
            ]
        );
        assert!(link.read_link().is_ok(), "a VM of pve2 names it");
        host.file("etc/pve/nodes/pve2/qemu-server/110.conf", "");
        assert_eq!(remove_on(&host, None, true), [""; 0]);
        assert!(link.read_link().is_err());
        assert!(!host.root.exists("etc/pinfold"));
    }

    #[test]
    fn a_reservation_is_released() {
        let host = host();
        host.reserve(100, Phase::Starting, SETTINGS);
        remove_on(&host, Some(100), false);
        let state = Store::<Reservation>::peek(&host.root).unwrap();
        assert!(state.is_none_or(|state| state.reservations.is_empty()));
    }
}

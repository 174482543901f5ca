//! cg-slice: restricts the host's slices to a set of CPUs, and moves a VM out of its slice and back.
//!
//! A thread can be pinned only within the cpuset of its cgroup: while qemu.slice is restricted to the
//! housekeeping CPUs, no thread of a VM in it can be pinned elsewhere. So a VM that is to run on
//! isolated CPUs is *decoupled*: moved, with every process of its scope, to a cgroup of its own at
//! the top of the tree, which allows all CPUs.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pinfold_core::cli::{self, Common};
use pinfold_core::knob::{ABSENT, PRESENT, Value};
use pinfold_core::state::save::Entry;
use pinfold_core::sys::{cgroup, cpu, task};
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{
    Change, CpuSet, Error, Exit, Host, Knob, Selector, Setting, Table, systemd, vm,
};

pub mod partition;

const TOOL: &str = "cg-slice";

/// The slice of decoupled VMs, at the top of the cgroup tree.
///
/// To systemd this name means a child of qemu.slice, so `systemctl set-property` never reaches the
/// folder.
pub const DECOUPLED: &str = "qemu-decoupled.slice";

/// Restrict slices to CPUs, move a VM out of qemu.slice and back, make cpuset partitions
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
#[command(arg_required_else_help = true, mut_args(|arg| arg.global(true)))]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Restrict slices, scopes and other top cgroups to these CPUs
    Allow {
        /// CPUs by logical number, as in 0-5,12-17, or by selector, as in llc:0; see `hook layout`
        cpus: Selector,
        /// Units or top cgroups [default: all children of the root cgroup except those of VMs]
        units: Vec<String>,
    },
    /// Move a VM with every process of its scope to a cgroup of its own that allows all CPUs
    Decouple {
        /// The VM's number
        vmid: VmId,
    },
    /// Move a decoupled VM back to its scope in qemu.slice
    Couple {
        /// The VM's number
        vmid: VmId,
    },
    /// Make, show and undo cpuset partitions: CPUs that belong to one cgroup only
    Partition {
        #[command(subcommand)]
        verb: PartitionVerb,
    },
}

#[derive(Debug, Subcommand)]
enum PartitionVerb {
    /// Make a cgroup an isolated partition of these CPUs, and keep everything else off them
    Make {
        /// Its path below the cgroup root, as in machine.slice/x.scope
        cgroup: String,
        /// CPUs by logical number, as in 6-11,18-23, or by selector, as in llc:1; see `hook layout`
        cpus: Selector,
    },
    /// Print all partitions, and the cgroups that have exclusive CPUs
    Show {
        /// Only below this cgroup
        #[arg(default_value = "/")]
        cgroup: String,
    },
    /// Make a partition an ordinary cgroup again
    Undo {
        /// Its path below the cgroup root
        cgroup: String,
    },
}

/// Whether a knob is one that this tool sets, or that changes with a partition.
fn is_own(knob: &Knob) -> bool {
    matches!(
        knob,
        Knob::UnitCpus(_)
            | Knob::UnitOverrides
            | Knob::CgroupCpus(_)
            | Knob::Cgroup(_)
            | Knob::CgroupOf(_)
            | Knob::CgroupOfThread(_)
            | Knob::ThreadedCgroup(_)
            | Knob::ChildCpusets(_)
            | Knob::ExclusiveCpus(_)
            | Knob::Partition(_)
            | Knob::Kthread(_)
            | Knob::Workqueues
    )
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let root = args.common.output.root();
    let mut report = args.common.output.report(TOOL);
    if args.common.list {
        return Ok(cli::listed(&mut report, &list(&root)?));
    }
    if let Some(exit) = args.common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let changes = match args.verb {
        None => {
            report.error(
                "nothing to do; use allow, decouple, couple, partition, --list or --restore FILE",
            );
            return Ok(Exit::Usage);
        }
        Some(Verb::Allow { cpus, units }) => {
            let changes = plan_allow(&root, &cpus.resolve(&root)?, units)?;
            let entries = entries(&root, &changes)?;
            return args
                .common
                .carry_out_saving(&root, &mut report, TOOL, changes, entries);
        }
        Some(Verb::Decouple { vmid }) => {
            plan_decouple(&root, vmid, &vm::require_running(&root, vmid)?)?
        }
        Some(Verb::Couple { vmid }) => {
            plan_couple(&root, vmid, &vm::require_running(&root, vmid)?)?
        }
        Some(Verb::Partition { verb }) => match verb {
            PartitionVerb::Make { cgroup, cpus } => {
                let changes = partition::plan_make(&root, named(&cgroup)?, &cpus.resolve(&root)?)?;
                // They include all kernel threads.
                let entries = match args.common.save {
                    Some(_) => partition::entries(&root, &changes)?,
                    None => Vec::new(),
                };
                return args
                    .common
                    .carry_out_saving(&root, &mut report, TOOL, changes, entries);
            }
            PartitionVerb::Show { cgroup } => {
                return Ok(cli::listed(&mut report, &partition::list(&root, &cgroup)?));
            }
            PartitionVerb::Undo { cgroup } => partition::plan_undo(&root, named(&cgroup)?)?,
        },
    };
    args.common.carry_out(&root, &mut report, TOOL, changes)
}

/// A cgroup's path as typed: below the cgroup root, with or without the leading slash of
/// `systemd-cgls`.
fn named(cgroup: &str) -> pinfold_core::Result<&str> {
    let cgroup = cgroup.trim_matches('/');
    Knob::Partition(cgroup.to_owned()).check()?;
    Ok(cgroup)
}

/// The top cgroups that everything but the VMs lives in, those of `units` or all: systemd's units
/// with their AllowedCPUs=, the others (PVE's /lxc) with their cpuset.cpus. Units come first: they
/// make systemd enable the cpuset controller.
///
/// # Errors
/// If the tree cannot be read, systemd does not answer, or one of `units` is neither a unit nor
/// a top cgroup.
pub fn settings(root: &Host, units: Vec<String>) -> pinfold_core::Result<Vec<Setting>> {
    cgroup::check_unified(root)?;
    let asked = !units.is_empty();
    let names = if asked {
        units
    } else {
        let mut names = cgroup::children(root, "")?;
        names.retain(|name| name != vm::SLICE && name != DECOUPLED);
        names
    };
    let unit_names: Vec<String> = names
        .iter()
        .filter(|name| systemd::is_unit_name(name))
        .cloned()
        .collect();
    let known = systemd::allowed_cpus_of(root.systemd(), root, &unit_names)?;
    let mut objects = Vec::with_capacity(names.len());
    let mut raw = Vec::new();
    for name in names {
        // systemd makes up any slice that is asked for; one without a cgroup holds nothing.
        let made_up = name.ends_with(".slice") && !root.exists(cgroup::path(&slice_path(&name)));
        if let Some(cpus) = known.get(&name).filter(|_| !made_up) {
            objects.push(Setting::new(Knob::UnitCpus(name.clone()), name, cpus));
            continue;
        }
        let knob = Knob::CgroupCpus(name.trim_start_matches('/').to_owned());
        knob.check()?;
        match knob.read(root)? {
            Some(found) => raw.push(Setting::new(knob.clone(), knob.to_string(), found)),
            None if asked => {
                let why = "neither a unit that systemd has loaded nor a cgroup; \
                           see `systemctl list-units -t slice,scope`";
                return Err(Error::unusable(name, why));
            }
            None => {}
        }
    }
    objects.extend(raw);
    Ok(objects)
}

/// A slice's cgroup: `a-b.slice` is in `a.slice`, see systemd.slice(5).
fn slice_path(slice: &str) -> String {
    let stem = slice.trim_end_matches(".slice");
    let ends = stem
        .char_indices()
        .filter(|(_, c)| *c == '-')
        .map(|(end, _)| end)
        .chain([stem.len()]);
    ends.map(|end| format!("{}.slice", &stem[..end]))
        .collect::<Vec<_>>()
        .join("/")
}

fn plan_allow(root: &Host, cpus: &CpuSet, units: Vec<String>) -> pinfold_core::Result<Vec<Change>> {
    cpu::check_present(root, cpus)?;
    let online = &cpu::online(root)? & cpus;
    if online.is_empty() {
        return Err(Error::unusable(
            format!("CPU {cpus}"),
            "all offline; nothing could run",
        ));
    }
    let by_name = !units.is_empty();
    Ok(settings(root, units)?
        .into_iter()
        // Left out unless named, like the slice of Proxmox VE's VMs.
        .filter(|object| by_name || !is_machines(&object.knob))
        .map(|object| object.want(cpus))
        .collect())
}

/// Whether this is the slice in which systemd and libvirt put other VMs and containers, see
/// systemd.special(7).
fn is_machines(knob: &Knob) -> bool {
    matches!(knob, Knob::UnitCpus(name) | Knob::CgroupCpus(name) if name == "machine.slice")
}

/// The entries of a saved file: the overrides first, which are restored last.
fn entries(root: &Host, changes: &[Change]) -> pinfold_core::Result<Vec<Entry>> {
    let overrides = overrides(root)?;
    let mut set: Vec<&str> = words(&overrides.found).collect();
    let changed = || changes.iter().filter(|change| !change.is_noop());
    set.extend(changed().filter_map(|change| match &change.knob {
        Knob::UnitCpus(unit) => Some(unit.as_str()),
        _ => None,
    }));
    set.sort_unstable();
    set.dedup();
    let set = Value::text(set.join(" "));
    let overrides = overrides.want(set);
    Ok(std::iter::once(Entry::from(&overrides))
        .filter(|entry| entry.before != entry.set)
        .chain(changed().map(Entry::from))
        .collect())
}

/// The units whose AllowedCPUs= is overridden until the next boot, as an object to change. Setting
/// a unit creates an override, which is removed once the unit has its old value.
///
/// # Errors
/// Where /run/systemd cannot be listed.
pub fn overrides(root: &Host) -> pinfold_core::Result<Setting> {
    let knob = Knob::UnitOverrides;
    let found = knob.read(root)?.unwrap_or_else(|| Value::text(""));
    Ok(Setting::new(knob.clone(), knob.to_string(), found))
}

/// The change that removes the overrides that were not there `before`, of these units only, and a
/// folder that is left empty.
pub fn plan_overrides(overrides: Setting, before: Option<&Value>, units: &[String]) -> Change {
    let before: Vec<&str> = before.into_iter().flat_map(words).collect();
    let ours = |unit: &str| unit.ends_with('/') || units.iter().any(|ours| ours == unit);
    let stays = |unit: &&str| before.contains(unit) || !ours(unit);
    let kept: Vec<&str> = words(&overrides.found).filter(stays).collect();
    let kept = Value::text(kept.join(" "));
    overrides.want(kept)
}

/// The units in a value of [`Knob::UnitOverrides`].
fn words(units: &Value) -> impl Iterator<Item = &str> {
    units.as_text().unwrap_or_default().split_whitespace()
}

/// The cgroup of a decoupled VM, below the root of the tree.
pub fn decoupled_cgroup(vmid: VmId) -> String {
    format!("{DECOUPLED}/{}", vm::scope_unit(vmid))
}

/// The cgroup that a VM is started in, below the root of the tree.
pub fn usual_scope(vmid: VmId) -> String {
    format!("{}/{}", vm::SLICE, vm::scope_unit(vmid))
}

/// The scope that a VM runs in, below the root of the tree.
///
/// # Errors
/// [`Error::Unusable`] if it is not in a scope of its own; one that [is gone](Error::is_gone) if
/// QEMU has ended.
pub fn scope(root: &Host, vmid: VmId, qemu: &Qemu) -> pinfold_core::Result<String> {
    scope_of(vmid, &cgroup::of_process(root, qemu.id.pid)?)
}

/// As [`scope`], by the cgroup that the VM's QEMU is in.
///
/// # Errors
/// [`Error::Unusable`] if that is not a scope of its own.
pub fn scope_of(vmid: VmId, cgroup: &str) -> pinfold_core::Result<String> {
    let unit = vm::scope_unit(vmid);
    if !cgroup.ends_with(&format!("/{unit}"))
        || cgroup.trim_start_matches('/') == decoupled_cgroup(vmid)
    {
        let why = format!("its QEMU is in {cgroup}, not in its own scope {unit}");
        return Err(Error::unusable(format!("VM {vmid}"), why));
    }
    Ok(cgroup.trim_start_matches('/').to_owned())
}

/// The changes that take a VM out of its scope: two cgroups made, every process of the scope moved.
/// None if the VM is out already.
///
/// # Errors
/// If QEMU has ended or the tree cannot be read.
pub fn plan_decouple(root: &Host, vmid: VmId, qemu: &Qemu) -> pinfold_core::Result<Vec<Change>> {
    cgroup::check_unified(root)?;
    let from = cgroup::of_process(root, qemu.id.pid)?;
    let to = decoupled_cgroup(vmid);
    let mut changes: Vec<Change> = [DECOUPLED, &to]
        .into_iter()
        .map(|path| folder(root, path, PRESENT))
        .collect();
    changes.extend(moves(root, vmid, qemu.id.pid, &from, &format!("/{to}"))?);
    Ok(changes)
}

/// The changes that bring a decoupled VM back to qemu.slice/VMID.scope, which systemd is asked to
/// start if it is gone.
///
/// # Errors
/// If QEMU has ended or the tree cannot be read.
pub fn plan_couple(root: &Host, vmid: VmId, qemu: &Qemu) -> pinfold_core::Result<Vec<Change>> {
    let from = cgroup::of_process(root, qemu.id.pid)?;
    let mut changes = moves(
        root,
        vmid,
        qemu.id.pid,
        &from,
        &format!("/{}", usual_scope(vmid)),
    )?;
    changes.extend(plan_remove(root, vmid));
    Ok(changes)
}

/// The changes that remove what is left of a decoupled VM: its cgroup, and the slice with the last
/// one.
pub fn plan_remove(root: &Host, vmid: VmId) -> Vec<Change> {
    let own = decoupled_cgroup(vmid);
    let unit = vm::scope_unit(vmid);
    let others = cgroup::children(root, DECOUPLED)
        .unwrap_or_default()
        .iter()
        .any(|name| *name != unit);
    let mut changes = vec![folder(root, &own, ABSENT)];
    if !others {
        changes.push(folder(root, DECOUPLED, ABSENT));
    }
    changes
}

fn folder(root: &Host, path: &str, wanted: Value) -> Change {
    let knob = Knob::Cgroup(path.to_owned());
    let found = Value::Present(root.exists(cgroup::path(path)));
    Setting::new(knob.clone(), knob.to_string(), found).want(wanted)
}

/// A VM's processes: QEMU first, then the others in its scope (swtpm, virtiofsd). If QEMU is not in
/// its own scope, only QEMU.
///
/// # Errors
/// One that [is gone](Error::is_gone) if QEMU has ended; if the tree cannot be read.
pub fn processes(root: &Host, vmid: VmId, qemu: &Qemu) -> pinfold_core::Result<Vec<i32>> {
    processes_in(
        root,
        vmid,
        qemu.id.pid,
        &cgroup::of_process(root, qemu.id.pid)?,
    )
}

fn processes_in(
    root: &Host,
    vmid: VmId,
    qemu: i32,
    cgroup: &str,
) -> pinfold_core::Result<Vec<i32>> {
    let mut pids = vec![qemu];
    if cgroup.ends_with(&format!("/{}", vm::scope_unit(vmid))) {
        pids.extend(
            cgroup::processes(root, cgroup)?
                .into_iter()
                .filter(|pid| *pid != qemu),
        );
    }
    Ok(pids)
}

fn moves(
    root: &Host,
    vmid: VmId,
    qemu: i32,
    from: &str,
    to: &str,
) -> pinfold_core::Result<Vec<Change>> {
    let pids = processes_in(root, vmid, qemu, from)?;
    let mut changes = Vec::with_capacity(pids.len());
    for pid in pids {
        match task::task(root, pid, pid) {
            Ok(task) => {
                let label = format!("process {pid} ({})", task.name);
                let setting = Setting::new(Knob::CgroupOf(task.id), label, Value::text(from));
                changes.push(setting.want(Value::text(to)));
            }
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(changes)
}

fn list(root: &Host) -> anyhow::Result<Table> {
    let mut table = Table::new(&["cgroup", "kind", "allowed cpus", "effective cpus"]);
    let mut names = cgroup::children(root, "")?;
    names.extend([vm::SLICE, DECOUPLED].iter().flat_map(|slice| {
        cgroup::children(root, slice)
            .unwrap_or_default()
            .into_iter()
            .map(move |name| format!("{slice}/{name}"))
    }));
    let units: Vec<String> = names
        .iter()
        .filter_map(|name| name.rsplit('/').next())
        .map(str::to_owned)
        .collect();
    let known = systemd::allowed_cpus_of(root.systemd(), root, &units)?;
    names.sort();
    for name in names {
        let unit = name.rsplit('/').next().unwrap_or(&name);
        let decoupled = name.starts_with(DECOUPLED);
        let (kind, allowed) = match known.get(unit).filter(|_| !decoupled) {
            Some(cpus) => ("unit", cpus.to_string()),
            None => (
                "cgroup",
                Knob::CgroupCpus(name.clone())
                    .read(root)?
                    .map_or_else(String::new, |cpus| cpus.to_string()),
            ),
        };
        let effective = root
            .read_value(cgroup::file(&name, "cpuset.cpus.effective"))?
            .unwrap_or_default();
        table.row([name, kind.to_owned(), allowed, effective]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;

    use clap::CommandFactory;
    use pinfold_core::{CpuSet, Host, Knob, apply};

    #[test]
    fn a_cgroup_whose_name_is_not_utf_8_is_narrowed_too() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir
            .path()
            .join("sys/fs/cgroup")
            .join(OsStr::from_bytes(b"a\xff\x80b"));
        let cpus = dir.path().join("sys/devices/system/cpu");
        for folder in [&cgroup, &cpus] {
            fs::create_dir_all(folder).unwrap();
        }
        for (file, text) in [
            (cpus.join("present"), "0-3"),
            (cpus.join("online"), "0-3"),
            (cgroup.with_file_name("cgroup.controllers"), "cpuset"),
            (cgroup.join("cpuset.cpus"), "0-3"),
        ] {
            fs::write(file, text).unwrap();
        }
        let root = Host::new(dir.path());
        let changes = super::plan_allow(&root, &CpuSet::range(0, 1), Vec::new()).unwrap();
        let knobs: Vec<Knob> = changes.iter().map(|change| change.knob.clone()).collect();
        assert_eq!(knobs.len(), 1, "{knobs:?}");
        apply(&root, changes);
        let set = fs::read_to_string(cgroup.join("cpuset.cpus")).unwrap();
        assert_eq!(set, "0-1");
        knobs[0].check().unwrap();
        assert_eq!(knobs[0].read(&root).unwrap().unwrap().to_string(), "0-1");
    }

    #[test]
    fn slices_are_in_slices() {
        for (slice, path) in [
            ("system.slice", "system.slice"),
            ("user-0.slice", "user.slice/user-0.slice"),
            ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
        ] {
            assert_eq!(super::slice_path(slice), path);
        }
    }

    #[test]
    fn command_line_is_valid() {
        super::Args::command().debug_assert();
    }
}

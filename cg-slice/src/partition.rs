//! Cpuset partitions: CPUs that one cgroup has for itself, with one write and for as long as the
//! cgroup lives.
//!
//! The kernel then keeps all other tasks, movable kernel threads and unbound workqueues off these
//! CPUs and balances no load on them; see cgroup-v2.rst, "cpuset.cpus.partition". It needs the
//! cpuset controller down to the cgroup, and the CPUs *exclusive* to every cgroup on the way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use pinfold_core::knob::{ABSENT, PRESENT, Value};
use pinfold_core::state::save::Entry;
use pinfold_core::sys::cgroup::{self, THREADED};
use pinfold_core::sys::{cpu, task};
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Change, CpuSet, Error, Host, Knob, Result, Setting, Table, TaskId, systemd};

/// cpuset.cpus.partition of a cgroup that is not a partition.
pub const MEMBER: &str = "member";
/// cpuset.cpus.partition of a partition without load balancing.
pub const ISOLATED: &str = "isolated";

/// The cgroup of a VM's vCPU threads, below its scope: threads of one process can be in several
/// cgroups only if these are threaded ones.
const VCPUS: &str = "vcpu";

/// The cgroup of a VM's vCPU threads, by the cgroup of its processes.
pub fn vcpu_cgroup(scope: &str) -> String {
    format!("{}/{VCPUS}", scope.trim_start_matches('/'))
}

/// Checks that this host can give these CPUs to a partition of `cgroup`, which may not exist
/// yet.
///
/// # Errors
/// [`Error::Unusable`] with what the kernel lacks, or the cgroup whose CPUs are in the
/// way: the kernel only returns EINVAL.
pub fn check(root: &Host, cgroup: &str, cpus: &CpuSet) -> Result<()> {
    check_beside(&Siblings::default(), root, cgroup, cpus)
}

/// As [`check`], with what was read for other cgroups before; for several on an unchanged host.
///
/// # Errors
/// As [`check`].
pub fn check_beside(known: &Siblings, root: &Host, cgroup: &str, cpus: &CpuSet) -> Result<()> {
    cgroup::check_unified(root)?;
    cpu::check_online(root, cpus)?;
    if cgroup::isolated(root)?.is_none() {
        let release = root
            .read_value("proc/sys/kernel/osrelease")?
            .unwrap_or_default();
        let why = "it has no cpuset.cpus.isolated, which a partition below the root needs: Linux 6.8 or newer, \
                   with the cpuset controller";
        return Err(Error::unusable(format!("kernel {release}"), why));
    }
    check_siblings(known, root, cgroup, cpus)
}

/// The CPUs of the cgroups in each one that was read.
#[derive(Debug, Default)]
pub struct Siblings(RefCell<BTreeMap<String, Rc<[Child]>>>);

/// A cgroup and its CPUs.
#[derive(Debug)]
struct Child {
    path: String,
    own: CpuSet,
    exclusive: CpuSet,
}

impl Siblings {
    /// The cgroups in `parent`; `None` if that does not exist.
    fn children(&self, root: &Host, parent: &str) -> Result<Option<Rc<[Child]>>> {
        if let Some(children) = self.0.borrow().get(parent) {
            return Ok(Some(Rc::clone(children)));
        }
        let names = match cgroup::children(root, parent) {
            Err(error) if error.is_gone() => return Ok(None),
            names => names?,
        };
        let children: Result<Rc<[Child]>> = (names.iter())
            .map(|name| {
                let path = below(parent, name);
                Ok(Child {
                    own: cpus_of(root, &Knob::CgroupCpus(path.clone()))?,
                    exclusive: cpus_of(root, &Knob::ExclusiveCpus(path.clone()))?,
                    path,
                })
            })
            .collect();
        let children = children?;
        let mut known = self.0.borrow_mut();
        known.insert(parent.to_owned(), Rc::clone(&children));
        Ok(Some(children))
    }
}

/// Checks the siblings on the path to our cgroup: none may have only CPUs of this set, or some of
/// them exclusively.
fn check_siblings(known: &Siblings, root: &Host, cgroup: &str, cpus: &CpuSet) -> Result<()> {
    let mut parent = "";
    for step in cgroup::with_ancestors(cgroup) {
        let Some(siblings) = known.children(root, parent)? else {
            return Ok(());
        };
        for Child {
            path: sibling,
            own,
            exclusive,
        } in siblings.iter().filter(|sibling| sibling.path != step)
        {
            let why = if !own.is_empty() && own.is_subset(cpus) {
                format!(
                    "its cpuset.cpus {own} is entirely in CPU {cpus}: it would have none left; \
                     give it other CPUs or stop its processes"
                )
            } else if exclusive.intersects(cpus) {
                format!(
                    "CPU {} is exclusive to it; see `cg-slice partition show`",
                    exclusive & cpus
                )
            } else {
                continue;
            };
            return Err(Error::unusable(format!("cgroup /{sibling}"), why));
        }
        parent = step;
    }
    Ok(())
}

fn below(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        name.to_owned()
    } else {
        format!("{parent}/{name}")
    }
}

/// The CPUs of a knob; none if its file is not there, as without the cpuset controller.
fn cpus_of(root: &Host, knob: &Knob) -> Result<CpuSet> {
    let found = knob.read(root)?;
    Ok(found
        .and_then(|found| found.cpus().cloned())
        .unwrap_or_default())
}

/// The changes that make a cgroup an isolated partition of these CPUs.
///
/// # Errors
/// As [`check`]; if there is no such cgroup.
pub fn plan_make(root: &Host, cgroup: &str, cpus: &CpuSet) -> Result<Vec<Change>> {
    if !root.exists(cgroup::path(cgroup)) {
        return Err(Error::unusable(
            format!("cgroup /{cgroup}"),
            "no such cgroup; see `systemd-cgls`",
        ));
    }
    check(root, cgroup, cpus)?;
    let mut changes = Vec::new();
    let way: Vec<&str> = cgroup::with_ancestors(cgroup).collect();
    let parents = std::iter::once("").chain(way[..way.len().saturating_sub(1)].iter().copied());
    for parent in parents {
        changes.extend(
            setting(root, Knob::ChildCpusets(parent.to_owned()))?.map(|it| it.want(PRESENT)),
        );
    }
    for step in way {
        // The file appears with the controller.
        let knob = Knob::ExclusiveCpus(step.to_owned());
        let found = cpus_of(root, &knob)?;
        let wanted = &found | cpus;
        changes.push(Setting::new(knob.clone(), knob.to_string(), found).want(wanted));
    }
    changes.extend(own(root, cgroup, cpus)?);
    Ok(changes)
}

/// The changes to the cgroup itself, once its CPUs are exclusive.
fn own(root: &Host, cgroup: &str, cpus: &CpuSet) -> Result<[Change; 2]> {
    let cpuset = Knob::CgroupCpus(cgroup.to_owned());
    let found = cpus_of(root, &cpuset)?;
    let partition = Knob::Partition(cgroup.to_owned());
    let state = partition.read(root)?.unwrap_or_else(|| Value::text(MEMBER));
    Ok([
        Setting::new(cpuset.clone(), format!("cpuset.cpus of /{cgroup}"), found).want(cpus),
        Setting::new(partition.clone(), partition.to_string(), state).want(Value::text(ISOLATED)),
    ])
}

/// What `--save` keeps: the masks of kernel threads first, which are restored last. If they were
/// never set, the kernel forgets them, as those of IRQs' threads, and leaves the threads on all
/// CPUs when the partition has gone.
pub(crate) fn entries(root: &Host, changes: &[Change]) -> Result<Vec<Entry>> {
    let all = Value::from(cpu::present(root)?);
    let kthreads = task::kthreads(root)?.into_iter().filter(|task| !task.bound);
    let mut entries = Vec::new();
    for task in kthreads {
        let knob = Knob::Kthread(task.id);
        if let Some(found) = knob.read(root)?.filter(|found| *found != all) {
            entries.push(Entry::from(
                &Setting::new(
                    knob,
                    format!("kthread {} ({})", task.id.pid, task.name),
                    found,
                )
                .want(&all),
            ));
        }
    }
    entries.extend(
        changes
            .iter()
            .filter(|change| !change.is_noop())
            .map(Entry::from),
    );
    Ok(entries)
}

fn setting(root: &Host, knob: Knob) -> Result<Option<Setting>> {
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

/// The changes that make a partition an ordinary cgroup again, and its CPUs usable by all.
///
/// # Errors
/// If the tree cannot be read, or the cgroup is not a partition.
pub fn plan_undo(root: &Host, cgroup: &str) -> Result<Vec<Change>> {
    let Some(partition) = setting(root, Knob::Partition(cgroup.to_owned()))? else {
        return Err(Error::unusable(
            format!("cgroup /{cgroup}"),
            "not a partition; see `cg-slice partition show`",
        ));
    };
    let cpus = cpus_of(root, &Knob::ExclusiveCpus(cgroup.to_owned()))?;
    let mut changes = vec![partition.want(Value::text(MEMBER))];
    let own = setting(root, Knob::CgroupCpus(cgroup.to_owned()))?;
    changes.extend(own.map(|it| it.want(CpuSet::new())));
    let way: Vec<&str> = cgroup::with_ancestors(cgroup).collect();
    for step in way.into_iter().rev() {
        let exclusive = setting(root, Knob::ExclusiveCpus(step.to_owned()))?;
        changes.extend(exclusive.map(|it| {
            let rest = it.found.cpus().map_or_else(CpuSet::new, |had| had - &cpus);
            it.want(rest)
        }));
    }
    Ok(changes)
}

/// Checks that systemd does not change what is made within a VM's scope.
///
/// # Errors
/// [`Error::Unusable`] if it would change it, or does not answer.
pub fn check_delegated(root: &Host, vmid: VmId) -> Result<()> {
    let scope = vm::scope_unit(vmid);
    if systemd::is_delegated(root.systemd(), root, &scope)? {
        return Ok(());
    }
    let why = "systemd would undo a partition in it: hook's pre-start did not run before this VM \
               was started. Stop and start the VM, or use the method hotplug";
    Err(Error::unusable(scope, why))
}

/// The change that makes systemd leave the inside of the VM's scope alone when the scope is started
/// next, or that ends this.
///
/// # Errors
/// If the drop-in cannot be read.
pub fn delegation(root: &Host, vmid: VmId, wanted: Value) -> Result<Option<Change>> {
    Ok(setting(root, Knob::Delegation(vm::scope_unit(vmid)))?.map(|it| it.want(wanted)))
}

/// The changes that make a partition for vCPU threads within a VM's scope, whose parents have the
/// CPUs exclusively.
///
/// # Errors
/// If the tree cannot be read.
pub fn plan_vcpus(root: &Host, scope: &str, cpus: &CpuSet) -> Result<Vec<Change>> {
    let scope = scope.trim_start_matches('/');
    let vcpus = vcpu_cgroup(scope);
    let folder = Knob::ThreadedCgroup(vcpus.clone());
    let mut changes = Vec::new();
    // In this order: one that holds processes can have controllers for its children only when these
    // hold threads.
    changes.extend(setting(root, folder)?.map(|it| it.want(Value::text(THREADED))));
    changes.extend(setting(root, Knob::ChildCpusets(scope.to_owned()))?.map(|it| it.want(PRESENT)));
    for step in [scope, &vcpus] {
        let knob = Knob::ExclusiveCpus(step.to_owned());
        let found = cpus_of(root, &knob)?;
        changes.push(Setting::new(knob.clone(), knob.to_string(), found).want(cpus));
    }
    changes.extend(own(root, &vcpus, cpus)?);
    Ok(changes)
}

/// The changes that remove the partition for vCPU threads of a VM that runs on: its threads go
/// back to the scope.
///
/// # Errors
/// If the tree cannot be read.
pub fn plan_undo_vcpus(root: &Host, scope: &str, qemu: i32) -> Result<Vec<Change>> {
    let scope = scope.trim_start_matches('/');
    let vcpus = vcpu_cgroup(scope);
    let mut changes = Vec::new();
    if !root.exists(cgroup::path(&vcpus)) {
        return Ok(changes);
    }
    changes.extend(
        setting(root, Knob::Partition(vcpus.clone()))?.map(|it| it.want(Value::text(MEMBER))),
    );
    for task in task::tasks(root, qemu)? {
        changes.extend(to_cgroup(
            root,
            task.id,
            format!("thread {} ({})", task.id.tid, task.name),
            scope,
        )?);
    }
    changes.extend(setting(root, Knob::ThreadedCgroup(vcpus))?.map(|it| it.want(ABSENT)));
    changes.extend(
        setting(root, Knob::ExclusiveCpus(scope.to_owned()))?.map(|it| it.want(CpuSet::new())),
    );
    changes.extend(setting(root, Knob::ChildCpusets(scope.to_owned()))?.map(|it| it.want(ABSENT)));
    Ok(changes)
}

/// The change that moves a thread to a cgroup among those of its process; `None` if it has
/// ended.
///
/// # Errors
/// If its cgroup cannot be read.
pub fn to_cgroup(
    root: &Host,
    task: TaskId,
    label: impl Into<Arc<str>>,
    cgroup: &str,
) -> Result<Option<Change>> {
    let found = Knob::CgroupOfThread(task).read(root)?;
    let wanted = format!("/{}", cgroup.trim_start_matches('/'));
    Ok(found.map(|found| {
        Setting::new(Knob::CgroupOfThread(task), label, found).want(Value::text(wanted))
    }))
}

/// Every cgroup that is a partition, or has CPUs for one, below `from`.
///
/// # Errors
/// If the tree cannot be read.
pub(crate) fn list(root: &Host, from: &str) -> Result<Table> {
    let mut table = Table::new(&[
        "cgroup",
        "partition",
        "cpus",
        "exclusive cpus",
        "effective cpus",
    ]);
    add_rows(root, from.trim_matches('/'), &mut table)?;
    Ok(table)
}

fn add_rows(root: &Host, cgroup: &str, table: &mut Table) -> Result<()> {
    if !cgroup.is_empty() {
        let state = Knob::Partition(cgroup.to_owned())
            .read(root)?
            .map_or_else(String::new, |state| state.to_string());
        let exclusive = cpus_of(root, &Knob::ExclusiveCpus(cgroup.to_owned()))?;
        if !exclusive.is_empty() || !matches!(state.as_str(), "" | MEMBER) {
            let effective = root
                .read_value(cgroup::file(cgroup, "cpuset.cpus.effective"))?
                .unwrap_or_default();
            table.row([
                format!("/{cgroup}"),
                state,
                cpus_of(root, &Knob::CgroupCpus(cgroup.to_owned()))?.to_string(),
                exclusive.to_string(),
                effective,
            ]);
        }
    }
    let children = match cgroup::children(root, cgroup) {
        Err(error) if error.is_gone() => return Ok(()),
        children => children?,
    };
    children
        .iter()
        .try_for_each(|name| add_rows(root, &below(cgroup, name), table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A host with CPUs 0-7, cgroups without a cpuset, and what is written in these files of the
    /// tree.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let common = [
            ("sys/devices/system/cpu/present", "0-7"),
            ("sys/devices/system/cpu/online", "0-7"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu"),
            ("sys/fs/cgroup/cgroup.subtree_control", "cpu"),
            ("sys/fs/cgroup/cpuset.cpus.isolated", ""),
            ("sys/fs/cgroup/a.slice/cgroup.subtree_control", ""),
            ("sys/fs/cgroup/a.slice/b.scope/cgroup.subtree_control", ""),
        ];
        for (path, text) in common.iter().chain(files) {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Host::new(dir.path());
        (dir, root)
    }

    fn cpus(list: &str) -> CpuSet {
        list.parse().unwrap()
    }

    fn shown(changes: &[Change]) -> Vec<String> {
        changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn from_the_top_down_and_back_up() {
        let (_dir, root) = host(&[("sys/fs/cgroup/a.slice/cpuset.cpus.exclusive", "2-3")]);
        assert_eq!(
            shown(&plan_make(&root, "a.slice/b.scope", &cpus("6-7")).unwrap()),
            [
                "cpusets below /: absent -> present",
                "cpusets below /a.slice: absent -> present",
                "exclusive CPUs of /a.slice: 2-3 -> 2-3,6-7",
                "exclusive CPUs of /a.slice/b.scope: unset -> 6-7",
                "cpuset.cpus of /a.slice/b.scope: unset -> 6-7",
                "partition /a.slice/b.scope: member -> isolated",
            ]
        );
        let (_dir, root) = host(&[
            ("sys/fs/cgroup/a.slice/cpuset.cpus.exclusive", "2-3,6-7"),
            ("sys/fs/cgroup/a.slice/b.scope/cpuset.cpus.exclusive", "6-7"),
            ("sys/fs/cgroup/a.slice/b.scope/cpuset.cpus", "6-7"),
            (
                "sys/fs/cgroup/a.slice/b.scope/cpuset.cpus.partition",
                "isolated invalid (no idea)",
            ),
        ]);
        assert_eq!(
            shown(&plan_undo(&root, "a.slice/b.scope").unwrap()),
            [
                "partition /a.slice/b.scope: isolated invalid (no idea) -> member",
                "cgroup /a.slice/b.scope: 6-7 -> unset",
                "exclusive CPUs of /a.slice/b.scope: 6-7 -> unset",
                "exclusive CPUs of /a.slice: 2-3,6-7 -> 2-3",
            ]
        );
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let why = |files: &[(&str, &str)]| {
            let (_dir, root) = host(files);
            check(&root, "a.slice/b.scope", &cpus("6-7")).map_err(|error| error.to_string())
        };
        assert_eq!(why(&[]), Ok(()));
        // Beside the way, at each step of it.
        for sibling in ["lxc", "a.slice/c.scope"] {
            let file = |name: &str| format!("sys/fs/cgroup/{sibling}/{name}");
            let error = why(&[(&file("cpuset.cpus"), "6")]).unwrap_err();
            assert!(
                error.starts_with(&format!(
                    "cgroup /{sibling}: its cpuset.cpus 6 is entirely in CPU 6-7"
                )),
                "{error}"
            );
            let error = why(&[(&file("cpuset.cpus.exclusive"), "5-6")]).unwrap_err();
            assert!(
                error.starts_with(&format!("cgroup /{sibling}: CPU 6 is exclusive to it")),
                "{error}"
            );
            assert_eq!(
                why(&[(&file("cpuset.cpus"), "5-6")]),
                Ok(()),
                "it has others"
            );
        }
        assert_eq!(
            why(&[("sys/fs/cgroup/a.slice/cpuset.cpus", "6-7")]),
            Ok(()),
            "it is on the way"
        );
    }

    #[test]
    fn a_kernel_that_is_too_old() {
        let (dir, root) = host(&[("proc/sys/kernel/osrelease", "6.1.0-44-amd64")]);
        fs::remove_file(dir.path().join("sys/fs/cgroup/cpuset.cpus.isolated")).unwrap();
        let error = check(&root, "a.slice", &cpus("6-7"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("kernel 6.1.0-44-amd64: it has no cpuset.cpus.isolated, which"),
            "{error}"
        );
    }

    #[test]
    fn the_way_into_a_scope() {
        let (_dir, root) = host(&[]);
        assert_eq!(
            shown(&plan_vcpus(&root, "/a.slice/b.scope", &cpus("6-7")).unwrap()),
            [
                "cgroup /a.slice/b.scope/vcpu: absent -> threaded",
                "cpusets below /a.slice/b.scope: absent -> present",
                "exclusive CPUs of /a.slice/b.scope: unset -> 6-7",
                "exclusive CPUs of /a.slice/b.scope/vcpu: unset -> 6-7",
                "cpuset.cpus of /a.slice/b.scope/vcpu: unset -> 6-7",
                "partition /a.slice/b.scope/vcpu: member -> isolated",
            ]
        );
    }
}

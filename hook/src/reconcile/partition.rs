//! The steps of the method `partition`: exclusive CPUs and the partition in the VM's scope.

use std::collections::{BTreeMap, BTreeSet};

use pinfold_core::knob::Value;
use pinfold_core::sys::cgroup;
use pinfold_core::vm::VmId;
use pinfold_core::{CpuSet, Error, Knob, Result, Setting};

use super::guest::Guest;
use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// Gives every cgroup above a scope with a partition the exclusive CPUs of its VMs.
    pub(super) fn exclusive(&mut self) -> Result<()> {
        self.report.step("exclusive");
        let mut given: BTreeMap<Knob, CpuSet> = BTreeMap::new();
        for (id, isolated) in self.fenced_by_partition() {
            let vmid = VmId::try_from(id)?;
            let scope = self
                .guest(vmid)
                .and_then(|guest| guest.map(|guest| guest.scope()).transpose());
            let scope = match scope {
                Ok(None) => continue,
                Ok(Some(scope)) => scope,
                Err(error) if self.is_for(vmid) => return Err(error),
                Err(error) => {
                    // It is not the VM of this run: its partition is to stay.
                    self.attempt_for(vmid, |_| Err(error));
                    cg_slice::usual_scope(vmid)
                }
            };
            for above in cgroup::with_ancestors(&scope).filter(|above| *above != scope) {
                let cpus = given
                    .entry(Knob::ExclusiveCpus(above.to_owned()))
                    .or_default();
                *cpus = &*cpus | &isolated;
            }
        }
        let known = self.store.baseline.knobs().map(|(knob, ..)| knob);
        let knobs: BTreeSet<Knob> = known
            .filter(|knob| matches!(knob, Knob::ExclusiveCpus(_)))
            .chain(given.keys())
            .cloned()
            .collect();
        let mut objects = Vec::new();
        for knob in knobs {
            objects.extend(
                knob.read(self.root)?
                    .map(|found| Setting::new(knob.clone(), knob.to_string(), found)),
            );
        }
        self.set("exclusive", objects, |knob, before| {
            match (given.get(knob), before.cpus()) {
                (Some(cpus), Some(before)) => (before | cpus).into(),
                _ => before.clone(),
            }
        })
    }

    /// The VMs that are fenced by partition, with their CPUs.
    fn fenced_by_partition(&self) -> Vec<(u32, CpuSet)> {
        self.fenced()
            .filter(|(_, fenced)| fenced.isolation == Isolation::Partition)
            .map(|(id, fenced)| (*id, fenced.settings.isolated.clone()))
            .collect()
    }

    /// Makes a VM's partition and checks it.
    pub(super) fn partition(&mut self, guest: &Guest) -> Result<()> {
        self.report.step("partition");
        let isolated = &guest.reservation.settings.isolated;
        let scope = guest.scope()?;
        cg_slice::partition::check_delegated(self.root, guest.vmid)?;
        let (mut made, earlier) = (0, self.report.failures());
        for change in cg_slice::partition::plan_vcpus(self.root, &scope, isolated)? {
            made += usize::from(self.make(change));
            if self.report.failures() > earlier {
                return Ok(());
            }
        }
        let now = cgroup::isolated(self.root)?.unwrap_or_default();
        if !isolated.is_subset(&now) && !self.root.dry_run() {
            let why = format!("the kernel accepted it but isolates only CPU {now}");
            return Err(Error::unusable(format!("partition of CPU {isolated}"), why));
        }
        self.sum_up("partition", made);
        Ok(())
    }

    /// Undoes the partitions of VMs that leave but keep running, as after a step that failed.
    pub(super) fn undo_partitions(&mut self) -> Result<()> {
        self.report.step("partition");
        let leaving = |(_, reservation): &(&u32, &Reservation)| {
            reservation.phase == Phase::Leaving && reservation.isolation == Isolation::Partition
        };
        let ids: Vec<u32> = self
            .store
            .reservations
            .iter()
            .filter(leaving)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let vmid = VmId::try_from(id)?;
            self.attempt_for(vmid, |this| {
                let Some(guest) = this.guest(vmid)? else {
                    return Ok(());
                };
                let pid = guest.qemu.id.pid;
                for change in cg_slice::partition::plan_undo_vcpus(this.root, &guest.cgroup, pid)? {
                    this.make(change);
                }
                Ok(())
            });
        }
        Ok(())
    }

    /// Whether systemd delegates the cpuset controller to a VM's scope: [`PRESENT`] or [`ABSENT`].
    ///
    /// [`PRESENT`]: pinfold_core::knob::PRESENT
    /// [`ABSENT`]: pinfold_core::knob::ABSENT
    pub(super) fn delegate(&mut self, vmid: VmId, wanted: Value) -> Result<()> {
        if let Some(change) = cg_slice::partition::delegation(self.root, vmid, wanted)?
            && !change.is_noop()
        {
            self.report.step("delegation");
            self.make(change);
        }
        Ok(())
    }
}

//! The steps of the method `partition`: exclusive CPUs and the partition in the VM's scope.

use std::collections::{BTreeMap, BTreeSet};

use pinfold_core::sys::cgroup;
use pinfold_core::vm::{Qemu, VmId};
use pinfold_core::{CpuSet, Error, Knob, Result, Setting, vm};

use super::run::Reconcile;
use crate::state::reservation::{Isolation, Phase, Reservation};

impl Reconcile<'_> {
    /// The way down to partitions: what is over the scopes of these VMs has their CPUs exclusively.
    pub(super) fn exclusive(&mut self) -> Result<()> {
        self.report.step("exclusive");
        let mut given: BTreeMap<Knob, CpuSet> = BTreeMap::new();
        for (id, reservation) in self
            .fenced()
            .filter(|(_, fenced)| fenced.isolation == Isolation::Partition)
        {
            let vmid = VmId::try_from(*id)?;
            let Some(qemu) = vm::find(self.root, vmid)? else {
                continue;
            };
            let scope = cg_slice::scope(self.root, vmid, &qemu)?;
            for above in cgroup::with_ancestors(&scope).filter(|above| *above != scope) {
                let cpus = given
                    .entry(Knob::ExclusiveCpus(above.to_owned()))
                    .or_default();
                *cpus = &*cpus | &reservation.settings.isolated;
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
            match (given.get(knob), CpuSet::from_kernel_list(before)) {
                (Some(cpus), Ok(before)) => (&before | cpus).to_string(),
                _ => before.to_owned(),
            }
        })
    }

    /// A VM's partition, made and looked at.
    pub(super) fn partition(&mut self, vmid: VmId, qemu: &Qemu) -> Result<()> {
        self.report.step("partition");
        let Some(reservation) = self.store.reservations.get(&vmid.into()) else {
            return Ok(());
        };
        let isolated = reservation.settings.isolated.clone();
        let scope = cg_slice::scope(self.root, vmid, qemu)?;
        cg_slice::partition::check_delegated(self.root, vmid)?;
        let mut made = 0;
        for change in cg_slice::partition::plan_vcpus(self.root, &scope, &isolated)? {
            made += usize::from(self.make(change));
            if self.report.failures() > 0 {
                return Ok(());
            }
        }
        let now = cgroup::isolated(self.root)?.unwrap_or_default();
        if !isolated.is_subset(&now) && !self.root.dry_run() {
            let why = format!("the kernel took it and isolates CPU {now} only");
            return Err(Error::unusable(format!("partition of CPU {isolated}"), why));
        }
        self.sum_up("partition", made);
        Ok(())
    }

    /// Takes their partitions from VMs that leave and run on, as after a step that failed.
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
            let Some(qemu) = vm::find(self.root, VmId::try_from(id)?)? else {
                continue;
            };
            let scope = cgroup::of_process(self.root, qemu.id.pid)?;
            for change in cg_slice::partition::plan_undo_vcpus(self.root, &scope, qemu.id.pid)? {
                self.make(change);
            }
        }
        Ok(())
    }
}

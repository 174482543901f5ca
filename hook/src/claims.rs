//! The CPUs that other VMs and containers use, or will use when they start.

use std::collections::BTreeMap;

use pinfold_core::selector::Resolver;
use pinfold_core::state::Store;
use pinfold_core::sys::cpu;
use pinfold_core::vm::{self, VmConf, VmId};
use pinfold_core::{CpuSet, Host, Result};

use crate::choice::{Claim, Owner};
use crate::settings::{self, Loaded};
use crate::state::reservation::Reservation;

/// The VMs of this node, each with its settings at Proxmox VE, or why these cannot be read.
pub(crate) type Vms = BTreeMap<VmId, Result<VmConf>>;

/// Reads them.
///
/// # Errors
/// If the VMs cannot be listed.
pub(crate) fn vms(root: &Host) -> Result<Vms> {
    let vms = vm::all(root)?.into_iter();
    Ok(vms.map(|vmid| (vmid, vm::conf(root, vmid))).collect())
}

/// The claims of all others than a VM, and what could not be read.
pub(crate) fn of_others(root: &Host, vmid: VmId) -> (Vec<Claim>, Vec<String>) {
    of_guests(root, Some(vmid))
}

/// The claims of all VMs and containers, and what could not be read.
pub(crate) fn of_all_guests(root: &Host) -> (Vec<Claim>, Vec<String>) {
    of_guests(root, None)
}

fn of_guests(root: &Host, without: Option<VmId>) -> (Vec<Claim>, Vec<String>) {
    let (mut vms, unknown) = match vms(root) {
        Ok(vms) => (vms, None),
        Err(error) => (Vms::new(), Some(error)),
    };
    vms.retain(|vmid, _| Some(*vmid) != without);
    let containers = vm::pinned_containers(root);
    let (mut claims, mut notes) = of_all(root, &Resolver::new(root), &vms, &containers);
    claims.retain(|claim| without.map(Owner::Vm) != Some(claim.owner));
    notes.extend(unknown.map(|error| format!("the CPUs of VMs are unknown: {error}")));
    (claims, notes)
}

/// The claims of all VMs and of pinned containers, and what could not be read.
pub(crate) fn of_all(
    root: &Host,
    host: &Resolver<'_>,
    vms: &Vms,
    containers: &[(VmId, CpuSet)],
) -> (Vec<Claim>, Vec<String>) {
    let mut notes = Vec::new();
    let mut own: BTreeMap<VmId, CpuSet> = BTreeMap::new();
    let mut add = |other: VmId, cpus: &CpuSet| {
        let all = own.entry(other).or_default();
        *all = &*all | cpus;
    };
    match Store::<Reservation>::peek(root) {
        Ok(state) => {
            let state = state.unwrap_or_default();
            for (id, reservation) in (state.reservations)
                .iter()
                .filter(|(_, reservation)| reservation.is_claim())
            {
                if let Ok(other) = VmId::try_from(*id) {
                    add(other, &reservation.settings.isolated);
                }
            }
        }
        Err(error) => notes.push(format!("the CPUs of running VMs are unknown: {error}")),
    }
    let mut shared = Vec::new();
    for (&other, conf) in vms {
        let conf = conf.as_ref().ok();
        // A VM without hook may have settings for later; a VM with hook always has settings.
        let hookscript = conf.and_then(|conf| conf.hookscript.as_deref());
        let has_hook = hookscript.is_some_and(|at| at.ends_with("/hook"));
        let file = settings::own_file(root, other);
        if file.is_some() || has_hook {
            match settings::load_on(root, host, other, 1, &[]) {
                Ok(Loaded::Fenced(settings)) => {
                    add(other, &settings.isolated);
                    continue;
                }
                Ok(Loaded::Unfenced { .. }) => {}
                // Without a file of its own it has the built-in layout, which may not fit this
                // host.
                Err(_) if file.is_none() => {}
                Err(error) => notes.push(format!("the CPUs of VM {other} are unknown: {error}")),
            }
        }
        let affinity = conf.and_then(|conf| conf.affinity.clone());
        shared.extend(affinity.map(|cpus| (Owner::Vm(other), cpus)));
    }
    let containers = containers.iter().cloned();
    shared.extend(containers.map(|(container, cpus)| (Owner::Container(container), cpus)));
    let online = cpu::online(root).unwrap_or_default();
    let exclusive = own.into_iter().map(|(other, cpus)| Claim {
        owner: Owner::Vm(other),
        cpus,
        exclusive: true,
    });
    // What may run everywhere claims nothing.
    let shared = shared
        .into_iter()
        .filter(|(_, cpus)| !cpus.is_empty() && !online.is_subset(cpus))
        .map(|(owner, cpus)| Claim {
            owner,
            cpus,
            exclusive: false,
        });
    (exclusive.chain(shared).collect(), notes)
}

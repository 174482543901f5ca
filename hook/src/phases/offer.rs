//! What a VM can have now, by its settings, this host and the other VMs.

use cg_slice::partition::Siblings;
use pinfold_core::state::store::Store;
use pinfold_core::systemd::journal::Priority;
use pinfold_core::vm::{Qemu, VmConf, VmId};

use crate::checks::required;
use crate::choice;
use crate::settings::{self, Loaded, Settings};
use crate::state::reservation::{Isolation, Phase, Reservation};

use super::run::Run;

/// What a VM can have now, by its settings, this host and the other VMs.
pub(super) enum Offer {
    /// CPUs of its own.
    Fence {
        settings: Settings,
        isolation: Isolation,
        /// What may interfere.
        warnings: Vec<String>,
    },
    /// None, and it may start all the same.
    Unfenced {
        /// Its settings, if there are any.
        settings: Option<Settings>,
        /// Why it has no CPUs.
        why: String,
        /// Whether its settings give it CPUs that it cannot have.
        is_lack: bool,
    },
}

impl Offer {
    /// The reservation of a VM that takes it; none without settings.
    pub(super) fn reservation(&self) -> Option<Reservation> {
        match self {
            Self::Fence {
                settings,
                isolation,
                ..
            } => Some(Reservation::new(
                Phase::Starting,
                *isolation,
                settings.clone(),
            )),
            Self::Unfenced { settings, .. } => settings
                .clone()
                .map(|settings| Reservation::new(Phase::Unfenced, Isolation::default(), settings)),
        }
    }
}

impl Run<'_> {
    /// What a VM can have: the checks of pre-start. `qemu` is its QEMU if that runs. With `lenient`
    /// nothing stops a start.
    pub(super) fn offer(
        &mut self,
        store: &Store<Reservation>,
        vmid: VmId,
        conf: &VmConf,
        qemu: Option<&Qemu>,
        lenient: bool,
    ) -> anyhow::Result<Offer> {
        let threads_per_core =
            qemu.map_or_else(|| conf.threads_per_core(), |qemu| qemu.threads_per_core);
        let settings =
            match settings::load(&self.root, vmid, threads_per_core, &choice::cells(conf)) {
                Ok(Loaded::Fenced(settings)) => settings,
                Ok(Loaded::Unfenced {
                    settings,
                    why,
                    is_lack,
                }) => {
                    return Ok(Offer::Unfenced {
                        settings: Some(settings),
                        why,
                        is_lack,
                    });
                }
                Err(error) if lenient => {
                    return Ok(Offer::Unfenced {
                        settings: None,
                        why: error.to_string(),
                        is_lack: true,
                    });
                }
                Err(error) => return Err(error.into()),
            };
        match self.isolation_for(store, vmid, conf, qemu, &settings) {
            Ok((isolation, warnings)) => Ok(Offer::Fence {
                settings,
                isolation,
                warnings,
            }),
            Err(error) if lenient || !settings.required => Ok(Offer::Unfenced {
                settings: Some(settings),
                why: format!("{error:#}"),
                is_lack: true,
            }),
            Err(error) => Err(error),
        }
    }

    fn isolation_for(
        &mut self,
        store: &Store<Reservation>,
        vmid: VmId,
        conf: &VmConf,
        qemu: Option<&Qemu>,
        settings: &Settings,
    ) -> anyhow::Result<(Isolation, Vec<String>)> {
        let warnings = required::before_start(&self.root, vmid, conf, settings)?;
        required::no_overlap(&self.root, &store.reservations, vmid, settings)?;
        let isolation = self.isolation(store, vmid, settings, qemu)?;
        Ok((isolation, warnings))
    }

    /// How the VM's CPUs are to be isolated; reported if the settings leave it open.
    fn isolation(
        &mut self,
        store: &Store<Reservation>,
        vmid: VmId,
        settings: &Settings,
        qemu: Option<&Qemu>,
    ) -> anyhow::Result<Isolation> {
        let (isolation, note) = required::isolation(
            &self.root,
            &Siblings::default(),
            &store.reservations,
            vmid,
            settings,
            qemu,
        )?;
        if let Some(note) = note {
            self.report.line(&note);
        }
        Ok(isolation)
    }

    /// Reports that a VM starts or runs without isolated CPUs, in the journal too, since the task
    /// log of a successful start is seldom read.
    pub(super) fn without_cpus(&mut self, vmid: VmId, starts: &str, why: &str, is_lack: bool) {
        let message = format!("VM {vmid} {starts} without isolated CPUs: {why}");
        self.report.note(&message);
        let priority = if is_lack {
            Priority::Warning
        } else {
            Priority::Notice
        };
        self.journal(priority, vmid, &message);
    }
}

/// Whether an earlier hook has stopped the VM's idle VM and has not started it again yet.
pub(super) fn has_idle_vm_to_restart(store: &Store<Reservation>, vmid: VmId) -> bool {
    (store.reservations.get(&vmid.into())).is_some_and(|earlier| earlier.idle_vm_stopped)
}

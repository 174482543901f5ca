//! What hook saves per VM.

use pinfold_core::sys::task;
use pinfold_core::systemd::ScopeProperties;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{CpuSet, Host, TaskId};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// The number of the fence that `hook jitter` makes for itself: the last one that a VM could have. An
/// earlier version of hook that finds it releases it as that of a VM that has ended.
pub(crate) const JITTER: u32 = 999_999_999;

/// Who has the reservation of this number.
pub(crate) fn owner(id: u32) -> String {
    match id {
        JITTER => "hook jitter".to_owned(),
        id => format!("VM {id}"),
    }
}

/// How far the isolation of a VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Its CPUs are being released. It stays in the state until that is complete, in case the hook
    /// is killed.
    Leaving,
    /// Everything is released. Its devices have yet to be reset or its idle VM to be started, or it
    /// [comes back](Backup::ComesBack) from a backup.
    Idle,
    /// The VM starts or runs without isolated CPUs: its settings allow that, or Proxmox VE starts it
    /// for a backup.
    Unfenced,
    /// pre-start has run: the CPUs are reserved, nothing is isolated.
    Starting,
    /// post-start has begun: CPUs may be offline, any step may be half done.
    Isolating,
    /// post-start has succeeded.
    Isolated,
}

impl Phase {
    /// Its CPUs are not to be given to others, and everything is restored when it has ended.
    fn of_newer() -> Self {
        Self::Isolated
    }
}

/// What a backup has to do with a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Backup {
    /// Its QEMU was started for the backup: the VM did not run before.
    Started,
    /// Proxmox VE has stopped the VM for the backup and starts it again. Stays in the state until
    /// then, or until the backup has ended.
    ComesBack,
}

/// How a VM's CPUs are isolated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Isolation {
    /// By the documented order: slices narrowed, CPUs taken offline and online again, the VM out of
    /// its slice.
    #[default]
    Hotplug,
    /// By a cpuset partition in the VM's scope.
    Partition,
}

/// A VM's claim to its isolated CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reservation {
    /// How far it has come. Of a stage that only a later version knows: as if it was fenced.
    #[serde(default = "Phase::of_newer")]
    pub phase: Phase,
    /// How its CPUs are isolated.
    #[serde(default)]
    pub isolation: Isolation,
    /// The settings as they were resolved then.
    pub settings: Settings,
    /// The VM's QEMU, once it runs; of [`JITTER`] the process that measures.
    pub qemu: Option<TaskId>,
    /// The process that starts the VM: PVE's task, hook's parent. While it runs, QEMU may still be
    /// started. In phase [`Idle`](Phase::Idle): the hook that starts the idle VM, or the VM's QEMU
    /// if that keeps running without isolated CPUs.
    pub starter: Option<TaskId>,
    /// Whether the idle VM was stopped for this one, and is to be started again.
    pub idle_vm_stopped: bool,
    /// Whether the VM has ended and its devices are still to be reset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resets_owed: bool,
    /// What a backup has to do with it, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<Backup>,
    /// What Proxmox VE gave the VM's scope, which goes when the VM is taken out of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<ScopeProperties>,
    /// How many changes failed when it was isolated, or corrected the last time: none of those that
    /// its fence depends on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed: usize,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Whether a backup of the VM is under way.
pub(crate) fn is_in_backup(root: &Host, vmid: VmId) -> bool {
    vm::conf(root, vmid).is_ok_and(|conf| conf.is_in_backup())
}

impl Reservation {
    /// One that has come so far, of a VM whose QEMU is not known yet.
    pub(crate) fn new(phase: Phase, isolation: Isolation, settings: Settings) -> Self {
        Self {
            phase,
            isolation,
            settings,
            qemu: None,
            starter: None,
            idle_vm_stopped: false,
            resets_owed: false,
            backup: None,
            scope: None,
            failed: 0,
        }
    }

    /// Whether its CPUs are reserved.
    pub(crate) fn is_claim(&self) -> bool {
        self.phase >= Phase::Starting
    }

    /// Whether the CPUs are isolated, or may be.
    pub(crate) fn is_fenced(&self) -> bool {
        self.phase > Phase::Starting
    }

    /// Whether its QEMU has been seen, as far as the state shows.
    pub(crate) fn has_run(&self) -> bool {
        match self.phase {
            Phase::Leaving => false,
            Phase::Idle | Phase::Isolating | Phase::Isolated => true,
            Phase::Unfenced | Phase::Starting => self.qemu.is_some(),
        }
    }

    /// Whether its VM is stopped for a backup and comes back.
    pub(crate) fn comes_back(&self) -> bool {
        self.phase == Phase::Idle && self.backup == Some(Backup::ComesBack)
    }

    /// Whether the VM still runs or starts, or comes back from a backup; in phase
    /// [`Idle`](Phase::Idle), whether its hook runs.
    pub(crate) fn is_alive(&self, root: &Host, vmid: VmId) -> bool {
        if self.comes_back() {
            return is_in_backup(root, vmid);
        }
        let task = match self.phase {
            Phase::Leaving => None,
            Phase::Idle => self.starter.as_ref(),
            Phase::Unfenced | Phase::Starting | Phase::Isolating | Phase::Isolated => {
                self.qemu.as_ref().or(self.starter.as_ref())
            }
        };
        task.is_some_and(|task| task::check_start(root, task).is_ok())
    }

    /// Whether anything is left to do for it when its CPUs are released.
    pub(crate) fn is_owed(&self) -> bool {
        self.idle_vm_stopped || self.resets_owed || self.backup == Some(Backup::ComesBack)
    }

    /// The CPUs of a vCPU, if it has a pin.
    pub(crate) fn pin(&self, vcpu: usize) -> Option<&CpuSet> {
        self.settings.pins.get(vcpu)
    }
}

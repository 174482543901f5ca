//! What hook keeps per VM.

use pinfold_core::sys::task;
use pinfold_core::{CpuSet, Host, TaskId};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// How far a VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// What the VM had is being given back: in the state until all of it is, for a hook that is
    /// killed meanwhile.
    Leaving,
    /// All is given back; its idle VM is yet to be started.
    Idle,
    /// pre-start was run: the CPUs are spoken for, nothing is isolated.
    Starting,
    /// post-start has begun: CPUs may be offline, anything may be half done.
    Isolating,
    /// post-start has ended well.
    Isolated,
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
    /// How far it has come.
    pub phase: Phase,
    /// How its CPUs are isolated.
    #[serde(default)]
    pub isolation: Isolation,
    /// The settings as they were resolved then.
    pub settings: Settings,
    /// The VM's QEMU, once it runs.
    pub qemu: Option<TaskId>,
    /// Who starts the VM: PVE's task, hook's parent process. While it lives, QEMU may still come.
    /// Of one that is [idle](Phase::Idle) the hook that starts the idle VM, or the VM's QEMU where
    /// that runs on without a fence.
    pub starter: Option<TaskId>,
    /// Whether the idle VM was stopped for this one, and is to be started again.
    pub idle_vm_stopped: bool,
}

impl Reservation {
    /// Whether its CPUs are spoken for.
    pub(crate) fn is_claim(&self) -> bool {
        self.phase >= Phase::Starting
    }

    /// Whether the CPUs are fenced off, or may be.
    pub(crate) fn is_fenced(&self) -> bool {
        self.phase > Phase::Starting
    }

    /// Whether the VM still runs, or still starts; of one that is idle, whether its hook still
    /// does.
    pub(crate) fn is_alive(&self, root: &Host) -> bool {
        let task = match self.phase {
            Phase::Leaving => None,
            Phase::Idle => self.starter.as_ref(),
            Phase::Starting => self.qemu.as_ref().or(self.starter.as_ref()),
            Phase::Isolating | Phase::Isolated => self.qemu.as_ref(),
        };
        task.is_some_and(|task| task::check_start(root, task).is_ok())
    }

    /// The CPUs of a vCPU; none where it has no pin.
    pub(crate) fn pin(&self, vcpu: usize) -> Option<&CpuSet> {
        self.settings.pins.get(vcpu)
    }
}

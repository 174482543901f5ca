//! What hook saves per VM.

use pinfold_core::sys::task;
use pinfold_core::{CpuSet, Host, TaskId};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// How far the isolation of a VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Its CPUs are being released. It stays in the state until that is complete, in case the hook
    /// is killed.
    Leaving,
    /// Everything is released; its idle VM has yet to be started.
    Idle,
    /// pre-start has run: the CPUs are reserved, nothing is isolated.
    Starting,
    /// post-start has begun: CPUs may be offline, any step may be half done.
    Isolating,
    /// post-start has succeeded.
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
    /// The process that starts the VM: PVE's task, hook's parent. While it runs, QEMU may still be
    /// started. In phase [`Idle`](Phase::Idle): the hook that starts the idle VM, or the VM's QEMU
    /// if that keeps running without isolated CPUs.
    pub starter: Option<TaskId>,
    /// Whether the idle VM was stopped for this one, and is to be started again.
    pub idle_vm_stopped: bool,
}

impl Reservation {
    /// Whether its CPUs are reserved.
    pub(crate) fn is_claim(&self) -> bool {
        self.phase >= Phase::Starting
    }

    /// Whether the CPUs are isolated, or may be.
    pub(crate) fn is_fenced(&self) -> bool {
        self.phase > Phase::Starting
    }

    /// Whether the VM still runs or starts; in phase [`Idle`](Phase::Idle), whether its hook runs.
    pub(crate) fn is_alive(&self, root: &Host) -> bool {
        let task = match self.phase {
            Phase::Leaving => None,
            Phase::Idle => self.starter.as_ref(),
            Phase::Starting => self.qemu.as_ref().or(self.starter.as_ref()),
            Phase::Isolating | Phase::Isolated => self.qemu.as_ref(),
        };
        task.is_some_and(|task| task::check_start(root, task).is_ok())
    }

    /// The CPUs of a vCPU, if it has a pin.
    pub(crate) fn pin(&self, vcpu: usize) -> Option<&CpuSet> {
        self.settings.pins.get(vcpu)
    }
}

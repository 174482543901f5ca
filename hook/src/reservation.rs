//! What hook keeps per VM.

use pinfold_core::{CpuSet, Sysroot, TaskId, process};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// How far a VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// pre-start was run: the CPUs are spoken for, nothing is isolated.
    Starting,
    /// post-start has begun: CPUs may be offline, anything may be half done.
    Isolating,
    /// post-start has ended well.
    Isolated,
}

/// A VM's claim to its isolated CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reservation {
    /// How far it has come.
    pub phase: Phase,
    /// The settings as they were resolved then.
    pub settings: Settings,
    /// The VM's QEMU, once it runs.
    pub qemu: Option<TaskId>,
    /// Who starts the VM: PVE's task, hook's parent process. While it lives, QEMU may still come.
    pub starter: Option<TaskId>,
    /// Whether the idle VM was stopped for this one, and is to be started again.
    pub idle_vm_stopped: bool,
}

impl Reservation {
    /// Whether the CPUs are fenced off, or may be.
    pub(crate) fn is_fenced(&self) -> bool {
        self.phase > Phase::Starting
    }

    /// Whether the VM still runs, or still starts.
    pub(crate) fn is_alive(&self, root: &Sysroot) -> bool {
        match (self.phase, &self.qemu, &self.starter) {
            (_, Some(task), _) | (Phase::Starting, None, Some(task)) => process::check_start(root, task).is_ok(),
            _ => false,
        }
    }

    /// The CPUs of a vCPU; none where it has no pin.
    pub(crate) fn pin(&self, vcpu: usize) -> Option<&CpuSet> {
        self.settings.pins.get(vcpu)
    }
}

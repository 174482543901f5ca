//! The timer that looks for threads which start after post-start.

use pinfold_core::Outcome;
use pinfold_core::knob::PRESENT;
use pinfold_core::vm::{self, VmId};

use crate::reconcile::thread_timer;

use super::run::Run;

impl Run<'_> {
    /// Whether vCPUs can be plugged into the VM. Without VMID.conf nothing is plugged in.
    pub(super) fn plugs_vcpus(&self, vmid: VmId) -> bool {
        self.conf(vmid).is_ok_and(|conf| conf.plugs_vcpus)
    }

    /// Has systemd call [`pin_new`](Self::pin_new) every few seconds: Proxmox VE calls no hook when
    /// it plugs in a vCPU, or lets a guest run that waits, with whose first vCPU KVM starts a
    /// thread. A failure takes no fence.
    pub(super) fn look_for_threads(&mut self, vmid: VmId) {
        let timer = match thread_timer(&self.root, vmid) {
            Ok(Some(timer)) if timer.found != PRESENT => timer.want(PRESENT),
            Ok(_) => return,
            Err(error) => return self.report.note(&error.to_string()),
        };
        let done = pinfold_core::apply_one(&self.root, timer);
        if let Outcome::Failed(why) = &done.outcome {
            self.report.note(&format!(
                "threads that start from now on are pinned only by `hook {vmid} post-start`: {why}"
            ));
            return;
        }
        self.report.step("pins");
        self.report.changes(&[done]);
    }
}

/// Whether a guest waits until Proxmox VE lets it run, by QEMU's words.
pub(super) fn waits_for_cont(threads: &vm::Threads) -> bool {
    let status = threads.status.as_deref();
    status.is_some_and(|status| matches!(status, "prelaunch" | "inmigrate" | "paused"))
}

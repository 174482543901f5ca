//! After a VM has stopped, and a fence that is given up while it runs.

use std::time::{Duration, Instant};

use pinfold_core::sys::{cgroup, task};
use pinfold_core::vm::VmId;
use pinfold_core::{Exit, TaskId};

use super::run::Run;

/// How often hook checks whether a QEMU has ended.
const EXIT_INTERVAL: Duration = Duration::from_millis(20);

impl Run<'_> {
    /// After the VM has stopped: returns its CPUs to the host.
    pub(crate) fn post_stop(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let Some(reservation) = self.peek(vmid)? else {
            return self.recover();
        };
        let deadlines = reservation.settings.deadlines;
        self.use_deadlines(&deadlines);
        if let Some(task) = &reservation.qemu {
            self.wait_for_exit(vmid, task, Duration::from_secs(deadlines.qemu_exit));
        }
        self.release(vmid, &deadlines, true)?;
        Ok(self.report.finish())
    }

    fn wait_for_exit(&mut self, vmid: VmId, task: &TaskId, deadline: Duration) {
        let until = Instant::now() + deadline;
        let own = cg_slice::decoupled_cgroup(vmid);
        // QEMU's helpers (swtpm) end a moment after it.
        let running = || {
            task::check_start(&self.root, task).is_ok()
                || cgroup::processes(&self.root, &own).is_ok_and(|pids| !pids.is_empty())
        };
        while running() {
            if Instant::now() >= until {
                self.report.note(&format!(
                    "VM {vmid}: one of its processes still runs after {} s",
                    deadline.as_secs()
                ));
                return;
            }
            std::thread::sleep(EXIT_INTERVAL);
        }
    }

    /// Releases the CPUs of a VM, which may run on: on any CPUs then. Its idle VM is started only if
    /// it has stopped.
    pub(crate) fn unfence(&mut self, vmid: VmId) -> anyhow::Result<()> {
        let deadlines = self.deadlines(vmid)?;
        self.use_deadlines(&deadlines);
        let mut store = self.open(&deadlines)?;
        if let Some(reservation) = store.reservations.get_mut(&vmid.into())
            && reservation.is_alive(&self.root, vmid)
        {
            reservation.idle_vm_stopped = false;
            store.save()?;
        }
        drop(store);
        self.release(vmid, &deadlines, false)
    }
}

//! The deadlines of waits, and the time limits of the phases that follow from them.

use std::time::Duration;

use pinfold_core::systemd::{Session, Timeouts};
use pinfold_core::vm::qmp;
use serde::{Deserialize, Serialize};

/// The longest deadline that settings can set, in seconds.
pub(crate) const MAX_DEADLINE: u64 = 3600;

/// How long each wait may take, in seconds, [`MAX_DEADLINE`] at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Deadlines {
    /// For another hook that holds the lock.
    #[serde(deserialize_with = "seconds")]
    pub lock: u64,
    /// For one call to systemd.
    #[serde(deserialize_with = "seconds")]
    pub systemd: u64,
    /// For systemd to read all units again.
    #[serde(deserialize_with = "seconds")]
    pub reload: u64,
    /// For QEMU's monitor, tries and pauses in all.
    #[serde(deserialize_with = "seconds")]
    pub qmp: u64,
    /// For PCI functions to go, and again to come back.
    #[serde(deserialize_with = "seconds")]
    pub pci: u64,
    /// For memory to be compacted and caches to be dropped.
    #[serde(deserialize_with = "seconds")]
    pub caches: u64,
    /// For the idle VM to shut down.
    #[serde(deserialize_with = "seconds")]
    pub idle_vm: u64,
    /// For QEMU to exit after Proxmox VE has reported it stopped.
    #[serde(deserialize_with = "seconds")]
    pub qemu_exit: u64,
    /// For each hookscript of `chain`. Not in the state of a VM that has the default, so that an
    /// earlier version can read it.
    #[serde(deserialize_with = "seconds", skip_serializing_if = "is_longest")]
    pub chain: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_longest(seconds: &u64) -> bool {
    *seconds == MAX_DEADLINE
}

/// Limited, since a time too far off overflows the clock.
fn seconds<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<u64, D::Error> {
    let seconds = u64::deserialize(deserializer)?;
    if seconds <= MAX_DEADLINE {
        Ok(seconds)
    } else {
        Err(serde::de::Error::custom(format!(
            "{seconds} s is too long; the longest deadline is {MAX_DEADLINE}"
        )))
    }
}

impl Default for Deadlines {
    fn default() -> Self {
        let systemd = Timeouts::default();
        Self {
            lock: 120,
            systemd: systemd.call.as_secs(),
            reload: systemd.reload.as_secs(),
            qmp: qmp::DEFAULT_BUDGET.as_secs(),
            pci: pci_reset::DEFAULT_DEADLINE,
            caches: 20,
            idle_vm: 60,
            qemu_exit: 10,
            chain: MAX_DEADLINE,
        }
    }
}

impl Deadlines {
    /// The longest that each phase may take in seconds, whatever hangs, while `others` more VMs are
    /// fenced, with so many `scripts` in `chain`. What the kernel needs to take CPUs offline and
    /// online again is not in it.
    pub(super) fn bounds(&self, others: usize, scripts: usize) -> Bounds {
        let sum = |parts: &[u64]| parts.iter().copied().fold(0, u64::saturating_add);
        let others = u64::try_from(others)
            .unwrap_or(u64::MAX)
            .saturating_mul(self.qmp);
        let scripts = u64::try_from(scripts)
            .unwrap_or(u64::MAX)
            .saturating_mul(self.chain);
        // A systemd that hangs is waited for once; the reload and the scope belong to the undo.
        let systemd = sum(&[self.systemd, self.systemd, self.reload]);
        Bounds {
            // Both idle VM and PCI functions are waited for twice: to go and to come back. The
            // partition's scope needs a reload.
            pre_start: sum(&[
                self.lock,
                self.lock,
                systemd,
                self.reload,
                others,
                self.idle_vm,
                self.idle_vm,
                self.pci,
                self.pci,
                self.caches,
                scripts,
            ]),
            // QEMU is asked for its threads at the beginning and when they are pinned.
            post_start: sum(&[self.lock, systemd, others, self.qmp, self.qmp, scripts]),
            post_stop: sum(&[
                self.lock,
                systemd,
                others,
                self.qemu_exit,
                self.idle_vm,
                scripts,
            ]),
        }
    }

    /// A session with systemd that keeps these deadlines.
    pub(crate) fn systemd_session(&self) -> Session {
        Session::new(Timeouts {
            call: Duration::from_secs(self.systemd),
            reload: Duration::from_secs(self.reload),
        })
    }
}

/// How long phases may take at most, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Bounds {
    pub pre_start: u64,
    pub post_start: u64,
    pub post_stop: u64,
}

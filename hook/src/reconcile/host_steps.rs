//! The steps of both methods that change the host: IRQs, kthreads, governor and statistics interval.

use pinfold_core::sys::{cpufreq, task};
use pinfold_core::{CpuSet, Knob, Result, Setting};

use super::run::Reconcile;
use crate::state::reservation::Reservation;
use crate::steps;

impl Reconcile<'_> {
    /// Step 3, and again at the end.
    pub(super) fn irqs(&mut self) -> Result<()> {
        self.report.step("irqs");
        // The default first, then all: what is born between starts with the one or is seen with the
        // others.
        let default: Vec<Setting> = pin_irqs::default_mask(self.root)?.into_iter().collect();
        let wanted = self.narrowed();
        let mut changed = self.change("irqs", default, &wanted)?;
        let irqs = self.host_irqs.settings(self.root)?;
        changed += self.change("irqs", irqs, &wanted)?;
        self.sum_up("irqs", changed);
        Ok(())
    }

    /// Step 3, and again at the end.
    pub(super) fn kthreads(&mut self) -> Result<()> {
        // kthreadd first, then all, as above.
        let mut changed = self.kthreadd()?;
        changed += self.change(
            "kthreads",
            pin_kthreads::settings(self.root)?.movable,
            self.narrowed(),
        )?;
        self.sum_up("kthreads", changed);
        Ok(())
    }

    pub(super) fn kthreadd(&mut self) -> Result<usize> {
        self.report.step("kthreads");
        let kthreadd = task::task(self.root, task::KTHREADD, task::KTHREADD)?.id;
        let found = task::affinity(self.root, &kthreadd)?.to_string();
        self.change(
            "kthreads",
            vec![Setting::new(
                Knob::Kthread(kthreadd),
                "kthread 2 (kthreadd)",
                found,
            )],
            self.narrowed(),
        )
    }

    /// Step 5: governor and statistics interval.
    pub(super) fn tuning(&mut self) -> Result<()> {
        self.report.step("pace");
        let objects = self.tuning_objects(&self.isolated())?;
        let fenced: Vec<Reservation> = self
            .fenced()
            .map(|(_, reservation)| reservation.clone())
            .collect();
        let policies = cpufreq::policies(self.root)?;
        self.set("pace", objects, move |knob, before| {
            let asked = match knob {
                Knob::Governor(name) => {
                    let policy = policies.iter().find(|policy| policy.name == *name);
                    let of = |reservation: &&Reservation| {
                        policy.is_some_and(|policy| {
                            policy.cpus.intersects(&reservation.settings.isolated)
                        })
                    };
                    fenced
                        .iter()
                        .filter(of)
                        .find_map(|reservation| reservation.settings.governor.clone())
                }
                _ => fenced
                    .iter()
                    .filter_map(|reservation| reservation.settings.stat_interval)
                    .max()
                    .map(|s| s.to_string()),
            };
            asked.unwrap_or_else(|| before.to_owned())
        })
    }

    pub(super) fn tuning_objects(&self, isolated: &CpuSet) -> Result<Vec<Setting>> {
        let baseline = &self.store.baseline;
        let governed = |name: &str| baseline.has(&Knob::Governor(name.to_owned()));
        let policies = cpufreq::policies(self.root)?;
        let mut objects = governor::settings(&policies, |policy| {
            policy.cpus.intersects(isolated) || governed(&policy.name)
        });
        objects.extend(steps::stat_interval(self.root)?);
        Ok(objects)
    }
}

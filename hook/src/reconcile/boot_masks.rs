//! Threads that the boot keeps off the CPUs of `isolcpus=`.

use std::collections::BTreeSet;

use pinfold_core::sys::task::{self, Processes};
use pinfold_core::{CpuSet, Knob, Result, Setting};

use super::hotplug::{TASKS, effective_cpus};
use super::run::Reconcile;

impl Reconcile<'_> {
    /// Has each thread that the boot keeps off the CPUs of `isolcpus=` ask for the CPUs that it has.
    ///
    /// It has not asked for them, so that the next change of a cpuset, and each partition that is
    /// made, would give it all CPUs of its cgroup, those of `isolcpus=` too. What a thread asks for
    /// the kernel keeps (Linux 6.2), also for those that it creates. To be called before anything
    /// is narrowed.
    pub(super) fn hold_boot_masks(&mut self) -> Result<()> {
        let is_first = !self
            .store
            .baseline
            .knobs()
            .any(|(knob, ..)| matches!(knob, Knob::Kthread(_)));
        if self.apart.at_boot.is_empty() || !is_first || !task::keeps_requested_cpus(self.root)? {
            return Ok(());
        }
        self.report.step(TASKS);
        let mut known = BTreeSet::new();
        let mut changed = 0;
        // One that is created meanwhile, by a thread that has not asked yet, is found the next time.
        for _ in 0..HOLD_ROUNDS {
            let mut threads = self.kept_off_by_boot()?;
            threads.retain(|thread| known.insert(thread.knob.clone()));
            if threads.is_empty() {
                break;
            }
            for thread in threads {
                let cpus = thread.found.clone();
                let not_asked = Setting {
                    found: CpuSet::new().into(),
                    ..thread
                };
                changed += usize::from(self.make(not_asked.want(cpus)));
            }
        }
        self.sum_up(TASKS, changed);
        Ok(())
    }

    /// User threads with the CPUs of their cgroup but for those of `isolcpus=`.
    fn kept_off_by_boot(&self) -> Result<Vec<Setting>> {
        let at_boot = &self.apart.at_boot;
        let processes = Processes::read(self.root)?;
        let mut objects = Vec::new();
        for pid in processes.user_pids() {
            let Some(allowed) = effective_cpus(self.root, pid).filter(|it| it.intersects(at_boot))
            else {
                continue;
            };
            for object in self.thread_objects(pid)? {
                let has_the_rest = |cpus: &CpuSet| (cpus & &self.present) == (&allowed - at_boot);
                if object.found.cpus().is_some_and(has_the_rest) {
                    objects.push(object);
                }
            }
        }
        Ok(objects)
    }
}

/// How often threads are looked for that were created meanwhile.
const HOLD_ROUNDS: usize = 10;

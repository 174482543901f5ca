//! The settings that pin-irqs changes: every IRQ's CPUs, and the mask that new IRQs start with. They are
//! set by the tool's `run` (lib.rs) and by hook's `irqs` (hook/src/reconcile/host_steps.rs).

use std::collections::{BTreeMap, BTreeSet};

use pinfold_core::sys::irq;
use pinfold_core::{CpuSetPool, Host, Knob, Result, Setting};

/// The default mask and then every IRQ: an IRQ that appears in between starts with the new mask.
///
/// # Errors
/// If /proc/irq cannot be read.
pub fn settings(root: &Host) -> Result<Vec<Setting>> {
    let mut objects: Vec<Setting> = default_mask(root)?.into_iter().collect();
    objects.extend(Irqs::default().settings(root)?);
    Ok(objects)
}

/// The mask that new IRQs start with; `None` if this kernel has none.
///
/// # Errors
/// If it cannot be read.
pub fn default_mask(root: &Host) -> Result<Option<Setting>> {
    let knob = Knob::DefaultIrq;
    Ok(knob
        .read(root)?
        .map(|found| Setting::new(knob.clone(), knob.to_string(), found)))
}

/// The IRQs of a host and the devices behind them.
///
/// The names come from /proc/interrupts, which is long on a large host. It is read again only if
/// there is an IRQ that was not there the last time.
#[derive(Debug, Default)]
pub struct Irqs {
    seen: BTreeSet<u32>,
    names: BTreeMap<u32, String>,
}

impl Irqs {
    /// Every IRQ with its CPUs. Labels carry the devices' names.
    ///
    /// # Errors
    /// If /proc/irq or /proc/interrupts cannot be read. IRQs that go meanwhile are left out.
    pub fn settings(&mut self, root: &Host) -> Result<Vec<Setting>> {
        let mut objects = Vec::new();
        let mut masks = CpuSetPool::default();
        for number in self.numbers(root)? {
            let knob = Knob::Irq(number);
            if let Some(mut found) = knob.read(root)? {
                found.share(&mut masks);
                objects.push(Setting::new(knob, self.label(number), found));
            }
        }
        Ok(objects)
    }

    /// The devices behind an IRQ; empty if it has no handler.
    pub(crate) fn name(&self, number: u32) -> &str {
        self.names.get(&number).map_or("", String::as_str)
    }

    fn numbers(&mut self, root: &Host) -> Result<BTreeSet<u32>> {
        let numbers = numbers(root)?;
        // The names are read after the numbers, so that an IRQ that has just appeared has its name.
        if !numbers.is_subset(&self.seen) {
            self.names = irq::names(root)?;
            self.seen.clone_from(&numbers);
        }
        Ok(numbers)
    }

    fn label(&self, number: u32) -> String {
        match self.names.get(&number) {
            Some(name) => format!("IRQ {number} ({name})"),
            None => format!("IRQ {number}"),
        }
    }
}

/// The numbers of all IRQs.
pub(crate) fn numbers(root: &Host) -> Result<BTreeSet<u32>> {
    let names = root.names("proc/irq")?;
    Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_irq_that_appears_during_a_run_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = Host::new(dir.path());
        let add = |number: u32, interrupts: &str| {
            let folder = dir.path().join(format!("proc/irq/{number}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("smp_affinity_list"), "0-3\n").unwrap();
            fs::write(dir.path().join("proc/interrupts"), interrupts).unwrap();
        };
        let mut irqs = Irqs::default();
        let mut labels = || -> Vec<String> {
            let objects = irqs.settings(&root).unwrap();
            let labels = objects.into_iter().map(|object| object.label.to_string());
            labels.collect()
        };
        add(1, "CPU0\n 1: 0 IO-APIC 1-edge i8042\n");
        assert_eq!(labels(), ["IRQ 1 (i8042)"]);
        add(
            24,
            "CPU0\n 1: 0 IO-APIC 1-edge i8042\n24: 0 PCI-MSI 0-edge nvme0q0\n",
        );
        assert_eq!(labels(), ["IRQ 1 (i8042)", "IRQ 24 (nvme0q0)"]);
        // Nothing new: the names are kept.
        fs::remove_file(dir.path().join("proc/interrupts")).unwrap();
        assert_eq!(labels(), ["IRQ 1 (i8042)", "IRQ 24 (nvme0q0)"]);
    }
}

//! The settings that pin-irqs changes: every IRQ's CPUs, and the mask that new IRQs start with.

use std::collections::BTreeMap;

use pinfold_core::{Knob, Object, Result, Sysroot, irq};

/// The default mask and every IRQ, in this order: one that is born meanwhile starts where it
/// should.
///
/// # Errors
/// Where /proc/irq cannot be read.
pub fn objects(root: &Sysroot) -> Result<Vec<Object>> {
    named_objects(root, &irq::names(root)?)
}

pub(crate) fn named_objects(root: &Sysroot, names: &BTreeMap<u32, String>) -> Result<Vec<Object>> {
    let irqs = irqs(root, names)?;
    Ok(default_mask(root)?.into_iter().chain(irqs).collect())
}

/// Every IRQ with its CPUs, as objects to change; labels carry the device names, from [`irq::names`].
///
/// # Errors
/// Where /proc/irq cannot be read. IRQs that go meanwhile are left out.
fn irqs(root: &Sysroot, names: &BTreeMap<u32, String>) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for number in root
        .names("proc/irq")?
        .iter()
        .filter_map(|name| name.parse::<u32>().ok())
    {
        let knob = Knob::Irq(number);
        if let Some(found) = knob.read(root)? {
            objects.push(Object::new(knob, label(number, names.get(&number)), found));
        }
    }
    Ok(objects)
}

/// The mask that new IRQs start with, as an object to change.
///
/// # Errors
/// Where it cannot be read.
pub fn default_mask(root: &Sysroot) -> Result<Option<Object>> {
    let knob = Knob::DefaultIrq;
    Ok(knob
        .read(root)?
        .map(|found| Object::new(knob.clone(), knob.to_string(), found)))
}

fn label(number: u32, name: Option<&String>) -> String {
    match name {
        Some(name) => format!("IRQ {number} ({name})"),
        None => format!("IRQ {number}"),
    }
}

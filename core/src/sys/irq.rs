//! Interrupts: /proc/irq and /proc/interrupts; see Documentation/core-api/irq/irq-affinity.rst.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};

use crate::sysroot::{Sysroot, cpu_list};

/// The names of the devices behind each IRQ, from /proc/interrupts; those without a handler are not
/// in it.
pub fn parse_interrupts(text: &str) -> BTreeMap<u32, String> {
    let mut lines = text.lines();
    let cpus = lines
        .next()
        .map_or(0, |head| head.split_whitespace().count());
    lines
        .filter_map(|line| {
            let (number, rest) = line.split_once(':')?;
            let number = number.trim().parse().ok()?;
            // Behind the counters: chip, hardware number with trigger (one or two words), actions.
            let mut words = rest.split_whitespace().skip(cpus + 1);
            let trigger = words.next()?;
            let mut words: Vec<&str> = words.collect();
            let trigger_stands_apart = words
                .first()
                .is_some_and(|word| matches!(*word, "edge" | "level" | "Edge" | "Level"));
            if trigger_stands_apart
                || (trigger.parse::<u64>().is_ok() && words.len() > 1 && is_trigger(words[0]))
            {
                words.remove(0);
            }
            (!words.is_empty()).then(|| (number, words.join(" ")))
        })
        .collect()
}

fn is_trigger(word: &str) -> bool {
    word.eq_ignore_ascii_case("edge")
        || word.eq_ignore_ascii_case("level")
        || word.eq_ignore_ascii_case("fasteoi")
}

/// The devices behind each IRQ.
///
/// # Errors
/// Where /proc/interrupts cannot be read.
pub fn names(root: &Sysroot) -> Result<BTreeMap<u32, String>> {
    Ok(parse_interrupts(&root.read("proc/interrupts")?))
}

/// Whether the kernel does not let user space move an IRQ, as far as it shows that: since Linux
/// 6.12 the file is read-only then (register_irq_proc in kernel/irq/proc.c).
///
/// # Errors
/// Where the file cannot be looked at. An IRQ that has gone is not held.
pub fn is_held(root: &Sysroot, number: u32) -> Result<bool> {
    const OWNER_MAY_WRITE: u32 = 0o200;
    let path = root.path(format!("proc/irq/{number}/smp_affinity_list"));
    match path
        .metadata()
        .map_err(|source| Error::io(path, "look at", source))
    {
        Ok(file) => Ok(file.mode() & OWNER_MAY_WRITE == 0),
        Err(error) if error.is_gone() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The CPU or CPUs that an IRQ is really delivered to; empty for one without a handler.
///
/// # Errors
/// Where it cannot be read.
pub fn effective(root: &Sysroot, number: u32) -> Result<CpuSet> {
    let path = format!("proc/irq/{number}/effective_affinity_list");
    let text = root.read_value(&path)?.unwrap_or_default();
    cpu_list(&path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_behind_the_counters() {
        let text = "\
           CPU0       CPU1
   0:         45          0   IO-APIC   2-edge      timer
   9:          0          0   IO-APIC   9-fasteoi   acpi
  16:          1          2   IO-APIC  16-fasteoi   ehci_hcd:usb1, snd_hda_intel:card0
  24:          3          0  PCI-MSIX-0000:00:01.0   0-edge      virtio0-config
  25:          3          0  PCI-MSI 524288-edge      nvme0q0
  26:          3          0  IR-PCI-MSI 524289 edge      a b
 NMI:          0          0   Non-maskable interrupts
 ERR:          0
";
        let names = parse_interrupts(text);
        let named = |irq: u32| names.get(&irq).map(String::as_str);
        assert_eq!(named(0), Some("timer"));
        assert_eq!(named(16), Some("ehci_hcd:usb1, snd_hda_intel:card0"));
        assert_eq!(named(24), Some("virtio0-config"));
        assert_eq!(named(25), Some("nvme0q0"));
        assert_eq!(named(26), Some("a b"));
        assert_eq!(names.len(), 6);
    }

    #[test]
    fn garbage_names_nothing() {
        for text in ["", "\n\n", "CPU0\n1", "CPU0\nx: 1 2", "CPU0\n 1:", "é: é"] {
            assert!(parse_interrupts(text).is_empty(), "{text:?}");
        }
    }
}

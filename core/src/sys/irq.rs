//! Interrupts: /proc/irq and /proc/interrupts; see Documentation/core-api/irq/irq-affinity.rst.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};

use crate::sysroot::{Sysroot, cpu_list};

/// The names of the devices behind each IRQ, from /proc/interrupts. IRQs without a handler are not
/// in it.
///
/// # Errors
/// If /proc/interrupts cannot be read.
pub fn names(root: &Sysroot) -> Result<BTreeMap<u32, String>> {
    let mut table = Interrupts::default();
    // A line has a counter per CPU: the whole file may be hundreds of megabytes.
    root.for_each_line("proc/interrupts", |line| table.add(line))?;
    Ok(table.names)
}

/// The names in /proc/interrupts, as it is read line by line.
#[derive(Default)]
struct Interrupts {
    head: Option<Head>,
    names: BTreeMap<u32, String>,
}

/// The first line, which names the CPUs.
struct Head {
    cpus: usize,
    /// The offset of the colon in each line, if the columns are as wide as the kernel makes them.
    colon: Option<usize>,
}

/// The width of a counter with the space before it (show_interrupts in kernel/irq/proc.c).
const COUNTER: usize = 11;
/// The number of characters between a line's colon and the name of the first CPU above it.
const TO_FIRST_CPU: usize = 8;

impl Head {
    fn parse(line: &str) -> Self {
        let cpus = line.split_ascii_whitespace().count();
        let colon = line
            .find("CPU")
            .zip(line.rfind("CPU"))
            .filter(|(first, last)| last - first == COUNTER * cpus.saturating_sub(1))
            .and_then(|(first, _)| first.checked_sub(TO_FIRST_CPU));
        Self { cpus, colon }
    }

    /// What follows the counters of a line.
    fn after_counters<'a>(&self, line: &'a str, colon: usize) -> Option<&'a str> {
        let rest = &line[colon + 1..];
        if self.colon == Some(colon) {
            let end = COUNTER * self.cpus;
            let counters_end = end
                .checked_sub(1)
                .and_then(|last| rest.as_bytes().get(last))
                .is_some_and(u8::is_ascii_digit);
            if let Some(after) = rest
                .get(end..)
                .filter(|it| counters_end && it.starts_with(' '))
            {
                return Some(after);
            }
        }
        let mut rest = rest.trim_ascii_start();
        for _ in 0..self.cpus {
            rest = rest
                .split_once(|c: char| c.is_ascii_whitespace())?
                .1
                .trim_ascii_start();
        }
        Some(rest)
    }
}

impl Interrupts {
    fn add(&mut self, line: &str) {
        let Some(head) = &self.head else {
            self.head = Some(Head::parse(line));
            return;
        };
        if let Some((number, name)) = parse_line(head, line) {
            self.names.insert(number, name);
        }
    }
}

/// The number and the device names of one IRQ; `None` if it has none.
fn parse_line(head: &Head, line: &str) -> Option<(u32, String)> {
    let colon = line.find(':')?;
    let number = line[..colon].trim().parse().ok()?;
    Some((number, devices(head.after_counters(line, colon)?)?))
}

/// The names of the devices behind an IRQ, by what follows the counters in its line of
/// /proc/interrupts: the chip, the hardware number with the trigger (one or two words), the actions.
/// `None` if it has none.
pub fn devices(after_counters: &str) -> Option<String> {
    let mut words = after_counters.split_whitespace().skip(1);
    let trigger = words.next()?;
    let mut words: Vec<&str> = words.collect();
    let trigger_is_apart = words
        .first()
        .is_some_and(|word| matches!(*word, "edge" | "level" | "Edge" | "Level"));
    if trigger_is_apart
        || (trigger.parse::<u64>().is_ok() && words.len() > 1 && is_trigger(words[0]))
    {
        words.remove(0);
    }
    (!words.is_empty()).then(|| words.join(" "))
}

fn is_trigger(word: &str) -> bool {
    word.eq_ignore_ascii_case("edge")
        || word.eq_ignore_ascii_case("level")
        || word.eq_ignore_ascii_case("fasteoi")
}

/// Whether the kernel does not let user space move an IRQ, as far as it shows that: since Linux
/// 6.12 the file is read-only then (register_irq_proc in kernel/irq/proc.c).
///
/// # Errors
/// If the file cannot be examined. An IRQ that has gone is not unmovable.
pub fn is_unmovable(root: &Sysroot, number: u32) -> Result<bool> {
    const OWNER_MAY_WRITE: u32 = 0o200;
    let path = root.path(format!("proc/irq/{number}/smp_affinity_list"));
    match path
        .metadata()
        .map_err(|source| Error::io(path, "examine", source))
    {
        Ok(file) => Ok(file.mode() & OWNER_MAY_WRITE == 0),
        Err(error) if error.is_gone() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The CPU or CPUs that an IRQ is delivered to; empty for one without a handler.
///
/// # Errors
/// If it cannot be read.
pub fn effective(root: &Sysroot, number: u32) -> Result<CpuSet> {
    let path = format!("proc/irq/{number}/effective_affinity_list");
    let text = root.read_value(&path)?.unwrap_or_default();
    cpu_list(&path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_interrupts(text: &str) -> BTreeMap<u32, String> {
        let mut table = Interrupts::default();
        for line in text.lines() {
            table.add(line);
        }
        table.names
    }

    #[test]
    fn names_after_the_counters() {
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
        // With other widths the counters are counted.
        let narrow = parse_interrupts(&text.replace("          0", " 0"));
        assert_eq!(narrow, names);
        let cut = "           CPU0       CPU1\n 16:          1          2\n 17:          1\n";
        assert!(parse_interrupts(cut).is_empty());
    }

    #[test]
    fn garbage_names_nothing() {
        for text in ["", "\n\n", "CPU0\n1", "CPU0\nx: 1 2", "CPU0\n 1:", "é: é"] {
            assert!(parse_interrupts(text).is_empty(), "{text:?}");
        }
    }
}

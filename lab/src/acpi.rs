//! The ACPI table that gives every CPU of the lab host P-states, so that acpi-cpufreq makes a real
//! policy for each.

use crate::tool;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Frequency in MHz and power in mW of each P-state, fastest first.
///
/// The kernel takes the state nearest to the TSC's frequency for the present one, which must be the
/// last here, and `_PPC` forbids the first: so every governor picks the same state, and the
/// frequency never changes. A change would make the kernel drop the TSC until the next boot
/// (`mark_tsc_unstable`, "cpufreq changes on SMP"), and any other clock is slow under emulation.
const P_STATES: [(u32, u32); 2] = [(20_000, 10_000), (1_000, 4_000)];
/// An I/O port without a device: acpi-cpufreq writes the wanted state there and never looks back.
const CONTROL_PORT: u16 = 0x0a20;

/// The table as source: ACPI 6.5, section 8.4.5, on the CPU names that QEMU gives (`\_SB.CPUS.C000`
/// and on).
pub fn source(cpus: u16) -> String {
    let mut asl =
        String::from("DefinitionBlock (\"\", \"SSDT\", 2, \"PINFLD\", \"CPUFREQ\", 1)\n{\n");
    let port = format!("ResourceTemplate () {{ Register (SystemIO, 16, 0, {CONTROL_PORT:#06x}) }}");
    let states = P_STATES.iter().enumerate();
    let states: Vec<_> = states
        .map(|(n, (mhz, mw))| format!("Package (6) {{ {mhz}, {mw}, 10, 10, {n}, {n} }}"))
        .collect();
    for cpu in 0..cpus {
        // Writing to a String cannot fail.
        let _ = writeln!(
            asl,
            "  External (\\_SB.CPUS.C{cpu:03X}, DeviceObj)
  Scope (\\_SB.CPUS.C{cpu:03X})
  {{
    Name (_PCT, Package (2) {{ {port}, {port} }})
    Name (_PSS, Package ({}) {{ {} }})
    Name (_PPC, 1)
    Name (_PSD, Package (1) {{ Package (5) {{ 5, 0, {cpu}, 0xFD, 1 }} }})
  }}",
            P_STATES.len(),
            states.join(", "),
        );
    }
    asl + "}\n"
}

/// Compiles the table into `folder` and returns nothing but its presence there as `cpufreq.aml`.
pub fn compile(cpus: u16, folder: &Path) -> Result<()> {
    let path = folder.join("cpufreq.asl");
    std::fs::write(&path, source(cpus))
        .with_context(|| format!("{}: cannot write", path.display()))?;
    tool::run(
        Command::new("iasl")
            .args(["-p", "cpufreq", "cpufreq.asl"])
            .current_dir(folder),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cpu_has_its_own_policy() {
        let asl = source(24);
        assert!(asl.contains("Scope (\\_SB.CPUS.C017)"));
        assert!(!asl.contains("C018"));
        assert!(asl.contains("Package (5) { 5, 0, 23, 0xFD, 1 }"));
        assert_eq!(asl.matches('{').count(), asl.matches('}').count());
    }
}

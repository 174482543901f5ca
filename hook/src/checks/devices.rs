//! Whether the devices that are reset before a start can be.

use pinfold_core::sys::pci;
use pinfold_core::vm::{VmConf, VmId};
use pinfold_core::{Error, Host, Result};

use super::finding::Finding;
use crate::own_steps::{self, Reset};
use crate::settings::{REMOVE, ResetPci, Settings};

/// What would not be reset, and what pre-start would fail with.
///
/// # Errors
/// If sysfs cannot be read.
pub(super) fn findings(
    root: &Host,
    vmid: VmId,
    conf: &VmConf,
    settings: &Settings,
) -> Result<Vec<Finding>> {
    const CHECK: &str = "reset_pci";
    let mut findings = Vec::new();
    let mut before = Vec::new();
    for is_before in [true, false] {
        let mut resets = match own_steps::resets(root, vmid, conf, settings, is_before) {
            Ok(resets) => resets,
            Err(error @ Error::Io { .. }) => return Ok(vec![Finding::of_error(CHECK, &error)]),
            Err(error) => return Ok(vec![Finding::warn(CHECK, error.to_string(), "")]),
        };
        resets.retain(|reset| !before.contains(reset));
        for reset in &resets {
            findings.extend(of_reset(root, reset, is_before)?);
        }
        before = resets;
    }
    if findings.is_empty() && settings.reset_pci != ResetPci::default() {
        findings.push(Finding::ok(CHECK, "the devices can be reset"));
    }
    Ok(findings)
}

/// What keeps functions from being reset. Only what is required stops a start.
fn of_reset(root: &Host, reset: &Reset, is_before: bool) -> Result<Vec<Finding>> {
    const CHECK: &str = "reset_pci";
    let Reset {
        functions,
        method,
        required,
    } = reset;
    let stops = *required && is_before;
    let finding = |what: String, fix: String| match stops {
        true => Finding::error(CHECK, what, fix),
        false => Finding::warn(CHECK, what, fix),
    };
    let mut findings = Vec::new();
    for function in functions {
        if !pci::is_present(root, function) {
            findings.push(finding(
                format!("PCI {function}: no such device on this host"),
                "correct the address; `pci-reset --list` shows all devices".into(),
            ));
            continue;
        }
        let methods = pci::reset_methods(root, function)?;
        if method != REMOVE && !methods.contains(method) {
            findings.push(finding(
                format!(
                    "PCI {function} is not reset: it has no reset method {method:?}, but {}",
                    if methods.is_empty() {
                        "none".to_owned()
                    } else {
                        methods.join(", ")
                    }
                ),
                format!("choose one of these, or method = \"{REMOVE}\""),
            ));
        }
    }
    let obstacles = pci_reset::obstacles(root, functions)?;
    let free: Vec<String> = functions
        .iter()
        .filter(|function| {
            pci::is_present(root, function) && obstacles.iter().all(|(other, _)| other != *function)
        })
        .map(|function| format!("\"{function}\""))
        .collect();
    for (function, reasons) in obstacles {
        let fix = match free[..] {
            [] => "write reset_pci = false".to_owned(),
            _ => format!(
                "write reset_pci = false, or only the others: reset_pci = [{}]",
                free.join(", ")
            ),
        };
        let so = if stops {
            ", so the VM would not start"
        } else {
            ""
        };
        findings.push(finding(
            format!("PCI {function} is not reset{so}: {reasons}"),
            fix,
        ));
    }
    Ok(findings)
}

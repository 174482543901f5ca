//! The settings' `pins`: which CPUs each vCPU may run on.

use pinfold_core::{CpuExpr, CpuSet, CpuSetError, MAX_CPU, cpuexpr};
use serde::Deserialize;

use super::cpus;

/// More pins than the kernel has CPUs are no layout. A pin's set is as large as its CPU's number, so they are counted
/// before they are made.
const MAX_PINS: usize = MAX_CPU + 1;

/// Which CPUs each vCPU may run on, as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU, as in [6, \"7,19\", \"core:8\"]"
)]
pub(super) enum Pins {
    /// CPU by CPU, in vCPU order.
    InOrder(String),
    /// A list per vCPU.
    PerVcpu(Vec<Cpus>),
}

/// The CPUs of one vCPU.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Cpus {
    One(usize),
    Text(String),
}

impl Pins {
    /// The CPUs of each vCPU, by its number; at least one each.
    ///
    /// # Errors
    /// What is wrong, with the vCPU or the token.
    pub(super) fn resolve(self, host: &cpuexpr::Host<'_>) -> Result<Vec<CpuSet>, String> {
        let pins = match self {
            Self::PerVcpu(lists) => {
                not_too_many(lists.len())?;
                let pin = |(vcpu, list)| match list {
                    Cpus::One(cpu) if cpu > MAX_CPU => Err(CpuSetError::TooLarge(cpu.to_string()).to_string()),
                    Cpus::One(cpu) => Ok(one(cpu)),
                    Cpus::Text(text) => cpus(host, &text).map_err(|why| format!("vCPU {vcpu}: {why}")),
                };
                lists.into_iter().enumerate().map(pin).collect::<Result<Vec<_>, _>>()?
            }
            Self::InOrder(text) => in_order(&text)?,
        };
        match pins.iter().position(CpuSet::is_empty) {
            Some(vcpu) => Err(format!("vCPU {vcpu} has no CPU")),
            None if pins.is_empty() => Err("no CPU at all".into()),
            None => Ok(pins),
        }
    }
}

/// A CPU set has no order: token by token, ranges ascending. What a selector stands for has none either, and whether the
/// siblings of a core belong side by side is the guest's matter, so there are none in here.
fn in_order(text: &str) -> Result<Vec<CpuSet>, String> {
    let mut pins = Vec::new();
    for token in text.split(',') {
        let cpus: CpuSet = token.parse().map_err(|error: CpuSetError| match text.parse::<CpuExpr>() {
            Ok(_) => format!(
                "{:?} in {text:?} has no order; write CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU, as in \
                 [\"core:6\", \"core:6\"]",
                token.trim()
            ),
            Err(_) => error.to_string(),
        })?;
        not_too_many(pins.len() + cpus.len())?;
        pins.extend(cpus.iter().map(one));
    }
    Ok(pins)
}

fn one(cpu: usize) -> CpuSet {
    [cpu].into_iter().collect()
}

fn not_too_many(count: usize) -> Result<(), String> {
    match count {
        ..=MAX_PINS => Ok(()),
        _ => Err(format!("more than {MAX_PINS}, the most CPUs the kernel knows")),
    }
}

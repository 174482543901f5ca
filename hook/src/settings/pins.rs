//! The settings' `pins`: the CPUs of each vCPU.

use pinfold_core::selector;
use pinfold_core::{CpuSet, CpuSetError, MAX_CPU, Selector};
use serde::Deserialize;

/// More pins than the kernel supports CPUs are an error. A pin's set is as large as its CPU's
/// number, so they are counted before they are made.
const MAX_PINS: usize = MAX_CPU + 1;

/// The text of `pins` that leaves the order to hook.
const AUTO: &str = "auto";

/// The CPUs of each vCPU, as written in the settings.
#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "\"auto\", CPUs in vCPU order, as in \"6,18,7,19\", or a list per vCPU, as in [6, \"7,19\", \"core:8\"]"
)]
pub(super) enum Pins {
    /// CPU by CPU, in vCPU order; or [`AUTO`].
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
    /// Whether the order is left to hook: see [`in_vcpu_order`](crate::choice::in_vcpu_order).
    pub(super) fn are_auto(&self) -> bool {
        matches!(self, Self::InOrder(text) if text.trim() == AUTO)
    }

    /// The CPUs of each vCPU as they are written, by its number; at least one each.
    ///
    /// # Errors
    /// What is wrong, with the vCPU or the token.
    pub(super) fn resolve(self, host: &selector::Resolver<'_>) -> Result<Vec<CpuSet>, String> {
        let pins = match self {
            Self::PerVcpu(lists) => {
                not_too_many(lists.len())?;
                let pin = |(vcpu, list)| match list {
                    Cpus::One(cpu) if cpu > MAX_CPU => {
                        Err(CpuSetError::TooLarge(cpu.to_string()).to_string())
                    }
                    Cpus::One(cpu) => Ok(one(cpu)),
                    Cpus::Text(text) => {
                        cpus(host, &text).map_err(|why| format!("vCPU {vcpu}: {why}"))
                    }
                };
                lists
                    .into_iter()
                    .enumerate()
                    .map(pin)
                    .collect::<Result<Vec<_>, _>>()?
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

/// The CPUs that a text stands for on the host; none for an empty one.
pub(super) fn cpus(
    host: &selector::Resolver<'_>,
    text: &str,
) -> std::result::Result<CpuSet, String> {
    if text.trim().is_empty() {
        return Ok(CpuSet::new());
    }
    let expr: Selector = text
        .parse()
        .map_err(|error: selector::SelectorError| error.to_string())?;
    if expr.names_vms() {
        // It would also wait for QEMU's monitor, which the deadlines do not include.
        let why = "the CPUs of a VM's vCPUs change while it runs, settings do not; \
                   write the CPUs themselves";
        return Err(format!("{expr}: {why}"));
    }
    host.resolve(&expr).map_err(|error| error.to_string())
}

/// A CPU set has no order: token by token, ranges ascending. The CPUs of a selector have none
/// either, and whether siblings of a core should be side by side depends on the guest, so there
/// are none in here.
fn in_order(text: &str) -> Result<Vec<CpuSet>, String> {
    let mut pins = Vec::new();
    for token in text.split(',') {
        let cpus: CpuSet =
            token
                .parse()
                .map_err(|error: CpuSetError| match text.parse::<Selector>() {
                    Ok(_) => format!(
                        "{:?} in {text:?} has no order; write \"auto\", CPUs in vCPU order, as in \
                 \"6,18,7,19\", or a list per vCPU, as in [\"core:6\", \"core:6\"]",
                        token.trim()
                    ),
                    Err(_) => format!("{error}, or \"auto\""),
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
        _ => Err(format!(
            "more than {MAX_PINS}, the most CPUs the kernel knows"
        )),
    }
}

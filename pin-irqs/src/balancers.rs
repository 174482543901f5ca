//! Running irqbalances, and the CPUs that they move IRQs to.

use pinfold_core::sys::irqbalance;
use pinfold_core::{Host, Knob, Result, Setting};

/// Their name for --only and --except.
pub(crate) const NAME: &str = "irqbalance";

/// The running irqbalances that have a socket. They answer only to root: for other users there are
/// none.
///
/// # Errors
/// If one does not answer.
pub fn balancers(root: &Host) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    for task in irqbalance::running(root)? {
        let knob = Knob::Irqbalance(task.id);
        match knob.read(root) {
            Err(error) if error.is_denied() => {}
            found => settings.extend(found?.map(|found| {
                let label = knob.to_string();
                Setting::new(knob, label, found)
            })),
        }
    }
    Ok(settings)
}

//! The CPUs of network queues, to which received packets are handed on (RPS); see the kernel's
//! networking/scaling.rst.

use pinfold_core::sys::net;
use pinfold_core::{Host, Knob, Result, Setting};

/// The queues with CPUs of their own. Most have none, and are not listed: RPS is off there,
/// and any CPU would switch it on.
///
/// # Errors
/// If they cannot be listed. What cannot be read or goes meanwhile is left out.
pub fn queues(root: &Host) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    for queue in net::queues(root)? {
        let label = format!("RPS of {}", name(&queue));
        let knob = Knob::QueueCpus(queue);
        // One that cannot be read does not keep the others from being listed.
        let found = knob.read(root).ok().flatten();
        let found = found.filter(|found| !found.is_unset());
        settings.extend(found.map(|found| Setting::new(knob, label, found)));
    }
    Ok(settings)
}

/// A queue's name for people, `enp6s0 rx-0`.
pub(crate) fn name(queue: &str) -> String {
    queue.replace('/', " ")
}

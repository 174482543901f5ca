//! The CPUs of network queues: to which received packets are handed on (RPS), and which send by a
//! queue (XPS); see the kernel's networking/scaling.rst.

use pinfold_core::knob::Value;
use pinfold_core::sys::net;
use pinfold_core::{Host, Knob, Result, Setting};

/// The queues with CPUs of their own. Most have none, and are not listed: RPS or XPS is off there,
/// and any CPU would switch it on.
///
/// # Errors
/// If they cannot be listed or read. What goes meanwhile is left out.
pub fn queues(root: &Host) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    for queue in net::queues(root)? {
        let knob = Knob::QueueCpus(queue);
        let found = knob.read(root)?.filter(|found| !found.is_unset());
        settings.extend(found.map(|found| setting(knob, found)));
    }
    Ok(settings)
}

fn setting(knob: Knob, found: Value) -> Setting {
    let label = match &knob {
        Knob::QueueCpus(queue) => format!("{} of {}", kind(queue).to_uppercase(), name(queue)),
        _ => knob.to_string(),
    };
    Setting::new(knob, label, found)
}

/// What a queue's CPUs are called.
pub(crate) fn kind(queue: &str) -> &'static str {
    if net::is_receiving(queue) {
        "rps"
    } else {
        "xps"
    }
}

/// A queue's name for people, `enp6s0 rx-0`.
pub(crate) fn name(queue: &str) -> String {
    queue.replace('/', " ")
}

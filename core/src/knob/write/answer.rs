//! Replies to writes.

/// How the kernel or systemd replied to a write.
#[derive(Debug)]
pub(in crate::knob) enum Answer {
    /// Accepted; with what reads back, if it was read.
    Taken(Option<String>),
    /// Never allowed for this object, for the reason given.
    Refused(String),
}

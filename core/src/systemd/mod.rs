//! systemd: the values of its units and drop-ins, read over D-Bus and from /run/systemd.
//!
//! Nothing here changes a unit; that is in [`crate::knob`]. Messages for the journal are sent from
//! here too.

mod dbus;
pub(crate) mod drop_ins;
#[cfg(test)]
pub(crate) mod fake;
pub mod journal;
mod scopes;
mod session;
pub(crate) mod timer;
mod units;

pub(crate) use dbus::Writer;
pub use drop_ins::overrides;
pub use scopes::ScopeProperties;
#[cfg(test)]
pub(crate) use session::BUS_SOCKET;
pub(crate) use session::{Called, Client};
pub use session::{Session, Timeouts};
pub(crate) use units::{allowed_cpus, bitmap};
pub use units::{allowed_cpus_of, is_delegated, is_unit_name};

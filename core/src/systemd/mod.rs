//! systemd: its units and drop-ins, read over D-Bus.

mod dbus;
mod units;

pub use units::*;

//! Values that come back: what a tool saves in a file, and what hook keeps under /run/pinfold.

pub mod save;
pub mod store;

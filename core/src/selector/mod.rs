//! CPUs as people name them: by number (`0-5,12-17`), by what the machine has (`llc:1`), or by
//! both. docs/selectors.md is the reference.
//!
//! Not to be confused with [`crate::cli::filter`], for `--only` and `--except`, which choose IRQs
//! and threads.
//!
//! Parsing the text and reading the host are separate: `FromStr` knows only the grammar,
//! [`Selector::resolve`] reads from the host what the names stand for. A plain list needs no host.

mod ast;
mod parse;
mod resolve;

pub use ast::{Selector, SelectorError};
pub use resolve::Resolver;

#[cfg(test)]
mod tests;

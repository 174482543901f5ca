//! CPUs as people name them: by number (`0-5,12-17`), by what the machine has (`llc:1`), or by
//! both. docs/selectors.md is the reference.
//!
//! Not to be confused with [`crate::cli::filter`], whose `--only` and `--except` choose IRQs and
//! threads.
//!
//! Reading the text and looking at the host are apart: `FromStr` knows the grammar alone,
//! [`Selector::resolve`] asks the host what the names stand for. A plain list asks nothing.

mod ast;
mod parse;
mod resolve;

pub use ast::{Selector, SelectorError};
pub use resolve::Resolver;

#[cfg(test)]
mod tests;

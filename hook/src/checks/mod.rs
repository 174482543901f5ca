//! What is checked: what stops a start, and what is advice.

pub(crate) mod advice;
pub(crate) mod finding;
pub(crate) mod required;

//! The command's face: what is typed and what comes back, on a captured host. A case is a file.

#![allow(clippy::disallowed_methods)]

#[test]
fn golden() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

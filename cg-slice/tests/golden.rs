//! The command line's input and output on captured hosts. A case is a file.

#![allow(clippy::disallowed_methods)]

#[test]
fn golden() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

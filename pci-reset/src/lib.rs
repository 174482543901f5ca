//! Remove and rescan PCI functions.

/// Being written.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

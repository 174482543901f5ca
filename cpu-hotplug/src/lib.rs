//! Take CPUs offline and online.

/// Being written.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

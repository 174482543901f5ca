//! Hold slices to a set of CPUs and take a VM out of its slice.

/// Being written.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

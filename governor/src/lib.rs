//! Set the cpufreq governor of CPUs.

/// Being written.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

//! Pin a VM's vCPU threads one to one, its iothreads and emulator threads.

/// Being written.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}

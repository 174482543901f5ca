//! See the library: pin-kthreads is its whole.

fn main() -> std::process::ExitCode {
    pin_kthreads::main(option_env!("PINFOLD_COMMIT"))
}

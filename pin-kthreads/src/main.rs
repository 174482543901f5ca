//! The program; see the library.

fn main() -> std::process::ExitCode {
    pin_kthreads::main(option_env!("PINFOLD_COMMIT"))
}

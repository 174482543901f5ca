//! The program; see the library.

fn main() -> std::process::ExitCode {
    governor::main(option_env!("PINFOLD_COMMIT"))
}

//! See the library: governor is its whole.

fn main() -> std::process::ExitCode {
    governor::main(option_env!("PINFOLD_COMMIT"))
}

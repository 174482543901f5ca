//! The program; see the library.

fn main() -> std::process::ExitCode {
    hook::main(option_env!("PINFOLD_COMMIT"))
}

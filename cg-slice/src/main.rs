//! The program; see the library.

fn main() -> std::process::ExitCode {
    cg_slice::main(option_env!("PINFOLD_COMMIT"))
}

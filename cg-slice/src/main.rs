//! See the library: cg-slice is its whole.

fn main() -> std::process::ExitCode {
    cg_slice::main(option_env!("PINFOLD_COMMIT"))
}

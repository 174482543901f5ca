//! `pinfold COMMAND`; see `front` in the library.

fn main() -> std::process::ExitCode {
    hook::front::main(option_env!("PINFOLD_COMMIT"))
}

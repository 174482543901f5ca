//! The program; see the library.

fn main() -> std::process::ExitCode {
    pin_irqs::main(option_env!("PINFOLD_COMMIT"))
}

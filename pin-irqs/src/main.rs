//! See the library: pin-irqs is its whole.

fn main() -> std::process::ExitCode {
    pin_irqs::main(option_env!("PINFOLD_COMMIT"))
}

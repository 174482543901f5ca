//! See the library: pin-vcpu is its whole.

fn main() -> std::process::ExitCode {
    pin_vcpu::main(option_env!("PINFOLD_COMMIT"))
}

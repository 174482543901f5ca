//! See the library: pci-reset is its whole.

fn main() -> std::process::ExitCode {
    pci_reset::main(option_env!("PINFOLD_COMMIT"))
}

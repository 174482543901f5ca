//! The program; see the library.

fn main() -> std::process::ExitCode {
    pci_reset::main(option_env!("PINFOLD_COMMIT"))
}

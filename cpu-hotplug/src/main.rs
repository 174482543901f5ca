//! The program; see the library.

fn main() -> std::process::ExitCode {
    cpu_hotplug::main(option_env!("PINFOLD_COMMIT"))
}

//! See the library: cpu-hotplug is its whole.

fn main() -> std::process::ExitCode {
    cpu_hotplug::main(option_env!("PINFOLD_COMMIT"))
}

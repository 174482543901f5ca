//! See the library: hook is its whole.

fn main() -> std::process::ExitCode {
    hook::main()
}

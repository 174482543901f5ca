//! Shell completions: static ones from the command lines, and for VMs, phases, CPUs and governors the words that
//! `hook __complete KIND` prints on the host.

use std::path::PathBuf;

use clap::Command;
use clap_complete::{Generator, Shell, generate};

use hook::front::{self, programs};

/// The completions of every program for every shell: their paths and texts.
pub(crate) fn all() -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for program in programs().into_iter().chain([front::command()]) {
        let program = for_completion(program);
        let name = program.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let folder = shell.to_string();
            let file = match shell {
                // The names by which the shells look for them.
                Shell::Bash => name.clone(),
                other => other.file_name(&name),
            };
            let text = script(shell, program.clone(), &name) + &dynamic(shell, &name);
            files.push((PathBuf::from(folder).join(file), text.into_bytes()));
        }
    }
    files
}

/// A program without what is hidden, and without the arguments that a command takes the place of:
/// zsh would ask for these first.
fn for_completion(mut program: Command) -> Command {
    program.build();
    reduced(&program)
}

fn reduced(program: &Command) -> Command {
    if !program.has_subcommands() {
        return program.clone();
    }
    // clap wants texts that live as long as the program.
    let name: &'static str = program.get_name().to_owned().leak();
    let options = program.get_arguments().filter(|it| {
        let generated = ["help", "version"].contains(&it.get_id().as_str());
        !it.is_positional() && !generated
    });
    let commands = program
        .get_subcommands()
        .filter(|it| !it.is_hide_set() && it.get_name() != "help");
    let version: &'static str = program.get_version().unwrap_or_default().to_owned().leak();
    Command::new(name)
        .version(version)
        .args(options.cloned())
        .about(program.get_about().cloned().unwrap_or_default())
        .subcommands(commands.map(reduced))
}

fn script(shell: Shell, mut program: Command, name: &str) -> String {
    let mut text = Vec::new();
    generate(shell, &mut program, name, &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    match shell {
        Shell::Zsh => with_host_words(&text, name),
        _ => text,
    }
}

/// What a program's arguments name on the host.
fn kinds(program: &str) -> &'static [&'static str] {
    match program {
        "hook" => &["vms", "phases"],
        "pinfold" => &["vms", "phases", "cpus", "governors"],
        "pin-vcpu" | "pci-reset" => &["vms"],
        "governor" => &["governors", "cpus"],
        _ => &["cpus"],
    }
}

/// zsh: the positional arguments of the generated script ask the host instead of listing files.
fn with_host_words(text: &str, name: &str) -> String {
    let words = kinds(name).join(" ");
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let is_positional =
            line.starts_with("':") || line.starts_with("'::") || line.starts_with("'*::");
        let line = if is_positional && line.contains(":_default'") {
            line.replace(
                ":_default'",
                &format!(":_pinfold_{}'", name.replace('-', "_")),
            )
        } else {
            line.to_owned()
        };
        lines.push(line);
    }
    let function = format!(
        "_pinfold_{}() {{\n    local -a words\n    local kind\n    for kind in {words}; do\n        \
         words+=(${{(f)\"$(hook __complete $kind 2>/dev/null)\"}})\n    done\n    compadd -a words\n}}\n",
        name.replace('-', "_")
    );
    // After the line `#compdef`, which has to be the first.
    lines.insert(1, function);
    lines.join("\n") + "\n"
}

/// bash and fish: words of the host beside those of the generated script.
fn dynamic(shell: Shell, name: &str) -> String {
    let function = name.replace('-', "_");
    // As clap_complete names it.
    let generated = name.replace('-', "__");
    let words = kinds(name).join(" ");
    match shell {
        Shell::Bash => format!(
            r#"
_pinfold_{function}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} kind
    _{generated} "$@"
    [[ $current == -* ]] && return 0
    for kind in {words}; do
        COMPREPLY+=($(compgen -W "$(hook __complete "$kind" 2>/dev/null)" -- "$current"))
    done
}}
complete -F _pinfold_{function} -o nosort -o bashdefault {name} 2>/dev/null || complete -F _pinfold_{function} {name}
"#
        ),
        Shell::Fish => kinds(name)
            .iter()
            .map(|kind| {
                format!("complete -c {name} -f -a '(hook __complete {kind} 2>/dev/null)'\n")
            })
            .collect(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_completions_for_three_shells_that_ask_the_host() {
        let files = all();
        assert_eq!(files.len(), 3 * (programs().len() + 1));
        for (path, text) in files {
            let text = String::from_utf8(text).unwrap();
            let path = path.display();
            assert!(text.contains("hook __complete"), "{path}");
            let offers_hidden = text.lines().any(|line| {
                let is_call = line.contains("hook __complete ");
                line.contains("__complete") && !is_call
            });
            assert!(!offers_hidden, "{path}");
        }
    }
}

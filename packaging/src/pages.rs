//! Man pages: section 8 from the command lines, sections 5 and 7 from packaging/man/.

use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;

use hook::front::programs;

use crate::commands::{EXAMPLES, EXIT_STATUS, FILES};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Pages that no command line defines: name, section, text with @VERSION@.
const WRITTEN: [(&str, &str, &str); 3] = [
    ("pinfold", "8", include_str!("../man/pinfold.8")),
    ("pinfold.toml", "5", include_str!("../man/pinfold.toml.5")),
    (
        "pinfold-selectors",
        "7",
        include_str!("../man/pinfold-selectors.7"),
    ),
];

/// All pages: their paths and texts.
pub(crate) fn all() -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut pages = Vec::new();
    for mut program in programs() {
        program.build();
        add(&program, &mut pages)?;
    }
    for (name, section, text) in WRITTEN {
        let text = text.replace("@VERSION@", VERSION);
        pages.push((path(name, section), text.into_bytes()));
    }
    Ok(pages)
}

fn path(name: &str, section: &str) -> PathBuf {
    format!("man/man{section}/{name}.{section}").into()
}

/// The page of a command and those of its subcommands.
fn add(command: &Command, pages: &mut Vec<(PathBuf, Vec<u8>)>) -> anyhow::Result<()> {
    pages.push((path(name(command), "8"), page(command)?));
    for subcommand in subcommands(command) {
        add(subcommand, pages)?;
    }
    Ok(())
}

/// `hook-status` for `hook status`.
fn name(command: &Command) -> &str {
    command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
}

fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|it| it.get_name() != "help" && !it.is_hide_set())
}

fn page(command: &Command) -> anyhow::Result<Vec<u8>> {
    let man = Man::new(command.clone())
        .section("8")
        .source(format!("Pinfold {VERSION}"))
        .manual("System administration");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if subcommands(command).next().is_some() {
        man.render_subcommands_section(&mut text)?;
    }
    text.extend(extra_sections(command)?.bytes());
    Ok(text)
}

fn extra_sections(command: &Command) -> anyhow::Result<String> {
    let name = name(command);
    let program = name
        .split_once(' ')
        .map_or(name, |(program, _)| program)
        .to_owned();
    let is_hook = program == "hook" || program.starts_with("hook-");
    let mut text = String::new();
    if is_hook {
        text += ".SH FILES\n";
        for (file, what) in FILES {
            text += &format!(".TP\n.I {}\n{}\n", escaped(file), escaped(what));
        }
    }
    text += ".SH \"EXIT STATUS\"\n";
    let own = command.get_after_help().map(ToString::to_string);
    for line in own.as_deref().unwrap_or(EXIT_STATUS).lines().skip(1) {
        let (code, meaning) = (line.trim().split_once(' ')).context("an exit code")?;
        text += &format!(".TP\n.B {code}\n{}\n", escaped(meaning.trim()));
    }
    if let Some((_, examples)) = EXAMPLES.iter().find(|(page, _)| *page == name) {
        text += ".SH EXAMPLES\n";
        for (line, what) in *examples {
            text += &format!(".TP\n.B {}\n{}\n", escaped(line), escaped(what));
        }
    }
    text += ".SH \"SEE ALSO\"\n";
    let mut others = vec!["pinfold(8)", "pinfold-selectors(7)"];
    if is_hook {
        others.extend(["pinfold.toml(5)", "qm(1)"]);
    }
    if name != program || name.contains('-') && is_hook {
        others.insert(0, "hook(8)");
    }
    let others: Vec<String> = others
        .into_iter()
        .map(|other| {
            let (name, section) = other.split_once('(').unwrap_or((other, ""));
            format!(".BR {} ({section}", escaped(name))
        })
        .collect();
    text += &others.join(",\n");
    text.push('\n');
    Ok(text)
}

/// Text for troff: hyphens stay hyphens, and no line is a request.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn texts() -> Vec<(String, String)> {
        let file_name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        all()
            .unwrap()
            .into_iter()
            .map(|(path, text)| (file_name(&path), String::from_utf8(text).unwrap()))
            .collect()
    }

    #[test]
    fn every_command_has_a_page_with_every_option() {
        let pages = texts();
        let mut commands = 0;
        let mut open = programs();
        while let Some(mut command) = open.pop() {
            command.build();
            let page = format!("{}.8", name(&command));
            let (_, text) = pages.iter().find(|(name, _)| *name == page).expect(&page);
            for long in command
                .get_arguments()
                .filter(|it| !it.is_hide_set())
                .filter_map(clap::Arg::get_long)
            {
                let option = format!("\\-\\-{}", long.replace('-', "\\-"));
                assert!(text.contains(&option), "{page}: {option}");
            }
            open.extend(subcommands(&command).cloned());
            commands += 1;
        }
        assert!(commands > 20, "{commands}");
    }

    #[test]
    fn every_program_and_verb_of_hook_has_an_example_that_parses() {
        let mut pages: BTreeSet<String> = BTreeSet::new();
        for mut program in programs() {
            program.build();
            pages.insert(name(&program).to_owned());
            if program.get_name() == "hook" {
                pages.extend(subcommands(&program).map(|verb| name(verb).to_owned()));
            }
        }
        let with_examples = EXAMPLES.iter().map(|(page, _)| (*page).to_owned());
        assert_eq!(with_examples.collect::<BTreeSet<_>>(), pages);
        for (line, _) in EXAMPLES.iter().flat_map(|(_, examples)| *examples) {
            let mut words = line.split(' ');
            let program = words.next().unwrap();
            if program == "qm" {
                continue;
            }
            let command = programs().into_iter().find(|it| it.get_name() == program);
            let parsed = command.unwrap().try_get_matches_from(line.split(' '));
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }

    /// The keys that a settings file may have, as hook lists them for an unknown one.
    fn keys(text: &str) -> Vec<String> {
        let root = pinfold_core::Host::new("/nonexistent");
        let error = hook::check_settings(&root, text, "test").unwrap_err();
        let error = format!("{error:#}");
        let (_, listed) = error.split_once("expected").expect(&error);
        listed
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_page_of_the_settings_file_has_every_key() {
        let pages = texts();
        let (_, text) = pages
            .iter()
            .find(|(name, _)| name == "pinfold.toml.5")
            .unwrap();
        let top = keys("zzz = 1\n");
        let deadlines = keys("[deadlines]\nzzz = 1\n");
        assert!(
            top.len() > 10 && deadlines.len() > 5,
            "{top:?} {deadlines:?}"
        );
        for key in top
            .iter()
            .chain(&deadlines)
            .filter(|key| *key != "deadlines")
        {
            assert!(text.contains(&format!("\n.B {key}\n")), "{key}");
        }
    }
}

//! The README against the workspace: its table lists all tools, they accept its command lines, and the links of all
//! documents lead to files.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use hook::front::programs;

const README: &str = include_str!("../../README.md");
const WORKSPACE: &str = include_str!("../../Cargo.toml");
const MAKEFILE: &str = include_str!("../../Makefile");

/// Members of the workspace that are not tools.
const NOT_TOOLS: [&str; 3] = ["core", "lab", "packaging"];

/// A row of the README's table of tools: the name, and the command lines of the examples.
fn rows() -> Vec<(&'static str, Vec<&'static str>)> {
    let section = README.split("## The tools").nth(1).unwrap_or_default();
    let rows = section
        .split("\n\n")
        .nth(1)
        .unwrap_or_default()
        .lines()
        .skip(2);
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        (
            cells[0].trim_matches('`'),
            cells[2].split('`').skip(1).step_by(2).collect(),
        )
    })
    .collect()
}

/// Parses a command line as the tool does, and runs nothing.
fn parse(line: &str) -> Result<(), String> {
    let words: Vec<&str> = line
        .split('#')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let program = programs().into_iter().find(|it| it.get_name() == words[0]);
    let program = program.ok_or_else(|| format!("{}: not a tool of the workspace", words[0]))?;
    let parsed = program.try_get_matches_from(words);
    parsed.map(drop).map_err(|error| format!("{line}: {error}"))
}

#[test]
fn the_table_lists_every_tool_once() {
    let members = WORKSPACE
        .split("members = [")
        .nth(1)
        .unwrap()
        .split(']')
        .next()
        .unwrap();
    let mut tools: BTreeSet<&str> = members.split('"').skip(1).step_by(2).collect();
    for crate_ in NOT_TOOLS {
        assert!(tools.remove(crate_), "{crate_}");
    }
    let listed: Vec<&str> = rows().iter().map(|(tool, _)| *tool).collect();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), tools);
    assert_eq!(listed.len(), tools.len(), "each once: {listed:?}");
    let installed = MAKEFILE
        .lines()
        .find_map(|line| line.strip_prefix("PRODUCT = "))
        .unwrap();
    assert_eq!(installed.split(' ').collect::<BTreeSet<_>>(), tools);
}

#[test]
fn command_lines_are_accepted() {
    let mut lines = 0;
    for (tool, examples) in rows() {
        assert!(!examples.is_empty(), "{tool} has no example");
        for example in examples {
            assert!(
                example.starts_with(&format!("{tool} ")),
                "an example of {tool}: {example}"
            );
            parse(example).unwrap();
            lines += 1;
        }
    }
    let tools: BTreeSet<&str> = rows().into_iter().map(|(tool, _)| tool).collect();
    let indented = README.lines().filter_map(|line| line.strip_prefix("    "));
    for line in indented.filter(|line| {
        line.split(' ')
            .next()
            .is_some_and(|word| tools.contains(word))
    }) {
        parse(line).unwrap();
        lines += 1;
    }
    assert!(lines > tools.len());
    assert!(
        parse("pin-irqs 5-3").is_err(),
        "an invalid command line is accepted"
    );
}

#[test]
fn the_exit_codes_are_those_of_the_help() {
    let codes = |text: &str| -> BTreeSet<u8> {
        let first = text
            .lines()
            .filter_map(|line| line.trim_start_matches('|').split_whitespace().next());
        first.filter_map(|word| word.parse().ok()).collect()
    };
    let table = README
        .split("| code | meaning |")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let help = |verb: Option<&str>| {
        let mut hook = programs()
            .into_iter()
            .find(|it| it.get_name() == "hook")
            .unwrap();
        let command = match verb {
            Some(verb) => hook.find_subcommand_mut(verb).unwrap(),
            None => &mut hook,
        };
        codes(&command.render_long_help().to_string())
    };
    let verbs = BTreeSet::from([0, 1, 2, 3]);
    assert_eq!(help(Some("status")), verbs);
    assert_eq!(help(Some("check")), verbs);
    assert_eq!(codes(table), &help(None) | &verbs);
}

/// The documents with their text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(workspace().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    for name in [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
    ] {
        paths.push(workspace().join(name));
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    paths.into_iter().map(read).collect()
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn links_lead_to_files() {
    let mut links = 0;
    for (document, text) in documents() {
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = link.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                let target = document.parent().unwrap().join(file);
                assert!(target.is_file(), "{}: {link}", document.display());
                links += 1;
            }
        }
    }
    assert!(links > 10, "{links} links found");
}

/// Paths such as core/src/host.rs, from the root of the workspace.
#[test]
fn source_files_in_the_documents_exist() {
    let is_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let mut paths = 0;
    for (document, text) in documents() {
        for word in text.split(|c: char| !is_path(c)) {
            let word = word.trim_end_matches(['.', '/']);
            let is_source = word
                .split_once('/')
                .is_some_and(|(_, rest)| rest.starts_with("src/") || rest.starts_with("tests/"));
            if is_source {
                assert!(
                    workspace().join(word).exists(),
                    "{}: {word}",
                    document.display()
                );
                paths += 1;
            }
        }
    }
    assert!(paths > 20, "{paths} paths found");
}

/// The tests in the second column of docs/reliability.md are functions of the stories.
#[test]
fn the_tests_of_the_promises_exist() {
    let mut stories = String::new();
    for entry in fs::read_dir(workspace().join("lab/tests/stories")).unwrap() {
        stories += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let page = fs::read_to_string(workspace().join("docs/reliability.md")).unwrap();
    let (_, table) = page.split_once("| promise | tested by |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let mut tests = 0;
    for row in table.lines().skip(2) {
        let column = row.trim_end_matches([' ', '|']).rsplit('|').next().unwrap();
        for name in column.split('`').skip(1).step_by(2) {
            let function = name.rsplit("::").next().unwrap();
            let is_module = name == function && !function.contains('_');
            let is_command = name.contains(' ');
            if !is_module && !is_command && name != "main_job" {
                assert!(
                    stories.contains(&format!("fn {function}(")),
                    "{name}: no such story"
                );
                tests += 1;
            }
        }
    }
    assert!(tests > 40, "{tests} names found");
}

/// Words that CONTRIBUTING.md, "Language", rules out.
const RULED_OUT: [&str; 9] = [
    "told", "tells", "tell", "says", "speaks", "somebody", "nobody", "mend", "mends",
];

fn help(command: &clap::Command) -> String {
    let mut text = command.clone().render_long_help().to_string();
    for subcommand in command.get_subcommands() {
        text += &help(subcommand);
    }
    text
}

#[test]
fn documents_and_help_follow_the_language_rule() {
    let mut texts: Vec<(String, String)> = documents()
        .into_iter()
        .map(|(path, text)| (path.display().to_string(), text))
        .filter(|(path, _)| !path.ends_with("CONTRIBUTING.md"))
        .collect();
    for command in programs() {
        texts.push((format!("{} --help", command.get_name()), help(&command)));
    }
    let mut found = Vec::new();
    for (name, text) in texts {
        for line in text.lines() {
            let mut words = line.split(|c: char| !c.is_alphabetic() && c != '_');
            let is_ruled_out = words.any(|word| RULED_OUT.contains(&word.to_lowercase().as_str()));
            if is_ruled_out
                || line.contains(" is no ") && !line.to_lowercase().contains("there is no ")
            {
                found.push(format!("{name}: {line}"));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

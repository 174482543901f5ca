//! The words of `args:`, as Proxmox VE hands them to QEMU.
//!
//! `PVE::Tools::split_args` is Perl's `Text::ParseWords::shellwords`: it differs from a shell in
//! that nothing at all is left of a text with an unbalanced quote.

use std::ops::Range;

/// Whether Perl's `\s` matches the character in a text of bytes.
pub(super) fn is_space(char: char) -> bool {
    matches!(char, ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}')
}

/// A word of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    /// Without its quotes and backslashes.
    pub value: String,
    /// Where it is in the text, with these.
    pub place: Range<usize>,
}

/// Splits a text into words; `None` if a quote is not closed or the last character is a backslash.
pub(super) fn split(text: &str) -> Option<Vec<Word>> {
    let mut words = Vec::new();
    let mut chars = text.char_indices().peekable();
    loop {
        while chars.next_if(|(_, char)| is_space(*char)).is_some() {}
        let Some(&(start, _)) = chars.peek() else {
            return Some(words);
        };
        let mut value = String::new();
        while let Some((_, char)) = chars.next_if(|(_, char)| !is_space(*char)) {
            match char {
                '"' | '\'' => loop {
                    match chars.next()?.1 {
                        end if end == char => break,
                        // A backslash hides a quote in both, but only double quotes drop it.
                        '\\' => {
                            if char == '\'' {
                                value.push('\\');
                            }
                            value.push(chars.next()?.1);
                        }
                        other => value.push(other),
                    }
                },
                '\\' => value.push(chars.next()?.1),
                other => value.push(other),
            }
        }
        let end = chars.peek().map_or(text.len(), |(at, _)| *at);
        words.push(Word {
            value,
            place: start..end,
        });
    }
}

/// The options of QEMU that take no value, as qemu-options.hx has them; of every other one the next
/// word is the value, whatever it looks like.
const WITHOUT_VALUE: [&str; 34] = [
    "S",
    "alt-grab",
    "async-teardown",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "one-insn-per-tb",
    "only-migratable",
    "perfmap",
    "preconfig",
    "s",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
];

/// The words of `args:` as QEMU takes them: each an option, `-name` or `--name`, with its value, or a
/// word of its own, which has no name.
fn options(words: &[Word]) -> Vec<(Option<&str>, &[Word])> {
    let mut options = Vec::new();
    let mut rest = words;
    while let Some(first) = rest.first() {
        let dashed = first.value.strip_prefix('-');
        let name = dashed.map(|name| name.strip_prefix('-').unwrap_or(name));
        let length = match name {
            Some(name) if !WITHOUT_VALUE.contains(&name) => rest.len().min(2),
            _ => 1,
        };
        let (option, after) = rest.split_at(length);
        options.push((name, option));
        rest = after;
    }
    options
}

/// The values of one of QEMU's options among the words of `args:`.
pub(super) fn values_of<'a>(words: &'a [Word], name: &str) -> Vec<&'a str> {
    let options = options(words).into_iter();
    let same = options.filter(|(option, _)| *option == Some(name));
    same.filter_map(|(_, option)| option.get(1))
        .map(|word| word.value.as_str())
        .collect()
}

/// `args:` without one of QEMU's options; `None` if it cannot be split.
pub(super) fn without(text: &str, name: &str) -> Option<String> {
    let words = split(text)?;
    let others = options(&words).into_iter();
    let others = others.filter(|(option, _)| *option != Some(name));
    let kept: Vec<&str> = others
        .flat_map(|(_, option)| option)
        .filter_map(|word| text.get(word.place.clone()))
        .collect();
    Some(kept.join(" "))
}

#[cfg(test)]
mod tests {
    use super::{split, values_of, without};

    #[test]
    fn options_as_qemu_takes_them() {
        for (text, values) in [
            ("", &[] as &[&str]),
            ("-smp 4 --smp 6,cores=3", &["4", "6,cores=3"]),
            ("-S -smp 4", &["4"]),
            ("-cpu host disk.raw -smp 4", &["4"]),
            ("-smp", &[]),
            ("-append '-smp 4'", &[]),
            ("-append -smp 4", &[]),
            ("-name '' -smp 4", &["4"]),
            ("---smp 4 -smpx 4", &[]),
        ] {
            let words = split(text).unwrap();
            assert_eq!(values_of(&words, "smp"), values, "{text:?}");
        }
    }

    #[test]
    fn what_is_left_keeps_its_quotes() {
        for (text, left) in [
            ("", Some("")),
            ("-smp 4,dies=2", Some("")),
            ("-smp", Some("")),
            (
                r#" -name "a b"  --smp '4,dies=2' -append '-smp 4' "#,
                Some(r#"-name "a b" -append '-smp 4'"#),
            ),
            ("-S -smp 4 -append -smp é", Some("-S -append -smp é")),
            ("-smp 4 'x", None),
        ] {
            assert_eq!(without(text, "smp").as_deref(), left, "{text:?}");
        }
    }

    #[test]
    fn words_as_shellwords_splits_them() {
        for (text, words) in [
            ("", Some(&[] as &[&str])),
            ("  \t", Some(&[])),
            ("-smp 12,threads=2", Some(&["-smp", "12,threads=2"])),
            (" -a\u{b}-b\u{c}-c ", Some(&["-a", "-b", "-c"])),
            ("-smp '12,threads=2'", Some(&["-smp", "12,threads=2"])),
            ("-append 'x -smp 4'", Some(&["-append", "x -smp 4"])),
            (
                r#"-append "x \"-smp\" \4" y"#,
                Some(&["-append", "x \"-smp\" 4", "y"]),
            ),
            (r"'a\'b\c' d\ e", Some(&[r"a\'b\c", "d e"])),
            (r#"a'b'"c"d '' """#, Some(&["abcd", "", ""])),
            ("a\u{a0}b", Some(&["a\u{a0}b"])),
            ("-smp 4 'x", None),
            ("-smp 4 \"x\\\"", None),
            ("-smp 4 \\", None),
        ] {
            let found = split(text);
            let found = found.as_ref().map(|words| {
                words
                    .iter()
                    .map(|word| word.value.as_str())
                    .collect::<Vec<_>>()
            });
            assert_eq!(found.as_deref(), words, "{text:?}");
        }
    }
}

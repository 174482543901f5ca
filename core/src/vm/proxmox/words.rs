//! The words of `args:`, as Proxmox VE hands them to QEMU.
//!
//! `PVE::Tools::split_args` is Perl's `Text::ParseWords::shellwords`: it differs from a shell in
//! that nothing at all is left of a text with an unbalanced quote.

/// Whether Perl's `\s` matches the character in a text of bytes.
pub(super) fn is_space(char: char) -> bool {
    matches!(char, ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}')
}

/// Splits a text into words; `None` if a quote is not closed or the last character is a backslash.
pub(super) fn split(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '"' | '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        end if end == char => break,
                        // A backslash hides a quote in both, but only double quotes drop it.
                        '\\' => {
                            if char == '\'' {
                                word.push('\\');
                            }
                            word.push(chars.next()?);
                        }
                        other => word.push(other),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            space if is_space(space) => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    Some(words)
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

/// The values of one of QEMU's options among the words of `args:`, `-name VALUE` or `--name VALUE`.
pub(super) fn values_of<'a>(words: &'a [String], name: &str) -> Vec<&'a str> {
    let mut values = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix('-') else {
            continue;
        };
        let option = option.strip_prefix('-').unwrap_or(option);
        if WITHOUT_VALUE.contains(&option) {
            continue;
        }
        let value = words.next();
        if option == name {
            values.extend(value.map(String::as_str));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::{split, values_of};

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
            let found = found
                .as_ref()
                .map(|words| words.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(found.as_deref(), words, "{text:?}");
        }
    }
}

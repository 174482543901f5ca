//! The lines and sections of VMID.conf, as `parse_vm_config` in `PVE::QemuServer` reads them.
//!
//! Proxmox VE reads bytes: what is whitespace, a letter or a digit is so in ASCII only.

use super::schema;
use super::words::is_space;
use crate::text::excerpt;

/// A line of VMID.conf, or a value in one, that Proxmox VE warns of and passes over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// The number of the line, from 1.
    pub line: usize,
    /// The section it is in, `[PENDING]` or a snapshot's; `None` for the VM's own settings.
    pub section: Option<String>,
    /// What is passed over: `cores: x`.
    pub text: String,
    /// Why.
    pub reason: String,
}

impl std::fmt::Display for PassedOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            line,
            section,
            text,
            reason,
        } = self;
        write!(f, "line {line}")?;
        if let Some(section) = section {
            write!(f, " of [{section}]", section = excerpt(section))?;
        }
        write!(f, ": `{}`: {reason}", excerpt(text))
    }
}

/// The part of the file that a line belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Section {
    /// The settings of the VM itself.
    Main,
    /// `[PENDING]`: changes that wait for the next start.
    Pending,
    /// `[special:cloudinit]`, in which nothing is checked.
    Cloudinit,
    /// `[special:fleecing]`, with a key of its own.
    Fleecing,
    /// A snapshot, by its name.
    Snapshot(String),
    /// Any other text in brackets: everything below it is ignored.
    Unknown,
}

impl Section {
    /// The section that a line opens.
    fn opened_by(line: &str) -> Option<Result<Self, String>> {
        let line = line.trim_end_matches(is_space);
        let name = line.strip_prefix('[')?.strip_suffix(']')?;
        if name.contains(']') {
            return None;
        }
        let special = name
            .split_at_checked("special:".len())
            .filter(|(prefix, _)| prefix.eq_ignore_ascii_case("special:"));
        Some(if name.eq_ignore_ascii_case("pending") {
            Ok(Self::Pending)
        } else if let Some((_, "cloudinit")) = special {
            Ok(Self::Cloudinit)
        } else if let Some((_, "fleecing")) = special {
            Ok(Self::Fleecing)
        } else if schema::is_config_id(name) {
            Ok(Self::Snapshot(name.to_owned()))
        } else {
            Err(name.to_owned())
        })
    }

    fn name(&self) -> Option<String> {
        match self {
            Self::Main | Self::Unknown => None,
            Self::Pending => Some("PENDING".into()),
            Self::Cloudinit => Some("special:cloudinit".into()),
            Self::Fleecing => Some("special:fleecing".into()),
            Self::Snapshot(name) => Some(name.clone()),
        }
    }
}

/// The kind of a line in a section.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    /// Nothing that is checked: a part of the description, or the state of a snapshot.
    Unchecked,
    /// `delete:`, the settings that are to go at the next start.
    Delete,
    /// `args:`, which is taken as it is.
    Args(&'a str),
    /// A setting.
    Setting(&'a str, &'a str),
    /// Not a line of the grammar.
    Other,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let trimmed = line.trim_end_matches(is_space);
        let value_of = |key: &str| {
            let value = trimmed.strip_prefix(key)?.strip_prefix(':')?;
            Some(value.trim_start_matches(is_space)).filter(|value| !value.is_empty())
        };
        // Anywhere in the line: the pattern has no anchor.
        let is_snapstate = ["prepare", "delete"].iter().any(|state| {
            trimmed
                .strip_suffix(state)
                .is_some_and(|rest| rest.trim_end_matches(is_space).ends_with("snapstate:"))
        });
        if line.starts_with('#') || value_of("description").is_some() || is_snapstate {
            Self::Unchecked
        } else if let Some(args) = value_of("args") {
            Self::Args(args)
        } else if value_of("delete").is_some() {
            Self::Delete
        } else {
            Self::setting(line).unwrap_or(Self::Other)
        }
    }

    /// `key: value`, by the pattern `^([a-z][a-z_\-]*\d*):\s*(.+?)\s*$`.
    fn setting(line: &'a str) -> Option<Self> {
        let (key, value) = line.split_once(':')?;
        let letters = key.trim_end_matches(|char: char| char.is_ascii_digit());
        let is_key = letters.starts_with(|char: char| char.is_ascii_lowercase())
            && letters
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte == b'-');
        let trimmed = value.trim_matches(is_space);
        // Of a value that is all whitespace the last character is left.
        let value = match trimmed.is_empty() {
            true => &value[value.char_indices().next_back()?.0..],
            false => trimmed,
        };
        is_key.then_some(Self::Setting(key, value))
    }
}

/// Reads the file: calls `set` with each setting of the VM's own section that Proxmox VE takes, in
/// their order, and returns what it passes over. The values have passed [`schema::check`].
pub(super) fn read(text: &str, mut set: impl FnMut(&str, &str)) -> Vec<PassedOver> {
    let mut passed_over = Vec::new();
    let mut section = Section::Main;
    let mut seen = Vec::new();
    for (index, line) in text.split('\n').enumerate() {
        if line.trim_matches(is_space).is_empty() {
            continue;
        }
        let mut pass_over = |section: &Section, text: &str, reason: String| {
            passed_over.push(PassedOver {
                line: index + 1,
                section: section.name(),
                text: text.trim_end_matches(is_space).to_owned(),
                reason,
            });
        };
        match Section::opened_by(line) {
            Some(Ok(opened)) => {
                if seen.contains(&opened) {
                    pass_over(&Section::Main, line, "the section is given twice".into());
                }
                seen.push(opened.clone());
                section = opened;
                continue;
            }
            Some(Err(_)) => {
                let reason = "unknown section, including its lines";
                pass_over(&Section::Main, line, reason.into());
                section = Section::Unknown;
                continue;
            }
            None if section == Section::Unknown => continue,
            None => {}
        }
        match Line::parse(line) {
            Line::Unchecked => {}
            Line::Args(args) => {
                if section == Section::Main {
                    set("args", args);
                }
            }
            Line::Delete => {
                if section != Section::Pending {
                    let reason = "`delete` is allowed in [PENDING] only";
                    pass_over(&section, line, reason.into());
                }
            }
            Line::Setting(key, value) => {
                let checked = match &section {
                    Section::Cloudinit => Ok(value),
                    Section::Fleecing => schema::check_fleecing(key, value),
                    _ => schema::check(key, value),
                };
                match checked {
                    Ok(value) if section == Section::Main => set(key, value),
                    Ok(_) => {}
                    Err(reason) => pass_over(&section, line, reason),
                }
            }
            Line::Other => pass_over(&section, line, "not a `key: value` line".into()),
        }
    }
    passed_over
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> (Vec<String>, Vec<String>) {
        let mut taken = Vec::new();
        let passed_over = read(text, |key, value| taken.push(format!("{key}={value}")));
        (taken, passed_over.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn lines_as_proxmox_matches_them() {
        for (text, settings) in [
            ("cores:4", &["cores=4"] as &[&str]),
            ("cores:\t 4 \r\n", &["cores=4"]),
            ("cores: 4\u{b}\u{c}", &["cores=4"]),
            ("\n \t\n\u{c}\ncores: 4", &["cores=4"]),
            ("cores: 4\ncores: 6\n", &["cores=4", "cores=6"]),
            ("#cores: 8\n# [x]\ncores: 4\n#cores: 2", &["cores=4"]),
            ("description: x%0Acores: 8\ncores: 4", &["cores=4"]),
            ("snapstate: delete\ncores: 4", &["cores=4"]),
            ("cores: 4 snapstate:  prepare \n", &[]),
            ("args: -smp \"4\"  ", &["args=-smp \"4\""]),
            ("args:\t ", &["args= "]),
            ("ostype: \"l26\"", &["ostype=l26"]),
            ("ostype: \"", &["ostype=\""]),
            ("cdrom: none,media=cdrom", &["cdrom=none,media=cdrom"]),
            ("cores: 4\n[PENDING] \ncores: 8", &["cores=4"]),
            ("cores: 4\n[pending]\ndelete: vcpus", &["cores=4"]),
            (
                "cores: 4\n[special:cloudinit]\nx: y\ncores: z",
                &["cores=4"],
            ),
            (
                "cores: 4\n[SPECIAL:fleecing]\nfleecing-images: a1:b",
                &["cores=4"],
            ),
            ("cores: 4\n[a-b_1]\t\nsnaptime: 1\nparent: ab", &["cores=4"]),
        ] {
            assert_eq!(
                taken(text),
                (settings.iter().map(ToString::to_string).collect(), vec![]),
                "{text:?}"
            );
        }
    }

    #[test]
    fn what_proxmox_passes_over() {
        for (text, settings, passed_over) in [
            (
                "cores",
                &[] as &[&str],
                &["line 1: `cores`: not a `key: value` line"] as &[&str],
            ),
            (
                "cores:",
                &[],
                &["line 1: `cores:`: not a `key: value` line"],
            ),
            (
                "cores: \nsockets: 2",
                &["sockets=2"],
                &["line 1: `cores:`: not an integer"],
            ),
            (
                " cores: 4",
                &[],
                &["line 1: ` cores: 4`: not a `key: value` line"],
            ),
            (
                "cores : 4",
                &[],
                &["line 1: `cores : 4`: not a `key: value` line"],
            ),
            (
                "co1res: 4",
                &[],
                &["line 1: `co1res: 4`: not a `key: value` line"],
            ),
            (
                "core\u{e9}: 4",
                &[],
                &["line 1: `core\u{e9}: 4`: not a `key: value` line"],
            ),
            (
                "\u{feff}cores: 4",
                &[],
                &["line 1: `\u{feff}cores: 4`: not a `key: value` line"],
            ),
            (
                "foo-bar1: 4",
                &[],
                &["line 1: `foo-bar1: 4`: unknown setting"],
            ),
            (
                "delete: cores",
                &[],
                &["line 1: `delete: cores`: `delete` is allowed in [PENDING] only"],
            ),
            (
                "cores: 4\rsockets: 2",
                &[],
                &["line 1: `cores: 4\\rsockets: 2`: a carriage return in the value"],
            ),
            (
                "[x]\ncores: 4\n\n[PENDING]\n[pending]\ncores: 4x",
                &[],
                &[
                    "line 1: `[x]`: unknown section, including its lines",
                    "line 5: `[pending]`: the section is given twice",
                    "line 6 of [PENDING]: `cores: 4x`: not an integer",
                ],
            ),
            (
                "[] \n[special:CLOUDINIT]\n[[ab]]",
                &[],
                &[
                    "line 1: `[]`: unknown section, including its lines",
                    "line 2: `[special:CLOUDINIT]`: unknown section, including its lines",
                ],
            ),
            (
                "[ab] x\n[ab\ncores: 4",
                &["cores=4"],
                &[
                    "line 1: `[ab] x`: not a `key: value` line",
                    "line 2: `[ab`: not a `key: value` line",
                ],
            ),
            (
                "[special:fleecing]\ncores: 4",
                &[],
                &["line 2 of [special:fleecing]: `cores: 4`: unknown setting"],
            ),
        ] {
            let expected = (
                settings.iter().map(ToString::to_string).collect(),
                passed_over.iter().map(ToString::to_string).collect(),
            );
            assert_eq!(taken(text), expected, "{text:?}");
        }
        let (_, passed_over) = taken(&format!("x\u{1b}[31m{}", "y".repeat(200)));
        assert!(passed_over[0].len() < 150 && !passed_over[0].contains('\u{1b}'));
    }
}

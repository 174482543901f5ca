//! Property strings: `VALUE,KEY=VALUE,…`, as `parse_property_string` and `check_prop` in
//! `PVE::JSONSchema` take them.

use std::collections::BTreeMap;

use super::words::is_space;
use crate::text::excerpt;

/// A key of a property string.
pub(super) struct Property {
    pub name: &'static str,
    pub kind: Kind,
}

/// What the values of a key are.
pub(super) enum Kind {
    /// 1, on, yes, true and their opposites, in either case.
    Boolean,
    /// A whole number.
    Integer,
    /// A whole number within bounds.
    IntegerIn(f64, f64),
    /// A number that is not below a bound.
    NumberFrom(f64),
    /// A number within bounds.
    NumberIn(f64, f64),
    /// One of a few words.
    OneOf(&'static [&'static str]),
    /// Anything.
    Text,
    /// What a function takes.
    Matching(fn(&str) -> bool),
    /// Another name of a key.
    Alias(&'static str),
    /// Another name of a key, and itself the value of a further one: `virtio=MAC`.
    KeyAlias {
        /// The key that gets the value.
        value_of: &'static str,
        /// The key that gets the name.
        name_of: &'static str,
    },
}

/// The keys of a property string.
pub(super) struct Format {
    /// The key of a value without one.
    pub default_key: Option<&'static str>,
    /// The keys that have to be there.
    pub required: &'static [&'static str],
    pub properties: &'static [&'static [Property]],
}

impl Format {
    fn property(&self, name: &str) -> Option<&Property> {
        self.properties
            .iter()
            .copied()
            .flatten()
            .find(|property| property.name == name)
    }
}

/// The values of a property string by their keys; booleans are `1` and `0`.
///
/// # Errors
/// Why Proxmox VE does not take it.
pub(super) fn parse(format: &Format, text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    let mut has_default = false;
    let twice = |key: &str| format!("`{}` is given twice", excerpt(key));
    for part in text.split(',') {
        if part.chars().all(is_space) {
            continue;
        }
        match part.split_once('=') {
            None => {
                let key = format
                    .default_key
                    .ok_or_else(|| format!("`{}` has no key", excerpt(part)))?;
                if has_default || values.contains_key(key) {
                    return Err(twice(key));
                }
                has_default = true;
                values.insert(key.into(), part.into());
            }
            Some((key, value)) if key.is_empty() || value.is_empty() => {
                return Err(format!("`{}` lacks a key or a value", excerpt(part)));
            }
            Some((key, value)) => {
                if values.contains_key(key) {
                    return Err(twice(key));
                }
                let unknown = || format!("unknown property `{}`", excerpt(key));
                let mut property = format.property(key).ok_or_else(unknown)?;
                if let Kind::KeyAlias { name_of, .. } = property.kind
                    && values.insert(name_of.into(), key.into()).is_some()
                {
                    return Err(twice(name_of));
                }
                if let Kind::Alias(name) | Kind::KeyAlias { value_of: name, .. } = property.kind {
                    property = format.property(name).ok_or_else(unknown)?;
                }
                let value = match (&property.kind, boolean(value)) {
                    (Kind::Boolean, Some(true)) => "1",
                    (Kind::Boolean, Some(false)) => "0",
                    _ => value,
                };
                values.insert(property.name.into(), value.into());
            }
        }
    }
    if let Some(missing) = format
        .required
        .iter()
        .find(|name| !values.contains_key(**name))
    {
        return Err(format!("`{missing}` is missing"));
    }
    for (key, value) in &values {
        if let Some(property) = format.property(key) {
            check(&property.kind, value).map_err(|why| format!("{key}: {why}"))?;
        }
    }
    Ok(values)
}

/// Whether a word stands for true or false.
pub(super) fn boolean(text: &str) -> Option<bool> {
    let is = |words: [&str; 4]| words.iter().any(|word| word.eq_ignore_ascii_case(text));
    if is(["1", "on", "yes", "true"]) {
        Some(true)
    } else if is(["0", "off", "no", "false"]) {
        Some(false)
    } else {
        None
    }
}

fn check(kind: &Kind, value: &str) -> Result<(), String> {
    let within = |least: f64, most: f64| match value.parse::<f64>() {
        Ok(number) if number < least => Err(format!("less than {least}")),
        Ok(number) if number > most => Err(format!("more than {most}")),
        _ => Ok(()),
    };
    let require = |good: bool, otherwise: &str| good.then_some(()).ok_or(otherwise.to_owned());
    match kind {
        Kind::Boolean => require(matches!(value, "0" | "1"), "not a boolean"),
        Kind::Integer => require(is_integer(value), "not an integer"),
        Kind::IntegerIn(least, most) => {
            require(is_integer(value), "not an integer")?;
            within(*least, *most)
        }
        Kind::NumberFrom(least) => {
            require(is_number(value), "not a number")?;
            within(*least, f64::INFINITY)
        }
        Kind::NumberIn(least, most) => {
            require(is_number(value), "not a number")?;
            within(*least, *most)
        }
        Kind::OneOf(words) => require(
            words.contains(&value),
            &format!("not one of {}", words.join(", ")),
        ),
        Kind::Matching(matches) => require(matches(value), "not of the form Proxmox VE takes"),
        Kind::Text | Kind::Alias(_) | Kind::KeyAlias { .. } => Ok(()),
    }
}

fn is_integer(text: &str) -> bool {
    is_digits(text.strip_prefix(['+', '-']).unwrap_or(text))
}

/// `^[+-]?(\d+\.\d+|\d+\.|\.\d+|\d+)([eE][+-]?\d+)?$`
fn is_number(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (text, None),
    };
    let is_mantissa = match mantissa.split_once('.') {
        Some(("", "")) => false,
        Some((whole, part)) => [whole, part]
            .iter()
            .all(|digits| digits.is_empty() || is_digits(digits)),
        None => is_digits(mantissa),
    };
    is_mantissa && exponent.is_none_or(is_integer)
}

/// Whether a text is digits, at least one.
pub(super) fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        default_key: Some("host"),
        required: &["host"],
        properties: &[
            &[
                Property {
                    name: "host",
                    kind: Kind::Text,
                },
                Property {
                    name: "pcie",
                    kind: Kind::Boolean,
                },
            ],
            &[
                Property {
                    name: "n",
                    kind: Kind::IntegerIn(2.0, 4.0),
                },
                Property {
                    name: "x",
                    kind: Kind::NumberFrom(0.5),
                },
                Property {
                    name: "at",
                    kind: Kind::Alias("host"),
                },
                Property {
                    name: "nic",
                    kind: Kind::KeyAlias {
                        value_of: "host",
                        name_of: "kind",
                    },
                },
                Property {
                    name: "kind",
                    kind: Kind::OneOf(&["nic", "tap"]),
                },
            ],
        ],
    };

    #[test]
    fn property_strings_as_proxmox_takes_them() {
        for (text, values) in [
            ("a", Ok("host=a")),
            ("host=a=b", Ok("host=a=b")),
            ("a,, ,pcie=YES,", Ok("host=a pcie=1")),
            ("pcie=off,a", Ok("host=a pcie=0")),
            ("at=a,n=+3,x=.5e1", Ok("host=a n=+3 x=.5e1")),
            ("nic=a", Ok("host=a kind=nic")),
            ("a,n=4", Ok("host=a n=4")),
            ("", Err("`host` is missing")),
            ("pcie=1", Err("`host` is missing")),
            ("a,b", Err("`host` is given twice")),
            ("a,host=b", Err("`host` is given twice")),
            ("host=a,b", Err("`host` is given twice")),
            ("nic=a,nic=b", Err("`kind` is given twice")),
            ("a,pcie=1,pcie=1", Err("`pcie` is given twice")),
            ("a,pcie=", Err("`pcie=` lacks a key or a value")),
            ("a,=1", Err("`=1` lacks a key or a value")),
            ("a,pcie=maybe", Err("pcie: not a boolean")),
            ("a, pcie=1", Err("unknown property ` pcie`")),
            ("a,n=5", Err("n: more than 4")),
            ("a,n=1", Err("n: less than 2")),
            ("a,n=3.0", Err("n: not an integer")),
            ("a,x=.", Err("x: not a number")),
            ("a,x=1e", Err("x: not a number")),
            ("a,kind=x", Err("kind: not one of nic, tap")),
        ] {
            let found = parse(&FORMAT, text).map(|values| {
                values
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect::<Vec<_>>()
                    .join(" ")
            });
            assert_eq!(
                found.as_deref(),
                values.map_err(str::to_owned).as_deref(),
                "{text:?}"
            );
        }
    }
}

//! Text from elsewhere, made safe to print.

use std::borrow::Cow;

/// How many characters of a damaged text an error quotes.
const EXCERPT: usize = 80;

/// Text without control characters, which could drive a terminal: each is escaped as `\u{1b}`.
/// Line breaks and tabs stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    let escapes = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(escapes) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if escapes(c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// The beginning of a text, for an error that quotes it; `...` stands for the rest.
pub fn excerpt(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => Cow::Owned(format!("{}...", printable(&text[..end]))),
        None => printable(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        for (text, safe) in [
            ("plain: 0-5", "plain: 0-5"),
            ("two\n\tlines", "two\n\tlines"),
            ("\x1b[31mred\r\0", "\\u{1b}[31mred\\r\\u{0}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("é", "é"),
            ("", ""),
        ] {
            assert_eq!(printable(text), safe);
        }
    }

    #[test]
    fn long_texts_are_cut() {
        let text = "é".repeat(80);
        assert_eq!(excerpt(&text), text);
        assert_eq!(excerpt(&format!("{text}x")), format!("{text}..."));
        assert_eq!(excerpt("\x1b"), "\\u{1b}");
    }
}

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

/// A part of a text in quotes, and the text, if that has more.
pub(crate) fn quoted_in(part: &str, text: &str) -> String {
    match part == text {
        true => format!("\"{}\"", excerpt(part)),
        false => format!("\"{}\" in \"{}\"", excerpt(part), excerpt(text)),
    }
}

/// The last line with text: what a program that failed has to say.
pub fn last_line(text: &str) -> Option<&str> {
    text.lines().rev().find(|line| !line.trim().is_empty())
}

/// The most letters by which a word may differ from what was meant.
const MAX_SLIPS: usize = 2;

/// The word that was probably meant by a misspelt one, if one is near.
pub fn nearest<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distances = words
        .into_iter()
        .map(|known| (distance(word, known), known));
    let (slips, nearest) = distances.min_by_key(|(slips, _)| *slips)?;
    (slips <= MAX_SLIPS).then_some(nearest)
}

/// How many letters have to be added, removed or replaced to make one word of the other
/// (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_between_words() {
        for (a, b, letters) in [
            ("", "", 0),
            ("plan", "plan", 0),
            ("paln", "plan", 2),
            ("chek", "check", 1),
            ("step", "", 4),
        ] {
            assert_eq!(distance(a, b), letters, "{a} {b}");
        }
        assert_eq!(nearest("paln", ["check", "plan"]), Some("plan"));
        assert_eq!(nearest("frobnicate", ["check", "plan"]), None);
        assert_eq!(nearest("x", []), None);
    }

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

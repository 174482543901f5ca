//! What a program printed in colours, as a picture: ANSI (ECMA-48, "select graphic rendition") to
//! SVG.

use std::fmt::Write;

/// A character's width, a line's height and the space around, in pixels.
const WIDTH: f64 = 8.4;
const HEIGHT: f64 = 18.0;
const MARGIN: f64 = 14.0;
/// What 30 to 37 stand for, on a dark ground.
const COLOURS: [&str; 8] = [
    "#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4",
];

/// How text looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Look {
    colour: Option<usize>,
    bold: bool,
    dim: bool,
}

impl Look {
    /// What a sequence makes of it; what a picture has no use for is passed over.
    fn after(self, codes: &str) -> Self {
        codes
            .split(';')
            .fold(self, |look, code| match code.parse::<usize>() {
                Err(_) | Ok(0) => Self::default(),
                Ok(1) => Self { bold: true, ..look },
                Ok(2) => Self { dim: true, ..look },
                Ok(code @ 30..=37) => Self {
                    colour: Some(code - 30),
                    ..look
                },
                Ok(39) => Self {
                    colour: None,
                    ..look
                },
                Ok(_) => look,
            })
    }

    fn attributes(self) -> String {
        let mut text = String::new();
        if let Some(colour) = self.colour {
            text += &format!(" fill=\"{}\"", COLOURS[colour]);
        }
        if self.bold {
            text += " font-weight=\"bold\"";
        }
        if self.dim {
            text += " opacity=\"0.5\"";
        }
        text
    }
}

/// Draws a text on a ground of its own, under its command.
pub fn draw(command: &str, text: &str) -> String {
    let lines: Vec<Vec<(Look, String)>> = runs(&format!("\x1b[2m$ {command}\x1b[0m\n{text}"));
    let columns = lines
        .iter()
        .map(|line| {
            line.iter()
                .map(|(_, text)| text.chars().count())
                .sum::<usize>()
        })
        .max();
    let (columns, rows) = (columns.unwrap_or(0) as f64, lines.len() as f64);
    let (width, height) = (columns * WIDTH + 2.0 * MARGIN, rows * HEIGHT + 2.0 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-size=\"14\" \
         font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" fill=\"#e6edf3\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#0d1117\"/>\n"
    );
    let mut y = MARGIN;
    for line in lines {
        y += HEIGHT;
        let mut column = 0;
        for (look, text) in line {
            let length = text.chars().count();
            if !text.trim().is_empty() {
                // With the length given, columns align in any font. Writing to a
                // String cannot fail.
                let _ = writeln!(
                    svg,
                    "<text xml:space=\"preserve\" x=\"{:.1}\" y=\"{:.1}\" textLength=\"{:.1}\"{}>{}</text>",
                    MARGIN + column as f64 * WIDTH,
                    y - HEIGHT / 4.0,
                    length as f64 * WIDTH,
                    look.attributes(),
                    escaped(&text)
                );
            }
            column += length;
        }
    }
    svg + "</svg>\n"
}

/// The lines as runs of one look each.
fn runs(text: &str) -> Vec<Vec<(Look, String)>> {
    let mut look = Look::default();
    let run = |line: &str| {
        let mut runs = Vec::new();
        for (number, part) in line.split("\x1b[").enumerate() {
            let text = match part.split_once('m').filter(|_| number > 0) {
                Some((codes, rest)) => {
                    look = look.after(codes);
                    rest
                }
                None => part,
            };
            runs.push((look, text.to_owned()));
        }
        runs
    };
    text.lines().map(run).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_come_and_go() {
        let plain = Look::default();
        let green = Look {
            colour: Some(2),
            bold: true,
            dim: false,
        };
        assert_eq!(
            runs("a\x1b[1m\x1b[32mb\x1b[0mc\nd")[0],
            [
                (plain, "a".into()),
                (
                    Look {
                        bold: true,
                        ..plain
                    },
                    String::new()
                ),
                (green, "b".into()),
                (plain, "c".into())
            ]
        );
        assert_eq!(plain.after("1;32"), green);
        assert_eq!(green.after(""), plain);
        assert_eq!(
            green.after("38;5;7;39"),
            Look {
                bold: true,
                ..plain
            }
        );
    }

    #[test]
    fn text_stands_in_its_column() {
        let svg = draw("x", "a \x1b[31m<b>\x1b[0m\n");
        assert!(
            svg.contains(
                "x=\"30.8\" y=\"45.5\" textLength=\"25.2\" fill=\"#ff7b72\">&lt;b&gt;</text>"
            ),
            "{svg}"
        );
        assert!(
            svg.contains("viewBox=\"0 0 70 64\"") && !svg.contains('\x1b'),
            "{svg}"
        );
    }
}

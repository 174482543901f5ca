//! The same CPUs measured open and inside a fence, side by side: for people, for programs, and as a
//! picture.

use std::collections::BTreeMap;

use pinfold_core::CpuSet;
use serde::Serialize;
use serde_json::{Value, json};

use super::loops::Row;

/// How many columns the longest bar has.
const BAR: usize = 16;
/// An eighth of a column to seven of them.
const PARTS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// A measurement of all of the CPUs.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    /// How many threads, IRQs and masks included one of the CPUs and could have been elsewhere.
    pub strays: usize,
    #[serde(rename = "by_cpu")]
    pub rows: Vec<Row>,
}

impl Measured {
    fn longest_ns(&self) -> u64 {
        self.rows
            .iter()
            .map(|row| row.longest_ns)
            .max()
            .unwrap_or(0)
    }

    /// The mean of the CPUs, each of which was measured for as long.
    fn noise_ppm(&self) -> f64 {
        let sum: f64 = self.rows.iter().map(|row| row.noise_ppm).sum();
        sum / self.rows.len().max(1) as f64
    }

    /// The gaps of all CPUs, by their least length.
    fn gaps(&self) -> BTreeMap<u64, u64> {
        let mut all = BTreeMap::new();
        for gap in self.rows.iter().flat_map(|row| &row.gaps) {
            *all.entry(gap.from_us).or_default() += gap.count;
        }
        all
    }

    /// The interrupts of all CPUs, by source.
    fn interrupts(&self) -> BTreeMap<&str, u64> {
        let mut all = BTreeMap::new();
        for it in self.rows.iter().flat_map(|row| &row.interrupts) {
            *all.entry(it.source.as_str()).or_default() += it.count;
        }
        all
    }
}

/// Both measurements.
#[derive(Debug)]
pub(super) struct Comparison {
    pub cpus: CpuSet,
    pub seconds: u64,
    pub fifo: bool,
    pub open: Measured,
    pub fenced: Measured,
}

impl Comparison {
    pub(super) fn to_json(&self) -> Value {
        json!({
            "cpus": self.cpus, "seconds": self.seconds, "fifo": self.fifo, "open": self.open,
            "fenced": self.fenced,
        })
    }

    fn both(&self) -> [&Measured; 2] {
        [&self.open, &self.fenced]
    }

    /// What has a single figure: its name, and both.
    fn figures(&self) -> [(&'static str, [String; 2]); 3] {
        let figure = |of: fn(&Measured) -> String| self.both().map(of);
        [
            (
                "longest gap",
                figure(|it| format!("{:.1} us", it.longest_ns() as f64 / 1e3)),
            ),
            ("noise", figure(|it| format!("{:.0} ppm", it.noise_ppm()))),
            ("strays", figure(|it| it.strays.to_string())),
        ]
    }

    /// The counts of both, by the lengths of gaps.
    fn gaps(&self) -> Vec<(String, [u64; 2])> {
        let [open, fenced] = self.both().map(Measured::gaps);
        counts(&open, &fenced)
            .into_iter()
            .map(|(from, both)| (format!(">={from} us"), both))
            .collect()
    }

    /// The counts of both, by the source of interrupts, most frequent first.
    fn interrupts(&self) -> Vec<(String, [u64; 2])> {
        let [open, fenced] = self.both().map(Measured::interrupts);
        let mut all = counts(&open, &fenced);
        all.sort_by_key(|(_, [open, fenced])| std::cmp::Reverse(open + fenced));
        all.into_iter()
            .map(|(source, both)| (source.to_owned(), both))
            .collect()
    }

    pub(super) fn to_text(&self) -> String {
        let line = |name: String, [open, fenced]: [String; 2], [bar, other]: [String; 2]| {
            [name, open, bar, fenced, other]
        };
        let none = || [String::new(), String::new()];
        let heads = ["OPEN", "FENCED"].map(str::to_owned);
        let mut rows = vec![line(String::new(), heads, none())];
        rows.extend(
            self.figures()
                .map(|(name, both)| line(name.to_owned(), both, none())),
        );
        for (head, part) in [("gaps", self.gaps()), ("interrupts", self.interrupts())] {
            rows.push(line(head.to_owned(), none(), none()));
            let most = most(&part);
            rows.extend(part.into_iter().map(|(name, both)| {
                let bars = both.map(|count| bar(count, most));
                line(
                    format!("  {name}"),
                    both.map(|count| count.to_string()),
                    bars,
                )
            }));
        }
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        };
        let (name, open, fenced) = (width(0), width(1), width(3));
        let mut text = format!("CPU {}, {} s each\n\n", self.cpus, self.seconds);
        for row in &rows {
            let line = format!(
                "{:<name$}  {:>open$} {:<BAR$}  {:>fenced$} {}",
                row[0], row[1], row[2], row[3], row[4],
            );
            text += line.trim_end();
            text.push('\n');
        }
        text + "\n" + &self.by_cpu()
    }

    /// A row per CPU.
    fn by_cpu(&self) -> String {
        let us = |row: &Row| format!("{:.1} us", row.longest_ns as f64 / 1e3);
        let ppm = |row: &Row| format!("{:.0} ppm", row.noise_ppm);
        let heads = ["CPU", "LONGEST", "FENCED", "NOISE", "FENCED"];
        let mut lines = vec![heads.map(str::to_owned).to_vec()];
        for (open, fenced) in self.open.rows.iter().zip(&self.fenced.rows) {
            lines.push(vec![
                open.cpu.to_string(),
                us(open),
                us(fenced),
                ppm(open),
                ppm(fenced),
            ]);
        }
        right_aligned(&lines)
    }

    /// A picture with two bars for each length of gaps.
    pub(super) fn to_svg(&self) -> String {
        const LINE: u64 = 22;
        const LEFT: u64 = 20;
        const BARS: u64 = 120;
        const WIDEST: u64 = 480;
        const HALF: u64 = LINE / 2 - 1;
        const COLOURS: [&str; 2] = ["#d29922", "#3fb950"];
        let (gaps, figures) = (self.gaps(), self.figures());
        let (mut y, mut body) = (LINE, String::new());
        let mut text = |x: u64, y: u64, colour: &str, text: &str| {
            body += &format!("<text x=\"{x}\" y=\"{y}\" fill=\"{colour}\">{text}</text>\n");
        };
        let title = format!("CPU {}, {} s each", self.cpus, self.seconds);
        text(LEFT, y + HALF, "#e6edf3", &title);
        for (name, [open, fenced]) in [("", ["open", "fenced"].map(str::to_owned))]
            .into_iter()
            .chain(figures)
        {
            y += LINE;
            text(LEFT, y + HALF, "#e6edf3", name);
            text(LEFT + BARS, y + HALF, COLOURS[0], &open);
            text(LEFT + BARS + 160, y + HALF, COLOURS[1], &fenced);
        }
        let most = most(&gaps);
        y += LINE;
        for (name, both) in &gaps {
            y += LINE;
            body += &format!(
                "<text x=\"{LEFT}\" y=\"{}\">{}</text>\n",
                y + HALF + 4,
                name.replace(">=", "\u{2265}")
            );
            for (count, (colour, y)) in both.iter().zip(COLOURS.iter().zip([y, y + HALF])) {
                let width = (share(*count, most) * WIDEST as f64).round();
                body += &format!(
                    "<rect x=\"{}\" y=\"{y}\" width=\"{width}\" height=\"{}\" fill=\"{colour}\"/>\n\
                     <text x=\"{}\" y=\"{}\" font-size=\"10\" fill=\"{colour}\">{count}</text>\n",
                    LEFT + BARS,
                    HALF - 1,
                    (LEFT + BARS) as f64 + width + 6.0,
                    y + HALF - 2,
                );
            }
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 700 {}\" font-size=\"14\" \
             font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" fill=\"#e6edf3\">\n\
             <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#0d1117\"/>\n{body}</svg>\n",
            y + 2 * LINE
        )
    }
}

/// What is counted in either of two, with both counts.
fn counts<K: Ord + Copy>(open: &BTreeMap<K, u64>, fenced: &BTreeMap<K, u64>) -> Vec<(K, [u64; 2])> {
    let mut keys: Vec<K> = open.keys().chain(fenced.keys()).copied().collect();
    keys.sort_unstable();
    keys.dedup();
    let both = |key| {
        let counts = [open, fenced].map(|of| of.get(&key).copied().unwrap_or(0));
        (key, counts)
    };
    keys.into_iter().map(both).collect()
}

fn most(counts: &[(String, [u64; 2])]) -> u64 {
    let all = counts.iter().flat_map(|(_, both)| both);
    all.copied().max().unwrap_or(0)
}

/// How long a bar is, from 0 to 1: by the logarithm, so that one gap is seen beside a million.
fn share(count: u64, most: u64) -> f64 {
    match count {
        0 => 0.0,
        count => (count as f64 + 1.0).ln() / (most.max(count) as f64 + 1.0).ln(),
    }
}

/// A bar of block characters.
fn bar(count: u64, most: u64) -> String {
    let length = share(count, most) * (BAR * 8) as f64;
    let eighths = (0..=BAR * 8).rfind(|eighths| *eighths as f64 <= length + 1e-9);
    let eighths = eighths.unwrap_or(0);
    let mut bar = "█".repeat(eighths / 8);
    bar.extend((eighths % 8).checked_sub(1).map(|part| PARTS[part]));
    bar
}

/// Lines with cells to the right of their columns.
pub(super) fn right_aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(String::len).max().unwrap_or(0)
    };
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("{cell:>width$}", width = width(column)))
            .collect();
        text += &format!("{}\n", cells.join("  "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::loops::{Bucket, Interrupts};
    use super::*;

    fn row(cpu: usize, longest_ns: u64, noise_ppm: f64, gaps: &[(u64, u64)], loc: u64) -> Row {
        let gaps = gaps.iter().map(|(from_us, count)| Bucket {
            from_us: *from_us,
            count: *count,
        });
        Row {
            cpu,
            longest_ns,
            noise_ppm,
            gaps: gaps.collect(),
            interrupts: vec![Interrupts {
                source: "LOC (Local timer interrupts)".to_owned(),
                count: loc,
            }],
        }
    }

    fn comparison() -> Comparison {
        Comparison {
            cpus: CpuSet::range(6, 7),
            seconds: 5,
            fifo: false,
            open: Measured {
                strays: 212,
                rows: vec![
                    row(6, 1_500_000, 1200.0, &[(1, 900), (4, 31), (1024, 1)], 1250),
                    row(7, 70_000, 800.0, &[(1, 123), (64, 1)], 1249),
                ],
            },
            fenced: Measured {
                strays: 0,
                rows: vec![
                    row(6, 12_300, 3.4, &[(1, 6), (8, 1)], 2),
                    row(7, 1_900, 1.0, &[(1, 1)], 1),
                ],
            },
        }
    }

    #[test]
    fn side_by_side() {
        assert_eq!(
            comparison().to_text(),
            "\
CPU 6-7, 5 s each

                                     OPEN                    FENCED
longest gap                     1500.0 us                   12.3 us
noise                            1000 ppm                     2 ppm
strays                                212                         0
gaps
  >=1 us                             1023 ████████████████        7 ████▊
  >=4 us                               31 ████████                0
  >=8 us                                0                         1 █▌
  >=64 us                               1 █▌                      0
  >=1024 us                             1 █▌                      0
interrupts
  LOC (Local timer interrupts)       2499 ████████████████        3 ██▊

CPU    LONGEST   FENCED     NOISE  FENCED
  6  1500.0 us  12.3 us  1200 ppm   3 ppm
  7    70.0 us   1.9 us   800 ppm   1 ppm
"
        );
    }

    #[test]
    fn bars() {
        assert_eq!(bar(0, 100), "");
        assert_eq!(bar(1, u64::MAX), "▎", "one is seen beside any number");
        assert_eq!(bar(100, 100), "█".repeat(BAR));
        assert_eq!(bar(9, 99), "████████", "half of the logarithm");
        assert_eq!(bar(7, 0), "█".repeat(BAR));
    }

    #[test]
    fn nothing_measured_is_drawn_all_the_same() {
        let nothing = || Measured {
            strays: 0,
            rows: Vec::new(),
        };
        let nothing = Comparison {
            open: nothing(),
            fenced: nothing(),
            ..comparison()
        };
        assert!(nothing.to_text().contains("longest gap"));
        assert!(nothing.to_svg().ends_with("</svg>\n"));
    }

    #[test]
    fn a_picture_has_two_bars_for_each_length() {
        let svg = comparison().to_svg();
        assert_eq!(svg.matches("<rect x=").count(), 2 * 5, "{svg}");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        for text in [
            "CPU 6-7, 5 s each",
            ">1500.0 us<",
            ">12.3 us<",
            ">\u{2265}1024 us<",
            ">1023<",
        ] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        // Of the same count, the widest.
        assert!(svg.contains("width=\"480\""), "{svg}");
        assert!(!svg.contains(" & ") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn the_document_has_its_keys() {
        let document = include_str!("../../../docs/json.md");
        let (_, example) = document.split_once("```json\n").unwrap();
        let (example, _) = example.split_once("```").unwrap();
        let example: Value = serde_json::from_str(example).unwrap();
        let printed = comparison().to_json();
        let mut example_keys = keys("", &example);
        example_keys.retain(|key| key != "/version");
        assert_eq!(example_keys, keys("", &printed));
    }

    /// The paths of all keys, once each.
    fn keys(path: &str, value: &Value) -> Vec<String> {
        let mut all = match value {
            Value::Object(map) => map
                .iter()
                .flat_map(|(key, value)| {
                    let path = format!("{path}/{key}");
                    let mut below = keys(&path, value);
                    below.push(path);
                    below
                })
                .collect(),
            Value::Array(list) => list.iter().flat_map(|value| keys(path, value)).collect(),
            _ => Vec::new(),
        };
        all.sort();
        all.dedup();
        all
    }
}

//! Tables, as text and as JSON.

use serde::Serialize;
use serde_json::{Map, Value};

use super::terminal::{Each, JSON_VERSION};
use crate::text::printable;

/// A list for `--list`: columns for people, an array of objects for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows. The columns' names, lower case, are the JSON keys too.
    pub fn new(columns: &[&'static str]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, a cell per column.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len());
        self.rows.push(cells.into());
    }

    /// The rows, aligned under upper-case heads, as lsirq and lscpu print them.
    pub fn to_text(&self) -> String {
        let width = |column: usize| {
            let cells = self
                .rows
                .iter()
                .map(|row| printable(&row[column]).chars().count());
            cells.chain([self.columns[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let heads: Vec<String> = self
            .columns
            .iter()
            .map(|name| name.to_uppercase())
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&heads).chain(&self.rows) {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{:<width$}", printable(cell)))
                .collect();
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// The rows as an array of objects, each with the version of its form.
    pub fn to_json(&self) -> impl Serialize {
        let object = |row: &Vec<String>| -> Map<String, Value> {
            let keys = self
                .columns
                .iter()
                .map(|name| name.replace([' ', '-'], "_"));
            keys.zip(row.iter().map(|cell| Value::from(cell.as_str())))
                .chain([("version".to_owned(), JSON_VERSION.into())])
                .collect()
        };
        Each(move || self.rows.iter().map(object))
    }
}

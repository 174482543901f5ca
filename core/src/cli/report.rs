//! The output of every tool: what goes to stdout and stderr, as text or JSON, and the exit code.

use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::exit::Exit;
use super::table::Table;
use super::terminal::{Each, err, print, print_json, print_json_array};

use crate::knob::{Applied, Change, Outcome};
use crate::text::printable;

/// How much is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors only.
    Quiet,
    /// A line per changed object.
    Normal,
    /// A line per object, also for those not changed, and why.
    Verbose,
}

/// A step, as a report has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its name, for programs.
    pub name: &'static str,
    /// Its name in text.
    pub label: &'static str,
    /// Why its changes are not known, if changes are only planned.
    pub unknown: Option<String>,
    /// What became of its changes.
    pub changes: Vec<Applied>,
    /// When it began.
    began: Instant,
}

/// A tool's messages, and what became of its changes.
#[derive(Debug)]
pub struct Report {
    tool: &'static str,
    verbosity: Verbosity,
    json: bool,
    /// The steps so far, in order.
    steps: Vec<Step>,
    /// What became of changes before the first step; kept for JSON, as are those of the steps.
    changes: Vec<Applied>,
    notes: Vec<String>,
    done: usize,
    failed: usize,
    refused: usize,
    /// Lines for stdout that have not gone out yet: in a pipe they go together, as stdio does it. A
    /// line per object is hundreds of writes otherwise.
    held: Option<RefCell<String>>,
    /// Whether the terminal's last line is one of [`progress`](Self::progress), which the next text
    /// replaces.
    half_said: Cell<bool>,
    /// Why stdout could not be written, for the first text that was lost.
    unprinted: RefCell<Option<String>>,
    /// Whether stdout is a log of what was done, not the result that was asked for.
    is_log: bool,
}

/// ECMA-48: to the line's first column, and what stands there erased.
const LINE_ANEW: &str = "\r\x1b[K";

/// How much text is buffered before it is written.
const HELD_MAX: usize = 4096;

impl Drop for Report {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Report {
    /// A report for `tool`; with `json` nothing is printed before [`finish`](Self::finish).
    pub fn new(tool: &'static str, verbosity: Verbosity, json: bool) -> Self {
        Self {
            tool,
            verbosity,
            json,
            steps: Vec::new(),
            changes: Vec::new(),
            notes: Vec::new(),
            done: 0,
            failed: 0,
            refused: 0,
            held: (!io::stdout().is_terminal()).then(RefCell::default),
            half_said: Cell::new(false),
            unprinted: RefCell::default(),
            is_log: false,
        }
    }

    /// The same, for a run whose output is a log: all of it goes to stderr, line by line, as things
    /// happen. Whoever reads two pipes would see the lines of one after those of the other. A run
    /// that did its work succeeds even if the log could not be written.
    pub fn for_log(mut self) -> Self {
        self.is_log = true;
        self
    }

    /// Writes to stdout. The run goes on if that fails, and ends with a failure.
    fn print(&self, text: &str) {
        self.printed(print(text));
    }

    fn printed(&self, printed: anyhow::Result<()>) {
        if let Err(error) = printed {
            self.unprinted.borrow_mut().get_or_insert(error.to_string());
        }
    }

    /// The exit code, which is a failure if some of the output was lost.
    pub(crate) fn exit(&self, exit: Exit) -> Exit {
        match (self.unprinted.take(), exit) {
            (None, exit) => exit,
            (Some(why), exit) => {
                err(&format!("{}: {why}\n", self.tool));
                if exit == Exit::Success && !self.is_log {
                    Exit::Failed
                } else {
                    exit
                }
            }
        }
    }

    /// A line of the result, to stdout; none with `-q` or `--json`.
    pub fn line(&self, text: &str) {
        if self.json || self.verbosity == Verbosity::Quiet {
            return;
        }
        let line = format!("{}\n", printable(text));
        if self.is_log {
            self.flush();
            return err(&line);
        }
        let Some(held) = &self.held else {
            self.flush();
            return self.print(&line);
        };
        held.borrow_mut().push_str(&line);
        if held.borrow().len() > HELD_MAX {
            self.flush();
        }
    }

    /// How far a long step has come: on a terminal a line that is rewritten, `offline: 5/12`. Not
    /// in a pipe, and not if each change has a line.
    pub fn progress(&self, step: &str, done: usize, of: usize) {
        if let Some(text) = self.progress_text(step, done, of) {
            self.print(&text);
            self.half_said.set(true);
        }
    }

    fn progress_text(&self, step: &str, done: usize, of: usize) -> Option<String> {
        let shown = self.held.is_none() && !self.json && self.verbosity == Verbosity::Normal;
        shown.then(|| format!("{LINE_ANEW}{step}: {done}/{of}"))
    }

    /// Writes the buffered lines, or erases a line of [`progress`](Self::progress).
    fn flush(&self) {
        if self.half_said.take() {
            self.print(LINE_ANEW);
        }
        if let Some(held) = self
            .held
            .as_ref()
            .map(RefCell::take)
            .filter(|held| !held.is_empty())
        {
            self.print(&held);
        }
    }

    /// Whether [`detail`](Self::detail) prints anything.
    pub fn shows_details(&self) -> bool {
        self.verbosity == Verbosity::Verbose && !self.json
    }

    /// A line that only `-v` shows.
    pub fn detail(&self, text: &str) {
        if self.verbosity == Verbosity::Verbose {
            self.line(text);
        }
    }

    /// A remark that is not an error, to stderr; none with `-q`.
    pub fn note(&mut self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            self.flush();
            err(&format!("{}: {}\n", self.tool, printable(text)));
        }
        self.notes.push(text.to_owned());
    }

    /// Something that failed, to stderr whatever was asked for; the exit code shows it too.
    pub fn error(&mut self, text: &str) {
        self.flush();
        err(&format!("{}: {}\n", self.tool, printable(text)));
        self.notes.push(text.to_owned());
        self.failed += 1;
    }

    /// As [`error`](Self::error), about what a run leaves that did the rest: its exit code is
    /// [`Partial`](Exit::Partial), not [`Failed`](Exit::Failed).
    pub fn left(&mut self, text: &str) {
        self.error(text);
        self.done += 1;
    }

    /// Names the step that the changes to come belong to. One line per step is then printed, by
    /// [`summary`](Self::summary), and one per change only with `-v`.
    pub fn step(&mut self, step: &'static str) {
        self.labelled_step(step, step);
    }

    /// As [`step`](Self::step), with another name in text than programs read.
    pub fn labelled_step(&mut self, step: &'static str, label: &'static str) {
        self.steps.push(Step {
            name: step,
            label,
            unknown: None,
            changes: Vec::new(),
            began: Instant::now(),
        });
    }

    /// Names a step with changes that cannot be planned, and why.
    pub fn unknown_step(&mut self, step: &'static str, why: impl Into<String>) {
        self.step(step);
        if let Some(step) = self.steps.last_mut() {
            step.unknown = Some(why.into());
        }
    }

    /// The steps so far; with `json` those of their changes are kept too.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// As [`steps`](Self::steps), with which this report then begins anew.
    pub fn take_steps(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.steps)
    }

    /// How long each step took in seconds, in order; the last until now.
    pub fn seconds(&self) -> Vec<(&'static str, f64)> {
        let ends = self
            .steps
            .iter()
            .skip(1)
            .map(|step| step.began)
            .chain([Instant::now()]);
        self.steps
            .iter()
            .zip(ends)
            .map(|(step, end)| (step.name, (end - step.began).as_secs_f64()))
            .collect()
    }

    /// The notes and errors, in order.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A line about a whole step; with `-v` its changes stand there already.
    pub fn summary(&self, text: &str) {
        if self.verbosity == Verbosity::Normal {
            self.line(text);
            self.flush();
        }
    }

    /// A table, to stdout.
    pub fn table(&self, table: &Table) {
        self.flush();
        if self.json {
            self.printed(print_json_array(&table.to_json()));
        } else {
            self.print(&table.to_text());
        }
    }

    /// Complete lines that may have colours, to stdout.
    pub fn drawing(&self, text: &str) {
        self.flush();
        self.print(text);
    }

    /// Something that was done and is not a change of a knob (a VM started), for the exit code.
    pub fn did(&mut self, text: &str) {
        self.done += 1;
        self.line(text);
    }

    /// What became of changes: a line each, failures to stderr.
    pub fn changes(&mut self, dones: &[Applied]) {
        for done in dones {
            self.change(done);
        }
    }

    /// What became of a change, with the step it belongs to.
    fn placed(&self, done: &Applied) -> String {
        self.steps.last().map_or_else(
            || done.to_string(),
            |step| format!("{}: {done}", step.label),
        )
    }

    fn change(&mut self, done: &Applied) {
        match &done.outcome {
            Outcome::Planned | Outcome::Changed => {
                self.done += 1;
                if self.steps.is_empty() {
                    self.line(&done.to_string());
                } else {
                    self.detail(&self.placed(done));
                }
            }
            Outcome::Already => {
                self.done += 1;
                self.detail(&self.placed(done));
            }
            Outcome::Gone => self.detail(&self.placed(done)),
            Outcome::Refused(_) => {
                self.refused += 1;
                self.detail(&self.placed(done));
            }
            Outcome::Foreign(_) => {
                self.done += 1;
                self.note(&done.to_string());
            }
            Outcome::Failed(_) => self.error(&done.to_string()),
        }
        if self.json {
            match self.steps.last_mut() {
                Some(step) => step.changes.push(done.clone()),
                None => self.changes.push(done.clone()),
            }
        }
    }

    /// Prints the rest (the count of refusals, the JSON) and returns the exit code.
    pub fn finish(&mut self) -> Exit {
        self.flush();
        if self.refused > 0 && self.verbosity == Verbosity::Normal && !self.json {
            err(&format!(
                "{}: {} not movable (kernel-managed); -v lists them\n",
                self.tool, self.refused
            ));
        }
        let exit = match (self.failed, self.done) {
            (0, _) => Exit::Success,
            (_, 0) => Exit::Failed,
            _ => Exit::Partial,
        };
        if self.json {
            let steps: Vec<Value> = (self.seconds().into_iter())
                .map(|(step, seconds)| json!({"step": step, "seconds": seconds}))
                .collect();
            let of_steps = self
                .steps
                .iter()
                .flat_map(|step| step.changes.iter().map(|done| (Some(step.name), done)));
            let changes = self.changes.iter().map(|done| (None, done)).chain(of_steps);
            let changes = changes.map(|(step, done)| applied_to_json(step, done));
            self.printed(print_json(&InJson {
                changes: Each(|| changes.clone()),
                exit_code: exit as u8,
                failed: self.failed,
                notes: &self.notes,
                refused: self.refused,
                steps,
                tool: self.tool,
            }));
        }
        self.exit(exit)
    }

    /// How many failures there were so far.
    pub fn failures(&self) -> usize {
        self.failed
    }

    /// Leaves all failures but the first `earlier` out of the exit code: they were reported, and
    /// concern something that this run is not for. Returns how many.
    pub fn leave_out_failures(&mut self, earlier: usize) -> usize {
        let left_out = self.failed.saturating_sub(earlier);
        self.failed -= left_out;
        left_out
    }
}

/// What [`Report::finish`] prints for programs.
#[derive(Serialize)]
struct InJson<'a, C: Serialize> {
    changes: C,
    exit_code: u8,
    failed: usize,
    notes: &'a [String],
    refused: usize,
    steps: Vec<Value>,
    tool: &'static str,
}

/// A change and what became of it, for programs.
pub fn applied_to_json(step: Option<&str>, done: &Applied) -> Value {
    let Change {
        label,
        knob,
        found,
        wanted,
    } = &done.change;
    let mut entry =
        json!({"step": step, "object": label, "knob": knob, "found": found, "wanted": wanted});
    if let (Some(entry), Ok(Value::Object(outcome))) =
        (entry.as_object_mut(), serde_json::to_value(&done.outcome))
    {
        entry.extend(outcome);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuset::CpuSet;
    use crate::knob::Knob;
    use crate::knob::Setting;

    fn done(outcome: Outcome) -> Applied {
        Applied {
            change: Setting::new(Knob::Irq(1), "IRQ 1", CpuSet::range(0, 0))
                .want(CpuSet::range(1, 1)),
            outcome,
        }
    }

    #[test]
    fn exit_codes() {
        for (outcomes, exit) in [
            (vec![], Exit::Success),
            (
                vec![Outcome::Refused(String::new()), Outcome::Gone],
                Exit::Success,
            ),
            (
                vec![Outcome::Changed, Outcome::Foreign(String::new())],
                Exit::Success,
            ),
            (vec![Outcome::Failed("EIO".into())], Exit::Failed),
            (
                vec![Outcome::Failed("EIO".into()), Outcome::Changed],
                Exit::Partial,
            ),
        ] {
            let mut report = Report::new("test", Verbosity::Quiet, false);
            report.changes(&outcomes.into_iter().map(done).collect::<Vec<_>>());
            assert_eq!(report.finish(), exit);
        }
    }

    #[test]
    fn failures_that_are_left_out_do_not_count() {
        let mut report = Report::new("test", Verbosity::Quiet, false);
        let failed = || done(Outcome::Failed("EIO".into()));
        report.changes(&[failed()]);
        let earlier = report.failures();
        report.changes(&[failed(), done(Outcome::Changed), failed()]);
        assert_eq!(report.leave_out_failures(earlier), 2);
        assert_eq!(report.finish(), Exit::Partial);
        assert_eq!(report.leave_out_failures(0), 1);
        assert_eq!(report.finish(), Exit::Success);
    }

    #[test]
    fn progress_is_for_people_at_a_terminal() {
        let report = |verbosity, json, terminal: bool| {
            let mut report = Report::new("test", verbosity, json);
            report.held = (!terminal).then(RefCell::default);
            report
        };
        let text = |report: Report| report.progress_text("offline", 5, 12);
        assert_eq!(
            text(report(Verbosity::Normal, false, true)).unwrap(),
            "\r\x1b[Koffline: 5/12"
        );
        for (verbosity, json, terminal) in [
            (Verbosity::Normal, false, false),
            (Verbosity::Normal, true, true),
            (Verbosity::Quiet, false, true),
            (Verbosity::Verbose, false, true),
        ] {
            assert_eq!(
                text(report(verbosity, json, terminal)),
                None,
                "{verbosity:?} {json} {terminal}"
            );
        }
        // The next message replaces it.
        let report = report(Verbosity::Normal, false, true);
        report.progress("offline", 5, 12);
        assert!(report.half_said.get());
        report.line("");
        assert!(!report.half_said.get());
    }

    #[test]
    fn tables_align_and_are_objects() {
        let mut table = Table::new(&["irq", "name", "last cpu"]);
        table.row(["4".into(), "ttyS0".into(), "1".into()]);
        table.row(["128".into(), String::new(), "2".into()]);
        assert_eq!(
            table.to_text(),
            "IRQ  NAME   LAST CPU\n4    ttyS0  1\n128         2\n"
        );
        let json = json!(table.to_json());
        assert_eq!(json[1]["irq"], "128");
        assert_eq!(json[1]["last_cpu"], "2");
    }
}

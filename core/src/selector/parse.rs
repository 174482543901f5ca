//! From text to expression, by recursive descent.
//!
//! ```text
//! expression = term , { "," , term } ;
//! term       = factor , { "&" , factor } ;
//! factor     = "!" , factor | "(" , expression , ")" | name , [ ":" , list ] | list ;
//! list       = range , { "," , range } ;
//! ```
//!
//! A comma followed by a digit continues the list: `llc:0,2` are two LLC domains.

use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use super::ast::{NAMES, Node, PARTS, Selector, SelectorError, WORDS};
use crate::cpuset::{CpuSet, CpuSetError, MAX_CPU};
use crate::vm::VmId;

/// How deep signs and parentheses may be nested: no text shall exhaust the stack.
const MAX_DEPTH: usize = 32;

/// What ends a number or a range.
const SIGNS: [char; 6] = [',', '&', '!', '(', ')', ':'];

type Result<T> = std::result::Result<T, SelectorError>;

fn parse(text: &str) -> Result<Node> {
    let text = text.trim();
    let mut parser = Parser {
        text,
        at: 0,
        depth: 0,
    };
    let node = parser.expression()?;
    match parser.rest() {
        "" => Ok(node),
        ")" => Err(parser.wrong(parser.at, ")", "has no matching \"(\"")),
        rest => Err(parser.wrong(
            parser.at,
            rest,
            "is not expected here; join CPUs by \",\" or \"&\"",
        )),
    }
}

struct Parser<'a> {
    text: &'a str,
    /// In bytes.
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn wrong(&self, at: usize, token: &str, why: impl Into<String>) -> SelectorError {
        let at = self.text[..at].chars().count() + 1;
        SelectorError::Token {
            token: token.trim_end().to_owned(),
            text: self.text.to_owned(),
            at,
            why: why.into(),
        }
    }

    fn skip_space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    /// Takes a sign if it is next.
    fn takes(&mut self, sign: char) -> bool {
        self.skip_space();
        let is_next = self.rest().starts_with(sign);
        if is_next {
            self.at += sign.len_utf8();
        }
        is_next
    }

    /// Takes all up to the first character that does not fit.
    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let taken = &rest[..rest.find(|c| !fits(c)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken
    }

    fn expression(&mut self) -> Result<Node> {
        let mut nodes = vec![self.term()?];
        while self.takes(',') {
            self.skip_space();
            let at = self.at;
            match (nodes.last_mut(), self.term()?) {
                (_, Node::Both(factors)) if matches!(factors.first(), Some(Node::Not(_))) => {
                    let why = "is ambiguous here; use parentheses: llc:1,(!6&!7) or llc:1&!6&!7";
                    return Err(self.wrong(at, &self.text[at..self.at], why));
                }
                // One set, so that it reads the same when it is printed.
                (Some(Node::Cpus(cpus)), Node::Cpus(more)) => *cpus = &*cpus | &more,
                (_, node) => nodes.push(node),
            }
        }
        Ok(single_or(nodes, Node::Any))
    }

    fn term(&mut self) -> Result<Node> {
        let mut nodes = vec![self.factor()?];
        while self.takes('&') {
            nodes.push(self.factor()?);
        }
        Ok(single_or(nodes, Node::Both))
    }

    fn factor(&mut self) -> Result<Node> {
        self.skip_space();
        let at = self.at;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let next: String = self.rest().chars().take(1).collect();
            return Err(self.wrong(
                at,
                &next,
                format!("is nested too deeply; the limit is {MAX_DEPTH}"),
            ));
        }
        let node = if self.takes('!') {
            Node::Not(Box::new(self.factor()?))
        } else if self.takes('(') {
            let node = self.expression()?;
            if !self.takes(')') {
                return Err(self.wrong(at, "(", "is not closed"));
            }
            Node::Group(Box::new(node))
        } else if self.rest().starts_with(|c: char| c.is_ascii_alphabetic()) {
            self.selector()?
        } else {
            Node::Cpus(
                self.numbers("CPU number, range or selector; write CPUs as in 0-5,12 or llc:1")?,
            )
        };
        self.depth -= 1;
        Ok(node)
    }

    fn selector(&mut self) -> Result<Node> {
        let at = self.at;
        let name = self.take_while(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        let is = |known: &str| known.eq_ignore_ascii_case(name);
        if let Some((_, word)) = WORDS.iter().find(|(known, _)| is(known)) {
            if self.takes(':') {
                return Err(self.wrong(
                    at,
                    &self.text[at..self.at],
                    format!("does not take a number; write only {name}"),
                ));
            }
            return Ok(Node::Word(*word));
        }
        let part = PARTS
            .iter()
            .find(|(known, _)| is(known))
            .map(|(_, part)| *part);
        if part.is_none() && !is("cpu") && !is("vm") {
            return Err(self.wrong(
                at,
                name,
                format!("is not a selector; selectors are {NAMES}"),
            ));
        }
        if !self.takes(':') {
            let example = if is("vm") { 100 } else { 0 };
            return Err(self.wrong(
                at,
                name,
                format!("needs a number after it, as in {name}:{example}"),
            ));
        }
        match part {
            Some(part) => Ok(Node::Parts(
                part,
                self.numbers("number or range; write as in 0 or 0-1")?,
            )),
            None if is("cpu") => Ok(Node::Cpus(
                self.numbers("CPU number or range; write CPUs as in cpu:0-5,12")?,
            )),
            None => self.vms(),
        }
    }

    /// A list of numbers and ranges; `what` names what was expected.
    fn numbers(&mut self, what: &str) -> Result<CpuSet> {
        let mut numbers = CpuSet::new();
        for (at, range) in self.list() {
            let more = range.parse::<CpuSet>().map_err(|error| {
                let why = match error {
                    CpuSetError::Backwards { first, last, .. } => {
                        format!("runs backwards; did you mean {last}-{first}?")
                    }
                    CpuSetError::TooLarge(_) => {
                        format!("is beyond {}, the largest number allowed", MAX_CPU)
                    }
                    _ => format!("is not a {what}"),
                };
                self.wrong(at, range, why)
            })?;
            numbers = &numbers | &more;
        }
        Ok(numbers)
    }

    fn vms(&mut self) -> Result<Node> {
        let list = self.list();
        let vm = |(at, number): (usize, &str)| {
            number.parse::<VmId>().map_err(|_| {
                let why = "is not a VM number (100 to 999999999); write each one, as in vm:100,101";
                self.wrong(at, number, why)
            })
        };
        Ok(Node::Vms(list.into_iter().map(vm).collect::<Result<_>>()?))
    }

    /// The items of a list and their positions: at least one, which may be empty.
    fn list(&mut self) -> Vec<(usize, &'a str)> {
        let mut items = Vec::new();
        loop {
            self.skip_space();
            let at = self.at;
            items.push((at, self.take_while(|c| !SIGNS.contains(&c)).trim_end()));
            let goes_on = |rest: &str| rest.trim_start().starts_with(|c: char| c.is_ascii_digit());
            if !self.rest().strip_prefix(',').is_some_and(goes_on) {
                return items;
            }
            self.at += 1;
        }
    }
}

fn single_or(mut nodes: Vec<Node>, many: impl Fn(Vec<Node>) -> Node) -> Node {
    match nodes.pop() {
        Some(node) if nodes.is_empty() => node,
        last => {
            nodes.extend(last);
            many(nodes)
        }
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> std::result::Result<Self, SelectorError> {
        let node = match text.parse() {
            Ok(cpus) => Node::Cpus(cpus),
            Err(error) if is_meant_as_list(text) => return Err(error.into()),
            Err(_) => parse(text)?,
        };
        Ok(Self { node })
    }
}

/// Whether a text without any sign of a selector is a faulty plain list, whose parser has the
/// better message.
fn is_meant_as_list(text: &str) -> bool {
    let is_name = |token: &str| {
        token.len() > 1 && token.starts_with(|first: char| first.is_ascii_alphabetic())
    };
    !text.contains([':', '&', '!', '(', ')']) && !text.split(',').any(|token| is_name(token.trim()))
}

/// As for a [`CpuSet`], the empty text is the empty set.
impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.trim() {
            "" => Ok(CpuSet::new().into()),
            text => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

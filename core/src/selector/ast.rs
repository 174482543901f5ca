//! Expressions of CPUs, and how they are printed.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::cpuset::{CpuSet, CpuSetError};
use crate::text::quoted_in;
use crate::vm::VmId;

/// Why a text names no CPUs. The message has the offending token and its position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// A plain list that cannot be read.
    #[error(transparent)]
    List(#[from] CpuSetError),
    /// Anything else that cannot be read.
    #[error("{}{} {why}", quoted_in(token, text), place(token, text, *at))]
    Token {
        /// The part that could not be read.
        token: String,
        /// The whole text.
        text: String,
        /// The token's first character in it, from 1.
        at: usize,
        /// What is wrong with it.
        why: String,
    },
}

/// Where a token is in a text that has more.
fn place(token: &str, text: &str, at: usize) -> String {
    match token == text {
        true => String::new(),
        false => format!(" (character {at})"),
    }
}

/// CPUs by number, by selector, or both.
///
/// `Display` prints what `FromStr` reads as the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    pub(super) node: Node,
}

/// A part of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// CPUs by number.
    Cpus(CpuSet),
    /// Parts of the machine, by their numbers.
    Parts(Part, CpuSet),
    /// The CPUs that the vCPU threads of VMs may run on.
    Vms(Vec<VmId>),
    /// What a word stands for.
    Word(Word),
    /// All CPUs but these.
    Not(Box<Node>),
    /// What all of them have in common.
    Both(Vec<Node>),
    /// All of them together, from left to right; a [`Node::Not`] that is not the first takes away.
    Any(Vec<Node>),
    /// In parentheses.
    Group(Box<Node>),
}

/// What selectors with numbers select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Package,
    Die,
    Llc,
    Node,
    /// By the number of a CPU in it.
    Core,
    /// As `Core`.
    Smt,
}

/// Selectors without numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    FirstThreads,
    Vcache,
    Pcores,
    Ecores,
    Online,
    Offline,
    All,
}

/// The names of parts: the first that stands for one is the one that is printed.
pub(super) const PARTS: [(&str, Part); 11] = [
    ("llc", Part::Llc),
    ("l3", Part::Llc),
    ("ccd", Part::Llc),
    ("ccx", Part::Llc),
    ("die", Part::Die),
    ("node", Part::Node),
    ("numa", Part::Node),
    ("package", Part::Package),
    ("socket", Part::Package),
    ("core", Part::Core),
    ("smt", Part::Smt),
];

pub(super) const WORDS: [(&str, Word); 7] = [
    ("first-threads", Word::FirstThreads),
    ("vcache", Word::Vcache),
    ("pcores", Word::Pcores),
    ("ecores", Word::Ecores),
    ("online", Word::Online),
    ("offline", Word::Offline),
    ("all", Word::All),
];

/// The selectors, for messages.
pub(super) const NAMES: &str = "llc:N, die:N, node:N, package:N, core:N, smt:N, vm:N, cpu:N, \
                                first-threads, vcache, pcores, ecores, online, offline and all";

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: &T) -> &'static str {
    names
        .iter()
        .find(|(_, named)| named == value)
        .map_or("", |(name, _)| name)
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&PARTS, self))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(&WORDS, self))
    }
}

impl Node {
    fn names_vms(&self) -> bool {
        match self {
            Self::Vms(_) => true,
            Self::Not(node) | Self::Group(node) => node.names_vms(),
            Self::Both(nodes) | Self::Any(nodes) => nodes.iter().any(Self::names_vms),
            Self::Cpus(_) | Self::Parts(..) | Self::Word(_) => false,
        }
    }
}

impl Node {
    fn names_cpu(&self, cpu: usize) -> bool {
        match self {
            Self::Cpus(cpus) | Self::Parts(Part::Core | Part::Smt, cpus) => cpus.contains(cpu),
            Self::Group(node) => node.names_cpu(cpu),
            Self::Both(nodes) | Self::Any(nodes) => nodes.iter().any(|node| node.names_cpu(cpu)),
            Self::Not(_) | Self::Parts(..) | Self::Vms(_) | Self::Word(_) => false,
        }
    }
}

impl From<CpuSet> for Selector {
    fn from(cpus: CpuSet) -> Self {
        Self {
            node: Node::Cpus(cpus),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.node.fmt(f)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpus(cpus) => cpus.fmt(f),
            Self::Parts(part, numbers) => write!(f, "{part}:{numbers}"),
            Self::Vms(vms) => write!(f, "vm:{}", joined(vms, ",")),
            Self::Word(word) => word.fmt(f),
            Self::Not(node) => write!(f, "!{node}"),
            Self::Both(nodes) => f.write_str(&joined(nodes, "&")),
            Self::Any(nodes) => {
                let mut text = String::new();
                for node in nodes {
                    let node = node.to_string();
                    let is_digit = |c: char| c.is_ascii_digit();
                    if !text.is_empty() {
                        // Bare numbers after a list would be read as part of that list.
                        text.push_str(if text.ends_with(is_digit) && node.starts_with(is_digit) {
                            ",cpu:"
                        } else {
                            ","
                        });
                    }
                    text.push_str(&node);
                }
                f.write_str(&text)
            }
            Self::Group(node) => write!(f, "({node})"),
        }
    }
}

fn joined<T: fmt::Display>(items: &[T], by: &str) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(by)
}

impl Serialize for Selector {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Selector {
    /// Whether it names the CPUs of VMs (`vm:100`), which stand for others from one moment to the
    /// next.
    pub fn names_vms(&self) -> bool {
        self.node.names_vms()
    }

    /// Whether it names a CPU by its number, or its core by that: `0-7`, `core:0`.
    pub fn names_cpu(&self, cpu: usize) -> bool {
        self.node.names_cpu(cpu)
    }
}

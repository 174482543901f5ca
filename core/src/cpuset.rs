//! A set of CPUs by logical number, in the kernel's two spellings.
//!
//! The list form (`0-5,12-17`) and the mask form (`00fff03f`, 32-bit groups joined by commas) are
//! those of the kernel's `bitmap_parselist` and `bitmap_parse` (lib/bitmap-str.c) and of cpuset(7).

use std::collections::BTreeSet;
use std::fmt;
use std::ops::{BitAnd, BitOr, Sub};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::text::{excerpt, quoted_in};

/// The largest CPU number accepted: the kernel's biggest NR_CPUS (x86 MAXSMP) is 8192.
pub const MAX_CPU: usize = 8191;

/// Why a text is not a CPU set. Each message names the offending token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSetError {
    /// Nothing between the commas, or an empty text if CPUs are required.
    #[error("\"{0}\" is an empty CPU list; write CPUs as in 0-5,12")]
    Empty(String),
    /// A token that is neither a number nor a range.
    #[error(
        "{} is not a CPU number or range; write CPUs as in 0-5,12",
        quoted_in(token, text)
    )]
    Token {
        /// The part that could not be read.
        token: String,
        /// The whole text.
        text: String,
    },
    /// A range that ends below its start.
    #[error(
        "{} runs backwards; did you mean {last}-{first}?",
        quoted_in(token, text)
    )]
    Backwards {
        /// The range as written.
        token: String,
        /// The whole text.
        text: String,
        /// The number before the dash.
        first: usize,
        /// The number after the dash.
        last: usize,
    },
    /// A number beyond [`MAX_CPU`].
    #[error("CPU {} is beyond {MAX_CPU}, the largest CPU number the kernel knows", excerpt(.0))]
    TooLarge(String),
    /// A mask that is not hexadecimal groups of at most 32 bits.
    #[error(
        "\"{}\" is not a CPU mask as in 00fff03f or ff,ffffffff",
        excerpt(.0)
    )]
    Mask(String),
}

/// A set of CPUs by logical number.
///
/// `FromStr` reads the kernel's list form and refuses an empty one; `Display` prints it canonical
/// (`0-5,12-17`, ascending, nothing for the empty set).
///
/// Copies share their memory: on a host of 2,048 CPUs each set would be 256 bytes otherwise, for each
/// of tens of thousands of threads and IRQs. A
/// [`CpuSetPool`] makes equal sets share it too.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct CpuSet {
    /// Bit `n % 64` of word `n / 64` is CPU `n`. The last word is never zero, so equal sets are
    /// equal.
    words: Arc<[u64]>,
}

impl CpuSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// All CPUs from `first` up to `last`, both included.
    pub fn range(first: usize, last: usize) -> Self {
        let mut set = Self::new();
        set.insert_range(first, last);
        set
    }

    /// Parses a kernel file in list form; an empty one means no CPU.
    ///
    /// # Errors
    /// As `FromStr`, but for the empty text.
    pub fn from_kernel_list(text: &str) -> Result<Self, CpuSetError> {
        match text.trim() {
            "" => Ok(Self::new()),
            list => list.parse(),
        }
    }

    /// Reads the kernel's mask form: hexadecimal, most significant first, 32-bit groups joined by
    /// commas.
    ///
    /// # Errors
    /// [`CpuSetError::Mask`] for anything else, [`CpuSetError::TooLarge`] for bits beyond
    /// [`MAX_CPU`].
    pub fn from_mask(text: &str) -> Result<Self, CpuSetError> {
        let bad = || CpuSetError::Mask(text.to_owned());
        let digits = text.trim();
        let mut set = Self::new();
        for (index, group) in digits.rsplit(',').enumerate() {
            if group.is_empty() || group.len() > 8 || !group.bytes().all(|b| b.is_ascii_hexdigit())
            {
                return Err(bad());
            }
            let bits = u32::from_str_radix(group, 16).map_err(|_| bad())?;
            if bits == 0 {
                continue;
            }
            let last = index * 32 + 31 - bits.leading_zeros() as usize;
            if last > MAX_CPU {
                let first_bad = (index * 32..=last)
                    .find(|cpu| *cpu > MAX_CPU && bits & (1 << (cpu % 32)) != 0)
                    .unwrap_or(last);
                return Err(CpuSetError::TooLarge(first_bad.to_string()));
            }
            *set.word(last / 64) |= u64::from(bits) << (index % 2 * 32);
        }
        Ok(set)
    }

    /// The mask form, in 32-bit groups of eight digits, as the kernel prints it.
    pub fn to_mask(&self) -> String {
        let mut groups: Vec<String> = self
            .words
            .iter()
            .flat_map(|word| [word & 0xffff_ffff, word >> 32])
            .map(|group| format!("{group:08x}"))
            .collect();
        while groups.len() > 1 && groups.last().is_some_and(|group| group == "00000000") {
            groups.pop();
        }
        if groups.is_empty() {
            groups.push("00000000".into());
        }
        groups.reverse();
        groups.join(",")
    }

    /// Adds a CPU.
    pub fn insert(&mut self, cpu: usize) {
        *self.word(cpu / 64) |= 1 << (cpu % 64);
    }

    fn insert_range(&mut self, first: usize, last: usize) {
        if first > last {
            return;
        }
        self.word(last / 64);
        for index in first / 64..=last / 64 {
            let mut bits = u64::MAX;
            if index == first / 64 {
                bits &= u64::MAX << (first % 64);
            }
            if index == last / 64 {
                bits &= u64::MAX >> (63 - last % 64);
            }
            *self.word(index) |= bits;
        }
    }

    /// A word that is about to get a CPU.
    fn word(&mut self, index: usize) -> &mut u64 {
        if self.words.len() <= index {
            let mut words = self.words.to_vec();
            words.resize(index + 1, 0);
            self.words = words.into();
        }
        &mut Arc::make_mut(&mut self.words)[index]
    }

    /// Whether the CPU is in the set.
    pub fn contains(&self, cpu: usize) -> bool {
        self.words
            .get(cpu / 64)
            .is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }

    /// Whether the set has no CPU.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// How many CPUs the set has.
    pub fn len(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// The CPUs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros() as usize;
                rest &= rest.wrapping_sub(1);
                (bit < 64).then_some(index * 64 + bit)
            })
        })
    }

    /// The CPUs as ranges, both ends included, ascending and with gaps between.
    fn ranges(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next(from, 0)?;
            let end = self.next(first, u64::MAX).unwrap_or(self.words.len() * 64);
            from = end;
            Some((first, end - 1))
        })
    }

    /// The first CPU from `from` on that is in the set, or with `flip` all ones, that is not.
    fn next(&self, from: usize, flip: u64) -> Option<usize> {
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.words.iter().enumerate().skip(from / 64) {
            let bits = (word ^ flip) & mask;
            if bits != 0 {
                return Some(index * 64 + bits.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The lowest CPU.
    pub fn first(&self) -> Option<usize> {
        self.iter().next()
    }

    /// The highest CPU.
    pub fn last(&self) -> Option<usize> {
        let word = *self.words.last()?;
        Some(self.words.len() * 64 - 1 - word.leading_zeros() as usize)
    }

    /// Whether every CPU of this set is in `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter().zip(others).all(|(a, b)| a & !b == 0)
    }

    /// Whether the sets share a CPU.
    pub fn intersects(&self, other: &Self) -> bool {
        self.words
            .iter()
            .zip(other.words.iter())
            .any(|(a, b)| a & b != 0)
    }

    /// This set narrowed to `fence`: their intersection, or the whole of `fence` if they share
    /// nothing.
    ///
    /// A mask that was narrower before is not widened by it, as long as they share a CPU.
    pub fn narrow_to(&self, fence: &Self) -> Self {
        if self.is_subset(fence) && !self.is_empty() {
            self.clone()
        } else if fence.is_subset(self) || !self.intersects(fence) {
            fence.clone()
        } else {
            self & fence
        }
    }

    /// The set with these words, of `len` at most.
    fn of_words(len: usize, word: impl Fn(usize) -> u64) -> Self {
        let last = (0..len).rev().find(|index| word(*index) != 0);
        let words = 0..last.map_or(0, |last| last + 1);
        Self {
            words: words.map(word).collect(),
        }
    }
}

/// Makes equal sets share their memory: nearly all threads and IRQs of a host have one of a few
/// masks.
#[derive(Debug, Default)]
pub struct CpuSetPool(BTreeSet<CpuSet>);

impl CpuSetPool {
    /// A set that is equal to `cpus`, and the same for all equal ones.
    pub fn share(&mut self, cpus: CpuSet) -> CpuSet {
        if let Some(known) = self.0.get(&cpus) {
            return known.clone();
        }
        self.0.insert(cpus.clone());
        cpus
    }
}

impl FromIterator<usize> for CpuSet {
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> Self {
        let mut set = Self::new();
        for cpu in cpus {
            set.insert(cpu);
        }
        set
    }
}

impl BitAnd for &CpuSet {
    type Output = CpuSet;
    fn bitand(self, other: Self) -> CpuSet {
        let (a, b) = (&self.words, &other.words);
        CpuSet::of_words(a.len().min(b.len()), |index| a[index] & b[index])
    }
}

impl BitOr for &CpuSet {
    type Output = CpuSet;
    fn bitor(self, other: Self) -> CpuSet {
        let (long, short) = if self.words.len() >= other.words.len() {
            (&self.words, &other.words)
        } else {
            (&other.words, &self.words)
        };
        CpuSet::of_words(long.len(), |index| {
            long[index] | short.get(index).unwrap_or(&0)
        })
    }
}

impl Sub for &CpuSet {
    type Output = CpuSet;
    fn sub(self, other: Self) -> CpuSet {
        let (a, b) = (&self.words, &other.words);
        CpuSet::of_words(a.len(), |index| a[index] & !b.get(index).unwrap_or(&0))
    }
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(CpuSetError::Empty(text.to_owned()));
        }
        if let Some(set) = parse_canonical(text.as_bytes()) {
            return Ok(set);
        }
        let mut set = Self::new();
        for token in text.split(',') {
            let token = token.trim();
            let bad = || CpuSetError::Token {
                token: token.to_owned(),
                text: text.to_owned(),
            };
            let number = |digits: &str| {
                if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(bad());
                }
                match digits.parse::<usize>() {
                    Ok(cpu) if cpu <= MAX_CPU => Ok(cpu),
                    _ => Err(CpuSetError::TooLarge(digits.to_owned())),
                }
            };
            let (first, last) = match token.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => {
                    let cpu = number(token)?;
                    (cpu, cpu)
                }
            };
            if first > last {
                return Err(CpuSetError::Backwards {
                    token: token.to_owned(),
                    text: text.to_owned(),
                    first,
                    last,
                });
            }
            set.insert_range(first, last);
        }
        Ok(set)
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (first, last) in self.ranges() {
            f.write_str(comma)?;
            fmt::Display::fmt(&first, f)?;
            if first != last {
                f.write_str("-")?;
                fmt::Display::fmt(&last, f)?;
            }
            comma = ",";
        }
        Ok(())
    }
}

/// Parses a list as the kernel prints it; `None` for anything else, which may be a list with spaces
/// or a fault to name.
fn parse_canonical(text: &[u8]) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    let mut rest = text;
    loop {
        let first = take_number(&mut rest)?;
        let mut last = first;
        if let [b'-', after @ ..] = rest {
            rest = after;
            last = take_number(&mut rest)?;
        }
        if first > last {
            return None;
        }
        set.insert_range(first, last);
        match rest {
            [] => return Some(set),
            [b',', after @ ..] => rest = after,
            _ => return None,
        }
    }
}

/// Takes a CPU number off the start of a text.
fn take_number(text: &mut &[u8]) -> Option<usize> {
    let mut number = None;
    while let [digit @ b'0'..=b'9', after @ ..] = text {
        let value = number.unwrap_or(0) * 10 + usize::from(digit - b'0');
        if value > MAX_CPU {
            return None;
        }
        number = Some(value);
        *text = after;
    }
    number
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

impl Serialize for CpuSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_kernel_list(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(text: &str) -> CpuSet {
        CpuSet::from_kernel_list(text).unwrap()
    }

    #[test]
    fn lists_are_read_and_printed_canonical() {
        for (text, canonical) in [
            ("0", "0"),
            ("0-5,12-17", "0-5,12-17"),
            ("5,4,3", "3-5"),
            ("3,1-2\n", "1-3"),
            ("1,1,1", "1"),
            (" 7 , 9 ", "7,9"),
            ("63-64", "63-64"),
            ("8191", "8191"),
        ] {
            assert_eq!(
                text.parse::<CpuSet>().unwrap().to_string(),
                canonical,
                "{text:?}"
            );
        }
    }

    #[test]
    fn bad_lists_name_the_token() {
        for (text, message) in [
            ("", "\"\" is an empty CPU list; write CPUs as in 0-5,12"),
            ("  \n", "\"\" is an empty CPU list; write CPUs as in 0-5,12"),
            ("5-3", "\"5-3\" runs backwards; did you mean 3-5?"),
            (
                "1,,2",
                "\"\" in \"1,,2\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (
                "1,x",
                "\"x\" in \"1,x\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (
                "-1",
                "\"-1\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (
                "1-2-3",
                "\"1-2-3\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (
                "+1",
                "\"+1\" is not a CPU number or range; write CPUs as in 0-5,12",
            ),
            (
                "8192",
                "CPU 8192 is beyond 8191, the largest CPU number the kernel knows",
            ),
            (
                "0-99999999999999999999",
                "CPU 99999999999999999999 is beyond 8191, the largest CPU number the kernel knows",
            ),
        ] {
            assert_eq!(
                text.parse::<CpuSet>().unwrap_err().to_string(),
                message,
                "{text:?}"
            );
        }
    }

    #[test]
    fn masks_are_read_and_printed_as_the_kernel_does() {
        for (mask, list) in [
            ("00fff03f", "0-5,12-23"),
            ("ff,ffffffff", "0-39"),
            ("1\n", "0"),
            ("00000000", ""),
            ("80000000,00000000", "63"),
        ] {
            assert_eq!(CpuSet::from_mask(mask).unwrap(), set(list), "{mask}");
        }
        assert_eq!(set("0-5,12-17").to_mask(), "0003f03f");
        assert_eq!(set("32").to_mask(), "00000001,00000000");
        assert_eq!(set("").to_mask(), "00000000");
        for mask in ["", "g", "123456789", "1,,1", "-1", "0x1"] {
            assert!(CpuSet::from_mask(mask).is_err(), "{mask:?}");
        }
    }

    #[test]
    fn narrow_to_widens_only_what_would_be_empty() {
        let housekeeping = set("0-5,12-17");
        assert_eq!(set("0-23").narrow_to(&housekeeping), housekeeping);
        assert_eq!(set("4-7").narrow_to(&housekeeping), set("4-5"));
        assert_eq!(set("6-7").narrow_to(&housekeeping), housekeeping);
    }

    fn any_set() -> impl Strategy<Value = CpuSet> {
        prop::collection::vec(0..=MAX_CPU, 0..40).prop_map(|cpus| cpus.into_iter().collect())
    }

    #[test]
    fn equal_sets_share_their_memory() {
        let mut pool = CpuSetPool::default();
        let mut shared = |list| pool.share(set(list));
        let (all, again, other) = (shared("0-2047"), shared("0-2047"), shared("0-1023"));
        assert!(Arc::ptr_eq(&all.words, &again.words) && all != other);
        // So do the results of narrowing, if they are one of the two.
        let part = all.narrow_to(&other);
        assert!(Arc::ptr_eq(&part.words, &other.words));
        assert!(Arc::ptr_eq(&part.narrow_to(&all).words, &part.words));
    }

    proptest! {
        #[test]
        fn list_round_trip(cpus in any_set()) {
            prop_assert_eq!(CpuSet::from_kernel_list(&cpus.to_string()).unwrap(), cpus);
        }

        #[test]
        fn lists_with_spaces_are_the_same(cpus in any_set()) {
            let spaced = cpus.to_string().replace(',', ", ");
            prop_assert_eq!(CpuSet::from_kernel_list(&spaced).unwrap(), cpus);
        }

        #[test]
        fn ranges_hold_what_is_between(first in 0..500_usize, len in 0..300_usize) {
            let cpus = CpuSet::range(first, first + len);
            prop_assert_eq!(cpus.iter().collect::<Vec<_>>(), (first..=first + len).collect::<Vec<_>>());
            prop_assert_eq!(&cpus, &(first..=first + len).collect::<CpuSet>());
        }

        #[test]
        fn mask_round_trip(cpus in any_set()) {
            prop_assert_eq!(CpuSet::from_mask(&cpus.to_mask()).unwrap(), cpus);
        }

        #[test]
        fn algebra(a in any_set(), b in any_set()) {
            prop_assert_eq!((&a | &b).len() + (&a & &b).len(), a.len() + b.len());
            prop_assert_eq!(&(&a - &b) | &(&a & &b), a.clone());
            prop_assert_eq!(a.iter().collect::<CpuSet>(), a.clone());
            prop_assert_eq!(a.iter().last(), a.last());
            prop_assert!(a.is_subset(&(&a | &b)));
        }

        #[test]
        fn narrowing_is_the_intersection_or_the_fence(a in any_set(), b in any_set()) {
            let inside = &a & &b;
            for fence in [&b, &inside, &(&a | &b), &(&b - &a)] {
                let inside = &a & fence;
                let wanted = if inside.is_empty() { fence } else { &inside };
                prop_assert_eq!(&a.narrow_to(fence), wanted);
            }
        }

        #[test]
        fn a_set_does_not_change_with_its_copies(cpus in any_set(), cpu in 0..700_usize) {
            let (mut copy, list) = (cpus.clone(), cpus.to_string());
            copy.insert(cpu);
            prop_assert_eq!(cpus.to_string(), list);
            prop_assert_eq!(copy.len(), cpus.len() + usize::from(!cpus.contains(cpu)));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = text.parse::<CpuSet>();
            let _ = CpuSet::from_mask(&text);
        }
    }
}

//! The legacy table as the kernel hands it out: entries of varying length, one after another.
//!
//! `struct ipt_entry` (112 bytes) or `ip6t_entry` (168), then matches, then a target. A jump is a
//! byte offset. A chain starts after an `ERROR` target that holds its name; the built-in chains
//! start where `hook_entry` says. Every field is read by a checked slice: hostile bytes give
//! [`Malformed`], never a panic, and nothing is cast to a struct. Nothing is copied either.

use std::net::IpAddr;

use crate::dataplane::rules::Family;
use crate::dataplane::xt;
use crate::facts::Protocol;

/// Not a table as the kernel lays it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// `XT_TABLE_MAXNAMELEN`
pub(super) const NAME_BYTES: usize = 32;
/// `struct ipt_getinfo`: name, valid hooks, 5 hook entries, 5 underflows, number, size.
pub(super) const INFO_BYTES: usize = 84;
pub(super) const HOOK_ENTRIES_AT: usize = NAME_BYTES + 4;
pub(super) const UNDERFLOWS_AT: usize = HOOK_ENTRIES_AT + 5 * 4;
const SIZE_AT: usize = INFO_BYTES - 4;
/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`: where new connections meet destination NAT.
const HOOKS: [usize; 2] = [0, 3];
/// `xt_entry_match`, `xt_entry_target`: size, name of 29 bytes, revision.
pub(super) const PART_HEADER_BYTES: usize = 32;
const PART_NAME_BYTES: usize = 29;

/// Where the fields of an entry are.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) protocol_at: usize,
    inverted_at: usize,
    pub(super) target_offset_at: usize,
    pub(super) entry_bytes: usize,
}

pub(super) const V4: Layout =
    Layout { protocol_at: 80, inverted_at: 83, target_offset_at: 88, entry_bytes: 112 };
const V6: Layout =
    Layout { protocol_at: 128, inverted_at: 132, target_offset_at: 140, entry_bytes: 168 };

/// `IPT_INV_PROTO`: the rule is for every protocol but this one.
const NOT_THIS_PROTOCOL: u8 = 0x40;
/// `target_offset` and `next_offset` are adjacent.
const NEXT_AFTER_TARGET: usize = 2;

/// The size of the entries that `ipt_getinfo` announces.
pub(super) fn table_bytes(info: &[u8]) -> Option<u32> {
    word(info, SIZE_AT)
}

/// A built-in chain that new connections enter, as offsets of its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    /// The first.
    pub(super) start: u32,
    /// The last: its policy.
    pub(super) policy: u32,
}

/// The chains that new connections enter, from `ipt_getinfo`.
pub(super) fn hooks(info: &[u8]) -> Option<[Hook; 2]> {
    let [prerouting, output] = HOOKS.map(|hook| {
        Some(Hook {
            start: word(info, HOOK_ENTRIES_AT + hook * 4)?,
            policy: word(info, UNDERFLOWS_AT + hook * 4)?,
        })
    });
    Some([prerouting?, output?])
}

/// The entries of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries<'d> {
    family: Family,
    bytes: &'d [u8],
}

impl<'d> Entries<'d> {
    pub(super) fn new(family: Family, bytes: &'d [u8]) -> Self {
        Self { family, bytes }
    }

    /// Their length in bytes; the kernel has 32 bits for it.
    pub(super) fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    /// The one at this offset.
    pub(super) fn at(&self, offset: u32) -> Option<Entry<'d>> {
        let bytes = self.bytes.get(usize::try_from(offset).ok()?..)?;
        let layout = match self.family {
            Family::V4 => &V4,
            Family::V6 => &V6,
        };
        let target_at = half(bytes, layout.target_offset_at)?.into();
        let length = half(bytes, layout.target_offset_at + NEXT_AFTER_TARGET)?;
        let (bytes, target) = bytes.get(..length.into())?.split_at_checked(target_at)?;
        let (head, matches) = bytes.split_at_checked(layout.entry_bytes)?;
        let (target, _) = part(target)?;
        Some(Entry { family: self.family, layout, length: length.into(), head, matches, target })
    }
}

/// One entry: what the IP header has to be like, more matches, a target.
#[derive(Debug)]
pub(super) struct Entry<'d> {
    family: Family,
    layout: &'static Layout,
    /// In bytes, up to the next one.
    pub(super) length: u32,
    head: &'d [u8],
    matches: &'d [u8],
    target: Part<'d>,
}

/// What is said of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Said<'d> {
    /// The Service port that they are for.
    pub(super) service: Option<&'d str>,
    /// Their protocol.
    pub(super) protocol: Option<Protocol>,
}

/// What an entry's target does, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target<'d> {
    /// The header of a chain, which starts with the next entry.
    ChainHeader(&'d str),
    /// Continues at this offset.
    Jump(u32),
    /// Destination NAT; `None` when that is not to one address and port.
    Send(Option<(IpAddr, u16)>),
    Other,
}

impl<'d> Entry<'d> {
    pub(super) fn target(&self) -> Option<Target<'d>> {
        let info = self.target.info;
        Some(match self.target.name {
            b"ERROR" => Target::ChainHeader(std::str::from_utf8(xt::text(info)).ok()?),
            // Negative: a verdict.
            b"" => match u32::try_from(i32::from_ne_bytes(*info.first_chunk()?)) {
                Ok(offset) => Target::Jump(offset),
                Err(_) => Target::Other,
            },
            xt::DNAT => Target::Send(xt::destination(self.family, self.target.revision, info)),
            _ => Target::Other,
        })
    }

    /// What it says of the connections that it is for.
    pub(super) fn said(&self) -> Option<Said<'d>> {
        let mut said = Said { service: None, protocol: self.protocol() };
        let mut matches = self.matches;
        while !matches.is_empty() {
            let (part, after) = part(matches)?;
            match xt::said(part.name, part.info) {
                Some(xt::Said::Protocol(only)) => said.protocol = Some(only),
                Some(xt::Said::Service(named)) => said.service = named,
                None => {}
            }
            matches = after;
        }
        Some(said)
    }

    /// The protocol that the IP header has to give.
    fn protocol(&self) -> Option<Protocol> {
        if self.head.get(self.layout.inverted_at)? & NOT_THIS_PROTOCOL != 0 {
            return None;
        }
        let number = u8::try_from(half(self.head, self.layout.protocol_at)?).ok()?;
        xt::protocol(number)
    }
}

/// A match or target.
#[derive(Debug)]
struct Part<'d> {
    name: &'d [u8],
    revision: u8,
    info: &'d [u8],
}

/// The match or target that `bytes` start with, and what follows.
fn part(bytes: &[u8]) -> Option<(Part<'_>, &[u8])> {
    let (part, after) = bytes.split_at_checked(half(bytes, 0)?.into())?;
    let (header, info) = part.split_at_checked(PART_HEADER_BYTES)?;
    let name = xt::text(&header[2..2 + PART_NAME_BYTES]);
    Some((Part { name, revision: header[PART_HEADER_BYTES - 1], info }, after))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::super::written::{entry, verdict};
    use super::*;

    #[test]
    fn a_rule_for_all_but_one_protocol_says_no_protocol() {
        let mut bytes = entry(6, &[], &verdict(-2));
        let said = |bytes: &[u8]| {
            let entry = Entries::new(Family::V4, bytes).at(0).expect("an entry");
            entry.said().expect("whole matches").protocol
        };
        assert_eq!(said(&bytes), Some(Protocol::Tcp));
        bytes[V4.inverted_at] = NOT_THIS_PROTOCOL;
        assert_eq!(said(&bytes), None);
    }

    #[test]
    fn an_entry_that_ends_before_its_parts_do_is_none() {
        let bytes = entry(6, &[], &verdict(-2));
        for length in 0..bytes.len() {
            assert!(Entries::new(Family::V4, &bytes[..length]).at(0).is_none(), "{length}");
        }
        let entries = Entries::new(Family::V4, &bytes);
        assert!(entries.at(entries.length()).is_none());
        assert!(entries.at(u32::MAX).is_none());
    }
}

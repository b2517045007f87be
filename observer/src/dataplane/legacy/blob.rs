//! The legacy table as the kernel hands it out: entries of varying length, one after another.
//!
//! `struct ipt_entry` (112 bytes) or `ip6t_entry` (168), then matches, then a target. A jump is a
//! byte offset. A chain starts with an `ERROR` target that holds its name; the built-in chains
//! start where `hook_entry` says. Every field is read by a checked slice: hostile bytes give
//! [`Malformed`], never a panic, and nothing is cast to a struct.

use std::collections::BTreeMap;

use crate::dataplane::rules::{Effect, Family, Name, Rule, Table};
use crate::dataplane::xt;

/// Not a table as the kernel lays it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// `XT_TABLE_MAXNAMELEN`
pub(super) const NAME_BYTES: usize = 32;
/// `struct ipt_getinfo`: name, valid hooks, 5 hook entries, 5 underflows, number, size.
pub(super) const INFO_BYTES: usize = 84;
const HOOK_ENTRIES_AT: usize = NAME_BYTES + 4;
const UNDERFLOWS_AT: usize = HOOK_ENTRIES_AT + 5 * 4;
const SIZE_AT: usize = INFO_BYTES - 4;
/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`, and what iptables calls their chains.
const ENTRIES: [(usize, &str); 2] = [(0, "PREROUTING"), (3, "OUTPUT")];
/// `xt_entry_match`, `xt_entry_target`: size, name of 29 bytes, revision.
const PART_HEADER_BYTES: usize = 32;
const PART_NAME_BYTES: usize = 29;

/// Where the fields of an entry are.
struct Layout {
    protocol_at: usize,
    inverted_at: usize,
    target_offset_at: usize,
    entry_bytes: usize,
}

/// `IPT_INV_PROTO`: the rule is for every protocol but this one.
const NOT_THIS_PROTOCOL: u8 = 0x40;
/// `target_offset` and `next_offset` are adjacent.
const NEXT_AFTER_TARGET: usize = 2;

fn layout(family: Family) -> Layout {
    match family {
        Family::V4 => {
            Layout { protocol_at: 80, inverted_at: 83, target_offset_at: 88, entry_bytes: 112 }
        }
        Family::V6 => {
            Layout { protocol_at: 128, inverted_at: 132, target_offset_at: 140, entry_bytes: 168 }
        }
    }
}

/// The size of the entries that `ipt_getinfo` announces.
pub(super) fn table_bytes(info: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*info.get(SIZE_AT..)?.first_chunk()?))
}

/// What an entry's target does, before offsets are resolved.
enum Target {
    /// The header of a chain.
    ChainHeader(Name),
    /// Continues at this offset.
    Jump(u64),
    Other,
}

/// Reduces a table: `info` is its `ipt_getinfo`, `entries` its entries.
///
/// # Errors
/// When the bytes are not laid out as the kernel does.
pub fn parse(family: Family, info: &[u8], entries: &[u8]) -> Result<Table, Malformed> {
    let layout = layout(family);
    let word = |at: usize| info.get(at..).and_then(|at| at.first_chunk()).ok_or(Malformed);
    let mut starts: BTreeMap<u64, Name> = BTreeMap::new();
    let mut policies: Vec<u64> = Vec::new();
    for (hook, name) in ENTRIES {
        let start = u32::from_ne_bytes(*word(HOOK_ENTRIES_AT + hook * 4)?);
        starts.insert(start.into(), name.into());
        policies.push(u32::from_ne_bytes(*word(UNDERFLOWS_AT + hook * 4)?).into());
    }
    let mut rules: BTreeMap<u64, (Rule, Option<u64>)> = BTreeMap::new();
    let mut offset = 0;
    while offset < entries.len() {
        let here = u64::try_from(offset).unwrap_or(u64::MAX);
        let bytes = entries.get(offset..).ok_or(Malformed)?;
        let (rule, target, length) = entry(family, &layout, bytes).ok_or(Malformed)?;
        match target {
            Target::ChainHeader(name) => {
                starts.insert(here + u64::try_from(length).unwrap_or(u64::MAX), name);
            }
            Target::Jump(to) => {
                rules.insert(here, (rule, Some(to)));
            }
            Target::Other => {
                rules.insert(here, (rule, None));
            }
        }
        offset += length;
    }
    Ok(chains(&starts, &policies, rules))
}

/// Cuts the entries into chains and turns jump offsets into names.
fn chains(
    starts: &BTreeMap<u64, Name>,
    policies: &[u64],
    rules: BTreeMap<u64, (Rule, Option<u64>)>,
) -> Table {
    let mut table = Table::default();
    for name in starts.values() {
        let entry = ENTRIES.iter().any(|(_, entry)| **entry == **name);
        table.chains.entry(name.clone()).or_default().entry = entry;
    }
    let mut current: Option<&Name> = None;
    for (offset, (mut rule, jump)) in rules {
        current = starts.get(&offset).or(current);
        let target = jump.and_then(|to| starts.get(&to));
        rule.effects.extend(target.cloned().map(Effect::Go));
        if let Some(name) = current.filter(|_| !rule.effects.is_empty())
            && let Some(chain) = table.chains.get_mut(name)
        {
            chain.rules.insert(offset, rule);
        }
        // A built-in chain ends with its policy, and the next may be one that is no entry.
        if policies.contains(&offset) {
            current = None;
        }
    }
    table
}

fn entry(family: Family, layout: &Layout, bytes: &[u8]) -> Option<(Rule, Target, usize)> {
    let half = |at: usize| Some(usize::from(half(bytes, at)?));
    let target_at = half(layout.target_offset_at)?;
    let length = half(layout.target_offset_at + NEXT_AFTER_TARGET)?;
    let bytes = bytes.get(..length)?;
    let mut matches = bytes.get(layout.entry_bytes..target_at)?;
    let mut rule = Rule::default();
    if bytes.get(layout.inverted_at)? & NOT_THIS_PROTOCOL == 0 {
        rule.protocol = u8::try_from(half(layout.protocol_at)?).ok().and_then(xt::protocol);
    }
    while !matches.is_empty() {
        let (part, after) = part(matches)?;
        xt::add_match(&mut rule, part.name, part.info);
        matches = after;
    }
    let (Part { name, revision, info }, _) = part(bytes.get(target_at..)?)?;
    let target = match name {
        b"ERROR" => Target::ChainHeader(std::str::from_utf8(xt::text(info)).ok()?.into()),
        b"" => match i32::from_ne_bytes(*info.first_chunk()?) {
            to @ 0.. => Target::Jump(u64::from(to.cast_unsigned())),
            _ => Target::Other,
        },
        _ => {
            xt::add_target(&mut rule, family, name, revision, info);
            Target::Other
        }
    };
    Some((rule, target, length))
}

/// A match or target.
struct Part<'d> {
    name: &'d [u8],
    revision: u8,
    info: &'d [u8],
}

/// The match or target that `bytes` start with, and what follows.
fn part(bytes: &[u8]) -> Option<(Part<'_>, &[u8])> {
    let (part, after) = bytes.split_at_checked(usize::from(half(bytes, 0)?))?;
    let (header, info) = part.split_at_checked(PART_HEADER_BYTES)?;
    let name = xt::text(&header[2..2 + PART_NAME_BYTES]);
    Some((Part { name, revision: header[PART_HEADER_BYTES - 1], info }, after))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::reach;

    const STANDARD_REVISION: u8 = 0;

    fn part(name: &str, revision: u8, info: &[u8]) -> Vec<u8> {
        let info_bytes = info.len().next_multiple_of(8);
        let size = u16::try_from(PART_HEADER_BYTES + info_bytes).expect("small");
        let mut bytes = size.to_ne_bytes().to_vec();
        bytes.extend(name.as_bytes());
        bytes.resize(PART_HEADER_BYTES - 1, 0);
        bytes.push(revision);
        bytes.extend(info);
        bytes.resize(PART_HEADER_BYTES + info_bytes, 0);
        bytes
    }

    fn entry_of(protocol: u16, matches: &[Vec<u8>], target: &[u8]) -> Vec<u8> {
        let layout = layout(Family::V4);
        let matches = matches.concat();
        let target_at = layout.entry_bytes + matches.len();
        let half = |value: usize| u16::try_from(value).expect("small").to_ne_bytes();
        let mut bytes = vec![0; layout.entry_bytes];
        bytes[80..82].copy_from_slice(&protocol.to_ne_bytes());
        bytes[88..90].copy_from_slice(&half(target_at));
        bytes[90..92].copy_from_slice(&half(target_at + target.len()));
        [&bytes, &matches, target].concat()
    }

    fn verdict(code: i32) -> Vec<u8> {
        part("", STANDARD_REVISION, &code.to_ne_bytes())
    }

    /// PREROUTING jumps to a chain that sends to 10.0.0.1:80; INPUT and OUTPUT do nothing.
    fn table() -> (Vec<u8>, Vec<u8>) {
        let policy = entry_of(0, &[], &verdict(-2));
        let jump_bytes = policy.len();
        let header = entry_of(0, &[], &part("ERROR", 0, b"KUBE-SEP-X\0"));
        let chain_at = jump_bytes + 3 * policy.len() + header.len();
        let jump = entry_of(6, &[], &verdict(i32::try_from(chain_at).expect("small")));
        let mut range = 3_u32.to_ne_bytes().to_vec();
        range.extend([[10, 0, 0, 1], [0; 4], [0; 4], [0; 4]].concat().repeat(2));
        range.extend([0, 80, 0, 80, 0, 0]);
        let comment = part("comment", 0, b"ns/web:http\0");
        let send = entry_of(6, &[comment], &part("DNAT", 2, &range));
        let end = entry_of(0, &[], &part("ERROR", 0, b"ERROR\0"));
        let entries =
            [&jump[..], &policy, &policy, &policy, &header, &send, &policy, &end].concat();
        let mut info = vec![0; INFO_BYTES];
        let mut put = |at: usize, value: usize| {
            let value = u32::try_from(value).expect("small").to_ne_bytes();
            info[at..at + 4].copy_from_slice(&value);
        };
        let starts = [(0, 0), (1, 2), (3, 3)];
        for (hook, entry) in starts {
            put(HOOK_ENTRIES_AT + hook * 4, entry * policy.len());
            put(UNDERFLOWS_AT + hook * 4, entry.max(1) * policy.len());
        }
        (info, entries)
    }

    #[test]
    fn a_jump_by_offset_leads_to_the_chains_destination() {
        let (info, entries) = table();
        let table = parse(Family::V4, &info, &entries).expect("a table");
        let reached = reach::walk(&table);
        let [backend] = &reached.backends.iter().collect::<Vec<_>>()[..] else {
            panic!("one backend: {reached:?}")
        };
        assert_eq!((backend.address, backend.port), ([10, 0, 0, 1].into(), 80));
        assert_eq!(backend.service.as_ref().map(|service| &*service.0), Some("ns/web:http"));
        assert!(!table.chains["KUBE-SEP-X"].entry);
    }

    #[test]
    fn a_rule_for_all_but_one_protocol_says_no_protocol() {
        let mut entry_bytes = entry_of(6, &[], &verdict(-2));
        entry_bytes[83] = NOT_THIS_PROTOCOL;
        let (rule, ..) = entry(Family::V4, &layout(Family::V4), &entry_bytes).expect("an entry");
        assert_eq!(rule.protocol, None);
    }

    #[test]
    fn a_truncated_table_is_malformed_and_an_altered_one_never_panics() {
        let (info, entries) = table();
        let mut whole = 0;
        for length in 0..entries.len() {
            whole += usize::from(parse(Family::V4, &info, &entries[..length]).is_ok());
        }
        assert_eq!(whole, 8, "only a cut between its 8 entries leaves whole ones");
        assert_eq!(parse(Family::V4, &info[..60], &entries), Err(Malformed));
        for at in 0..entries.len() {
            let mut altered = entries.clone();
            altered[at] ^= 0xff;
            if let Ok(table) = parse(Family::V4, &info, &altered) {
                assert!(reach::walk(&table).backends.len() <= 1, "{at}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(
            info in proptest::collection::vec(any::<u8>(), 0..100),
            entries in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            for family in [Family::V4, Family::V6] {
                if let Ok(table) = parse(family, &info, &entries) {
                    prop_assert!(reach::walk(&table).backends.len() <= entries.len());
                }
            }
        }
    }
}

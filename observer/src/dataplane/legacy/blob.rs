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
        let (name, _, info, after) = part(matches)?;
        xt::add_match(&mut rule, name, info);
        matches = after;
    }
    let (name, revision, info, _) = part(bytes.get(target_at..)?)?;
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

/// One match or target: name, revision, its own data, and what follows.
fn part(bytes: &[u8]) -> Option<(&[u8], u8, &[u8], &[u8])> {
    let (part, after) = bytes.split_at_checked(usize::from(half(bytes, 0)?))?;
    let (header, info) = part.split_at_checked(PART_HEADER_BYTES)?;
    let name = xt::text(&header[2..2 + PART_NAME_BYTES]);
    Some((name, header[PART_HEADER_BYTES - 1], info, after))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

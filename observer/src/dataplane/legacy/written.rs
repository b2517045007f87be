//! Tables of rules, laid out as the kernel does: for the tests of what reads them.

use std::net::Ipv4Addr;

use super::blob::{HOOK_ENTRIES_AT, INFO_BYTES, PART_HEADER_BYTES, UNDERFLOWS_AT, V4};
use crate::facts::Protocol;

/// `-NF_ACCEPT - 1`
const ACCEPT: i32 = -2;

/// Where a rule says its protocol.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Header,
    Match,
}

/// What a rule does.
#[derive(Clone, Debug)]
pub(super) enum Does {
    /// Jumps to the chain of this name.
    Jump(String),
    /// Jumps to this offset.
    JumpTo(usize),
    /// DNAT to these, of which a single one is a backend.
    Send([(Ipv4Addr, u16); 2]),
    Accept,
}

/// A rule.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) protocol: Option<(Protocol, Place)>,
    pub(super) comment: Option<String>,
    pub(super) does: Does,
}

impl Row {
    /// A rule for all connections.
    pub(super) fn of(does: Does) -> Self {
        Self { protocol: None, comment: None, does }
    }
}

/// A chain's name and rules.
pub(super) type Rows = (String, Vec<Row>);

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

/// One entry.
pub(super) fn entry(protocol: u16, matches: &[u8], target: &[u8]) -> Vec<u8> {
    let target_at = V4.entry_bytes + matches.len();
    let half = |value: usize| u16::try_from(value).expect("small").to_ne_bytes();
    let mut bytes = vec![0; V4.entry_bytes];
    bytes[V4.protocol_at..][..2].copy_from_slice(&protocol.to_ne_bytes());
    bytes[V4.target_offset_at..][..2].copy_from_slice(&half(target_at));
    bytes[V4.target_offset_at + 2..][..2].copy_from_slice(&half(target_at + target.len()));
    [&bytes, matches, target].concat()
}

/// A standard target.
pub(super) fn verdict(code: i32) -> Vec<u8> {
    part("", 0, &code.to_ne_bytes())
}

fn header(chain: &str) -> Vec<u8> {
    entry(0, &[], &part("ERROR", 0, format!("{chain}\0").as_bytes()))
}

fn dnat([(first, first_port), (last, last_port)]: [(Ipv4Addr, u16); 2]) -> Vec<u8> {
    let mut range = 3_u32.to_ne_bytes().to_vec();
    for address in [first, last] {
        range.extend(address.octets());
        range.extend([0; 12]);
    }
    range.extend([first_port, last_port].map(u16::to_be_bytes).concat());
    range.extend([0; 4]);
    part("DNAT", 2, &range)
}

impl Row {
    /// As an entry, where `start` says where chains start.
    fn written(&self, start: &dyn Fn(&str) -> usize) -> Vec<u8> {
        let jump = |to: usize| verdict(i32::try_from(to).expect("small"));
        let target = match &self.does {
            Does::Jump(chain) => jump(start(chain)),
            Does::JumpTo(offset) => jump(*offset),
            Does::Send(range) => dnat(*range),
            Does::Accept => verdict(ACCEPT),
        };
        let mut matches = Vec::new();
        let mut number = 0;
        if let Some((protocol, place)) = self.protocol {
            let (name, of_protocol) = match protocol {
                Protocol::Tcp => ("tcp", 6),
                Protocol::Udp => ("udp", 17),
                Protocol::Sctp => ("sctp", 132),
            };
            match place {
                Place::Header => number = of_protocol,
                Place::Match => matches.extend(part(name, 0, &[0; 16])),
            }
        }
        if let Some(comment) = &self.comment {
            matches.extend(part("comment", 0, format!("{comment}\0").as_bytes()));
        }
        entry(number, &matches, &target)
    }
}

/// The `ipt_getinfo` and the entries of a table with these chains, in this order: three built-in
/// ones of which the second is INPUT, then others.
pub(super) fn table(chains: &[Rows]) -> (Vec<u8>, Vec<u8>) {
    let mut starts: Vec<(&str, usize)> = Vec::new();
    let mut info = vec![0; INFO_BYTES];
    // First with wrong jumps, to know how long the entries are.
    let mut entries = Vec::new();
    for _ in 0..2 {
        let known = starts.clone();
        let start = |wanted: &str| {
            known.iter().find(|(name, _)| *name == wanted).map_or(0, |(_, start)| *start)
        };
        starts.clear();
        entries.clear();
        for (number, (name, rows)) in chains.iter().enumerate() {
            if number > 2 {
                entries.extend(header(name));
            }
            starts.push((name, entries.len()));
            for row in rows {
                entries.extend(row.written(&start));
            }
            if let Some(hook) = [0, 1, 3].get(number) {
                let mut put = |at: usize, value: usize| {
                    let value = u32::try_from(value).expect("small").to_ne_bytes();
                    info[at + hook * 4..][..4].copy_from_slice(&value);
                };
                put(HOOK_ENTRIES_AT, starts[number].1);
                put(UNDERFLOWS_AT, entries.len());
            }
            entries.extend(entry(0, &[], &verdict(ACCEPT)));
        }
        entries.extend(header("ERROR"));
    }
    (info, entries)
}

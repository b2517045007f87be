//! The kernel's own notices of nftables commits in one namespace, each stamped when its first
//! message came, and what can be read from them: which chains were rewritten, and with what.
//!
//! A plain socket and a few lines of decoding, on purpose not the agent's: it is what the agent is
//! compared with.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};

use crate::lab::clock;
use crate::lab::netns::Namespace;
use crate::lab::network::Family;

/// `NFNLGRP_NFTABLES` (7) as a bit of `nl_groups`.
const GROUP: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u8 = 10;
/// `NFT_MSG_*`
const NEW_CHAIN: u8 = 3;
const DELETE_CHAIN: u8 = 5;
const NEW_RULE: u8 = 6;
const DELETE_RULE: u8 = 8;
const NEW_ELEMENT: u8 = 12;
const NEW_GENERATION: u8 = 15;
/// The first attribute of what has a table is the table's name (`NFTA_*_TABLE`).
const TABLE: u16 = 1;
/// `NFTA_RULE_CHAIN` and `NFTA_SET_ELEM_LIST_SET`
const CHAIN_OR_SET: u16 = 2;
/// `NFTA_CHAIN_NAME`
const CHAIN_NAME: u16 = 3;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// Bits of an attribute's type that are flags.
const TYPE_MASK: u16 = 0x3fff;
/// `struct nlmsghdr`, and with `struct nfgenmsg` after it.
const HEADER: usize = 16;
const HEADERS: usize = HEADER + 4;
/// The largest commit that kube-proxy makes here is far smaller.
const RECEIVE_BUFFER: usize = 16 << 20;
const DATAGRAM: usize = 1 << 17;
/// How late the end is noticed.
const POLL_MS: u16 = 100;

/// Rules that changed at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Commit {
    /// When its first message came: the new rules were in force.
    pub(super) at_ns: u64,
    /// The old rules were still in force; 0 when a notice is all there is.
    pub(super) not_before_ns: u64,
    messages: Vec<Message>,
    /// Messages were lost before its end, and commits perhaps with them.
    pub(super) incomplete: bool,
    /// A family whose legacy table was replaced: there are no messages.
    replaced: Option<Family>,
}

/// What a commit says of one chain or set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Message {
    kind: u8,
    family: Family,
    table: Vec<u8>,
    /// The chain of a rule, the set of an element.
    name: Vec<u8>,
    bytes: Vec<u8>,
}

impl Commit {
    /// A legacy table was replaced, between two looks.
    pub(super) fn replacement(family: Family, not_before_ns: u64, at_ns: u64) -> Self {
        Self { at_ns, not_before_ns, replaced: Some(family), ..Self::default() }
    }

    /// Whether it changes a table.
    pub(super) fn touches(&self, family: Family, table: &str) -> bool {
        let mut of = self.messages.iter();
        self.incomplete
            || self.replaced == Some(family)
            || of.any(|message| message.is_of(family, table))
    }

    /// Whether a chain's rules, which it wrote anew, name a backend; `None` when it did not write
    /// them, or not all of it is known.
    pub(super) fn leads_to(
        &self,
        family: Family,
        table: &str,
        chain: &str,
        token: &[u8],
    ) -> Option<bool> {
        if self.incomplete {
            return None;
        }
        let of_table = || self.messages.iter().filter(|message| message.is_of(family, table));
        let of_chain = || of_table().filter(|message| message.name == chain.as_bytes());
        let rewrites = [NEW_RULE, DELETE_RULE, DELETE_CHAIN];
        of_chain().find(|message| rewrites.contains(&message.kind))?;
        let has = |message: &Message, token: &[u8]| {
            message.bytes.windows(token.len()).any(|window| window == token)
        };
        // A rule either names the backend or looks it up in a set whose elements came before.
        let sets: Vec<Vec<u8>> = of_table()
            .filter(|message| message.kind == NEW_ELEMENT && has(message, token))
            .map(|message| [&message.name[..], &[0]].concat())
            .collect();
        let mut rules = of_chain().filter(|message| message.kind == NEW_RULE);
        Some(rules.any(|rule| has(rule, token) || sets.iter().any(|set| has(rule, set))))
    }
}

impl Message {
    fn is_of(&self, family: Family, table: &str) -> bool {
        self.family == family && self.table == table.as_bytes()
    }
}

/// Puts messages together to commits.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    begun: Option<Commit>,
}

impl Assembler {
    /// The commits that a datagram, received at `at_ns`, ends.
    pub(super) fn take(&mut self, at_ns: u64, mut datagram: &[u8]) -> Vec<Commit> {
        let mut ended = Vec::new();
        while let Some((message, rest)) = split_message(datagram) {
            datagram = rest;
            if message[5] != SUBSYSTEM {
                continue;
            }
            let commit = self.begun.get_or_insert_with(|| Commit { at_ns, ..Commit::default() });
            if message[4] == NEW_GENERATION {
                ended.extend(self.begun.take());
            } else {
                commit.messages.extend(decode(message));
            }
        }
        ended
    }

    /// Messages were lost: what was begun is no whole commit, and one may be missing.
    pub(super) fn lose(&mut self, at_ns: u64) -> Commit {
        let begun = self.begun.take().unwrap_or(Commit { at_ns, ..Commit::default() });
        Commit { incomplete: true, ..begun }
    }
}

/// The first message of a datagram and the rest; `None` at its end or when it is cut.
fn split_message(datagram: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?);
    let length = usize::try_from(length).ok()?.max(HEADERS);
    let message = datagram.get(..length)?;
    Some((message, datagram.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// What may say something of a Service's chain; other kinds and families do not.
fn decode(message: &[u8]) -> Option<Message> {
    let kind = message[4];
    let family = match message[HEADER] {
        IPV4 => Family::V4,
        IPV6 => Family::V6,
        _ => return None,
    };
    let attributes = &message[HEADERS..];
    let name = match kind {
        NEW_CHAIN | DELETE_CHAIN => CHAIN_NAME,
        NEW_RULE | DELETE_RULE | NEW_ELEMENT => CHAIN_OR_SET,
        _ => return None,
    };
    Some(Message {
        kind,
        family,
        table: attribute(attributes, TABLE)?,
        name: attribute(attributes, name).unwrap_or_default(),
        bytes: attributes.to_vec(),
    })
}

/// The value of an attribute that is a name.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<Vec<u8>> {
    loop {
        let header = attributes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]])).max(4);
        if u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK == wanted {
            let value = attributes.get(4..length)?;
            return Some(value.strip_suffix(&[0]).unwrap_or(value).to_vec());
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// Calls `tell` with each commit in `namespace` made after this returns, on a thread of its own,
/// until `stop` is set.
pub(super) fn listen(
    namespace: &Namespace,
    stop: impl AsRef<AtomicBool> + Send + 'static,
    mut tell: impl FnMut(Commit) + Send + 'static,
) -> Result<()> {
    let (ready, opened) = sync_channel(1);
    namespace.thread(move || {
        if let Some(socket) = open_and_say(&ready) {
            receive(&socket, stop.as_ref(), &mut tell);
        }
    });
    opened.recv().context("the thread that listens for commits died")?
}

fn open_and_say(ready: &SyncSender<Result<()>>) -> Option<OwnedFd> {
    let (socket, outcome) = match open() {
        Ok(socket) => (Some(socket), Ok(())),
        Err(error) => (None, Err(error)),
    };
    ready.send(outcome).ok().and(socket)
}

fn receive(socket: &OwnedFd, stop: &AtomicBool, tell: &mut impl FnMut(Commit)) {
    let mut assembler = Assembler::default();
    let mut buffer = vec![0; DATAGRAM];
    while !stop.load(Ordering::Relaxed) {
        let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::from(POLL_MS)) != Ok(1) {
            continue;
        }
        let at_ns = clock::boot_ns();
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Ok(length) if length <= buffer.len() => {
                assembler.take(at_ns, &buffer[..length]).into_iter().for_each(&mut *tell);
            }
            Ok(_) | Err(Errno::ENOBUFS) => tell(assembler.lose(at_ns)),
            // Interrupted, or nothing there after all.
            Err(_) => {}
        }
    }
}

fn open() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
        .context("cannot open a netfilter socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))
        .context("cannot join the nftables group")?;
    Ok(socket)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const TABLE_NAME: &str = "kube-proxy";

    fn message(kind: u8, family: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut payload = vec![family, 0, 0, 0];
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).expect("a short value");
            payload.extend(length.to_ne_bytes());
            payload.extend(kind.to_ne_bytes());
            payload.extend(*value);
            payload.resize(payload.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(HEADER + payload.len()).expect("a short message");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind, SUBSYSTEM]);
        bytes.resize(HEADER, 0);
        bytes.extend(payload);
        bytes
    }

    fn named(kind: u8, name: &str, rest: &[u8]) -> Vec<u8> {
        let name = [name.as_bytes(), &[0]].concat();
        message(kind, IPV4, &[(TABLE, b"kube-proxy\0"), (CHAIN_OR_SET, &name), (4, rest)])
    }

    /// A commit that writes `chain` anew, over a map with these tokens.
    pub(in super::super) fn rewrite(at_ns: u64, chain: &str, tokens: &[&[u8]]) -> Commit {
        let mut datagram = named(DELETE_RULE, chain, b"");
        for token in tokens {
            datagram.extend(named(NEW_ELEMENT, "__map7", token));
        }
        if !tokens.is_empty() {
            datagram.extend(named(NEW_RULE, chain, b"lookup __map7\0"));
        }
        datagram.extend(message(NEW_GENERATION, 0, &[]));
        Assembler::default().take(at_ns, &datagram).pop().expect("a commit")
    }

    fn leads(commit: &Commit, chain: &str, token: &[u8]) -> Option<bool> {
        commit.leads_to(Family::V4, TABLE_NAME, chain, token)
    }

    #[test]
    fn a_rewritten_chain_leads_where_its_map_does() {
        let commit = rewrite(5, "service-web", &[b"aaaa", b"bbbb"]);
        assert_eq!(leads(&commit, "service-web", b"bbbb"), Some(true));
        assert_eq!(leads(&commit, "service-web", b"cccc"), Some(false));
        assert_eq!(leads(&commit, "service-other", b"bbbb"), None);
        assert_eq!(leads(&rewrite(5, "service-web", &[]), "service-web", b"aaaa"), Some(false));
        assert!(commit.touches(Family::V4, TABLE_NAME));
        assert!(!commit.touches(Family::V6, TABLE_NAME));
        assert!(!commit.touches(Family::V4, "nat"));
    }

    #[test]
    fn a_map_of_another_chain_does_not_count() {
        let mut datagram = named(NEW_ELEMENT, "__map1", b"aaaa");
        datagram.extend(named(NEW_ELEMENT, "__map12", b"bbbb"));
        datagram.extend(named(NEW_RULE, "service-web", b"lookup __map12\0"));
        datagram.extend(message(NEW_GENERATION, 0, &[]));
        let commit = Assembler::default().take(5, &datagram).pop().expect("a commit");
        assert_eq!(leads(&commit, "service-web", b"aaaa"), Some(false));
        assert_eq!(leads(&commit, "service-web", b"bbbb"), Some(true));
    }

    #[test]
    fn a_rule_that_jumps_leads_to_what_it_names() {
        let mut datagram = named(NEW_RULE, "KUBE-SVC-A", b"KUBE-SEP-B\0");
        datagram.extend(message(NEW_GENERATION, 0, &[]));
        let commit = Assembler::default().take(5, &datagram).pop().expect("a commit");
        assert_eq!(leads(&commit, "KUBE-SVC-A", b"KUBE-SEP-B\0"), Some(true));
        assert_eq!(leads(&commit, "KUBE-SVC-A", b"KUBE-SEP-C\0"), Some(false));
    }

    #[test]
    fn a_commit_has_the_stamp_of_its_first_datagram() {
        let mut assembler = Assembler::default();
        assert_eq!(assembler.take(5, &named(NEW_RULE, "a", b"")), []);
        let end = message(NEW_GENERATION, 0, &[]);
        let commits = assembler.take(9, &[end.clone(), end].concat());
        assert_eq!(commits.iter().map(|commit| commit.at_ns).collect::<Vec<_>>(), [5, 9]);
    }

    #[test]
    fn a_loss_leaves_a_commit_that_says_nothing() {
        let mut assembler = Assembler::default();
        assembler.take(5, &named(NEW_RULE, "a", b""));
        let lost = assembler.lose(9);
        assert!(lost.incomplete && lost.touches(Family::V6, "nat"));
        assert_eq!((lost.at_ns, leads(&lost, "a", b"x")), (5, None));
    }

    #[test]
    fn a_datagram_cut_anywhere_ends_quietly() {
        let datagram = named(NEW_RULE, "service-web", b"lookup __map7\0");
        for length in 0..datagram.len() {
            assert_eq!(Assembler::default().take(1, &datagram[..length]), [], "{length}");
        }
        assert_eq!(Assembler::default().take(1, &[0; 64]), []);
    }
}

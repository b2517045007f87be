//! Reads all rules at once: at the start, and whenever notifications were lost.
//!
//! A dump is many requests (`nf_tables` has none for everything), so it is only good if the
//! generation is the same before and after; a commit in between means again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::attributes::{Frame, frames};
use super::follow::Follow;
use super::messages::{Change, Message, Passed, SUBSYSTEM, TableFamily, TableId, decode, kind};
use super::ruleset::Ruleset;
use super::socket;
use crate::dataplane::Counters;
use crate::dataplane::rules::Name;

/// `NLM_F_REQUEST`, and with `NLM_F_DUMP`
const ONE: u16 = 0x1;
const ALL: u16 = 0x301;
/// `NLM_F_DUMP_INTR`: a commit happened while the kernel wrote this dump.
const INTERRUPTED: u16 = 0x10;
/// `NLMSG_ERROR`, `NLMSG_DONE`
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The kernel answers at once; this only ends a wait that would never end.
const ANSWER_SECONDS: i64 = 5;

/// Why there is no dump.
#[derive(Debug)]
pub enum Fault {
    /// The rules changed while they were read: try again.
    Changed,
    /// This kernel has no `nf_tables`.
    Absent,
    /// Anything else.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// Asks the kernel for its rules, once: after a fault, answers may still be on their way.
#[derive(Debug)]
pub struct Dumper {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Dumper {
    /// Opens the socket in this thread's network namespace.
    ///
    /// # Errors
    /// When there is no netfilter netlink.
    pub fn open() -> anyhow::Result<Self> {
        let socket = socket::open(0)?;
        socket::limit_wait(&socket, ANSWER_SECONDS)?;
        Ok(Self { socket, buffer: socket::buffer(), sequence: 0 })
    }

    /// Reads everything, blocking.
    ///
    /// # Errors
    /// [`Fault`] says whether to try again.
    pub fn dump(mut self, counters: &Counters) -> Result<Follow, Fault> {
        let before = self.generation(counters)?;
        let mut messages: Vec<(TableId, Change)> = Vec::new();
        // Rules are asked for chain by chain: asked for all, the kernel walks from the first one again
        // for each datagram, which takes time with the square of the rules.
        let mut contents: Vec<(u8, (TableId, Name))> = Vec::new();
        for kind in [kind::GET_TABLE, kind::GET_CHAIN, kind::GET_SET] {
            self.ask(kind, ALL, None, counters, |message| {
                let Message::In(table, change) = message else { return };
                match &change {
                    Change::NewChain { chain, .. } => {
                        contents.push((kind::GET_RULE, (table.clone(), chain.clone())));
                    }
                    Change::NewMap { map, .. } => {
                        contents.push((kind::GET_ELEMENTS, (table.clone(), map.clone())));
                    }
                    _ => {}
                }
                messages.push((table, change));
            })?;
        }
        for (kind, of) in &contents {
            self.ask(*kind, ALL, Some(of), counters, |message| {
                if let Message::In(table, change) = message {
                    messages.push((table, change));
                }
            })?;
        }
        if self.generation(counters)? != before {
            return Err(Fault::Changed);
        }
        let ruleset = Ruleset::from_messages(messages).ok().ok_or(Fault::Changed)?;
        Ok(Follow::from_dump(ruleset, before))
    }

    fn generation(&mut self, counters: &Counters) -> Result<u32, Fault> {
        let mut generation = None;
        self.ask(kind::GET_GENERATION, ONE, None, counters, |message| {
            generation = generation.or(message.generation());
        })?;
        generation.ok_or_else(|| anyhow::anyhow!("no nf_tables generation in the answer").into())
    }

    /// Sends a request and passes the messages of the answer to `take`.
    fn ask(
        &mut self,
        kind: u8,
        flags: u16,
        of: Option<&(TableId, Name)>,
        counters: &Counters,
        mut take: impl FnMut(Message),
    ) -> Result<(), Fault> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(kind, flags, self.sequence, of);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())
            .context("ask the kernel for its nf_tables rules")?;
        loop {
            let datagram = match socket::receive(&self.socket, &mut self.buffer, MsgFlags::empty())
            {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                datagram => datagram.context("read the kernel's nf_tables rules")?,
            };
            match read_answer(datagram, self.sequence, flags, counters, &mut take)? {
                Progress::Ended => return Ok(()),
                Progress::Continues => {}
            }
        }
    }
}

/// Whether a datagram was the last one of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Ended,
    Continues,
}

/// Passes the messages that a datagram has of the answer to the request `sequence` to `take`.
fn read_answer(
    datagram: &[u8],
    sequence: u32,
    flags: u16,
    counters: &Counters,
    mut take: impl FnMut(Message),
) -> Result<Progress, Fault> {
    for frame in frames(datagram) {
        let Ok(frame) = frame else {
            counters.malformed.increase();
            break;
        };
        if frame.sequence != sequence {
            continue;
        }
        if frame.flags & INTERRUPTED != 0 {
            return Err(Fault::Changed);
        }
        match frame.kind {
            DONE => return Ok(Progress::Ended),
            ERROR => return fault(&frame).map(|()| Progress::Ended),
            _ => match decode(&frame) {
                Ok((message, unknown)) => {
                    counters.unknown_expressions.add(unknown);
                    take(message);
                }
                Err(Passed::Malformed) => counters.malformed.increase(),
                Err(Passed::Foreign) => {}
            },
        }
        if flags == ONE {
            return Ok(Progress::Ended);
        }
    }
    Ok(Progress::Continues)
}

/// The rules in recorded answers to dump requests that were numbered from 1, without a socket.
///
/// # Errors
/// As [`Dumper::dump`].
pub(crate) fn replay(answers: &[u8], counters: &Counters) -> Result<Ruleset, Fault> {
    let mut messages = Vec::new();
    for sequence in 1.. {
        let progress = read_answer(answers, sequence, ALL, counters, |message| {
            if let Message::In(table, change) = message {
                messages.push((table, change));
            }
        })?;
        if progress == Progress::Continues {
            break;
        }
    }
    Ruleset::from_messages(messages).ok().ok_or(Fault::Changed)
}

/// `nlmsgerr`: a negative errno, 0 for an acknowledgement.
fn fault(frame: &Frame<'_>) -> Result<(), Fault> {
    let code = frame.payload.first_chunk().map_or(0, |&code| i32::from_ne_bytes(code));
    match Errno::from_raw(code.wrapping_neg()) {
        Errno::UnknownErrno if code == 0 => Ok(()),
        Errno::ENOENT | Errno::EINTR | Errno::EAGAIN => Err(Fault::Changed),
        Errno::EINVAL | Errno::EOPNOTSUPP => Err(Fault::Absent),
        Errno::EPERM => Err(Fault::Other(
            anyhow::Error::new(Errno::EPERM)
                .context("not permitted to read the node's nf_tables rules (needs CAP_NET_ADMIN)"),
        )),
        errno => Err(Fault::Other(anyhow::Error::new(errno).context("read nf_tables rules"))),
    }
}

/// A request: `nlmsghdr`, `nfgenmsg`, and what it is about: `NFTA_SET_ELEM_LIST_TABLE` and `_SET`, or
/// `NFTA_RULE_TABLE` and `_CHAIN`, which have the same numbers.
fn request(kind: u8, flags: u16, sequence: u32, of: Option<&(TableId, Name)>) -> Vec<u8> {
    let mut body = vec![of.map_or(0, |(table, _)| TableFamily::number(table.family)), 0, 0, 0];
    if let Some((table, name)) = of {
        put_name(&mut body, 1, &table.name);
        put_name(&mut body, 2, name);
    }
    let length = u32::try_from(body.len() + 16).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend((SUBSYSTEM << 8 | u16::from(kind)).to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

fn put_name(body: &mut Vec<u8>, kind: u16, name: &str) {
    let length = u16::try_from(name.len() + 5).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(name.as_bytes());
    body.push(0);
    body.resize(body.len().next_multiple_of(4), 0);
}

//! Reads all rules at once: at the start, and whenever notifications were lost.
//!
//! A dump is many requests (`nf_tables` has none for everything), and commits may fall between
//! them: the generations before and after say which, and [`Follow`] applies those once more. Within
//! one answer the kernel tells of a commit, and it is asked for again: rules may be missing in it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::thread;

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::attributes::{Frame, frames};
use super::follow::Follow;
use super::messages::{Change, Passed, SUBSYSTEM, TableFamily, TableId, Within, generation, kind};
use super::ruleset::Ruleset;
use super::socket;
use crate::dataplane::Counters;
use crate::dataplane::rules::Name;

/// `NLM_F_REQUEST`, with `NLM_F_ACK`, and with `NLM_F_DUMP`
const ONE: u16 = 0x1;
const ACKNOWLEDGED: u16 = 0x5;
const ALL: u16 = 0x301;
/// `NLM_F_DUMP_INTR`: a commit happened while the kernel wrote this dump.
const INTERRUPTED: u16 = 0x10;
/// `NLA_F_NESTED`
const NESTED: u16 = 0x8000;
/// `NLMSG_ERROR`, `NLMSG_DONE`
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Elements that are asked for by key in one request. Each answer is a message of its own, and all
/// are written before the first is read: so many fit into a socket's usual buffer.
const KEYS_MAX: u32 = 16;
/// The kernel answers at once; this only ends a wait that would never end.
const ANSWER_SECONDS: i64 = 5;
/// How often one request is made while commits fall into its answer. The longest take some 50 ms
/// (10,000 Services: all chains, or the rules of `KUBE-SERVICES`).
const ATTEMPTS: usize = 100;

/// Why there is no dump.
#[derive(Debug)]
pub enum Fault {
    /// The rules changed all the time while they were read: try again.
    Changed,
    /// What was asked for is not there.
    Missing,
    /// The kernel does not know such a request.
    Unknown,
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

/// Asks the kernel for its rules. On two sockets, for the kernel does one request of each at a time.
#[derive(Debug)]
pub struct Dumper {
    sockets: [Asker; 2],
}

impl Dumper {
    /// Opens the sockets in this thread's network namespace.
    ///
    /// # Errors
    /// When there is no netfilter netlink.
    pub fn open() -> anyhow::Result<Self> {
        Ok(Self { sockets: [Asker::open()?, Asker::open()?] })
    }

    /// Reads everything, blocking; whole once the commits meanwhile have been taken in. Once: after
    /// a fault, answers may still be on their way.
    ///
    /// # Errors
    /// [`Fault`] says whether to try again.
    pub fn dump(self, counters: &Counters) -> Result<Follow, Fault> {
        let [mut one, mut other] = self.sockets;
        let from = match one.generation(counters) {
            Err(Fault::Unknown) => return Err(Fault::Absent),
            from => from?,
        };
        // Rules are asked for chain by chain: asked for all, the kernel walks from the first one
        // again for each datagram, which takes time with the square of the rules.
        let mut messages = Messages::new();
        for kind in [kind::GET_TABLE, kind::GET_CHAIN, kind::GET_SET] {
            one.all(kind, &nothing(), counters, &mut messages)?;
        }
        let contents = messages.iter().filter_map(Content::of).collect::<Vec<_>>();
        // Every other one: later maps take longer.
        let (odd, even) = (contents.iter().skip(1).step_by(2), contents.iter().step_by(2));
        let (even, odd) = thread::scope(|scope| {
            let helper = scope.spawn(|| other.all_contents(odd, counters));
            let even = one.all_contents(even, counters);
            (even, helper.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        messages.extend(even?);
        messages.extend(odd?);
        let until = one.generation(counters)?;
        let ruleset = Ruleset::from_messages(messages).ok().ok_or(Fault::Changed)?;
        Ok(Follow::from_dump(ruleset, from, until))
    }
}

/// What the kernel says of its tables.
type Messages = Vec<(TableId, Change)>;

/// One socket to ask the kernel by.
#[derive(Debug)]
struct Asker {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Asker {
    fn open() -> anyhow::Result<Self> {
        let socket = socket::open(0)?;
        socket::limit_wait(&socket, ANSWER_SECONDS)?;
        Ok(Self { socket, buffer: socket::buffer(), sequence: 0 })
    }

    fn all_contents<'c>(
        &mut self,
        contents: impl Iterator<Item = &'c Content>,
        counters: &Counters,
    ) -> Result<Messages, Fault> {
        let mut messages = Messages::new();
        for content in contents {
            match self.contents(content, counters, &mut messages) {
                // It was deleted meanwhile.
                Err(Fault::Missing) => {}
                answer => answer?,
            }
        }
        Ok(messages)
    }

    /// Reads the rules of a chain, or the elements of a map.
    ///
    /// For each request about a map the kernel searches the table's list of maps from its start, and
    /// for a dump twice more, which for 10,000 Services is nearly all the time that this takes. So
    /// the elements of a map with few keys that can be guessed are asked for by these, all at once.
    /// One that is missing fails the request, and there are no others when none is.
    fn contents(
        &mut self,
        content: &Content,
        counters: &Counters,
        messages: &mut Messages,
    ) -> Result<(), Fault> {
        let Content { kind, table, name, numbered } = content;
        let body = about(table, name);
        if let Some(count) = numbered.filter(|count| *count <= KEYS_MAX) {
            let known = messages.len();
            let with_keys = [&*body, &numbers(count)].concat();
            let answer = self.ask(*kind, ACKNOWLEDGED, &with_keys, counters, |message| {
                messages.extend(message.within());
            });
            match answer {
                Err(Fault::Changed | Fault::Missing | Fault::Unknown) => messages.truncate(known),
                answer => return answer,
            }
        }
        self.all(*kind, &body, counters, messages)
    }

    /// Makes a request for all of a kind, until no commit falls into its answer.
    fn all(
        &mut self,
        kind: u8,
        body: &[u8],
        counters: &Counters,
        messages: &mut Messages,
    ) -> Result<(), Fault> {
        let known = messages.len();
        for _ in 0..ATTEMPTS {
            let answer =
                self.ask(kind, ALL, body, counters, |message| messages.extend(message.within()));
            match answer {
                Err(Fault::Changed) => {
                    counters.interrupted_reads.increase();
                    messages.truncate(known);
                }
                answer => return answer,
            }
        }
        Err(Fault::Changed)
    }

    fn generation(&mut self, counters: &Counters) -> Result<u32, Fault> {
        let mut generation = None;
        self.ask(kind::GET_GENERATION, ONE, &nothing(), counters, |message| {
            generation = generation.or(message.generation());
        })?;
        generation.ok_or_else(|| anyhow::anyhow!("no nf_tables generation in the answer").into())
    }

    /// Sends a request and passes the messages of the answer to `take`. Reads all of the answer.
    fn ask(
        &mut self,
        kind: u8,
        flags: u16,
        body: &[u8],
        counters: &Counters,
        mut take: impl FnMut(Message),
    ) -> Result<(), Fault> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(kind, flags, self.sequence, body);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())
            .context("ask the kernel for its nf_tables rules")?;
        let mut answer = Answer::to(self.sequence, flags);
        loop {
            let datagram = match socket::receive(&self.socket, &mut self.buffer, MsgFlags::empty())
            {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                datagram => datagram.context("read the kernel's nf_tables rules")?,
            };
            if answer.read(datagram, counters, &mut take)? {
                return Ok(());
            }
        }
    }
}

/// One message of an answer.
enum Message {
    Generation(u32),
    Within(TableId, Change),
}

impl Message {
    fn read(frame: &Frame<'_>, counters: &Counters) -> Result<Self, Passed> {
        if let Some(generation) = generation(frame) {
            return Ok(Self::Generation(generation?.number));
        }
        let within = Within::read(frame)?;
        let (change, unknown) = within.change()?;
        counters.unknown_expressions.add(unknown);
        Ok(Self::Within(within.table(None), change))
    }

    fn generation(self) -> Option<u32> {
        match self {
            Self::Generation(number) => Some(number),
            Self::Within(..) => None,
        }
    }

    fn within(self) -> Option<(TableId, Change)> {
        match self {
            Self::Within(table, change) => Some((table, change)),
            Self::Generation(_) => None,
        }
    }
}

/// A chain or a map, to be asked for what is in it.
struct Content {
    kind: u8,
    table: TableId,
    name: Name,
    /// How many elements a map has under the keys from 0 on, if that is all it has.
    numbered: Option<u32>,
}

impl Content {
    /// What a message announces.
    fn of((table, change): &(TableId, Change)) -> Option<Self> {
        let (kind, name, numbered) = match change {
            Change::NewChain { chain, .. } => (kind::GET_RULE, chain, None),
            Change::NewMap { map, numbered, .. } => (kind::GET_ELEMENTS, map, *numbered),
            _ => return None,
        };
        Some(Self { kind, table: table.clone(), name: name.clone(), numbered })
    }
}

/// The answer to one request, while it is read.
struct Answer {
    sequence: u32,
    flags: u16,
    /// A commit fell into it.
    interrupted: bool,
}

impl Answer {
    fn to(sequence: u32, flags: u16) -> Self {
        Self { sequence, flags, interrupted: false }
    }

    /// Passes the messages that a datagram has of the answer to `take`; gives whether it ended.
    fn read(
        &mut self,
        datagram: &[u8],
        counters: &Counters,
        mut take: impl FnMut(Message),
    ) -> Result<bool, Fault> {
        for frame in frames(datagram) {
            let Ok(frame) = frame else {
                counters.malformed.increase();
                break;
            };
            if frame.sequence != self.sequence {
                continue;
            }
            self.interrupted |= frame.flags & INTERRUPTED != 0;
            match frame.kind {
                DONE if self.interrupted => return Err(Fault::Changed),
                DONE => return Ok(true),
                ERROR => return fault(&frame).map(|()| true),
                _ => match Message::read(&frame, counters) {
                    Ok(message) => take(message),
                    Err(Passed::Malformed) => counters.malformed.increase(),
                    Err(Passed::Foreign) => {}
                },
            }
            if self.flags == ONE {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The rules in recorded answers to dump requests that were numbered from 1, without a socket.
///
/// # Errors
/// As [`Dumper::dump`].
pub(crate) fn replay(answers: &[u8], counters: &Counters) -> Result<Ruleset, Fault> {
    let mut messages = Vec::new();
    for sequence in 1.. {
        let mut answer = Answer::to(sequence, ALL);
        if !answer.read(answers, counters, |message| messages.extend(message.within()))? {
            break;
        }
    }
    let mut ruleset = Ruleset::from_messages(messages).ok().ok_or(Fault::Changed)?;
    ruleset.end();
    Ok(ruleset)
}

/// `nlmsgerr`: a negative errno, 0 for an acknowledgement.
fn fault(frame: &Frame<'_>) -> Result<(), Fault> {
    let code = frame.payload.first_chunk().map_or(0, |&code| i32::from_ne_bytes(code));
    match Errno::from_raw(code.wrapping_neg()) {
        Errno::UnknownErrno if code == 0 => Ok(()),
        Errno::EINTR | Errno::EAGAIN => Err(Fault::Changed),
        Errno::ENOENT => Err(Fault::Missing),
        Errno::EINVAL | Errno::EOPNOTSUPP => Err(Fault::Unknown),
        Errno::EPERM => Err(Fault::Other(
            anyhow::Error::new(Errno::EPERM)
                .context("not permitted to read the node's nf_tables rules (needs CAP_NET_ADMIN)"),
        )),
        errno => Err(Fault::Other(anyhow::Error::new(errno).context("read nf_tables rules"))),
    }
}

/// `nfgenmsg` of a request for all families.
fn nothing() -> Vec<u8> {
    vec![0; 4]
}

/// `nfgenmsg` and what a request is about: `NFTA_SET_ELEM_LIST_TABLE` and `_SET`, or
/// `NFTA_RULE_TABLE` and `_CHAIN`, which have the same numbers.
fn about(table: &TableId, name: &str) -> Vec<u8> {
    let mut body = vec![TableFamily::number(table.family), 0, 0, 0];
    put_name(&mut body, 1, &table.name);
    put_name(&mut body, 2, name);
    body
}

/// The keys from 0 to below `count`, which rules count in the machine's byte order:
/// `NFTA_SET_ELEM_LIST_ELEMENTS` 3, `NFTA_LIST_ELEM` 1, `NFTA_SET_ELEM_KEY` 1, `NFTA_DATA_VALUE` 1.
fn numbers(count: u32) -> Vec<u8> {
    let element = |number: u32| {
        let value = attribute(1, &number.to_ne_bytes());
        attribute(1 | NESTED, &attribute(1 | NESTED, &value))
    };
    attribute(3 | NESTED, &(0..count).flat_map(element).collect::<Vec<_>>())
}

/// A request: `nlmsghdr` and the rest.
fn request(kind: u8, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 16).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(u16::from_be_bytes([SUBSYSTEM, kind]).to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

fn put_name(body: &mut Vec<u8>, kind: u16, name: &str) {
    body.extend(attribute(kind, &[name.as_bytes(), &[0]].concat()));
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

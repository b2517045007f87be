//! Asks the kernel's IPVS over a generic netlink socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context as _, anyhow};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};

use super::super::Counters;
use super::super::nft::attributes::{Frame, Malformed, frames};
use super::super::nft::socket::{buffer, limit_wait, receive};
use super::messages::{
    CONTROL, Destination, GET_DESTINATION, GET_FAMILY, GET_SERVICE, Service, family_name,
    read_family, request,
};

/// `NLM_F_REQUEST`, and with `NLM_F_DUMP`
const ONE: u16 = 0x1;
const ALL: u16 = 0x301;
/// `NLMSG_ERROR`, `NLMSG_DONE`
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The kernel answers as soon as changes under way are done; this only ends a wait that would never
/// end.
const ANSWER_SECONDS: i64 = 5;

/// One question after the other, and their answers.
pub(super) struct Conversation<'c> {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
    /// The number that the kernel gave the family IPVS.
    family: u16,
    counters: &'c Counters,
}

impl<'c> Conversation<'c> {
    /// Opens the socket in this thread's network namespace. Loads the module if it is not.
    pub(super) fn open(counters: &'c Counters) -> anyhow::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )
        .context("open a generic netlink socket")?;
        limit_wait(&socket, ANSWER_SECONDS)?;
        let family = CONTROL;
        let mut conversation = Self { socket, buffer: buffer(), sequence: 0, family, counters };
        let family = conversation.ask(ONE, GET_FAMILY, &family_name(), read_family)?;
        conversation.family = *family.first().context("the kernel does not tell what IPVS is")?;
        Ok(conversation)
    }

    /// All virtual services.
    pub(super) fn services(&mut self) -> anyhow::Result<Vec<Service>> {
        self.ask(ALL, GET_SERVICE, &[], Service::read)
    }

    /// The destinations of one; none when it is gone.
    pub(super) fn destinations(&mut self, service: &Service) -> anyhow::Result<Vec<Destination>> {
        self.ask(ALL, GET_DESTINATION, &service.named(), |payload| {
            Destination::read(payload, service)
        })
    }

    /// Sends a request and reads the messages of the answer.
    fn ask<T>(
        &mut self,
        flags: u16,
        command: u8,
        attributes: &[u8],
        read: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> anyhow::Result<Vec<T>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(self.family, flags, self.sequence, command, attributes);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())
            .context("ask the kernel for IPVS services")?;
        let mut answer = Vec::new();
        loop {
            let datagram = match receive(&self.socket, &mut self.buffer, MsgFlags::empty()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                datagram => datagram.context("read the kernel's IPVS services")?,
            };
            match take(datagram, self.sequence, &read, &mut answer) {
                Ok(is_over) if is_over || (flags == ONE && !answer.is_empty()) => {
                    return Ok(answer);
                }
                Ok(_) => {}
                Err(fault) => {
                    if fault == Fault::Malformed {
                        self.counters.malformed.increase();
                    }
                    return Err(fault.into());
                }
            }
        }
    }
}

/// Why an answer cannot be used.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// It is not what the kernel writes.
    Malformed,
    /// The kernel says so.
    Refused(Errno),
}

impl From<Malformed> for Fault {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<Fault> for anyhow::Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Malformed => anyhow!(
                "the kernel's IPVS services are not understood: they stay unknown with this kernel"
            ),
            Fault::Refused(Errno::EPERM) => {
                anyhow!("cannot read IPVS services: CAP_NET_ADMIN is missing")
            }
            Fault::Refused(error) => {
                Self::new(error).context("the kernel cannot tell its IPVS services")
            }
        }
    }
}

/// Takes in the messages of a datagram that answer the request of this number; whether they end the
/// answer. One that is not understood fails it all: what is passed over would count as removed.
fn take<T>(
    datagram: &[u8],
    sequence: u32,
    read: impl Fn(&[u8]) -> Result<T, Malformed>,
    answer: &mut Vec<T>,
) -> Result<bool, Fault> {
    for frame in frames(datagram) {
        let frame = frame?;
        if frame.sequence != sequence {
            continue;
        }
        if matches!(frame.kind, ERROR | DONE) {
            return end(&frame).map(|()| true);
        }
        answer.push(read(frame.payload)?);
    }
    Ok(false)
}

/// Both ends of an answer begin with a negative errno, 0 when it is whole.
fn end(frame: &Frame<'_>) -> Result<(), Fault> {
    match i32::from_ne_bytes(*frame.payload.first_chunk().ok_or(Malformed)?) {
        0 => Ok(()),
        code => Err(Fault::Refused(Errno::from_raw(code.wrapping_neg()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: u32 = 7;
    const ITEM: u16 = 35;

    fn frame(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([2, 0]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    fn end_with(kind: u16, code: i32) -> Vec<u8> {
        frame(kind, SEQUENCE, &code.to_ne_bytes())
    }

    /// What is read of one datagram whose items are of four bytes that begin with 1.
    fn taken(frames: &[Vec<u8>]) -> Result<(bool, Vec<u8>), Fault> {
        let read = |payload: &[u8]| match *payload {
            [1, _, _, last] => Ok(last),
            _ => Err(Malformed),
        };
        let mut answer = Vec::new();
        let is_over = take(&frames.concat(), SEQUENCE, read, &mut answer)?;
        Ok((is_over, answer))
    }

    fn item(last: u8) -> Vec<u8> {
        frame(ITEM, SEQUENCE, &[1, 0, 0, last])
    }

    #[test]
    fn an_answer_goes_on_until_it_is_said_to_be_whole() {
        let stale = frame(ITEM, SEQUENCE - 1, &[9; 4]);
        assert_eq!(taken(&[item(1), stale, item(2)]), Ok((false, vec![1, 2])));
        assert_eq!(taken(&[item(3), end_with(DONE, 0)]), Ok((true, vec![3])));
    }

    #[test]
    fn one_entry_that_is_not_understood_fails_the_whole_reading() {
        let strange = frame(ITEM, SEQUENCE, &[2, 0, 0, 1]);
        let short = frame(ITEM, SEQUENCE, &[]);
        for broken in [strange, short] {
            let answer = [item(1), broken, item(2), end_with(DONE, 0)];
            assert_eq!(taken(&answer), Err(Fault::Malformed));
        }
    }

    #[test]
    fn an_answer_cut_within_a_message_fails_and_between_two_is_not_whole() {
        let whole = [item(1), item(2), end_with(DONE, 0)].concat();
        for end in 0..whole.len() {
            let expected = match end {
                0 => Ok((false, vec![])),
                20 => Ok((false, vec![1])),
                40 => Ok((false, vec![1, 2])),
                _ => Err(Fault::Malformed),
            };
            assert_eq!(taken(&[whole[..end].to_vec()]), expected, "{end}");
        }
        assert_eq!(taken(&[frame(DONE, SEQUENCE, &[])]), Err(Fault::Malformed));
    }

    #[test]
    fn an_errno_at_either_end_fails_and_says_what_is_missing() {
        let error = taken(&[item(1), end_with(DONE, -4)]).expect_err("it was interrupted");
        assert_eq!(error, Fault::Refused(Errno::EINTR));
        let error = taken(&[end_with(ERROR, -1)]).expect_err("not permitted");
        let words = anyhow::Error::from(error).to_string();
        assert!(words.contains("CAP_NET_ADMIN is missing"), "{words}");
    }
}

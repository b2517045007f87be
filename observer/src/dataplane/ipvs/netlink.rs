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

    /// Sends a request and reads the messages of the answer; those that cannot be are counted.
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
            for frame in frames(datagram) {
                let Ok(frame) = frame else {
                    self.counters.malformed.increase();
                    break;
                };
                if frame.sequence != self.sequence {
                    continue;
                }
                if matches!(frame.kind, ERROR | DONE) {
                    return fault(&frame).map(|()| answer);
                }
                match read(frame.payload) {
                    Ok(item) => answer.push(item),
                    Err(Malformed) => self.counters.malformed.increase(),
                }
                if flags == ONE {
                    return Ok(answer);
                }
            }
        }
    }
}

/// Both ends of an answer begin with a negative errno, 0 when it is whole.
fn fault(frame: &Frame<'_>) -> anyhow::Result<()> {
    let code = frame.payload.first_chunk().map_or(0, |&code| i32::from_ne_bytes(code));
    match Errno::from_raw(code.wrapping_neg()) {
        _ if code == 0 => Ok(()),
        Errno::EPERM => Err(anyhow!("cannot read IPVS services: CAP_NET_ADMIN is missing")),
        error => Err(error).context("the kernel cannot tell its IPVS services"),
    }
}

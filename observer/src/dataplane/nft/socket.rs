//! The sockets: one that hears every commit of its network namespace, one that asks.
//!
//! A socket belongs to the network namespace it was opened in, whichever thread reads it later.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `NFNLGRP_NFTABLES` 7, as a bit of `nl_groups`.
const COMMITS: u32 = 1 << (7 - 1);
/// More than the kernel puts in one datagram (32 KiB when dumping, `NLMSG_GOODSIZE` otherwise).
const DATAGRAM_BYTES: usize = 64 * 1024;

/// Opens a netlink socket of netfilter in this thread's network namespace.
pub(super) fn open(flags: SockFlag, groups: u32) -> anyhow::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags | SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("open a netfilter netlink socket")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))
        .context("bind the netfilter netlink socket (needs CAP_NET_ADMIN)")?;
    Ok(socket)
}

/// Reads one datagram whole.
pub(super) fn receive<'b>(socket: &OwnedFd, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let length = recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC)?;
    buffer.get(..length).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}

pub(super) fn buffer() -> Vec<u8> {
    vec![0; DATAGRAM_BYTES]
}

/// What reading the subscription gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'b> {
    /// One datagram of messages.
    Datagram(&'b [u8]),
    /// Nothing is waiting.
    Empty,
    /// The kernel dropped messages because the buffer was full, or one did not fit in ours.
    Overrun,
}

/// Hears every commit from the moment it is opened.
#[derive(Debug)]
pub struct Subscription {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl Subscription {
    /// Subscribes, with room for `receive_buffer_bytes` of messages that were not read yet.
    pub fn open(receive_buffer_bytes: usize) -> anyhow::Result<Self> {
        let socket = open(SockFlag::SOCK_NONBLOCK, COMMITS)?;
        setsockopt(&socket, sockopt::RcvBufForce, &receive_buffer_bytes)
            .context("enlarge the netlink receive buffer (needs CAP_NET_ADMIN)")?;
        #[expect(unsafe_code, reason = "tokio has no safe way to watch a descriptor")]
        // SAFETY: an `OwnedFd` is open and stays the same until it is dropped, which the `AsyncFd`
        // that owns it does after it stopped watching.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .context("watch the netlink socket")?;
        Ok(Self { socket, buffer: buffer() })
    }

    /// Sleeps until something may be waiting. Everything waiting must then be read to
    /// [`Received::Empty`].
    pub async fn wait(&self) -> io::Result<()> {
        // Cleared before the reads: what arrives after this sets it again.
        self.socket.readable().await?.clear_ready();
        Ok(())
    }

    /// Takes the next datagram, if one is waiting.
    pub fn receive(&mut self) -> io::Result<Received<'_>> {
        match receive(self.socket.get_ref(), &mut self.buffer) {
            Ok(datagram) => Ok(Received::Datagram(datagram)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Empty),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Ok(Received::Overrun),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                Ok(Received::Overrun)
            }
            Err(error) => Err(error),
        }
    }
}

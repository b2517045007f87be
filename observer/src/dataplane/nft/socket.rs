//! The sockets: one that hears every commit of its network namespace, one that asks.
//!
//! A socket belongs to the network namespace it was opened in, whichever thread reads it later.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use tokio::sync::mpsc;

use crate::clock;
use crate::facts::BootNs;

/// `NFNLGRP_NFTABLES` 7, as a bit of `nl_groups`.
const COMMITS: u32 = 1 << (7 - 1);
/// More than the kernel puts in one datagram (32 KiB when dumping, `NLMSG_GOODSIZE` otherwise).
const DATAGRAM_BYTES: usize = 64 * 1024;
/// How often an idle socket is looked at, so that "nothing was missed until here" stays recent.
const PROOF_SECONDS: i64 = 1;
/// Datagrams that are handed over together, so that a large commit does not wake the model for each.
const TOGETHER: usize = 32;
/// How often so many may wait for the model; the socket's buffer holds the rest.
const HANDOVERS: usize = 32;

/// Opens a netlink socket of netfilter in this thread's network namespace.
pub(super) fn open(groups: u32) -> anyhow::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("open a netfilter netlink socket")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))
        .context("bind the netfilter netlink socket (needs CAP_NET_ADMIN)")?;
    Ok(socket)
}

/// Ends a blocking read after so long with `WouldBlock`.
pub(in super::super) fn limit_wait(socket: &OwnedFd, seconds: i64) -> anyhow::Result<()> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::seconds(seconds))
        .context("limit the wait for netlink messages")
}

/// Reads one datagram whole.
pub(in super::super) fn receive<'b>(
    socket: &OwnedFd,
    buffer: &'b mut [u8],
    flags: MsgFlags,
) -> io::Result<&'b [u8]> {
    let length = recv(socket.as_raw_fd(), buffer, flags | MsgFlags::MSG_TRUNC)?;
    buffer.get(..length).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}

pub(in super::super) fn buffer() -> Vec<u8> {
    vec![0; DATAGRAM_BYTES]
}

/// One datagram, or the news that some were dropped.
#[derive(Debug)]
pub struct Arrival {
    /// Its bytes; `None` when the kernel dropped messages because the buffer was full.
    pub datagram: Option<Vec<u8>>,
    /// Until here nothing was missed: the buffer was last empty then.
    pub complete_until: BootNs,
    /// It arrived at this moment or later.
    pub earliest: BootNs,
    /// When it was read.
    pub read_at: BootNs,
}

/// Hears every commit from the moment it is opened, on a thread of its own: stamps then do not
/// wait for whatever else the observer does, and the thread can tell how long it waited for a
/// processor after the message woke it.
#[derive(Debug)]
pub struct Subscription {
    arrivals: VecDeque<Arrival>,
    more: mpsc::Receiver<io::Result<Vec<Arrival>>>,
}

impl Subscription {
    /// Subscribes, with room for `receive_buffer_bytes` of messages that were not read yet.
    ///
    /// # Errors
    /// Usually that `CAP_NET_ADMIN` is missing.
    pub fn open(receive_buffer_bytes: usize) -> anyhow::Result<Self> {
        let socket = open(COMMITS)?;
        setsockopt(&socket, sockopt::RcvBufForce, &receive_buffer_bytes)
            .context("enlarge the netlink receive buffer (needs CAP_NET_ADMIN)")?;
        limit_wait(&socket, PROOF_SECONDS)?;
        let (sender, more) = mpsc::channel(HANDOVERS);
        thread::Builder::new()
            .name("netfilter".to_owned())
            .spawn(move || listen(&socket, &sender))
            .context("start the thread that reads netfilter messages")?;
        Ok(Self { arrivals: VecDeque::new(), more })
    }

    /// The next arrival.
    ///
    /// # Errors
    /// When the socket cannot be read any more.
    pub async fn next(&mut self) -> io::Result<Arrival> {
        loop {
            if let Some(arrival) = self.arrivals.pop_front() {
                return Ok(arrival);
            }
            let more = self.more.recv().await;
            self.arrivals = more.ok_or(io::ErrorKind::BrokenPipe)??.into();
        }
    }
}

/// Reads until nobody listens (noticed within [`PROOF_SECONDS`]) or the socket fails.
fn listen(socket: &OwnedFd, to: &mpsc::Sender<io::Result<Vec<Arrival>>>) {
    let mut reader = Reader::new(socket);
    let mut arrivals = Vec::new();
    while !to.is_closed() {
        let read = match reader.read(arrivals.is_empty()) {
            Ok(read) => read,
            Err(error) => {
                // What was read before it comes first. Nobody may listen any more.
                to.blocking_send(Ok(arrivals)).ok();
                to.blocking_send(Err(error)).ok();
                return;
            }
        };
        let may_continue = read.as_ref().is_some_and(|arrival| arrival.datagram.is_some());
        arrivals.extend(read);
        let together = arrivals.is_empty() || may_continue && arrivals.len() < TOGETHER;
        if !together && to.blocking_send(Ok(mem::take(&mut arrivals))).is_err() {
            return;
        }
    }
}

/// Reads and stamps datagrams.
struct Reader<'s> {
    socket: &'s OwnedFd,
    buffer: Vec<u8>,
    /// As in [`Arrival`].
    complete_until: BootNs,
    earliest: BootNs,
}

impl<'s> Reader<'s> {
    fn new(socket: &'s OwnedFd) -> Self {
        let now = clock::now();
        Self { socket, buffer: buffer(), complete_until: now, earliest: now }
    }

    /// The next arrival; `None` when nothing waits, with `wait` for [`PROOF_SECONDS`].
    fn read(&mut self, wait: bool) -> io::Result<Option<Arrival>> {
        let mut read_at = None;
        let received = match self.receive(MsgFlags::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.complete_until = clock::now();
                if !wait {
                    return Ok(None);
                }
                let waited_before = waited_for_processor();
                let received = self.receive(MsgFlags::empty());
                // Before the waits are asked for: one between the two then counts too much, which
                // only widens the span, and not too little.
                let now = *read_at.insert(clock::now());
                let late = waited_before
                    .zip(waited_for_processor())
                    .map(|(before, after)| after.saturating_sub(before));
                self.earliest = late.map_or(self.complete_until, |late| now.minus(late));
                received
            }
            received => received,
        };
        let read_at = read_at.unwrap_or_else(clock::now);
        let datagram = match received {
            Ok(datagram) => Some(datagram),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                self.drain()?;
                None
            }
            Err(error) => match error.kind() {
                io::ErrorKind::FileTooLarge => None,
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => return Ok(None),
                _ => return Err(error),
            },
        };
        let (complete_until, earliest) = (self.complete_until, self.earliest);
        Ok(Some(Arrival { datagram, complete_until, earliest, read_at }))
    }

    fn receive(&mut self, flags: MsgFlags) -> io::Result<Vec<u8>> {
        receive(self.socket, &mut self.buffer, flags).map(<[u8]>::to_vec)
    }

    /// Reads and drops what still waits. After an overrun the kernel drops every further message
    /// without a word until the socket is empty, so that a read of all rules begun before would
    /// miss commits; begun afterwards, it shows all that these messages say.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
                Err(error) => match error.kind() {
                    io::ErrorKind::FileTooLarge | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
                Ok(_) => {}
            }
        }
    }
}

/// How long this thread has been ready to run without running, in all (`/proc/…/schedstat`,
/// second field). `None` when the kernel does not account for it: all fields are 0 then, while the
/// third is at least 1 in a thread that runs.
fn waited_for_processor() -> Option<Duration> {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let mut fields = schedstat.split_ascii_whitespace().skip(1);
    let (waited, slices) = (fields.next()?, fields.next()?);
    (slices != "0").then(|| waited.parse().ok().map(Duration::from_nanos))?
}

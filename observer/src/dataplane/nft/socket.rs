//! The sockets: one that hears every commit of its network namespace, one that asks.
//!
//! A socket belongs to the network namespace it was opened in, whichever thread reads it later.

use std::fs;
use std::io;
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
/// Datagrams (mostly under 8 KiB) that may wait for the model; the socket's buffer holds the rest.
const ARRIVALS: usize = 1024;

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
    arrivals: mpsc::Receiver<io::Result<Arrival>>,
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
        let (sender, arrivals) = mpsc::channel(ARRIVALS);
        thread::Builder::new()
            .name("netfilter".to_owned())
            .spawn(move || listen(&socket, &sender))
            .context("start the thread that reads netfilter messages")?;
        Ok(Self { arrivals })
    }

    /// The next arrival.
    ///
    /// # Errors
    /// When the socket cannot be read any more.
    pub async fn next(&mut self) -> io::Result<Arrival> {
        self.arrivals.recv().await.unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

/// Reads until nobody listens (noticed within [`PROOF_SECONDS`]) or the socket fails.
fn listen(socket: &OwnedFd, arrivals: &mpsc::Sender<io::Result<Arrival>>) {
    let mut buffer = buffer();
    let (mut complete_until, mut earliest) = (clock::now(), clock::now());
    while !arrivals.is_closed() {
        let mut woken = None;
        let datagram = match receive(socket, &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                complete_until = clock::now();
                let waited_before = waited_for_processor();
                let datagram = receive(socket, &mut buffer, MsgFlags::empty());
                // Before the waits are asked for: one between the two then counts too much, which
                // only widens the span, and not too little.
                let now = *woken.insert(clock::now());
                let late = waited_before
                    .zip(waited_for_processor())
                    .map(|(before, after)| after.saturating_sub(before));
                earliest = late.map_or(complete_until, |late| now.minus(late));
                datagram
            }
            datagram => datagram,
        };
        let read_at = woken.unwrap_or_else(clock::now);
        let datagram = match datagram {
            Ok(datagram) => Ok(Some(datagram.to_vec())),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                drain(socket, &mut buffer, arrivals).map(|()| None)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::FileTooLarge => Ok(None),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => continue,
                _ => Err(error),
            },
        };
        let failed = datagram.is_err();
        let arrival =
            datagram.map(|datagram| Arrival { datagram, complete_until, earliest, read_at });
        if arrivals.blocking_send(arrival).is_err() || failed {
            return;
        }
    }
}

/// Reads and drops what still waits. After an overrun the kernel drops every further message
/// without a word until the socket is empty, so that a read of all rules begun before would miss
/// commits; begun afterwards, it shows all that these messages say.
fn drain(
    socket: &OwnedFd,
    buffer: &mut [u8],
    arrivals: &mpsc::Sender<io::Result<Arrival>>,
) -> io::Result<()> {
    while !arrivals.is_closed() {
        match receive(socket, buffer, MsgFlags::MSG_DONTWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
            Err(error) => match error.kind() {
                io::ErrorKind::FileTooLarge | io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
            Ok(_) => {}
        }
    }
    Ok(())
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

//! The kernel's own notices of nftables commits in the node's namespace, stamped on arrival: when
//! rules were in force, independent of the agent's code and tighter than the tool's exit.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};

use super::clock;
use super::netns::Namespace;

/// `NFNLGRP_NFTABLES` (7) as a bit of `nl_groups`.
const GROUP: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`
const NEW_GENERATION: u16 = 10 << 8 | 15;
/// `NFTA_GEN_PROC_PID`
const PROCESS_ID: u16 = 2;
/// `struct nlmsghdr`, then `struct nfgenmsg`.
const HEADERS: usize = 16 + 4;
const RECEIVE_BUFFER: usize = 4 << 20;
/// How long a notice may come after the exit of the tool that caused it.
const LATE: u64 = 500_000_000;
const POLL_MS: u16 = 100;

/// The last commit of each process.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    by_pid: Mutex<BTreeMap<u32, u64>>,
    closing: AtomicBool,
}

impl Notices {
    /// Starts listening in `namespace`; commits made after this returns are seen.
    pub(crate) fn listen(namespace: &Namespace) -> Result<Arc<Self>> {
        let notices = Arc::new(Self::default());
        let (ready, opened) = sync_channel(1);
        let listening = Arc::clone(&notices);
        namespace.thread(move || listening.run(&ready));
        opened.recv().context("the thread that listens for commits died")??;
        Ok(notices)
    }

    /// When the last commit of a finished process took effect.
    pub(crate) fn wait_for(&self, pid: u32) -> Result<u64> {
        let until_ns = clock::boot_ns() + LATE;
        loop {
            let seen = self.by_pid.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
            match seen {
                Some(at_ns) => return Ok(at_ns),
                None if clock::boot_ns() > until_ns => {
                    bail!("the kernel gave no notice of a commit by process {pid}")
                }
                None => clock::sleep_until(clock::boot_ns() + 1_000_000),
            }
        }
    }

    /// Ends the listening thread.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    fn run(&self, ready: &SyncSender<Result<()>>) {
        let socket = match open() {
            Ok(socket) => socket,
            Err(error) => {
                ready.send(Err(error)).ok();
                return;
            }
        };
        ready.send(Ok(())).ok();
        let mut buffer = vec![0; 1 << 16];
        while !self.closing.load(Ordering::Relaxed) {
            let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut waiting, PollTimeout::from(POLL_MS)) != Ok(1) {
                continue;
            }
            let at_ns = clock::boot_ns();
            // An overrun loses notices; the commit that misses its own reports it.
            let length = recv(socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::empty());
            let mut seen = self.by_pid.lock().unwrap_or_else(PoisonError::into_inner);
            seen.extend(committers(&buffer[..length.unwrap_or(0)]).map(|pid| (pid, at_ns)));
        }
    }
}

fn open() -> Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("cannot open a netfilter socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))
        .context("cannot join the nftables group")?;
    Ok(socket)
}

/// The process ids of the new-generation messages in a datagram.
fn committers(mut datagram: &[u8]) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let length =
            usize::try_from(u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?)).ok()?;
        let length = length.max(HEADERS);
        let message = datagram.get(..length)?;
        datagram = datagram.get(aligned(length)..).unwrap_or_default();
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        Some(if kind == NEW_GENERATION { process_id(&message[HEADERS..]) } else { None })
    })
    .flatten()
}

fn process_id(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let header = attributes.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        if u16::from_ne_bytes([header[2], header[3]]) == PROCESS_ID {
            return Some(u32::from_be_bytes(attributes.get(4..8)?.try_into().ok()?));
        }
        attributes = attributes.get(aligned(length.max(4))..)?;
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADERS + payload.len()).unwrap_or(0);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADERS, 0);
        bytes.extend(payload);
        bytes
    }

    fn generation(pid: u32) -> Vec<u8> {
        let id = [&8_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &[0; 4]].concat();
        let process = [&8_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &pid.to_be_bytes()].concat();
        message(NEW_GENERATION, &[id, process].concat())
    }

    #[test]
    fn only_new_generations_name_a_committer() {
        let datagram = [message(0x0a06, &[1, 2, 3, 4]), generation(42), generation(7)].concat();
        assert_eq!(committers(&datagram).collect::<Vec<_>>(), [42, 7]);
    }

    #[test]
    fn a_datagram_cut_anywhere_ends_quietly() {
        let datagram = generation(42);
        for length in 0..datagram.len() {
            assert_eq!(committers(&datagram[..length]).count(), 0, "{length}");
        }
        let zero_length = [0; 64];
        assert!(committers(&zero_length).take(10).count() <= 10);
    }
}

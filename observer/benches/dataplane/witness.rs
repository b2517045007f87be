//! A netlink subscriber of the bench's own: when the kernel had delivered a commit.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use observer::clock;
use observer::facts::BootNs;

/// `NFNLGRP_NFTABLES` 7, as a bit of `nl_groups`.
const COMMITS: u32 = 1 << (7 - 1);
/// More than the largest commit here (20,000 rules).
const RECEIVE_BUFFER_BYTES: usize = 256 << 20;
/// `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_NEWGEN`: a commit's last message.
const NEW_GENERATION: [u8; 2] = 0x0a0f_u16.to_ne_bytes();
/// Commits whose moments may wait to be asked for.
const MOMENTS: usize = 1024;

/// Stamps each commit's end as it can be read.
pub(crate) struct Witness {
    moments: Receiver<BootNs>,
}

impl Witness {
    /// Subscribes in this thread's network namespace. It stops at the first commit after it is
    /// dropped, or with the process.
    pub(crate) fn start() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, COMMITS)).context("subscribe to commits")?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
        let (sender, moments) = sync_channel(MOMENTS);
        thread::Builder::new().name("witness".to_owned()).spawn(move || read(&socket, &sender))?;
        Ok(Self { moments })
    }

    /// Forgets the commits until now.
    pub(crate) fn forget(&self) {
        self.moments.try_iter().for_each(drop);
    }

    /// When the one commit since [`Self::forget`] was delivered.
    pub(crate) fn delivered_at(&self) -> Result<BootNs> {
        let at = self
            .moments
            .recv_timeout(Duration::from_secs(10))
            .context("the bench's own subscriber saw no commit")?;
        ensure!(self.moments.try_recv().is_err(), "more than one commit at once");
        Ok(at)
    }
}

fn read(socket: &OwnedFd, moments: &SyncSender<BootNs>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        let at = clock::now();
        let mut rest = &buffer[..length];
        while let Some(message_bytes) = rest.first_chunk().map(|&bytes| u32::from_ne_bytes(bytes)) {
            if rest.get(4..6) == Some(&NEW_GENERATION) && moments.send(at).is_err() {
                return;
            }
            let next = usize::try_from(message_bytes).unwrap_or(usize::MAX).max(16);
            rest = rest.get(next.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

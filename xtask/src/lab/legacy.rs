//! When a legacy iptables table was replaced. The kernel tells nobody, and the tool's exit comes
//! up to tens of ms later on a busy machine; so the table's size is read in a loop meanwhile.
//!
//! A replacement of the same size is not seen: then the tool's exit has to do.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::clock;
use super::netns::Namespace;
use super::network::Family;
use super::proxy::InForce;

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO`
const GET_INFO: libc::c_int = 64;
/// The table that the Services' rules are in.
pub(crate) const TABLE: &[u8] = b"nat";
/// Short against the 10 ms that figures must agree within, long enough to leave the CPU alone.
const PAUSE: Duration = Duration::from_micros(200);

/// `struct ipt_getinfo` and `struct ip6t_getinfo`, which are alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TableInfo {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    entries: u32,
    pub(crate) size_bytes: u32,
}

const _: () = assert!(size_of::<TableInfo>() == 84);

/// A running watch of one family's nat table.
#[derive(Debug)]
pub(crate) struct TableWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Result<Option<InForce>>>>,
}

impl TableWatch {
    /// Starts; the table's present size has been read when this returns.
    pub(crate) fn start(namespace: &Namespace, family: Family) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, begun) = sync_channel(1);
        let stopped = Arc::clone(&stop);
        let thread = namespace.thread(move || watch(family, &ready, &stopped));
        // A thread that fails has nothing to say here; `finish` returns why.
        begun.recv().ok();
        Self { stop, thread }
    }

    /// Stops; returns the last change.
    pub(crate) fn finish(self) -> Result<Option<InForce>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the table's watch panicked"))??
    }
}

fn watch(family: Family, ready: &SyncSender<()>, stop: &AtomicBool) -> Result<Option<InForce>> {
    let socket = open(family)?;
    let mut not_before_ns = clock::boot_ns();
    let mut known = read(&socket, family)?;
    ready.send(()).ok();
    let mut replaced = None;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(PAUSE);
        let asked_ns = clock::boot_ns();
        let info = read(&socket, family)?;
        if info != known {
            replaced = Some(InForce { not_before_ns, at_ns: clock::boot_ns() });
            known = info;
        }
        not_before_ns = asked_ns;
    }
    Ok(replaced)
}

/// A socket that netfilter's options of one family can be read from.
pub(crate) fn open(family: Family) -> Result<OwnedFd> {
    let domain = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(domain, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// The level of netfilter's options.
pub(crate) fn level(family: Family) -> libc::c_int {
    if family == Family::V4 { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

/// Number of entries and size of the table.
#[expect(unsafe_code, reason = "nix has no getsockopt for netfilter's options")]
pub(crate) fn read(socket: &OwnedFd, family: Family) -> Result<TableInfo> {
    let mut info = TableInfo::default();
    info.name[..TABLE.len()].copy_from_slice(TABLE);
    let mut length = libc::socklen_t::try_from(size_of::<TableInfo>())?;
    // SAFETY: `info` is valid for writes of `length` bytes and any bytes are a valid TableInfo;
    // the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level(family),
            GET_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result).context("cannot read the legacy nat table")?;
    Ok(info)
}

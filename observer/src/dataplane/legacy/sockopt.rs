//! The two getsockopt calls that copy a legacy table out of the kernel.
#![expect(unsafe_code, reason = "no safe wrapper exists for these socket options")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::blob::{INFO_BYTES, NAME_BYTES, table_bytes};
use crate::dataplane::rules::Family;

/// `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`; the IPv6 ones have the same numbers.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_get_entries` up to the entries: the name, the size, padding.
const ENTRIES_AT: usize = 40;
const TABLE: &[u8] = b"nat";
/// On `x86_64`, and on `aarch64` with pages of 4 KiB; a multiple of every page size.
const HUGE_PAGE_BYTES: usize = 2 << 20;

pub(super) fn open(family: Family) -> Result<OwnedFd, Errno> {
    let family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
}

/// A table as the kernel copied it.
pub(super) struct Copied {
    /// Its `ipt_getinfo`.
    pub(super) info: Vec<u8>,
    /// Its `ipt_get_entries`.
    answer: Vec<u8>,
}

impl Copied {
    /// Its entries.
    pub(super) fn entries(&self) -> &[u8] {
        &self.answer[ENTRIES_AT..]
    }
}

/// The table as it is now. `WouldBlock` when it changed between the two calls.
pub(super) fn nat_table(socket: &OwnedFd, family: Family) -> io::Result<Copied> {
    let mut info = vec![0; INFO_BYTES];
    info[..TABLE.len()].copy_from_slice(TABLE);
    get(socket, family, GET_INFO, &mut info)?;
    let size = table_bytes(&info).ok_or(io::ErrorKind::InvalidData)?;
    let size_bytes = usize::try_from(size).ok().ok_or(io::ErrorKind::FileTooLarge)?;
    let mut answer = vec![0; ENTRIES_AT + size_bytes];
    prefer_huge_pages(&mut answer);
    answer[..TABLE.len()].copy_from_slice(TABLE);
    answer[NAME_BYTES..NAME_BYTES + 4].copy_from_slice(&size.to_ne_bytes());
    get(socket, family, GET_ENTRIES, &mut answer)?;
    Ok(Copied { info, answer })
}

/// Asks for large pages behind a buffer that is about to be filled: with small ones, their faults
/// are a fifth of what copying 100 MB costs. A kernel that refuses does no harm.
fn prefer_huge_pages(buffer: &mut [u8]) {
    let from = buffer.as_ptr().align_offset(HUGE_PAGE_BYTES);
    let Some(within) = buffer.get_mut(from..) else { return };
    let length = within.len() - within.len() % HUGE_PAGE_BYTES;
    if length > 0 {
        // SAFETY: these whole pages lie within `buffer`, and the advice leaves their contents.
        unsafe { libc::madvise(within.as_mut_ptr().cast(), length, libc::MADV_HUGEPAGE) };
    }
}

fn get(socket: &OwnedFd, family: Family, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let level = match family {
        Family::V4 => libc::SOL_IP,
        Family::V6 => libc::SOL_IPV6,
    };
    let mut length =
        libc::socklen_t::try_from(buffer.len()).ok().ok_or(io::ErrorKind::FileTooLarge)?;
    // SAFETY: `buffer` is writable for `length` bytes, which is all the kernel is told of; it
    // needs no alignment, as the kernel copies byte-wise; both pointers outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    Ok(())
}

//! When a legacy iptables table was replaced. The kernel tells nobody, so the whole table is read
//! in a loop and compared, but for the counters of packets. Its size alone would not do: a pod that
//! replaces another leaves it as it was.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;

use super::netlink::Commit;
use crate::lab::clock;
use crate::lab::legacy::{TABLE, level, open, read};
use crate::lab::netns::Namespace;
use crate::lab::network::Family;

/// `IPT_SO_GET_ENTRIES` and `IP6T_SO_GET_ENTRIES`
const GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_get_entries` before the entries: a name of 32 bytes, the size, 4 bytes of padding.
const SIZE_AT: usize = 32;
const HEADER: usize = 40;
/// Short against the 20 ms that figures must agree within, long enough to leave the CPU alone.
const PAUSE: Duration = Duration::from_millis(2);

/// Calls `tell` with each replacement of a table in `namespace` after this returns, on a thread of
/// its own, until `stop` is set.
pub(super) fn watch(
    namespace: &Namespace,
    stop: impl AsRef<AtomicBool> + Send + 'static,
    mut tell: impl FnMut(Commit) + Send + 'static,
) -> Result<()> {
    let (ready, opened) = sync_channel(1);
    namespace.thread(move || {
        let tables = Family::BOTH.map(Table::open);
        let [Ok(mut v4), Ok(mut v6)] = tables else {
            let failed = tables.into_iter().find_map(Result::err);
            ready.send(failed.map_or(Ok(()), Err)).ok();
            return;
        };
        ready.send(Ok(())).ok();
        while !stop.as_ref().load(Ordering::Relaxed) {
            std::thread::sleep(PAUSE);
            [&mut v4, &mut v6].into_iter().filter_map(Table::look).for_each(&mut tell);
        }
    });
    opened.recv().context("the thread that reads legacy tables died")?
}

/// One family's table as it was read last.
struct Table {
    family: Family,
    socket: OwnedFd,
    asked_ns: u64,
    known: Vec<u8>,
}

impl Table {
    fn open(family: Family) -> Result<Self> {
        let socket = open(family)?;
        let asked_ns = clock::boot_ns();
        let known = entries(&socket, family)?;
        Ok(Self { family, socket, asked_ns, known })
    }

    /// What replaced it since the last look. A read that a replacement disturbs is made again at
    /// the next.
    fn look(&mut self) -> Option<Commit> {
        let asked_ns = clock::boot_ns();
        let now = entries(&self.socket, self.family).ok()?;
        let not_before_ns = std::mem::replace(&mut self.asked_ns, asked_ns);
        if now == self.known {
            return None;
        }
        self.known = now;
        Some(Commit::replacement(self.family, not_before_ns, clock::boot_ns()))
    }
}

/// The table without its counters.
#[expect(unsafe_code, reason = "nix has no getsockopt for netfilter's options")]
fn entries(socket: &OwnedFd, family: Family) -> Result<Vec<u8>> {
    let size_bytes = read(socket, family)?.size_bytes;
    let mut table = vec![0_u8; HEADER + usize::try_from(size_bytes)?];
    table[..TABLE.len()].copy_from_slice(TABLE);
    table[SIZE_AT..SIZE_AT + 4].copy_from_slice(&size_bytes.to_ne_bytes());
    let mut length = libc::socklen_t::try_from(table.len())?;
    // SAFETY: `table` is valid for writes of `length` bytes; the kernel writes at most that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level(family),
            GET_ENTRIES,
            table.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result).context("cannot read the legacy nat table's entries")?;
    let mut entries = table.split_off(HEADER);
    clear_counters(&mut entries, family);
    Ok(entries)
}

/// Sets each entry's counters (`struct xt_counters`) to 0.
fn clear_counters(mut entries: &mut [u8], family: Family) {
    // `struct ipt_entry` and `struct ip6t_entry`: the offset of the next entry, and the counters.
    let (next_at, counters) = match family {
        Family::V4 => (90, 96..112),
        Family::V6 => (142, 152..168),
    };
    while let Some(found) = entries.get_mut(counters.clone()) {
        found.fill(0);
        let next = usize::from(u16::from_ne_bytes([entries[next_at], entries[next_at + 1]]));
        entries = entries.get_mut(next.max(counters.end)..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_counters_of_each_entry_are_cleared() {
        for (family, size, next_at, counters) in
            [(Family::V4, 120, 90, 96..112), (Family::V6, 176, 142, 152..168)]
        {
            let mut entry = vec![7_u8; usize::from(size)];
            entry[next_at..next_at + 2].copy_from_slice(&u16::to_ne_bytes(size));
            let mut table = [entry.clone(), entry.clone()].concat();
            clear_counters(&mut table, family);
            entry[counters].fill(0);
            assert_eq!(table, [entry.clone(), entry].concat());
        }
    }

    #[test]
    fn entries_cut_anywhere_end_quietly() {
        for length in 0..240 {
            clear_counters(&mut vec![0; length], Family::V4);
            clear_counters(&mut vec![0; length], Family::V6);
        }
    }
}

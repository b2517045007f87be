//! iptables-legacy: the nat tables, read whole by getsockopt after each commit.
//!
//! The kernel says nothing of legacy commits over netlink; a kernel program reports them. Reading
//! a table that does not exist would create it, so `/proc/net/ip_tables_names` is looked at first.
//!
//! - `sockopt`: copies the table, which is most of what a reading costs. `blob`: its entries.
//! - `chains`: cuts them into chains. `order`: which are passed when. `evaluate`: passes them.

mod blob;
mod chains;
mod evaluate;
mod order;
mod sockopt;
#[cfg(test)]
mod written;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use anyhow::Context as _;
use nix::errno::Errno;

use super::rules::Family;
pub use blob::Malformed;
pub use evaluate::{Evaluated, evaluate};
use sockopt::Copied;

/// A table may be replaced between asking for its size and reading it; kube-proxy replaces at
/// most a few times per second.
const ATTEMPTS: usize = 10;

/// Whether a legacy nat table is seen in this thread's network namespace. Reads two small files.
#[must_use]
pub fn legacy_tables_in_use() -> bool {
    [Family::V4, Family::V6].into_iter().any(|family| lists_nat(names(family)).unwrap_or(false))
}

/// Where the kernel lists its tables. Not /proc/net: that is the main thread's.
fn names(family: Family) -> &'static str {
    match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    }
}

/// A kernel without legacy tables has no such file.
fn lists_nat(path: &str) -> io::Result<bool> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        names => Ok(names?.lines().any(|name| name == "nat")),
    }
}

/// A legacy nat table as the kernel hands it out: its `ipt_getinfo` and its entries.
///
/// # Errors
/// Those of the socket calls; `WouldBlock` when the table changed in between.
pub(crate) fn raw(family: Family) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let copied = sockopt::nat_table(&sockopt::open(family)?, family)?;
    Ok((copied.info.clone(), copied.entries().to_vec()))
}

/// A legacy nat table as it was at one moment.
#[derive(Debug, Default)]
pub struct Reading {
    /// What it does; nothing when there is none.
    pub evaluated: Evaluated,
    /// Its size in the kernel, in bytes.
    pub size_bytes: usize,
}

/// Reads the legacy nat table of one IP version.
#[derive(Debug)]
pub struct Reader {
    family: Family,
    socket: OwnedFd,
}

impl Reader {
    /// Opens a raw socket in this thread's network namespace; `None` when the kernel lacks this
    /// IP version.
    ///
    /// # Errors
    /// Usually that `CAP_NET_RAW` is missing.
    pub fn open(family: Family) -> anyhow::Result<Option<Self>> {
        match sockopt::open(family) {
            Ok(socket) => Ok(Some(Self { family, socket })),
            Err(Errno::EAFNOSUPPORT) => Ok(None),
            Err(error) => {
                Err(error).context("open a raw socket to read legacy iptables (needs CAP_NET_RAW)")
            }
        }
    }

    /// The table as it is now. Must be called in the network
    /// namespace it was opened in. Blocks for as long as the kernel copies.
    ///
    /// # Errors
    /// When `CAP_NET_ADMIN` is missing, the table cannot be understood, it changes all the time, or
    /// `/proc` cannot be read.
    pub fn read(&self) -> anyhow::Result<Reading> {
        let path = names(self.family);
        if !lists_nat(path).with_context(|| format!("read {path}"))? {
            return Ok(Reading::default());
        }
        for _ in 0..ATTEMPTS {
            match sockopt::nat_table(&self.socket, self.family) {
                Ok(copied) => return self.evaluate(&copied),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    return Err(error).context("read the legacy nat table (needs CAP_NET_ADMIN)");
                }
            }
        }
        anyhow::bail!("the legacy nat table changed {ATTEMPTS} times while it was read")
    }

    fn evaluate(&self, copied: &Copied) -> anyhow::Result<Reading> {
        let evaluated = evaluate(self.family, &copied.info, copied.entries())
            .ok()
            .context("the legacy nat table is not laid out as expected")?;
        Ok(Reading { evaluated, size_bytes: copied.entries().len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_cannot_be_looked_for_is_not_taken_for_none() {
        assert!(!lists_nat("/proc/none").expect("no legacy tables"));
        assert!(lists_nat("/proc").is_err(), "not a file");
    }
}

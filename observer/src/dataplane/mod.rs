//! The node's rules: which backends new connections are sent to, and since when not.
//!
//! Reads `nf_tables` (kube-proxy's nftables mode, iptables-nft) by netlink and iptables-legacy by
//! getsockopt, follows their rules from where new connections enter, and reports the difference
//! after each commit; in place of rules, Cilium's maps. Everything but [`run`] and the readers is
//! pure. Belongs to one network namespace, the node's. Refuses to guess: what could not be seen
//! becomes a [`Blindness`], what could not be told is counted.
//!
//! - [`rules`]: tables, chains, rules and maps, reduced.
//! - [`nft`], [`legacy`]: read them. `xt`: the parts both share. `names`: whose they are.
//! - [`cilium`]: its maps, and what they send connections to.
//! - [`reach`]: follows a table of `nf_tables`. [`backends`]: the whole set and its changes.
//! - [`silent`]: tables that do not announce their changes. `status`: which dataplane serves.

pub mod backends;
pub mod cilium;
mod commits;
pub mod counters;
mod follower;
pub mod ipvs;
pub mod legacy;
pub(crate) mod names;
pub mod nft;
pub mod reach;
pub mod rules;
mod run;
pub mod silent;
mod status;
mod xt;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::facts::{Backend, BackendChange, Blindness, BootNs};

pub use commits::Commit;
pub use counters::{Counter, Counters};
pub use ipvs::ipvs_in_use;
pub use legacy::legacy_tables_in_use;
pub use nft::follow::CommitStamps;
pub use rules::Family;
pub use run::{read, run};
pub use silent::SilentTable;

/// Room for what a full rewrite of 10,000 Services sends (some 60 MB with the kernel's overhead)
/// while the observer is busy. Memory is only used while messages wait.
const RECEIVE_BUFFER_BYTES: usize = 64 << 20;

/// How to follow the rules of this process's network namespace.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes of netlink messages that may wait; the kernel drops and says so beyond.
    pub receive_buffer_bytes: usize,
    /// The only dataplane to follow; `None` for whichever there are.
    pub dataplane: Option<Dataplane>,
    /// Where Cilium's maps are pinned.
    pub cilium_maps: PathBuf,
    /// Tells when commits to `nf_tables` began, on kernels where a hook does.
    pub commit_stamps: Option<StampsOf>,
    /// Where to count.
    pub counters: Arc<Counters>,
}

/// Tells when the kernel began the latest commits to `nf_tables` on behalf of a thread, which is
/// given by its id in the root pid namespace; `None` for one that is not known to have made any.
#[derive(Clone)]
pub struct StampsOf(pub Arc<dyn Fn(u32) -> Option<CommitStamps> + Send + Sync>);

impl fmt::Debug for StampsOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StampsOf")
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            receive_buffer_bytes: RECEIVE_BUFFER_BYTES,
            dataplane: None,
            cilium_maps: cilium::MAPS.into(),
            commit_stamps: None,
            counters: Arc::default(),
        }
    }
}

/// What is known of commits to tables that do not announce them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitSignal {
    /// A kernel hook saw a commit.
    Commit(Commit),
    /// Nothing tells of the commits of this table: look whether there was one.
    Look {
        /// When this was asked for; a reading since then will do.
        at: BootNs,
        /// Which table.
        table: SilentTable,
    },
    /// Commits of this span may not be reported: a hook was not attached yet, or events were lost.
    /// After a hook is attached, `from` is the last moment when it was not needed (or the observer's
    /// start).
    Missed {
        /// The last moment without a loss.
        from: BootNs,
        /// The first moment without a loss again.
        until: BootNs,
    },
}

/// What turns Service addresses into backends; in the order in which a connection meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dataplane {
    /// Cilium in place of kube-proxy.
    Cilium,
    /// kube-proxy in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode over `nf_tables`.
    IptablesNft,
    /// kube-proxy in iptables mode over the legacy tables.
    IptablesLegacy,
    /// kube-proxy in IPVS mode.
    Ipvs,
}

impl Dataplane {
    /// Its name in metrics and output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cilium => "cilium",
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Ipvs => "ipvs",
        }
    }
}

impl fmt::Display for Dataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the rules contain now, for readiness and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Those that have backends or, when none has, whose rules exist; empty when none do.
    pub in_use: BTreeSet<Dataplane>,
    /// The one of them that is kept up to date.
    pub serving: Option<Dataplane>,
    /// How many backends there are.
    pub backends: usize,
    /// Reachable rules whose destination this decoder cannot tell.
    pub unresolved: usize,
    /// The tables whose content is unknown: every termination meanwhile is censored.
    pub unreadable: Vec<Unreadable>,
}

/// A table that cannot be read, and is tried again until it can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Which.
    pub table: SilentTable,
    /// When reading it first failed.
    pub since: Timestamp,
    /// The latest error.
    pub why: String,
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, since, why } = self;
        write!(
            f,
            "the table of {table} cannot be read since {since:.0}, so every termination is \
             censored: {why}; it is tried again until it works; if another dataplane serves \
             Services here, choose that one with --dataplane"
        )
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for unreadable in &self.unreadable {
            write!(f, "{unreadable}; ")?;
        }
        let Some(serving) = self.serving else {
            return f.write_str(
                "no dataplane is found: neither rules of kube-proxy (nftables, iptables, IPVS) nor \
                 maps of Cilium; is hostNetwork set, and the node's /sys/fs/bpf mounted?",
            );
        };
        write!(f, "{serving} serves Services ({} backends)", self.backends)?;
        let others: Vec<&str> = self
            .in_use
            .iter()
            .filter(|other| **other != serving)
            .map(|other| other.name())
            .collect();
        if !others.is_empty() {
            write!(
                f,
                "; {} also has some, left behind perhaps: a backend counts as removed when the \
                 last lets go, choose one with --dataplane",
                others.join(", ")
            )?;
        }
        Ok(())
    }
}

/// What the rules say at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// In all.
    pub status: Status,
    /// Every backend.
    pub backends: BTreeSet<Backend>,
    /// Those that are being drained.
    pub draining: BTreeSet<Backend>,
}

/// What the dataplane reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Sent once, first: every backend there is at this moment. When each was added is unknown.
    Present {
        /// When reading the rules began.
        at: BootNs,
        /// When it ended, if commits were seen in between: they are in what is present, and are not
        /// told. Otherwise as `at`.
        until: BootNs,
        /// Every backend.
        backends: BTreeSet<Backend>,
        /// Those that are being drained.
        draining: BTreeSet<Backend>,
    },
    /// A backend was added or removed. After a loss, its uncertainty reaches back to the last
    /// moment known to be complete.
    Change(BackendChange),
    /// Commits of this span were seen only as their outcome, or an addition and removal in it not
    /// at all.
    Blind(Blindness),
    /// Sent when it differs from the last one sent.
    Status(Status),
}

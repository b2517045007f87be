//! The node's rules: which backends new connections are sent to, and since when not.
//!
//! Reads `nf_tables` (kube-proxy's nftables mode, iptables-nft) by netlink and iptables-legacy by
//! getsockopt, both into the same small rule types, walks those from where new connections enter,
//! and reports the difference after each commit. Everything but [`run`] and the two readers is
//! pure. Belongs to one network namespace, the node's. Refuses to guess: what could not be seen
//! becomes a [`Blindness`], what could not be told is counted.
//!
//! - [`rules`]: tables, chains, rules and maps, reduced.
//! - [`nft`], [`legacy`]: read them. `xt`: the parts both share. `names`: whose they are.
//! - [`reach`]: walks a table. [`backends`]: the whole set and its changes.

pub mod backends;
pub mod counters;
mod follower;
pub mod legacy;
pub(crate) mod names;
pub mod nft;
pub mod reach;
pub mod rules;
mod run;
mod xt;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::facts::{Backend, BackendChange, Blindness, BootNs};

pub use counters::{Counter, Counters};
pub use legacy::legacy_tables_in_use;
pub use rules::Family;
pub use run::run;

/// Room for what a full rewrite of 10,000 Services sends (some 60 MB with the kernel's overhead)
/// while the observer is busy. Memory is only used while messages wait.
const RECEIVE_BUFFER_BYTES: usize = 64 << 20;

/// How to follow the rules of this process's network namespace.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes of netlink messages that may wait; the kernel drops and says so beyond.
    pub receive_buffer_bytes: usize,
    /// Where to count.
    pub counters: Arc<Counters>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { receive_buffer_bytes: RECEIVE_BUFFER_BYTES, counters: Arc::default() }
    }
}

/// What is known of commits to legacy tables in this network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegacySignal {
    /// The kernel program saw a table replaced.
    Commit {
        /// When the setsockopt call returned; the new rules took effect during the call.
        at: BootNs,
        /// Which IP version's.
        family: Family,
    },
    /// Commits of this span may not be reported: the program was not attached yet, or events were
    /// lost. Sent once after the program is attached, with the last moment when
    /// [`legacy_tables_in_use`] was false (or the observer's start) as `from`.
    Missed {
        /// The last moment without a loss.
        from: BootNs,
        /// The first moment without a loss again.
        until: BootNs,
    },
}

/// What turns Service addresses into backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dataplane {
    /// kube-proxy in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode over `nf_tables`.
    IptablesNft,
    /// kube-proxy in iptables mode over the legacy tables.
    IptablesLegacy,
}

impl Dataplane {
    /// Its name in metrics and output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }
}

/// What the rules contain now, for readiness and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Those whose rules exist; empty when kube-proxy has written none.
    pub in_use: BTreeSet<Dataplane>,
    /// How many backends there are.
    pub backends: usize,
    /// Reachable rules whose destination this decoder cannot tell.
    pub unresolved: usize,
}

/// What the dataplane reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Sent once, first: every backend there is at this moment. When each was added is unknown.
    Present {
        /// When reading the rules began.
        at: BootNs,
        /// Every backend.
        backends: Vec<Backend>,
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

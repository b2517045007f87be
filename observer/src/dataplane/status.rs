//! Which dataplanes a node runs, and which of them serves its Services.
//!
//! Pure. Rules of a kube-proxy mode that was switched away may stay behind for as long as the node
//! runs. They still translate connections where they come first, so all are followed, and a backend
//! is removed when the last of them lets go; but only one is kept up to date by anybody, and it is
//! the one whose backends changed last. Until a change is seen it is the one with most backends.

use std::collections::BTreeSet;

use super::backends::{Backends, Origin};
use super::nft::{Ruleset, TableId};
use super::reach::Changes;
use super::silent::KUBE_SERVICES;
use super::{Dataplane, Status};

/// kube-proxy's table in nftables mode, and iptables' own.
const KUBE_PROXY: &str = "kube-proxy";
const NAT: &str = "nat";

/// The dataplane that a table of `nf_tables` is part of, if it is one's.
pub(super) fn dataplane_of(table: &TableId) -> Option<Dataplane> {
    match &*table.name {
        KUBE_PROXY => Some(Dataplane::Nftables),
        NAT => Some(Dataplane::IptablesNft),
        _ => None,
    }
}

/// Remembers what tells the one that serves.
pub(super) struct Detector {
    /// The only one to follow; `None` for all.
    only: Option<Dataplane>,
    changed_last: Option<Dataplane>,
    told: Option<Status>,
}

impl Detector {
    pub(super) fn new(only: Option<Dataplane>) -> Self {
        Self { only, changed_last: None, told: None }
    }

    /// Whether a table of `nf_tables` is to be followed.
    pub(super) fn follows(&self, table: &TableId) -> bool {
        self.only.is_none() || self.only == dataplane_of(table)
    }

    /// A commit changed what some tables reach.
    pub(super) fn note_changes(&mut self, changes: &[(Origin, Changes)]) {
        for (origin, changes) in changes {
            if !changes.backends.is_empty()
                && let Some(dataplane) = origin.dataplane()
            {
                self.changed(dataplane);
            }
        }
    }

    /// The backends of a dataplane changed.
    pub(super) fn changed(&mut self, dataplane: Dataplane) {
        self.changed_last = Some(dataplane);
    }

    /// What is to be told, if it is not what was told last. `silent` are the dataplanes in use
    /// besides those of `rules`.
    pub(super) fn status(
        &mut self,
        rules: &Ruleset,
        silent: impl Iterator<Item = Dataplane>,
        backends: &Backends,
    ) -> Option<Status> {
        let tables = rules.tables().filter(|(id, _)| self.follows(id));
        let netfilter = tables.filter_map(|(id, table)| match dataplane_of(id)? {
            Dataplane::IptablesNft if !table.chains.contains_key(KUBE_SERVICES) => None,
            dataplane => Some(dataplane),
        });
        let mut in_use: BTreeSet<Dataplane> = netfilter.chain(silent).collect();
        // Each mode leaves rules without a backend behind; IPVS needs some of iptables.
        if in_use.iter().any(|dataplane| backends.count_of(*dataplane) > 0) {
            in_use.retain(|dataplane| backends.count_of(*dataplane) > 0);
        }
        let status = Status {
            serving: self.serving(&in_use, backends),
            in_use,
            backends: backends.count(),
            unresolved: backends.unresolved(),
        };
        if self.told.as_ref() == Some(&status) {
            return None;
        }
        self.told = Some(status.clone());
        Some(status)
    }

    fn serving(&self, in_use: &BTreeSet<Dataplane>, backends: &Backends) -> Option<Dataplane> {
        let changed = self.changed_last.filter(|dataplane| in_use.contains(dataplane));
        // Of equals the first: the order is the one in which a connection meets them.
        let largest = in_use.iter().rev().max_by_key(|dataplane| backends.count_of(**dataplane));
        changed.or(largest.copied())
    }
}

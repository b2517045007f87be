//! Which dataplanes a node runs, and which of them serves its Services.
//!
//! Pure. Rules of a kube-proxy mode that was switched away may stay behind for as long as the node
//! runs. They still translate connections where they come first, so all are followed, and a backend
//! is removed when the last of them lets go; but only one is kept up to date by anybody, and it is
//! the one whose backends changed last. Until a change is seen it is the one with most backends.

use std::collections::BTreeSet;

use super::backends::Backends;
use super::nft::{Ruleset, TableId};
use super::silent::KUBE_SERVICES;
use super::{Dataplane, Status, Unreadable};

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

/// Remembers what was told.
pub(super) struct Detector {
    /// The only one to follow; `None` for all.
    only: Option<Dataplane>,
    told: Option<Status>,
}

impl Detector {
    pub(super) fn new(only: Option<Dataplane>) -> Self {
        Self { only, told: None }
    }

    /// Whether a table of `nf_tables` is to be followed.
    pub(super) fn follows(&self, table: &TableId) -> bool {
        self.only.is_none() || self.only == dataplane_of(table)
    }

    /// What is to be told, if it is not what was told last. `silent` are the dataplanes in use
    /// besides those of `rules`.
    pub(super) fn status(
        &mut self,
        rules: &Ruleset,
        silent: impl Iterator<Item = Dataplane>,
        unreadable: Vec<Unreadable>,
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
            serving: serving(&in_use, backends),
            in_use,
            backends: backends.count(),
            unresolved: backends.unresolved(),
            unreadable,
        };
        if self.told.as_ref() == Some(&status) {
            return None;
        }
        self.told = Some(status.clone());
        Some(status)
    }
}

fn serving(in_use: &BTreeSet<Dataplane>, backends: &Backends) -> Option<Dataplane> {
    let changed = backends.changed_last().filter(|dataplane| in_use.contains(dataplane));
    // Of equals the first: the order is the one in which a connection meets them.
    let largest = in_use.iter().rev().max_by_key(|dataplane| backends.count_of(**dataplane));
    changed.or(largest.copied())
}

#[cfg(test)]
mod tests {
    use super::super::backends::Origin;
    use super::super::nft::TableFamily;
    use super::super::reach::Reached;
    use super::super::{Family, SilentTable};
    use super::*;
    use crate::facts::{Backend, Protocol};

    const LEGACY: Origin = Origin::Silent(SilentTable::Legacy(Family::V4));
    const CILIUM: Origin = Origin::Silent(SilentTable::Cilium);

    fn table(name: &str) -> TableId {
        TableId { family: TableFamily::Ip, name: name.into() }
    }

    fn reached(lasts: impl IntoIterator<Item = u8>) -> Reached {
        let backend = |last| Backend {
            service: None,
            protocol: Protocol::Tcp,
            address: [10, 0, 0, last].into(),
            port: 80,
        };
        Reached { backends: lasts.into_iter().map(backend).collect(), ..Reached::default() }
    }

    fn serving(detector: &mut Detector, backends: &Backends) -> Option<Dataplane> {
        let silent = [Dataplane::Cilium, Dataplane::IptablesLegacy];
        detector.status(&Ruleset::default(), silent.into_iter(), Vec::new(), backends)?.serving
    }

    #[test]
    fn the_one_with_most_backends_serves_until_another_changes() {
        let mut detector = Detector::new(None);
        let mut backends = Backends::new(vec![(LEGACY, reached(1..=3)), (CILIUM, reached(1..=2))]);
        assert_eq!(serving(&mut detector, &backends), Some(Dataplane::IptablesLegacy));
        backends.replace(vec![(CILIUM, reached(1..=1)), (LEGACY, reached(1..=3))]);
        assert_eq!(serving(&mut detector, &backends), Some(Dataplane::Cilium));
    }

    #[test]
    fn of_equals_the_one_that_a_connection_meets_first_serves() {
        let mut detector = Detector::new(None);
        let backends = Backends::new(vec![(LEGACY, reached(1..=2)), (CILIUM, reached(1..=2))]);
        assert_eq!(serving(&mut detector, &backends), Some(Dataplane::Cilium));
    }

    #[test]
    fn rules_without_a_backend_are_in_use_only_where_nothing_has_one() {
        let (mut detector, mut backends) = (Detector::new(None), Backends::default());
        assert_eq!(serving(&mut detector, &backends), Some(Dataplane::Cilium), "both are empty");
        backends.replace(vec![(LEGACY, reached(1..=1))]);
        let silent = [Dataplane::Cilium, Dataplane::IptablesLegacy].into_iter();
        let status = detector.status(&Ruleset::default(), silent, Vec::new(), &backends);
        let in_use = status.expect("it changed").in_use;
        assert_eq!(in_use, BTreeSet::from([Dataplane::IptablesLegacy]));
    }

    #[test]
    fn a_table_that_cannot_be_read_is_told_and_that_it_can_again() {
        let (mut detector, backends) = (Detector::new(None), Backends::default());
        let mut status = |unreadable: &[Unreadable]| {
            let silent = [Dataplane::IptablesLegacy].into_iter();
            detector.status(&Ruleset::default(), silent, unreadable.to_vec(), &backends)
        };
        let since = "2026-11-21T01:44:34Z".parse().expect("a time");
        let why = "the layout is not known".to_owned();
        let cilium = [Unreadable { table: SilentTable::Cilium, since, why }];
        assert_eq!(status(&[]).map(|status| status.unreadable.len()), Some(0));
        let told = status(&cilium).expect("it changed").to_string();
        for words in [
            "the table of cilium cannot be read since 2026-11-21T01:44:34Z",
            "the layout is not known",
            "with --dataplane; iptables-legacy serves Services (0 backends)",
        ] {
            assert!(told.contains(words), "{told}");
        }
        assert_eq!(status(&cilium), None);
        assert_eq!(status(&[]).map(|status| status.unreadable), Some(Vec::new()));
    }

    #[test]
    fn one_that_is_chosen_is_followed_alone() {
        let only = Detector::new(Some(Dataplane::IptablesNft));
        assert!(only.follows(&table(NAT)) && !only.follows(&table(KUBE_PROXY)));
        assert!(!Detector::new(Some(Dataplane::Ipvs)).follows(&table(NAT)));
        assert!(Detector::new(None).follows(&table("anything")));
    }
}

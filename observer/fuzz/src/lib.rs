//! What is done with bytes that others wrote: one function per parser, named as its fuzz target and
//! its folder of the corpus.
//!
//! Shared by the fuzz targets and by `observer/tests/corpus`, so that both do the same. Each
//! takes any bytes, and panics only when the parser did or broke a promise.

use std::collections::BTreeSet;

use observer::clock::WallOffset;
use observer::dataplane::cilium::entries::{self, BackendsVersion};
use observer::dataplane::cilium::selection;
use observer::dataplane::nft::Ruleset;
use observer::dataplane::nft::follow::Follow;
use observer::dataplane::rules::{Effect, Element, Name, Table};
use observer::dataplane::{Counters, Family, legacy, reach};
use observer::facts::BootNs;
use observer::fuzzing;
use observer::kernel::btf::Btf;
use observer::kernel::decode::{Undecodable, decode, new_cgroup};
use observer::kernel::layout;
use observer::report::{NodeAnswer, merge, render};

/// Takes any bytes.
pub type Parser = fn(&[u8]);

/// Every parser, by its name.
pub const ALL: [(&str, Parser); 11] = [
    ("agent_answers", agent_answers),
    ("cilium_maps", cilium_maps),
    ("ipvs_answers", ipvs_answers),
    ("kernel_btf", kernel_btf),
    ("kernel_event", kernel_event),
    ("legacy_table", legacy_table),
    ("names", names),
    ("nft_dump", nft_dump),
    ("nft_notifications", nft_notifications),
    ("pods", pods),
    ("slices", slices),
];

/// Twice as deep as the kernel lets rules jump, and half as deep as edits travel.
const DEPTH: usize = 32;
/// `struct ipt_getinfo`
const INFO_BYTES: usize = 84;
/// What an EndpointSlice has at most (`discovery.k8s.io/v1`).
const SLICE_ENDPOINTS: usize = 1_000;
const SLICE_PORTS: usize = 100;
const NOW: BootNs = BootNs(1_000_000_000);

/// Notifications of any number of commits, from a namespace without tables on.
pub fn nft_notifications(bytes: &[u8]) {
    let commits = fuzzing::commits(bytes);
    let before = commits.first().map_or(0, |(number, _)| number.wrapping_sub(1));
    let mut follow = Follow::from_dump(Ruleset::default(), before, before);
    for (_, messages) in commits {
        let taken = follow.take(messages, (NOW, NOW), &Counters::default(), &mut Vec::new());
        if taken.is_err() || !is_as_a_fresh_walk(follow.ruleset()) {
            return;
        }
    }
}

/// The answers to all requests of a dump, one after another.
pub fn nft_dump(bytes: &[u8]) {
    if let Ok(ruleset) = fuzzing::dump(bytes, &Counters::default()) {
        is_as_a_fresh_walk(&ruleset);
    }
}

/// Compares what was followed with the whole tables. Does not when a table loops, which the kernel
/// refuses: a loop keeps itself counted, so nothing can be said from then on.
fn is_as_a_fresh_walk(ruleset: &Ruleset) -> bool {
    if !ruleset.tables().all(|(_, table)| ends(table)) {
        return false;
    }
    for (id, table) in ruleset.tables() {
        assert_eq!(ruleset.reached(id), reach::walk(table), "{id:?}");
    }
    true
}

/// Whether every way through the chains ends within [`DEPTH`] jumps.
fn ends(table: &Table) -> bool {
    let mut chains: BTreeSet<&Name> = table.chains.keys().collect();
    for _ in 0..DEPTH {
        if chains.is_empty() {
            return true;
        }
        chains = chains.into_iter().flat_map(|chain| next(table, chain)).collect();
    }
    false
}

fn next<'t>(table: &'t Table, chain: &Name) -> impl Iterator<Item = &'t Name> {
    let rules = table.chains.get(chain).into_iter().flat_map(|chain| chain.rules.values());
    rules.flat_map(|rule| &rule.effects).flat_map(|effect| {
        let (direct, map) = match effect {
            Effect::Go(chain) => (Some(chain), None),
            Effect::GoByMap(map) => (None, table.maps.get(map)),
            _ => (None, None),
        };
        let elements = map.into_iter().flat_map(|map| map.elements.values());
        direct.into_iter().chain(elements.filter_map(|element| match element {
            Element::Go(chain) => Some(chain),
            _ => None,
        }))
    })
}

/// A legacy table: the IP version (4 or 6), its `ipt_getinfo`, its entries.
pub fn legacy_table(bytes: &[u8]) {
    let Some((version, table)) = bytes.split_first() else { return };
    let family = if *version == 6 { Family::V6 } else { Family::V4 };
    let (info, entries) = table.split_at_checked(INFO_BYTES).unwrap_or((table, &[]));
    if let Ok(evaluated) = legacy::evaluate(family, info, entries) {
        let reached = evaluated.reached;
        assert!(reached.backends.len() + reached.unresolved <= entries.len());
    }
}

/// Cilium's maps: the IP version (4 or 6), that of the backends (2 or 3), how many slots, the
/// slots, the backends; each a key and its value.
pub fn cilium_maps(bytes: &[u8]) {
    let Some(([ip, version, slots], elements)) = bytes.split_first_chunk() else { return };
    let family = if *ip == 6 { Family::V6 } else { Family::V4 };
    let version = if *version == 2 { BackendsVersion::V2 } else { BackendsVersion::V3 };
    let sizes = entries::service_sizes(family);
    let cut = usize::from(*slots) * (sizes.key + sizes.value);
    let (slots, backends) = elements.split_at_checked(cut).unwrap_or((elements, &[]));
    let slots: Vec<_> = slots
        .chunks_exact(sizes.key + sizes.value)
        .filter_map(|slot| entries::slot(family, &slot[..sizes.key], &slot[sizes.key..]))
        .collect();
    let sizes = entries::backend_sizes(family, version);
    let backends: Vec<_> = backends
        .chunks_exact(sizes.key + sizes.value)
        .filter_map(|one| entries::endpoint(family, version, &one[..sizes.key], &one[sizes.key..]))
        .collect();
    let reached = selection::reached(&slots, &backends);
    assert!(reached.backends.len() + reached.draining.len() <= slots.len());
    assert!(reached.backends.is_disjoint(&reached.draining));
    assert!(reached.unresolved <= slots.len() * usize::from(u16::MAX));
}

/// The kernel's answers about IPVS: services, each followed by its destinations.
pub fn ipvs_answers(bytes: &[u8]) {
    let Some(reached) = fuzzing::ipvs_table(bytes).map(|table| table.reached) else { return };
    assert!(reached.backends.is_disjoint(&reached.draining));
    let all = reached.backends.len() + reached.draining.len() + reached.unresolved;
    assert!(all <= bytes.len());
}

/// The kernel's type information.
pub fn kernel_btf(bytes: &[u8]) {
    let Ok(btf) = Btf::parse(bytes.to_vec()) else { return };
    let _resolved = layout::resolve(&btf, 0);
    for tracepoint in ["inet_sock_set_state", "signal_generate"] {
        let arguments = btf.tracepoint_arguments(tracepoint).unwrap_or_default();
        assert!(!btf.tracepoint_argument_is_pointer(tracepoint, arguments));
    }
    assert!(matches!(btf.only_tracepoints().map(Btf::parse), Ok(Ok(_))));
}

/// A record of the ring buffer.
pub fn kernel_event(bytes: &[u8]) {
    if let Some(made) = new_cgroup(bytes) {
        assert!(made.name.len() < bytes.len());
    }
    match decode(bytes, 1) {
        Ok(event) => {
            assert_eq!(event.at.0.to_ne_bytes(), bytes[..8]);
            assert_eq!(event.suppressed.to_ne_bytes(), bytes[80..84]);
            assert_eq!(event.local.port().to_ne_bytes(), bytes[84..86]);
            assert_eq!(event.remote.port().to_ne_bytes(), bytes[86..88]);
        }
        Err(Undecodable::Length(length)) => assert_eq!(length, bytes.len()),
        Err(Undecodable::Signal(signal)) => assert_eq!(signal.to_ne_bytes(), bytes[64..68]),
    }
}

/// A page of a list of pods, or an event of their watch.
pub fn pods(bytes: &[u8]) {
    let _facts = fuzzing::pods(bytes, NOW, WallOffset::fixed(0, BootNs(0)));
}

/// A page of a list of EndpointSlices, or an event of their watch.
pub fn slices(bytes: &[u8]) {
    let facts = fuzzing::slices(bytes, NOW, WallOffset::fixed(0, BootNs(0)));
    for fact in facts {
        if let observer::facts::ClusterFact::Slice(slice) = fact {
            assert!(slice.endpoints.len() <= SLICE_ENDPOINTS);
            assert!(slice.ports.len() <= SLICE_PORTS);
        }
    }
}

/// Agents' answers to the report, one per line.
pub fn agent_answers(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let answer = |line| NodeAnswer {
        url: "http://node".to_owned(),
        answer: fuzzing::answer(line).map_err(|error| format!("{error:#}")),
    };
    let report = merge(&text.lines().map(answer).collect::<Vec<_>>(), 1.0);
    assert!(render(&report).ends_with('\n'));
    assert!(serde_json::to_string(&report).is_ok());
}

/// A chain's name, a rule's comment, or the name of a cgroup's directory.
pub fn names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for service in [fuzzing::of_chain(text).map(|(service, _)| service), fuzzing::of_comment(text)]
    {
        assert!(service.is_none_or(|service| service.0.contains('/')));
    }
    let uid = fuzzing::of_directory(text);
    assert!(uid.is_none_or(|uid| uid.0.len() >= 32 && uid.0.is_ascii()));
}

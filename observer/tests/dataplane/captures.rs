//! Replays what a real kube-proxy did, from its recordings: state by state and commit by commit.
//! The removals and additions must be those that the recording's timeline shows, and no others.

use std::collections::{BTreeMap, BTreeSet};

use observer::clock;
use observer::dataplane::legacy::legacy_tables_in_use;
use observer::dataplane::nft::Subscription;
use observer::dataplane::nft::follow::Follow;
use observer::dataplane::reach::Way;
use observer::dataplane::rules::Table;
use observer::dataplane::{Counters, Family};
use observer::facts::{Backend, BootNs};
use serde_json::Value;

use super::encoding::{Handles, encode};
use super::following::{ROOMY_BYTES, Running, in_runtime};
use super::namespace::{
    STATES, captured, dump, expected, feed, in_namespace, legacy_backends, listed, next, nft,
    reached, shown,
};
use super::timeline::{Timeline, unix_time_of_day_ns};

const API: &[&str] = &["default/kubernetes:https Tcp 10.99.0.1 6443"];
const REAL: &[&str] = &[
    "default/kubernetes:https Tcp 10.99.0.1 6443",
    "default/real:http Tcp 10.244.1.24 8080",
    "default/real:http Tcp 10.244.1.25 8080",
];
/// The Services that each pod of a recording is behind.
const SERVICES: [&str; 3] = ["default/web:http ", "default/np:http ", "default/udp:u "];

/// One folder of the recordings.
#[derive(Clone, Copy)]
struct Recording {
    folder: &'static str,
    /// What never changes.
    constant: &'static [&'static str],
    /// The nat table, in `nft`'s terms.
    table: &'static str,
}

const NFTABLES_1_36: Recording =
    Recording { folder: "nftables-1.36", constant: API, table: "kube-proxy" };
const NFTABLES_1_35: Recording =
    Recording { folder: "nftables-1.35", constant: REAL, table: "kube-proxy" };
const IPTABLES_NFT: Recording = Recording { folder: "iptables-nft", constant: API, table: "nat" };
const IPTABLES_LEGACY: Recording =
    Recording { folder: "iptables-legacy", constant: API, table: "nat" };

impl Recording {
    fn state(self, name: &str) -> String {
        let extension = if self.table == "kube-proxy" { "nft" } else { "txt" };
        captured(&format!("{}/{name}.{extension}", self.folder))
    }

    /// Makes this namespace's rules those of a state.
    fn load(self, state: &str) {
        let rules = self.state(state);
        match self.folder {
            "iptables-nft" => feed(&["iptables-nft-restore"], &rules),
            "iptables-legacy" => feed(&["iptables-legacy-restore"], &rules),
            _ => nft(&format!("flush ruleset\n{rules}")),
        }
    }

    /// What the timeline says each state sends to.
    fn backends(self) -> Vec<BTreeSet<String>> {
        let states = Timeline::of(self.folder).states();
        let of = |pods: &BTreeSet<u8>| {
            expected(&pods.iter().copied().collect::<Vec<_>>(), self.constant)
        };
        states.iter().map(of).collect()
    }
}

/// Loads every state and follows the notifications; the model is that of a fresh dump each time.
fn states_are_followed(recording: Recording) {
    in_namespace(move || {
        let counters = Counters::default();
        let mut subscription = Subscription::open(ROOMY_BYTES).expect("subscribe");
        let mut follow = dump(&counters);
        for (name, backends) in STATES.iter().zip(recording.backends()) {
            for _rewrite in 0..2 {
                recording.load(name);
                let fresh = dump(&counters);
                catch_up(&mut subscription, &mut follow, &counters, fresh.generation());
                assert_eq!(follow.ruleset(), fresh.ruleset(), "{name}");
                assert_eq!(reached(&follow), backends, "{} {name}", recording.folder);
            }
        }
        assert_eq!(counters.malformed.get(), 0);
        assert_eq!(counters.unknown_expressions.get(), 0);
    });
}

/// Follows the notifications up to `generation`.
fn catch_up(
    subscription: &mut Subscription,
    follow: &mut Follow,
    counters: &Counters,
    generation: u32,
) {
    while follow.generation() != generation {
        let arrival = next(subscription);
        let datagram = arrival.datagram.expect("the receive buffer is large enough");
        let stamps = (arrival.earliest, arrival.read_at);
        let taken = follow.take(&datagram, stamps, counters, &mut Vec::new());
        taken.expect("nothing is lost");
    }
}

/// Loads one state after the other while the daemon's follower runs: it reports the differences of
/// the states, and nothing when a state is the same as the one before, or is written again.
fn changes_are_reported(recording: Recording) {
    in_runtime(async move || {
        let legacy = recording.folder == "iptables-legacy";
        let states = recording.backends();
        recording.load(STATES[0]);
        let (mut running, present) = Running::start(ROOMY_BYTES).await;
        assert_eq!(present, states[0]);
        let none = BTreeSet::new();
        for (number, backends) in states.iter().enumerate().skip(1) {
            let before = &states[number - 1];
            for rewrite in [false, true] {
                recording.load(STATES[number]);
                if legacy {
                    running.legacy_committed(clock::now(), Family::V4).await;
                }
                let reported = running.until_backends(backends).await;
                let [removed, added] = [before - backends, backends - before];
                let [removed, added] = if rewrite { [&none, &none] } else { [&removed, &added] };
                let name = format!("{} {}", recording.folder, STATES[number]);
                assert_eq!(reported.removed(), *removed, "{name} {rewrite}");
                assert_eq!(reported.added(), *added, "{name} {rewrite}");
                let changes = reported.removed.len() + reported.added.len();
                assert_eq!(changes, removed.len() + added.len(), "{name}: each once");
            }
        }
        assert_eq!(running.counters.gaps.get() + running.counters.overruns.get(), 0);
    });
}

#[test]
fn nftables_1_36_states_are_followed() {
    states_are_followed(NFTABLES_1_36);
}

#[test]
fn nftables_1_35_states_are_followed() {
    states_are_followed(NFTABLES_1_35);
}

#[test]
fn iptables_nft_states_are_followed() {
    states_are_followed(IPTABLES_NFT);
}

#[test]
fn nftables_1_36_states_give_the_recorded_changes() {
    changes_are_reported(NFTABLES_1_36);
}

#[test]
fn nftables_1_35_states_give_the_recorded_changes() {
    changes_are_reported(NFTABLES_1_35);
}

#[test]
fn iptables_nft_states_give_the_recorded_changes() {
    changes_are_reported(IPTABLES_NFT);
}

#[test]
fn iptables_legacy_states_give_the_recorded_changes() {
    changes_are_reported(IPTABLES_LEGACY);
}

#[test]
fn reading_legacy_rules_does_not_create_their_table() {
    in_namespace(|| {
        assert_eq!(legacy_backends(Family::V4), BTreeSet::new());
        assert!(!legacy_tables_in_use());
        IPTABLES_LEGACY.load(STATES[0]);
        assert!(legacy_tables_in_use());
    });
}

/// Checks commit after commit against the timeline: a Service either stays as it was, or now sends
/// to exactly the pods that its slice lists then.
struct Course {
    recording: Recording,
    timeline: Timeline,
    before: BTreeSet<String>,
    /// The commits that removed something, and what.
    removals: Vec<(String, BTreeSet<String>)>,
}

impl Course {
    fn new(recording: Recording, present: BTreeSet<String>) -> Self {
        let timeline = Timeline::of(recording.folder);
        assert_eq!(present, recording.backends()[0]);
        Self { recording, timeline, before: present, removals: Vec::new() }
    }

    fn commit(&mut self, number: usize, now: BTreeSet<String>) {
        let commit = &self.timeline.commits[number];
        let known = self.timeline.usable_around(commit.at_ns);
        for service in SERVICES {
            let (before, now) = (pods(&self.before, service), pods(&now, service));
            assert!(
                now == before || known.contains(&now),
                "{} {}: {service}{before:?} became {now:?}, listed {known:?}",
                self.recording.folder,
                commit.name
            );
        }
        let of_services = |backend: &&String| SERVICES.iter().any(|name| backend.starts_with(name));
        let others: BTreeSet<&str> =
            now.iter().filter(|backend| !of_services(backend)).map(String::as_str).collect();
        assert_eq!(others, self.recording.constant.iter().copied().collect(), "{}", commit.name);
        if let Some(settled) = self.timeline.settled(number) {
            for service in SERVICES {
                assert_eq!(pods(&now, service), settled, "{service}after {}", commit.name);
            }
        }
        let removed = &self.before - &now;
        if !removed.is_empty() {
            self.removals.push((commit.name.clone(), removed));
        }
        self.before = now;
    }
}

/// The pods that one Service sends to.
fn pods(backends: &BTreeSet<String>, service: &str) -> BTreeSet<u8> {
    let pod = |backend: &str| backend.rsplit(['.', ' ']).nth(1)?.parse().ok();
    let of_service = backends.iter().filter(|backend| backend.starts_with(service));
    of_service.map(|backend| pod(backend).expect("an address and a port")).collect()
}

/// Replays the recorded messages, from the dump of state 0; gives each commit that removed
/// something, and what.
fn messages_are_followed(recording: Recording) -> Vec<(String, BTreeSet<String>)> {
    recording.load(STATES[0]);
    let handles_file = if recording.table == "nat" { "0-handles" } else { "0-before" };
    let handles = captured(&format!("{}/{handles_file}.nft", recording.folder));
    let messages: Vec<Value> = captured(&format!("{}/messages.jsonl", recording.folder))
        .lines()
        .map(|line| serde_json::from_str(line).expect("a message"))
        .collect();
    if recording.table == "nat" {
        feed(&["iptables-nft-restore"], &empty_chains("filter", &messages));
    }

    let counters = Counters::default();
    let mut course = Course::new(recording, reached(&dump(&counters)));
    let first = course.timeline.commits[0].name.parse::<u32>().expect("a generation");
    let fresh = dump(&counters).ruleset().clone();
    let handles = Handles::between(recording.table, &handles, &listed(recording.table), &fresh);
    let mut follow = Follow::from_dump(fresh, first - 1, first - 1);
    let mut now: BTreeSet<Backend> = backends_of(&follow);
    let mut number = 0;
    for datagram in messages.chunk_by(|one, other| one["t"] == other["t"]) {
        let bytes: Vec<u8> =
            datagram.iter().flat_map(|message| encode(message, &handles)).collect();
        let at = BootNs(unix_time_of_day_ns(datagram[0]["t"].as_str().expect("a time")));
        let mut commits = Vec::new();
        follow.take(&bytes, (at, at), &counters, &mut commits).expect("nothing is lost");
        assert!(commits.len() <= 1, "what there is can be compared after each");
        for commit in commits {
            let ended = course.timeline.commits[number].at_ns;
            assert!(commit.heard.at.0 <= ended);
            for (backend, way) in
                commit.tables.into_iter().flat_map(|(_, changes)| changes.backends)
            {
                match way {
                    Way::Added => assert!(now.insert(backend)),
                    Way::Removed => assert!(now.remove(&backend)),
                }
            }
            assert_eq!(now, backends_of(&follow), "what changed adds up to what is there");
            course.commit(number, shown(&now));
            number += 1;
        }
    }
    assert_eq!(number, course.timeline.commits.len(), "every commit of the timeline");
    assert_eq!(counters.malformed.get() + counters.unknown_expressions.get(), 0);
    the_last_state_is_left(recording, &follow);
    course.removals
}

fn backends_of(follow: &Follow) -> BTreeSet<Backend> {
    let ruleset = follow.ruleset();
    ruleset.tables().flat_map(|(id, _)| ruleset.reached(id).backends).collect()
}

/// The chains of a table that the messages speak of, empty.
fn empty_chains(table: &str, messages: &[Value]) -> String {
    let in_table = messages.iter().filter(|message| message["table"] == table);
    let chains: BTreeSet<&str> = in_table.filter_map(|message| message["chain"].as_str()).collect();
    let chains: Vec<String> = chains.iter().map(|chain| format!(":{chain} - [0:0]")).collect();
    format!("*{table}\n{}\nCOMMIT\n", chains.join("\n"))
}

/// No rule, map or element more or less than the recorded last state has.
fn the_last_state_is_left(recording: Recording, follow: &Follow) {
    recording.load(STATES[7]);
    let fresh = dump(&Counters::default());
    assert_eq!(shape(follow, recording.table), shape(&fresh, recording.table));
}

/// How many rules each chain has, and the sizes of the maps.
fn shape(follow: &Follow, table: &str) -> (BTreeMap<String, usize>, Vec<usize>) {
    let (_, Table { chains, maps, .. }) =
        follow.ruleset().tables().find(|(id, _)| &*id.name == table).expect("the table");
    let used = chains.iter().filter(|(_, chain)| !chain.rules.is_empty());
    let rules = used.map(|(name, chain)| (name.to_string(), chain.rules.len())).collect();
    let mut sizes: Vec<usize> = maps.values().map(|map| map.elements.len()).collect();
    sizes.sort_unstable();
    (rules, sizes)
}

#[test]
fn nftables_1_36_messages_give_the_recorded_removals() {
    in_namespace(|| {
        let removals = messages_are_followed(NFTABLES_1_36);
        // The timeline's first commit drops one hairpin connection only, the second the other.
        let of_victim = expected(&[20], &[]);
        let udp = BTreeSet::from(["default/udp:u Udp 10.244.0.20 5353".to_owned()]);
        assert_eq!(removals[0], ("4".to_owned(), udp.clone()));
        assert_eq!(removals[1], ("5".to_owned(), &of_victim - &udp));
    });
}

#[test]
fn nftables_1_35_messages_give_the_recorded_removals() {
    in_namespace(|| {
        let removals = messages_are_followed(NFTABLES_1_35);
        assert_eq!(removals[0].0, "163", "not with 164, which deletes the dead chain");
    });
}

#[test]
fn iptables_nft_messages_give_the_recorded_removals_with_the_second_commit_of_each_sync() {
    in_namespace(|| {
        let removals = messages_are_followed(IPTABLES_NFT);
        for (generation, _) in &removals {
            let generation: u32 = generation.parse().expect("a generation");
            assert_eq!(generation % 2, 0, "the odd ones are the filter table's");
        }
    });
}

#[test]
fn iptables_legacy_restores_give_the_recorded_removals() {
    in_namespace(|| {
        IPTABLES_LEGACY.load(STATES[0]);
        let mut course = Course::new(IPTABLES_LEGACY, legacy_backends(Family::V4));
        for number in 0..course.timeline.commits.len() {
            let name = course.timeline.commits[number].name.clone();
            let input = captured(&format!("iptables-legacy/restore-inputs/{name}"));
            feed(&["iptables-legacy-restore", "--noflush", "--counters"], &input);
            course.commit(number, legacy_backends(Family::V4));
        }
        assert_eq!(course.removals.len(), 3, "{:?}", course.removals);
    });
}

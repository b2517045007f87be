//! Replays what a real kube-proxy wrote, state by state, into a scratch network namespace with
//! the real tools: the backends and their changes must be those of the recording, and no others.

use std::collections::BTreeSet;

use super::namespace::{
    STATES, captured, dump, expected, feed, in_namespace, next, nft, reached, shown,
};
use observer::dataplane::legacy::{Reader, legacy_tables_in_use};
use observer::dataplane::nft::follow::{Follow, Step};
use observer::dataplane::nft::{Subscription, read_datagram};
use observer::dataplane::{Counters, Family, reach};

const API: &str = "default/kubernetes:https Tcp 10.99.0.1 6443";
const REAL: [&str; 3] =
    [API, "default/real:http Tcp 10.244.1.24 8080", "default/real:http Tcp 10.244.1.25 8080"];

/// Which pods are backends in each of the eight states, by last byte of the address.
struct Recording {
    folder: &'static str,
    pods: [[u8; 3]; 3],
    constant: &'static [&'static str],
}

impl Recording {
    fn backends(&self, state: usize) -> BTreeSet<String> {
        let [before, after_one, back] = &self.pods;
        let pods: &[u8] = match state {
            0 => before,
            1..=4 => after_one,
            5 | 6 => &[],
            _ => back,
        };
        expected(pods, self.constant)
    }

    /// Loads every state and follows the notifications; compares with the recording, and with a
    /// fresh dump.
    fn replay(self, load: fn(&str)) {
        in_namespace(move || {
            let counters = Counters::default();
            let mut subscription = Subscription::open(16 << 20).expect("subscribe");
            let mut follow = dump(&counters);
            for (state, name) in STATES.iter().enumerate() {
                let extension = if self.folder.starts_with("nft") { "nft" } else { "txt" };
                let rules = captured(&format!("{}/{name}.{extension}", self.folder));
                for _rewrite in 0..2 {
                    load(&rules);
                    let fresh = dump(&counters);
                    catch_up(&mut subscription, &mut follow, &counters, fresh.generation());
                    assert_eq!(follow.ruleset(), fresh.ruleset(), "{name}");
                    assert_eq!(reached(&follow), self.backends(state), "{} {name}", self.folder);
                }
            }
            assert_eq!(counters.malformed.get(), 0);
            assert_eq!(counters.unknown_expressions.get(), 0);
        });
    }
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
        for message in read_datagram(&datagram, counters) {
            assert_ne!(follow.step(message, arrival.earliest, arrival.read_at), Step::Lost);
        }
    }
}

#[test]
fn nftables_1_36_states_have_the_recorded_backends() {
    let pods = [[18, 19, 20], [18, 19, 21], [22, 23, 24]];
    Recording { folder: "nftables-1.36", pods, constant: &[API] }
        .replay(|rules| nft(&format!("flush ruleset\n{rules}")));
}

#[test]
fn nftables_1_35_states_have_the_recorded_backends() {
    let pods = [[35, 36, 37], [36, 37, 38], [39, 40, 41]];
    Recording { folder: "nftables-1.35", pods, constant: &REAL }
        .replay(|rules| nft(&format!("flush ruleset\n{rules}")));
}

#[test]
fn iptables_nft_states_have_the_recorded_backends() {
    let pods = [[22, 23, 24], [22, 23, 25], [26, 27, 28]];
    Recording { folder: "iptables-nft", pods, constant: &[API] }
        .replay(|rules| feed(&["iptables-nft-restore"], rules));
}

#[test]
fn iptables_legacy_states_have_the_recorded_backends() {
    in_namespace(|| {
        let pods = [[26, 27, 28], [26, 28, 29], [30, 31, 32]];
        let recording = Recording { folder: "iptables-legacy", pods, constant: &[API] };
        let reader = Reader::open(Family::V4).expect("open").expect("IPv4");
        let read = || {
            let reached = reach::walk(&reader.read().expect("read the legacy nat table").table);
            assert_eq!(reached.unresolved, 0);
            shown(&reached.backends)
        };
        assert_eq!(read(), BTreeSet::new());
        assert!(!legacy_tables_in_use(), "reading does not create the table");
        for (state, name) in STATES.iter().enumerate() {
            let rules = captured(&format!("iptables-legacy/{name}.txt"));
            feed(&["iptables-legacy-restore"], &rules);
            assert!(legacy_tables_in_use());
            assert_eq!(read(), recording.backends(state), "{name}");
        }
    });
}

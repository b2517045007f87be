//! Readings of all rules while they change: each is whole once the commits meanwhile were heard.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use observer::dataplane::nft::Subscription;
use observer::dataplane::nft::follow::Follow;
use observer::dataplane::{Counters, Family};
use observer::facts::{BootNs, Protocol};

use super::kube_proxy::{Form, Node, Service};
use super::namespace::{dump, in_namespace, next};

/// Enough for a reading to take longer than a commit.
const SERVICES: u8 = 200;
/// Readings that commits fell into.
const READINGS: usize = 10;

fn node(form: Form) -> (Node, Vec<&'static str>) {
    let mut node = Node::start(form, Family::V4);
    let names: Vec<&'static str> =
        (0..SERVICES).map(|number| &*format!("service-{number}").leak()).collect();
    for (number, name) in (1..).zip(&names) {
        node.set(Service::new(name, Protocol::Tcp, number, &[2, 3]));
    }
    node.sync(&names);
    (node, names)
}

/// Services lose all their backends and get others, one after the other, without a pause.
fn change(node: &mut Node, names: &[&'static str], enough: &AtomicBool) {
    let choices: [&[u8]; 3] = [&[], &[3, 4, 5], &[2, 3]];
    for (number, ready) in choices.iter().cycle().enumerate() {
        let at = number * 7 % names.len();
        let service = u8::try_from(at + 1).expect("few Services");
        node.set(Service::new(names[at], Protocol::Tcp, service, ready));
        node.sync(&[names[at]]);
        if enough.load(Ordering::Relaxed) {
            return;
        }
    }
}

fn readings_amid_commits_are_made_whole(form: Form) {
    in_namespace(move || {
        let (mut node, names) = node(form);
        let mut subscription = Subscription::open(64 << 20).expect("subscribe");
        let enough = AtomicBool::new(false);
        let mut readings: Vec<Follow> = Vec::new();
        thread::scope(|threads| {
            threads.spawn(|| change(&mut node, &names, &enough));
            while readings.len() < READINGS {
                readings.push(dump(&Counters::default()));
                readings.retain(|reading| !reading.is_whole());
            }
            enough.store(true, Ordering::Relaxed);
        });
        let last = dump(&Counters::default());
        assert!(last.is_whole(), "nothing changes any more");
        let counters = Counters::default();
        while readings[0].generation() != last.generation() {
            let datagram = next(&mut subscription).datagram.expect("the buffer is large enough");
            for reading in &mut readings {
                let stamps = (BootNs(0), BootNs(0));
                reading.take(&datagram, stamps, &counters, &mut Vec::new()).expect("no loss");
            }
        }
        for reading in &readings {
            assert!(reading.is_whole());
            assert_eq!(reading.ruleset(), last.ruleset());
        }
    });
}

#[test]
fn readings_amid_nftables_commits_are_made_whole() {
    readings_amid_commits_are_made_whole(Form::Nftables136);
}

#[test]
fn readings_amid_iptables_nft_commits_are_made_whole() {
    readings_amid_commits_are_made_whole(Form::IptablesNft);
}

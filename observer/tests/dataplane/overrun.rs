//! An overrun of the subscription: what the kernel drops without a word is older than the news.

use observer::dataplane::Counters;
use observer::dataplane::nft::Subscription;
use observer::fuzzing;

use super::namespace::{dump, in_namespace, next, nft};

/// Holds more datagrams than may wait for the model (1,024), so that the reading thread stands
/// still while the socket is full.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// Rules of one commit, some 200 bytes each in datagrams of 4 KiB: more than both hold.
const RULES: usize = 70_000;

#[test]
fn a_commit_after_the_news_of_an_overrun_is_not_dropped() {
    in_namespace(|| {
        nft("add table ip t; add chain ip t c");
        let mut subscription = Subscription::open(RECEIVE_BUFFER_BYTES).expect("subscribe");
        let comment = "x".repeat(100);
        nft(&format!("add rule ip t c counter comment \"{comment}\"\n").repeat(RULES));
        // Usually after more than 1,024, the thread standing still; fewer when it got no processor.
        while next(&mut subscription).datagram.is_some() {}

        nft("add table ip late");
        let generation = dump(&Counters::default()).generation();
        loop {
            let datagram = next(&mut subscription).datagram.expect("no second overrun");
            if fuzzing::commits(&datagram).iter().any(|(number, _)| *number == generation) {
                return;
            }
        }
    });
}

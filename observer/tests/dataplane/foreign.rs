//! Rules of others and bytes of nobody: passed over, never a backend, never a panic.

use std::collections::BTreeSet;

use observer::dataplane::Counters;
use observer::dataplane::nft::{Message, Subscription, read_datagram};

use super::namespace::{captured, dump, in_namespace, next, nft, reached};

const FOREIGN: &str = "
table ip foreign {
    set seen { type ipv4_addr; flags dynamic, timeout; timeout 60s; }
    map ports { type inet_service : ipv4_addr; flags interval; elements = { 1-9 : 10.9.9.9 } }
    counter hits { }
    chain transit {
        type filter hook forward priority 0;
        ct state established,related accept
        ip saddr @seen counter log prefix \"x\" limit rate 1/second drop
        tcp flags syn / syn,ack tcp option maxseg size set rt mtu
        update @seen { ip saddr timeout 10s } counter name hits
        jhash ip saddr mod 2 vmap { 0 : accept, 1 : drop }
    }
    chain entry {
        type nat hook prerouting priority 0;
        fib daddr type local ip protocol tcp redirect to :9
        ip saddr 10.0.0.1 meta mark set ct mark
        meta l4proto tcp dnat to 10.9.9.1-10.9.9.5:80
        tcp dport 81 dnat to tcp dport map @ports
    }
    chain unreachable {
        meta l4proto tcp dnat to 10.9.9.2:80
    }
    chain source {
        type nat hook postrouting priority 100;
        meta l4proto tcp snat to 10.9.9.3:80
        masquerade
    }
}
table arp other {
    chain c { type filter hook input priority 0; arp operation request drop; }
}
table netdev third {
    chain c { }
}
";

#[test]
fn foreign_rules_are_read_without_error_and_are_no_backends() {
    in_namespace(|| {
        nft(FOREIGN);
        let counters = Counters::default();
        let follow = dump(&counters);
        assert_eq!(reached(&follow), BTreeSet::new());
        let unresolved: usize =
            follow.ruleset().tables().map(|(id, _)| follow.ruleset().reached(id).unresolved).sum();
        assert_eq!(unresolved, 2, "a range, and a map without a port");
        assert_eq!((counters.malformed.get(), counters.unknown_expressions.get()), (0, 0));
    });
}

#[test]
fn truncated_and_altered_notifications_never_panic() {
    in_namespace(|| {
        let mut subscription = Subscription::open(16 << 20).expect("subscribe");
        nft(&captured("nftables-1.36/0-before.nft"));
        let counters = Counters::default();
        let mut datagrams = Vec::new();
        let mut messages = Vec::new();
        while !matches!(messages.last(), Some(Message::Generation { .. })) {
            let datagram = next(&mut subscription).datagram.expect("nothing is lost");
            messages.extend(read_datagram(&datagram, &counters));
            datagrams.push(datagram);
        }
        for datagram in &datagrams {
            for length in 0..datagram.len() {
                read_datagram(&datagram[..length], &counters);
            }
            for at in 0..datagram.len() {
                let mut altered = datagram.clone();
                altered[at] ^= 0xff;
                read_datagram(&altered, &counters);
            }
        }
        assert!(counters.malformed.get() > 0);
    });
}

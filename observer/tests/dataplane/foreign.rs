//! Rules of others and bytes of nobody: passed over, never a backend, never a panic.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use observer::dataplane::Counters;
use observer::dataplane::nft::Subscription;
use observer::dataplane::nft::follow::Follow;
use observer::facts::BootNs;
use observer::fuzzing;

use super::namespace::{captured, dump, expected, feed, in_namespace, next, nft, reached};

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
        while datagrams.last().is_none_or(|last: &Vec<u8>| fuzzing::commits(last).is_empty()) {
            datagrams.push(next(&mut subscription).datagram.expect("nothing is lost"));
        }
        let end = commit_end(1);
        for datagram in &datagrams {
            for length in 0..datagram.len() {
                take_all(&[&datagram[..length], &end], &counters);
            }
            for at in 0..datagram.len() {
                let mut altered = datagram.clone();
                altered[at] ^= 0xff;
                take_all(&[&altered, &end], &counters);
            }
        }
        assert!(counters.malformed.get() > 0);
    });
}

/// `NFT_MSG_NEWGEN` with `NFTA_GEN_ID`.
fn commit_end(number: u32) -> Vec<u8> {
    let header: [&[u8]; 4] = [&28_u32.to_ne_bytes(), &0x0a0f_u16.to_ne_bytes(), &[0; 10], &[0; 4]];
    let id: [&[u8]; 3] = [&8_u16.to_ne_bytes(), &1_u16.to_ne_bytes(), &number.to_be_bytes()];
    [header.concat(), id.concat()].concat()
}

/// From a namespace without tables on, until something is lost.
fn take_all(datagrams: &[&[u8]], counters: &Counters) {
    let mut follow = Follow::default();
    for datagram in datagrams {
        let taken = follow.take(datagram, (BootNs(0), BootNs(0)), counters, &mut Vec::new());
        if taken.is_err() {
            return;
        }
    }
}

/// Two tables with 5,000 rules each that have nothing to do with Services.
fn many() -> String {
    let mut text = String::new();
    for family in ["ip", "inet"] {
        writeln!(text, "table {family} many {{ chain c {{ type filter hook input priority 0;")
            .expect("text");
        for number in 0..5000 {
            let (high, low) = (number / 250, number % 250);
            writeln!(text, "ip saddr 10.9.{high}.{low} tcp dport {number} counter accept")
                .expect("text");
        }
        text.push_str("}\n}\n");
    }
    text
}

/// What `iptables` writes into a table of its own: matches and targets that no Service uses.
const IPTABLES: &str = "*mangle
-A PREROUTING -p tcp -m multiport --dports 1,2,3 -m mark --mark 1 -j MARK --set-mark 2
-A FORWARD -m conntrack --ctstate INVALID -m limit --limit 1/sec -j DROP
-A POSTROUTING -m comment --comment \"default/web:http\" -j ACCEPT
COMMIT
";

/// The same bytes with other names of the same length.
fn renamed(datagram: &[u8], names: [(&[u8], &[u8]); 2]) -> Vec<u8> {
    let mut bytes = datagram.to_vec();
    for (from, to) in names {
        for at in 0..bytes.len().saturating_sub(from.len()) {
            if bytes[at..].starts_with(from) {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
        }
    }
    bytes
}

#[test]
fn among_ten_thousand_foreign_rules_kube_proxys_backends_are_right() {
    in_namespace(|| {
        let counters = Counters::default();
        let mut subscription = Subscription::open(64 << 20).expect("subscribe");
        let start = || dump(&Counters::default());
        let (mut plain, mut unknown) = (start(), start());
        nft(FOREIGN);
        nft(&many());
        nft(&captured("nftables-1.36/0-before.nft"));
        feed(&["iptables-nft-restore"], IPTABLES);
        let fresh = dump(&counters);
        let backends = expected(&[18, 19, 20], &["default/kubernetes:https Tcp 10.99.0.1 6443"]);
        assert_eq!(reached(&fresh), backends);
        // The decoder knows every expression that these tools write, so some get other names: of a
        // foreign rule, and of those in which kube-proxy chooses a backend.
        let names = [(&b"hash\0"[..], &b"hush\0"[..]), (b"numgen\0", b"numgon\0")];
        let strange = Counters::default();
        while plain.generation() != fresh.generation() {
            let datagram = next(&mut subscription).datagram.expect("nothing is lost");
            follow(&mut plain, &datagram, &counters);
            follow(&mut unknown, &renamed(&datagram, names), &strange);
        }
        assert_eq!(plain.ruleset(), fresh.ruleset());
        assert_eq!((counters.malformed.get(), counters.unknown_expressions.get()), (0, 0));
        assert_eq!(unknown.ruleset(), fresh.ruleset());
        assert_eq!(strange.malformed.get(), 0);
        assert_eq!(strange.unknown_expressions.get(), 1 + 5, "jhash, and each rule that sends");
    });
}

fn follow(follow: &mut Follow, datagram: &[u8], counters: &Counters) {
    let taken = follow.take(datagram, (BootNs(0), BootNs(0)), counters, &mut Vec::new());
    taken.expect("nothing is lost");
}

//! IPv6, in every front end, and the protocols.

use std::collections::BTreeSet;

use observer::dataplane::legacy::Reader;
use observer::dataplane::{Counters, Family};

use super::namespace::{dump, feed, in_namespace, nft, reached, shown};

fn web() -> BTreeSet<String> {
    ["default/web:http Tcp fd00::12 8080", "default/web:http Tcp fd00::13 8080"]
        .map(str::to_owned)
        .into()
}

/// The nat table as kube-proxy writes it for one Service with two IPv6 endpoints.
const IP6TABLES: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
:KUBE-SEP-DEAD - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d fd01::1/128 -p tcp -m comment --comment \"default/web:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A -m comment --comment \"default/web:http -> [fd00::12]:8080\" -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
-A KUBE-SVC-A -m comment --comment \"default/web:http -> [fd00::13]:8080\" -j KUBE-SEP-B
-A KUBE-SEP-A -p tcp -m comment --comment \"default/web:http\" -m tcp -j DNAT --to-destination [fd00::12]:8080
-A KUBE-SEP-B -p tcp -m comment --comment \"default/web:http\" -m tcp -j DNAT --to-destination [fd00::13]:8080
-A KUBE-SEP-DEAD -p tcp -m comment --comment \"default/web:http\" -m tcp -j DNAT --to-destination [fd00::14]:8080
COMMIT
";

/// As above, without the comments that kube-proxy leaves out past 1,000 endpoints.
fn without_endpoint_comments() -> String {
    let strip = |line: &str| {
        let large = line.starts_with("-A KUBE-SVC") || line.starts_with("-A KUBE-SEP");
        let (Some(from), true) = (line.find(" -m comment"), large) else { return line.to_owned() };
        let quoted = line[from..].match_indices('"').nth(1).expect("a quoted comment").0;
        format!("{}{}", &line[..from], &line[from + quoted + 1..])
    };
    IP6TABLES.lines().map(|line| strip(line) + "\n").collect()
}

#[test]
fn ip6tables_nft_backends_are_read() {
    in_namespace(|| {
        for rules in [IP6TABLES, &without_endpoint_comments()] {
            feed(&["ip6tables-nft-restore"], rules);
            assert_eq!(reached(&dump(&Counters::default())), web());
        }
    });
}

#[test]
fn ip6tables_legacy_backends_are_read() {
    in_namespace(|| {
        let reader = Reader::open(Family::V6).expect("open").expect("IPv6");
        for rules in [IP6TABLES, &without_endpoint_comments()] {
            feed(&["ip6tables-legacy-restore"], rules);
            let reading = reader.read().expect("read the legacy nat table");
            assert_eq!(shown(&reading.evaluated.reached.backends), web());
        }
        let v4 = Reader::open(Family::V4).expect("open").expect("IPv4");
        assert_eq!(v4.read().expect("no IPv4 table").size_bytes, 0);
    });
}

#[test]
fn legacy_rules_of_every_form_are_passed() {
    in_namespace(|| {
        let rules = "*nat\n:COUNTED - [0:0]\n:ELSEWHERE - [0:0]\n\
            -A OUTPUT -m comment --comment \"no target\"\n\
            -A OUTPUT -p tcp -g COUNTED\n\
            -A OUTPUT -j RETURN\n\
            -A COUNTED -d 198.51.100.1\n\
            -A COUNTED -p tcp -d 198.51.100.1 -j DNAT --to-destination 10.0.0.1:80\n\
            -A COUNTED -p tcp -d 198.51.100.2 -j DNAT --to-destination 10.0.0.2-10.0.0.9\n\
            -A ELSEWHERE -p tcp -j DNAT --to-destination 10.0.0.3:80\n\
            COMMIT\n";
        feed(&["iptables-legacy-restore"], rules);
        let reader = Reader::open(Family::V4).expect("open").expect("IPv4");
        let reached = reader.read().expect("read the legacy nat table").evaluated.reached;
        assert_eq!(shown(&reached.backends), BTreeSet::from(["- Tcp 10.0.0.1 80".to_owned()]));
        assert_eq!(reached.unresolved, 1, "a range of addresses");
    });
}

#[test]
fn nftables_in_ip6_and_inet_tables_are_read() {
    in_namespace(|| {
        for (family, to) in [("ip6", "dnat to"), ("ip6", "dnat ip6 to"), ("inet", "dnat ip6 to")] {
            nft(&format!(
                "flush ruleset
                table {family} kube-proxy {{
                    map services {{
                        type ipv6_addr . inet_proto . inet_service : verdict
                    }}
                    chain nat-output {{
                        type nat hook output priority -100;
                        ip6 daddr . meta l4proto . th dport vmap @services
                    }}
                    chain service-AAAAAAAA-default/web/tcp/http {{
                        meta l4proto tcp {to} numgen random mod 2 map {{
                            0 : fd00::12 . 8080, 1 : fd00::13 . 8080 }}
                    }}
                }}
                add element {family} kube-proxy services {{
                    fd01::1 . tcp . 80 : goto service-AAAAAAAA-default/web/tcp/http }}"
            ));
            assert_eq!(reached(&dump(&Counters::default())), web(), "{family} {to}");
        }
    });
}

#[test]
fn protocols_are_told_apart_and_so_are_services_without_a_port_name() {
    in_namespace(|| {
        let chain = |protocol: &str| {
            format!(
                "chain service-AAAAAAAA-ns/dns/{protocol}/ {{
                    meta l4proto {protocol} dnat ip to numgen random mod 1 map {{ 0 : 10.0.0.1 . 53 }}
                }}\n"
            )
        };
        let chains: String = ["tcp", "udp", "sctp"].map(chain).concat();
        let go = ["tcp", "udp", "sctp"]
            .map(|protocol| format!("{protocol} : goto service-AAAAAAAA-ns/dns/{protocol}/"))
            .join(", ");
        nft(&format!(
            "table ip kube-proxy {{ {chains}
                chain nat {{
                    type nat hook prerouting priority 0;
                    meta l4proto vmap {{ {go} }}
                }}
            }}"
        ));
        let dns = ["Tcp", "Udp", "Sctp"].map(|protocol| format!("ns/dns {protocol} 10.0.0.1 53"));
        assert_eq!(reached(&dump(&Counters::default())), dns.into());
    });
}

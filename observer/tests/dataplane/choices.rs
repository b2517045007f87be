//! Maps that rules choose from by a number, whose elements are asked for by key, and maps that look
//! like these but are not.

use std::collections::BTreeSet;

use observer::dataplane::Counters;

use super::namespace::{dump, in_namespace, nft, reached};

/// `key : address . port` for each, in the braces of a map.
fn elements(keys: impl Iterator<Item = String>) -> String {
    let elements = (1..).zip(keys).map(|(pod, key)| format!("{key} : 10.0.0.{pod} . 8080"));
    elements.collect::<Vec<_>>().join(", ")
}

fn backends(count: u8) -> BTreeSet<String> {
    (1..=count).map(|pod| format!("- Tcp 10.0.0.{pod} 8080")).collect()
}

/// A dump's backends after these rules in a nat chain.
fn read(chains: &str, rule: &str) -> BTreeSet<String> {
    nft(&format!(
        "table ip kube-proxy {{
            {chains}
            chain nat {{ type nat hook prerouting priority dstnat; meta l4proto tcp {rule}; }}
        }}"
    ));
    let counters = Counters::default();
    let found = reached(&dump(&counters));
    assert_eq!((counters.malformed.get(), counters.unknown_expressions.get()), (0, 0));
    found
}

#[test]
fn every_destination_that_a_number_chooses_is_read_however_many() {
    for count in [1_u8, 2, 16, 17, 200] {
        in_namespace(move || {
            let choices = elements((0..count).map(|number| number.to_string()));
            let rule = format!("dnat ip to numgen random mod {count} map {{ {choices} }}");
            assert_eq!(read("", &rule), backends(count), "{count}");
        });
    }
}

#[test]
fn every_chain_that_a_number_chooses_is_read() {
    in_namespace(|| {
        let chains = "chain one { meta l4proto tcp dnat to 10.0.0.1:8080; }
            chain other { meta l4proto tcp dnat to 10.0.0.2:8080; }";
        let rule = "numgen random mod 2 vmap { 0 : goto one, 1 : goto other }";
        assert_eq!(read(chains, rule), backends(2));
    });
}

#[test]
fn a_map_with_other_keys_is_read_all_the_same() {
    in_namespace(|| {
        let sources =
            elements(["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(str::to_owned).into_iter());
        assert_eq!(read("", &format!("dnat ip to ip saddr map {{ {sources} }}")), backends(3));
    });
    in_namespace(|| {
        let some = elements(["0", "2", "7"].map(str::to_owned).into_iter());
        assert_eq!(
            read("", &format!("dnat ip to numgen random mod 8 map {{ {some} }}")),
            backends(3)
        );
    });
    in_namespace(|| {
        let ranges = elements(["192.0.2.0/25", "198.51.100.0/24"].map(str::to_owned).into_iter());
        assert_eq!(read("", &format!("dnat ip to ip saddr map {{ {ranges} }}")), backends(2));
    });
}

//! Which backends a table sends new connections to.
//!
//! Pure: a walk from the chains that new connections enter, along jumps, gotos and verdict maps.
//! A chain that merely exists is not reached. Each chain is walked once, labelled by the first
//! way in (chains of kube-proxy belong to one Service): a loop or a hostile table costs no more
//! than its size. This is a full walk; it is where an incremental one would go.

use std::collections::{BTreeSet, HashSet};

use super::names;
use super::rules::{Chain, Effect, Element, Name, PortSource, Rule, Table};
use crate::facts::{Backend, Protocol, ServicePort};

/// What a table sends new connections to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The backends.
    pub backends: BTreeSet<Backend>,
    /// Reachable destination NAT whose target could not be told, or whose protocol is unknown.
    pub unresolved: usize,
}

/// What is known of the connections that enter a chain.
#[derive(Clone, Default)]
struct Label {
    service: Option<ServicePort>,
    protocol: Option<Protocol>,
}

impl Label {
    /// A chain's own name says more than the way in.
    fn in_chain(self, chain: &str) -> Self {
        match names::of_chain(chain) {
            Some((service, protocol)) => Self { service: Some(service), protocol: Some(protocol) },
            None => self,
        }
    }

    fn in_rule(&self, rule: &Rule) -> Self {
        Self {
            service: rule.service.clone().or_else(|| self.service.clone()),
            protocol: rule.protocol.or(self.protocol),
        }
    }
}

/// What `table` sends new connections to.
#[must_use]
pub fn walk(table: &Table) -> Reached {
    let mut reached = Reached::default();
    if table.dormant {
        return reached;
    }
    let mut entries: Vec<&Name> =
        table.chains.iter().filter(|(_, chain)| chain.entry).map(|(name, _)| name).collect();
    entries.sort_unstable();
    let mut seen: HashSet<&Name> = entries.iter().copied().collect();
    let mut ahead: Vec<(&Name, Label)> =
        entries.into_iter().map(|name| (name, Label::default())).collect();
    while let Some((name, label)) = ahead.pop() {
        let Some(chain) = table.chains.get(name) else { continue };
        let label = label.in_chain(name);
        let mut go = |target, label: Label| {
            if seen.insert(target) {
                ahead.push((target, label));
            }
        };
        walk_chain(table, chain, &label, &mut reached, &mut go);
    }
    reached
}

fn walk_chain<'t>(
    table: &'t Table,
    chain: &'t Chain,
    label: &Label,
    reached: &mut Reached,
    go: &mut impl FnMut(&'t Name, Label),
) {
    for rule in chain.rules.values() {
        let label = label.in_rule(rule);
        for effect in &rule.effects {
            match effect {
                Effect::Go(target) => go(target, label.clone()),
                Effect::GoByMap(map) => {
                    for element in table.maps.get(map).iter().flat_map(|map| map.elements.values())
                    {
                        if let Element::Go(target) = element {
                            go(target, label.clone());
                        }
                    }
                }
                Effect::Send(address, port) => reached.add(&label, Some((*address, *port))),
                Effect::SendByMap { map, family, address_at, port } => {
                    for element in table.maps.get(map).iter().flat_map(|map| map.elements.values())
                    {
                        let Element::Data(data) = element else { continue };
                        let address = data.get(*address_at..).and_then(|at| family.address(at));
                        let port = match port {
                            PortSource::Fixed(port) => Some(*port),
                            PortSource::AtByte(at) => data
                                .get(*at..)
                                .and_then(|at| at.first_chunk())
                                .map(|&port| u16::from_be_bytes(port)),
                        };
                        reached.add(&label, address.zip(port));
                    }
                }
                Effect::SendUnknown => reached.unresolved += 1,
            }
        }
    }
}

impl Reached {
    fn add(&mut self, label: &Label, target: Option<(std::net::IpAddr, u16)>) {
        if let (Some((address, port)), Some(protocol)) = (target, label.protocol) {
            let service = label.service.clone();
            self.backends.insert(Backend { service, protocol, address, port });
        } else {
            self.unresolved += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::super::rules::{Family, Map};
    use super::*;

    fn rule(effects: Vec<Effect>) -> Rule {
        Rule { effects, ..Rule::default() }
    }

    fn chain(entry: bool, rules: Vec<Rule>) -> Chain {
        Chain { entry, rules: (1..).zip(rules).collect() }
    }

    fn table(chains: Vec<(&str, Chain)>) -> Table {
        let chains = chains.into_iter().map(|(name, chain)| (name.into(), chain)).collect();
        Table { chains, ..Table::default() }
    }

    fn shown(reached: &Reached) -> Vec<String> {
        let show = |backend: &Backend| {
            let service = backend.service.as_ref().map_or("-", |service| &service.0);
            format!("{service} {:?} {} {}", backend.protocol, backend.address, backend.port)
        };
        reached.backends.iter().map(show).collect()
    }

    const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    #[test]
    fn a_chain_that_exists_but_is_not_reached_is_no_backend() {
        let endpoint = || chain(false, vec![rule(vec![Effect::Send(POD, 80)])]);
        let name = "endpoint-AAAAAAAA-ns/web/tcp/http__10.0.0.1/80";
        assert_eq!(
            shown(&walk(&table(vec![("nat", chain(true, vec![])), (name, endpoint())]))),
            Vec::<String>::new()
        );
        let jump = chain(true, vec![rule(vec![Effect::Go(name.into())])]);
        assert_eq!(
            shown(&walk(&table(vec![("nat", jump), (name, endpoint())]))),
            ["ns/web:http Tcp 10.0.0.1 80"]
        );
    }

    #[test]
    fn loops_and_missing_chains_and_maps_end() {
        let back = chain(
            true,
            vec![
                rule(vec![Effect::Go("loop".into()), Effect::GoByMap("gone".into())]),
                rule(vec![Effect::Go("missing".into())]),
            ],
        );
        let again = chain(false, vec![rule(vec![Effect::Go("loop".into())])]);
        assert_eq!(walk(&table(vec![("nat", back), ("loop", again)])), Reached::default());
    }

    #[test]
    fn the_label_comes_from_the_way_in_when_the_endpoints_rule_has_no_comment() {
        let services = Rule {
            protocol: Some(Protocol::Udp),
            service: names::of_comment("ns/dns:u cluster IP"),
            effects: vec![Effect::Go("KUBE-SVC-X".into())],
        };
        let table = table(vec![
            ("PREROUTING", chain(true, vec![services])),
            ("KUBE-SVC-X", chain(false, vec![rule(vec![Effect::Go("KUBE-SEP-X".into())])])),
            ("KUBE-SEP-X", chain(false, vec![rule(vec![Effect::Send(POD, 53)])])),
        ]);
        assert_eq!(shown(&walk(&table)), ["ns/dns:u Udp 10.0.0.1 53"]);
    }

    #[test]
    fn what_cannot_be_told_is_counted_not_guessed() {
        let mut table = table(vec![(
            "nat",
            chain(
                true,
                vec![
                    rule(vec![Effect::Send(POD, 80)]),
                    rule(vec![Effect::SendUnknown]),
                    Rule {
                        protocol: Some(Protocol::Tcp),
                        service: None,
                        effects: vec![Effect::SendByMap {
                            map: "m".into(),
                            family: Family::V4,
                            address_at: 0,
                            port: PortSource::AtByte(4),
                        }],
                    },
                ],
            ),
        )]);
        let data = |bytes: &[u8]| Element::Data(bytes.into());
        let elements = [
            (Box::from([0]), data(&[10, 0, 0, 9, 0x1f, 0x90, 0, 0])),
            (Box::from([1]), data(&[10, 0, 0])),
            (Box::from([2]), data(&[10, 0, 0, 9])),
        ];
        table.maps.insert("m".into(), Map { handle: 1, elements: elements.into() });
        let reached = walk(&table);
        assert_eq!(shown(&reached), ["- Tcp 10.0.0.9 8080"]);
        assert_eq!(reached.unresolved, 4, "no protocol, unknown target, two short elements");
    }

    #[test]
    fn a_dormant_table_reaches_nothing() {
        let mut table = table(vec![(
            "nat",
            chain(
                true,
                vec![Rule {
                    protocol: Some(Protocol::Tcp),
                    service: None,
                    effects: vec![Effect::Send(POD, 80)],
                }],
            ),
        )]);
        assert_eq!(walk(&table).backends.len(), 1);
        table.dormant = true;
        assert_eq!(walk(&table), Reached::default());
    }
}

//! Where a legacy table sends new connections to, read off its entries in place.
//!
//! Pure. Only chains that lead to a destination matter, and each is passed once, after all that
//! lead to it: the Service port and protocol of what passes it are its own name's, else the best of
//! its ways in, exactly as [`reach`](crate::dataplane::reach) has it for tables that change edit by
//! edit.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::blob::{Entries, Malformed, Said, hooks};
use super::chains::{Chains, Named, To, index};
use super::order::Order;
use crate::dataplane::reach::Reached;
use crate::dataplane::rules::Family;
use crate::facts::{Backend, Protocol, ServiceName, ServicePort};

/// What a table does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evaluated {
    /// What it sends new connections to.
    pub reached: Reached,
    /// Whether kube-proxy's chains are in it.
    pub is_kube_proxys: bool,
}

/// Evaluates a table: `info` is its `ipt_getinfo`, `entries` its entries.
///
/// # Errors
/// When the bytes are not laid out as the kernel does, or chains loop, which it refuses.
pub fn evaluate(family: Family, info: &[u8], entries: &[u8]) -> Result<Evaluated, Malformed> {
    let entries = Entries::new(family, entries);
    let chains = Chains::cut(entries, hooks(info).ok_or(Malformed)?)?;
    let order = Order::of(&chains).ok_or(Malformed)?;
    let reached = Found::in_order(&chains, &order).reached();
    Ok(Evaluated { reached, is_kube_proxys: chains.are_kube_proxys })
}

impl<'d> Said<'d> {
    /// Sorts what says most first.
    fn rank(self) -> impl Ord {
        (self.service.is_none(), self.protocol.is_none(), self.service, self.protocol)
    }

    /// Of what passes a chain: its own name says more than the ways in.
    fn in_chain(self, named: Option<&'d Named>) -> Self {
        let named = named.map(|(service, protocol)| (Some(&*service.0), Some(*protocol)));
        named.map_or(self, |(service, protocol)| Self { service, protocol })
    }

    /// Of what an entry is for: its own matches say more than the chain.
    fn in_entry(self, entry: Self) -> Self {
        Self { service: entry.service.or(self.service), protocol: entry.protocol.or(self.protocol) }
    }
}

/// Protocol, address and port of a destination.
type Destination = (Protocol, IpAddr, u16);

/// What is found on the way.
#[derive(Default)]
struct Found<'d> {
    destinations: Vec<(Option<&'d str>, Destination)>,
    unresolved: usize,
}

impl<'d> Found<'d> {
    /// Passes every chain that matters.
    fn in_order(chains: &'d Chains<'d>, order: &Order) -> Self {
        let mut found = Self::default();
        let mut best_ways_in: Vec<Option<Said>> = vec![None; chains.count()];
        for chain in chains.entered {
            best_ways_in[index(chain)] = Some(Said::default());
        }
        for chain in order.before_those_they_lead_to() {
            let said = best_ways_in[index(chain)].unwrap_or_default();
            let said = said.in_chain(chains.named(chain));
            for step in chains.steps(chain) {
                let said = said.in_entry(step.said);
                match step.to {
                    To::Chain(to) if order.leads_to_destination(to) => {
                        let best = &mut best_ways_in[index(to)];
                        if best.is_none_or(|best| said.rank() < best.rank()) {
                            *best = Some(said);
                        }
                    }
                    To::Chain(_) => {}
                    To::Destination(to) => found.send(said, to),
                }
            }
        }
        found
    }

    /// Takes in destination NAT.
    fn send(&mut self, Said { service, protocol }: Said<'d>, to: Option<(IpAddr, u16)>) {
        match (to, protocol) {
            (Some((address, port)), Some(protocol)) => {
                self.destinations.push((service, (protocol, address, port)));
            }
            _ => self.unresolved += 1,
        }
    }

    /// As backends; those of one Service share its name.
    fn reached(self) -> Reached {
        let mut by_service: BTreeMap<Option<&str>, Vec<Destination>> = BTreeMap::new();
        for run in self.destinations.chunk_by(|one, next| one.0 == next.0) {
            let destinations = by_service.entry(run[0].0).or_default();
            destinations.extend(run.iter().map(|(_, destination)| destination));
        }
        let of_service = |(service, mut destinations): (Option<&str>, Vec<Destination>)| {
            let service = service.map(|service| ServiceName::Port(ServicePort(service.into())));
            destinations.sort_unstable();
            destinations.into_iter().map(move |(protocol, address, port)| Backend {
                service: service.clone(),
                protocol,
                address,
                port,
            })
        };
        let backends = by_service.into_iter().flat_map(of_service).collect();
        Reached { backends, unresolved: self.unresolved, ..Reached::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;
    use proptest::sample::select;

    use super::super::written::{Does, Place, Row, Rows, entry, table, verdict};
    use super::*;
    use crate::dataplane::reach;
    use crate::dataplane::rules::{Chain, Effect, Rule, Table};

    const BUILT_IN: [&str; 3] = ["PREROUTING", "INPUT", "OUTPUT"];
    const POD: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 0, 1), 80);

    fn named(name: &str, rows: Vec<Row>) -> Rows {
        (name.to_owned(), rows)
    }

    fn jump(chain: &str) -> Row {
        Row::of(Does::Jump(chain.to_owned()))
    }

    /// PREROUTING has these rules; then come these chains.
    fn with(rows: Vec<Row>, others: Vec<Rows>) -> (Vec<u8>, Vec<u8>) {
        let mut chains = vec![named("PREROUTING", rows)];
        chains.extend(["INPUT", "OUTPUT"].map(|name| named(name, vec![])));
        chains.extend(others);
        table(&chains)
    }

    fn evaluated((info, entries): &(Vec<u8>, Vec<u8>)) -> Result<Evaluated, Malformed> {
        evaluate(Family::V4, info, entries)
    }

    fn send_tcp() -> Row {
        let comment = Some("ns/web:http".to_owned());
        let protocol = Some((Protocol::Tcp, Place::Header));
        Row { protocol, comment, does: Does::Send([POD; 2]) }
    }

    #[test]
    fn a_jump_by_offset_leads_to_the_chains_destination() {
        let written = with(
            vec![jump("KUBE-SERVICES")],
            vec![
                named("KUBE-SEP-X", vec![send_tcp()]),
                named("KUBE-SERVICES", vec![jump("KUBE-SEP-X")]),
            ],
        );
        let Evaluated { reached, is_kube_proxys } = evaluated(&written).expect("a table");
        let [backend] = &reached.backends.iter().collect::<Vec<_>>()[..] else {
            panic!("one backend: {reached:?}")
        };
        assert_eq!((backend.address, backend.port), (POD.0.into(), POD.1));
        let service = backend.service.as_ref().map(ServiceName::to_string);
        assert_eq!(service.as_deref(), Some("ns/web:http"));
        assert!(is_kube_proxys);
    }

    #[test]
    fn a_chain_that_nothing_leads_to_is_not_reached() {
        let written = with(vec![], vec![named("KUBE-SEP-X", vec![send_tcp()])]);
        assert_eq!(evaluated(&written), Ok(Evaluated::default()));
    }

    #[test]
    fn rules_of_a_chain_that_new_connections_do_not_enter_are_not_reached() {
        let chains = BUILT_IN
            .map(|name| named(name, if name == "INPUT" { vec![send_tcp()] } else { vec![] }));
        assert_eq!(evaluated(&table(&chains)), Ok(Evaluated::default()));
    }

    #[test]
    fn backends_of_one_service_share_its_name() {
        let other = Row { does: Does::Send([(POD.0, 81); 2]), ..send_tcp() };
        let reached = evaluated(&with(vec![send_tcp(), other], vec![])).expect("a table").reached;
        let names: Vec<_> = reached.backends.iter().flat_map(|backend| &backend.service).collect();
        let [ServiceName::Port(one), ServiceName::Port(another)] = names[..] else {
            panic!("two backends: {reached:?}")
        };
        assert!(std::sync::Arc::ptr_eq(&one.0, &another.0));
    }

    #[test]
    fn loops_and_jumps_into_the_midst_of_a_chain_are_malformed() {
        let itself = with(vec![jump("A")], vec![named("A", vec![jump("A"), send_tcp()])]);
        assert_eq!(evaluated(&itself), Err(Malformed));
        let around = vec![named("A", vec![jump("B")]), named("B", vec![jump("A")])];
        assert_eq!(evaluated(&with(vec![jump("A")], around.clone())), Err(Malformed));
        assert!(evaluated(&with(vec![], around)).is_ok(), "a loop that nothing leads to");
        for offset in [1, 8, 1_000_000] {
            let written = with(vec![Row::of(Does::JumpTo(offset))], vec![]);
            assert_eq!(evaluated(&written), Err(Malformed), "{offset}");
        }
    }

    #[test]
    fn a_rule_without_a_target_goes_on_to_the_next() {
        let next = entry(0, &[], &verdict(0)).len();
        let written = with(vec![Row::of(Does::JumpTo(next)), send_tcp()], vec![]);
        assert_eq!(evaluated(&written).expect("a table").reached.backends.len(), 1);
    }

    #[test]
    fn a_way_as_long_as_the_table_is_followed_to_its_end() {
        let name = |number: usize| format!("C{number}");
        let mut chains: Vec<_> =
            (0..5_000).map(|number| named(&name(number), vec![jump(&name(number + 1))])).collect();
        chains.push(named(&name(5_000), vec![send_tcp()]));
        let reached = evaluated(&with(vec![jump(&name(0))], chains)).expect("a table").reached;
        assert_eq!(reached.backends.len(), 1);
    }

    #[test]
    fn a_cut_table_is_malformed_and_an_altered_one_never_panics() {
        let (info, entries) = with(vec![jump("A")], vec![named("A", vec![send_tcp()])]);
        let whole = |length: &usize| evaluate(Family::V4, &info, &entries[..*length]).is_ok();
        let whole = (0..entries.len()).filter(whole).count();
        assert_eq!(whole, 3, "only a cut between entries, after all chains began, leaves a table");
        assert_eq!(evaluate(Family::V4, &info[..60], &entries), Err(Malformed));
        for at in 0..entries.len() {
            let mut altered = entries.clone();
            altered[at] ^= 0xff;
            if let Ok(evaluated) = evaluate(Family::V4, &info, &altered) {
                assert!(evaluated.reached.backends.len() <= 1, "{at}");
            }
        }
    }

    /// The same rules as the types that every dataplane's rules can be told in.
    fn as_rules(chains: &[Rows]) -> Table {
        let rule = |row: &Row| Rule {
            protocol: row.protocol.map(|(protocol, _)| protocol),
            service: row.comment.as_deref().and_then(crate::dataplane::names::of_comment),
            effects: match &row.does {
                Does::Jump(chain) => vec![Effect::Go(chain.as_str().into())],
                Does::Send([(address, port), last]) if (*address, *port) == *last => {
                    vec![Effect::Send((*address).into(), *port)]
                }
                Does::Send(_) => vec![Effect::SendUnknown],
                Does::JumpTo(_) | Does::Accept => vec![],
            },
        };
        let chain = |(name, rows): &Rows| {
            let entry = ["PREROUTING", "OUTPUT"].contains(&name.as_str());
            (
                name.as_str().into(),
                Chain { entry, rules: (0..).zip(rows.iter().map(rule)).collect() },
            )
        };
        Table { chains: chains.iter().map(chain).collect(), ..Table::default() }
    }

    /// Chains lead to later ones of these only.
    const NAMES: [&str; 8] = [
        "KUBE-SERVICES",
        "KUBE-SVC-A",
        "service-AB-ns/own/udp/p",
        "KUBE-SVC-B",
        "endpoint-CD-ns/own/sctp/q",
        "KUBE-SEP-A",
        "KUBE-SEP-B",
        "KUBE-MARK-MASQ",
    ];

    fn any_row(later: &'static [&'static str]) -> impl Strategy<Value = Row> {
        let port = prop_oneof![Just((POD.0, 81)), Just(POD)];
        let send = (port.clone(), port, any::<bool>());
        let send = send
            .prop_map(|(first, last, range)| Does::Send([first, if range { last } else { first }]));
        let jump = if later.is_empty() {
            Just(Does::Accept).boxed()
        } else {
            select(later).prop_map(|chain| Does::Jump(chain.to_owned())).boxed()
        };
        let protocols = vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let places = vec![Place::Header, Place::Match];
        let comments = vec!["ns/a:http cluster IP", "ns/b:http -> 10.0.0.1:80", "ns/c", "words"];
        (
            proptest::option::of((select(protocols), select(places))),
            proptest::option::of(select(comments).prop_map(str::to_owned)),
            prop_oneof![3 => jump, 2 => send, 1 => Just(Does::Accept)],
        )
            .prop_map(|(protocol, comment, does)| Row { protocol, comment, does })
    }

    /// Chains that do not loop; those that are not built in lie in any order.
    fn any_chains() -> impl Strategy<Value = Vec<Rows>> {
        let rows = |later| proptest::collection::vec(any_row(later), 0..5);
        let built_in = BUILT_IN.map(|name| rows(&NAMES).prop_map(move |rows| named(name, rows)));
        let others: Vec<_> = (1..=NAMES.len())
            .map(|next| rows(&NAMES[next..]).prop_map(move |rows| named(NAMES[next - 1], rows)))
            .collect();
        (built_in, others.prop_shuffle())
            .prop_map(|(built_in, others)| built_in.into_iter().chain(others).collect())
    }

    proptest! {
        #[test]
        fn any_table_sends_where_the_same_rules_do(chains in any_chains()) {
            let evaluated = evaluated(&table(&chains)).expect("a table");
            prop_assert_eq!(evaluated.reached, reach::walk(&as_rules(&chains)));
        }

        #[test]
        fn any_bytes_are_read_to_an_end(
            info in proptest::collection::vec(any::<u8>(), 0..100),
            entries in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            for family in [Family::V4, Family::V6] {
                if let Ok(evaluated) = evaluate(family, &info, &entries) {
                    prop_assert!(evaluated.reached.backends.len() <= entries.len());
                }
            }
        }
    }
}

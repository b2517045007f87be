//! Which backends a table sends new connections to, kept up to date edit by edit.
//!
//! Pure. The table is a graph: chains lead to chains and maps, maps to chains or backends. A part
//! of it counts while some way leads to it from the chains that new connections enter; a chain that
//! merely exists does not. Every way in is counted, so an edit costs what it changes and not what
//! the table holds. (A loop would keep itself counted; the kernel refuses rules that loop.)
//!
//! A part's label, the Service port and protocol of what passes, is its own name's, else the best
//! of its ways in, so it does not depend on the order of edits.

use std::cmp::Ordering;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::mem;
use std::net::IpAddr;

use foldhash::HashMap;

use super::names;
use super::rules::{Effect, Element, Family, Name, PortSource, Rule, Table};
use crate::facts::{Backend, Protocol, ServiceName, ServicePort};

/// Edits travel at most this far: the kernel allows 16 nested jumps, each perhaps by a map. Beyond
/// that, rules are looping and what they reach is left as it is.
const MAX_ROUNDS: usize = 64;

/// What a table sends new connections to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The backends.
    pub backends: BTreeSet<Backend>,
    /// Destinations that are sent nothing new any more, but kept for the connections they have.
    pub draining: BTreeSet<Backend>,
    /// Reachable destination NAT whose target could not be told, or whose protocol is unknown.
    pub unresolved: usize,
}

/// What a commit changed of what one table reaches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Backends that came or went.
    pub backends: Vec<(Backend, Way)>,
    /// Reachable destination NAT that cannot be told, now.
    pub unresolved: usize,
}

/// One edit of a table, with what it added or removed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Edit {
    /// New connections enter this chain, or no longer do.
    Entry(Name),
    /// A rule of this chain.
    Rule(Name, Rule),
    /// An element of this map.
    Element(Name, Element),
}

/// Whether an edit added or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It is there now.
    Added,
    /// It no longer is.
    Removed,
}

/// Edits of one table, as a net count: of a rule or element that is deleted and added again with
/// the same content, as whole syncs of kube-proxy in iptables mode do by the thousands, nothing is
/// left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits(HashMap<Edit, isize>);

impl Edits {
    /// Notes one more.
    pub fn note(&mut self, edit: Edit, way: Way) {
        match self.0.entry(edit) {
            Entry::Occupied(mut times) => {
                *times.get_mut() += way.sign();
                if *times.get() == 0 {
                    times.remove();
                }
            }
            Entry::Vacant(times) => {
                times.insert(way.sign());
            }
        }
    }

    /// Whether they change nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Way {
    fn sign(self) -> isize {
        match self {
            Self::Added => 1,
            Self::Removed => -1,
        }
    }
}

/// What is known of the connections that enter a part. Sorted, the one that says most is first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Label {
    service: Option<ServicePort>,
    protocol: Option<Protocol>,
}

impl Ord for Label {
    fn cmp(&self, other: &Self) -> Ordering {
        let lacks = |label: &Self| (label.service.is_none(), label.protocol.is_none());
        let names = |one: &Self, other: &Self| {
            one.service.cmp(&other.service).then_with(|| one.protocol.cmp(&other.protocol))
        };
        lacks(self).cmp(&lacks(other)).then_with(|| names(self, other))
    }
}

impl PartialOrd for Label {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Label {
    fn in_rule(&self, rule: &Rule) -> Self {
        Self {
            service: rule.service.clone().or_else(|| self.service.clone()),
            protocol: rule.protocol.or(self.protocol),
        }
    }
}

/// How a rule reads a map's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    family: Family,
    address_at: u8,
    port: PortSource,
}

impl Shape {
    fn target(self, data: &[u8]) -> Option<(IpAddr, u16)> {
        let address = self.family.address(data.get(self.address_at.into()..)?)?;
        let port = match self.port {
            PortSource::Fixed(port) => port,
            PortSource::AtByte(at) => u16::from_be_bytes(*data.get(at.into()..)?.first_chunk()?),
        };
        Some((address, port))
    }
}

/// A part of a table that can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Part {
    Chain(Name),
    /// A map whose elements name chains.
    Verdicts(Name),
    /// A map whose elements hold destinations.
    Targets(Name, Shape),
}

impl Part {
    /// The label of what passes: a chain's own name says more than the ways in.
    fn label(&self, ways_in: &Ways) -> Option<Label> {
        let (best, _) = ways_in.best.as_ref()?;
        let Self::Chain(name) = self else { return Some(best.clone()) };
        Some(match names::of_chain(name) {
            Some((service, protocol)) => Label { service: Some(service), protocol: Some(protocol) },
            None => best.clone(),
        })
    }
}

/// Ways into a part, counted by label; none leaves no trace. The best label is kept apart: in
/// nearly all of the many parts it is the only one, and a map would take ten times the memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ways {
    best: Option<(Label, isize)>,
    others: BTreeMap<Label, isize>,
}

impl Ways {
    fn count(&mut self, label: Label, change: isize) {
        let Some((best, count)) = &mut self.best else {
            self.best = Some((label, change));
            return;
        };
        match label.cmp(best) {
            Ordering::Less => {
                let worse = mem::replace(best, label);
                self.others.insert(worse, mem::replace(count, change));
            }
            Ordering::Equal => {
                *count += change;
                if *count == 0 {
                    self.best = self.others.pop_first();
                }
            }
            Ordering::Greater => self.count_other(label, change),
        }
    }

    /// There may be as many as Services.
    fn count_other(&mut self, label: Label, change: isize) {
        match self.others.entry(label) {
            btree_map::Entry::Occupied(mut count) => {
                *count.get_mut() += change;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            btree_map::Entry::Vacant(count) => {
                count.insert(change);
            }
        }
    }
}

/// Changes of ways in that their parts have not taken in yet.
type Pending = HashMap<Part, Ways>;

/// What one table reaches. Follows a [`Table`] that its caller keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    parts: HashMap<Part, Ways>,
    /// The shapes that reached rules read each map by.
    shapes: HashMap<Name, Vec<Shape>>,
    backends: HashMap<Backend, isize>,
    unresolved: isize,
    /// Backends touched by the edits at hand, and whether they were there before.
    touched: HashMap<Backend, bool>,
}

/// What `table` sends new connections to.
#[must_use]
pub fn walk(table: &Table) -> Reached {
    Reach::of(table).reached()
}

impl Reach {
    /// Of a whole table.
    #[must_use]
    pub fn of(table: &Table) -> Self {
        Self::begin(table).0
    }

    /// Of a whole table; also as the change that it is from nothing.
    #[must_use]
    pub fn begin(table: &Table) -> (Self, Changes) {
        let mut reach = Self::default();
        let entries = table.chains.iter().filter(|(_, chain)| chain.entry && !table.dormant);
        let entries = entries.map(|(name, _)| (Edit::Entry(name.clone()), 1)).collect();
        let changes = reach.follow(table, Edits(entries));
        (reach, changes)
    }

    /// What it reaches now.
    #[must_use]
    pub fn reached(&self) -> Reached {
        Reached {
            backends: self.backends.keys().cloned().collect(),
            unresolved: self.unresolved(),
            ..Reached::default()
        }
    }

    fn unresolved(&self) -> usize {
        usize::try_from(self.unresolved).unwrap_or_default()
    }

    /// Takes in edits that `table` already shows; gives what all of them together
    /// changed.
    pub fn follow(&mut self, table: &Table, edits: Edits) -> Changes {
        let mut pending = Pending::default();
        for (edit, times) in edits.0 {
            self.edit(&edit, times, &mut pending);
        }
        for _ in 0..MAX_ROUNDS {
            if pending.is_empty() {
                break;
            }
            for (part, changes) in mem::take(&mut pending) {
                self.settle(table, &part, changes, &mut pending);
            }
        }
        let backends = &self.backends;
        let mut changed: Vec<(Backend, Way)> = self
            .touched
            .drain()
            .filter_map(|(backend, before)| match (before, backends.contains_key(&backend)) {
                (false, true) => Some((backend, Way::Added)),
                (true, false) => Some((backend, Way::Removed)),
                _ => None,
            })
            .collect();
        changed.sort_by(|one, other| one.0.cmp(&other.0));
        Changes { backends: changed, unresolved: self.unresolved() }
    }

    /// Counts what an edit itself adds or removes, where its part is reached.
    fn edit(&mut self, edit: &Edit, sign: isize, pending: &mut Pending) {
        match edit {
            Edit::Entry(chain) => {
                link(pending, Part::Chain(chain.clone()), Label::default(), sign);
            }
            Edit::Rule(chain, rule) => {
                if let Some(label) = self.counted(&Part::Chain(chain.clone())) {
                    self.count_rule(rule, &label, sign, pending);
                }
            }
            Edit::Element(map, element) => {
                let shapes = self.shapes.get(map).cloned().unwrap_or_default();
                let targets = shapes.into_iter().map(|shape| Part::Targets(map.clone(), shape));
                for part in targets.chain([Part::Verdicts(map.clone())]) {
                    if let Some(label) = self.counted(&part) {
                        self.count_element(&part, element, &label, sign, pending);
                    }
                }
            }
        }
    }

    fn counted(&self, part: &Part) -> Option<Label> {
        part.label(self.parts.get(part)?)
    }

    /// Takes in the changes of a part's ways in; where that changes its label, counts its contents
    /// anew.
    fn settle(&mut self, table: &Table, part: &Part, changes: Ways, pending: &mut Pending) {
        let ways_in = self.parts.entry(part.clone()).or_default();
        let before = part.label(ways_in);
        for (label, change) in changes.best.into_iter().chain(changes.others) {
            ways_in.count(label, change);
        }
        let label = part.label(ways_in);
        if label.is_none() {
            self.parts.remove(part);
        }
        if label == before {
            return;
        }
        if let Part::Targets(map, shape) = part {
            self.note_shape(map, *shape, label.is_some());
        }
        if let Some(before) = before {
            self.count_contents(table, part, &before, -1, pending);
        }
        if let Some(label) = label {
            self.count_contents(table, part, &label, 1, pending);
        }
    }

    fn note_shape(&mut self, map: &Name, shape: Shape, used: bool) {
        let shapes = self.shapes.entry(map.clone()).or_default();
        shapes.retain(|known| *known != shape);
        if used {
            shapes.push(shape);
        } else if shapes.is_empty() {
            self.shapes.remove(map);
        }
    }

    fn count_contents(
        &mut self,
        table: &Table,
        part: &Part,
        label: &Label,
        sign: isize,
        pending: &mut Pending,
    ) {
        match part {
            Part::Chain(name) => {
                for rule in table.chains.get(name).iter().flat_map(|chain| chain.rules.values()) {
                    self.count_rule(rule, label, sign, pending);
                }
            }
            Part::Verdicts(name) | Part::Targets(name, _) => {
                for element in table.maps.get(name).iter().flat_map(|map| map.elements.values()) {
                    self.count_element(part, element, label, sign, pending);
                }
            }
        }
    }

    fn count_rule(&mut self, rule: &Rule, label: &Label, sign: isize, pending: &mut Pending) {
        let label = label.in_rule(rule);
        for effect in &rule.effects {
            match effect {
                Effect::Go(chain) => link(pending, Part::Chain(chain.clone()), label.clone(), sign),
                Effect::GoByMap(map) => {
                    link(pending, Part::Verdicts(map.clone()), label.clone(), sign);
                }
                Effect::Send(address, port) => {
                    self.count_backend(&label, Some((*address, *port)), sign);
                }
                Effect::SendByMap { map, family, address_at, port } => {
                    let shape = Shape { family: *family, address_at: *address_at, port: *port };
                    link(pending, Part::Targets(map.clone(), shape), label.clone(), sign);
                }
                Effect::SendUnknown => self.unresolved += sign,
            }
        }
    }

    fn count_element(
        &mut self,
        part: &Part,
        element: &Element,
        label: &Label,
        sign: isize,
        pending: &mut Pending,
    ) {
        match (part, element) {
            (Part::Verdicts(_), Element::Go(chain)) => {
                link(pending, Part::Chain(chain.clone()), label.clone(), sign);
            }
            (Part::Targets(_, shape), Element::Data(data)) => {
                self.count_backend(label, shape.target(data), sign);
            }
            _ => {}
        }
    }

    fn count_backend(&mut self, label: &Label, target: Option<(IpAddr, u16)>, sign: isize) {
        let (Some((address, port)), Some(protocol)) = (target, label.protocol) else {
            self.unresolved += sign;
            return;
        };
        let service = label.service.clone().map(ServiceName::Port);
        let backend = Backend { service, protocol, address, port };
        if !self.touched.contains_key(&backend) {
            self.touched.insert(backend.clone(), self.backends.contains_key(&backend));
        }
        match self.backends.entry(backend) {
            Entry::Occupied(mut count) => {
                *count.get_mut() += sign;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            Entry::Vacant(count) => {
                count.insert(sign);
            }
        }
    }
}

/// Notes one way more or less into a part; what cancels out leaves no trace.
fn link(pending: &mut Pending, part: Part, label: Label, sign: isize) {
    match pending.entry(part) {
        Entry::Occupied(mut changes) => {
            changes.get_mut().count(label, sign);
            if changes.get().best.is_none() {
                changes.remove();
            }
        }
        Entry::Vacant(changes) => {
            changes.insert(Ways { best: Some((label, sign)), ..Ways::default() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Chain, Map};
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
            let service = backend.service.as_ref();
            let service = service.map_or("-".to_owned(), ServiceName::to_string);
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
        table.maps.insert("m".into(), Map { handle: 1, elements: elements.into_iter().collect() });
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

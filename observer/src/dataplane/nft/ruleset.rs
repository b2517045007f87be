//! The model of the node's `nf_tables` rules, kept up to date message by message.
//!
//! Pure. Messages are applied in the kernel's order; the same types rebuild it from a dump. Tables
//! are kept whole, chains keep only rules that have effects, sets that are not maps are left out.
//! What a table reaches follows its edits, once per commit.

use std::collections::HashMap;
use std::mem;

use super::messages::{Change, TableId};
use crate::dataplane::reach::{Changes, Edit, Reach, Reached, Way};
use crate::dataplane::rules::{Map, Name, Table};

/// A message about a table or chain that the model does not have: something was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Every table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    tables: HashMap<TableId, Followed>,
}

/// A table and what it reaches; the second is behind by the edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Followed {
    table: Table,
    reach: Reach,
    edits: Vec<(Edit, Way)>,
}

impl Ruleset {
    /// From messages that together show every table: a dump.
    ///
    /// # Errors
    /// When a message is about something that none before it showed.
    pub fn from_messages(
        messages: impl IntoIterator<Item = (TableId, Change)>,
    ) -> Result<Self, Unexpected> {
        let mut ruleset = Self::default();
        for (id, change) in messages {
            ruleset.apply(id, change)?;
        }
        for followed in ruleset.tables.values_mut() {
            followed.edits = Vec::new();
            followed.reach = Reach::of(&followed.table);
        }
        Ok(ruleset)
    }

    /// Applies the messages of one commit; gives what it changed of each table's backends.
    ///
    /// # Errors
    /// When a message is about something the model does not have; the model is then of no use.
    pub fn commit(
        &mut self,
        messages: impl IntoIterator<Item = (TableId, Change)>,
    ) -> Result<Vec<(TableId, Changes)>, Unexpected> {
        let mut touched: HashMap<TableId, Reached> = HashMap::new();
        for (id, change) in messages {
            if change == Change::DeleteTable {
                let gone = self.tables.remove(&id).map(|gone| gone.reach.reached());
                touched.entry(id).or_default().backends.extend(gone.unwrap_or_default().backends);
            } else {
                if !touched.contains_key(&id) {
                    touched.insert(id.clone(), Reached::default());
                }
                self.apply(id, change)?;
            }
        }
        Ok(touched.into_iter().map(|(id, gone)| self.follow(id, &gone)).collect())
    }

    /// Brings what a table reaches up to date; `gone` was reached by a table of that name that was
    /// deleted in the same commit.
    fn follow(&mut self, id: TableId, gone: &Reached) -> (TableId, Changes) {
        let mut changes = Changes::default();
        if let Some(Followed { table, reach, edits }) = self.tables.get_mut(&id) {
            changes = reach.follow(table, mem::take(edits));
        }
        if !gone.backends.is_empty() {
            let now = self.reached(&id).backends;
            changes.backends.retain(|(backend, _)| !gone.backends.contains(backend));
            let lost = gone.backends.difference(&now).cloned();
            changes.backends.extend(lost.map(|backend| (backend, Way::Removed)));
        }
        (id, changes)
    }

    fn apply(&mut self, id: TableId, change: Change) -> Result<(), Unexpected> {
        if let Change::NewTable { dormant } = change {
            self.tables.entry(id).or_default().set_dormant(dormant);
            return Ok(());
        }
        self.tables.get_mut(&id).ok_or(Unexpected)?.apply(change)
    }

    /// Its tables.
    pub fn tables(&self) -> impl Iterator<Item = (&TableId, &Table)> {
        self.tables.iter().map(|(id, followed)| (id, &followed.table))
    }

    /// What one table sends new connections to; nothing when it does not exist.
    #[must_use]
    pub fn reached(&self, id: &TableId) -> Reached {
        self.tables.get(id).map(|followed| followed.reach.reached()).unwrap_or_default()
    }
}

impl Followed {
    fn set_dormant(&mut self, dormant: bool) {
        if mem::replace(&mut self.table.dormant, dormant) == dormant {
            return;
        }
        let way = if dormant { Way::Removed } else { Way::Added };
        let entries = self.table.chains.iter().filter(|(_, chain)| chain.entry);
        self.edits.extend(entries.map(|(name, _)| (Edit::Entry(name.clone()), way)));
    }

    fn apply(&mut self, change: Change) -> Result<(), Unexpected> {
        let Self { table, edits, .. } = self;
        match change {
            // Both are about the table itself.
            Change::NewTable { .. } | Change::DeleteTable => {}
            // An existing chain is announced again when something of it changes; its rules stay.
            Change::NewChain { chain, entry } => {
                let before =
                    mem::replace(&mut table.chains.entry(chain.clone()).or_default().entry, entry);
                if before != entry && !table.dormant {
                    let way = if entry { Way::Added } else { Way::Removed };
                    edits.push((Edit::Entry(chain), way));
                }
            }
            Change::DeleteChain { chain } => {
                if let Some(gone) = table.chains.remove(&chain) {
                    if gone.entry && !table.dormant {
                        edits.push((Edit::Entry(chain.clone()), Way::Removed));
                    }
                    let rules = gone.rules.into_values();
                    edits.extend(rules.map(|rule| (Edit::Rule(chain.clone(), rule), Way::Removed)));
                }
            }
            Change::NewRule { chain, handle, rule } => {
                let rules = &mut table.chains.get_mut(&chain).ok_or(Unexpected)?.rules;
                let before = if rule.effects.is_empty() {
                    rules.remove(&handle)
                } else {
                    edits.push((Edit::Rule(chain.clone(), rule.clone()), Way::Added));
                    rules.insert(handle, rule)
                };
                edits.extend(before.map(|rule| (Edit::Rule(chain, rule), Way::Removed)));
            }
            Change::DeleteRule { chain, handle } => {
                let rules = &mut table.chains.get_mut(&chain).ok_or(Unexpected)?.rules;
                let gone = rules.remove(&handle);
                edits.extend(gone.map(|rule| (Edit::Rule(chain, rule), Way::Removed)));
            }
            Change::NewMap { map, handle } => {
                if table.maps.get(&map).is_none_or(|known| known.handle != handle) {
                    let fresh = Map { handle, ..Map::default() };
                    let gone = table.maps.insert(map.clone(), fresh);
                    edits.extend(gone.into_iter().flat_map(|gone| elements_of(&map, gone)));
                }
            }
            // With another handle it is the former owner of a name that is already used again.
            Change::DeleteSet { set, handle } => {
                if table.maps.get(&set).is_some_and(|map| map.handle == handle) {
                    let gone = table.maps.remove(&set);
                    edits.extend(gone.into_iter().flat_map(|gone| elements_of(&set, gone)));
                }
            }
            Change::NewElements { set, elements } => {
                let Some(map) = table.maps.get_mut(&set) else { return Ok(()) };
                for (key, element) in elements {
                    edits.push((Edit::Element(set.clone(), element.clone()), Way::Added));
                    let before = map.elements.insert(key, element);
                    edits.extend(
                        before.map(|gone| (Edit::Element(set.clone(), gone), Way::Removed)),
                    );
                }
            }
            Change::DeleteElements { set, keys } => {
                let Some(map) = table.maps.get_mut(&set) else { return Ok(()) };
                let gone = keys.iter().filter_map(|key| map.elements.remove(key));
                edits.extend(gone.map(|gone| (Edit::Element(set.clone(), gone), Way::Removed)));
            }
        }
        Ok(())
    }
}

fn elements_of(name: &Name, gone: Map) -> Vec<(Edit, Way)> {
    let elements = gone.elements.into_values();
    elements.map(|element| (Edit::Element(name.clone(), element), Way::Removed)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::nft::TableFamily;
    use crate::dataplane::rules::{Effect, Element, Family, Name, PortSource, Rule};
    use crate::facts::{Protocol, ServicePort};

    /// What kube-proxy 1.36 writes, in the order the kernel reports it.
    #[derive(Default)]
    struct KubeProxy {
        /// Endpoints by Service.
        services: BTreeMap<u8, BTreeSet<u8>>,
        handles: u64,
        /// The rule and the map's name and handle of each Service.
        written: BTreeMap<u8, (u64, Name, u64)>,
    }

    fn chain(service: u8) -> Name {
        format!("service-AAAAAAAA-ns/s{service}/tcp/http").into()
    }

    impl KubeProxy {
        fn handle(&mut self) -> u64 {
            self.handles += 1;
            self.handles
        }

        fn table() -> Vec<Change> {
            let rule =
                Rule { effects: vec![Effect::GoByMap("service-ips".into())], ..Rule::default() };
            vec![
                Change::NewTable { dormant: false },
                Change::NewMap { map: "service-ips".into(), handle: 1 },
                Change::NewChain { chain: "nat".into(), entry: true },
                Change::NewRule { chain: "nat".into(), handle: 2, rule },
            ]
        }

        /// Sets a Service's endpoints; none removes it from `service-ips` and, as kube-proxy
        /// does, leaves its chain for later.
        fn set(&mut self, service: u8, endpoints: BTreeSet<u8>) -> Vec<Change> {
            let mut changes = vec![Change::NewChain { chain: chain(service), entry: false }];
            let key: Box<[u8]> = [service].into();
            if let Some((rule, map, handle)) = self.written.remove(&service) {
                changes.push(Change::DeleteRule { chain: chain(service), handle: rule });
                changes.push(Change::DeleteSet { set: map, handle });
            }
            if endpoints.is_empty() {
                let set = "service-ips".into();
                changes.push(Change::DeleteElements { set, keys: vec![key] });
            } else {
                changes.extend(self.write(service, &endpoints));
                let elements = vec![(key, Element::Go(chain(service)))];
                changes.push(Change::NewElements { set: "service-ips".into(), elements });
            }
            self.services.insert(service, endpoints);
            changes
        }

        /// A rule over a new anonymous map, which takes the lowest name that is free.
        fn write(&mut self, service: u8, endpoints: &BTreeSet<u8>) -> Vec<Change> {
            let taken: BTreeSet<&Name> = self.written.values().map(|(_, name, _)| name).collect();
            let map: Name = (0..=u8::MAX)
                .map(|number| Name::from(format!("__map{number}")))
                .find(|name| !taken.contains(name))
                .expect("a free name");
            let (handle, rule_handle) = (self.handle() + 10, self.handle() + 10);
            let element =
                |&pod: &u8| ([pod].into(), Element::Data([10, 0, 0, pod, 0, 80, 0, 0].into()));
            let rule = Rule {
                protocol: Some(Protocol::Tcp),
                service: None,
                effects: vec![Effect::SendByMap {
                    map: map.clone(),
                    family: Family::V4,
                    address_at: 0,
                    port: PortSource::AtByte(4),
                }],
            };
            self.written.insert(service, (rule_handle, map.clone(), handle));
            vec![
                Change::NewMap { map: map.clone(), handle },
                Change::NewElements { set: map, elements: endpoints.iter().map(element).collect() },
                Change::NewRule { chain: chain(service), handle: rule_handle, rule },
            ]
        }

        /// What a dump shows of the present state: no history.
        fn dumped(&self) -> Ruleset {
            let mut fresh = Self { handles: 1000, ..Self::default() };
            let mut ruleset = applied(Ruleset::default(), Self::table());
            for (service, endpoints) in &self.services {
                ruleset = applied(ruleset, fresh.set(*service, endpoints.clone()));
            }
            ruleset
        }

        fn backends(&self) -> usize {
            self.services.values().map(BTreeSet::len).sum()
        }
    }

    fn id() -> TableId {
        TableId { family: TableFamily::Ip, name: "kube-proxy".into() }
    }

    fn applied(mut ruleset: Ruleset, changes: Vec<Change>) -> Ruleset {
        let messages = changes.into_iter().map(|change| (id(), change));
        assert!(ruleset.commit(messages).is_ok());
        ruleset
    }

    /// A chain that others of a lower number lead to; no loops, as the kernel ensures.
    fn ranked(rank: u8) -> Name {
        if rank < 2 { format!("c{rank}").into() } else { chain(rank) }
    }

    /// A map that chains up to its number use and whose elements lead beyond it.
    fn map(rank: u8) -> Name {
        format!("m{rank}").into()
    }

    const RANKS: u8 = 6;

    fn any_rule(rank: u8) -> impl Strategy<Value = Rule> {
        let send = |map| Effect::SendByMap {
            map,
            family: Family::V4,
            address_at: 0,
            port: PortSource::AtByte(4),
        };
        let effect =
            (0_u8..5, rank + 1..=RANKS, 1_u8..4).prop_map(move |(kind, to, pod)| match kind {
                0 => Effect::Go(ranked(to)),
                1 => Effect::GoByMap(map(rank)),
                2 => Effect::Send([10, 0, 0, pod].into(), 80),
                3 => send(map(rank)),
                _ => Effect::SendUnknown,
            });
        let service = proptest::option::of(0_u8..3);
        let named = |number| ServicePort(format!("ns/s{number}:http").into());
        let protocol = proptest::option::of(Just(Protocol::Tcp));
        (protocol, service, proptest::collection::vec(effect, 0..3)).prop_map(
            move |(protocol, service, effects)| Rule {
                protocol,
                service: service.map(named),
                effects,
            },
        )
    }

    fn any_element(rank: u8) -> impl Strategy<Value = Element> {
        prop_oneof![
            (rank + 1..=RANKS).prop_map(|to| Element::Go(ranked(to))),
            (1_u8..4).prop_map(|pod| Element::Data([10, 0, 0, pod, 0, 80, 0, 0].into())),
            Just(Element::Inert),
        ]
    }

    fn any_change() -> impl Strategy<Value = Change> {
        (0..RANKS).prop_flat_map(|rank| {
            let (chain, set) = (ranked(rank), map(rank));
            let (in_chain, of_chain, deleted) = (chain.clone(), chain.clone(), chain.clone());
            let (made, gone, less) = (set.clone(), set.clone(), set.clone());
            let key = |key: u8| -> Box<[u8]> { [key].into() };
            prop_oneof![
                1 => any::<bool>().prop_map(|dormant| Change::NewTable { dormant }),
                1 => Just(Change::DeleteTable),
                4 => any::<bool>().prop_map(move |entry| Change::NewChain {
                    chain: chain.clone(),
                    entry,
                }),
                1 => Just(Change::DeleteChain { chain: deleted }),
                8 => (0_u64..3, any_rule(rank)).prop_map(move |(handle, rule)| Change::NewRule {
                    chain: in_chain.clone(),
                    handle,
                    rule,
                }),
                4 => (0_u64..3).prop_map(move |handle| Change::DeleteRule {
                    chain: of_chain.clone(),
                    handle,
                }),
                3 => (1_u64..3).prop_map(move |handle| Change::NewMap {
                    map: made.clone(),
                    handle,
                }),
                1 => (1_u64..3).prop_map(move |handle| Change::DeleteSet {
                    set: gone.clone(),
                    handle,
                }),
                6 => (0_u8..3, any_element(rank)).prop_map(move |(name, element)| {
                    Change::NewElements { set: set.clone(), elements: vec![(key(name), element)] }
                }),
                3 => (0_u8..3).prop_map(move |name| Change::DeleteElements {
                    set: less.clone(),
                    keys: vec![key(name)],
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_reached_after_any_edits_is_what_a_fresh_walk_reaches(
            commits in proptest::collection::vec(
                proptest::collection::vec(any_change(), 1..6),
                1..25,
            ),
        ) {
            let mut ruleset = Ruleset::default();
            let mut reached = BTreeSet::new();
            let chains =
                (0..RANKS).map(|rank| Change::NewChain { chain: ranked(rank), entry: rank < 2 });
            for commit in commits {
                // A table that was deleted is made again, with its chains, before it is edited.
                let exists = ruleset.tables.contains_key(&id());
                let made = [Change::NewTable { dormant: false }].into_iter().chain(chains.clone());
                let made = made.filter(|_| !exists).collect::<Vec<_>>();
                let messages = made.into_iter().chain(commit).map(|change| (id(), change));
                let before = ruleset.clone();
                let Ok(changed) = ruleset.commit(messages) else {
                    // About something that is not there: the daemon would read all anew.
                    ruleset = before;
                    continue;
                };
                for (backend, way) in changed.into_iter().flat_map(|(_, changes)| changes.backends) {
                    match way {
                        Way::Added => prop_assert!(reached.insert(backend)),
                        Way::Removed => prop_assert!(reached.remove(&backend)),
                    }
                }
                prop_assert_eq!(&reached, &ruleset.reached(&id()).backends);
                if let Some(Followed { table, reach, edits }) = ruleset.tables.get(&id()) {
                    prop_assert!(edits.is_empty());
                    prop_assert_eq!(reach, &Reach::of(table));
                }
            }
        }

        #[test]
        fn the_model_after_any_changes_reaches_what_a_fresh_one_does(
            steps in proptest::collection::vec(
                (0_u8..5, proptest::collection::btree_set(1_u8..6, 0..4)),
                1..30,
            ),
        ) {
            let mut proxy = KubeProxy::default();
            let mut ruleset = applied(Ruleset::default(), KubeProxy::table());
            for (service, endpoints) in steps {
                ruleset = applied(ruleset, proxy.set(service, endpoints));
                let reached = ruleset.reached(&id());
                prop_assert_eq!(reached.backends.len(), proxy.backends());
                prop_assert_eq!(reached, proxy.dumped().reached(&id()));
            }
        }
    }

    #[test]
    fn an_anonymous_map_that_takes_a_name_before_its_former_owner_goes_is_kept() {
        let map: Name = "__map0".into();
        let element = || (Box::from([0]), Element::Data([10, 0, 0, 1, 0, 80, 0, 0].into()));
        let ruleset = applied(
            Ruleset::default(),
            vec![
                Change::NewTable { dormant: false },
                Change::NewMap { map: map.clone(), handle: 1 },
                Change::NewElements { set: map.clone(), elements: vec![element()] },
                Change::NewMap { map: map.clone(), handle: 2 },
                Change::DeleteSet { set: map.clone(), handle: 1 },
            ],
        );
        let (_, table) = ruleset.tables().next().expect("a table");
        assert_eq!(table.maps[&map], Map { handle: 2, ..Map::default() });
    }
}

//! The model of the node's `nf_tables` rules, kept up to date message by message.
//!
//! Pure. Messages are applied in the kernel's order; the same types rebuild it from a dump. Tables
//! are kept whole, chains keep only rules that have effects, sets that are not maps are left out.
//! What a table reaches follows its edits, once per commit.

use std::mem;

use foldhash::HashMap;

use super::messages::{Change, TableId};
use crate::dataplane::reach::{Changes, Edit, Edits, Reach, Reached, Way};
use crate::dataplane::rules::{
    Effect, Element, ElementKey, Fingerprint, Map, Name, Rule, Rules, Table,
};

/// A message about a table or chain that the model does not have: something was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Every table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    tables: HashMap<TableId, Followed>,
    /// Those of the commit at hand, a handful at most, and what tables of their names reached that
    /// it deleted.
    touched: Vec<(TableId, Reached)>,
}

/// A table and what it reaches; the second is behind by the edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Followed {
    table: Table,
    /// `None` until the table, which is new, has been walked at the end of its first commit.
    reach: Option<Reach>,
    edits: Edits,
    /// Rules that the commit at hand deleted, and their chains: it may write them anew.
    deleted: HashMap<Fingerprint, (Name, Rule)>,
}

impl Ruleset {
    /// From messages that together show every table: a dump, to be ended like a commit.
    ///
    /// # Errors
    /// When a message is about something that none before it showed.
    pub fn from_messages(
        messages: impl IntoIterator<Item = (TableId, Change)>,
    ) -> Result<Self, Unexpected> {
        let mut ruleset = Self::default();
        for (id, change) in messages {
            ruleset.apply(&id, change)?;
        }
        Ok(ruleset)
    }

    /// Applies a message of the commit at hand.
    ///
    /// # Errors
    /// When it is about something the model does not have; the model is then of no use.
    pub(super) fn apply(&mut self, id: &TableId, change: Change) -> Result<(), Unexpected> {
        if self.touched.iter().all(|(known, _)| known != id) {
            self.touched.push((id.clone(), Reached::default()));
        }
        match change {
            Change::NewTable { dormant } => {
                self.tables.entry(id.clone()).or_default().set_dormant(dormant);
                Ok(())
            }
            Change::DeleteTable => {
                let gone = self.tables.remove(id).map(|gone| gone.reached()).unwrap_or_default();
                let of_table = self.touched.iter_mut().filter(|(known, _)| known == id);
                of_table.for_each(|(_, all)| all.backends.extend(gone.backends.iter().cloned()));
                Ok(())
            }
            change => self.tables.get_mut(id).ok_or(Unexpected)?.apply(change),
        }
    }

    /// Applies a rule that the commit at hand deleted and now writes anew, as kube-proxy does by the
    /// thousands in iptables mode; false when it is not such a rule.
    pub(super) fn rewrite(&mut self, id: &TableId, handle: u64, fingerprint: Fingerprint) -> bool {
        let followed = self.tables.get_mut(id);
        followed.is_some_and(|followed| followed.rewrite(handle, fingerprint))
    }

    /// Ends the commit at hand; gives what it changed of each table's backends.
    pub(super) fn end(&mut self) -> Vec<(TableId, Changes)> {
        let touched = mem::take(&mut self.touched).into_iter();
        touched.map(|(id, gone)| self.follow(id, &gone)).collect()
    }

    /// Brings what a table reaches up to date; `gone` was reached by a table of that name that was
    /// deleted in the same commit.
    fn follow(&mut self, id: TableId, gone: &Reached) -> (TableId, Changes) {
        let mut changes = Changes::default();
        if let Some(followed) = self.tables.get_mut(&id) {
            changes = followed.follow();
        }
        if !gone.backends.is_empty() {
            let now = self.reached(&id).backends;
            changes.backends.retain(|(backend, _)| !gone.backends.contains(backend));
            let lost = gone.backends.difference(&now).cloned();
            changes.backends.extend(lost.map(|backend| (backend, Way::Removed)));
        }
        (id, changes)
    }

    /// Its tables.
    pub fn tables(&self) -> impl Iterator<Item = (&TableId, &Table)> {
        self.tables.iter().map(|(id, followed)| (id, &followed.table))
    }

    /// What one table sends new connections to; nothing when it does not exist.
    #[must_use]
    pub fn reached(&self, id: &TableId) -> Reached {
        self.tables.get(id).map(Followed::reached).unwrap_or_default()
    }
}

impl Followed {
    fn reached(&self) -> Reached {
        self.reach.as_ref().map(Reach::reached).unwrap_or_default()
    }

    /// Brings what is reached up to date.
    fn follow(&mut self) -> Changes {
        for (chain, rule) in mem::take(&mut self.deleted).into_values() {
            self.note(|| Edit::Rule(chain, rule), Way::Removed);
        }
        let edits = mem::take(&mut self.edits);
        if let Some(reach) = &mut self.reach {
            return reach.follow(&self.table, edits);
        }
        let (reach, changes) = Reach::begin(&self.table);
        self.reach = Some(reach);
        changes
    }

    /// A table that is to be walked whole needs no notes.
    fn note(&mut self, edit: impl FnOnce() -> Edit, way: Way) {
        if self.reach.is_some() {
            self.edits.note(edit(), way);
        }
    }

    fn set_dormant(&mut self, dormant: bool) {
        if mem::replace(&mut self.table.dormant, dormant) == dormant {
            return;
        }
        let way = if dormant { Way::Removed } else { Way::Added };
        let entries = self.table.chains.iter().filter(|(_, chain)| chain.entry);
        for name in entries.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.note(|| Edit::Entry(name), way);
        }
    }

    fn apply(&mut self, change: Change) -> Result<(), Unexpected> {
        match change {
            // Both are about the table itself.
            Change::NewTable { .. } | Change::DeleteTable => {}
            Change::NewChain { chain, entry } => self.new_chain(chain, entry),
            Change::DeleteChain { chain } => self.delete_chain(&chain),
            Change::NewRule { chain, handle, fingerprint, rule } => {
                self.new_rule(&chain, handle, fingerprint, rule)?;
            }
            Change::DeleteRule { chain, handle } => self.delete_rule(chain, handle)?,
            Change::NewMap { map, handle, .. } => self.new_map(&map, handle),
            // With another handle it is the former owner of a name that is already used again.
            Change::DeleteSet { set, handle } => {
                if self.table.maps.get(&set).is_some_and(|map| map.handle == handle) {
                    let gone = self.table.maps.remove(&set);
                    self.note_gone(&set, gone);
                }
            }
            Change::NewElements { set, elements } => self.new_elements(&set, elements),
            Change::DeleteElements { set, keys } => {
                for key in keys {
                    let map = self.table.maps.get_mut(&set);
                    if let Some(gone) = map.and_then(|map| map.elements.remove(&key)) {
                        self.note(|| Edit::Element(set.clone(), gone), Way::Removed);
                    }
                }
            }
        }
        Ok(())
    }

    /// An existing chain is announced again when something of it changes; its rules stay.
    fn new_chain(&mut self, chain: Name, entry: bool) {
        let known = self.table.chains.entry(chain.clone()).or_default();
        let before = mem::replace(&mut known.entry, entry);
        if before != entry && !self.table.dormant {
            let way = if entry { Way::Added } else { Way::Removed };
            self.note(|| Edit::Entry(chain), way);
        }
    }

    fn delete_chain(&mut self, name: &Name) {
        let Some(gone) = self.table.chains.remove(name) else { return };
        if gone.entry && !self.table.dormant {
            self.note(|| Edit::Entry(name.clone()), Way::Removed);
        }
        for rule in gone.rules.into_values() {
            self.note(|| Edit::Rule(name.clone(), rule), Way::Removed);
        }
    }

    fn new_rule(
        &mut self,
        chain: &Name,
        handle: u64,
        fingerprint: Fingerprint,
        rule: Rule,
    ) -> Result<(), Unexpected> {
        let before = if rule.effects.is_empty() {
            self.rules_of(chain)?.remove(handle).map(|(_, rule)| rule)
        } else {
            let rule = self.with_known_names(rule);
            self.note(|| Edit::Rule(chain.clone(), rule.clone()), Way::Added);
            let rules = self.rules_of(chain)?;
            rules.insert(handle, fingerprint, with_service_of(rules.last(), rule))
        };
        if let Some(rule) = before {
            self.note(|| Edit::Rule(chain.clone(), rule), Way::Removed);
        }
        Ok(())
    }

    fn rewrite(&mut self, handle: u64, fingerprint: Fingerprint) -> bool {
        let Some((chain, rule)) = self.deleted.remove(&fingerprint) else { return false };
        let Ok(rules) = self.rules_of(&chain) else {
            self.note(|| Edit::Rule(chain, rule), Way::Removed);
            return false;
        };
        if let Some(before) = rules.insert(handle, fingerprint, rule) {
            self.note(|| Edit::Rule(chain, before), Way::Removed);
        }
        true
    }

    fn rules_of(&mut self, chain: &Name) -> Result<&mut Rules, Unexpected> {
        self.table.chains.get_mut(chain).map(|chain| &mut chain.rules).ok_or(Unexpected)
    }

    /// A rule that shares the memory of names with what it names: there may be 100,000 rules.
    fn with_known_names(&self, mut rule: Rule) -> Rule {
        for effect in &mut rule.effects {
            match effect {
                Effect::Go(chain) => use_known(chain, &self.table.chains),
                Effect::GoByMap(map) | Effect::SendByMap { map, .. } => {
                    use_known(map, &self.table.maps);
                }
                Effect::Send(..) | Effect::SendUnknown => {}
            }
        }
        rule
    }

    fn delete_rule(&mut self, chain: Name, handle: u64) -> Result<(), Unexpected> {
        let Some((fingerprint, gone)) = self.rules_of(&chain)?.remove(handle) else {
            return Ok(());
        };
        if let Some((chain, same)) = self.deleted.insert(fingerprint, (chain, gone)) {
            self.note(|| Edit::Rule(chain, same), Way::Removed);
        }
        Ok(())
    }

    fn new_map(&mut self, map: &Name, handle: u64) {
        if self.table.maps.get(map).is_none_or(|known| known.handle != handle) {
            let fresh = Map { handle, ..Map::default() };
            let gone = self.table.maps.insert(map.clone(), fresh);
            self.note_gone(map, gone);
        }
    }

    fn new_elements(&mut self, set: &Name, elements: Vec<(ElementKey, Element)>) {
        for (key, mut element) in elements {
            if let Element::Go(chain) = &mut element {
                use_known(chain, &self.table.chains);
            }
            let Some(map) = self.table.maps.get_mut(set) else { return };
            let gone = map.elements.insert(key, element.clone());
            self.note(|| Edit::Element(set.clone(), element), Way::Added);
            if let Some(gone) = gone {
                self.note(|| Edit::Element(set.clone(), gone), Way::Removed);
            }
        }
    }

    fn note_gone(&mut self, name: &Name, gone: Option<Map>) {
        for element in gone.into_iter().flat_map(|gone| gone.elements.into_values()) {
            self.note(|| Edit::Element(name.clone(), element), Way::Removed);
        }
    }
}

fn use_known<T>(name: &mut Name, known: &HashMap<Name, T>) {
    if let Some((known, _)) = known.get_key_value(name) {
        name.clone_from(known);
    }
}

/// A rule that shares the name of its Service with the one before it, which mostly has the same.
fn with_service_of(before: Option<&Rule>, mut rule: Rule) -> Rule {
    if let Some(before) = before.filter(|before| before.service == rule.service) {
        rule.service.clone_from(&before.service);
    }
    rule
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::hash::BuildHasher as _;
    use std::sync::Arc;

    use foldhash::fast::FixedState;
    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::nft::TableFamily;
    use crate::dataplane::rules::{Family, PortSource};
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
                Change::NewMap { map: "service-ips".into(), handle: 1, numbered: None },
                Change::NewChain { chain: "nat".into(), entry: true },
                new_rule("nat", 2, rule),
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
                Change::NewMap { map: map.clone(), handle, numbered: None },
                Change::NewElements { set: map, elements: endpoints.iter().map(element).collect() },
                new_rule(&chain(service), rule_handle, rule),
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

    fn new_rule(chain: &str, handle: u64, rule: Rule) -> Change {
        let fingerprint = Fingerprint(FixedState::default().hash_one((chain, &rule)));
        Change::NewRule { chain: chain.into(), handle, fingerprint, rule }
    }

    /// Applies a commit; a rule that is written anew is taken for that.
    fn commit(
        ruleset: &mut Ruleset,
        changes: Vec<Change>,
    ) -> Result<Vec<(TableId, Changes)>, Unexpected> {
        for change in changes {
            if let Change::NewRule { handle, fingerprint, .. } = &change
                && ruleset.rewrite(&id(), *handle, *fingerprint)
            {
                continue;
            }
            ruleset.apply(&id(), change)?;
        }
        Ok(ruleset.end())
    }

    fn applied(mut ruleset: Ruleset, changes: Vec<Change>) -> Ruleset {
        assert!(commit(&mut ruleset, changes).is_ok());
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
                8 => (0_u64..3, any_rule(rank))
                    .prop_map(move |(handle, rule)| new_rule(&in_chain, handle, rule)),
                4 => (0_u64..3).prop_map(move |handle| Change::DeleteRule {
                    chain: of_chain.clone(),
                    handle,
                }),
                3 => (1_u64..3).prop_map(move |handle| Change::NewMap {
                    map: made.clone(),
                    handle,
                    numbered: None,
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
            for changes in commits {
                // A table that was deleted is made again, with its chains, before it is edited.
                let exists = ruleset.tables.contains_key(&id());
                let made = [Change::NewTable { dormant: false }].into_iter().chain(chains.clone());
                let made = made.filter(|_| !exists).collect::<Vec<_>>();
                let changes = made.into_iter().chain(changes).collect();
                let before = ruleset.clone();
                let Ok(changed) = commit(&mut ruleset, changes) else {
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
                if let Some(followed) = ruleset.tables.get(&id()) {
                    let Followed { table, reach, edits, deleted } = followed;
                    prop_assert!(edits.is_empty() && deleted.is_empty());
                    prop_assert_eq!(reach.as_ref(), Some(&Reach::of(table)));
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

    fn send(port: u16) -> Rule {
        let effects = vec![Effect::Send([10, 0, 0, 1].into(), port)];
        Rule { protocol: Some(Protocol::Tcp), service: None, effects }
    }

    fn added(handle: u64, rule: Rule) -> Change {
        new_rule("nat", handle, rule)
    }

    fn deleted(handle: u64) -> Change {
        Change::DeleteRule { chain: "nat".into(), handle }
    }

    fn ports(ruleset: &Ruleset) -> Vec<u16> {
        ruleset.reached(&id()).backends.iter().map(|backend| backend.port).collect()
    }

    fn of_rules(rules: &[(u64, Rule)]) -> Ruleset {
        let entry = Change::NewChain { chain: "nat".into(), entry: true };
        let mut changes = vec![Change::NewTable { dormant: false }, entry];
        changes.extend(rules.iter().map(|(handle, rule)| added(*handle, rule.clone())));
        applied(Ruleset::default(), changes)
    }

    #[test]
    fn a_rule_written_anew_is_no_edit_and_is_known_by_its_new_handle() {
        let mut ruleset = of_rules(&[(1, send(80)), (2, send(81))]);
        let anew = [deleted(1), deleted(2), added(3, send(81)), added(4, send(80))];
        let changed = commit(&mut ruleset, anew.into()).expect("a known chain");
        assert!(changed.iter().all(|(_, changes)| changes.backends.is_empty()));
        ruleset = applied(ruleset, vec![deleted(3)]);
        assert_eq!(ports(&ruleset), [80]);
        ruleset = applied(ruleset, vec![deleted(2), deleted(1)]);
        assert_eq!(ports(&ruleset), [80], "handles of rules that are gone");
        assert_eq!(ports(&applied(ruleset, vec![deleted(4)])), Vec::<u16>::new());
    }

    #[test]
    fn of_two_equal_rules_one_may_go_in_the_commit_that_writes_the_other_anew() {
        let twice = of_rules(&[(1, send(80)), (2, send(80))]);
        let once = applied(twice, vec![deleted(1), deleted(2), added(3, send(80))]);
        assert_eq!(ports(&once), [80]);
        assert_eq!(ports(&applied(once, vec![deleted(3)])), Vec::<u16>::new());
    }

    #[test]
    fn a_rule_added_and_deleted_in_one_commit_was_never_there() {
        let ruleset = applied(of_rules(&[]), vec![added(1, send(80)), deleted(1)]);
        assert_eq!(ports(&ruleset), Vec::<u16>::new());
    }

    #[test]
    fn rules_share_the_memory_of_names() {
        let go = Rule { effects: vec![Effect::Go("c".into())], ..Rule::default() };
        let named = |rule: Rule| Rule { service: Some(ServicePort("ns/s:p".into())), ..rule };
        let mut ruleset = of_rules(&[]);
        let target = Change::NewChain { chain: "c".into(), entry: false };
        let rules = [added(1, named(go)), added(2, named(send(80)))];
        ruleset = applied(ruleset, [vec![target], rules.to_vec()].concat());
        let (_, table) = ruleset.tables().next().expect("a table");
        let (known, _) = table.chains.get_key_value("c").expect("the chain");
        let rules: Vec<&Rule> = table.chains["nat"].rules.values().collect();
        assert!(matches!(&rules[0].effects[..], [Effect::Go(to)] if Arc::ptr_eq(to, known)));
        let [one, other] = [0, 1].map(|at: usize| rules[at].service.clone().expect("a name").0);
        assert!(Arc::ptr_eq(&one, &other));
    }

    #[test]
    fn an_anonymous_map_that_takes_a_name_before_its_former_owner_goes_is_kept() {
        let map: Name = "__map0".into();
        let element = || (Box::from([0]), Element::Data([10, 0, 0, 1, 0, 80, 0, 0].into()));
        let ruleset = applied(
            Ruleset::default(),
            vec![
                Change::NewTable { dormant: false },
                Change::NewMap { map: map.clone(), handle: 1, numbered: None },
                Change::NewElements { set: map.clone(), elements: vec![element()] },
                Change::NewMap { map: map.clone(), handle: 2, numbered: None },
                Change::DeleteSet { set: map.clone(), handle: 1 },
            ],
        );
        let (_, table) = ruleset.tables().next().expect("a table");
        assert_eq!(table.maps[&map], Map { handle: 2, ..Map::default() });
    }
}

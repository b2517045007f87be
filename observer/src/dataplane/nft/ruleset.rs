//! The model of the node's `nf_tables` rules, kept up to date message by message.
//!
//! Pure. Messages are applied in the kernel's order; the same types rebuild it from a dump. Tables
//! are kept whole, chains keep only rules that have effects, sets that are not maps are left out.

use std::collections::HashMap;

use super::messages::{Change, TableId};
use crate::dataplane::reach::{self, Reached};
use crate::dataplane::rules::{Map, Table};

/// A message about a table or chain that the model does not have: something was missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Every table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    tables: HashMap<TableId, Table>,
}

impl Ruleset {
    /// Applies one message.
    ///
    /// # Errors
    /// When it is about something the model does not have.
    pub fn apply(&mut self, id: TableId, change: Change) -> Result<(), Unexpected> {
        match change {
            Change::NewTable { dormant } => {
                self.tables.entry(id).or_default().dormant = dormant;
                Ok(())
            }
            Change::DeleteTable => {
                self.tables.remove(&id);
                Ok(())
            }
            change => apply(self.tables.get_mut(&id).ok_or(Unexpected)?, change),
        }
    }

    /// Its tables.
    pub fn tables(&self) -> impl Iterator<Item = (&TableId, &Table)> {
        self.tables.iter()
    }

    /// What one table sends new connections to; nothing when it does not exist.
    #[must_use]
    pub fn reached(&self, id: &TableId) -> Reached {
        self.tables.get(id).map(reach::walk).unwrap_or_default()
    }
}

fn apply(table: &mut Table, change: Change) -> Result<(), Unexpected> {
    match change {
        // Both are about the table itself.
        Change::NewTable { .. } | Change::DeleteTable => {}
        // An existing chain is announced again when something of it changes; its rules stay.
        Change::NewChain { chain, entry } => table.chains.entry(chain).or_default().entry = entry,
        Change::DeleteChain { chain } => {
            table.chains.remove(&chain);
        }
        Change::NewRule { chain, handle, rule } => {
            let chain = table.chains.get_mut(&chain).ok_or(Unexpected)?;
            if rule.effects.is_empty() {
                chain.rules.remove(&handle);
            } else {
                chain.rules.insert(handle, rule);
            }
        }
        Change::DeleteRule { chain, handle } => {
            table.chains.get_mut(&chain).ok_or(Unexpected)?.rules.remove(&handle);
        }
        Change::NewMap { map, handle } => {
            let map = table.maps.entry(map).or_default();
            if map.handle != handle {
                *map = Map { handle, ..Map::default() };
            }
        }
        // With another handle it is the former owner of a name that is already used again.
        Change::DeleteSet { set, handle } => {
            if table.maps.get(&set).is_some_and(|map| map.handle == handle) {
                table.maps.remove(&set);
            }
        }
        Change::NewElements { set, elements } => {
            if let Some(map) = table.maps.get_mut(&set) {
                map.elements.extend(elements);
            }
        }
        Change::DeleteElements { set, keys } => {
            if let Some(map) = table.maps.get_mut(&set) {
                for key in &keys {
                    map.elements.remove(key);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::nft::TableFamily;
    use crate::dataplane::rules::{Effect, Element, Family, Name, PortSource, Rule};
    use crate::facts::Protocol;

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
        for change in changes {
            assert_eq!(ruleset.apply(id(), change), Ok(()));
        }
        ruleset
    }

    proptest! {
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

//! The model of the node's nf_tables rules, kept up to date message by message.
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

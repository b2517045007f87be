//! Which maps the programs watch: a change of one, by whatever process, is told as a
//! [`MapCommit`](crate::facts::Happening::MapCommit).

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData};
use observer_common::MAP_COMMIT_WINDOW_NS;

/// After a change of a map is told, others within this time are not.
pub const MAP_COMMIT_WINDOW: Duration = Duration::from_nanos(MAP_COMMIT_WINDOW_NS);

/// The map that the daemon writes.
pub struct WatchedMaps {
    told_at: HashMap<MapData, u32, u64>,
    ids: BTreeSet<u32>,
}

impl WatchedMaps {
    /// Takes the map out of a loaded object.
    ///
    /// # Errors
    /// When it is missing or of another type: the object is not this daemon's.
    pub fn new(mut take: impl FnMut(&str) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        Ok(Self { told_at: take("WATCHED_MAPS")?.try_into()?, ids: BTreeSet::new() })
    }

    /// Watches exactly the maps with these ids.
    ///
    /// # Errors
    /// When there are more than the programs have room for.
    pub fn set(&mut self, ids: &BTreeSet<u32>) -> anyhow::Result<()> {
        for gone in self.ids.difference(ids) {
            self.told_at.remove(gone).context("cannot cease to watch a map")?;
        }
        self.ids.retain(|id| ids.contains(id));
        for id in ids {
            if !self.ids.contains(id) {
                self.told_at.insert(id, 0, 0).context("cannot watch a map")?;
                self.ids.insert(*id);
            }
        }
        Ok(())
    }
}

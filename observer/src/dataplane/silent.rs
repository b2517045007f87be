//! Tables that do not announce their changes: read whole whenever a kernel hook tells of a commit,
//! and compared with what they held before.
//!
//! Shell of the readers in [`legacy`](super::legacy), [`ipvs`](super::ipvs) and
//! [`cilium`](super::cilium). Each table is read on a thread of its own; one that cannot be read is
//! unknown, and said to be, until it can.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tracing::warn;

use super::reach::Reached;
use super::rules::Family;
use super::{Counters, Dataplane, Settings, Unreadable, cilium, ipvs, legacy};
use crate::clock::{self, WallOffset};
use crate::facts::BootNs;
use crate::kernel::watched::MAP_COMMIT_WINDOW;

/// A legacy commit took effect during the setsockopt call, whose end is what is reported. The call
/// was measured with 83 MB of rules (10,000 Services of 5 endpoints): 0.49 s, which is 6 ns for
/// each byte; and with the smallest table, well below the constant part.
const LEGACY_CALL: Duration = Duration::from_millis(2);
const LEGACY_CALL_PER_BYTE: Duration = Duration::from_nanos(10);
/// A change of a map took effect during a system call of microseconds, during which its task may
/// have had to wait for a processor.
const MAP_CALL: Duration = Duration::from_millis(1);
/// How long an IPVS call may take whose length the hook could not tell: it has a mutex before the
/// hook runs and waits for nothing then.
const IPVS_CALL: Duration = Duration::from_millis(1);
/// How often a table that changes without notice is read until two readings agree.
const ATTEMPTS: usize = 5;
/// The chain that marks a table as kube-proxy's, in iptables mode.
pub(super) const KUBE_SERVICES: &str = "KUBE-SERVICES";

/// One table that does not announce its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SilentTable {
    /// The legacy nat table of an IP version.
    Legacy(Family),
    /// All virtual services of IPVS.
    Ipvs,
    /// Cilium's maps.
    Cilium,
}

impl SilentTable {
    /// The legacy nat tables of both IP versions.
    pub const LEGACY: [Self; 2] = [Self::Legacy(Family::V4), Self::Legacy(Family::V6)];

    /// How long after a commit that was told others may follow that are not.
    pub(super) fn window(self) -> Duration {
        match self {
            Self::Legacy(_) | Self::Ipvs => Duration::ZERO,
            Self::Cilium => MAP_COMMIT_WINDOW,
        }
    }

    /// The dataplane it is part of.
    #[must_use]
    pub fn dataplane(self) -> Dataplane {
        match self {
            Self::Legacy(_) => Dataplane::IptablesLegacy,
            Self::Ipvs => Dataplane::Ipvs,
            Self::Cilium => Dataplane::Cilium,
        }
    }

    /// Whether the kernel hands it out in pieces, so that a change may fall between two of them.
    fn comes_in_pieces(self) -> bool {
        match self {
            Self::Legacy(_) => false,
            Self::Ipvs | Self::Cilium => true,
        }
    }
}

impl fmt::Display for SilentTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Legacy(Family::V4) => f.write_str("iptables-legacy (IPv4)"),
            Self::Legacy(Family::V6) => f.write_str("iptables-legacy (IPv6)"),
            Self::Ipvs | Self::Cilium => self.dataplane().fmt(f),
        }
    }
}

/// A table as it was at one moment.
#[derive(Debug, Default)]
pub struct Reading {
    /// What it sends new connections to.
    pub reached: Reached,
    /// Whether it serves Services.
    pub in_use: bool,
    /// How long before the end of the call that wrote it, which is what the hook reports, it may
    /// have taken effect.
    pub call: Duration,
}

/// Reads one table.
enum Reader {
    Legacy(legacy::Reader),
    Ipvs(ipvs::Reader),
    Cilium(cilium::Reader),
}

impl Reader {
    /// Blocks for as long as the kernel copies.
    fn read(&self) -> anyhow::Result<Reading> {
        match self {
            Self::Legacy(reader) => {
                let reading = reader.read()?;
                let size = u32::try_from(reading.size_bytes).unwrap_or(u32::MAX);
                Ok(Reading {
                    reached: reading.evaluated.reached,
                    in_use: reading.evaluated.is_kube_proxys,
                    call: LEGACY_CALL + LEGACY_CALL_PER_BYTE * size,
                })
            }
            Self::Ipvs(reader) => {
                let table = reader.read()?;
                let in_use = table.services > 0;
                Ok(Reading { reached: table.reached, in_use, call: IPVS_CALL })
            }
            Self::Cilium(reader) => {
                let reached = reader.read()?;
                let in_use = !reached.backends.is_empty();
                Ok(Reading { reached, in_use, call: MAP_CALL })
            }
        }
    }
}

/// All such tables of this network namespace, and what is not known of them.
pub(super) struct SilentTables {
    readers: HashMap<SilentTable, Arc<Reader>>,
    counters: Arc<Counters>,
    in_use: BTreeSet<SilentTable>,
    /// Everything up to here was read.
    read_at: BTreeMap<SilentTable, BootNs>,
    /// The tables that were not read yet or could not be, and since when they are unknown.
    unread_since: BTreeMap<SilentTable, BootNs>,
    /// Those whose latest reading failed.
    unreadable: BTreeMap<SilentTable, Unreadable>,
}

impl SilentTables {
    /// Opens what is needed to read them, in this thread's network namespace.
    pub(super) fn open(settings: &Settings) -> anyhow::Result<Self> {
        let mut readers = HashMap::new();
        for family in [Family::V4, Family::V6] {
            if let Some(reader) = legacy::Reader::open(family)? {
                readers.insert(SilentTable::Legacy(family), Arc::new(Reader::Legacy(reader)));
            }
        }
        let ipvs = ipvs::Reader::new(settings.counters.clone());
        readers.insert(SilentTable::Ipvs, Arc::new(Reader::Ipvs(ipvs)));
        let required = settings.dataplane == Some(Dataplane::Cilium);
        let cilium = cilium::Reader::new(settings.cilium_maps.clone(), required);
        readers.insert(SilentTable::Cilium, Arc::new(Reader::Cilium(cilium)));
        if let Some(only) = settings.dataplane {
            readers.retain(|table: &SilentTable, _| table.dataplane() == only);
        }
        Ok(Self {
            readers,
            counters: settings.counters.clone(),
            in_use: BTreeSet::new(),
            read_at: BTreeMap::new(),
            unread_since: BTreeMap::new(),
            unreadable: BTreeMap::new(),
        })
    }

    /// Those that this kernel may have.
    pub(super) fn all(&self) -> Vec<SilentTable> {
        self.readers.keys().copied().collect()
    }

    /// The dataplanes whose tables serve Services.
    pub(super) fn in_use(&self) -> impl Iterator<Item = Dataplane> {
        self.in_use.iter().map(|table| table.dataplane())
    }

    /// What became of a table since `from` is unknown until it is read. One that is not followed is
    /// nobody's concern.
    pub(super) fn unread(&mut self, table: SilentTable, from: BootNs) {
        if !self.readers.contains_key(&table) {
            return;
        }
        let since = self.unread_since.entry(table).or_insert(from);
        *since = from.min(*since);
    }

    /// The tables that are unknown, and since when.
    pub(super) fn all_unread(&self) -> BTreeMap<SilentTable, BootNs> {
        self.unread_since.clone()
    }

    pub(super) fn is_unread(&self, table: SilentTable) -> bool {
        self.unread_since.contains_key(&table)
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.unread_since.is_empty()
    }

    /// The tables whose latest reading failed.
    pub(super) fn unreadable(&self) -> Vec<Unreadable> {
        self.unreadable.values().cloned().collect()
    }

    /// The moment up to which a table was read last.
    pub(super) fn read_at(&self, table: SilentTable) -> Option<BootNs> {
        self.read_at.get(&table).copied()
    }

    /// As [`Self::read`], of a table whose changes nothing tells of, or nobody has heard of yet: two
    /// readings have to agree when one may be torn.
    pub(super) async fn read_unannounced(&mut self, table: SilentTable) -> Option<Reading> {
        let mut reading = self.read(table).await?;
        if !table.comes_in_pieces() {
            return Some(reading);
        }
        for _ in 0..ATTEMPTS {
            let again = self.read(table).await?;
            if again.reached == reading.reached {
                return Some(again);
            }
            self.counters.interrupted_reads.increase();
            reading = again;
        }
        self.note_failure(table, format!("it changed during each of {ATTEMPTS} readings"));
        None
    }

    /// A table as it is now; `None` when it cannot be read, which stays to be said by
    /// [`Self::unread`].
    pub(super) async fn read(&mut self, table: SilentTable) -> Option<Reading> {
        let reader = self.readers.get(&table)?.clone();
        self.counters.table_reads.increase();
        let begun = clock::now();
        let reading = spawn_blocking(move || reader.read()).await;
        let reading = match reading.map_err(anyhow::Error::new) {
            Ok(Ok(reading)) => reading,
            Ok(Err(error)) | Err(error) => {
                self.note_failure(table, format!("{error:#}"));
                return None;
            }
        };
        self.unread_since.remove(&table);
        self.unreadable.remove(&table);
        self.read_at.insert(table, begun);
        if reading.in_use {
            self.in_use.insert(table);
        } else {
            self.in_use.remove(&table);
        }
        Some(reading)
    }

    /// Says so once for each reason.
    fn note_failure(&mut self, table: SilentTable, why: String) {
        self.counters.table_failures.increase();
        let unreadable = self.unreadable.entry(table).or_insert_with(|| Unreadable {
            table,
            since: WallOffset::measure().to_timestamp(clock::now()),
            why: String::new(),
        });
        if unreadable.why != why {
            unreadable.why = why;
            warn!("{unreadable}");
        }
    }
}

//! The kernel's exact counts. Cumulative per CPU, only ever read: summing never loses a count.

use anyhow::Context as _;
use aya::maps::{Map, MapData, PerCpuArray, PerCpuHashMap};
use observer_common::{ArrivalCount, ArrivalKey, SignalCounts, outcome, signal, source};

use super::decode::address;
use crate::facts::{Arrivals, BootNs, Origin, Outcome};

/// Names of [`observer_common::signal`]s, by index, as metrics show them.
pub const SIGNAL_NAMES: [&str; signal::COUNT as usize] = [
    "connect_failed",
    "passive_open",
    "listener_opened",
    "listener_closed",
    "refused",
    "stray_reset",
    "reset_sent",
    "reset_received",
    "connect_error",
    "icmp_unreachable",
    "netfilter_drop",
    "process_signalled",
    "process_exited",
    "oom_killed",
    "legacy_commit",
    "ipvs_commit",
    "map_commit",
    "legacy_call",
    "cgroup_made",
];

/// One reading of everything the kernel counts.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Per signal, in the order of [`SIGNAL_NAMES`].
    pub signals: Vec<SignalCounts>,
    /// Failed connects by errno, without the zeros.
    pub errnos: Vec<(u32, u64)>,
    /// New connections at local pods.
    pub arrivals: Vec<Arrivals>,
}

/// The maps that hold the counts.
pub struct Counters {
    signals: PerCpuArray<MapData, SignalCounts>,
    errnos: PerCpuArray<MapData, u64>,
    arrivals: PerCpuHashMap<MapData, ArrivalKey, ArrivalCount>,
}

impl Counters {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    /// When a map is missing or of another type: the object is not this daemon's.
    pub fn new(mut take: impl FnMut(&str) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        Ok(Self {
            signals: take("SIGNAL_TO_COUNTS")?.try_into()?,
            errnos: take("ERRNO_TO_COUNT")?.try_into()?,
            arrivals: take("ARRIVAL_TO_COUNT")?.try_into()?,
        })
    }

    /// Reads and sums over the CPUs.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn read(&self) -> anyhow::Result<Reading> {
        let signals = (0..signal::COUNT)
            .map(|index| Ok(self.signals.get(&index, 0)?.iter().fold(SignalCounts::default(), add)))
            .collect::<anyhow::Result<_>>()
            .context("cannot read the signal counts")?;
        let mut errnos = Vec::new();
        for index in 0..self.errnos.len() {
            let sum =
                self.errnos.get(&index, 0).context("cannot read the errno counts")?.iter().sum();
            if sum > 0 {
                errnos.push((index, sum));
            }
        }
        Ok(Reading { signals, errnos, arrivals: self.read_arrivals()? })
    }

    fn read_arrivals(&self) -> anyhow::Result<Vec<Arrivals>> {
        let mut arrivals = Vec::new();
        for key in self.arrivals.keys() {
            let key = key.context("cannot walk the arrival counts")?;
            // Absent: deleted since the walk began.
            if let Ok(per_cpu) = self.arrivals.get(&key, 0) {
                arrivals.extend(sum_arrivals(&key, &per_cpu));
            }
        }
        Ok(arrivals)
    }

    /// Deletes the counts of addresses that no pod of this node has had for long, so that the map
    /// does not fill up.
    ///
    /// # Errors
    /// When an entry cannot be deleted.
    pub fn forget(&mut self, is_stale: impl Fn(&Arrivals) -> bool) -> anyhow::Result<()> {
        let keys: Vec<ArrivalKey> = self.arrivals.keys().flatten().collect();
        for key in keys {
            let Ok(per_cpu) = self.arrivals.get(&key, 0) else { continue };
            if sum_arrivals(&key, &per_cpu).is_none_or(|arrivals| is_stale(&arrivals)) {
                self.arrivals.remove(&key).context("cannot delete an arrival count")?;
            }
        }
        Ok(())
    }
}

fn add(sum: SignalCounts, cpu: &SignalCounts) -> SignalCounts {
    SignalCounts {
        seen: sum.seen + cpu.seen,
        suppressed: sum.suppressed + cpu.suppressed,
        ring_full: sum.ring_full + cpu.ring_full,
        map_full: sum.map_full + cpu.map_full,
    }
}

/// `None` for a key that this daemon cannot interpret.
fn sum_arrivals(key: &ArrivalKey, per_cpu: &[ArrivalCount]) -> Option<Arrivals> {
    Some(Arrivals {
        address: address(key.address),
        netns_cookie: key.netns_cookie,
        port: key.port,
        outcome: match key.outcome {
            outcome::ACCEPTED => Outcome::Accepted,
            outcome::REFUSED => Outcome::Refused,
            _ => return None,
        },
        origin: match key.source {
            source::NODE => Origin::Node,
            source::SAME_NODE => Origin::SameNode,
            source::CLUSTER => Origin::Cluster,
            source::EXTERNAL => Origin::External,
            _ => Origin::Unclassified,
        },
        count: per_cpu.iter().map(|cpu| cpu.count).sum(),
        last: BootNs(per_cpu.iter().map(|cpu| cpu.last_boot_ns).max().unwrap_or_default()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_summed_and_the_latest_stamp_wins() {
        let key = ArrivalKey {
            address: observer_common::Ip::mapped(u32::from_ne_bytes([10, 0, 0, 7])),
            netns_cookie: 5,
            port: 8080,
            outcome: outcome::REFUSED,
            source: source::EXTERNAL,
            reserved: 0,
        };
        let cpus = [
            ArrivalCount { count: 2, last_boot_ns: 90 },
            ArrivalCount { count: 3, last_boot_ns: 40 },
            ArrivalCount::default(),
        ];
        let sum = sum_arrivals(&key, &cpus).expect("known outcome");
        assert_eq!((sum.count, sum.last), (5, BootNs(90)));
        assert_eq!(sum.address, std::net::Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!((sum.outcome, sum.origin), (Outcome::Refused, Origin::External));
        assert_eq!(sum_arrivals(&ArrivalKey { outcome: 9, ..key }, &cpus), None);
    }
}

//! What the programs are told at run time: this node's pod addresses, and which source an address
//! range stands for.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Context as _;
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use observer_common::{Ip, ProbedPort, source};

use crate::facts::Origin;

/// An address range in CIDR notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Any address of the range.
    pub address: IpAddr,
    /// Leading bits that count: 0 to 32 for IPv4, 0 to 128 for IPv6.
    pub prefix: u8,
}

/// The maps that the daemon writes.
pub struct Addresses {
    local: HashMap<MapData, Ip, u8>,
    ranges: LpmTrie<MapData, Ip, u8>,
    present: BTreeSet<IpAddr>,
    probed: HashMap<MapData, ProbedPort, u8>,
    probes: BTreeSet<(IpAddr, u16)>,
}

impl Addresses {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    /// When a map is missing or of another type: the object is not this daemon's.
    pub fn new(mut take: impl FnMut(&str) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        Ok(Self {
            local: take("LOCAL_ADDRESSES")?.try_into()?,
            ranges: take("RANGE_TO_SOURCE")?.try_into()?,
            present: BTreeSet::new(),
            probed: take("PROBED_PORTS")?.try_into()?,
            probes: BTreeSet::new(),
        })
    }

    /// Says where connections from a range come from.
    ///
    /// # Errors
    /// When the map is full.
    pub fn classify(&mut self, range: Range, origin: Origin) -> anyhow::Result<()> {
        let value = match origin {
            Origin::Node => source::NODE,
            Origin::SameNode => source::SAME_NODE,
            Origin::Cluster => source::CLUSTER,
            Origin::External => source::EXTERNAL,
            Origin::Unclassified => source::UNCLASSIFIED,
        };
        self.ranges.insert(&key(range), value, 0).with_context(|| {
            format!("cannot add the range {}/{} to the source map", range.address, range.prefix)
        })
    }

    /// Makes the programs count arrivals at exactly these pod addresses, and take connections from
    /// them as from the same node.
    ///
    /// # Errors
    /// The first one, when a map is full: every address that it has room for is set all the same.
    pub fn set_local(&mut self, wanted: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        let Self { local, ranges, present, .. } = self;
        let set = |address: &IpAddr, present| {
            let (address, range) = (ip(*address), key(Range::host(*address)));
            if present {
                ranges.insert(&range, source::SAME_NODE, 0)?;
                return local.insert(address, 1, 0);
            }
            absent_is_removed(local.remove(&address))?;
            absent_is_removed(ranges.remove(&range))
        };
        bring_into_line(present, wanted, set).context("cannot watch a pod address")
    }

    /// Makes the programs take connections from the node itself to exactly these pod ports for the
    /// kubelet's probes.
    ///
    /// # Errors
    /// The first one, when the map is full: every port that it has room for is set all the same.
    pub fn set_probed(&mut self, wanted: &BTreeSet<(IpAddr, u16)>) -> anyhow::Result<()> {
        let Self { probed, probes, .. } = self;
        let set = |port: &(IpAddr, u16), present| {
            let port = probed_port(*port);
            if present {
                probed.insert(port, 1, 0)
            } else {
                absent_is_removed(probed.remove(&port))
            }
        };
        bring_into_line(probes, wanted, set).context("cannot tell probes of a pod apart")
    }
}

/// Removes what is present and not wanted, then adds what is wanted and not present: `set` makes one
/// present or not. What fails is tried again the next time and keeps nothing else from being done.
fn bring_into_line<T: Clone + Ord, E>(
    present: &mut BTreeSet<T>,
    wanted: &BTreeSet<T>,
    mut set: impl FnMut(&T, bool) -> Result<(), E>,
) -> Result<(), E> {
    let gone: Vec<T> = present.difference(wanted).cloned().collect();
    let new: Vec<T> = wanted.difference(present).cloned().collect();
    let mut outcome = Ok(());
    for item in gone {
        match set(&item, false) {
            Ok(()) => {
                present.remove(&item);
            }
            Err(error) => outcome = outcome.and(Err(error)),
        }
    }
    for item in new {
        match set(&item, true) {
            Ok(()) => {
                present.insert(item);
            }
            Err(error) => outcome = outcome.and(Err(error)),
        }
    }
    outcome
}

fn absent_is_removed(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        removed => removed,
    }
}

fn probed_port((address, port): (IpAddr, u16)) -> ProbedPort {
    ProbedPort { address: ip(address), port: u32::from(port), reserved: 0 }
}

impl Range {
    /// The range of one address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self { address, prefix: if address.is_ipv4() { 32 } else { 128 } }
    }
}

fn key(range: Range) -> Key<Ip> {
    let mapped = if range.address.is_ipv4() { 96 } else { 0 };
    Key::new(u32::from(range.prefix) + mapped, ip(range.address))
}

fn ip(address: IpAddr) -> Ip {
    Ip::from_octets(match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_nothing_else_from_being_done_and_is_tried_again() {
        let mut present = BTreeSet::from([1, 2, 3]);
        let wanted = BTreeSet::from([3, 4, 5]);
        let fails = |number: &i32, _| if matches!(number, 1 | 4) { Err(*number) } else { Ok(()) };
        assert_eq!(bring_into_line(&mut present, &wanted, fails), Err(1), "the first is told");
        assert_eq!(present, BTreeSet::from([1, 3, 5]));
        let mut tried = Vec::new();
        let works = |number: &i32, wanted| {
            tried.push((*number, wanted));
            Ok::<(), i32>(())
        };
        assert_eq!(bring_into_line(&mut present, &wanted, works), Ok(()));
        assert_eq!((present, tried), (wanted, vec![(1, false), (4, true)]));
    }

    #[test]
    fn an_ipv4_range_is_keyed_below_the_mapped_prefix() {
        let range = Range { address: "10.0.0.0".parse().expect("address"), prefix: 8 };
        assert_eq!(key(range).prefix_len(), 104);
        let range = Range { address: "fd00::".parse().expect("address"), prefix: 8 };
        assert_eq!(key(range).prefix_len(), 8);
    }
}

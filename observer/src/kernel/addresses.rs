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
    /// When a map is full; the addresses before it are set.
    pub fn set_local(&mut self, wanted: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        for gone in self.present.difference(wanted).copied().collect::<Vec<_>>() {
            self.local.remove(&ip(gone)).context("cannot remove a pod address")?;
            self.ranges.remove(&key(Range::host(gone))).context("cannot remove a pod source")?;
            self.present.remove(&gone);
        }
        for new in wanted.difference(&self.present).copied().collect::<Vec<_>>() {
            self.local
                .insert(ip(new), 1, 0)
                .with_context(|| format!("cannot watch the pod address {new}"))?;
            self.classify(Range::host(new), Origin::SameNode)?;
            self.present.insert(new);
        }
        Ok(())
    }
}

impl Addresses {
    /// Makes the programs take connections from the node itself to exactly these pod ports for the
    /// kubelet's probes.
    ///
    /// # Errors
    /// When the map is full; the ports before it are set.
    pub fn set_probed(&mut self, wanted: &BTreeSet<(IpAddr, u16)>) -> anyhow::Result<()> {
        for gone in self.probes.difference(wanted).copied().collect::<Vec<_>>() {
            match self.probed.remove(&probed(gone)) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error).context("cannot remove a probed port"),
            }
            self.probes.remove(&gone);
        }
        for new in wanted.difference(&self.probes).copied().collect::<Vec<_>>() {
            let context = || format!("cannot tell probes of {}:{} apart", new.0, new.1);
            self.probed.insert(probed(new), 1, 0).with_context(context)?;
            self.probes.insert(new);
        }
        Ok(())
    }
}

fn probed((address, port): (IpAddr, u16)) -> ProbedPort {
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
    fn an_ipv4_range_is_keyed_below_the_mapped_prefix() {
        let range = Range { address: "10.0.0.0".parse().expect("address"), prefix: 8 };
        assert_eq!(key(range).prefix_len(), 104);
        let range = Range { address: "fd00::".parse().expect("address"), prefix: 8 };
        assert_eq!(key(range).prefix_len(), 8);
    }
}

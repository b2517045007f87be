//! Where connections come from: which addresses are the node's, the cluster's, or neither.

use std::net::IpAddr;

use anyhow::Context as _;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};

use crate::facts::Origin;
use crate::kernel::addresses::{Addresses, Range};

/// Tells the programs the cluster's ranges; with those known, all others are external.
///
/// # Errors
/// When there are more than the programs have room for.
pub(super) fn classify_ranges(addresses: &mut Addresses, cluster: &[Range]) -> anyhow::Result<()> {
    if !cluster.is_empty() {
        for everything in ["0.0.0.0", "::"] {
            let address = everything.parse().context("an unspecified address")?;
            addresses.classify(Range { address, prefix: 0 }, Origin::External)?;
        }
    }
    for range in cluster {
        addresses.classify(*range, Origin::Cluster)?;
    }
    Ok(())
}

/// Tells the programs the node's own addresses. To be repeated when pods come: the first one may
/// bring the bridge that the kubelet's connections to pods come from.
///
/// # Errors
/// When they cannot be listed, or are more than the programs have room for.
pub(super) fn classify_node(addresses: &mut Addresses) -> anyhow::Result<()> {
    for interface in getifaddrs().context("cannot list the node's addresses")? {
        if let Some(address) = address(&interface) {
            addresses.classify(Range::host(address), Origin::Node)?;
        }
    }
    Ok(())
}

fn address(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

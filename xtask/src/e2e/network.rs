//! The machine as a cluster of two nodes: pods behind each node as a point-to-point CNI plugin
//! attaches them, a client that is a pod of each node, the control plane's host, and an outside
//! host.
//!
//! The control plane's host routes between the nodes, so that pods reach each other untranslated.
//! Every address is private (RFC 1918, RFC 4193) and nothing routes out of the namespaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use crate::lab::netns::Namespace;
use crate::lab::network::{Addresses, connect};

/// The nodes' names.
pub(crate) const NODES: [&str; 2] = ["node-1", "node-2"];
/// The control plane's host.
const CONTROL: Addresses = Addresses {
    v4: Ipv4Addr::new(10, 99, 0, 100),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x99, 0, 0, 0, 0, 0x100),
};
/// In none of the cluster's ranges.
const OUTSIDE: Addresses = Addresses {
    v4: Ipv4Addr::new(10, 200, 0, 2),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x200, 0, 0, 0, 0, 2),
};
/// A node's client is the last pod of its range: the others are free from [`FIRST_POD`] on.
const CLIENT: u8 = 254;
/// The first number of a pod; the last is one less than the client's.
pub(crate) const FIRST_POD: u8 = 2;

/// A node and what is on it.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its name in the API.
    pub(crate) name: &'static str,
    /// Where its processes run.
    pub(crate) namespace: Namespace,
    /// A pod that nobody deletes, to connect from.
    pub(crate) client: Namespace,
    /// The node's own addresses.
    pub(crate) addresses: Addresses,
    /// The third part of its pods' IPv4 addresses, the fourth of their IPv6 addresses.
    range: u8,
}

impl Node {
    /// The ranges of its pods, as `spec.podCIDRs` says them.
    pub(crate) fn pod_cidrs(&self) -> [String; 2] {
        pod_cidrs(self.range)
    }

    /// The addresses of its `number`-th pod: from [`FIRST_POD`] to 253.
    pub(crate) fn pod_addresses(&self, number: u8) -> Addresses {
        pod_addresses(self.range, number)
    }

    /// The addresses of [`Node::client`].
    pub(crate) fn client_addresses(&self) -> Addresses {
        self.pod_addresses(CLIENT)
    }

    /// Makes the namespace of its pod `number`, which no other pod of this run has, and connects
    /// it. A reused address moves to the new pod.
    pub(crate) fn add_pod(&self, number: u32, addresses: Addresses) -> Result<Namespace> {
        self.attach(&format!("pod{number}"), addresses)
    }

    fn attach(&self, link: &str, addresses: Addresses) -> Result<Namespace> {
        let pod = Namespace::create(&format!("{}-{link}", self.name))?;
        connect(&self.namespace, self.addresses, &pod, link, addresses)?;
        Ok(pod)
    }

    fn build(index: usize, control: &Namespace) -> Result<Self> {
        let (name, range) = (NODES[index], u8::try_from(index + 1)?);
        let namespace = router(name)?;
        let addresses = Addresses {
            v4: Ipv4Addr::new(10, 99, 0, range),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x99, 0, 0, 0, 0, range.into()),
        };
        connect(control, CONTROL, &namespace, name, addresses)?;
        let mut node = Self { name, client: namespace.clone(), namespace, addresses, range };
        let via: [IpAddr; 2] = [addresses.v4.into(), addresses.v6.into()];
        for (pods, via) in node.pod_cidrs().iter().zip(via) {
            control.ip(&format!("route add {pods} via {via} dev {name} onlink\n"))?;
        }
        node.client = node.attach("client", node.client_addresses())?;
        many_connections(&node.client)?;
        Ok(node)
    }
}

/// All the namespaces that a cluster has before its pods.
#[derive(Debug)]
pub(crate) struct Network {
    /// Where the control plane runs.
    pub(crate) control: Namespace,
    /// A host that is not part of the cluster.
    pub(crate) outside: Namespace,
    /// In the order of [`NODES`].
    pub(crate) nodes: [Node; 2],
}

impl Network {
    /// Builds and connects them.
    pub(crate) fn build() -> Result<Self> {
        let build = || -> Result<Self> {
            let control = router("control")?;
            let outside = Namespace::create("outside")?;
            connect(&control, CONTROL, &outside, "outside", OUTSIDE)?;
            many_connections(&outside)?;
            let nodes = [Node::build(0, &control)?, Node::build(1, &control)?];
            Ok(Self { control, outside, nodes })
        };
        build().context("cannot build the cluster's network")
    }

    /// The address that the API server has for everyone.
    pub(crate) fn control_address() -> Ipv4Addr {
        CONTROL.v4
    }
}

fn pod_cidrs(range: u8) -> [String; 2] {
    [format!("10.244.{range}.0/24"), format!("fd00:10:244:{range}::/64")]
}

fn pod_addresses(range: u8, number: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::new(10, 244, range, number),
        v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, range.into(), 0, 0, 0, number.into()),
    }
}

fn router(name: &str) -> Result<Namespace> {
    let namespace = Namespace::create(name)?;
    namespace.set("net/ipv4/ip_forward", "1")?;
    namespace.set("net/ipv6/conf/all/forwarding", "1")?;
    Ok(namespace)
}

/// Thousands of short connections to one address: a port comes back as late as possible.
fn many_connections(client: &Namespace) -> Result<()> {
    client.set("net/ipv4/ip_local_port_range", "1024 65535")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::network::CLUSTER_CIDRS;

    /// The longest name of a network interface, in bytes.
    const LINK_BYTES: usize = 15;

    #[test]
    fn pods_are_in_their_nodes_range_and_the_clusters() {
        assert_eq!(pod_addresses(2, FIRST_POD).v4.to_string(), "10.244.2.2");
        assert_eq!(pod_addresses(2, CLIENT).v6.to_string(), "fd00:10:244:2::fe");
        assert_eq!(pod_cidrs(2), ["10.244.2.0/24", "fd00:10:244:2::/64"]);
        assert_eq!(CLUSTER_CIDRS, ["10.244.0.0/16", "fd00:10:244::/48"]);
    }

    #[test]
    fn any_number_of_a_pod_names_a_link() {
        assert!(format!("pod{}", u32::MAX).len() <= LINK_BYTES);
        assert!(NODES.iter().all(|name| name.len() <= LINK_BYTES));
    }
}

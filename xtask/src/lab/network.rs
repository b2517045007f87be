//! The machine as a cluster sees it: a node that forwards, pods behind it as a point-to-point CNI
//! plugin attaches them, a client that is a pod of another node, and an outside host.
//!
//! Every address is private (RFC 1918, RFC 4193) and nothing routes out of the namespaces.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, anyhow};

use super::netns::Namespace;

/// The node's own addresses, on the node's end of every link.
const NODE: Addresses = Addresses {
    v4: Ipv4Addr::new(10, 99, 0, 1),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x99, 0, 0, 0, 0, 1),
};
/// In another node's pod range, so that Service traffic from it is not masqueraded.
const CLIENT: Addresses = Addresses {
    v4: Ipv4Addr::new(10, 244, 1, 2),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 2),
};
/// In none of the cluster's ranges.
const OUTSIDE: Addresses = Addresses {
    v4: Ipv4Addr::new(10, 200, 0, 2),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x200, 0, 0, 0, 0, 2),
};
/// The ranges of the cluster's pods (`--cluster-cidr`).
pub const CLUSTER_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];
/// The name of the lab's only node.
pub const NODE_NAME: &str = "node-1";

/// An address family: `EndpointSlice` objects and rules exist once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order of a dual-stack cluster's `podIPs`.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// `addressType` of an `EndpointSlice`.
    #[must_use]
    pub fn address_type(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// The family that an address belongs to.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The cluster's pod range.
    pub(crate) fn cluster_cidr(self) -> &'static str {
        match self {
            Self::V4 => CLUSTER_CIDRS[0],
            Self::V6 => CLUSTER_CIDRS[1],
        }
    }

    /// The range that Service addresses come from.
    pub(crate) fn service_cidr(self) -> &'static str {
        match self {
            Self::V4 => "10.96.0.0/16",
            Self::V6 => "fd00:10:96::/112",
        }
    }

    /// The cluster address of the `number`-th Service.
    pub(crate) fn service_address(self, number: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
        }
    }
}

/// One address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// The addresses of the `number`-th pod of the node.
    pub(crate) fn of_pod(number: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(10, 244, 0, number),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, number.into()),
        }
    }

    /// The address of one family.
    #[must_use]
    pub fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// Where connections can be made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A pod of another node.
    Client,
    /// A host that is not part of the cluster.
    Outside,
    /// The node itself.
    Node,
}

/// The namespaces that every lab has.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) node: Namespace,
    client: Namespace,
    outside: Namespace,
}

impl Network {
    /// Builds node, client and outside, and connects them.
    pub(crate) fn build() -> Result<Self> {
        let node = Namespace::create("node")?;
        node.set("net/ipv4/ip_forward", "1")?;
        node.set("net/ipv6/conf/all/forwarding", "1")?;
        let network = Self {
            node,
            client: Namespace::create("client")?,
            outside: Namespace::create("outside")?,
        };
        network.attach(&network.client, "client", CLIENT)?;
        network.attach(&network.outside, "outside", OUTSIDE)?;
        // What the node itself sends to a Service is routed before it is translated.
        network.node.ip(&format!(
            "route add default via {} dev outside onlink\nroute add ::/0 via {} dev outside onlink\n",
            OUTSIDE.v4, OUTSIDE.v6
        ))?;
        for place in [&network.client, &network.outside] {
            // Thousands of short connections to one address: a port comes back as late as possible.
            place.set("net/ipv4/ip_local_port_range", "1024 65535")?;
        }
        Ok(network)
    }

    pub(crate) fn place(&self, place: Place) -> &Namespace {
        match place {
            Place::Client => &self.client,
            Place::Outside => &self.outside,
            Place::Node => &self.node,
        }
    }

    /// Makes the namespace of a pod and connects it. A reused address moves to the new pod.
    pub(crate) fn add_pod(&self, number: u32, addresses: Addresses) -> Result<Namespace> {
        let namespace = Namespace::create(&format!("pod{number}"))?;
        self.attach(&namespace, &format!("pod{number}"), addresses)?;
        Ok(namespace)
    }

    fn attach(&self, peer: &Namespace, link: &str, addresses: Addresses) -> Result<()> {
        connect(&self.node, NODE, peer, link, addresses)
    }
}

/// A veth with host routes, as the `ptp` CNI plugin makes them: `link` in `router`, which has the
/// addresses `own` there, and `eth0` in `peer`, which reaches everything over it.
pub(crate) fn connect(
    router: &Namespace,
    own: Addresses,
    peer: &Namespace,
    link: &str,
    addresses: Addresses,
) -> Result<()> {
    let Addresses { v4, v6 } = addresses;
    let (own4, own6) = (own.v4, own.v6);
    router.ip(&format!(
        "link add {link} type veth peer name eth0 netns {}\n\
         addr add {own4}/32 dev {link}\n\
         addr add {own6}/128 dev {link} nodad\n\
         link set {link} up\n",
        peer.name()
    ))?;
    peer.ip(&format!(
        "addr add {v4}/32 dev eth0\n\
         addr add {v6}/128 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via {own4} dev eth0 onlink\n\
         route add ::/0 via {own6} dev eth0 onlink\n"
    ))?;
    router.ip(&format!("route replace {v4}/32 dev {link}\nroute replace {v6}/128 dev {link}\n"))
}

/// The next free pod number: addresses end in it, and one byte holds 2 to 254.
pub(crate) fn pod_number(started: u32) -> Result<u8> {
    u8::try_from(started + 2)
        .ok()
        .filter(|number| *number < 255)
        .ok_or_else(|| anyhow!("a lab has addresses for 252 pods; reuse one or build a new lab"))
}

//! The bytes of Cilium's load-balancing maps, decoded.
//!
//! Pure. Layouts as declared in Cilium's `bpf/lib/common.h` (in newer sources `bpf/lib/lb.h`) and
//! `pkg/loadbalancer/maps/types.go`; each is known by its map's name and checked against the map's
//! own sizes. Addresses and ports lie in network order, everything else in the machine's.
//!
//! | map, here for IPv4 | since | key, in bytes | value, in bytes |
//! | --- | --- | --- | --- |
//! | `cilium_lb4_services_v2` | 1.6 | `lb4_key`: 12 (IPv6: 24) | `lb4_service`: 12 |
//! | `cilium_lb4_backends_v2` | 1.11 | id: 4 | `lb4_backend`: 8 (IPv6: 20) |
//! | `cilium_lb4_backends_v3` | 1.13 | id: 4 | the same and a cluster's id: 12 (IPv6: 24) |
//!
//! No release has a third version of the Services. Backends before their second version (Cilium
//! 1.10, ids of two bytes) are refused.

use std::net::IpAddr;

use crate::dataplane::rules::Family;

/// `SVC_FLAG_L7_LOADBALANCER` in `flags2` of a Service's entry: a proxy on the node takes its
/// connections and chooses where they go.
const TO_PROXY: u8 = 1 << 2;

/// Bytes of a map's keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of a key.
    pub key: usize,
    /// Of a value.
    pub value: usize,
}

/// Which of the two known layouts of backends a map has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendsVersion {
    /// Cilium 1.11 and 1.12.
    V2,
    /// Cilium 1.13 and later.
    V3,
}

/// Where a Service is reached: what a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frontend {
    /// A cluster, external or node address.
    pub address: IpAddr,
    /// The Service's port there.
    pub port: u16,
    /// As in the IP header; 0 for any, as releases before 1.17 write.
    pub protocol: u8,
    /// 0, or 1 for connections from inside the cluster where those have backends of their own
    /// (`externalTrafficPolicy` or `internalTrafficPolicy` is `Local`).
    pub scope: u8,
}

/// An entry of the Services' map: slot 0 says how many of the others count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Whose.
    pub frontend: Frontend,
    /// 0 for the frontend itself, otherwise which of its slots.
    pub number: u16,
    /// In slot 0: new connections go to the slots from 1 to this one. Those beyond hold backends
    /// that are terminating or fail their health checks.
    pub count: u16,
    /// In slot 0: a proxy takes the connections.
    pub to_proxy: bool,
    /// In the others: which backend.
    pub backend: u32,
}

/// An entry of the backends' map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Which slots name it by.
    pub id: u32,
    /// Where connections are sent.
    pub address: IpAddr,
    /// As above.
    pub port: u16,
    /// As in the IP header; 0 for any.
    pub protocol: u8,
    /// 0 for this cluster's, otherwise of another one whose addresses may be the same. (1.13 has
    /// one byte and padding here, on little-endian machines the same.)
    pub cluster: u16,
}

/// Sizes of the Services' map.
#[must_use]
pub fn service_sizes(family: Family) -> Sizes {
    Sizes { key: family.address_bytes() + 8, value: 12 }
}

/// Sizes of the backends' map.
#[must_use]
pub fn backend_sizes(family: Family, version: BackendsVersion) -> Sizes {
    let value = match version {
        BackendsVersion::V2 => family.address_bytes() + 4,
        BackendsVersion::V3 => family.address_bytes() + 8,
    };
    Sizes { key: 4, value }
}

/// Decodes an entry of the Services' map; `None` when it is not of [`service_sizes`].
#[must_use]
pub fn slot(family: Family, key: &[u8], value: &[u8]) -> Option<Slot> {
    let (address, [port_1, port_2, slot_1, slot_2, protocol, scope, _, _]) = split(family, key)?;
    let [id @ .., count_1, count_2, _, _, _flags, flags2, _, _] =
        <[u8; 12]>::try_from(value).ok()?;
    Some(Slot {
        frontend: Frontend { address, port: u16::from_be_bytes([port_1, port_2]), protocol, scope },
        number: u16::from_ne_bytes([slot_1, slot_2]),
        count: u16::from_ne_bytes([count_1, count_2]),
        to_proxy: flags2 & TO_PROXY != 0,
        backend: u32::from_ne_bytes(id),
    })
}

/// Decodes an entry of the backends' map; `None` when it is not of [`backend_sizes`].
#[must_use]
pub fn endpoint(
    family: Family,
    version: BackendsVersion,
    key: &[u8],
    value: &[u8],
) -> Option<Endpoint> {
    let (address, [port_1, port_2, protocol, _state], cluster) = match version {
        BackendsVersion::V2 => {
            let (address, rest) = split(family, value)?;
            (address, rest, 0)
        }
        BackendsVersion::V3 => {
            let (address, [rest @ .., cluster_1, cluster_2, _zone, _]) = split::<8>(family, value)?;
            (address, rest, u16::from_ne_bytes([cluster_1, cluster_2]))
        }
    };
    Some(Endpoint {
        id: u32::from_ne_bytes(key.try_into().ok()?),
        address,
        port: u16::from_be_bytes([port_1, port_2]),
        protocol,
        cluster,
    })
}

/// The address that bytes begin with, and exactly `N` more. An IPv4 address in an IPv6 map (NAT64)
/// is mapped.
fn split<const N: usize>(family: Family, bytes: &[u8]) -> Option<(IpAddr, [u8; N])> {
    let (address, rest) = bytes.split_at_checked(family.address_bytes())?;
    Some((family.address(address)?.to_canonical(), rest.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY_4: [u8; 12] = [10, 96, 0, 1, 0x01, 0xbb, 0, 0, 6, 1, 0, 0];

    fn with_slot(number: u16) -> [u8; 12] {
        let mut key = KEY_4;
        key[6..8].copy_from_slice(&number.to_ne_bytes());
        key
    }

    fn value(backend: u32, count: u16, flags2: u8) -> Vec<u8> {
        [&backend.to_ne_bytes()[..], &count.to_ne_bytes(), &[0, 7, 0x40, flags2, 0xff, 0xff]]
            .concat()
    }

    #[test]
    fn a_frontend_says_how_many_slots_count() {
        let entry = slot(Family::V4, &with_slot(0), &value(0x0100_0000, 258, 0));
        let address = [10, 96, 0, 1].into();
        let frontend = Frontend { address, port: 443, protocol: 6, scope: 1 };
        let expected =
            Slot { frontend, number: 0, count: 258, to_proxy: false, backend: 0x0100_0000 };
        assert_eq!(entry, Some(expected));
        let slot = slot(Family::V4, &with_slot(300), &value(70_000, 0, TO_PROXY)).expect("a slot");
        assert_eq!((slot.number, slot.backend, slot.to_proxy), (300, 70_000, true));
    }

    #[test]
    fn an_ipv6_frontend_differs_only_in_its_address() {
        let address: std::net::Ipv6Addr = "fd00::1".parse().expect("an address");
        let key = [&address.octets()[..], &with_slot(2)[4..]].concat();
        let slot = slot(Family::V6, &key, &value(5, 0, 0)).expect("a slot");
        assert_eq!((slot.frontend.address, slot.frontend.port), (address.into(), 443));
        assert_eq!((slot.number, slot.backend), (2, 5));
    }

    #[test]
    fn backends_of_both_versions_are_read() {
        let key = 70_000_u32.to_ne_bytes();
        let old = [10, 0, 0, 7, 0x1f, 0x90, 0, 1];
        let new = [&old[..], &2_u16.to_ne_bytes(), &[3, 0]].concat();
        let endpoint = |version, value| endpoint(Family::V4, version, &key, value);
        let address = [10, 0, 0, 7].into();
        let expected = Endpoint { id: 70_000, address, port: 8080, protocol: 0, cluster: 0 };
        assert_eq!(endpoint(BackendsVersion::V2, &old), Some(expected));
        assert_eq!(endpoint(BackendsVersion::V3, &new), Some(Endpoint { cluster: 2, ..expected }));
        assert_eq!(endpoint(BackendsVersion::V2, &new), None);
        assert_eq!(endpoint(BackendsVersion::V3, &old), None);
    }

    #[test]
    fn an_ipv4_backend_of_an_ipv6_service_is_read_as_ipv4() {
        let address = std::net::Ipv4Addr::new(10, 0, 0, 7);
        let value = [&address.to_ipv6_mapped().octets()[..], &[0, 80, 6, 0]].concat();
        let endpoint = endpoint(Family::V6, BackendsVersion::V2, &[0; 4], &value).expect("one");
        assert_eq!((endpoint.address, endpoint.protocol), (address.into(), 6));
    }

    proptest! {
        #[test]
        fn only_bytes_of_the_stated_sizes_are_decoded(
            key in proptest::collection::vec(any::<u8>(), 0..30),
            value in proptest::collection::vec(any::<u8>(), 0..30),
        ) {
            let given = Sizes { key: key.len(), value: value.len() };
            for family in [Family::V4, Family::V6] {
                let is_slot = slot(family, &key, &value).is_some();
                prop_assert_eq!(is_slot, given == service_sizes(family));
                for version in [BackendsVersion::V2, BackendsVersion::V3] {
                    let is_endpoint = endpoint(family, version, &key, &value).is_some();
                    prop_assert_eq!(is_endpoint, given == backend_sizes(family, version));
                }
            }
        }
    }
}

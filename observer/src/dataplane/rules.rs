//! The node's rules, reduced to what decides where a new connection may be sent.
//!
//! `nf_tables` messages decode into these types; the legacy nat table, which is only ever read
//! whole, is evaluated where it lies, by the same principles. Matches on addresses, marks,
//! probabilities and the order of rules are left out on purpose: a backend is whatever *some*
//! packet can be sent to, and kube-proxy never shadows one rule by another. A rule that sends
//! nowhere and goes nowhere reduces to no effects.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::facts::{Protocol, ServicePort};

/// A name within one table: of a chain, set or map.
pub type Name = Arc<str>;

/// IP version of an address, or of a legacy table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Length of its addresses, in bytes.
    #[must_use]
    pub fn address_bytes(self) -> usize {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// The address in network order at the start of `bytes`; `None` when there are too few.
    #[must_use]
    pub fn address(self, bytes: &[u8]) -> Option<IpAddr> {
        match self {
            Self::V4 => bytes.first_chunk().map(|&octets| Ipv4Addr::from_octets(octets).into()),
            Self::V6 => bytes.first_chunk().map(|&octets| Ipv6Addr::from_octets(octets).into()),
        }
    }
}

/// Where the port of a destination comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortSource {
    /// The rule itself.
    Fixed(u16),
    /// This byte of the map element's data, in network order.
    AtByte(usize),
}

/// What a rule may do to a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Jump or goto.
    Go(Name),
    /// Jump or goto to whatever chain an element of this verdict map names.
    GoByMap(Name),
    /// Destination NAT.
    Send(IpAddr, u16),
    /// Destination NAT to what an element of this map holds.
    SendByMap {
        /// The map.
        map: Name,
        /// Version of the address in it.
        family: Family,
        /// Byte of the element's data where the address starts.
        address_at: usize,
        /// The port.
        port: PortSource,
    },
    /// Destination NAT whose address or port this decoder cannot tell.
    SendUnknown,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The only protocol it matches, if it matches one.
    pub protocol: Option<Protocol>,
    /// The Service port its comment names.
    pub service: Option<ServicePort>,
    /// What it may do.
    pub effects: Vec<Effect>,
}

/// One chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Whether new connections enter here: a chain of type nat at prerouting or output.
    pub entry: bool,
    /// Rules with effects, by handle.
    pub rules: BTreeMap<u64, Rule>,
}

/// Data of one map element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Element {
    /// Jump or goto.
    Go(Name),
    /// Plain bytes; concatenated fields are each padded to 4 bytes.
    Data(Box<[u8]>),
    /// Another verdict, or an object.
    Inert,
}

/// What tells an element of a map from the others: its key, the end of its range, and whether it
/// is the catch-all.
pub type ElementKey = Box<[u8]>;

/// One map, named or anonymous.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Map {
    /// The kernel's handle. An anonymous map's name is used again within one transaction.
    pub handle: u64,
    /// Its elements.
    pub elements: HashMap<ElementKey, Element>,
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Whether its chains are unhooked for now.
    pub dormant: bool,
    /// Chains by name.
    pub chains: HashMap<Name, Chain>,
    /// Maps by name.
    pub maps: HashMap<Name, Map>,
}

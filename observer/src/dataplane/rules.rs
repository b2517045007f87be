//! The node's rules, reduced to what decides where a new connection may be sent.
//!
//! `nf_tables` messages decode into these types; the legacy nat table, which is only ever read
//! whole, is evaluated where it lies, by the same principles. Matches on addresses, marks,
//! probabilities and the order of rules are left out on purpose: a backend is whatever *some*
//! packet can be sent to, and kube-proxy never shadows one rule by another. A rule that sends
//! nowhere and goes nowhere reduces to no effects.

use std::collections::VecDeque;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use foldhash::HashMap;

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
    AtByte(u8),
}

/// What a rule may do to a new connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
        address_at: u8,
        /// The port.
        port: PortSource,
    },
    /// Destination NAT whose address or port this decoder cannot tell.
    SendUnknown,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
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
    /// Rules with effects.
    pub rules: Rules,
}

/// A number that rules of the same chain and content share, and others hardly ever: 64 bits, the
/// hash's seed is this process's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

/// A chain's rules by handle, in one block of memory, for nearly all of the many chains have one or
/// two. Both ends move cheaply: rules come with rising handles, and kube-proxy writes a long chain
/// anew by deleting it from its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules(VecDeque<Held>);

#[derive(Clone, Debug)]
struct Held {
    handle: u64,
    fingerprint: Fingerprint,
    rule: Rule,
}

/// Without the fingerprint, which tells of what is left out of [`Rule`] too.
impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        (self.handle, &self.rule) == (other.handle, &other.rule)
    }
}

impl Eq for Held {}

impl Rules {
    /// Up to here room is made rule by rule, then in doubling steps.
    const FEW: usize = 4;

    /// Adds a rule; gives the one that had its handle.
    pub fn insert(&mut self, handle: u64, fingerprint: Fingerprint, rule: Rule) -> Option<Rule> {
        let held = Held { handle, fingerprint, rule };
        match self.find(handle) {
            Ok(at) => Some(mem::replace(&mut self.0[at], held).rule),
            Err(at) => {
                if self.0.len() < Self::FEW {
                    self.0.reserve_exact(1);
                }
                self.0.insert(at, held);
                None
            }
        }
    }

    /// Takes a rule out, if it is there.
    pub fn remove(&mut self, handle: u64) -> Option<(Fingerprint, Rule)> {
        let at = self.find(handle).ok()?;
        self.0.remove(at).map(|held| (held.fingerprint, held.rule))
    }

    /// Where a handle is, or would be; the ends are looked at first.
    fn find(&self, handle: u64) -> Result<usize, usize> {
        if self.0.front().is_some_and(|first| first.handle == handle) {
            return Ok(0);
        }
        if self.0.back().is_none_or(|last| last.handle < handle) {
            return Err(self.0.len());
        }
        self.0.binary_search_by_key(&handle, |held| held.handle)
    }

    /// All, in the order of their handles.
    pub fn values(&self) -> impl Iterator<Item = &Rule> {
        self.0.iter().map(|held| &held.rule)
    }

    /// All, taken out.
    pub fn into_values(self) -> impl Iterator<Item = Rule> {
        self.0.into_iter().map(|held| held.rule)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one with the highest handle.
    #[must_use]
    pub fn last(&self) -> Option<&Rule> {
        self.0.back().map(|held| &held.rule)
    }
}

impl FromIterator<(u64, Rule)> for Rules {
    fn from_iter<I: IntoIterator<Item = (u64, Rule)>>(rules: I) -> Self {
        let mut all = Self::default();
        for (handle, rule) in rules {
            all.insert(handle, Fingerprint::default(), rule);
        }
        all
    }
}

/// Data of one map element.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(port: u16) -> Rule {
        let address = Ipv4Addr::LOCALHOST.into();
        Rule { effects: vec![Effect::Send(address, port)], ..Rule::default() }
    }

    fn print(number: u16) -> Fingerprint {
        Fingerprint(number.into())
    }

    #[test]
    fn rules_are_found_by_handle_whatever_the_order_they_came_in() {
        let mut rules = Rules::default();
        for handle in [3, 9, 1, 7, 5, 11] {
            assert_eq!(rules.insert(handle.into(), print(handle), rule(handle)), None);
        }
        assert_eq!(rules.insert(7, print(70), rule(70)), Some(rule(7)));
        assert_eq!(
            [1, 1, 2].map(|handle| rules.remove(handle)),
            [Some((print(1), rule(1))), None, None]
        );
        let left: Vec<Rule> = rules.values().cloned().collect();
        assert_eq!(left, [3, 5, 70, 9, 11].map(rule));
        assert_eq!(rules.last(), Some(&rule(11)));
        assert_eq!(rules.into_values().count(), 5);
    }
}

//! The few xtables matches and targets that decide where a connection goes, as the kernel's own
//! structs: inside `nf_tables` expressions (iptables-nft) and inside the legacy table.
//!
//! Numbers here are in the machine's byte order except addresses and ports. iptables 1.8.9 writes
//! DNAT as revision 2 for both address families and `comment` as revision 0.

use std::net::IpAddr;

use super::names;
use super::rules::{Effect, Family, Rule};
use crate::facts::{Protocol, ServicePort};

/// `NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED`: both an address and a port are given.
const MAPS_ADDRESS_AND_PORT: u32 = 1 | 2;

/// The protocol of an IP header's number; `None` for one that no Service uses.
#[must_use]
pub(super) fn protocol(number: u8) -> Option<Protocol> {
    match number {
        6 => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        132 => Some(Protocol::Sctp),
        _ => None,
    }
}

/// What a match says of its rule.
pub(super) enum Said<'d> {
    /// The only protocol it is for.
    Protocol(Protocol),
    /// The Service port of its comment; `None` when the comment names none.
    Service(Option<&'d str>),
}

/// What the match of this name says; `None` for one that decides nothing here.
pub(super) fn said<'d>(name: &[u8], info: &'d [u8]) -> Option<Said<'d>> {
    Some(match name {
        b"tcp" => Said::Protocol(Protocol::Tcp),
        b"udp" => Said::Protocol(Protocol::Udp),
        b"sctp" => Said::Protocol(Protocol::Sctp),
        b"comment" => {
            let comment = std::str::from_utf8(text(info)).ok();
            Said::Service(comment.and_then(names::start_of_comment))
        }
        _ => return None,
    })
}

/// Takes from a match what it says of `rule`.
pub(super) fn add_match(rule: &mut Rule, name: &[u8], info: &[u8]) {
    match said(name, info) {
        Some(Said::Protocol(protocol)) => rule.protocol = Some(protocol),
        Some(Said::Service(service)) => {
            rule.service = service.map(|service| ServicePort(service.into()));
        }
        None => {}
    }
}

/// The target that is destination NAT.
pub(super) const DNAT: &[u8] = b"DNAT";

/// Takes from a target what it does to new connections.
pub(super) fn add_target(rule: &mut Rule, family: Family, name: &[u8], revision: u8, info: &[u8]) {
    if name == DNAT {
        let destination = destination(family, revision, info);
        let send = destination.map(|(address, port)| Effect::Send(address, port));
        rule.effects.push(send.unwrap_or(Effect::SendUnknown));
    }
}

/// The bytes before the first NUL.
#[must_use]
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Where destination NAT sends to. Reads `nf_nat_ipv4_multi_range_compat` (revision 0) or
/// `nf_nat_range`, `nf_nat_range2` (revisions 1 and 2, which begin alike). `None` for anything but
/// one address and port: a range is no backend.
pub(super) fn destination(family: Family, revision: u8, info: &[u8]) -> Option<(IpAddr, u16)> {
    let (flags, addresses, width) = match (revision, family) {
        (0, Family::V4) => (info.get(4..)?, info.get(8..)?, 4),
        (0, Family::V6) => return None,
        _ => (info, info.get(4..)?, 16),
    };
    let flags = u32::from_ne_bytes(*flags.first_chunk()?);
    let (first, rest) = addresses.split_at_checked(width)?;
    let (last, ports) = rest.split_at_checked(width)?;
    let first_port = u16::from_be_bytes(*ports.first_chunk()?);
    let last_port = u16::from_be_bytes(*ports.get(2..)?.first_chunk()?);
    let exact = flags & MAPS_ADDRESS_AND_PORT == MAPS_ADDRESS_AND_PORT
        && first.get(..family.address_bytes()) == last.get(..family.address_bytes())
        && first_port == last_port;
    exact.then(|| family.address(first).map(|address| (address, first_port)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(flags: u32, addresses: [[u8; 16]; 2], ports: [u16; 2]) -> Vec<u8> {
        let mut info = flags.to_ne_bytes().to_vec();
        info.extend(addresses.concat());
        info.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        info.extend([0; 4]);
        info
    }

    fn effect(family: Family, revision: u8, info: &[u8]) -> Option<Effect> {
        let mut rule = Rule::default();
        add_target(&mut rule, family, b"DNAT", revision, info);
        rule.effects.pop()
    }

    const V6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    const V4: [u8; 16] = [10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn every_revision_of_dnat_gives_address_and_port() {
        let mut compat = 1_u32.to_ne_bytes().to_vec();
        compat.extend(3_u32.to_ne_bytes());
        compat.extend([10, 0, 0, 7, 10, 0, 0, 7, 0x1f, 0x90, 0x1f, 0x90]);
        let v4 = Some(Effect::Send("10.0.0.7".parse().expect("address"), 8080));
        assert_eq!(effect(Family::V4, 0, &compat), v4);
        assert_eq!(effect(Family::V4, 2, &range(3, [V4, V4], [8080, 8080])), v4);
        let v6 = Some(Effect::Send("fd00::7".parse().expect("address"), 8080));
        assert_eq!(effect(Family::V6, 1, &range(3, [V6, V6], [8080, 8080])), v6);
    }

    #[test]
    fn a_range_or_a_missing_or_truncated_target_is_unknown() {
        let unknown = Some(Effect::SendUnknown);
        assert_eq!(effect(Family::V4, 2, &range(3, [V4, V6], [1, 1])), unknown);
        assert_eq!(effect(Family::V4, 2, &range(3, [V4, V4], [1, 2])), unknown);
        assert_eq!(effect(Family::V4, 2, &range(1, [V4, V4], [1, 1])), unknown);
        assert_eq!(effect(Family::V6, 0, &range(3, [V6, V6], [1, 1])), unknown);
        let whole = range(3, [V6, V6], [1, 1]);
        for length in 0..40 {
            for revision in 0..4 {
                assert_eq!(effect(Family::V6, revision, &whole[..length]), unknown, "{length}");
            }
        }
    }

    #[test]
    fn other_targets_do_nothing() {
        let mut rule = Rule::default();
        add_target(&mut rule, Family::V4, b"MASQUERADE", 0, &[]);
        assert_eq!(rule, Rule::default());
    }
}

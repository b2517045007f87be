//! Bytes of the ring buffer to facts: the one reader of the wire contract.

use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use bytes::Buf as _;
use observer_common::{CgroupMade, Event, Ip, signal};

use crate::facts::{BootNs, Happening, KernelEvent};

/// Why a record was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// Not the size of an [`Event`].
    Length(usize),
    /// A signal this daemon does not know.
    Signal(u32),
}

/// A cgroup that was just made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewCgroup<'a> {
    /// The inode of its directory.
    pub id: u64,
    /// Its parent's.
    pub parent: u64,
    /// The name of its directory; empty when it is no UTF-8, which no pod's is.
    pub name: &'a str,
}

/// Decodes a record of a new cgroup; `None` when it is none.
#[must_use]
pub fn new_cgroup(record: &[u8]) -> Option<NewCgroup<'_>> {
    if record.len() != size_of::<CgroupMade>() {
        return None;
    }
    let (mut ids, name) = record.split_at(offset_of!(CgroupMade, name));
    let end = name.iter().position(|byte| *byte == 0)?;
    let name = str::from_utf8(&name[..end]).unwrap_or_default();
    Some(NewCgroup { id: ids.get_u64_ne(), parent: ids.get_u64_ne(), name })
}

/// Decodes one event, on a node whose network namespace has this inode. `pod` stays empty: whose
/// cgroup it is, the caller looks up.
///
/// # Errors
/// When the record is not an [`Event`] of a known signal.
pub fn decode(record: &[u8], own_netns_inum: u32) -> Result<KernelEvent, Undecodable> {
    let event = read(record)?;
    Ok(KernelEvent {
        at: BootNs(event.boot_ns),
        happening: happening(&event)?,
        pod: None,
        cgroup_id: event.cgroup_id,
        netns_cookie: event.netns_cookie,
        in_node_network: event.netns_inum == own_netns_inum,
        local: SocketAddr::new(address(event.local_address), event.local_port),
        remote: SocketAddr::new(address(event.remote_address), event.remote_port),
        pid: event.pid,
        socket: event.socket,
        suppressed: event.suppressed,
        counted: event.signal == signal::REFUSED && event.code == 1,
    })
}

/// IPv4-mapped addresses as IPv4.
#[must_use]
pub fn address(ip: Ip) -> IpAddr {
    Ipv6Addr::from(ip.octets()).to_canonical()
}

fn happening(event: &Event) -> Result<Happening, Undecodable> {
    let code = event.code;
    Ok(match event.signal {
        signal::CONNECT_FAILED => Happening::ConnectFailed { errno: code },
        signal::LISTENER_OPENED => Happening::ListenerOpened,
        signal::LISTENER_CLOSED => Happening::ListenerClosed,
        signal::REFUSED => Happening::Refused,
        signal::STRAY_RESET => Happening::StrayReset,
        signal::RESET_SENT => Happening::ResetSent { reason: code },
        signal::RESET_RECEIVED => Happening::ResetReceived { state: code },
        signal::CONNECT_ERROR => Happening::ConnectError { errno: code },
        signal::ICMP_UNREACHABLE => Happening::IcmpUnreachable { code },
        signal::NETFILTER_DROP => Happening::NetfilterDrop,
        signal::PROCESS_SIGNALLED => Happening::Signalled { number: code },
        signal::PROCESS_EXITED => Happening::Exited,
        signal::OOM_KILLED => Happening::OomKilled,
        signal::LEGACY_COMMIT => Happening::LegacyCommit { family: code, call_ns: 0 },
        signal::LEGACY_CALL => Happening::LegacyCommit { family: 0, call_ns: code },
        signal::IPVS_COMMIT => Happening::IpvsCommit { call_ns: code },
        signal::MAP_COMMIT => Happening::MapCommit { map: code },
        unknown => return Err(Undecodable::Signal(unknown)),
    })
}

fn read(record: &[u8]) -> Result<Event, Undecodable> {
    if record.len() != size_of::<Event>() {
        return Err(Undecodable::Length(record.len()));
    }
    let mut rest = record;
    let event = Event {
        boot_ns: rest.get_u64_ne(),
        netns_cookie: rest.get_u64_ne(),
        cgroup_id: rest.get_u64_ne(),
        socket: rest.get_u64_ne(),
        local_address: Ip { first: rest.get_u64_ne(), last: rest.get_u64_ne() },
        remote_address: Ip { first: rest.get_u64_ne(), last: rest.get_u64_ne() },
        signal: rest.get_u32_ne(),
        code: rest.get_u32_ne(),
        netns_inum: rest.get_u32_ne(),
        pid: rest.get_u32_ne(),
        suppressed: rest.get_u32_ne(),
        local_port: rest.get_u16_ne(),
        remote_port: rest.get_u16_ne(),
    };
    // `get_*` panics past the end: the fields above are the whole record, whose length was checked.
    debug_assert!(rest.is_empty());
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(signal: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [7_u64, 8, 9, 10] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 7]);
        bytes.extend_from_slice(&Ipv6Addr::LOCALHOST.octets());
        for word in [signal, 111, 12, 13, 14] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&8080_u16.to_ne_bytes());
        bytes.extend_from_slice(&40000_u16.to_ne_bytes());
        bytes
    }

    #[test]
    fn every_field_comes_from_its_own_bytes() {
        let event = decode(&record(signal::CONNECT_FAILED), 99).expect("valid");
        assert_eq!(event.at, BootNs(7));
        assert_eq!(event.netns_cookie, 8);
        assert_eq!(event.cgroup_id, 9);
        assert_eq!(event.socket, 10);
        assert_eq!(event.local, "198.51.100.7:8080".parse().expect("address"));
        assert_eq!(event.remote, "[::1]:40000".parse().expect("address"));
        assert_eq!(event.happening, Happening::ConnectFailed { errno: 111 });
        assert_eq!((event.pid, event.suppressed), (13, 14));
        assert!(!event.in_node_network);
        assert!(decode(&record(signal::REFUSED), 12).expect("valid").in_node_network);
    }

    #[test]
    fn other_lengths_and_unknown_signals_are_refused() {
        let whole = record(signal::REFUSED);
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length], 0), Err(Undecodable::Length(length)));
        }
        let mut long = whole;
        long.push(0);
        assert_eq!(decode(&long, 0), Err(Undecodable::Length(89)));
        // Counted in the kernel, never sent.
        let passive = record(signal::PASSIVE_OPEN);
        assert_eq!(decode(&passive, 0), Err(Undecodable::Signal(signal::PASSIVE_OPEN)));
        assert_eq!(decode(&record(999), 0), Err(Undecodable::Signal(999)));
    }
    #[test]
    fn a_new_cgroup_is_told_from_an_event_by_its_size() {
        let mut made = [7_u64, 8].map(u64::to_ne_bytes).concat();
        made.extend_from_slice(b"pod-1\0left over");
        made.resize(size_of::<CgroupMade>(), 9);
        assert_eq!(new_cgroup(&made), Some(NewCgroup { id: 7, parent: 8, name: "pod-1" }));
        assert_eq!(decode(&made, 0), Err(Undecodable::Length(144)));
        assert_eq!(new_cgroup(&made[..143]), None);
        assert_eq!(new_cgroup(&record(signal::REFUSED)), None);
        made[16] = 0xff;
        assert_eq!(new_cgroup(&made).expect("a cgroup").name, "");
        made[16..].fill(b'x');
        assert_eq!(new_cgroup(&made), None, "an unended name is not the programs'");
    }
}

//! The text of `/proc/net/ip_vs` (`ip_vs_info_seq_show` in `net/netfilter/ipvs/ip_vs_ctl.c`), the
//! same from Linux 5.10 to 7.2.
//!
//! Pure. Three lines of header; then a line for each virtual service, by address or by firewall
//! mark, each followed by a line for each of its destinations. A line that is none of these is
//! counted and passed over, and so are the destinations behind it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::reach::Reached;
use crate::facts::{Backend, Protocol};

/// What a destination's line begins with.
const ARROW: &str = "->";
/// How the three lines of the header begin, without their indentation.
const HEADER: [&str; 3] = ["IP Virtual Server version ", "Prot ", "-> RemoteAddress:Port "];

/// All virtual services of a network namespace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Their destinations: a weight above 0 makes a backend, 0 one that is being drained.
    pub reached: Reached,
    /// How many virtual services there are.
    pub services: usize,
    /// Lines that were not understood.
    pub malformed: u64,
}

/// Whose destinations follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Of(Protocol),
    /// By firewall mark, or of a protocol without ports: it does not tell what is sent there.
    Untold,
    /// Its line was not understood.
    Unknown,
}

/// Reads the whole text.
#[must_use]
pub fn parse(text: &str) -> Table {
    let mut table = Table::default();
    let mut service = Service::Unknown;
    for line in text.lines() {
        let trimmed = line.trim_start();
        if HEADER.iter().any(|header| trimmed.starts_with(header)) {
            continue;
        }
        if !trimmed.starts_with(ARROW) {
            service = read_service(line).unwrap_or(Service::Unknown);
            match service {
                Service::Unknown => table.malformed += 1,
                Service::Of(_) | Service::Untold => table.services += 1,
            }
        } else if table.take_destination(service, trimmed).is_none() {
            table.malformed += 1;
        }
    }
    // Sent to by one virtual service is sent to.
    let Reached { backends, draining, .. } = &mut table.reached;
    draining.retain(|backend| !backends.contains(backend));
    table
}

impl Table {
    /// `-> 0AF40012:1F90      Masq    1      0          0`: address, forwarding method, weight,
    /// active and inactive connections. Every method sends new connections there.
    fn take_destination(&mut self, service: Service, line: &str) -> Option<()> {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, port) = read_address(words.next()?)?;
        let weight: u32 = words.nth(1)?.parse().ok()?;
        match service {
            Service::Of(protocol) if port != 0 => {
                let backend = Backend { service: None, protocol, address, port };
                let Reached { backends, draining, .. } = &mut self.reached;
                let set = if weight > 0 { backends } else { draining };
                set.insert(backend);
            }
            // Port 0 keeps the connection's own.
            Service::Of(_) | Service::Untold => self.reached.unresolved += usize::from(weight > 0),
            Service::Unknown => return None,
        }
        Some(())
    }
}

/// `TCP  0A600050:0050 rr`, `UDP  [fd00:…]:0035 rr`, `FWM  00000007 rr`, and more words.
fn read_service(line: &str) -> Option<Service> {
    let mut words = line.split_ascii_whitespace();
    let kind = words.next()?;
    let target = words.next()?;
    if kind == "FWM" {
        return u32::from_str_radix(target, 16).ok().map(|_| Service::Untold);
    }
    read_address(target)?;
    Some(match kind {
        "TCP" => Service::Of(Protocol::Tcp),
        "UDP" => Service::Of(Protocol::Udp),
        "SCTP" => Service::Of(Protocol::Sctp),
        // `IP_50` (ESP) and `IP_51` (AH).
        _ => Service::Untold,
    })
}

/// `0AF40012:1F90` or `[fd00:0000:0000:0000:0000:0000:0000:0012]:1F90`; the port in hexadecimal.
fn read_address(word: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = word.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let address = match address.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?.into(),
        None if address.len() == 8 => Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?).into(),
        None => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// As Linux 6.12 wrote it: see the test `every_form_is_read` of the guest.
    const TEXT: &str = include_str!("../../../tests/captures/ipvs/ip_vs-6.12.txt");
}

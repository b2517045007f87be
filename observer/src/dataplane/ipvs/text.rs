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

    /// As Linux 6.12 wrote it after the rules of the guest's test `every_form_of_a_line_is_read`.
    const TEXT: &str = include_str!("../../../tests/captures/ipvs/ip_vs-6.12.txt");

    fn shown(backends: &BTreeSet<Backend>) -> Vec<String> {
        let shown = backends
            .iter()
            .map(|backend| format!("{:?} {} {}", backend.protocol, backend.address, backend.port));
        shown.collect()
    }

    /// A service with one destination, after the header.
    fn one(service: &str, destination: &str) -> Table {
        let header: String = TEXT.split_inclusive('\n').take(3).collect();
        parse(&format!("{header}{service}\n  -> {destination}\n"))
    }

    #[test]
    fn every_form_of_a_line_is_read() {
        let Table { reached, services, malformed } = parse(TEXT);
        assert_eq!(
            shown(&reached.backends),
            [
                "Tcp 10.244.0.18 8080",
                "Tcp 10.244.0.20 80",
                "Tcp 10.244.0.21 80",
                "Tcp 127.0.0.1 80",
                "Tcp fd00:10:244::12 8080",
                "Udp 10.244.0.2 53",
                "Sctp 10.244.0.18 9090",
            ]
        );
        assert_eq!(shown(&reached.draining), ["Tcp 10.244.0.19 8080"]);
        assert_eq!(reached.unresolved, 1, "the firewall mark");
        assert_eq!((services, malformed), (5, 0));
    }

    #[test]
    fn what_one_service_drains_and_another_sends_to_is_a_backend() {
        let line = |weight| format!("  -> 0AF40012:1F90      Masq    {weight}      0          0\n");
        for weights in [[0, 1], [1, 0]] {
            let [first, second] = weights.map(line);
            let text = format!("TCP  0A600050:0050 rr\n{first}TCP  0A600051:0050 rr\n{second}");
            let table = parse(&text);
            assert_eq!(shown(&table.reached.backends), ["Tcp 10.244.0.18 8080"]);
            assert_eq!(shown(&table.reached.draining), [] as [&str; 0]);
        }
    }

    #[test]
    fn the_flags_of_a_service_do_not_matter() {
        for flags in ["", "ops ", "ops persistent 10800 FFFFFFFF", "none persistent 1 FFFFFF00"] {
            let table = one(&format!("UDP  0A600050:0035 rr {flags}"), "0AF40012:0035 Local 1 0 0");
            assert_eq!(shown(&table.reached.backends), ["Udp 10.244.0.18 53"]);
        }
    }

    #[test]
    fn what_is_sent_to_a_destination_may_not_be_told() {
        for (service, destination) in [
            ("FWM  00000007 rr ops ", "0AF40016:0050 Route 1 0 0"),
            ("IP_50  0A600050:0000 rr", "0AF40016:0000 Masq 1 0 0"),
            ("TCP  0A600050:0000 rr persistent 300 FFFFFFFF", "0AF40016:0000 Masq 1 0 0"),
        ] {
            let table = one(service, destination);
            let reached = Reached { unresolved: 1, ..Reached::default() };
            assert_eq!(table, Table { reached, services: 1, malformed: 0 }, "{service}");
            assert_eq!(one(service, &destination.replace(" 1 ", " 0 ")).reached.unresolved, 0);
        }
    }

    #[test]
    fn a_line_that_is_not_understood_is_counted_and_passed_over() {
        for service in ["TCP", "TCP  0A60005:0050 rr", "TCP  [fd00::1:0050 rr", "FWM  mark rr", ""]
        {
            let table = one(service, "0AF40012:1F90 Masq 1 0 0");
            assert_eq!(table, Table { malformed: 2, ..Table::default() }, "{service}");
        }
        for destination in
            ["", "0AF40012", "0AF40012:1F90 Masq", "0AF40012:1F90 Masq -1 0 0", "[]:1F90 Masq 1"]
        {
            let table = one("TCP  0A600050:0050 rr", destination);
            assert_eq!(table, Table { services: 1, malformed: 1, ..Table::default() });
        }
    }

    #[test]
    fn a_text_cut_anywhere_gives_no_other_backend() {
        let whole = parse(TEXT).reached;
        for end in 0..TEXT.len() {
            let part = parse(&TEXT[..end]).reached;
            assert!(part.backends.is_subset(&whole.backends), "cut at {end}");
        }
    }
}

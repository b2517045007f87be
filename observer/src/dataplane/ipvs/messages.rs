//! The messages of IPVS over generic netlink (`include/uapi/linux/ip_vs.h`).
//!
//! Pure. Takes any bytes; those that are not what the kernel writes are [`Malformed`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::nft::attributes::{MESSAGE_HEADER_BYTES, Malformed, fields};
use crate::dataplane::{names, xt};
use crate::facts::{Protocol, ServiceName};

/// Length of `genlmsghdr`: command, version, two bytes of nothing.
const GENERIC_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const NESTED: u16 = 0x8000;

/// `CTRL_CMD_GETFAMILY` asks the family `GENL_ID_CTRL` for the number of another.
pub(super) const CONTROL: u16 = 0x10;
pub(super) const GET_FAMILY: u8 = 3;
const FAMILY_ID: usize = 1;
const FAMILY_NAME: u16 = 2;
const NAME: &[u8] = b"IPVS\0";

/// `IPVS_CMD_GET_SERVICE` and `IPVS_CMD_GET_DEST`
pub(super) const GET_SERVICE: u8 = 4;
pub(super) const GET_DESTINATION: u8 = 8;
/// `IPVS_CMD_ATTR_*`
const SERVICE: u16 = 1;
const DESTINATION: u16 = 2;

/// `IPVS_SVC_ATTR_*`
mod service {
    pub(super) const FAMILY: usize = 1;
    pub(super) const PROTOCOL: usize = 2;
    pub(super) const ADDRESS: usize = 3;
    pub(super) const PORT: usize = 4;
    /// The last of those that name a service: family, protocol, address, port, firewall mark.
    pub(super) const MARK: usize = 5;
}

/// `IPVS_DEST_ATTR_*`
mod destination {
    pub(super) const ADDRESS: usize = 1;
    pub(super) const PORT: usize = 2;
    pub(super) const WEIGHT: usize = 4;
    pub(super) const FAMILY: usize = 11;
    pub(super) const COUNT: usize = 12;
}

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// One virtual service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    /// What clients connect to; `None` when it is chosen by firewall mark, or has a protocol
    /// without ports.
    pub(super) front_end: Option<(Protocol, ServiceName)>,
    family: u16,
    /// The attributes that name it in a request, as the kernel wrote them.
    key: Vec<u8>,
}

/// One destination of a virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) address: IpAddr,
    /// 0 for the port that the connection has.
    pub(super) port: u16,
    pub(super) weight: u32,
}

/// A request to a family, with its attributes.
pub(super) fn request(
    family: u16,
    flags: u16,
    sequence: u32,
    command: u8,
    attributes: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![0; MESSAGE_HEADER_BYTES];
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[0..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&family.to_ne_bytes());
    bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes
}

/// The attribute that asks for the number of the family IPVS.
pub(super) fn family_name() -> Vec<u8> {
    attribute(FAMILY_NAME, NAME)
}

impl Service {
    /// The attribute that asks for its destinations.
    pub(super) fn named(&self) -> Vec<u8> {
        attribute(SERVICE | NESTED, &self.key)
    }

    /// From an answer to [`GET_SERVICE`].
    pub(super) fn read(payload: &[u8]) -> Result<Self, Malformed> {
        let nested = inner(payload, SERVICE)?;
        let fields: [Option<&[u8]>; service::MARK + 1] = fields(nested)?;
        let family = u16_in(fields[service::FAMILY])?;
        let front_end = match fields[service::PROTOCOL] {
            Some(number) => {
                let address = address(family, fields[service::ADDRESS])?;
                let name = names::of_front_end(address, port(fields[service::PORT])?);
                protocol(u16_in(Some(number))?).map(|protocol| (protocol, name))
            }
            None if fields[service::MARK].is_some() => None,
            None => return Err(Malformed),
        };
        let mut key = Vec::new();
        for (kind, value) in (0_u16..).zip(fields) {
            if let Some(value) = value {
                key.extend(attribute(kind, value));
            }
        }
        Ok(Self { front_end, family, key })
    }
}

impl Destination {
    /// From an answer to [`GET_DESTINATION`] about `service`.
    pub(super) fn read(payload: &[u8], service: &Service) -> Result<Self, Malformed> {
        let fields: [Option<&[u8]>; destination::COUNT] = fields(inner(payload, DESTINATION)?)?;
        let family = match fields[destination::FAMILY] {
            Some(family) => u16_in(Some(family))?,
            None => service.family,
        };
        let weight = fields[destination::WEIGHT].ok_or(Malformed)?.try_into();
        Ok(Self {
            address: address(family, fields[destination::ADDRESS])?,
            port: port(fields[destination::PORT])?,
            weight: weight.map(u32::from_ne_bytes).ok().ok_or(Malformed)?,
        })
    }
}

/// From an answer to [`GET_FAMILY`].
pub(super) fn read_family(payload: &[u8]) -> Result<u16, Malformed> {
    let body = payload.get(GENERIC_HEADER_BYTES..).ok_or(Malformed)?;
    u16_in(fields::<{ FAMILY_ID + 1 }>(body)?[FAMILY_ID])
}

/// What the attribute `kind` of a message encloses.
fn inner(payload: &[u8], kind: u16) -> Result<&[u8], Malformed> {
    let body = payload.get(GENERIC_HEADER_BYTES..).ok_or(Malformed)?;
    let fields: [Option<&[u8]>; 3] = fields(body)?;
    fields.get(usize::from(kind)).copied().flatten().ok_or(Malformed)
}

/// `union nf_inet_addr`: 16 bytes, of which IPv4 uses the first 4.
fn address(family: u16, bytes: Option<&[u8]>) -> Result<IpAddr, Malformed> {
    let bytes: [u8; 16] = bytes.ok_or(Malformed)?.try_into().ok().ok_or(Malformed)?;
    match family {
        AF_INET => Ok(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        AF_INET6 => Ok(Ipv6Addr::from(bytes).into()),
        _ => Err(Malformed),
    }
}

fn port(bytes: Option<&[u8]>) -> Result<u16, Malformed> {
    bytes.ok_or(Malformed)?.try_into().map(u16::from_be_bytes).ok().ok_or(Malformed)
}

fn protocol(number: u16) -> Option<Protocol> {
    xt::protocol(u8::try_from(number).ok()?)
}

fn u16_in(value: Option<&[u8]>) -> Result<u16, Malformed> {
    value.ok_or(Malformed)?.try_into().map(u16::from_ne_bytes).ok().ok_or(Malformed)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = ATTRIBUTE_HEADER_BYTES + value.len();
    let mut bytes = u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: u16 = 6;
    const UDP: u16 = 17;
    const SCTP: u16 = 132;

    const V4: [u8; 16] = [10, 244, 0, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const V6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12];

    /// An answer that encloses these attributes.
    fn answer(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let nested: Vec<u8> =
            attributes.iter().flat_map(|(kind, value)| attribute(*kind, value)).collect();
        [vec![4, 1, 0, 0], attribute(kind, &nested)].concat()
    }

    fn service_answer(protocol: u16) -> Vec<u8> {
        let (family, protocol) = (AF_INET.to_ne_bytes(), protocol.to_ne_bytes());
        answer(SERVICE, &[(1, &family), (2, &protocol), (3, &V4), (4, &[0, 80]), (6, b"rr\0")])
    }

    fn destination_answer(family: Option<u16>, address: &[u8; 16], weight: u32) -> Vec<u8> {
        let (family_bytes, weight) = (family.unwrap_or(0).to_ne_bytes(), weight.to_ne_bytes());
        let mut attributes =
            vec![(1, &address[..]), (2, &[0x1f, 0x90]), (3, &[0; 4]), (4, &weight)];
        attributes.extend(family.map(|_| (11, &family_bytes[..])));
        answer(DESTINATION, &attributes)
    }

    fn front_end(service: &Service) -> Option<(Protocol, String)> {
        service.front_end.as_ref().map(|(protocol, name)| (*protocol, name.to_string()))
    }

    #[test]
    fn a_service_is_asked_about_by_what_names_it() {
        let service = Service::read(&service_answer(TCP)).expect("whole");
        assert_eq!(front_end(&service), Some((Protocol::Tcp, "10.244.0.18:80".to_owned())));
        let scheduler = attribute(6, b"rr\0");
        let whole = service_answer(TCP);
        assert_eq!(service.key, whole[8..whole.len() - scheduler.len()]);
        let named = service.named();
        assert_eq!(named[..4], [48, 0, 1, 0x80]);
        assert_eq!(named[4..], service.key);
    }

    #[test]
    fn protocols_without_ports_and_firewall_marks_tell_no_backend() {
        for (number, expected) in
            [(UDP, Some(Protocol::Udp)), (SCTP, Some(Protocol::Sctp)), (50, None)]
        {
            let service = Service::read(&service_answer(number)).expect("whole");
            assert_eq!(front_end(&service).map(|(protocol, _)| protocol), expected);
        }
        let marked = answer(SERVICE, &[(1, &AF_INET.to_ne_bytes()), (5, &7_u32.to_ne_bytes())]);
        assert_eq!(Service::read(&marked).map(|service| service.front_end), Ok(None));
        let nothing = answer(SERVICE, &[(1, &AF_INET.to_ne_bytes())]);
        assert_eq!(Service::read(&nothing), Err(Malformed));
    }

    #[test]
    fn a_destination_has_its_own_family_or_the_services() {
        let service = Service::read(&service_answer(TCP)).expect("whole");
        for (family, bytes, address) in [
            (None, V4, "10.244.0.18"),
            (Some(AF_INET), V4, "10.244.0.18"),
            (Some(AF_INET6), V6, "fd00::12"),
        ] {
            let address = address.parse().expect("an address");
            let expected = Destination { address, port: 8080, weight: 3 };
            let answer = destination_answer(family, &bytes, 3);
            assert_eq!(Destination::read(&answer, &service), Ok(expected));
        }
        let odd = destination_answer(Some(1), &V4, 3);
        assert_eq!(Destination::read(&odd, &service), Err(Malformed));
    }

    #[test]
    fn an_answer_cut_anywhere_is_malformed_or_the_same() {
        let service = Service::read(&service_answer(TCP)).expect("whole");
        let whole = destination_answer(Some(AF_INET), &V4, 3);
        for end in 0..whole.len() {
            assert_eq!(Destination::read(&whole[..end], &service), Err(Malformed), "{end}");
            assert_eq!(Service::read(&service_answer(TCP)[..end.min(20)]), Err(Malformed));
        }
    }

    #[test]
    fn the_familys_number_is_asked_for_by_name() {
        let bytes = request(CONTROL, 1, 7, GET_FAMILY, &family_name());
        assert_eq!(bytes[..4], 32_u32.to_ne_bytes());
        assert_eq!(bytes[16..20], [3, 1, 0, 0]);
        assert_eq!(bytes[20..], *b"\x09\0\x02\0IPVS\0\0\0\0");
        let answer = [vec![1, 2, 0, 0], attribute(1, &35_u16.to_ne_bytes())].concat();
        assert_eq!(read_family(&answer), Ok(35));
        assert_eq!(read_family(&answer[..7]), Err(Malformed));
    }
}

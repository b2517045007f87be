//! `nf_tables` (kube-proxy's nftables mode and iptables-nft): a dump, then notifications.

pub(super) mod attributes;
mod dump;
mod expressions;
pub mod follow;
mod messages;
mod ruleset;
pub(super) mod socket;

pub(crate) use dump::replay;
pub use dump::{Dumper, Fault};
pub use messages::{TableFamily, TableId};
pub use ruleset::Ruleset;
pub use socket::{Arrival, Subscription};

/// Messages as the kernel writes them.
#[cfg(test)]
mod written {
    use super::TableFamily;
    use super::messages::{SUBSYSTEM, kind};

    /// `nlmsghdr`, `nfgenmsg` and a body.
    pub(super) fn message(subsystem: u8, kind: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(20 + body.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(u16::from_be_bytes([subsystem, kind]).to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// About something in the table `t`.
    pub(super) fn in_table(kind: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let body = [attribute(1, b"t\0"), attributes.concat()].concat();
        message(SUBSYSTEM, kind, TableFamily::Ip.number(), &body)
    }

    /// The end of a commit by the thread 4711.
    pub(super) fn generation(number: u32) -> Vec<u8> {
        let body = [attribute(1, &number.to_be_bytes()), attribute(2, &4711_u32.to_be_bytes())];
        message(SUBSYSTEM, kind::NEW_GENERATION, 0, &body.concat())
    }

    pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).expect("small");
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }
}

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
pub use messages::{Message, TableFamily, TableId};
pub use ruleset::Ruleset;
pub use socket::{Arrival, Subscription};

use attributes::frames;
use messages::{Passed, decode};

use super::Counters;

/// Decodes the messages of a datagram that matter here, in order; counts those that are not what
/// the kernel writes, in whose place comes the news of that.
pub fn read_datagram(datagram: &[u8], counters: &Counters) -> Vec<Message> {
    let mut messages = Vec::new();
    for frame in frames(datagram) {
        let message = match frame.map(|frame| decode(&frame)) {
            Ok(Ok((message, unknown))) => {
                counters.unknown_expressions.add(unknown);
                message
            }
            Ok(Err(Passed::Malformed)) => Message::Unreadable,
            Ok(Err(Passed::Foreign)) => continue,
            Err(_) => Message::Cut,
        };
        if matches!(message, Message::Unreadable | Message::Cut) {
            counters.malformed.increase();
        }
        messages.push(message);
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::messages::{SUBSYSTEM, kind};
    use super::*;

    /// `nlmsghdr`, `nfgenmsg` and a body.
    fn message(subsystem: u16, kind: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(20 + body.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend((subsystem << 8 | u16::from(kind)).to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn only_a_malformed_message_that_would_be_kept_makes_its_commit_unreadable() {
        let malformed = &[9, 0, 1, 0][..];
        let (ip, bridge) = (TableFamily::Ip.number(), 7);
        let objects = 18;
        for (bytes, expected) in [
            (message(SUBSYSTEM, kind::NEW_RULE, ip, malformed), vec![Message::Unreadable]),
            (message(SUBSYSTEM, kind::NEW_GENERATION, 0, malformed), vec![Message::Cut]),
            (message(SUBSYSTEM, kind::NEW_RULE, ip, &[])[..18].to_vec(), vec![Message::Cut]),
            (message(SUBSYSTEM, kind::NEW_RULE, bridge, malformed), vec![]),
            (message(SUBSYSTEM, objects, ip, malformed), vec![]),
            (message(1, kind::NEW_RULE, ip, malformed), vec![]),
        ] {
            let counters = Counters::default();
            assert_eq!(read_datagram(&bytes, &counters), expected, "{bytes:?}");
            let counted = u64::try_from(expected.len()).expect("few");
            assert_eq!(counters.malformed.get(), counted, "{bytes:?}");
        }
    }
}

//! `nf_tables` (kube-proxy's nftables mode and iptables-nft): a dump, then notifications.

mod attributes;
mod dump;
mod expressions;
pub mod follow;
mod messages;
mod ruleset;
mod socket;

pub use dump::{Dumper, Fault};
pub use messages::{Message, TableFamily, TableId};
pub use ruleset::Ruleset;
pub use socket::{Arrival, Subscription};

use attributes::frames;
use messages::{Passed, decode};

use super::Counters;

/// Decodes the messages of a datagram that matter here, in order; counts those passed over.
pub fn read_datagram(datagram: &[u8], counters: &Counters) -> Vec<Message> {
    let mut messages = Vec::new();
    for frame in frames(datagram) {
        match frame.map_err(Passed::from).and_then(|frame| decode(&frame)) {
            Ok((message, unknown)) => {
                counters.unknown_expressions.add(unknown);
                messages.push(message);
            }
            Err(Passed::Malformed) => counters.malformed.increase(),
            Err(Passed::Foreign) => {}
        }
    }
    messages
}

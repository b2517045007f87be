//! IPVS: the kernel's virtual services and their destinations, read whole.
//!
//! By generic netlink, one request for all services and one for the destinations of each, as
//! kube-proxy does. Not from `/proc/net/ip_vs`: up to Linux 6.18 at least that leaves out services
//! as soon as another network namespace has some (138 of 200 were seen). The kernel says nothing of
//! changes; a kernel program reports the calls that make them. Refuses to guess: which Service a
//! virtual service is of, IPVS does not say, only at which front end.

mod messages;
mod netlink;

use std::fs::File;
use std::io::{self, Read as _};
use std::sync::Arc;

use anyhow::Context as _;

use super::Counters;
use super::nft::attributes::frames;
use super::reach::Reached;
use crate::facts::Backend;
use messages::{Destination, Service};
use netlink::Conversation;

/// Of the calling thread's network namespace. Not /proc/net: that is the main thread's.
const PATH: &str = "/proc/thread-self/net/ip_vs";
/// The kernel writes this many lines before the first service.
const HEADER_LINES: usize = 3;
/// What one read of such a file gives at most: a page.
const PAGE_BYTES: usize = 4096;

/// Whether this thread's network namespace is seen to have a virtual service. Reads one page,
/// however many there are.
#[must_use]
pub fn ipvs_in_use() -> bool {
    lists_services(PATH).unwrap_or(false)
}

/// Without the module there is no such file.
fn lists_services(path: &str) -> io::Result<bool> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    let mut page = [0; PAGE_BYTES];
    let read = file.read(&mut page)?;
    Ok(page[..read].split_inclusive(|byte| *byte == b'\n').count() > HEADER_LINES)
}

/// All virtual services of a network namespace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Their destinations: a weight above 0 makes a backend, 0 one that is being drained.
    pub reached: Reached,
    /// How many virtual services there are.
    pub services: usize,
}

/// Reads the table of this thread's network namespace.
#[derive(Debug)]
pub struct Reader {
    counters: Arc<Counters>,
}

impl Reader {
    /// Messages that are not understood are counted in `counters`.
    #[must_use]
    pub fn new(counters: Arc<Counters>) -> Self {
        Self { counters }
    }

    /// The table as it is now; empty while the module is not loaded. It is many answers: a service
    /// or destination that comes or goes meanwhile may make it pass over others.
    ///
    /// # Errors
    /// When `CAP_NET_ADMIN` is missing, a message is not understood, or `/proc` cannot be read.
    pub fn read(&self) -> anyhow::Result<Table> {
        // To ask for the family of a module that is not loaded would load it.
        if !lists_services(PATH).with_context(|| format!("read {PATH}"))? {
            return Ok(Table::default());
        }
        let mut conversation = Conversation::open(&self.counters)?;
        let mut table = Table::default();
        for service in conversation.services()? {
            table.services += 1;
            for destination in conversation.destinations(&service)? {
                table.take(&service, &destination);
            }
        }
        Ok(table.complete())
    }
}

/// The table in recorded answers, without a socket: services, each followed by its destinations.
/// `None` when one is neither.
pub(crate) fn replay(answers: &[u8]) -> Option<Table> {
    let mut table = Table::default();
    let mut last = None;
    for frame in frames(answers) {
        let frame = frame.ok()?;
        if let Ok(service) = Service::read(frame.payload) {
            table.services += 1;
            last = Some(service);
        } else {
            let service = last.as_ref()?;
            table.take(service, &Destination::read(frame.payload, service).ok()?);
        }
    }
    Some(table.complete())
}

impl Table {
    /// Once all destinations are taken: sent to at one address of a node port is sent to.
    fn complete(mut self) -> Self {
        let Reached { backends, draining, .. } = &mut self.reached;
        draining.retain(|backend| !backends.contains(backend));
        self
    }

    fn take(&mut self, service: &Service, destination: &Destination) {
        let Destination { address, port, weight } = *destination;
        let reached = &mut self.reached;
        match &service.front_end {
            Some((protocol, name)) if port != 0 => {
                let (service, protocol) = (Some(name.clone()), *protocol);
                let backend = Backend { service, protocol, address, port };
                let set = if weight > 0 { &mut reached.backends } else { &mut reached.draining };
                set.insert(backend);
            }
            // By firewall mark, or to the port the connection had: it does not tell what is sent.
            _ => reached.unresolved += usize::from(weight > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_cannot_be_looked_at_is_not_taken_for_none() {
        assert!(!lists_services("/proc/none").expect("no module"));
        assert!(lists_services("/proc").is_err(), "not a file");
    }
}

//! Which backends Cilium sends new connections to.
//!
//! Pure. For a new connection Cilium looks up the frontend (slot 0), draws one of the slots from 1
//! to its count, and looks up the backend that this slot names (`lb4_select_backend_id`; with Maglev
//! the table is made of the same slots). So it is the slots that decide and not the state a backend
//! carries: one that is terminating stands beyond the count, unless all of a Service's are (KEP-1669).
//! Clients with session affinity are held to a backend by a table that loses it in the same update.
//!
//! Service names are not in the maps. Connections that a proxy on the node takes (Ingress, Gateway)
//! are not told: the proxy, not the slots, decides where those go.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::entries::{Endpoint, Frontend, Slot};
use crate::dataplane::reach::Reached;
use crate::dataplane::xt;
use crate::facts::{Backend, Protocol};

/// What is known of a frontend's slots.
#[derive(Clone, Copy)]
struct Head {
    count: u16,
    to_proxy: bool,
}

/// What the maps of one IP version send new connections to. An id that no backend has, a slot that
/// is missing and a frontend that leads to a proxy count as unresolved.
#[must_use]
pub fn reached(slots: &[Slot], endpoints: &[Endpoint]) -> Reached {
    let heads = slots.iter().filter(|slot| slot.number == 0);
    let heads: HashMap<Frontend, Head> = heads
        .map(|head| (head.frontend, Head { count: head.count, to_proxy: head.to_proxy }))
        .collect();
    let endpoints: BTreeMap<u32, &Endpoint> =
        endpoints.iter().map(|endpoint| (endpoint.id, endpoint)).collect();

    let mut expected: usize = heads.values().map(|head| sent_to(*head)).sum();
    let mut unresolved = heads.values().filter(|head| head.to_proxy).count();
    let (mut active, mut by_proxy) = (HashSet::new(), HashSet::new());
    for slot in slots.iter().filter(|slot| slot.number > 0) {
        let Some(head) = heads.get(&slot.frontend).filter(|head| slot.number <= head.count) else {
            continue;
        };
        if head.to_proxy {
            by_proxy.insert(slot.backend);
            continue;
        }
        expected = expected.saturating_sub(1);
        match endpoints.get(&slot.backend) {
            Some(_) => drop(active.insert((slot.backend, protocol(slot.frontend.protocol)))),
            None => unresolved += 1,
        }
    }
    unresolved += expected;
    let named: HashSet<u32> = active.iter().map(|(id, _)| *id).chain(by_proxy).collect();
    let active =
        active.into_iter().filter_map(|(id, protocol)| backend(endpoints.get(&id)?, protocol));
    let backends: BTreeSet<Backend> = active.collect();
    let idle = endpoints.values().filter(|endpoint| !named.contains(&endpoint.id));
    let idle = idle.filter_map(|endpoint| backend(endpoint, None));
    let draining = idle.filter(|idle| !backends.contains(idle)).collect();
    Reached { backends, draining, unresolved }
}

/// How many slots new connections are sent to.
fn sent_to(head: Head) -> usize {
    if head.to_proxy { 0 } else { head.count.into() }
}

/// `None` for any.
fn protocol(number: u8) -> Option<Protocol> {
    xt::protocol(number)
}

/// As the observer knows it; `None` for another cluster's, whose address may be a pod's here too.
/// Where the maps do not tell protocols apart it stands for TCP, the one that is measured.
fn backend(endpoint: &Endpoint, of_frontend: Option<Protocol>) -> Option<Backend> {
    let protocol = of_frontend.or(protocol(endpoint.protocol)).unwrap_or(Protocol::Tcp);
    let Endpoint { address, port, cluster, .. } = *endpoint;
    (cluster == 0).then_some(Backend { service: None, protocol, address, port })
}

//! Which backends Cilium sends new connections to.
//!
//! Pure. For a new connection Cilium looks up the frontend (slot 0), draws one of the slots from 1
//! to its count, and looks up the backend that this slot names (`lb4_select_backend_id`; with
//! Maglev the table is made of the same slots). So it is the slots that decide and not the state a
//! backend carries: one that is terminating stands beyond the count, unless all of a Service's are
//! (KEP-1669). Clients with session affinity are held to a backend by a table that loses it in the
//! same update.
//!
//! Service names are not in the maps. Connections that a proxy on the node takes (Ingress, Gateway)
//! are not told: the proxy, not the slots, decides where those go.

use std::collections::{BTreeSet, HashMap, HashSet};

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
    let endpoints: HashMap<u32, &Endpoint> =
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

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const ANY: u8 = 0;

    fn frontend(service: u8, protocol: u8) -> Frontend {
        Frontend { address: [10, 96, 0, service].into(), port: 443, protocol, scope: 0 }
    }

    fn head(frontend: Frontend, count: u16) -> Slot {
        Slot { frontend, number: 0, count, to_proxy: false, backend: 0 }
    }

    fn slot(frontend: Frontend, number: u16, backend: u32) -> Slot {
        Slot { frontend, number, count: 0, to_proxy: false, backend }
    }

    fn endpoint(id: u32, protocol: u8) -> Endpoint {
        let last = u8::try_from(id).expect("a small id");
        Endpoint { id, address: [10, 0, 0, last].into(), port: 80, protocol, cluster: 0 }
    }

    fn backends(of: &[(u8, Protocol)]) -> BTreeSet<Backend> {
        let backend = |(last, protocol): &(u8, Protocol)| {
            let address = [10, 0, 0, *last].into();
            Backend { service: None, protocol: *protocol, address, port: 80 }
        };
        of.iter().map(backend).collect()
    }

    #[test]
    fn a_smaller_count_leaves_the_last_slots_out() {
        let web = frontend(1, TCP);
        let endpoints = [endpoint(1, TCP), endpoint(2, TCP)];
        let with_count =
            |count| reached(&[slot(web, 2, 2), head(web, count), slot(web, 1, 1)], &endpoints);
        let both = backends(&[(1, Protocol::Tcp), (2, Protocol::Tcp)]);
        assert_eq!(with_count(2).backends, both);
        let one = with_count(1);
        assert_eq!(one.backends, backends(&[(1, Protocol::Tcp)]));
        assert_eq!(one.draining, backends(&[(2, Protocol::Tcp)]));
        assert_eq!((with_count(0).draining, with_count(0).unresolved), (both, 0));
    }

    #[test]
    fn a_backend_of_several_frontends_is_removed_with_the_last() {
        let (outside, node_port) = (frontend(1, TCP), frontend(2, TCP));
        let inside = Frontend { scope: 1, ..outside };
        let endpoints = [endpoint(1, TCP)];
        let of = |counts: [u16; 3]| {
            let fronts = [outside, inside, node_port].into_iter().zip(counts);
            let slots = fronts.flat_map(|(front, count)| [head(front, count), slot(front, 1, 1)]);
            reached(&slots.collect::<Vec<_>>(), &endpoints).backends.len()
        };
        assert_eq!((of([1, 1, 1]), of([0, 1, 0]), of([0, 0, 1]), of([0, 0, 0])), (1, 1, 1, 0));
    }

    #[test]
    fn slots_that_lead_nowhere_are_unresolved() {
        let web = frontend(1, TCP);
        let lost = reached(&[head(web, 3), slot(web, 1, 1), slot(web, 2, 9)], &[endpoint(1, TCP)]);
        assert_eq!((lost.backends.len(), lost.unresolved), (1, 2), "an unknown id, a missing slot");
        let headless = reached(&[slot(web, 1, 1)], &[endpoint(1, TCP)]);
        assert_eq!((headless.backends.len(), headless.draining.len()), (0, 1));
    }

    #[test]
    fn the_protocol_is_the_frontends_and_tcp_where_neither_says() {
        let (dns, old) = (frontend(1, UDP), frontend(2, ANY));
        let slots = [head(dns, 1), slot(dns, 1, 1), head(old, 2), slot(old, 1, 2), slot(old, 2, 3)];
        let endpoints = [endpoint(1, UDP), endpoint(2, ANY), endpoint(3, UDP)];
        let expected = [(1, Protocol::Udp), (2, Protocol::Tcp), (3, Protocol::Udp)];
        assert_eq!(reached(&slots, &endpoints).backends, backends(&expected));
    }

    #[test]
    fn another_clusters_backend_is_none_of_this_clusters_pods() {
        let web = frontend(1, TCP);
        let far = Endpoint { cluster: 2, ..endpoint(1, TCP) };
        let reached = reached(&[head(web, 1), slot(web, 1, 1)], &[far]);
        assert_eq!(reached, Reached::default());
    }

    #[test]
    fn a_proxys_backends_are_neither_sent_to_nor_draining() {
        let web = frontend(1, TCP);
        let to_proxy = Slot { to_proxy: true, ..head(web, 1) };
        let reached = reached(&[to_proxy, slot(web, 1, 1)], &[endpoint(1, TCP)]);
        assert_eq!(reached, Reached { unresolved: 1, ..Reached::default() });
    }
}

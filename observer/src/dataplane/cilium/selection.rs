//! Which backends Cilium sends new connections to.
//!
//! Pure. For a new connection Cilium looks up the frontend (slot 0), draws one of the slots from 1
//! to its count, and looks up the backend that this slot names (`lb4_select_backend_id`; with
//! Maglev the table is made of the same slots). So it is the slots that decide and not the state a
//! backend carries: one that is terminating stands beyond the count, unless all of a Service's are
//! (KEP-1669). Clients with session affinity are held to a backend by a table that loses it in the
//! same update.
//!
//! Service names are not in the maps, only front ends: each removes its backends by itself. Slots
//! beyond the count hold what is kept for the connections it has; a backend that no slot names is
//! kept by no front end, and not told. Connections that a proxy on the node takes (Ingress, Gateway)
//! are not told: the proxy, not the slots, decides where those go.

use std::collections::{BTreeSet, HashMap};

use super::entries::{Endpoint, Frontend, Slot};
use crate::dataplane::reach::Reached;
use crate::dataplane::{names, xt};
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
    let (mut active, mut draining) = (Vec::new(), Vec::new());
    for slot in slots.iter().filter(|slot| slot.number > 0) {
        let Some(head) = heads.get(&slot.frontend).filter(|head| !head.to_proxy) else { continue };
        let is_sent_to = slot.number <= head.count;
        let endpoint = endpoints.get(&slot.backend);
        let backend = endpoint.and_then(|endpoint| backend(endpoint, slot.frontend));
        if is_sent_to {
            expected = expected.saturating_sub(1);
            unresolved += usize::from(endpoint.is_none());
            active.extend(backend);
        } else {
            draining.extend(backend);
        }
    }
    unresolved += expected;
    let backends: BTreeSet<Backend> = active.into_iter().collect();
    draining.retain(|backend| !backends.contains(backend));
    Reached { backends, draining: draining.into_iter().collect(), unresolved }
}

/// How many slots new connections are sent to.
fn sent_to(head: Head) -> usize {
    if head.to_proxy { 0 } else { head.count.into() }
}

/// As the observer knows it; `None` for another cluster's, whose address may be a pod's here too.
/// Where the maps do not tell protocols apart it stands for TCP, the one that is measured.
fn backend(endpoint: &Endpoint, frontend: Frontend) -> Option<Backend> {
    let protocol = xt::protocol(frontend.protocol).or_else(|| xt::protocol(endpoint.protocol));
    let protocol = protocol.unwrap_or(Protocol::Tcp);
    let service = Some(names::of_front_end(frontend.address, frontend.port));
    let Endpoint { address, port, cluster, .. } = *endpoint;
    (cluster == 0).then_some(Backend { service, protocol, address, port })
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

    /// The backends of these front ends and ids.
    fn backends(of: &[(Frontend, u8, Protocol)]) -> BTreeSet<Backend> {
        let backend = |&(frontend, last, protocol): &(Frontend, u8, Protocol)| {
            let service = names::of_front_end(frontend.address, frontend.port);
            let address = [10, 0, 0, last].into();
            Backend { service: Some(service), protocol, address, port: 80 }
        };
        of.iter().map(backend).collect()
    }

    #[test]
    fn a_smaller_count_leaves_the_last_slots_out() {
        let web = frontend(1, TCP);
        let endpoints = [endpoint(1, TCP), endpoint(2, TCP)];
        let with_count =
            |count| reached(&[slot(web, 2, 2), head(web, count), slot(web, 1, 1)], &endpoints);
        let both = backends(&[(web, 1, Protocol::Tcp), (web, 2, Protocol::Tcp)]);
        assert_eq!(with_count(2).backends, both);
        let one = with_count(1);
        assert_eq!(one.backends, backends(&[(web, 1, Protocol::Tcp)]));
        assert_eq!(one.draining, backends(&[(web, 2, Protocol::Tcp)]));
        assert_eq!((with_count(0).draining, with_count(0).unresolved), (both, 0));
    }

    #[test]
    fn each_front_end_removes_a_backend_by_itself_and_both_scopes_of_one_together() {
        let (outside, other) = (frontend(1, TCP), frontend(2, TCP));
        let inside = Frontend { scope: 1, ..outside };
        let endpoints = [endpoint(1, TCP)];
        let of = |counts: [u16; 3]| {
            let fronts = [outside, inside, other].into_iter().zip(counts);
            let slots = fronts.flat_map(|(front, count)| [head(front, count), slot(front, 1, 1)]);
            reached(&slots.collect::<Vec<_>>(), &endpoints)
        };
        let (web, dns) = ((outside, 1, Protocol::Tcp), (other, 1, Protocol::Tcp));
        assert_eq!(of([1, 1, 1]).backends, backends(&[web, dns]));
        let inside_only = of([0, 1, 0]);
        assert_eq!(inside_only.backends, backends(&[web]));
        assert_eq!(inside_only.draining, backends(&[dns]));
        let other_only = of([0, 0, 1]);
        assert_eq!(other_only.backends, backends(&[dns]));
        assert_eq!(other_only.draining, backends(&[web]));
        assert_eq!(of([0, 0, 0]).draining, backends(&[web, dns]));
    }

    #[test]
    fn a_node_port_on_hundreds_of_addresses_is_one_front_end() {
        let node =
            |last| Frontend { address: [192, 0, 2, last].into(), port: 30_080, ..frontend(0, TCP) };
        let slots: Vec<Slot> =
            (0..200).flat_map(|last| [head(node(last), 1), slot(node(last), 1, 1)]).collect();
        let reached = reached(&slots, &[endpoint(1, TCP)]);
        assert_eq!(reached.backends, backends(&[(node(0), 1, Protocol::Tcp)]));
        assert_eq!((reached.backends.len(), reached.unresolved), (1, 0));
    }

    #[test]
    fn slots_that_lead_nowhere_are_unresolved() {
        let web = frontend(1, TCP);
        let lost = reached(&[head(web, 3), slot(web, 1, 1), slot(web, 2, 9)], &[endpoint(1, TCP)]);
        assert_eq!((lost.backends.len(), lost.unresolved), (1, 2), "an unknown id, a missing slot");
        let headless = reached(&[slot(web, 1, 1)], &[endpoint(1, TCP)]);
        assert_eq!(headless, Reached::default());
    }

    #[test]
    fn the_protocol_is_the_frontends_and_tcp_where_neither_says() {
        let (dns, old) = (frontend(1, UDP), frontend(2, ANY));
        let slots = [head(dns, 1), slot(dns, 1, 1), head(old, 2), slot(old, 1, 2), slot(old, 2, 3)];
        let endpoints = [endpoint(1, UDP), endpoint(2, ANY), endpoint(3, UDP)];
        let expected = [(dns, 1, Protocol::Udp), (old, 2, Protocol::Tcp), (old, 3, Protocol::Udp)];
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

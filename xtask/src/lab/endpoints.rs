//! The endpoint controller: from pods to EndpointSlices, one per Service and address family, and
//! on to kube-proxy.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use super::clock;
use super::cluster::Cluster;
use super::network::Family;
use super::objects::{Endpoint, NAMESPACE, POD_PORT, PORT_NAME, Service, slice_name, slice_object};
use super::proxy::Job;
use super::rules::ServicePort;
use super::store::Kind;

/// The port that every Service is reached on.
pub(crate) const SERVICE_PORT: u16 = 80;

/// A slice as last served.
#[derive(Debug, Default)]
struct Slice {
    generation: u64,
    endpoints: Vec<Endpoint>,
}

/// Runs until the lab ends. A change is served `slice_delay` after the first pod change that it
/// includes; several within that time become one, as with the real controller.
pub(crate) fn run(
    cluster: &Arc<Cluster>,
    woken: &Receiver<()>,
    proxies: &BTreeMap<Family, SyncSender<Job>>,
) {
    let mut slices: BTreeMap<(String, Family), Slice> = BTreeMap::new();
    while woken.recv().is_ok() && !cluster.is_closing() {
        let delay_ns = cluster.slice_delay_ns.load(Ordering::Relaxed);
        clock::sleep_until(clock::boot_ns() + delay_ns);
        for (family, proxy) in proxies {
            let changed = serve_changes(cluster, &mut slices, *family);
            if changed.is_empty() {
                continue;
            }
            let ports = cluster
                .services()
                .iter()
                .filter(|service| service.families.contains(family))
                .filter_map(|service| {
                    Some(port(service, *family, slices.get(&(service.name.clone(), *family))?))
                })
                .collect();
            let rules_delay_ns = cluster.rules_delay_ns.load(Ordering::Relaxed);
            let due_ns = clock::boot_ns() + rules_delay_ns;
            if proxy.send(Job { due_ns, ports, touched: changed.into_iter().collect() }).is_err() {
                return;
            }
        }
    }
}

/// Serves the slices that differ from what they were; returns their Services.
fn serve_changes(
    cluster: &Cluster,
    slices: &mut BTreeMap<(String, Family), Slice>,
    family: Family,
) -> Vec<String> {
    let pods = cluster.pods();
    let mut changed = Vec::new();
    for service in cluster.services().iter().filter(|service| service.families.contains(&family)) {
        let selected = pods.iter().filter(|pod| pod.workload == service.workload);
        let endpoints: Vec<Endpoint> =
            selected.filter_map(|pod| Endpoint::of(pod, family)).collect();
        let slice = slices.entry((service.name.clone(), family)).or_default();
        if slice.generation > 0 && slice.endpoints == endpoints {
            continue;
        }
        let begun = newly_terminating(&slice.endpoints, &endpoints);
        let trigger = begun.is_empty().then(clock::wall_seconds);
        slice.generation += 1;
        slice.endpoints = endpoints;
        let object = slice_object(service, family, slice.generation, trigger, &slice.endpoints);
        let at_ns = clock::boot_ns();
        for uid in &begun {
            cluster.record(uid, |pod| {
                pod.slice_terminating_ns.get_or_insert(at_ns);
            });
        }
        cluster.truth().slice_changes.push((at_ns, slice_name(&service.name, family)));
        cluster.api.change(|store| store.put(Kind::EndpointSlice, object));
        changed.push(service.name.clone());
    }
    changed
}

fn newly_terminating(before: &[Endpoint], after: &[Endpoint]) -> Vec<String> {
    let was =
        |uid: &str| before.iter().any(|endpoint| endpoint.pod_uid == uid && endpoint.terminating);
    let begun = after.iter().filter(|endpoint| endpoint.terminating && !was(&endpoint.pod_uid));
    begun.map(|endpoint| endpoint.pod_uid.clone()).collect()
}

/// What kube-proxy makes of a slice: the ready endpoints, or when there are none the terminating
/// ones that still serve (KEP-1669).
fn port(service: &Service, family: Family, slice: &Slice) -> ServicePort {
    let chosen = |usable: fn(&Endpoint) -> bool| -> Vec<SocketAddr> {
        let endpoints = slice.endpoints.iter().filter(|endpoint| usable(endpoint));
        let addresses = endpoints.filter_map(|endpoint| endpoint.address.parse().ok());
        addresses.map(|address| SocketAddr::new(address, POD_PORT)).collect()
    };
    let mut backends = chosen(|endpoint| endpoint.ready);
    if backends.is_empty() {
        backends = chosen(|endpoint| endpoint.serving && endpoint.terminating);
    }
    backends.sort();
    ServicePort {
        namespace: NAMESPACE.to_owned(),
        service: service.name.clone(),
        port_name: PORT_NAME.to_owned(),
        address: family.service_address(service.number),
        port: SERVICE_PORT,
        backends,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(last: u8, ready: bool, serving: bool, terminating: bool) -> Endpoint {
        Endpoint {
            address: format!("10.244.0.{last}"),
            pod_uid: last.to_string(),
            pod_name: String::new(),
            ready,
            serving,
            terminating,
        }
    }

    fn backends(endpoints: Vec<Endpoint>) -> Vec<String> {
        let service = Service {
            name: "web".to_owned(),
            workload: "web".to_owned(),
            families: Family::BOTH.to_vec(),
            number: 10,
        };
        let port = port(&service, Family::V4, &Slice { generation: 1, endpoints });
        port.backends.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_terminating_endpoint_is_no_backend_while_another_is_ready() {
        let endpoints = vec![endpoint(2, false, true, true), endpoint(3, true, true, false)];
        assert_eq!(backends(endpoints), ["10.244.0.3:8080"]);
    }

    #[test]
    fn serving_endpoints_stay_when_all_are_terminating() {
        let endpoints = vec![endpoint(2, false, true, true), endpoint(3, false, false, true)];
        assert_eq!(backends(endpoints), ["10.244.0.2:8080"]);
    }

    #[test]
    fn an_endpoint_begins_to_terminate_once() {
        let before = [endpoint(2, false, true, true), endpoint(3, true, true, false)];
        let after = [endpoint(2, false, true, true), endpoint(3, false, true, true)];
        assert_eq!(newly_terminating(&before, &after), ["3"]);
    }
}

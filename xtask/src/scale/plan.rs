//! A large cluster's Services, pods and EndpointSlices, as its controllers write them. Pure; the same
//! each time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use crate::lab::network::{Addresses, NODE_NAME};
use crate::lab::objects::{Phase, Pod};
use crate::lab::rules::ServicePort;

/// The endpoint controller's `--max-endpoints-per-slice`.
const SLICE_ENDPOINTS: usize = 100;
/// Services of one namespace.
const NAMESPACE_SERVICES: usize = 50;
const PORT: u16 = 8080;
const PORT_NAME: &str = "http";
const CREATED: &str = "2026-11-02T08:15:42Z";
/// Of `--service-cidr` 10.96.0.0/16 and of a pod range that 150,000 pods fit into.
const FIRST_CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const FIRST_POD: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);

/// How large the cluster is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) nodes: u32,
    pub(crate) services: u32,
    pub(crate) endpoints: u32,
}

/// A slice: whose it is, and its endpoints by number.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    pub(crate) number: u32,
    pub(crate) service: u32,
    pub(crate) endpoints: Vec<u32>,
}

impl Plan {
    /// All slices. Of 100 Services one has a third of their endpoints, nine have another third, and
    /// 90 the last: clusters have many small Services and few large ones.
    pub(crate) fn slices(self) -> Vec<Slice> {
        let average = self.endpoints / self.services;
        let (large, middle) = (average * 100 / 3, average * 100 / 27);
        let is_small = |service: &u32| !service.is_multiple_of(10);
        let count = |kind: fn(&u32) -> bool| (0..self.services).filter(kind).count();
        let (larges, middles) = (count(|n| n % 100 == 0), count(|n| n % 10 == 0));
        let (larges, tens) = (as_u32(larges), as_u32(middles));
        let left = self.endpoints - larges * large - (tens - larges) * middle;
        let smalls = self.services - tens;
        let (mut slices, mut next, mut seen) = (Vec::new(), 0, 0);
        for service in 0..self.services {
            let size = if is_small(&service) {
                seen += 1;
                left / smalls + u32::from(seen <= left % smalls)
            } else if service % 100 == 0 {
                large
            } else {
                middle
            };
            let endpoints: Vec<u32> = (next..next + size).collect();
            next += size;
            for endpoints in endpoints.chunks(SLICE_ENDPOINTS) {
                let number = as_u32(slices.len());
                slices.push(Slice { number, service, endpoints: endpoints.to_vec() });
            }
        }
        slices
    }

    /// A slice's object, without its version.
    pub(crate) fn slice_object(self, slice: &Slice) -> Value {
        let service = slice.service;
        let name = service_name(service);
        let endpoints: Vec<Value> =
            slice.endpoints.iter().map(|number| self.endpoint(service, *number)).collect();
        json!({
            "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
            "metadata": {
                "name": format!("{name}-{:05x}", slice.number), "namespace": namespace(service),
                "uid": slice_uid(slice.number), "generation": 7, "generateName": format!("{name}-"),
                "creationTimestamp": CREATED,
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": CREATED},
                "labels": {
                    "app.kubernetes.io/instance": name, "app.kubernetes.io/managed-by": "Helm",
                    "app.kubernetes.io/name": name, "helm.sh/chart": format!("{name}-1.4.2"),
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    "kubernetes.io/service-name": name,
                },
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Service", "name": name, "uid": uid(1, service),
                    "controller": true, "blockOwnerDeletion": true,
                }],
                "managedFields": [{
                    "manager": "kube-controller-manager", "operation": "Update",
                    "apiVersion": "discovery.k8s.io/v1", "time": CREATED, "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:addressType": {}, "f:endpoints": {}, "f:ports": {}, "f:metadata": {
                        "f:annotations": {".": {}, "f:endpoints.kubernetes.io/last-change-trigger-time": {}},
                        "f:generateName": {}, "f:labels": {".": {}, "f:kubernetes.io/service-name": {}},
                        "f:ownerReferences": {".": {}, "k:{\"uid\"}": {}},
                    }},
                }],
            },
            "endpoints": endpoints,
            "ports": [{"name": PORT_NAME, "port": PORT, "protocol": "TCP"}],
        })
    }

    /// One endpoint of a slice, ready.
    pub(crate) fn endpoint(self, service: u32, number: u32) -> Value {
        let node = number % self.nodes;
        json!({
            "addresses": [pod_address(number)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": node_name(node), "zone": format!("eu-central-1{}", ["a", "b", "c"][node as usize % 3]),
            "targetRef": {
                "kind": "Pod", "namespace": namespace(service),
                "name": pod_name(service, number), "uid": pod_uid(number),
            },
        })
    }

    /// The objects of the pods on the observed node.
    pub(crate) fn pods(self, slices: &[Slice]) -> Vec<Value> {
        let endpoints = slices.iter().flat_map(|slice| {
            slice.endpoints.iter().map(|number| (service_name(slice.service), *number))
        });
        let here = endpoints.filter(|(_, number)| number % self.nodes == 0);
        let pod = |(workload, number): (String, u32)| Pod {
            uid: pod_uid(number),
            name: format!("{workload}-6d4b75cb6d-{number:05x}"),
            workload,
            container_id: format!("{number:064x}"),
            addresses: Addresses {
                v4: pod_address(number),
                v6: Ipv6Addr::from_bits((0xfd00 << 112) + u128::from(number) + 1),
            },
            pre_stop_sleep_seconds: None,
            grace_seconds: 30,
            probed: true,
            created: 1_793_600_000,
            phase: Phase::Running,
            ready: true,
            deletion: None,
        };
        here.map(|pod_of| pod(pod_of).object()).collect()
    }
}

/// A Service as the rules know it.
pub(crate) fn service_port(service: u32, ready: &[u32]) -> ServicePort {
    let backend = |number: &u32| SocketAddr::new(IpAddr::V4(pod_address(*number)), PORT);
    ServicePort {
        namespace: namespace(service),
        service: service_name(service),
        port_name: PORT_NAME.to_owned(),
        address: Ipv4Addr::from_bits(FIRST_CLUSTER_IP.to_bits() + service).into(),
        port: 80,
        backends: ready.iter().map(backend).collect(),
    }
}

/// `metadata.uid` of a slice.
pub(crate) fn slice_uid(number: u32) -> String {
    uid(2, number)
}

/// `metadata.uid` of an endpoint's pod.
pub(crate) fn pod_uid(number: u32) -> String {
    uid(3, number)
}

fn pod_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(FIRST_POD.to_bits() + number)
}

fn namespace(service: u32) -> String {
    format!("team-{:03}", as_u32(service as usize / NAMESPACE_SERVICES))
}

fn service_name(service: u32) -> String {
    format!("checkout-api-{service:05}")
}

fn pod_name(service: u32, number: u32) -> String {
    format!("{}-6d4b75cb6d-{number:05x}", service_name(service))
}

fn node_name(node: u32) -> String {
    if node == 0 {
        return NODE_NAME.to_owned();
    }
    let [_, _, third, fourth] = node.to_be_bytes();
    format!("ip-10-12-{third}-{fourth}.eu-central-1.compute.internal")
}

/// In the form of a random UUID.
fn uid(kind: u64, number: u32) -> String {
    /// Odd, so that no two numbers meet; 2^64 divided by the golden ratio.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let bits = (u64::from(number) << 2 | kind).wrapping_mul(SPREAD);
    let (high, low) = (bits >> 32, bits & 0xffff_ffff);
    format!("{high:08x}-{:04x}-4{:03x}-a{:03x}-{low:012x}", low >> 16, high & 0xfff, low & 0xfff)
}

fn as_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_plan_has_as_many_endpoints_as_asked_for_in_slices_of_at_most_a_hundred() {
        for (services, endpoints) in [(1_000, 5_000), (10_000, 150_000)] {
            let slices = Plan { nodes: 200, services, endpoints }.slices();
            let numbers: BTreeSet<u32> =
                slices.iter().flat_map(|slice| slice.endpoints.iter().copied()).collect();
            assert_eq!(numbers.len(), endpoints as usize);
            assert!(slices.iter().all(|slice| (1..=100).contains(&slice.endpoints.len())));
            assert_eq!(slices.last().map(|slice| slice.service), Some(services - 1));
        }
    }

    #[test]
    fn no_two_objects_share_a_uid() {
        let uids: BTreeSet<String> =
            (0..10_000).flat_map(|n| [1, 2, 3].map(|k| uid(k, n))).collect();
        assert_eq!(uids.len(), 30_000);
    }
}

//! An EndpointSlice, trimmed to addresses, ports and conditions, and its conversion into facts.
//!
//! Pure. Slices that belong to no Service and addresses that are host names (`addressType: FQDN`)
//! hold nothing that a dataplane sends connections to: they convert to no endpoints.

use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;

use crate::clock::WallOffset;
use crate::facts::{
    BootNs, ClusterFact, Conditions, Endpoint, PodUid, Protocol, ServicePort, SliceObserved,
    TargetPod,
};

use super::watch::Watched;

/// What the API server allows in one slice (`discovery.k8s.io/v1`). Every endpoint is kept with
/// every port, so that without these a hostile slice would take memory with its square.
const MAX_ENDPOINTS: usize = 1000;
const MAX_PORTS: usize = 100;

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct EndpointSlice {
    metadata: Metadata,
    endpoints: Option<Vec<SliceEndpoint>>,
    ports: Option<Vec<SlicePort>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    namespace: Arc<str>,
    name: Arc<str>,
    resource_version: String,
    #[serde(default)]
    labels: Labels,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Labels {
    #[serde(rename = "kubernetes.io/service-name")]
    service: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint {
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    conditions: SliceConditions,
    target_ref: Option<TargetRef>,
    node_name: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct SliceConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
struct TargetRef {
    kind: Option<String>,
    namespace: Option<Arc<str>>,
    name: Option<Arc<str>>,
    uid: Option<PodUid>,
}

#[derive(Clone, Debug, Deserialize)]
struct SlicePort {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<Protocol>,
}

impl Watched for EndpointSlice {
    type Key = Arc<str>;
    const NAME: &'static str = "endpointslice watch";
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";

    fn key(&self) -> Arc<str> {
        format!("{}/{}", self.metadata.namespace, self.metadata.name).into()
    }

    fn resource_version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn observed(&self, at: BootNs, _offset: WallOffset) -> ClusterFact {
        let service = self.metadata.labels.service.as_deref();
        let endpoints = service.map(|service| endpoints(self, service)).unwrap_or_default();
        ClusterFact::Slice(SliceObserved { at, slice: self.key(), endpoints })
    }

    fn removed(slice: Arc<str>, at: BootNs) -> ClusterFact {
        ClusterFact::Slice(SliceObserved { at, slice, endpoints: Vec::new() })
    }
}

/// Every endpoint with every port. Of several addresses only the first means anything, says the
/// API, and kube-proxy looks at no other. A port without a number means all ports, which no dataplane
/// turns into a backend.
fn endpoints(slice: &EndpointSlice, service: &str) -> Vec<Endpoint> {
    let namespace = &slice.metadata.namespace;
    let ports: Vec<(ServicePort, Protocol, u16)> = slice
        .ports
        .iter()
        .flatten()
        .take(MAX_PORTS)
        .filter_map(|port| {
            let service_port = service_port(namespace, service, port.name.as_deref());
            Some((service_port, port.protocol.unwrap_or(Protocol::Tcp), port.port?))
        })
        .collect();
    let mut found = Vec::new();
    for endpoint in slice.endpoints.iter().flatten().take(MAX_ENDPOINTS) {
        let conditions = conditions(&endpoint.conditions);
        let pod = endpoint.target_ref.as_ref().and_then(|target| target_pod(target, namespace));
        let address = endpoint.addresses.first().and_then(|text| text.parse::<IpAddr>().ok());
        if let Some(address) = address {
            found.extend(ports.iter().map(|(service, protocol, port)| Endpoint {
                service: service.clone(),
                protocol: *protocol,
                address,
                port: *port,
                conditions,
                pod: pod.clone(),
                node: endpoint.node_name.clone(),
            }));
        }
    }
    found
}

fn service_port(namespace: &str, service: &str, port: Option<&str>) -> ServicePort {
    match port {
        None | Some("") => ServicePort(format!("{namespace}/{service}").into()),
        Some(port) => ServicePort(format!("{namespace}/{service}:{port}").into()),
    }
}

fn conditions(given: &SliceConditions) -> Conditions {
    Conditions {
        ready: given.ready.unwrap_or(true),
        serving: given.serving.unwrap_or(true),
        terminating: given.terminating.unwrap_or(false),
    }
}

fn target_pod(target: &TargetRef, namespace: &Arc<str>) -> Option<TargetPod> {
    target.kind.as_deref().filter(|kind| *kind == "Pod")?;
    Some(TargetPod {
        uid: target.uid.clone()?,
        namespace: target.namespace.clone().unwrap_or_else(|| namespace.clone()),
        name: target.name.clone()?,
    })
}

#[cfg(test)]
#[path = "slice_tests.rs"]
mod tests;

//! An EndpointSlice, trimmed to addresses, ports and conditions, and its conversion into facts.
//!
//! Pure. Slices that belong to no Service and addresses that are host names (`addressType: FQDN`)
//! hold nothing that a dataplane sends connections to: they convert to no endpoints.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::clock::WallOffset;
use crate::facts::{
    BootNs, ClusterFact, Conditions, Endpoint, EndpointPort, PodUid, Protocol, ServicePort,
    SliceObserved, TargetPod,
};

use super::watch::Watched;

/// What the API server allows in one slice (`discovery.k8s.io/v1`). Every endpoint has every port, so
/// that without these a hostile slice would take time with its square.
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
    addresses: FirstAddress,
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
    kind: Option<Kind>,
    namespace: Option<Arc<str>>,
    name: Option<Arc<str>>,
    uid: Option<PodUid>,
}

/// What a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Kind {
    Pod,
    #[serde(other)]
    Other,
}

/// Of several addresses only the first means anything, says the API, and kube-proxy looks at no
/// other. `None` when it is a host name.
#[derive(Clone, Copy, Debug, Default)]
struct FirstAddress(Option<IpAddr>);

impl<'de> Deserialize<'de> for FirstAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Self(None))
    }
}

impl<'de> Visitor<'de> for FirstAddress {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of addresses")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut addresses: A) -> Result<Self, A::Error> {
        let first = addresses.next_element::<Cow<'_, str>>()?;
        while addresses.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self(first.and_then(|text| text.parse().ok())))
    }
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
        let (mut ports, mut endpoints) = (Vec::new(), Vec::new());
        if let Some(service) = &self.metadata.labels.service {
            (ports, endpoints) = (self::ports(self, service), self::endpoints(self));
        }
        ClusterFact::Slice(SliceObserved { at, slice: self.key(), ports, endpoints })
    }

    fn removed(slice: Arc<str>, at: BootNs) -> ClusterFact {
        let (ports, endpoints) = (Vec::new(), Vec::new());
        ClusterFact::Slice(SliceObserved { at, slice, ports, endpoints })
    }
}

/// A port without a number means all ports, which no dataplane turns into a backend.
fn ports(slice: &EndpointSlice, service: &str) -> Vec<EndpointPort> {
    let namespace = &slice.metadata.namespace;
    let port = |port: &SlicePort| {
        Some(EndpointPort {
            service: service_port(namespace, service, port.name.as_deref()),
            protocol: port.protocol.unwrap_or(Protocol::Tcp),
            port: port.port?,
        })
    };
    slice.ports.iter().flatten().take(MAX_PORTS).filter_map(port).collect()
}

fn endpoints(slice: &EndpointSlice) -> Vec<Endpoint> {
    let namespace = &slice.metadata.namespace;
    let endpoint = |endpoint: &SliceEndpoint| {
        Some(Endpoint {
            address: endpoint.addresses.0?,
            conditions: conditions(&endpoint.conditions),
            pod: endpoint.target_ref.as_ref().and_then(|target| target_pod(target, namespace)),
            node: endpoint.node_name.clone(),
        })
    };
    slice.endpoints.iter().flatten().take(MAX_ENDPOINTS).filter_map(endpoint).collect()
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
    target.kind.filter(|kind| *kind == Kind::Pod)?;
    Some(TargetPod {
        uid: target.uid.clone()?,
        namespace: target.namespace.clone().unwrap_or_else(|| namespace.clone()),
        name: target.name.clone()?,
    })
}

#[cfg(test)]
#[path = "slice_tests.rs"]
mod tests;

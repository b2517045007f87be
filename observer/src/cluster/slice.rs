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
    BootNs, ClusterFact, Conditions, Endpoint, EndpointPort, Protocol, ServicePort, SliceObserved,
    TargetPod,
};

use super::watch::Watched;

/// What the API server allows in one slice (`discovery.k8s.io/v1`). Every endpoint has every port, so
/// that without these a hostile slice would take time with its square.
const MAX_ENDPOINTS: usize = 1000;
const MAX_PORTS: usize = 100;

/// How many endpoints the controller puts in a slice (`--max-endpoints-per-slice`).
const FULL: usize = 100;

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct EndpointSlice {
    metadata: Metadata,
    endpoints: Option<Endpoints>,
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

/// What is told of the endpoints. Each is read in place, and only what is told of it takes memory of
/// its own: with every change of one endpoint all of its slice come again. A pod's namespace is empty
/// where the endpoint gives none.
#[derive(Clone, Debug, Default)]
struct Endpoints(Vec<Endpoint>);

impl<'de> Deserialize<'de> for Endpoints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Self::default())
    }
}

impl<'de> Visitor<'de> for Endpoints {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of endpoints")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut listed: A) -> Result<Self, A::Error> {
        let mut namespace = Arc::default();
        self.0.reserve_exact(FULL);
        while let Some(endpoint) = listed.next_element::<SliceEndpoint<'_>>()? {
            if self.0.len() < MAX_ENDPOINTS {
                self.0.extend(endpoint.told(&mut namespace));
            }
        }
        self.0.shrink_to_fit();
        Ok(self)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceEndpoint<'a> {
    #[serde(default)]
    addresses: FirstAddress,
    #[serde(default)]
    conditions: SliceConditions,
    #[serde(borrow)]
    target_ref: Option<TargetRef<'a>>,
    #[serde(borrow)]
    node_name: Option<Text<'a>>,
}

impl SliceEndpoint<'_> {
    /// `namespace` is that of the endpoint before, which most share.
    fn told(self, namespace: &mut Arc<str>) -> Option<Endpoint> {
        Some(Endpoint {
            address: self.addresses.0?,
            conditions: conditions(&self.conditions),
            pod: self.target_ref.and_then(|target| target.pod(namespace)),
            node: self.node_name.map(|name| name.0.into()),
        })
    }
}

/// Text where it was read, unless it has escapes.
#[derive(Default, Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Clone, Debug, Default, Deserialize)]
struct SliceConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize)]
struct TargetRef<'a> {
    kind: Option<Kind>,
    #[serde(borrow)]
    namespace: Option<Text<'a>>,
    #[serde(borrow)]
    name: Option<Text<'a>>,
    #[serde(borrow)]
    uid: Option<Text<'a>>,
}

impl TargetRef<'_> {
    fn pod(self, namespace: &mut Arc<str>) -> Option<TargetPod> {
        self.kind.filter(|kind| *kind == Kind::Pod)?;
        let own = self.namespace.unwrap_or_default().0;
        if **namespace != *own {
            *namespace = own.into();
        }
        let uid = (&*self.uid?.0).into();
        Some(TargetPod { uid, namespace: namespace.clone(), name: self.name?.0.into() })
    }
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
        let first = addresses.next_element::<Text<'_>>()?;
        while addresses.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self(first.and_then(|text| text.0.parse().ok())))
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

    fn observed(self, at: BootNs, _offset: WallOffset) -> ClusterFact {
        let (mut ports, mut endpoints) = (Vec::new(), Vec::new());
        let slice = self.key();
        if let Some(service) = &self.metadata.labels.service {
            ports = self::ports(&self, service);
            endpoints = self::endpoints(self);
        }
        ClusterFact::Slice(SliceObserved { at, slice, ports, endpoints })
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

fn endpoints(slice: EndpointSlice) -> Vec<Endpoint> {
    let mut endpoints = slice.endpoints.unwrap_or_default().0;
    for pod in endpoints.iter_mut().filter_map(|endpoint| endpoint.pod.as_mut()) {
        if pod.namespace.is_empty() {
            pod.namespace = slice.metadata.namespace.clone();
        }
    }
    endpoints
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

#[cfg(test)]
#[path = "slice_tests.rs"]
mod tests;

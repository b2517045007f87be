//! A pod, trimmed to what a termination needs, and its conversion into facts.
//!
//! Pure. Fields that the API server leaves out take the API's own defaults; anything else in the
//! object is skipped while parsing and never kept.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::clock::WallOffset;
use crate::facts::{BootNs, ClusterFact, Deletion, PodObserved, PodUid, Workload};

use super::watch::Watched;

/// `spec.terminationGracePeriodSeconds` when omitted (`core/v1`).
const DEFAULT_GRACE_SECONDS: i64 = 30;

/// What a deletion makes of a negative one (`core/v1`).
const NEGATIVE_GRACE_SECONDS: u64 = 1;

/// `core/v1` Pod.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pod {
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    uid: PodUid,
    namespace: Arc<str>,
    name: Arc<str>,
    resource_version: String,
    deletion_timestamp: Option<jiff::Timestamp>,
    deletion_grace_period_seconds: Option<u64>,
    #[serde(default)]
    labels: Labels,
    #[serde(default)]
    owner_references: Vec<Owner>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Labels {
    /// The hash that a Deployment appends to the names of its `ReplicaSets`.
    #[serde(rename = "pod-template-hash")]
    template_hash: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Owner {
    kind: Arc<str>,
    name: Arc<str>,
    #[serde(default)]
    controller: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    /// Signed: before Kubernetes 1.27 a negative one is shown as stored, and an object that does not
    /// parse stops the whole watch.
    termination_grace_period_seconds: Option<i64>,
    #[serde(default)]
    host_network: bool,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    lifecycle: Option<Lifecycle>,
    ports: Option<Vec<ContainerPort>>,
    readiness_probe: Option<Probe>,
    liveness_probe: Option<Probe>,
    startup_probe: Option<Probe>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: u16,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    http_get: Option<ProbeTarget>,
    tcp_socket: Option<ProbeTarget>,
    grpc: Option<ProbeTarget>,
}

#[derive(Clone, Debug, Deserialize)]
struct ProbeTarget {
    port: PortReference,
}

/// A port by its number or by its name in `ports`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum PortReference {
    Number(u16),
    Name(String),
}

impl Container {
    /// The ports of its own that the kubelet connects to in order to probe it.
    fn probed_ports(&self) -> impl Iterator<Item = u16> {
        let probes = [&self.readiness_probe, &self.liveness_probe, &self.startup_probe];
        let targets = probes
            .into_iter()
            .flatten()
            .flat_map(|probe| [&probe.http_get, &probe.tcp_socket, &probe.grpc]);
        targets.flatten().filter_map(|target| match &target.port {
            PortReference::Number(port) => Some(*port),
            PortReference::Name(name) => {
                let mut ports = self.ports.iter().flatten();
                let port = ports.find(|port| port.name.as_ref() == Some(name))?;
                Some(port.container_port)
            }
        })
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lifecycle {
    pre_stop: Option<PreStop>,
}

#[derive(Clone, Debug, Deserialize)]
struct PreStop {
    sleep: Option<Sleep>,
}

#[derive(Clone, Debug, Deserialize)]
struct Sleep {
    seconds: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: String,
}

impl Watched for Pod {
    type Key = PodUid;
    const NAME: &'static str = "pod watch";
    const PATH: &'static str = "/api/v1/pods";

    fn key(&self) -> PodUid {
        self.metadata.uid.clone()
    }

    fn resource_version(&self) -> &str {
        &self.metadata.resource_version
    }

    fn observed(self, at: BootNs, offset: WallOffset) -> ClusterFact {
        ClusterFact::Pod(observed(&self, at, offset))
    }

    fn removed(uid: PodUid, at: BootNs) -> ClusterFact {
        ClusterFact::PodRemoved { at, uid }
    }
}

fn observed(pod: &Pod, at: BootNs, offset: WallOffset) -> PodObserved {
    let Pod { metadata, spec, status } = pod;
    let grace = spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_SECONDS);
    PodObserved {
        at,
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        workload: workload(metadata),
        addresses: addresses(spec, status),
        deletion: deletion(metadata, offset),
        pre_stop_sleep: pre_stop_sleep(spec),
        grace_period: Duration::from_secs(u64::try_from(grace).unwrap_or(NEGATIVE_GRACE_SECONDS)),
        probed_ports: running(spec).flat_map(Container::probed_ports).collect(),
        ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
    }
}

/// A Deployment names its `ReplicaSets` `<deployment>-<pod-template-hash>` and labels the pods with
/// the hash, so the Deployment is known without watching `ReplicaSets`.
fn workload(metadata: &Metadata) -> Workload {
    let Some(owner) = metadata.owner_references.iter().find(|owner| owner.controller) else {
        return Workload { kind: "Pod".into(), name: metadata.name.clone() };
    };
    let deployment = metadata
        .labels
        .template_hash
        .as_deref()
        .filter(|_| &*owner.kind == "ReplicaSet")
        .and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'))
        .filter(|name| !name.is_empty());
    match deployment {
        Some(name) => Workload { kind: "Deployment".into(), name: name.into() },
        None => Workload { kind: owner.kind.clone(), name: owner.name.clone() },
    }
}

/// A host-network pod has the node's addresses: they say nothing about the pod.
fn addresses(spec: &Spec, status: &Status) -> Vec<IpAddr> {
    if spec.host_network {
        return Vec::new();
    }
    status.pod_ips.iter().flatten().filter_map(|pod_ip| pod_ip.ip.parse().ok()).collect()
}

fn deletion(metadata: &Metadata, offset: WallOffset) -> Option<Deletion> {
    let timestamp = metadata.deletion_timestamp?;
    let grace = Duration::from_secs(metadata.deletion_grace_period_seconds.unwrap_or_default());
    Some(Deletion { not_before: offset.to_boot(timestamp.as_nanosecond()).minus(grace), grace })
}

/// The containers that live as long as the pod: the main ones and, of the init containers, the
/// sidecars (`restartPolicy: Always`).
fn running(spec: &Spec) -> impl Iterator<Item = &Container> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|init| init.restart_policy.as_deref() == Some("Always"));
    spec.containers.iter().flatten().chain(sidecars)
}

/// The longest over all containers that stop with the pod.
fn pre_stop_sleep(spec: &Spec) -> Option<Duration> {
    let sleep = |container: &Container| {
        let sleep = container.lifecycle.as_ref()?.pre_stop.as_ref()?.sleep.as_ref()?;
        Some(Duration::from_secs(sleep.seconds))
    };
    running(spec).filter_map(sleep).max()
}

#[cfg(test)]
#[path = "pod_tests.rs"]
mod tests;

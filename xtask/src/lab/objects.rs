//! Pods and EndpointSlices as the API server shows them. Pure: from the cluster's state to JSON.

use serde_json::{Value, json};

use super::clock::rfc3339;
use super::network::{Addresses, Family, NODE_NAME};

/// The suffix that a ReplicaSet's name and its `pod-template-hash` label share.
pub(crate) const TEMPLATE_HASH: &str = "6d4b75cb6d";
/// The port that every pod serves on.
pub(crate) const POD_PORT: u16 = 8080;
/// The name of a Service's only port.
pub(crate) const PORT_NAME: &str = "http";
/// Every object of the lab is here.
pub(crate) const NAMESPACE: &str = "default";

/// `status.phase`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

/// A pod as the API server knows it.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) name: String,
    /// The Deployment it belongs to.
    pub(crate) workload: String,
    pub(crate) container_id: String,
    pub(crate) addresses: Addresses,
    pub(crate) pre_stop_sleep_seconds: Option<u64>,
    pub(crate) grace_seconds: u64,
    /// Whether the kubelet probes its port.
    pub(crate) probed: bool,
    /// Wall seconds.
    pub(crate) created: i64,
    pub(crate) phase: Phase,
    pub(crate) ready: bool,
    /// `deletionTimestamp` in wall seconds, and `deletionGracePeriodSeconds`.
    pub(crate) deletion: Option<(i64, u64)>,
}

impl Pod {
    pub(crate) fn ended(&self) -> bool {
        matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    /// The object, without its version.
    pub(crate) fn object(&self) -> Value {
        let workload = &self.workload;
        let replica_set = format!("{workload}-{TEMPLATE_HASH}");
        let mut container = json!({
            "name": "server", "image": "lab-pod",
            "ports": [{"name": PORT_NAME, "containerPort": POD_PORT, "protocol": "TCP"}],
        });
        if self.probed {
            container["readinessProbe"] = json!({"tcpSocket": {"port": PORT_NAME}});
        }
        if let Some(seconds) = self.pre_stop_sleep_seconds {
            container["lifecycle"] = json!({"preStop": {"sleep": {"seconds": seconds}}});
        }
        let mut metadata = json!({
            "name": self.name, "namespace": NAMESPACE, "uid": self.uid,
            "generateName": format!("{replica_set}-"), "creationTimestamp": rfc3339(self.created),
            "labels": {"app": workload, "pod-template-hash": TEMPLATE_HASH},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": replica_set,
                "uid": format!("{replica_set}-uid"), "controller": true, "blockOwnerDeletion": true,
            }],
        });
        if let Some((timestamp, grace_seconds)) = self.deletion {
            metadata["deletionTimestamp"] = json!(rfc3339(timestamp));
            metadata["deletionGracePeriodSeconds"] = json!(grace_seconds);
        }
        json!({
            "kind": "Pod", "apiVersion": "v1", "metadata": metadata,
            "spec": {
                "nodeName": NODE_NAME, "restartPolicy": "Always", "containers": [container],
                "terminationGracePeriodSeconds": self.grace_seconds,
            },
            "status": self.status(),
        })
    }

    fn status(&self) -> Value {
        let phase = format!("{:?}", self.phase);
        if self.phase == Phase::Pending {
            return json!({"phase": phase, "qosClass": "Burstable"});
        }
        let ready = if self.ready { "True" } else { "False" };
        let started = rfc3339(self.created);
        let state = if self.ended() {
            json!({"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": started}})
        } else {
            json!({"running": {"startedAt": started}})
        };
        json!({
            "phase": phase, "qosClass": "Burstable", "startTime": started,
            "podIP": self.addresses.v4, "podIPs": [{"ip": self.addresses.v4}, {"ip": self.addresses.v6}],
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "Ready", "status": ready},
                {"type": "ContainersReady", "status": ready},
                {"type": "PodScheduled", "status": "True"},
            ],
            "containerStatuses": [{
                "name": "server", "image": "lab-pod", "imageID": "", "restartCount": 0,
                "containerID": format!("containerd://{}", self.container_id),
                "ready": self.ready, "started": !self.ended(), "state": state,
            }],
        })
    }
}

/// A Service; its object is not served, because the agent does not read it.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) name: String,
    /// The workload whose pods it selects.
    pub(crate) workload: String,
    pub(crate) families: Vec<Family>,
    /// Cluster addresses end in it.
    pub(crate) number: u8,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: String,
    pub(crate) pod_uid: String,
    pub(crate) pod_name: String,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
}

impl Endpoint {
    /// What the endpoint controller lists for a pod: nothing before it has an address and after it
    /// has ended.
    pub(crate) fn of(pod: &Pod, family: Family) -> Option<Self> {
        if pod.phase == Phase::Pending || pod.ended() {
            return None;
        }
        let terminating = pod.deletion.is_some();
        Some(Self {
            address: pod.addresses.of(family).to_string(),
            pod_uid: pod.uid.clone(),
            pod_name: pod.name.clone(),
            ready: pod.ready && !terminating,
            serving: pod.ready,
            terminating,
        })
    }
}

/// The name of a Service's slice of one family.
pub(crate) fn slice_name(service: &str, family: Family) -> String {
    let suffix = if family == Family::V4 { "vtd96" } else { "x6k2p" };
    format!("{service}-{suffix}")
}

/// An EndpointSlice, without its version. `trigger` is the wall time of the readiness change that
/// caused it: none when a pod's deletion did.
pub(crate) fn slice_object(
    service: &Service,
    family: Family,
    generation: u64,
    trigger: Option<i64>,
    endpoints: &[Endpoint],
) -> Value {
    let name = slice_name(&service.name, family);
    let endpoints: Vec<Value> = endpoints.iter().map(endpoint_object).collect();
    let mut slice = json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": family.address_type(),
        "metadata": {
            "name": name, "namespace": NAMESPACE, "uid": format!("{name}-uid"), "generation": generation,
            "generateName": format!("{}-", service.name),
            "labels": {
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": service.name,
            },
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Service", "name": service.name,
                "uid": format!("{}-uid", service.name), "controller": true, "blockOwnerDeletion": true,
            }],
        },
        "endpoints": endpoints,
        "ports": [{"name": PORT_NAME, "port": POD_PORT, "protocol": "TCP"}],
    });
    if let Some(trigger) = trigger {
        slice["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": rfc3339(trigger)});
    }
    slice
}

fn endpoint_object(endpoint: &Endpoint) -> Value {
    let Endpoint { address, pod_uid, pod_name, ready, serving, terminating } = endpoint;
    json!({
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "nodeName": NODE_NAME,
        "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod_name, "uid": pod_uid},
    })
}

//! A node's registration: what a kubelet tells of itself before it runs anything.

use anyhow::Result;
use serde_json::{Value, json};

use super::api::{Api, Patch};
use super::network::Node;
use crate::lab::clock;

/// Registers a node as its kubelet does: the object, its status, its lease.
pub(crate) fn register(kubelet: &Api, node: &Node) -> Result<()> {
    let name = node.name;
    kubelet.create("/api/v1/nodes", &object(node))?;
    let path = format!("/api/v1/nodes/{name}/status");
    kubelet.patch(&path, Patch::Strategic, &json!({"status": status(node)}))?;
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": name, "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": micro_time()},
    });
    kubelet.create("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", &lease)?;
    Ok(())
}

fn object(node: &Node) -> Value {
    let [v4, v6] = node.pod_cidrs();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux"},
        },
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
    })
}

fn status(node: &Node) -> Value {
    let now = clock::rfc3339(clock::wall_seconds());
    let room = json!({"cpu": "2", "memory": "8Gi", "pods": "110"});
    json!({
        "capacity": room, "allocatable": room,
        "addresses": [
            {"type": "InternalIP", "address": node.addresses.v4},
            {"type": "InternalIP", "address": node.addresses.v6},
            {"type": "Hostname", "address": node.name},
        ],
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        }],
    })
}

/// Now, as `metav1.MicroTime` writes it.
fn micro_time() -> String {
    clock::rfc3339(clock::wall_seconds()).replace('Z', ".000000Z")
}

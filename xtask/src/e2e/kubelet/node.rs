//! The node's own objects: the Node and its Lease. Pure.

use serde_json::{Value, json};

use crate::lab::network::Addresses;

/// The namespace of the nodes' Leases.
pub(super) const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
/// `leaseDurationSeconds` of a real kubelet, which renews four times as often.
const LEASE_SECONDS: u32 = 40;
/// More than any test needs: nothing here is ever short of it.
const CPUS: &str = "8";
const MEMORY: &str = "16Gi";
/// The kubelet's default.
const MOST_PODS: &str = "110";

/// The Node without its status.
pub(super) fn node(name: &str, pod_cidrs: &[String]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
        }},
        "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs},
    })
}

/// A merge patch of the Node's status: it can run pods.
pub(super) fn ready(name: &str, addresses: Addresses, now: &str) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": reason,
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        })
    };
    let resources = json!({
        "cpu": CPUS, "memory": MEMORY, "pods": MOST_PODS, "ephemeral-storage": MEMORY,
    });
    json!({"status": {
        "addresses": [
            {"type": "InternalIP", "address": addresses.v4},
            {"type": "InternalIP", "address": addresses.v6},
            {"type": "Hostname", "address": name},
        ],
        "capacity": resources, "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
            condition("Ready", "True", "KubeletReady"),
        ],
        "nodeInfo": {
            "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "",
            "containerRuntimeVersion": "containerd://0.0.0", "kubeletVersion": "v0.0.0-lab",
            "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64",
        },
    }})
}

/// The Lease as it is first made; `now` with microseconds.
pub(super) fn lease(name: &str, now: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": name, "namespace": "kube-node-lease"},
        "spec": {
            "holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now,
        },
    })
}

/// A merge patch: the node lives.
pub(super) fn renewal(now: &str) -> Value {
    json!({"spec": {"renewTime": now}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_the_labels_and_ranges_that_others_read() {
        let cidrs = ["10.244.1.0/24".to_owned(), "fd00::/64".to_owned()];
        let node = node("node-1", &cidrs);
        assert_eq!(node["metadata"]["labels"]["kubernetes.io/hostname"], "node-1");
        assert_eq!(node["spec"]["podCIDR"], "10.244.1.0/24");
        assert_eq!(node["spec"]["podCIDRs"][1], "fd00::/64");
    }

    #[test]
    fn a_ready_node_has_addresses_of_both_families() {
        let status = ready("node-1", Addresses::of_pod(1), "2026-11-21T01:45:04Z")["status"].take();
        assert_eq!(status["addresses"].as_array().map(Vec::len), Some(3));
        let conditions = status["conditions"].as_array().expect("conditions");
        assert!(conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"));
    }
}

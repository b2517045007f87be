use serde_json::{Value, json};

use super::*;

const AT: BootNs = BootNs(5_000_000_000);

/// A pod as the API server sends it, with fields that are not needed left in.
fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web-ff44b8f56-gw97c",
            "generateName": "web-ff44b8f56-",
            "namespace": "default",
            "uid": "9d3c0a54-3e0e-4b43-8d38-2f3f0a8e3c11",
            "resourceVersion": "648",
            "creationTimestamp": "2026-11-21T01:42:52Z",
            "labels": {"app": "web", "pod-template-hash": "ff44b8f56"},
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-ff44b8f56",
                "uid": "0b3d9c8e", "controller": true, "blockOwnerDeletion": true
            }],
            "managedFields": [{"manager": "kubelet", "operation": "Update"}]
        },
        "spec": {
            "nodeName": "node-1",
            "terminationGracePeriodSeconds": 40,
            "containers": [
                {"name": "app", "image": "app", "lifecycle": {"preStop": {"sleep": {"seconds": 5}}}},
                {"name": "log", "image": "log", "lifecycle": {"preStop": {"exec": {"command": ["x"]}}}}
            ]
        },
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-21T01:42:54Z"}
            ],
            "podIP": "10.244.0.20",
            "podIPs": [{"ip": "10.244.0.20"}, {"ip": "fd00::14"}]
        }
    })
}

/// The wall clock shows 2026-11-21T01:44:40Z when the boot clock shows 100 s.
fn offset() -> WallOffset {
    let wall: jiff::Timestamp = "2026-11-21T01:44:40Z".parse().expect("a timestamp");
    WallOffset::fixed(wall.as_nanosecond(), BootNs(100_000_000_000))
}

fn see(object: Value) -> PodObserved {
    let pod: Pod = serde_json::from_value(object).expect("a pod");
    observed(&pod, AT, offset())
}

fn workload_of(metadata: &Value) -> String {
    let mut object = pod();
    for (key, value) in metadata.as_object().expect("fields") {
        object["metadata"][key] = value.clone();
    }
    let workload = see(object).workload;
    format!("{}/{}", workload.kind, workload.name)
}

#[test]
fn a_running_pod_keeps_what_a_termination_needs() {
    let pod = see(pod());
    assert_eq!(pod.at, AT);
    assert_eq!(&*pod.uid.0, "9d3c0a54-3e0e-4b43-8d38-2f3f0a8e3c11");
    assert_eq!((&*pod.namespace, &*pod.name), ("default", "web-ff44b8f56-gw97c"));
    assert_eq!(pod.addresses.len(), 2);
    assert_eq!(pod.pre_stop_sleep, Some(Duration::from_secs(5)));
    assert_eq!(pod.grace_period, Duration::from_secs(40));
    assert_eq!((pod.ended, pod.deletion), (false, None));
}

#[test]
fn a_deletion_is_not_before_its_timestamp_minus_grace() {
    let mut object = pod();
    object["metadata"]["deletionTimestamp"] = json!("2026-11-21T01:45:04Z");
    object["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    let expected = Deletion { not_before: BootNs(94_000_000_000), grace: Duration::from_secs(30) };
    assert_eq!(see(object).deletion, Some(expected));
}

#[test]
fn the_last_change_before_removal_carries_a_rewritten_deletion() {
    let mut object = pod();
    object["metadata"]["deletionTimestamp"] = json!("2026-11-21T01:44:40Z");
    object["metadata"]["deletionGracePeriodSeconds"] = json!(0);
    object["status"]["phase"] = json!("Succeeded");
    let pod = see(object);
    let expected = Deletion { not_before: BootNs(100_000_000_000), grace: Duration::ZERO };
    assert_eq!((pod.deletion, pod.ended), (Some(expected), true));
}

#[test]
fn a_replica_set_stands_for_its_deployment() {
    assert_eq!(workload_of(&json!({})), "Deployment/web");
}

#[test]
fn a_replica_set_without_the_hash_is_its_own_workload() {
    assert_eq!(workload_of(&json!({"labels": {"app": "web"}})), "ReplicaSet/web-ff44b8f56");
    assert_eq!(
        workload_of(&json!({"labels": {"pod-template-hash": "other"}})),
        "ReplicaSet/web-ff44b8f56"
    );
}

#[test]
fn another_controller_is_the_workload_and_a_bare_pod_is_its_own() {
    let owner = |kind, controller| json!({"ownerReferences": [{"kind": kind, "name": "db", "uid": "u", "controller": controller}]});
    assert_eq!(workload_of(&owner("StatefulSet", true)), "StatefulSet/db");
    assert_eq!(workload_of(&owner("ConfigMap", false)), "Pod/web-ff44b8f56-gw97c");
    assert_eq!(workload_of(&json!({"ownerReferences": []})), "Pod/web-ff44b8f56-gw97c");
}

#[test]
fn the_longest_sleep_counts_and_sidecars_have_one_too() {
    let mut object = pod();
    object["spec"]["initContainers"] = json!([
        {"name": "once", "lifecycle": {"preStop": {"sleep": {"seconds": 99}}}},
        {"name": "proxy", "restartPolicy": "Always", "lifecycle": {"preStop": {"sleep": {"seconds": 8}}}}
    ]);
    assert_eq!(see(object).pre_stop_sleep, Some(Duration::from_secs(8)));
}

#[test]
fn a_negative_grace_period_is_one_second_and_stops_no_watch() {
    let mut object = pod();
    object["spec"]["terminationGracePeriodSeconds"] = json!(-5);
    assert_eq!(see(object).grace_period, Duration::from_secs(1));
}

#[test]
fn a_host_network_pod_has_no_address_of_its_own() {
    let mut object = pod();
    object["spec"]["hostNetwork"] = json!(true);
    assert_eq!(see(object).addresses, Vec::<IpAddr>::new());
}

#[test]
fn a_pod_that_was_only_just_created_takes_the_defaults() {
    let object = json!({
        "metadata": {"name": "p", "namespace": "d", "uid": "u", "resourceVersion": "1"},
        "spec": {"containers": [{"name": "app"}]},
        "status": {"phase": "Pending"}
    });
    let pod = see(object);
    assert_eq!(pod.grace_period, Duration::from_secs(30));
    assert_eq!((pod.addresses, pod.pre_stop_sleep), (vec![], None));
}

#[test]
fn probed_ports_are_found_by_number_and_by_name() {
    let mut object = pod();
    object["spec"]["containers"] = json!([
        {
            "name": "app",
            "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 9090}],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
            "livenessProbe": {"tcpSocket": {"port": 9090}},
            "startupProbe": {"exec": {"command": ["true"]}}
        },
        {"name": "other", "readinessProbe": {"httpGet": {"port": "http"}, "grpc": {"port": 5000}}}
    ]);
    // A name is looked up in the container's own ports only.
    assert_eq!(see(object).probed_ports, [5000, 8080, 9090].into());
}

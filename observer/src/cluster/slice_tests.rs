use serde_json::{Value, json};

use crate::facts::BootNs;

use super::*;

const AT: BootNs = BootNs(7);

/// A slice as the API server sends it.
fn slice() -> Value {
    json!({
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-vtd96",
            "namespace": "default",
            "generation": 34,
            "resourceVersion": "713",
            "labels": {
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": "web"
            }
        },
        "endpoints": [
            {
                "addresses": ["10.244.0.18"],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "node-1",
                "targetRef": {"kind": "Pod", "namespace": "default", "name": "web-a", "uid": "ua"}
            },
            {
                "addresses": ["10.244.0.20"],
                "conditions": {"ready": false, "serving": true, "terminating": true},
                "nodeName": "node-2",
                "targetRef": {"kind": "Pod", "name": "web-b", "uid": "ub"}
            }
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]
    })
}

fn see(object: Value) -> SliceObserved {
    let slice: EndpointSlice = serde_json::from_value(object).expect("a slice");
    let offset = WallOffset::fixed(0, BootNs(0));
    let ClusterFact::Slice(observed) = slice.observed(AT, offset) else {
        panic!("a slice gives a slice fact")
    };
    observed
}

#[test]
fn every_endpoint_has_its_service_port_pod_and_conditions() {
    let slice = see(slice());
    assert_eq!((slice.at, &*slice.slice), (AT, "default/web-vtd96"));
    let [first, second] = &slice.endpoints[..] else { panic!("two endpoints") };
    let [port] = &slice.ports[..] else { panic!("one port") };
    assert_eq!((&*port.service.0, port.port), ("default/web:http", 8080));
    assert_eq!(first.address.to_string(), "10.244.0.18");
    assert_eq!(first.conditions, Conditions { ready: true, serving: true, terminating: false });
    assert_eq!(second.conditions, Conditions { ready: false, serving: true, terminating: true });
    assert_eq!(second.node.as_deref(), Some("node-2"));
    let pod = second.pod.as_ref().expect("a pod");
    assert_eq!((&*pod.namespace, &*pod.name), ("default", "web-b"));
    assert_eq!(pod.uid, "ub".into());
}

#[test]
fn a_pod_is_of_the_namespace_that_its_target_names_or_else_of_the_slices() {
    let mut object = slice();
    let both = object["endpoints"].as_array().cloned().expect("a list");
    object["endpoints"] = [&both[..]; 4].concat().into();
    object["endpoints"][2]["targetRef"]["namespace"] = "other".into();
    object["endpoints"][4]["targetRef"]["namespace"] = "esc\"aped".into();
    let endpoints = see(object).endpoints;
    let namespaces = endpoints.iter().flat_map(|endpoint| &endpoint.pod).map(|pod| &*pod.namespace);
    let expected =
        ["default", "default", "other", "default", "esc\"aped", "default", "default", "default"];
    assert_eq!(namespaces.collect::<Vec<_>>(), expected);
}

#[test]
fn a_port_without_a_name_is_the_service_itself() {
    let mut object = slice();
    object["ports"] = json!([{"name": "", "port": 53, "protocol": "UDP"}]);
    let slice = see(object);
    assert_eq!(&*slice.ports[0].service.0, "default/web");
    assert_eq!(slice.ports[0].protocol, Protocol::Udp);
}

#[test]
fn a_port_without_a_number_is_none() {
    let mut object = slice();
    object["ports"] = json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}, {"name": "all"}]);
    assert_eq!(see(object).ports.len(), 2);
}

#[test]
fn a_slice_beyond_what_the_api_allows_takes_no_more_memory_than_one_within() {
    let mut object = slice();
    let addresses = vec!["10.0.0.1"; 200];
    object["endpoints"] = json!(vec![json!({"addresses": addresses}); MAX_ENDPOINTS + 1]);
    object["ports"] = json!(vec![json!({"port": 80}); MAX_PORTS + 1]);
    let slice = see(object);
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (MAX_ENDPOINTS, MAX_PORTS));
}

#[test]
fn omitted_conditions_take_the_defaults_of_the_api() {
    let mut object = slice();
    object["endpoints"] = json!([{"addresses": ["fd00::1"]}]);
    let slice = see(object);
    let expected = Conditions { ready: true, serving: true, terminating: false };
    assert_eq!(slice.endpoints[0].conditions, expected);
    assert_eq!((&slice.endpoints[0].pod, &slice.endpoints[0].node), (&None, &None));
}

#[test]
fn a_slice_of_a_scaled_down_service_has_null_lists() {
    let mut object = slice();
    object["endpoints"] = Value::Null;
    object["ports"] = Value::Null;
    assert_eq!(see(object).endpoints, []);
}

#[test]
fn host_names_and_slices_without_a_service_have_no_endpoints() {
    let mut object = slice();
    object["addressType"] = json!("FQDN");
    object["endpoints"] = json!([{"addresses": ["db.example.com"]}]);
    assert_eq!(see(object).endpoints, []);
    let mut object = slice();
    object["metadata"]["labels"] = json!({"app": "web"});
    assert_eq!(see(object).endpoints, []);
}

#[test]
fn a_target_that_is_no_pod_is_nobody() {
    let mut object = slice();
    object["endpoints"][0]["targetRef"] = json!({"kind": "Node", "name": "n", "uid": "u"});
    assert_eq!(see(object).endpoints[0].pod, None);
}

//! What `deploy/` asks of a cluster: exactly what the agent needs, nothing more.

use serde_json::{Value, json};

fn documents() -> Vec<Value> {
    let text = include_str!("../../deploy/observer.yaml");
    text.split("\n---\n").map(|document| serde_saphyr::from_str(document).expect("YAML")).collect()
}

fn document(kind: &str) -> Value {
    let mut found = documents().into_iter().filter(|document| document["kind"] == kind);
    let document = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "one {kind} only");
    document
}

fn pod() -> Value {
    document("DaemonSet")["spec"]["template"]["spec"].clone()
}

fn container() -> Value {
    let containers = pod()["containers"].clone();
    assert_eq!(containers.as_array().map(Vec::len), Some(1));
    containers[0].clone()
}

#[test]
fn the_manifest_has_one_of_each_and_no_other_object() {
    let kinds: Vec<Value> = documents().iter().map(|document| document["kind"].clone()).collect();
    let expected =
        ["Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"];
    assert_eq!(kinds, expected);
}

#[test]
fn the_agent_may_hold_two_watches_and_do_nothing_else() {
    let two_watches = json!([
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"],
         "verbs": ["list", "watch"]},
    ]);
    assert_eq!(document("ClusterRole")["rules"], two_watches);
}

#[test]
fn the_role_is_bound_to_the_account_that_the_pods_run_as() {
    let binding = document("ClusterRoleBinding");
    assert_eq!(binding["roleRef"]["name"], document("ClusterRole")["metadata"]["name"]);
    let account = document("ServiceAccount")["metadata"].clone();
    assert_eq!(binding["subjects"][0]["name"], account["name"]);
    assert_eq!(binding["subjects"][0]["namespace"], account["namespace"]);
    assert_eq!(pod()["serviceAccountName"], account["name"]);
    assert_eq!(document("DaemonSet")["metadata"]["namespace"], account["namespace"]);
    assert_eq!(document("Namespace")["metadata"]["name"], account["namespace"]);
}

#[test]
fn the_agent_has_only_the_capabilities_that_are_explained() {
    let security = container()["securityContext"].clone();
    let expected = json!({
        "drop": ["ALL"],
        "add": ["BPF", "PERFMON", "NET_ADMIN", "NET_RAW", "SYS_RESOURCE"],
    });
    assert_eq!(security["capabilities"], expected);
    assert_eq!(security["privileged"], false);
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(pod()["hostPID"], Value::Null);
}

#[test]
fn every_mount_of_the_node_is_read_only() {
    let container = container();
    let mounts = container["volumeMounts"].as_array().expect("mounts");
    assert_eq!(mounts.len(), pod()["volumes"].as_array().expect("volumes").len());
    for mount in mounts {
        assert_eq!(mount["readOnly"], true, "{mount}");
    }
}

/// As cilium-agent pins its maps there, perhaps after the agent started.
#[test]
fn the_nodes_bpf_file_system_is_seen_where_the_agent_looks_for_cilium() {
    let mounts = container()["volumeMounts"].clone();
    let mounts = mounts.as_array().expect("mounts");
    let bpf = mounts.iter().find(|mount| mount["name"] == "bpf").expect("the bpf file system");
    assert_eq!(bpf["mountPropagation"], "HostToContainer");
    let path = bpf["mountPath"].as_str().expect("a path");
    let cilium = include_str!("../../observer/src/dataplane/cilium/mod.rs");
    assert!(cilium.contains(&format!("MAPS: &str = \"{path}/tc/globals\"")), "{path}");
    let pod = pod();
    let volumes = pod["volumes"].as_array().expect("volumes");
    let volume = volumes.iter().find(|volume| volume["name"] == "bpf").expect("the volume");
    assert_eq!(volume["hostPath"], json!({"path": path, "type": "Directory"}));
}

#[test]
fn probes_and_prometheus_reach_the_same_port() {
    let container = container();
    assert_eq!(container["ports"][0]["containerPort"], 9464);
    assert_eq!(container["livenessProbe"]["httpGet"], json!({"path": "/livez", "port": "metrics"}));
    assert_eq!(
        container["readinessProbe"]["httpGet"],
        json!({"path": "/readyz", "port": "metrics"})
    );
    let daemon_set = document("DaemonSet");
    let annotations = &daemon_set["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/port"], "9464");
}

/// Read as text: this crate must build without the agent, whose build needs the BPF compiler.
#[test]
fn the_rules_name_only_metrics_and_signals_that_the_agent_exports() {
    let rules = include_str!("../../deploy/prometheus-rules.yaml");
    let metrics = include_str!("../../observer/src/metrics.rs");
    let not_a_name = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let expressions = rules.lines().filter(|line| !line.trim_start().starts_with('#'));
    let names: Vec<&str> = expressions
        .flat_map(|line| line.split(not_a_name))
        .filter_map(|word| word.strip_prefix("observer_"))
        .collect();
    assert!(names.len() >= 8, "{names:?}");
    for name in names {
        assert!(metrics.contains(&format!("\"{name}\"")), "observer_{name} is not exported");
    }
    let probes = include_str!("../../observer/src/kernel/probes.rs");
    let (_, rest) = rules.split_once("signal=~\"").expect("the signals an agent must have");
    let (signals, _) = rest.split_once('"').expect("their end");
    for signal in signals.split('|') {
        let signal = format!("name: \"{signal}\",\n        essential: true");
        assert!(probes.contains(&signal), "no {signal}");
    }
    assert_eq!(probes.matches("essential: true").count(), signals.split('|').count());
}

#[test]
fn every_alert_says_what_is_wrong_and_what_to_do() {
    let text = include_str!("../../deploy/prometheus-rules.yaml");
    let rules: Value = serde_saphyr::from_str(text).expect("YAML");
    let rules = rules["groups"][0]["rules"].as_array().expect("rules").clone();
    let alerts: Vec<&Value> = rules.iter().filter(|rule| rule["alert"].is_string()).collect();
    let names: Vec<&Value> = alerts.iter().map(|rule| &rule["alert"]).collect();
    let expected = [
        "ConnectionsRefusedByTerminatingPods",
        "ObserverAgentDown",
        "ObserverAbsent",
        "ObserverSignalMissing",
        "ObserverLosesKernelEvents",
    ];
    assert_eq!(names, expected);
    for alert in alerts {
        for annotation in ["summary", "description", "action"] {
            assert!(
                alert["annotations"][annotation].is_string(),
                "{}: {annotation}",
                alert["alert"]
            );
        }
    }
}

//! The workloads and Services of the scenarios, as JSON. Pure.

use serde_json::{Value, json};

use crate::lab::network::Family;

/// Of every pod.
pub(super) const POD_PORT: u16 = 8080;
/// Of every Service.
pub(super) const SERVICE_PORT: u16 = 80;
/// The annotation of the template whose change rolls a workload.
const REVISION: &str = "lab.example/revision";

/// A Deployment or StatefulSet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Deployment,
    /// A Deployment that ends all old pods before it starts new ones.
    Recreate,
    StatefulSet,
}

/// A workload to make. Its name is also its pods' label `app`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workload {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) replicas: u32,
    /// How long a pod stays after SIGTERM at least.
    pub(super) linger_ms: u32,
    /// The Services that rules send to it.
    pub(super) behind: &'static [Behind],
}

/// A Service that rules send to a workload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Behind {
    /// `namespace/name`
    pub(super) service: &'static str,
    /// With the name of its port.
    pub(super) service_port: &'static str,
    pub(super) families: &'static [Family],
}

impl Workload {
    /// Where it is.
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.collection(), self.name)
    }

    pub(super) fn collection(&self) -> String {
        let plural = match self.kind {
            Kind::Deployment | Kind::Recreate => "deployments",
            Kind::StatefulSet => "statefulsets",
        };
        format!("/apis/apps/v1/namespaces/default/{plural}")
    }

    /// The object. Pods are spread over the nodes, so that each has some.
    pub(super) fn object(&self) -> Value {
        let Self { name, replicas, linger_ms, .. } = self;
        let kind = if self.kind == Kind::StatefulSet { "StatefulSet" } else { "Deployment" };
        let mut object = json!({
            "apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {
                        "labels": {"app": name},
                        "annotations": {"lab.observer/linger-ms": linger_ms.to_string()},
                    },
                    "spec": {
                        "terminationGracePeriodSeconds": 15,
                        "containers": [{
                            "name": "app", "image": "lab-pod", "imagePullPolicy": "Never",
                            "ports": [{"containerPort": POD_PORT}],
                        }],
                        "topologySpreadConstraints": [{
                            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                            "whenUnsatisfiable": "ScheduleAnyway",
                            "labelSelector": {"matchLabels": {"app": name}},
                        }],
                    },
                },
            },
        });
        match self.kind {
            Kind::Deployment => {}
            Kind::Recreate => object["spec"]["strategy"] = json!({"type": "Recreate"}),
            Kind::StatefulSet => object["spec"]["serviceName"] = json!(name),
        }
        object
    }

    /// The change that rolls it.
    pub(super) fn revision(number: u32) -> Value {
        let annotations = json!({REVISION: number.to_string()});
        json!({"spec": {"template": {"metadata": {"annotations": annotations}}}})
    }

    /// The change that gives it a preStop sleep, as `kubectl patch` would.
    pub(super) fn pre_stop_sleep(seconds: u64) -> Value {
        let container =
            json!({"name": "app", "lifecycle": {"preStop": {"sleep": {"seconds": seconds}}}});
        json!({"spec": {"template": {"spec": {"containers": [container]}}}})
    }
}

/// How a Service of a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// At its cluster address and, from outside, at a port of the nodes.
    NodePort,
    /// The same client always gets the same pod.
    ClientIp,
    /// By its pods' own addresses.
    Headless,
}

/// A Service of the workload `app`.
pub(super) fn service(name: &str, app: &str, access: Access, families: &[Family]) -> Value {
    let families: Vec<&str> = families.iter().map(|family| family.address_type()).collect();
    let policy = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {
            "selector": {"app": app}, "ipFamilies": families, "ipFamilyPolicy": policy,
            "ports": [{
                "name": "http", "port": SERVICE_PORT, "targetPort": POD_PORT, "protocol": "TCP",
            }],
        },
    });
    match access {
        Access::NodePort => service["spec"]["type"] = json!("NodePort"),
        Access::ClientIp => service["spec"]["sessionAffinity"] = json!("ClientIP"),
        Access::Headless => service["spec"]["clusterIP"] = json!("None"),
    }
    service
}

/// The change that makes a node refuse new pods, or take them again.
pub(super) fn unschedulable(yes: bool) -> Value {
    json!({"spec": {"unschedulable": yes}})
}

/// What `kubectl drain` asks for each pod.
pub(super) fn eviction(pod: &str) -> Value {
    json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}})
}

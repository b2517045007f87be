//! What the API said of pods and endpoints, and when that was received.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use crate::e2e::follow::News;

/// A pod as one event showed it. Moments are ns of `CLOCK_BOOTTIME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvent {
    /// When the event was received.
    pub at_ns: u64,
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `spec.nodeName`
    pub node: Option<String>,
    /// `status.podIPs`
    pub addresses: Vec<IpAddr>,
    /// `metadata.deletionTimestamp`
    pub deletion_timestamp: Option<String>,
    /// `metadata.deletionGracePeriodSeconds`
    pub deletion_grace_seconds: Option<u64>,
    /// `status.phase`
    pub phase: String,
    /// The condition `Ready`.
    pub ready: bool,
    /// The object is gone; the rest is its last state.
    pub deleted: bool,
}

/// The state of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// `conditions.ready`; not said is true.
    pub ready: bool,
    /// `conditions.serving`; not said is as `ready`.
    pub serving: bool,
    /// `conditions.terminating`; not said is false.
    pub terminating: bool,
}

/// Where an endpoint is listed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `namespace/name` of the Service.
    pub service: String,
    /// The name of the slice.
    pub slice: String,
    /// The endpoint's address.
    pub address: IpAddr,
    /// `targetRef.uid`: the pod.
    pub pod_uid: String,
}

/// A change of one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointEvent {
    /// When the event was received, ns of `CLOCK_BOOTTIME`.
    pub at_ns: u64,
    /// Which endpoint.
    pub place: Place,
    /// What it is from then on; `None` when it is listed no more.
    pub conditions: Option<Conditions>,
}

/// Everything received so far, in its order.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// Of pods.
    pub pods: Vec<PodEvent>,
    /// Of endpoints: changes only.
    pub endpoints: Vec<EndpointEvent>,
    /// What is listed now.
    listed: BTreeMap<Place, Conditions>,
    /// The last state of the pods that are there.
    pods_now: BTreeMap<String, Value>,
}

impl Received {
    /// When the deletion of a pod was first seen: requested, or done when that was all.
    #[must_use]
    pub fn deletion_seen_ns(&self, uid: &str) -> Option<u64> {
        let mut of_pod = self.pods.iter().filter(|event| event.uid == uid);
        of_pod.find(|event| event.deletion_timestamp.is_some() || event.deleted).map(|e| e.at_ns)
    }

    /// When a Service's slices first listed a pod as not ready or no more, after its deletion was
    /// seen or before; of the last time that it was ready. `None` while it is ready.
    #[must_use]
    pub fn endpoint_unready_ns(&self, service: &str, uid: &str) -> Option<u64> {
        let of =
            |event: &&EndpointEvent| event.place.service == service && event.place.pod_uid == uid;
        let unready = |event: &&EndpointEvent| event.conditions.is_none_or(|c| !c.ready);
        let events = self.endpoints.iter().rev().filter(of);
        events.take_while(unready).last().map(|event| event.at_ns)
    }

    /// Enters news of the pods.
    pub(super) fn pod_news(&mut self, at_ns: u64, news: News) {
        match news {
            News::Listed(pods) => {
                let listed: Vec<&str> = pods.iter().map(uid).collect();
                let gone = self.pods_now.keys().filter(|known| !listed.contains(&known.as_str()));
                for uid in gone.cloned().collect::<Vec<_>>() {
                    self.pod_gone(at_ns, &uid);
                }
                for pod in pods {
                    self.pod_changed(at_ns, pod);
                }
            }
            News::Changed(pod) => self.pod_changed(at_ns, pod),
            News::Deleted(pod) => {
                let uid = uid(&pod).to_owned();
                self.pods_now.insert(uid.clone(), pod);
                self.pod_gone(at_ns, &uid);
            }
        }
    }

    fn pod_changed(&mut self, at_ns: u64, pod: Value) {
        self.pods.push(pod_event(at_ns, &pod, false));
        self.pods_now.insert(uid(&pod).to_owned(), pod);
    }

    fn pod_gone(&mut self, at_ns: u64, uid: &str) {
        if let Some(pod) = self.pods_now.remove(uid) {
            self.pods.push(pod_event(at_ns, &pod, true));
        }
    }

    /// Enters news of the slices.
    pub(super) fn slice_news(&mut self, at_ns: u64, news: News) {
        match news {
            News::Listed(slices) => {
                let now = slices.iter().flat_map(endpoints).collect();
                self.replace(at_ns, |_all| true, now);
            }
            News::Changed(slice) => self.replace(at_ns, in_slice(&slice), endpoints(&slice)),
            News::Deleted(slice) => self.replace(at_ns, in_slice(&slice), BTreeMap::new()),
        }
    }

    /// What was listed at some places is now what is given.
    fn replace(
        &mut self,
        at_ns: u64,
        within: impl Fn(&Place) -> bool,
        now: BTreeMap<Place, Conditions>,
    ) {
        let gone = self.listed.keys().filter(|place| within(place) && !now.contains_key(place));
        for place in gone.cloned().collect::<Vec<_>>() {
            self.listed.remove(&place);
            self.endpoints.push(EndpointEvent { at_ns, place, conditions: None });
        }
        for (place, conditions) in now {
            if self.listed.insert(place.clone(), conditions) != Some(conditions) {
                let conditions = Some(conditions);
                self.endpoints.push(EndpointEvent { at_ns, place, conditions });
            }
        }
    }
}

fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn deletion_timestamp(pod: &Value) -> &Value {
    &pod["metadata"]["deletionTimestamp"]
}

fn addresses(pod: &Value) -> Vec<IpAddr> {
    let ips = pod["status"]["podIPs"].as_array().map(Vec::as_slice).unwrap_or_default();
    ips.iter().filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect()
}

fn pod_event(at_ns: u64, pod: &Value, deleted: bool) -> PodEvent {
    let (metadata, status) = (&pod["metadata"], &pod["status"]);
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    PodEvent {
        at_ns,
        uid: uid(pod).to_owned(),
        namespace: text(&metadata["namespace"]),
        name: text(&metadata["name"]),
        node: pod["spec"]["nodeName"].as_str().map(str::to_owned),
        addresses: addresses(pod),
        deletion_timestamp: deletion_timestamp(pod).as_str().map(str::to_owned),
        deletion_grace_seconds: metadata["deletionGracePeriodSeconds"].as_u64(),
        phase: text(&status["phase"]),
        ready: conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"),
        deleted,
    }
}

/// Whether a place is in a slice.
fn in_slice(slice: &Value) -> impl Fn(&Place) -> bool + use<> {
    let (service, name) = (service(slice), text(&slice["metadata"]["name"]));
    move |place| place.service == service && place.slice == name
}

fn service(slice: &Value) -> String {
    let metadata = &slice["metadata"];
    let name = text(&metadata["labels"]["kubernetes.io/service-name"]);
    format!("{}/{name}", text(&metadata["namespace"]))
}

fn endpoints(slice: &Value) -> BTreeMap<Place, Conditions> {
    let listed = slice["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |endpoint: &Value| {
        let place = Place {
            service: service(slice),
            slice: text(&slice["metadata"]["name"]),
            // The API server allows several, of which all but the first mean nothing.
            address: endpoint["addresses"][0].as_str()?.parse().ok()?,
            pod_uid: text(&endpoint["targetRef"]["uid"]),
        };
        let said = &endpoint["conditions"];
        let ready = said["ready"].as_bool().unwrap_or(true);
        let serving = said["serving"].as_bool().unwrap_or(ready);
        let terminating = said["terminating"].as_bool().unwrap_or(false);
        Some((place, Conditions { ready, serving, terminating }))
    };
    listed.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
    const ENDING: Conditions = Conditions { ready: false, serving: true, terminating: true };

    fn slice(name: &str, endpoints: &[(&str, Conditions)]) -> Value {
        let endpoint = |(address, conditions): &(&str, Conditions)| {
            let Conditions { ready, serving, terminating } = conditions;
            json!({
                "addresses": [address], "targetRef": {"uid": format!("pod-{address}")},
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            })
        };
        let labels = json!({"kubernetes.io/service-name": "web"});
        json!({
            "metadata": {"name": name, "namespace": "default", "labels": labels},
            "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        })
    }

    fn pod(deletion: Option<&str>) -> Value {
        json!({
            "metadata": {"uid": "u", "name": "web-1", "namespace": "default", "deletionTimestamp": deletion},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.2"}],
                       "conditions": [{"type": "Ready", "status": "True"}]},
        })
    }

    #[test]
    fn only_changes_of_endpoints_are_kept() {
        let mut received = Received::default();
        let both = [("10.244.1.2", READY), ("10.244.1.3", READY)];
        received.slice_news(1, News::Listed(vec![slice("a", &both)]));
        received.slice_news(2, News::Changed(slice("a", &both)));
        let ending = [("10.244.1.2", ENDING), ("10.244.1.3", READY)];
        received.slice_news(3, News::Changed(slice("a", &ending)));
        received.slice_news(4, News::Changed(slice("a", &ending[1..])));
        let seen = received.endpoints.iter().map(|event| (event.at_ns, event.conditions));
        assert_eq!(
            seen.collect::<Vec<_>>(),
            [(1, Some(READY)), (1, Some(READY)), (3, Some(ENDING)), (4, None)]
        );
        assert_eq!(received.endpoint_unready_ns("default/web", "pod-10.244.1.2"), Some(3));
        assert_eq!(received.endpoint_unready_ns("default/web", "pod-10.244.1.3"), None);
    }

    #[test]
    fn a_slice_does_not_speak_for_another() {
        let mut received = Received::default();
        let listed = vec![slice("a", &[("10.244.1.2", READY)]), slice("b", &[("fd00::2", READY)])];
        received.slice_news(1, News::Listed(listed));
        received.slice_news(2, News::Deleted(slice("a", &[])));
        let last = received.endpoints.last().expect("an event");
        assert_eq!((last.at_ns, last.place.slice.as_str(), last.conditions), (2, "a", None));
        assert_eq!(received.endpoints.len(), 3);
    }

    #[test]
    fn a_deletion_is_seen_once_requested_or_once_done() {
        let mut received = Received::default();
        received.pod_news(1, News::Listed(vec![pod(None)]));
        assert_eq!(received.deletion_seen_ns("u"), None);
        received.pod_news(2, News::Changed(pod(Some("2026-11-21T01:45:04Z"))));
        assert_eq!(received.deletion_seen_ns("u"), Some(2));
        received.pod_news(3, News::Deleted(pod(Some("2026-11-21T01:45:04Z"))));
        let mut forced = Received::default();
        forced.pod_news(1, News::Listed(vec![pod(None)]));
        forced.pod_news(5, News::Listed(Vec::new()));
        assert_eq!(forced.deletion_seen_ns("u"), Some(5));
    }
}

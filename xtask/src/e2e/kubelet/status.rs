//! The status of a pod as the kubelet writes it. Pure: from what the pod's life has come to, to
//! the patch. Times are wall seconds, as the API has no finer ones.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::spec::{Identity, PodSpec};
use super::truth::exit_code;
use crate::lab::clock::rfc3339;
use crate::lab::container::Exit;
use crate::lab::network::Addresses;

/// What containerd reports for a container whose end it did not learn.
const UNKNOWN_EXIT_CODE: i32 = 255;

/// `status.phase`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    /// Where a pod stays.
    pub(super) fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// `containerStatuses[].state`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Waiting { reason: &'static str, message: String },
    Running { since: i64 },
    Terminated(Terminated),
}

/// A run of a container that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Terminated {
    exit_code: i32,
    started: i64,
    finished: i64,
    container_id: String,
}

impl Terminated {
    pub(super) fn new(exit: Exit, started: i64, finished: i64, container_id: &str) -> Self {
        let exit_code = exit_code(exit).unwrap_or(UNKNOWN_EXIT_CODE);
        Self { exit_code, started, finished, container_id: url(container_id) }
    }

    pub(super) fn succeeded(&self) -> bool {
        self.exit_code == 0
    }

    fn value(&self) -> Value {
        json!({"terminated": {
            "exitCode": self.exit_code,
            "reason": if self.succeeded() { "Completed" } else { "Error" },
            "startedAt": rfc3339(self.started), "finishedAt": rfc3339(self.finished),
            "containerID": self.container_id,
        }})
    }
}

/// What a pod's life has come to.
#[derive(Clone, Debug)]
pub(super) struct Status {
    pub(super) phase: Phase,
    pub(super) state: State,
    pub(super) last: Option<Terminated>,
    pub(super) restarts: u32,
    pub(super) ready: bool,
    /// Of the present run, or of the last one.
    pub(super) container_id: Option<String>,
    pub(super) addresses: Option<Addresses>,
    host: Addresses,
    started: i64,
    /// Since when a condition has been what it is.
    since: BTreeMap<&'static str, (bool, i64)>,
}

impl Status {
    /// Of a pod that was seen just now.
    pub(super) fn new(host: Addresses, now: i64) -> Self {
        Self {
            phase: Phase::Pending,
            state: State::Waiting { reason: "ContainerCreating", message: String::new() },
            last: None,
            restarts: 0,
            ready: false,
            container_id: None,
            addresses: None,
            host,
            started: now,
            since: BTreeMap::new(),
        }
    }

    /// A strategic merge patch: conditions that others wrote (`DisruptionTarget`) stay. The uid
    /// makes the API server refuse it for a later pod of the same name.
    pub(super) fn patch(&mut self, identity: &Identity, spec: &PodSpec, now: i64) -> Value {
        let mut status = json!({
            "phase": format!("{:?}", self.phase),
            "startTime": rfc3339(self.started),
            "hostIP": self.host.v4, "hostIPs": ips(self.host),
            "conditions": self.conditions(&spec.container, now),
            "containerStatuses": [self.container(spec)],
        });
        if let Some(addresses) = self.addresses {
            status["podIP"] = json!(addresses.v4);
            status["podIPs"] = ips(addresses);
        }
        json!({"metadata": {"uid": identity.uid}, "status": status})
    }

    fn conditions(&mut self, container: &str, now: i64) -> Value {
        let completed = self.phase == Phase::Succeeded;
        let unready = if completed { "PodCompleted" } else { "ContainersNotReady" };
        let message = format!("containers with unready status: [{container}]");
        let attached = self.addresses.is_some() && !self.phase.is_terminal();
        let known = [
            ("PodReadyToStartContainers", attached, None),
            ("Initialized", true, completed.then_some(unready)),
            ("Ready", self.ready, (!self.ready).then_some(unready)),
            ("ContainersReady", self.ready, (!self.ready).then_some(unready)),
            ("PodScheduled", true, None),
        ];
        let condition = |(kind, status, reason): (&'static str, bool, Option<&str>)| {
            let since = self.since.entry(kind).or_insert((status, now));
            if since.0 != status {
                *since = (status, now);
            }
            let mut condition = json!({
                "type": kind, "status": if status { "True" } else { "False" },
                "lastTransitionTime": rfc3339(since.1), "lastProbeTime": null,
                "reason": reason, "message": null,
            });
            if reason == Some("ContainersNotReady") {
                condition["message"] = json!(message);
            }
            condition
        };
        known.into_iter().map(condition).collect()
    }

    fn container(&self, spec: &PodSpec) -> Value {
        let state = match &self.state {
            State::Waiting { reason, message } => {
                json!({"waiting": {"reason": reason, "message": message}})
            }
            State::Running { since } => json!({"running": {"startedAt": rfc3339(*since)}}),
            State::Terminated(terminated) => terminated.value(),
        };
        json!({
            "name": spec.container, "image": spec.image, "imageID": "",
            "containerID": self.container_id.as_deref().map(url).unwrap_or_default(),
            "restartCount": self.restarts, "ready": self.ready,
            "started": matches!(self.state, State::Running { .. }),
            "state": state,
            "lastState": self.last.as_ref().map_or(json!({}), Terminated::value),
        })
    }
}

fn ips(addresses: Addresses) -> Value {
    json!([{"ip": addresses.v4}, {"ip": addresses.v6}])
}

fn url(container_id: &str) -> String {
    format!("containerd://{container_id}")
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    fn spec() -> PodSpec {
        let container = json!({"name": "server", "image": "lab-pod"});
        PodSpec::of(&json!({"spec": {"containers": [container]}})).expect("a pod")
    }

    fn patch(status: &mut Status, now: i64) -> Value {
        let identity = Identity {
            uid: "u".to_owned(),
            namespace: "default".to_owned(),
            name: "web".to_owned(),
        };
        status.patch(&identity, &spec(), now)["status"].take()
    }

    fn condition<'a>(status: &'a Value, kind: &str) -> &'a Value {
        let conditions = status["conditions"].as_array().expect("conditions");
        conditions.iter().find(|condition| condition["type"] == kind).expect(kind)
    }

    fn running() -> Status {
        let mut status = Status::new(Addresses::of_pod(9), 100);
        status.phase = Phase::Running;
        status.state = State::Running { since: 101 };
        status.container_id = Some("f00".to_owned());
        status.addresses = Some(Addresses::of_pod(2));
        status.ready = true;
        status
    }

    #[test]
    fn a_pod_without_an_address_waits() {
        let status = patch(&mut Status::new(Addresses::of_pod(9), 100), 100);
        assert_eq!(status["phase"], "Pending");
        assert_eq!(status.get("podIP"), None);
        assert_eq!(
            status["containerStatuses"][0]["state"]["waiting"]["reason"],
            "ContainerCreating"
        );
        assert_eq!(condition(&status, "Ready")["reason"], "ContainersNotReady");
        assert_eq!(condition(&status, "PodScheduled")["status"], "True");
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let mut status = running();
        let first = patch(&mut status, 102);
        assert_eq!(condition(&first, "Ready")["lastTransitionTime"], "1970-01-01T00:01:42Z");
        assert_eq!(patch(&mut status, 150), first);
        status.ready = false;
        let last = patch(&mut status, 160);
        assert_eq!(condition(&last, "Ready")["lastTransitionTime"], "1970-01-01T00:02:40Z");
        assert_eq!(condition(&last, "Initialized"), condition(&first, "Initialized"));
    }

    #[test]
    fn a_killed_container_has_the_exit_code_of_its_signal() {
        let mut status = running();
        let killed = Terminated::new(Exit::Killed(Signal::SIGKILL), 101, 131, "f00");
        assert!(!killed.succeeded());
        status.phase = Phase::Failed;
        status.state = State::Terminated(killed);
        status.ready = false;
        let status = patch(&mut status, 131);
        let state = &status["containerStatuses"][0]["state"]["terminated"];
        assert_eq!((&state["exitCode"], &state["reason"]), (&json!(137), &json!("Error")));
        assert_eq!(state["containerID"], "containerd://f00");
        assert_eq!(status["phase"], "Failed");
    }

    #[test]
    fn a_restart_shows_the_last_run() {
        let mut status = running();
        status.last = Some(Terminated::new(Exit::Code(1), 90, 95, "old"));
        status.restarts = 1;
        let container = patch(&mut status, 102)["containerStatuses"][0].take();
        assert_eq!(container["restartCount"], 1);
        assert_eq!(container["lastState"]["terminated"]["exitCode"], 1);
        assert_eq!(container["containerID"], "containerd://f00");
    }
}

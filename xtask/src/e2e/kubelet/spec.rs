//! What a pod object asks the kubelet for. Pure: from JSON.
//!
//! One container per pod, of the image `lab-pod`; how it behaves is in annotations, because an
//! image and a command would say it in a real cluster. Anything else that would change how a pod
//! lives or ends (more containers, other hooks and probes) is refused, never passed over.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use super::cgroups::Qos;
use crate::lab::pod::AtSigterm;
use crate::lab::{Behaviour, Listen};

/// The image that this kubelet can run; no other can be pulled here.
pub(super) const IMAGE: &str = "lab-pod";
/// What annotations of behaviour begin with.
const PREFIX: &str = "lab.observer/";
const ANNOTATIONS: [&str; 7] = [
    "at-sigterm",
    "linger-ms",
    "hold-streams",
    "listen-after-ms",
    "never-listen",
    "crash-after-ms",
    "address-number",
];
/// The port of a pod that names none.
const DEFAULT_PORT: u16 = 8080;
/// What the API server fills in when a pod does not say.
const DEFAULT_GRACE_SECONDS: u64 = 30;

/// `spec.restartPolicy`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// `readinessProbe` with a `tcpSocket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) port: u16,
    pub(super) initial_delay: Duration,
    pub(super) period: Duration,
    pub(super) timeout: Duration,
    pub(super) success_threshold: u64,
    pub(super) failure_threshold: u64,
}

/// Who a pod is: what every request about it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// How a pod is to be run.
#[derive(Clone, Debug)]
pub(super) struct PodSpec {
    pub(super) container: String,
    pub(super) image: String,
    pub(super) port: u16,
    pub(super) host_network: bool,
    pub(super) qos: Qos,
    pub(super) behaviour: Behaviour,
    /// It exits by itself with code 1, this long after its start.
    pub(super) crash_after: Option<Duration>,
    /// The last byte of its addresses; it waits until they are free.
    pub(super) address_number: Option<u8>,
    pub(super) pre_stop_sleep: Duration,
    pub(super) probe: Option<Probe>,
    pub(super) restart: RestartPolicy,
}

/// A deletion request as the object shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deletion {
    pub(super) grace: Duration,
}

impl Identity {
    pub(super) fn of(pod: &Value) -> Result<Self> {
        let field = |name: &str| {
            let value = pod["metadata"][name].as_str();
            value.map(str::to_owned).with_context(|| format!("a pod without metadata.{name}"))
        };
        Ok(Self { uid: field("uid")?, namespace: field("namespace")?, name: field("name")? })
    }

    /// The path of the object.
    pub(super) fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name)
    }
}

impl Deletion {
    /// `None` while nobody asked for it.
    pub(super) fn of(pod: &Value) -> Option<Self> {
        let metadata = &pod["metadata"];
        metadata["deletionTimestamp"].as_str()?;
        let seconds = metadata["deletionGracePeriodSeconds"].as_u64();
        let seconds = seconds.or(pod["spec"]["terminationGracePeriodSeconds"].as_u64());
        Some(Self { grace: Duration::from_secs(seconds.unwrap_or(DEFAULT_GRACE_SECONDS)) })
    }
}

impl PodSpec {
    /// # Errors
    /// When the pod asks for what this kubelet does not do, or an annotation makes no sense.
    pub(super) fn of(pod: &Value) -> Result<Self> {
        let spec = &pod["spec"];
        let containers = spec["containers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let [container] = containers else { bail!("one container per pod is run here") };
        ensure!(
            spec["initContainers"].as_array().is_none_or(Vec::is_empty),
            "init containers are not run here"
        );
        let annotations = Annotations::of(pod)?;
        Ok(Self {
            container: text(&container["name"]).context("the container has no name")?,
            image: text(&container["image"]).context("the container has no image")?,
            port: match &container["ports"][0]["containerPort"] {
                Value::Null => DEFAULT_PORT,
                port => number(port)?,
            },
            host_network: spec["hostNetwork"] == true,
            qos: qos(pod)?,
            behaviour: annotations.behaviour()?,
            crash_after: annotations.milliseconds("crash-after-ms")?,
            address_number: annotations.parsed("address-number")?,
            pre_stop_sleep: pre_stop_sleep(container)?,
            probe: readiness_probe(container)?,
            restart: match spec["restartPolicy"].as_str() {
                Some("Always") | None => RestartPolicy::Always,
                Some("OnFailure") => RestartPolicy::OnFailure,
                Some("Never") => RestartPolicy::Never,
                Some(other) => bail!("restartPolicy {other} is not known here"),
            },
        })
    }
}

fn qos(pod: &Value) -> Result<Qos> {
    let class = pod["status"]["qosClass"].as_str().unwrap_or("BestEffort");
    Qos::parse(class).with_context(|| format!("qosClass {class} is not known here"))
}

fn pre_stop_sleep(container: &Value) -> Result<Duration> {
    let hook = match &container["lifecycle"]["preStop"] {
        Value::Null => return Ok(Duration::ZERO),
        hook => hook,
    };
    let seconds = hook["sleep"]["seconds"].as_u64();
    Ok(Duration::from_secs(seconds.context("of preStop hooks only sleep is run here")?))
}

fn readiness_probe(container: &Value) -> Result<Option<Probe>> {
    let probe = match &container["readinessProbe"] {
        Value::Null => return Ok(None),
        probe => probe,
    };
    let port = match &probe["tcpSocket"]["port"] {
        Value::Null => bail!("of readiness probes only tcpSocket is run here"),
        Value::String(name) => named_port(container, name)?,
        port => number(port)?,
    };
    let seconds =
        |field: &str, default: u64| Duration::from_secs(probe[field].as_u64().unwrap_or(default));
    Ok(Some(Probe {
        port,
        initial_delay: seconds("initialDelaySeconds", 0),
        period: seconds("periodSeconds", 10),
        timeout: seconds("timeoutSeconds", 1),
        success_threshold: probe["successThreshold"].as_u64().unwrap_or(1),
        failure_threshold: probe["failureThreshold"].as_u64().unwrap_or(3),
    }))
}

fn named_port(container: &Value, name: &str) -> Result<u16> {
    let ports = container["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let port = ports.iter().find(|port| port["name"] == name);
    number(&port.with_context(|| format!("no port is named {name}"))?["containerPort"])
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn number(value: &Value) -> Result<u16> {
    let number = value.as_u64().and_then(|number| u16::try_from(number).ok());
    number.with_context(|| format!("{value} is no port"))
}

/// The annotations of behaviour of one pod.
struct Annotations<'a>(&'a Value);

impl<'a> Annotations<'a> {
    /// # Errors
    /// When one is misspelt: it would be passed over.
    fn of(pod: &'a Value) -> Result<Self> {
        let annotations = &pod["metadata"]["annotations"];
        let names = annotations.as_object().into_iter().flat_map(|object| object.keys());
        for name in names.filter_map(|name| name.strip_prefix(PREFIX)) {
            ensure!(
                ANNOTATIONS.contains(&name),
                "annotation {PREFIX}{name} is none of {}",
                ANNOTATIONS.join(", ")
            );
        }
        Ok(Self(annotations))
    }

    fn behaviour(&self) -> Result<Behaviour> {
        let listen = match (self.flag("never-listen")?, self.milliseconds("listen-after-ms")?) {
            (true, _) => Listen::Never,
            (false, Some(delay)) => Listen::Late(delay),
            (false, None) => Listen::AtOnce,
        };
        let at_sigterm = match self.text("at-sigterm") {
            None => AtSigterm::default(),
            Some(value) => match AtSigterm::from_str(value, false) {
                Ok(at_sigterm) => at_sigterm,
                Err(reason) => bail!("annotation {PREFIX}at-sigterm: {reason}"),
            },
        };
        Ok(Behaviour {
            at_sigterm,
            linger: self.milliseconds("linger-ms")?.unwrap_or_default(),
            hold_streams: self.flag("hold-streams")?,
            listen,
        })
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.0[format!("{PREFIX}{name}")].as_str()
    }

    fn flag(&self, name: &str) -> Result<bool> {
        Ok(self.parsed(name)?.unwrap_or(false))
    }

    fn milliseconds(&self, name: &str) -> Result<Option<Duration>> {
        Ok(self.parsed(name)?.map(Duration::from_millis))
    }

    fn parsed<T: FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |value: &str| {
            value.parse().ok().with_context(|| format!("annotation {PREFIX}{name}: `{value}`?"))
        };
        self.text(name).map(parse).transpose()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(annotations: &Value, container: &Value) -> Value {
        let mut merged = json!({
            "name": "server", "image": IMAGE,
            "ports": [{"name": "http", "containerPort": 8081}],
        });
        for (key, value) in container.as_object().into_iter().flatten() {
            merged[key] = value.clone();
        }
        json!({
            "metadata": {"uid": "u", "namespace": "default", "name": "web", "annotations": annotations},
            "spec": {"restartPolicy": "Always", "containers": [merged]},
            "status": {"qosClass": "Burstable"},
        })
    }

    fn refusal(pod: &Value) -> String {
        PodSpec::of(pod).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_plain_pod_has_the_defaults_of_the_api() {
        let spec = PodSpec::of(&pod(&json!({}), &json!({}))).expect("a plain pod");
        assert_eq!((spec.port, spec.pre_stop_sleep), (8081, Duration::ZERO));
        assert_eq!((spec.qos, spec.restart), (Qos::Burstable, RestartPolicy::Always));
        assert_eq!(spec.probe, None);
        assert!(!spec.host_network);
    }

    #[test]
    fn annotations_choose_the_behaviour() {
        let annotations = json!({
            "lab.observer/at-sigterm": "ignore", "lab.observer/linger-ms": "250",
            "lab.observer/listen-after-ms": "1500", "lab.observer/crash-after-ms": "90",
            "lab.observer/address-number": "9", "other.example/at-sigterm": "whatever",
        });
        let spec = PodSpec::of(&pod(&annotations, &json!({}))).expect("a pod");
        assert_eq!(spec.behaviour.at_sigterm, AtSigterm::Ignore);
        assert_eq!(spec.behaviour.linger, Duration::from_millis(250));
        assert_eq!(spec.behaviour.listen, Listen::Late(Duration::from_millis(1500)));
        assert_eq!(spec.crash_after, Some(Duration::from_millis(90)));
        assert_eq!(spec.address_number, Some(9));
    }

    #[test]
    fn what_would_be_passed_over_is_refused() {
        let misspelt = json!({"lab.observer/at-sigtem": "close"});
        assert!(refusal(&pod(&misspelt, &json!({}))).contains("at-sigtem is none of"));
        let wrong = json!({"lab.observer/at-sigterm": "explode"});
        assert!(refusal(&pod(&wrong, &json!({}))).contains("at-sigterm"));
        let hook = json!({"lifecycle": {"preStop": {"exec": {"command": ["sleep"]}}}});
        assert!(refusal(&pod(&json!({}), &hook)).contains("only sleep"));
        let probe = json!({"readinessProbe": {"httpGet": {"port": 1}}});
        assert!(refusal(&pod(&json!({}), &probe)).contains("only tcpSocket"));
    }

    #[test]
    fn a_probe_names_its_port_or_numbers_it() {
        for port in [json!("http"), json!(8081)] {
            let probe =
                json!({"readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1}});
            let spec = PodSpec::of(&pod(&json!({}), &probe)).expect("a probe");
            let probe = spec.probe.expect("a probe");
            assert_eq!((probe.port, probe.period), (8081, Duration::from_secs(1)));
            assert_eq!((probe.success_threshold, probe.failure_threshold), (1, 3));
        }
    }

    #[test]
    fn a_deletion_says_its_grace() {
        let mut object = pod(&json!({}), &json!({}));
        assert_eq!(Deletion::of(&object), None);
        object["metadata"]["deletionTimestamp"] = json!("2026-11-21T01:45:04Z");
        object["metadata"]["deletionGracePeriodSeconds"] = json!(7);
        assert_eq!(Deletion::of(&object), Some(Deletion { grace: Duration::from_secs(7) }));
    }
}

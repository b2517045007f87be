//! The kubelet: starts pods and ends them in the order and with the pauses that were recorded on a
//! real node.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use super::clock;
use super::cluster::Cluster;
use super::container::{Behaviour, Container, Event, Listen, Process};
use super::netns::Namespace;
use super::network::{Addresses, Network, pod_number};
use super::objects::{POD_PORT, Phase, Pod, TEMPLATE_HASH};
use super::truth::PodTruth;

/// A pod's process starts within milliseconds; a loaded machine may need longer.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Pod watch to the begin of the termination (recorded: 46 ms to SIGTERM, with a runtime between).
pub(crate) const REACTION: Duration = Duration::from_millis(20);
/// Exit to `Succeeded`, and from there to the removal of the object (recorded: 200 and 80 ms).
pub(crate) const STATUS_PAUSE: Duration = Duration::from_millis(200);
pub(crate) const REMOVAL_PAUSE: Duration = Duration::from_millis(80);
/// What the kubelet leaves a process whose preStop used up the grace period.
pub(crate) const LEAST_GRACE: Duration = Duration::from_secs(2);
/// How long a forcibly deleted pod is visible as terminating (recorded: 4 ms).
const FORCED_VISIBLE: Duration = Duration::from_millis(4);
/// What a forcibly deleted pod's process gets between SIGTERM and SIGKILL.
pub(crate) const FORCED_GRACE: Duration = Duration::from_secs(1);
/// `timeoutSeconds` of a probe unless the pod says otherwise.
pub(crate) const PROBE_LIMIT: Duration = Duration::from_secs(1);
pub(crate) const SIGKILL_LIMIT: Duration = Duration::from_secs(10);

/// A pod to start.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// The Deployment it belongs to.
    pub workload: String,
    /// How its process behaves.
    pub behaviour: Behaviour,
    /// `lifecycle.preStop.sleep`
    pub pre_stop_sleep_seconds: Option<u64>,
    /// `spec.terminationGracePeriodSeconds`
    pub grace_seconds: u64,
    /// The addresses of an earlier pod that is gone; new ones when not given.
    pub addresses: Option<Addresses>,
    /// How often the kubelet probes the pod's port, from its start to its removal: a real one goes
    /// on with readiness probes while a pod terminates.
    pub probe_period: Option<Duration>,
}

impl PodPlan {
    /// A pod that drains well, without a preStop sleep, with the API's default grace period.
    #[must_use]
    pub fn of(workload: &str) -> Self {
        Self {
            workload: workload.to_owned(),
            behaviour: Behaviour::default(),
            pre_stop_sleep_seconds: None,
            grace_seconds: 30,
            addresses: None,
            probe_period: None,
        }
    }
}

/// A started pod.
#[derive(Clone, Debug)]
pub struct RunningPod {
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.name`
    pub name: String,
    /// Its addresses.
    pub addresses: Addresses,
    pre_stop: Duration,
    grace: Duration,
    container: Arc<Container>,
}

impl RunningPod {
    /// The process exits by itself, with code 1 and without a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn crash(&self) -> Result<()> {
        self.container.command("crash")
    }

    /// The process closes its listener and opens it again.
    ///
    /// # Errors
    /// When it has ended.
    pub fn restart_listener(&self) -> Result<()> {
        self.container.command("restart")
    }
}

/// A termination that runs.
#[derive(Debug)]
pub struct Termination(JoinHandle<()>);

impl Termination {
    /// Waits for the pod's removal.
    ///
    /// # Errors
    /// When the thread that plays the kubelet panicked.
    pub fn wait(self) -> Result<()> {
        self.0.join().map_err(|_panic| anyhow!("the kubelet's thread panicked"))
    }
}

/// Starts and ends the node's pods.
#[derive(Debug)]
pub(crate) struct Kubelet {
    /// The program with the subcommand `lab-pod`.
    pub(crate) program: PathBuf,
    pub(crate) cgroup_root: PathBuf,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) started: AtomicU32,
}

impl Kubelet {
    /// Starts a pod and waits until it is Ready.
    pub(crate) fn start(&self, network: &Network, plan: &PodPlan) -> Result<RunningPod> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let addresses = match plan.addresses {
            Some(addresses) => addresses,
            None => Addresses::of_pod(pod_number(number)?),
        };
        let pod = new_pod(number, plan, addresses)?;
        self.cluster.add_pod(pod.clone());
        let namespace = network.add_pod(number, addresses)?;
        let container = self.start_process(&namespace, &pod, plan.behaviour)?;
        if plan.behaviour.listen == Listen::AtOnce {
            let listening = |truth: &super::truth::Truth| truth.pods.get(&pod.uid)?.listening_ns;
            let what = format!("pod {} listens", pod.name);
            self.cluster.wait_for(&what, START_LIMIT, listening)?;
        }
        self.cluster.change_pod(&pod.uid, |pod| {
            pod.phase = Phase::Running;
            pod.ready = true;
        });
        if let Some(period) = plan.probe_period {
            let (cluster, uid) = (Arc::clone(&self.cluster), pod.uid.clone());
            network.node.thread(move || probe(&cluster, &uid, addresses, period));
        }
        Ok(RunningPod {
            uid: pod.uid,
            name: pod.name,
            addresses,
            pre_stop: Duration::from_secs(plan.pre_stop_sleep_seconds.unwrap_or(0)),
            grace: Duration::from_secs(plan.grace_seconds),
            container,
        })
    }

    /// What the process reports goes into the truth.
    fn start_process(
        &self,
        namespace: &Namespace,
        pod: &Pod,
        behaviour: Behaviour,
    ) -> Result<Arc<Container>> {
        let process = Process {
            program: &self.program,
            cgroup: &self.cgroup_root.join(cgroup_path(pod)),
            namespace,
            name: &pod.name,
            port: POD_PORT,
            behaviour,
        };
        let (cluster, uid) = (Arc::clone(&self.cluster), pod.uid.clone());
        let container = Container::start(&process, move |event| {
            cluster.record(&uid, |truth| enter(truth, event));
            if let Event::Exited(..) = event {
                cluster.change_pod(&uid, |pod| pod.ready = false);
            }
        })?;
        self.cluster.record(&pod.uid, |truth| truth.pid = container.pid());
        Ok(container)
    }

    /// `kubectl delete pod`; returns once the request is made.
    pub(crate) fn delete(&self, pod: &RunningPod) -> Termination {
        let requested_ns = self.request_deletion(pod, pod.grace.as_secs());
        let (cluster, pod) = (Arc::clone(&self.cluster), pod.clone());
        Termination(std::thread::spawn(move || terminate(&cluster, &pod, requested_ns)))
    }

    /// `kubectl delete pod --force --grace-period=0`
    pub(crate) fn force_delete(&self, pod: &RunningPod) -> Termination {
        self.request_deletion(pod, 0);
        let (cluster, pod) = (Arc::clone(&self.cluster), pod.clone());
        Termination(std::thread::spawn(move || {
            std::thread::sleep(FORCED_VISIBLE);
            cluster.remove_pod(&pod.uid);
            std::thread::sleep(REACTION);
            end(&cluster, &pod, clock::boot_ns() + clock::nanos(FORCED_GRACE));
        }))
    }

    /// The API server's part; returns when it was asked.
    fn request_deletion(&self, pod: &RunningPod, grace_seconds: u64) -> u64 {
        let requested_ns = clock::boot_ns();
        self.cluster.record(&pod.uid, |truth| truth.deletion_requested_ns = Some(requested_ns));
        let timestamp =
            clock::wall_seconds() + i64::try_from(grace_seconds).unwrap_or(i64::MAX / 2);
        self.cluster.change_pod(&pod.uid, |pod| pod.deletion = Some((timestamp, grace_seconds)));
        requested_ns
    }
}

fn terminate(cluster: &Cluster, pod: &RunningPod, requested_ns: u64) {
    let killed_ns = requested_ns + clock::nanos(pod.grace);
    std::thread::sleep(REACTION);
    if !pod.pre_stop.is_zero() {
        let sleep_over_ns = clock::boot_ns() + clock::nanos(pod.pre_stop);
        pod.container.wait_for_end(sleep_over_ns.min(killed_ns));
    }
    let least_ns = clock::boot_ns() + clock::nanos(LEAST_GRACE.min(pod.grace));
    let killed = end(cluster, pod, killed_ns.max(least_ns));
    std::thread::sleep(STATUS_PAUSE);
    cluster.change_pod(&pod.uid, |pod| {
        pod.phase = if killed { Phase::Failed } else { Phase::Succeeded };
        pod.ready = false;
    });
    std::thread::sleep(REMOVAL_PAUSE);
    cluster.change_pod(&pod.uid, |pod| pod.deletion = Some((clock::wall_seconds(), 0)));
    cluster.remove_pod(&pod.uid);
}

/// SIGTERM, and SIGKILL at `killed_ns` if it was not enough; returns whether it was not.
fn end(cluster: &Cluster, pod: &RunningPod, killed_ns: u64) -> bool {
    let sent_ns = clock::boot_ns();
    cluster.record(&pod.uid, |truth| truth.sigterm_sent_ns = Some(sent_ns));
    pod.container.signal(Signal::SIGTERM);
    if pod.container.wait_for_end(killed_ns) {
        return false;
    }
    let sent_ns = clock::boot_ns();
    cluster.record(&pod.uid, |truth| truth.sigkill_sent_ns = Some(sent_ns));
    pod.container.signal(Signal::SIGKILL);
    if !pod.container.wait_for_end(sent_ns + clock::nanos(SIGKILL_LIMIT)) {
        cluster.fail(&anyhow!("pod {} does not end by SIGKILL", pod.name));
    }
    true
}

/// Connects to the pod's port from the node, whatever comes of it, until the pod is removed.
fn probe(cluster: &Cluster, uid: &str, addresses: Addresses, period: Duration) {
    let targets = [IpAddr::from(addresses.v4), IpAddr::from(addresses.v6)];
    let mut targets = targets.into_iter().cycle();
    while !cluster.is_closing() && cluster.pods().iter().any(|pod| pod.uid == uid) {
        let target = targets.next().map(|address| SocketAddr::new(address, POD_PORT));
        drop(target.map(|target| TcpStream::connect_timeout(&target, PROBE_LIMIT)));
        std::thread::sleep(period);
    }
}

fn enter(pod: &mut PodTruth, event: Event) {
    match event {
        Event::Listening(at_ns) => {
            pod.listening_ns.get_or_insert(at_ns);
        }
        Event::Sigterm(at_ns) => pod.sigterm_ns = Some(at_ns),
        Event::ListenerClosed(at_ns) => pod.listener_closed_ns = Some(at_ns),
        Event::Exited(at_ns, _) => pod.exited_ns = Some(at_ns),
    }
}

/// The directory that the kubelet (systemd driver) and containerd make for a Burstable pod.
fn cgroup_path(pod: &Pod) -> String {
    format!(
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-{}.scope",
        pod.uid.replace('-', "_"),
        pod.container_id
    )
}

fn new_pod(number: u32, plan: &PodPlan, addresses: Addresses) -> Result<Pod> {
    let container_id = format!("{}{}", random_uuid()?, random_uuid()?).replace('-', "");
    if plan.pre_stop_sleep_seconds.is_some_and(|seconds| seconds > plan.grace_seconds) {
        bail!("the API refuses a preStop sleep longer than the grace period");
    }
    Ok(Pod {
        uid: random_uuid()?,
        name: format!("{}-{TEMPLATE_HASH}-p{number:04}", plan.workload),
        workload: plan.workload.clone(),
        container_id,
        addresses,
        pre_stop_sleep_seconds: plan.pre_stop_sleep_seconds,
        grace_seconds: plan.grace_seconds,
        probed: plan.probe_period.is_some(),
        created: clock::wall_seconds(),
        phase: Phase::Pending,
        ready: false,
        deletion: None,
    })
}

/// A random UUID as text.
pub(crate) fn random_uuid() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("a random UUID")?;
    Ok(uuid.trim().to_owned())
}

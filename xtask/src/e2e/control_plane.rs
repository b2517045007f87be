//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler in the control plane's
//! namespace: RBAC and Node authorisation, dual-stack, everything else by its default.
//!
//! One certificate serves all three: the API server signs it by itself at its start. Its key also
//! signs the service accounts' tokens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::access::{Identity, Server, write_tokens};
use super::api::Api;
use super::binaries::Binaries;
use super::manifest;
use super::network::{NODES, Network};
use crate::lab::daemon::Daemon;
use crate::lab::netns::Namespace;
use crate::lab::network::Family;

/// All are ready within seconds, and end as fast; a machine that compiles at the same time needs far longer.
const READY_LIMIT: Duration = Duration::from_mins(2);
/// How long who depends on the API server waits for it: longer than any outage of the scenarios,
/// and its start after that.
pub(super) const PATIENCE: Duration = Duration::from_mins(4);
const ETCD: &str = "http://127.0.0.1:2379";
const PORT: u16 = 6443;
const CONTROLLERS_PORT: u16 = 10257;
const SCHEDULER_PORT: u16 = 10259;
/// The file with the agents' requests.
const AUDIT: &str = "audit.jsonl";
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// The running control plane. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    /// May do everything.
    pub(crate) admin: Api,
    /// Where it is.
    pub(crate) server: Server,
    /// The kubelet's identity for each of [`NODES`].
    pub(crate) kubelets: [Identity; 2],
    /// kube-proxy's, on all nodes.
    pub(crate) proxy: Identity,
    place: Place,
    /// `None` during an outage.
    api_server: Option<Daemon>,
    _others: [Daemon; 3],
}

/// What all parts are started with.
#[derive(Debug)]
struct Place {
    binaries: Binaries,
    namespace: Namespace,
    directory: PathBuf,
}

impl Place {
    fn command(&self, program: &str) -> Command {
        // They would end gracefully, which nobody waits for.
        Daemon::command(&self.binaries.program(program), Signal::SIGKILL)
    }

    fn start(&self, program: &str, command: Command) -> Result<Daemon> {
        Daemon::start(program, &self.namespace, command, self.file(&format!("{program}.log")))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn certificate(&self) -> PathBuf {
        self.file("apiserver.crt")
    }

    fn key(&self) -> PathBuf {
        self.file("apiserver.key")
    }
}

impl ControlPlane {
    /// Starts all four and waits until they are ready. Files go to `directory`.
    pub(crate) fn start(
        binaries: &Binaries,
        namespace: &Namespace,
        directory: &Path,
    ) -> Result<Self> {
        let (binaries, namespace) = (binaries.clone(), namespace.clone());
        let place = Place { binaries, namespace, directory: directory.to_owned() };
        let admin = Identity::admin()?;
        let [controllers, scheduler, proxy] =
            ["kube-controller-manager", "kube-scheduler", "kube-proxy"].map(Identity::component);
        let (controllers, scheduler, proxy) = (controllers?, scheduler?, proxy?);
        let kubelets = [Identity::kubelet(NODES[0])?, Identity::kubelet(NODES[1])?];
        let [first, second] = &kubelets;
        let known = [&admin, &controllers, &scheduler, &proxy, first, second];
        write_tokens(&place.file("tokens.csv"), &known)?;

        let etcd = start_etcd(&place)?;
        let mut api_server = start_api_server(&place)?;
        let server = Server { url: url(PORT), authority: place.certificate() };
        let client = |url: &str| Api::open(url, &server.authority, &admin.token, &place.namespace);
        api_server.wait_until(READY_LIMIT, || client(&server.url)?.health("/readyz").map(drop))?;
        let mut others = [
            start_controllers(&place, &server, &controllers)?,
            start_scheduler(&place, &server, &scheduler)?,
            etcd,
        ];
        for (program, port) in others.iter_mut().zip([CONTROLLERS_PORT, SCHEDULER_PORT]) {
            let here = client(&url(port))?;
            program.wait_until(READY_LIMIT, || here.health("/healthz").map(drop))?;
        }
        let admin = client(&server.url)?;
        // Without it no pod is admitted; a controller makes it.
        let account = || admin.get("/api/v1/namespaces/default/serviceaccounts/default").map(drop);
        others[0].wait_until(READY_LIMIT, account)?;
        let api_server = Some(api_server);
        Ok(Self { admin, server, kubelets, proxy, place, api_server, _others: others })
    }

    /// Ends the API server by SIGTERM, as a node's shutdown does.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub(crate) fn stop_api_server(&mut self) -> Result<()> {
        self.api_server.take().context("the API server does not run")?.stop(READY_LIMIT)
    }

    /// Ends the API server by SIGKILL.
    ///
    /// # Errors
    /// When it does not run.
    pub(crate) fn kill_api_server(&mut self) -> Result<()> {
        self.api_server.take().map(drop).context("the API server does not run")
    }

    /// Starts the API server over the same data and with the same certificate, and waits until it
    /// is ready.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub(crate) fn start_api_server(&mut self) -> Result<()> {
        let server = self.api_server.insert(start_api_server(&self.place)?);
        server.wait_until(READY_LIMIT, || self.admin.health("/readyz").map(drop))
    }

    /// What the API server wrote about the agents' requests: one JSON object per line and stage.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn audit(&self) -> Result<String> {
        let path = self.place.file(AUDIT);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The API server for somebody else, from `namespace`.
    pub(crate) fn api(&self, token: &str, namespace: &Namespace) -> Result<Api> {
        Api::open(&self.server.url, &self.server.authority, token, namespace)
    }
}

/// The address that the certificate is for.
fn url(port: u16) -> String {
    format!("https://{}:{port}", Network::control_address())
}

fn start_etcd(place: &Place) -> Result<Daemon> {
    let mut command = place.command("etcd");
    command.arg("--data-dir").arg(place.file("etcd"));
    command.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
    command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
    // Nothing of it is to survive.
    command.arg("--unsafe-no-fsync");
    place.start("etcd", command)
}

fn start_api_server(place: &Place) -> Result<Daemon> {
    let mut command = place.command("kube-apiserver");
    let services = Family::BOTH.map(Family::service_cidr).join(",");
    command.args(["--etcd-servers", ETCD, "--service-cluster-ip-range", &services]);
    command.args(["--secure-port", &PORT.to_string(), "--advertise-address"]);
    command.arg(Network::control_address().to_string());
    command.arg("--cert-dir").arg(&place.directory);
    command.arg("--token-auth-file").arg(place.file("tokens.csv"));
    command.args(["--authorization-mode", "Node,RBAC"]);
    command.args(["--enable-admission-plugins", "NodeRestriction"]);
    command.args(["--service-account-issuer", ISSUER]);
    command.arg("--service-account-signing-key-file").arg(place.key());
    command.arg("--service-account-key-file").arg(place.key());
    // Else its end waits a minute for watches, which only end with it.
    command.args(["--shutdown-watch-termination-grace-period", "5s"]);
    let policy = place.file("audit-policy.json");
    fs::write(&policy, audit_policy().to_string()).context("cannot write the audit policy")?;
    command.arg("--audit-policy-file").arg(policy);
    command.arg("--audit-log-path").arg(place.file(AUDIT));
    place.start("kube-apiserver", command)
}

/// Every request of the agents, without its body, and nobody else's.
fn audit_policy() -> Value {
    let (namespace, account) = manifest::ACCOUNT;
    let agents = format!("system:serviceaccount:{namespace}:{account}");
    json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
        "rules": [{"level": "Metadata", "users": [agents]}, {"level": "None"}],
    })
}

fn start_controllers(place: &Place, server: &Server, identity: &Identity) -> Result<Daemon> {
    let mut command = component(place, "kube-controller-manager", CONTROLLERS_PORT);
    let kubeconfig = place.file("kube-controller-manager.kubeconfig");
    server.write_kubeconfig(&kubeconfig, &identity.token)?;
    command.arg("--kubeconfig").arg(kubeconfig);
    // Each controller has the rights of its own role.
    command.arg("--use-service-account-credentials");
    // Longer than any absence of the API server: the played kubelets do not take back what a
    // controller writes about the pods of a node that was silent.
    command.args(["--node-monitor-grace-period", "5m"]);
    command.arg("--service-account-private-key-file").arg(place.key());
    command.arg("--root-ca-file").arg(place.certificate());
    place.start("kube-controller-manager", command)
}

fn start_scheduler(place: &Place, server: &Server, identity: &Identity) -> Result<Daemon> {
    let mut command = component(place, "kube-scheduler", SCHEDULER_PORT);
    let kubeconfig = place.file("kube-scheduler.kubeconfig");
    server.write_kubeconfig(&kubeconfig, &identity.token)?;
    command.arg("--kubeconfig").arg(kubeconfig);
    place.start("kube-scheduler", command)
}

/// The arguments that both of the API server's clients share.
fn component(place: &Place, program: &str, port: u16) -> Command {
    let mut command = place.command(program);
    command.arg("--leader-elect=false").args(["--secure-port", &port.to_string()]);
    command.arg("--tls-cert-file").arg(place.certificate());
    command.arg("--tls-private-key-file").arg(place.key());
    command
}

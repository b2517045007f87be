//! The API server's watches to facts: the pods of this node and every EndpointSlice.
//!
//! A shell. What is kept per object is its key; the object itself is parsed into a trimmed type,
//! turned into a fact and forgotten. The conversions are pure (`pod`, `slice`).

mod pod;
mod received;
mod slice;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{anyhow, bail};
use axum::http::Uri;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use tokio::sync::mpsc;

use crate::clock::WallOffset;
use crate::facts::{BootNs, ClusterFact};
use crate::readiness::{Item, Readiness};

use pod::Pod;
use slice::EndpointSlice;
use watch::{Watch, Watched as _, words};

/// The readiness of both watches.
#[derive(Clone, Debug)]
pub struct Health {
    /// `pod watch`
    pub pods: Item,
    /// `endpointslice watch`
    pub slices: Item,
    /// Objects of both that did not parse and were passed over.
    pub unreadable: Arc<AtomicU64>,
}

impl Health {
    /// Adds both watches to what must work.
    #[must_use]
    pub fn expect(readiness: &Readiness) -> Self {
        Self {
            pods: readiness.expect(Pod::NAME, "not synced yet"),
            slices: readiness.expect(EndpointSlice::NAME, "not synced yet"),
            unreadable: Arc::default(),
        }
    }
}

/// The API server.
#[derive(Clone)]
pub struct Server {
    client: kube::Client,
    /// Scheme, host and port, for a person: a failure to reach it is of little use without.
    pub address: Arc<str>,
}

/// The API server of `kubeconfig`, or of the pod's ServiceAccount when there is none. It is not
/// connected to yet: one that cannot be reached shows in the readiness of the watches.
///
/// # Errors
/// When the file cannot be read or used, there is none and this is not a pod, or a proxy is set.
pub async fn server(kubeconfig: Option<&Path>) -> anyhow::Result<Server> {
    let mut config = match kubeconfig {
        Some(path) => from_file(path).await.map_err(|error| {
            anyhow!("kubeconfig {} cannot be used: check --kubeconfig: {error}", path.display())
        })?,
        None => kube::Config::incluster().map_err(|error| {
            let error = words(&error);
            anyhow!("not in a pod with a ServiceAccount: give --kubeconfig FILE: {error}")
        })?,
    };
    if let Some(proxy) = &config.proxy_url {
        bail!(
            "the API server is reached without a proxy, not by {proxy}: unset HTTPS_PROXY and \
             HTTP_PROXY, and take proxy-url out of the kubeconfig"
        );
    }
    // The client would repeat a request at HTTP 503 by itself, and nobody would learn of the outage.
    config.default_retry = false;
    let address = address(&config.cluster_url).into();
    let client = kube::Client::try_from(config)
        .map_err(|error| anyhow!("no client for the API server: {}", words(&error)))?;
    Ok(Server { client, address })
}

/// Without what else a URL may hold, for instance a password.
fn address(url: &Uri) -> String {
    let (scheme, host) = (url.scheme_str().unwrap_or_default(), url.host().unwrap_or_default());
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}")
}

/// The error is in words, without the file's name.
async fn from_file(path: &Path) -> Result<kube::Config, String> {
    let options = KubeConfigOptions::default();
    let unusable = |error: KubeconfigError| words(&error);
    let file = Kubeconfig::read_from(path).map_err(unusable)?;
    let config = kube::Config::from_custom_kubeconfig(file, &options).await.map_err(unusable)?;
    // The client takes any URI, and panics at the first request to one without these.
    let url = &config.cluster_url;
    if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none() {
        return Err(format!("its server is {url}, not http://HOST or https://HOST"));
    }
    Ok(config)
}

/// Watches the pods of `node` and all EndpointSlices until nobody receives `facts` any more.
/// Failures show in `health`; both watches go on trying.
pub async fn run(server: &Server, node: &str, facts: mpsc::Sender<ClusterFact>, health: Health) {
    let on_node = Some(format!("spec.nodeName={node}"));
    let Health { pods, slices, unreadable } = health;
    let pods = Watch::<Pod>::new(server, on_node, facts.clone(), pods, unreadable.clone());
    let slices = Watch::<EndpointSlice>::new(server, None, facts, slices, unreadable);
    tokio::join!(pods.run(), slices.run());
}

/// What a page of a list, or an event of a watch, says of pods.
pub(crate) fn replay_pods(body: &[u8], at: BootNs, offset: WallOffset) -> Vec<ClusterFact> {
    received::replay::<Pod>(body, at, offset)
}

/// What a page of a list, or an event of a watch, says of EndpointSlices.
pub(crate) fn replay_slices(body: &[u8], at: BootNs, offset: WallOffset) -> Vec<ClusterFact> {
    received::replay::<EndpointSlice>(body, at, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_a_person_has_no_password_and_no_path() {
        for (url, expected) in [
            ("https://10.96.0.1", "https://10.96.0.1"),
            ("https://[fd00::1]:6443/", "https://[fd00::1]:6443"),
            ("http://user:secret@api.example:8080/k8s/clusters/c", "http://api.example:8080"),
        ] {
            assert_eq!(address(&url.parse().expect("a URL")), expected);
        }
    }
}

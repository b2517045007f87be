//! A client of the real API server, as one identity: JSON over HTTPS from inside a namespace.
//!
//! It retries nothing and waits for nothing but as [`Api::patient`]: who needs that says for how
//! long.

use std::fmt;
use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Body, BodyReader};

use crate::lab::clock;
use crate::lab::netns::Namespace;

/// The API server answers within milliseconds; a loaded machine may need longer.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// Between two requests of a patient client: short for a test, long for an API server that starts.
const PATIENT_PAUSE: Duration = Duration::from_millis(100);
/// How long a service account's token is good: longer than any run.
const TOKEN_SECONDS: u32 = 4 * 3600;

/// An answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The HTTP status: 404 not found, 409 conflict or exists already, 422 invalid.
    pub(crate) status: u16,
    /// What the API server says of it.
    pub(crate) message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.status, self.message)
    }
}

impl std::error::Error for Refusal {}

/// The HTTP status that an error of this client carries, when the API server answered at all.
pub(crate) fn status(error: &anyhow::Error) -> Option<u16> {
    error.downcast_ref::<Refusal>().map(|refusal| refusal.status)
}

/// How the API server merges a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patch {
    /// RFC 7386.
    Merge,
    /// Kubernetes' own: lists are merged by their key.
    Strategic,
}

impl Patch {
    fn content_type(self) -> &'static str {
        match self {
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
        }
    }
}

/// The API server for one identity. Clones share their connections.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    client: ureq::Agent,
    server: String,
    token: String,
    namespace: Namespace,
    patience: Duration,
    has_given_up: Arc<AtomicBool>,
}

impl Api {
    /// A client of `server` (`https://…`, without a slash at the end) that trusts the certificates
    /// of `authority` (PEM), shows `token`, and connects from `namespace`.
    ///
    /// # Errors
    /// When `authority` is not PEM.
    fn new(server: &str, authority: &str, token: &str, namespace: &Namespace) -> Result<Self> {
        let mut certificates: Vec<Certificate<'static>> = Vec::new();
        for item in parse_pem(authority.as_bytes()) {
            if let PemItem::Certificate(certificate) = item? {
                certificates.push(certificate);
            }
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(certificates)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let client = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .tls_config(tls)
            .build()
            .new_agent();
        let (server, token) = (server.to_owned(), token.to_owned());
        let (namespace, patience) = (namespace.clone(), Duration::ZERO);
        Ok(Self { client, server, token, namespace, patience, has_given_up: Arc::default() })
    }

    /// As [`Api::new`], with the certificates in a file.
    ///
    /// # Errors
    /// When the file is missing or not PEM.
    pub(crate) fn open(
        server: &str,
        authority: &Path,
        token: &str,
        namespace: &Namespace,
    ) -> Result<Self> {
        let certificates = std::fs::read_to_string(authority)
            .with_context(|| format!("cannot read {}", authority.display()))?;
        Self::new(server, &certificates, token, namespace)
    }

    /// The same, for whoever outlasts the API server: asks again for as long as `patience` while
    /// nothing answers or the API server cannot yet. One that has just started does not know its
    /// accounts and roles, so that 401 and 403 count as such.
    pub(crate) fn patient(&self, patience: Duration) -> Self {
        Self { patience, has_given_up: Arc::default(), ..self.clone() }
    }

    /// Ends the patience, also of clones and of requests that are waiting.
    pub(crate) fn give_up(&self) {
        self.has_given_up.store(true, Ordering::Relaxed);
    }

    /// One object, or a list of them.
    ///
    /// # Errors
    /// [`Refusal`] when it is refused; else when nothing answers.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        self.json("GET", path, None)
    }

    /// The `items` of a list; `path` may have selectors.
    ///
    /// # Errors
    /// As [`Api::get`], and when it is no list.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<Value>> {
        match self.get(path)?["items"].take() {
            Value::Array(items) => Ok(items),
            _ => bail!("GET {path}: no list"),
        }
    }

    /// Adds an object to the collection at `path`; returns it as stored.
    ///
    /// # Errors
    /// As [`Api::get`]; status 409 when it exists.
    pub(crate) fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.json("POST", path, Some(("application/json", object)))
    }

    /// Changes parts of the object at `path`, which may end in `/status`; returns it as stored.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub(crate) fn patch(&self, path: &str, kind: Patch, change: &Value) -> Result<Value> {
        self.json("PATCH", path, Some((kind.content_type(), change)))
    }

    /// Asks for the deletion of the object at `path`, with `DeleteOptions` such as
    /// `{"gracePeriodSeconds": 0}`.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub(crate) fn delete(&self, path: &str, options: &Value) -> Result<Value> {
        self.json("DELETE", path, Some(("application/json", options)))
    }

    /// The changes of what is at `path`, from `resource_version` on.
    ///
    /// # Errors
    /// As [`Api::get`]; status 410 when that version is too old.
    pub(crate) fn watch(&self, path: &str, resource_version: &str) -> Result<Watch> {
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!(
            "{path}{separator}watch=true&allowWatchBookmarks=true&resourceVersion={resource_version}"
        );
        let body = self.patiently(|| self.send("GET", &path, None, None))?;
        Ok(Watch { lines: BufReader::new(body.into_reader()).lines() })
    }

    /// A token of a service account, as the kubelet asks for a pod's.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub(crate) fn service_account_token(&self, namespace: &str, account: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS},
        });
        let answer = self.create(&path, &request)?;
        let token = answer["status"]["token"].as_str();
        Ok(token.context("the API server sent no token")?.to_owned())
    }

    /// The body of a health endpoint such as `/readyz`.
    ///
    /// # Errors
    /// As [`Api::get`]: the message says which check fails.
    pub(crate) fn health(&self, path: &str) -> Result<String> {
        Ok(self.send("GET", path, None, Some(REQUEST_LIMIT))?.read_to_string()?)
    }

    fn json(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let answer = self.patiently(|| {
            Ok(self.send(method, path, body, Some(REQUEST_LIMIT))?.read_to_string()?)
        })?;
        serde_json::from_str(&answer).with_context(|| format!("{method} {path}: {answer}"))
    }

    fn patiently<T>(&self, ask: impl Fn() -> Result<T>) -> Result<T> {
        let until_ns = clock::boot_ns() + clock::nanos(self.patience);
        let may_wait = || clock::boot_ns() < until_ns && !self.has_given_up.load(Ordering::Relaxed);
        loop {
            match ask() {
                Err(error) if is_outage(&error) && may_wait() => {
                    std::thread::sleep(PATIENT_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// The body of a success.
    fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<(&str, &Value)>,
        limit: Option<Duration>,
    ) -> Result<Body> {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.server))
            .header("Authorization", format!("Bearer {}", self.token))
            .header("Accept", "application/json");
        let request = match body {
            Some((content_type, _)) => request.header("Content-Type", content_type),
            None => request,
        };
        let body = body.map(|(_, value)| value.to_string()).unwrap_or_default();
        let request = request.body(body)?;
        let response = self.namespace.enter(|| {
            let request = self.client.configure_request(request);
            let request = request.timeout_global(limit).allow_non_standard_methods(true).build();
            self.client.run(request).map_err(|error| anyhow!(error))
        });
        let mut response = response.with_context(|| format!("{method} {path}"))?;
        if response.status().is_success() {
            return Ok(response.into_body());
        }
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string()?;
        let parsed: Option<Value> = serde_json::from_str(&text).ok();
        let said = parsed.as_ref().and_then(|answer| answer["message"].as_str());
        let message = said.unwrap_or(text.trim()).to_owned();
        Err(anyhow!(Refusal { status, message }).context(format!("{method} {path}")))
    }
}

/// Whether the API server may answer otherwise once it has started.
fn is_outage(error: &anyhow::Error) -> bool {
    matches!(status(error), None | Some(401 | 403 | 429 | 500..))
}

/// The events of a watch, bookmarks too, until the API server ends it.
pub(crate) struct Watch {
    lines: Lines<BufReader<BodyReader<'static>>>,
}

impl Iterator for Watch {
    type Item = Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        let line = self.lines.next()?;
        Some(line.context("a watch broke off").and_then(|line| Ok(serde_json::from_str(&line)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_status_whatever_is_said_around_it() {
        let refusal = Refusal { status: 409, message: "it exists".to_owned() };
        let error = anyhow!(refusal).context("POST /api").context("cannot start");
        assert_eq!(status(&error), Some(409));
        assert_eq!(format!("{error:#}"), "cannot start: POST /api: 409: it exists");
        assert_eq!(status(&anyhow!("nobody answers")), None);
    }

    #[test]
    fn only_an_answer_that_stays_ends_the_patience() {
        let refused = |status| anyhow!(Refusal { status, message: String::new() });
        assert!(is_outage(&anyhow!("nobody answers")));
        assert!([401, 403, 429, 500, 503].into_iter().all(|status| is_outage(&refused(status))));
        assert!(![404, 409, 410, 422].into_iter().any(|status| is_outage(&refused(status))));
    }

    #[test]
    fn each_way_to_merge_has_its_media_type() {
        assert_eq!(Patch::Merge.content_type(), "application/merge-patch+json");
        assert_eq!(Patch::Strategic.content_type(), "application/strategic-merge-patch+json");
    }
}

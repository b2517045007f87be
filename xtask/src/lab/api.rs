//! The Kubernetes API over HTTP, as far as the agent uses it: list and watch of pods and
//! EndpointSlices, with versions, bookmarks and 410 Gone. No TLS, no authentication, no writes.
//!
//! Unknown parameters are ignored as the real server does; a field selector it cannot apply is
//! refused, because an unfiltered answer would be wrong.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::netns::Namespace;
use super::store::{Kind, Store};

const ADDRESS: &str = "127.0.0.1:6443";
/// The real server sends one about every minute; tests want to see one.
const BOOKMARK_EVERY: Duration = Duration::from_secs(1);
/// Lines that a slow watcher may be behind before its watch waits for it.
const WATCH_BACKLOG: usize = 64;

/// How a watch from an expired version is answered; the real server does both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// HTTP status 410.
    #[default]
    Status,
    /// HTTP status 200 and an `ERROR` event in the stream.
    InStream,
}

/// What running watches are told.
#[derive(Clone, Copy, Debug, Default)]
struct Notice {
    version: u64,
    cuts: u64,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    notice: watch::Sender<Notice>,
    gone: Mutex<Gone>,
}

/// The server, and the hooks by which a test disturbs it.
#[derive(Debug)]
pub struct Api {
    shared: Arc<Shared>,
    namespace: Namespace,
    running: Mutex<Option<Runtime>>,
}

impl Api {
    /// Serves on the node's loopback.
    pub(crate) fn serve(namespace: &Namespace) -> Result<Self> {
        let shared = Shared {
            store: Mutex::default(),
            notice: watch::channel(Notice::default()).0,
            gone: Mutex::default(),
        };
        let api = Self {
            shared: Arc::new(shared),
            namespace: namespace.clone(),
            running: Mutex::default(),
        };
        api.start()?;
        Ok(api)
    }

    /// Where it listens, inside the node's namespace.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{ADDRESS}")
    }

    /// Changes objects; watches see it at once.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Store)) {
        let mut store = lock(&self.shared.store);
        change(&mut store);
        let version = store.version();
        self.shared.notice.send_modify(|notice| notice.version = version);
    }

    /// Ends all watches; their clients reconnect from where they were.
    pub fn cut_watches(&self) {
        self.shared.notice.send_modify(|notice| notice.cuts += 1);
    }

    /// Forgets the history and ends all watches: their next version gets 410 Gone.
    pub fn expire_watches(&self, gone: Gone) {
        *lock(&self.shared.gone) = gone;
        self.change(Store::forget_history);
        self.cut_watches();
    }

    /// Closes the listener and every connection: clients are refused until `start`.
    pub fn stop(&self) {
        if let Some(runtime) = lock(&self.running).take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }

    /// Listens again after `stop`.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn start(&self) -> Result<()> {
        let mut running = lock(&self.running);
        if running.is_some() {
            return Ok(());
        }
        let address: SocketAddr = ADDRESS.parse()?;
        let listener = self.namespace.enter(|| {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
        })?;
        listener.set_nonblocking(true)?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let routes = Router::new()
            .route("/version", get(version))
            .route("/api/v1/pods", get(pods))
            .route("/apis/discovery.k8s.io/v1/endpointslices", get(slices))
            .with_state(Arc::clone(&self.shared));
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        runtime.spawn(async move { axum::serve(listener, routes).await });
        *running = Some(runtime);
        Ok(())
    }

    /// Writes a kubeconfig that leads here.
    pub(crate) fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.url()}}],
            "users": [{"name": "lab", "user": {}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        fs::write(path, config.to_string())
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop();
    }
}

type Parameters = Query<HashMap<String, String>>;

async fn version() -> Response {
    let version =
        json!({"major": "1", "minor": "36", "gitVersion": "v1.36.2", "platform": "linux/amd64"});
    json_response(StatusCode::OK, &version)
}

async fn pods(State(shared): State<Arc<Shared>>, parameters: Parameters) -> Response {
    answer(shared, Kind::Pod, &parameters)
}

async fn slices(State(shared): State<Arc<Shared>>, parameters: Parameters) -> Response {
    answer(shared, Kind::EndpointSlice, &parameters)
}

fn answer(shared: Arc<Shared>, kind: Kind, parameters: &HashMap<String, String>) -> Response {
    let parameter = |name: &str| parameters.get(name).map_or("", String::as_str);
    let Some(selector) = Selector::parse(parameter("fieldSelector")) else {
        return status(StatusCode::BAD_REQUEST, "BadRequest", "unsupported field selector");
    };
    if !matches!(parameter("watch"), "true" | "1") {
        return list(&shared, kind, &selector);
    }
    let Ok(version) = parameter("resourceVersion").parse() else {
        return status(StatusCode::BAD_REQUEST, "BadRequest", "resourceVersion is not a number");
    };
    let expired = lock(&shared.store).since(kind, version).is_err();
    if expired && *lock(&shared.gone) == Gone::Status {
        return status(StatusCode::GONE, "Expired", "too old resource version");
    }
    let (lines, receiver) = mpsc::channel(WATCH_BACKLOG);
    // Before the answer begins: whoever has seen it can cut this watch.
    let notice = shared.notice.subscribe();
    let cuts = notice.borrow().cuts;
    let watch = Watch {
        kind,
        selector,
        version,
        bookmarks: parameter("allowWatchBookmarks") == "true",
        until: parameter("timeoutSeconds").parse().ok().map(Duration::from_secs),
        lines,
        cuts,
        notice,
    };
    tokio::spawn(watch.run(shared));
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn list(shared: &Shared, kind: Kind, selector: &Selector) -> Response {
    let store = lock(&shared.store);
    let items: Vec<&Value> = store
        .list(kind)
        .map(|object| &**object)
        .filter(|object| selector.selects(object))
        .collect();
    let list = json!({
        "kind": format!("{}List", kind.name()), "apiVersion": kind.api_version(),
        "metadata": {"resourceVersion": store.version().to_string()}, "items": items,
    });
    json_response(StatusCode::OK, &list)
}

/// One running watch.
struct Watch {
    kind: Kind,
    selector: Selector,
    version: u64,
    bookmarks: bool,
    until: Option<Duration>,
    lines: mpsc::Sender<Bytes>,
    notice: watch::Receiver<Notice>,
    cuts: u64,
}

impl Watch {
    /// Ends when the client leaves, the watch is cut, its time is over or its version expired.
    async fn run(mut self, shared: Arc<Shared>) {
        let over = tokio::time::sleep(self.until.unwrap_or(Duration::from_hours(1)));
        tokio::pin!(over);
        let mut bookmark = tokio::time::interval(BOOKMARK_EVERY);
        bookmark.tick().await;
        while self.notice.borrow_and_update().cuts == self.cuts
            && self.catch_up(&shared).await.is_some()
        {
            tokio::select! {
                changed = self.notice.changed() => if changed.is_err() { return },
                () = &mut over => return,
                () = self.lines.closed() => return,
                _ = bookmark.tick(), if self.bookmarks => {
                    if self.send(&self.bookmark()).await.is_none() { return }
                }
            }
        }
    }

    async fn catch_up(&mut self, shared: &Shared) -> Option<()> {
        let (events, latest) = {
            let store = lock(&shared.store);
            (store.since(self.kind, self.version), store.version())
        };
        let Ok(events) = events else {
            let object = status_object(StatusCode::GONE, "Expired", "too old resource version");
            self.send(&json!({"type": "ERROR", "object": object})).await;
            return None;
        };
        for event in events.iter().filter(|event| self.selector.selects(&event.object)) {
            self.send(&json!({"type": event.change, "object": *event.object})).await?;
        }
        self.version = latest;
        Some(())
    }

    fn bookmark(&self) -> Value {
        json!({"type": "BOOKMARK", "object": {
            "kind": self.kind.name(), "apiVersion": self.kind.api_version(),
            "metadata": {"resourceVersion": self.version.to_string(), "creationTimestamp": null},
        }})
    }

    async fn send(&self, line: &Value) -> Option<()> {
        self.lines.send(Bytes::from(format!("{line}\n"))).await.ok()
    }
}

/// A field selector of the form `field=value`, or none.
struct Selector(Option<(String, String)>);

impl Selector {
    fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self(None));
        }
        let (field, value) = text.split_once('=')?;
        let known = matches!(field, "spec.nodeName" | "metadata.name" | "metadata.namespace");
        known.then(|| {
            let pointer = format!("/{}", field.replace('.', "/"));
            Self(Some((pointer, value.trim_start_matches('=').to_owned())))
        })
    }

    fn selects(&self, object: &Value) -> bool {
        self.0.as_ref().is_none_or(|(pointer, value)| {
            object.pointer(pointer).and_then(Value::as_str) == Some(value.as_str())
        })
    }
}

fn status_object(code: StatusCode, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    })
}

fn status(code: StatusCode, reason: &str, message: &str) -> Response {
    json_response(code, &status_object(code, reason, message))
}

fn json_response(code: StatusCode, body: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// A panicking test thread must not hide behind a poisoned lock: the data is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! The Kubernetes API over HTTP, as far as the agent uses it: lists in pages and watches of pods and
//! EndpointSlices, with versions, bookmarks and 410 Gone. No TLS, no authentication, no writes.
//!
//! Unknown parameters are ignored as the real server does; a field selector it cannot apply is
//! refused, because an unfiltered answer would be wrong.

use std::collections::{BTreeMap, HashMap};
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
use serde::Serialize;
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

/// What clients asked for and were sent, of both kinds, since the server was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Pages of lists.
    pub pages: u64,
    /// Watches that were begun.
    pub watches: u64,
    /// Those of them that go on.
    pub open_watches: u64,
    /// The bytes of all bodies.
    pub bytes: u64,
}

/// What a client has still to ask for of a list that it reads in pages: as it was at the start.
#[derive(Debug)]
struct Rest {
    version: u64,
    objects: Vec<Arc<Value>>,
}

#[derive(Debug, Default)]
struct Shared {
    store: Mutex<Store>,
    notice: watch::Sender<Notice>,
    gone: Mutex<Gone>,
    served: Mutex<Served>,
    /// By the token of the next page; each serves once.
    unread: Mutex<BTreeMap<String, Rest>>,
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
        let api = Self {
            shared: Arc::default(),
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

    /// What was served so far.
    #[must_use]
    pub fn served(&self) -> Served {
        *lock(&self.shared.served)
    }

    /// Ends all watches; their clients reconnect from where they were.
    pub fn cut_watches(&self) {
        self.shared.notice.send_modify(|notice| notice.cuts += 1);
    }

    /// Forgets the history and ends all watches: their next version gets 410 Gone, and so does the
    /// next page of a list.
    pub fn expire_watches(&self, gone: Gone) {
        *lock(&self.shared.gone) = gone;
        lock(&self.shared.unread).clear();
        self.change(Store::forget_history);
        self.cut_watches();
    }

    /// Closes the listener and every connection: clients are refused until `start`.
    pub fn stop(&self) {
        if let Some(runtime) = lock(&self.running).take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
            lock(&self.shared.served).open_watches = 0;
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
        return list(&shared, kind, &selector, parameter("limit"), parameter("continue"));
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
    {
        let mut served = lock(&shared.served);
        served.watches += 1;
        served.open_watches += 1;
    }
    tokio::spawn(watch.run(shared));
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// A page of a list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page<'a> {
    kind: String,
    api_version: &'static str,
    metadata: Value,
    items: &'a [Arc<Value>],
}

fn list(shared: &Shared, kind: Kind, selector: &Selector, limit: &str, token: &str) -> Response {
    let rest = if token.is_empty() {
        let store = lock(&shared.store);
        let selected = store.list(kind).filter(|object| selector.selects(object));
        Some(Rest { version: store.version(), objects: selected.cloned().collect() })
    } else {
        lock(&shared.unread).remove(token)
    };
    let Some(Rest { version, objects: mut page }) = rest else {
        return status(StatusCode::GONE, "Expired", "the continue token has expired");
    };
    let limit = limit.parse().ok().filter(|limit: &usize| *limit > 0).unwrap_or(usize::MAX);
    let objects = page.split_off(limit.min(page.len()));
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if !objects.is_empty() {
        let next = format!("{}-{version}-{}", kind.name(), objects.len());
        metadata["continue"] = json!(next);
        metadata["remainingItemCount"] = json!(objects.len());
        lock(&shared.unread).insert(next, Rest { version, objects });
    }
    let name = format!("{}List", kind.name());
    let page = Page { kind: name, api_version: kind.api_version(), metadata, items: &page };
    let response = json_response(StatusCode::OK, &page);
    let mut served = lock(&shared.served);
    served.pages += 1;
    served.bytes += axum::body::HttpBody::size_hint(response.body()).lower();
    response
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
    async fn run(mut self, shared: Arc<Shared>) {
        self.follow(&shared).await;
        lock(&shared.served).open_watches -= 1;
    }

    /// Ends when the client leaves, the watch is cut, its time is over or its version expired.
    async fn follow(&mut self, shared: &Shared) {
        let over = tokio::time::sleep(self.until.unwrap_or(Duration::from_hours(1)));
        tokio::pin!(over);
        let mut bookmark = tokio::time::interval(BOOKMARK_EVERY);
        bookmark.tick().await;
        while self.notice.borrow_and_update().cuts == self.cuts
            && self.catch_up(shared).await.is_some()
        {
            tokio::select! {
                changed = self.notice.changed() => if changed.is_err() { return },
                () = &mut over => return,
                () = self.lines.closed() => return,
                _ = bookmark.tick(), if self.bookmarks => {
                    let bookmark = self.bookmark();
                    if self.send(shared, "BOOKMARK", &bookmark).await.is_none() { return }
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
            self.send(shared, "ERROR", &object).await;
            return None;
        };
        for event in events.iter().filter(|event| self.selector.selects(&event.object)) {
            self.send(shared, event.change, &event.object).await?;
        }
        self.version = latest;
        Some(())
    }

    fn bookmark(&self) -> Value {
        json!({
            "kind": self.kind.name(), "apiVersion": self.kind.api_version(),
            "metadata": {"resourceVersion": self.version.to_string(), "creationTimestamp": null},
        })
    }

    /// The type comes first, as the real server writes it.
    async fn send(&self, shared: &Shared, change: &str, object: &Value) -> Option<()> {
        let line = format!("{{\"type\":\"{change}\",\"object\":{object}}}\n");
        lock(&shared.served).bytes += line.len() as u64;
        self.lines.send(Bytes::from(line)).await.ok()
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

fn json_response(code: StatusCode, body: &impl Serialize) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    match serde_json::to_string(body) {
        Ok(text) => (code, headers, text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A panicking test thread must not hide behind a poisoned lock: the data is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

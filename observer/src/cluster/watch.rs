//! One list-and-watch of the API server, kept up for as long as the daemon runs.
//!
//! `kube::runtime::watcher` hides three things that the evidence depends on: when a broken watch is
//! open again, bookmarks (the proof that a quiet watch is alive), and which objects a re-list no
//! longer has. So this loop is built on the client's list and watch requests instead, with the
//! runtime's backoff. It also lets the objects be our own small types.
//!
//! It never drops a fact: a full channel makes the watch wait.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Debug;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use axum::http::{HeaderValue, header};
use futures::AsyncBufReadExt as _;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;
use kube::runtime::watcher::DefaultBackoff;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::clock::{self, WallOffset};
use crate::facts::{Blindness, BootNs, ClusterFact};
use crate::readiness::Item;

use super::Server;
use super::received::{Event, Page, Received};

/// How long the server is asked to keep one watch open. Client-go uses 5 to 10 minutes; below 5
/// also satisfies load balancers that cut a connection after 5 minutes.
const WATCH_SECONDS: u32 = 290;

/// How long a watch may be silent before the connection counts as dead: the server should have
/// ended it by then.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);

/// How long a list or the opening of a watch may take before it counts as failed (client-go's
/// request timeout for lists is 60 s).
const ANSWER: Duration = Duration::from_mins(1);

/// Objects per page of a list, as client-go: it bounds the memory that a list needs. Without a
/// resourceVersion the answer is never older than what a watch has already seen (and comes from
/// the server's cache all the same, from Kubernetes 1.31 on).
const PAGE: u32 = 500;

/// After a gap the server replays what was missed at once, without marking where the replay ends.
/// Events within this time of the resumption may therefore be late. A replay of some hundred
/// events takes well under it.
const REPLAY: Duration = Duration::from_secs(1);

/// The pause between two watches that is not blindness. An ordinary reconnect, every
/// [`WATCH_SECONDS`], takes some milliseconds; only an event inside the pause is late, by no more
/// than the pause.
const PAUSE: Duration = Duration::from_millis(250);

/// How often a watch that is down says so: sooner than a timeline closes after its last instant
/// ([`correlate`](crate::correlate) waits 3 s), or one could close as a sample meanwhile.
const TELL: Duration = Duration::from_secs(2);

/// A watch that the server ends sooner than this is not the ordinary timeout: the next attempt
/// waits, or a confused server would be asked in a tight loop.
const SHORTEST: Duration = Duration::from_secs(1);

/// A kind of object that can be watched.
pub(super) trait Watched: Debug + DeserializeOwned + Send + 'static {
    /// What stays the same over the object's life, and never names another.
    type Key: Clone + Ord + Send;
    /// The watch's name, for a person.
    const NAME: &'static str;
    /// The collection's path at the API server.
    const PATH: &'static str;
    /// This object's key.
    fn key(&self) -> Self::Key;
    /// `metadata.resourceVersion`
    fn resource_version(&self) -> &str;
    /// What it says, seen at `at`.
    fn observed(self, at: BootNs, offset: WallOffset) -> ClusterFact;
    /// That the object with this key is gone, seen at `at`.
    fn removed(key: Self::Key, at: BootNs) -> ClusterFact;
}

/// Watches one collection and reports into `facts`.
pub(super) struct Watch<K: Watched> {
    server: Server,
    selector: Option<String>,
    facts: mpsc::Sender<ClusterFact>,
    readiness: Item,
    unreadable: Arc<AtomicU64>,
    /// Where to resume; `None` when a list is needed.
    version: Option<String>,
    /// The objects that exist as far as this watch knows.
    known: BTreeSet<K::Key>,
    /// The last moment up to which nothing was missed; `None` before the first list.
    good: Option<BootNs>,
    /// Whether nothing has come since the last list.
    just_listed: bool,
    /// Whether something was missed since, until the watch is open again.
    interrupted: bool,
}

impl<K: Watched> Watch<K> {
    pub(super) fn new(
        server: &Server,
        selector: Option<String>,
        facts: mpsc::Sender<ClusterFact>,
        readiness: Item,
        unreadable: Arc<AtomicU64>,
    ) -> Self {
        Self {
            server: server.clone(),
            selector,
            facts,
            readiness,
            unreadable,
            version: None,
            known: BTreeSet::new(),
            good: None,
            just_listed: true,
            interrupted: false,
        }
    }

    /// Returns only when nobody receives the facts any more.
    pub(super) async fn run(mut self) {
        let mut backoff = DefaultBackoff::default();
        while !self.facts.is_closed() {
            let outcome = match self.version.clone() {
                None => self.list().await,
                Some(version) => self.follow(&version).await,
            };
            let Err(error) = outcome else { continue };
            let why = format!("{error:#}; the API server is {}", self.server.address);
            warn!("{}: {why}", K::NAME);
            self.readiness.down(why);
            self.interrupted = true;
            self.blind_until(clock::now()).await;
            if self.is_only_forgotten() {
                continue;
            }
            self.telling(sleep(backoff.next().unwrap_or(ANSWER))).await;
        }
    }

    /// Waits, and meanwhile says that nothing is seen.
    async fn telling<T>(&mut self, awaited: impl Future<Output = T>) -> T {
        let mut awaited = pin!(awaited);
        loop {
            tokio::select! {
                outcome = &mut awaited => return outcome,
                () = sleep(TELL) => {
                    let now = clock::now();
                    self.note_pause(now);
                    self.blind_until(now).await;
                }
            }
        }
    }

    fn note_pause(&mut self, now: BootNs) {
        let pause = self.good.map_or(0.0, |good| now.seconds_since(good));
        self.interrupted |= pause > PAUSE.as_secs_f64();
    }

    /// Whether the server is there and no longer has our version, as after its restart: a pause would
    /// only prolong the blindness. Once per list, or a confused server would be asked in a tight
    /// loop.
    fn is_only_forgotten(&mut self) -> bool {
        self.version.is_none() && !std::mem::replace(&mut self.just_listed, true)
    }

    /// Reads the whole collection; objects known before that it lacks were removed unseen.
    async fn list(&mut self) -> anyhow::Result<()> {
        let mut listed = BTreeSet::new();
        let mut params = ListParams {
            field_selector: self.selector.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let request = Request::new(K::PATH).list(&params).context("list request")?;
            let client = self.server.client.clone();
            let page: Page<K> = self
                .telling(timeout(ANSWER, client.request(request)))
                .await
                .map_err(|_elapsed| anyhow!("no answer to the list within {ANSWER:?}"))?
                .map_err(|error| explain("cannot list", error))?;
            let offset = WallOffset::measure();
            for object in page.items.into_iter().flatten() {
                let Some(object) = self.readable(object) else { continue };
                listed.insert(object.key());
                // Each at a moment of its own: what two slices say of an endpoint has an order.
                self.send(object.observed(clock::now(), offset)).await;
            }
            params.continue_token = page.metadata.next.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                self.version = Some(version.context("the list has no resourceVersion")?);
                break;
            }
        }
        self.just_listed = true;
        self.listed(listed).await;
        Ok(())
    }

    async fn listed(&mut self, listed: BTreeSet<K::Key>) {
        let at = clock::now();
        for key in self.known.difference(&listed).cloned().collect::<Vec<_>>() {
            self.send(K::removed(key, at)).await;
        }
        self.known = listed;
        self.blind_until(at).await;
        self.good = Some(at);
        self.interrupted = false;
    }

    /// Follows one watch to its end. `Ok` when the server ended it in order.
    async fn follow(&mut self, version: &str) -> anyhow::Result<()> {
        let params = WatchParams {
            field_selector: self.selector.clone(),
            timeout: Some(WATCH_SECONDS),
            bookmarks: true,
            ..WatchParams::default()
        };
        let mut request = Request::new(K::PATH).watch(&params, version).context("watch request")?;
        // Of a compressed stream the client would read the first event only (Kubernetes 1.37).
        let uncompressed = HeaderValue::from_static("identity");
        request.headers_mut().insert(header::ACCEPT_ENCODING, uncompressed);
        let client = self.server.client.clone();
        let events = self
            .telling(timeout(ANSWER, client.request_stream(request)))
            .await
            .map_err(|_elapsed| anyhow!("no answer to the watch within {ANSWER:?}"))?
            .map_err(|error| self.failed("cannot watch", error))?;
        let opened = clock::now();
        self.opened(opened).await;
        let mut events = pin!(events);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = timeout(SILENCE, events.read_until(b'\n', &mut line)).await;
            let at = clock::now();
            match read {
                Err(_elapsed) => bail!("no word from the API server for {SILENCE:?}"),
                Ok(Err(error)) if !is_end(&error) => {
                    bail!("the watch broke: {}", words(&error))
                }
                // As some proxies send to keep a connection open.
                Ok(Ok(_)) if line == b"\n" => {}
                Ok(Ok(_)) if line.ends_with(b"\n") => {
                    let event = Event::read(&line).context("the watch broke")?;
                    self.take(event, at).await?;
                }
                // The end; what was cut inside an event comes again.
                Ok(_) if at.seconds_since(opened) < SHORTEST.as_secs_f64() => {
                    bail!("the API server ended the watch at once")
                }
                Ok(_) => {
                    self.good = Some(at);
                    return Ok(());
                }
            }
        }
    }

    async fn opened(&mut self, at: BootNs) {
        self.note_pause(at);
        self.blind_until(at.plus(REPLAY)).await;
        self.interrupted = false;
        self.good = Some(at);
        self.readiness.up();
        debug!("{} open", K::NAME);
    }

    async fn take(&mut self, event: Event<K>, at: BootNs) -> anyhow::Result<()> {
        match event {
            Event::Present(object) => {
                if let Some(object) = self.next_version(object) {
                    self.known.insert(object.key());
                    self.send(object.observed(at, WallOffset::measure())).await;
                }
            }
            Event::Deleted(object) => {
                if let Some(object) = self.next_version(object) {
                    let key = object.key();
                    self.known.remove(&key);
                    // A forced delete sets the deletion and removes the object in one step: only
                    // this last state tells it from an ordinary end.
                    self.send(object.observed(at, WallOffset::measure())).await;
                    self.send(K::removed(key, at)).await;
                }
            }
            Event::Bookmark(version) => self.version = Some(version),
            Event::Error(status) => {
                return Err(self.failed("the watch broke", kube::Error::Api(status)));
            }
        }
        self.just_listed = false;
        self.good = Some(at);
        Ok(())
    }

    /// Moves on to the object's version, whether or not the rest of it can be read.
    fn next_version(&mut self, object: Received<K>) -> Option<K> {
        self.version = Some(object.resource_version().to_owned());
        self.readable(object)
    }

    /// One object that is not as expected must not stop the others.
    fn readable(&self, object: Received<K>) -> Option<K> {
        match object {
            Received::Readable(object) => Some(object),
            Received::Unreadable(metadata) => {
                let before = self.unreadable.fetch_add(1, Ordering::Relaxed);
                let (namespace, name) = (metadata.namespace, metadata.name);
                if before == 0 {
                    warn!(namespace, name, "{}: an object is not as expected", K::NAME);
                } else {
                    debug!(namespace, name, "{}: an object is not as expected", K::NAME);
                }
                None
            }
        }
    }

    /// Words for a failure, and a list the next time when the server no longer has our version.
    fn failed(&mut self, what: &str, error: kube::Error) -> anyhow::Error {
        if matches!(&error, kube::Error::Api(status) if status.code == 410) {
            self.version = None;
        }
        explain(what, error)
    }

    /// Reports, after an interruption, that changes up to `until` may be missing or late. Nothing
    /// was known before the first list, so nothing can have been missed.
    async fn blind_until(&mut self, until: BootNs) {
        let from = self.good.filter(|good| self.interrupted && *good < until);
        if let Some(from) = from {
            self.send(ClusterFact::Blind(Blindness { from, until, source: K::NAME })).await;
            self.good = Some(until);
        }
    }

    async fn send(&self, fact: ClusterFact) {
        if self.facts.send(fact).await.is_err() {
            debug!("{}: nobody listens any more", K::NAME);
        }
    }
}

/// Whether an error while reading means that the connection was closed: some load balancers do so
/// after minutes, and nothing is missed by it.
fn is_end(error: &io::Error) -> bool {
    words(error).to_ascii_lowercase().contains("unexpected eof")
}

/// The API server's own words where it has any: they say what a person must change.
fn explain(what: &str, error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 401 => anyhow!(
            "{what}: {} (HTTP 401): check the credentials, of the kubeconfig or the ServiceAccount",
            status.message
        ),
        kube::Error::Api(status) if status.code == 403 => anyhow!(
            "{what}: {} (HTTP 403): check the ClusterRole bound to this account",
            status.message
        ),
        kube::Error::Api(status) => anyhow!("{what}: {} (HTTP {})", status.message, status.code),
        error => anyhow!("{what}: {}", words(&error)),
    }
}

/// An error with its causes on one line, each once: many of the client's errors print their cause
/// themselves, and a parser's shows the file below its first line.
pub(super) fn words(error: &dyn Error) -> String {
    let first_line = |error: &dyn Error| error.to_string().lines().next().map(str::to_owned);
    let mut words = first_line(error).unwrap_or_default();
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(inner) = first_line(error).filter(|inner| !words.contains(inner)) {
            words = format!("{words}: {inner}");
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;

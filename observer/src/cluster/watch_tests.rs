//! The watch against a small server that answers each request from a script.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;

use super::super::pod::Pod;
use super::*;
use crate::readiness::Readiness;

/// What the server answers to the next request.
enum Answer {
    /// A status and a whole body.
    Whole(u16, Value),
    /// Watch events, after which the stream stays open.
    Open(Vec<Value>),
    /// Watch events, after which the server ends the stream a little later than [`SHORTEST`].
    Ended(Vec<Value>),
    /// The same, with anything in place of events.
    Raw(String),
}

#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<VecDeque<Answer>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

async fn answer(State(script): State<Script>, uri: Uri) -> Response {
    script.asked.lock().expect("no panic").push(uri.query().unwrap_or_default().to_owned());
    let next = script.answers.lock().expect("no panic").pop_front();
    let text = |text: String| futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(text))]);
    let lines = |events: Vec<Value>| {
        let lines: Vec<String> = events.iter().map(ToString::to_string).collect();
        text(lines.join("\n") + "\n")
    };
    let end = futures::stream::once(async {
        sleep(SHORTEST + Duration::from_millis(50)).await;
        Ok(Bytes::new())
    });
    match next {
        Some(Answer::Whole(status, body)) => {
            let status = StatusCode::from_u16(status).expect("a status");
            (status, axum::Json(body)).into_response()
        }
        Some(Answer::Open(events)) => {
            Body::from_stream(lines(events).chain(futures::stream::pending())).into_response()
        }
        Some(Answer::Ended(events)) => Body::from_stream(lines(events).chain(end)).into_response(),
        Some(Answer::Raw(raw)) => Body::from_stream(text(raw).chain(end)).into_response(),
        None => Body::from_stream(lines(vec![]).chain(futures::stream::pending())).into_response(),
    }
}

struct Bench {
    script: Script,
    facts: Receiver<ClusterFact>,
    item: Item,
    readiness: Readiness,
    unreadable: Arc<AtomicU64>,
}

async fn watch(answers: Vec<Answer>) -> Bench {
    let script = Script::default();
    script.answers.lock().expect("no panic").extend(answers);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = Router::new().fallback(answer).with_state(script.clone());
    tokio::spawn(async move { axum::serve(listener, server).await });
    let url = format!("http://{address}").parse().expect("a URL");
    let mut config = kube::Config::new(url);
    config.default_retry = false;
    let client = kube::Client::try_from(config).expect("a client");
    let server = Server { client, address: "http://api.example".into() };
    let (sender, facts) = mpsc::channel(4);
    let readiness = Readiness::default();
    let item = readiness.expect(Pod::NAME, "not synced yet");
    let selector = Some("spec.nodeName=node-1".to_owned());
    let unreadable = Arc::<AtomicU64>::default();
    let watch = Watch::<Pod>::new(&server, selector, sender, item.clone(), unreadable.clone());
    tokio::spawn(watch.run());
    Bench { script, facts, item, readiness, unreadable }
}

impl Bench {
    /// The next fact in words, with a deadline so that a missing one fails rather than hangs.
    async fn next(&mut self) -> String {
        let fact =
            timeout(Duration::from_secs(10), self.facts.recv()).await.expect("a fact in time");
        match fact.expect("the watch runs") {
            ClusterFact::Pod(pod) => format!("pod {}", pod.uid),
            ClusterFact::PodRemoved { uid, .. } => format!("removed {uid}"),
            ClusterFact::Slice(slice) => format!("slice {}", slice.slice),
            ClusterFact::Blind(Blindness { from, until, source }) => {
                assert!(from < until, "a span has a length");
                format!("blind {source}")
            }
        }
    }

    /// The next fact, which is a span of blindness.
    async fn next_blind(&mut self) -> Blindness {
        let fact = timeout(Duration::from_secs(10), self.facts.recv()).await.expect("in time");
        let Some(ClusterFact::Blind(blindness)) = fact else { panic!("{fact:?}") };
        blindness
    }

    fn asked(&self) -> Vec<String> {
        self.script.asked.lock().expect("no panic").clone()
    }

    async fn ready(&self) {
        for _ in 0..500 {
            if self.readiness.missing().is_empty() {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("not ready: {:?}", self.readiness.missing());
    }
}

fn pod(uid: &str, version: &str) -> Value {
    json!({"metadata": {"name": uid, "namespace": "d", "uid": uid, "resourceVersion": version}})
}

fn list(version: &str, next: &str, items: &[Value]) -> Answer {
    let body = json!({
        "kind": "PodList", "apiVersion": "v1",
        "metadata": {"resourceVersion": version, "continue": next}, "items": items
    });
    Answer::Whole(200, body)
}

fn event(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

fn bookmark(version: &str) -> Value {
    event(
        "BOOKMARK",
        &json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": version}}),
    )
}

fn expired() -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version: 9 (12)", "reason": "Expired", "code": 410
    })
}

#[tokio::test]
async fn lists_all_pages_of_this_node_then_watches_from_there() {
    let mut bench = watch(vec![
        list("5", "more", &[pod("a", "1")]),
        list("6", "", &[pod("b", "2")]),
        Answer::Open(vec![event("ADDED", &pod("c", "7")), event("DELETED", &pod("a", "8"))]),
    ])
    .await;
    for expected in ["pod a", "pod b", "pod c", "pod a", "removed a"] {
        assert_eq!(bench.next().await, expected);
    }
    let asked = bench.asked();
    assert!(asked.iter().all(|query| query.contains("fieldSelector=spec.nodeName%3Dnode-1")));
    assert!(!asked[0].contains("resourceVersion"), "a list must not be older than a watch");
    assert!(asked[1].contains("continue=more"), "{asked:?}");
    assert!(asked[2].contains("resourceVersion=6"), "{asked:?}");
    assert_eq!(bench.item.failures(), 0);
}

#[tokio::test]
async fn an_expired_version_is_listed_again_and_what_is_missing_was_removed() {
    let mut bench = watch(vec![
        list("5", "", &[pod("a", "1"), pod("b", "2")]),
        Answer::Open(vec![event("ERROR", &expired())]),
        list("20", "", &[pod("b", "2"), pod("c", "19")]),
        Answer::Open(vec![]),
    ])
    .await;
    for expected in
        ["pod a", "pod b", "blind pod watch", "pod b", "pod c", "removed a", "blind pod watch"]
    {
        assert_eq!(bench.next().await, expected);
    }
    bench.ready().await;
    assert_eq!(bench.item.failures(), 1);
}

#[tokio::test]
async fn an_expired_version_at_the_opening_of_a_watch_is_listed_again_too() {
    let mut bench = watch(vec![
        list("5", "", &[pod("a", "1")]),
        Answer::Whole(410, expired()),
        list("20", "", &[]),
    ])
    .await;
    for expected in ["pod a", "blind pod watch", "removed a", "blind pod watch"] {
        assert_eq!(bench.next().await, expected);
    }
}

#[tokio::test]
async fn a_version_that_the_server_forgot_is_listed_again_at_once_unless_it_was_just_listed() {
    let paused = async |answers| {
        let mut bench = watch(answers).await;
        while bench.next().await != "blind pod watch" {}
        let failed = clock::now();
        while bench.next().await != "pod z" {}
        clock::now().seconds_since(failed) >= 0.8
    };
    let listed_again = || list("20", "", &[pod("z", "19")]);
    let known_from_an_event = vec![
        list("5", "", &[]),
        Answer::Ended(vec![bookmark("9")]),
        Answer::Whole(410, expired()),
        listed_again(),
    ];
    assert!(!paused(known_from_an_event).await);
    let known_from_the_list =
        vec![list("5", "", &[]), Answer::Whole(410, expired()), listed_again()];
    assert!(paused(known_from_the_list).await);
}

#[tokio::test]
async fn a_watch_that_the_server_ends_resumes_from_its_bookmark_without_blindness() {
    let mut bench = watch(vec![
        list("5", "", &[pod("a", "1")]),
        Answer::Ended(vec![bookmark("42")]),
        Answer::Open(vec![event("MODIFIED", &pod("a", "43"))]),
    ])
    .await;
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.next().await, "pod a");
    assert!(bench.asked()[2].contains("resourceVersion=42"), "{:?}", bench.asked());
    assert_eq!(bench.item.failures(), 0);
}

#[tokio::test]
async fn a_server_error_is_shown_then_the_watch_resumes_where_it_was() {
    let mut bench = watch(vec![
        list("5", "", &[pod("a", "1")]),
        Answer::Whole(500, json!({"kind": "Status", "message": "etcd is away", "code": 500})),
        Answer::Open(vec![event("MODIFIED", &pod("a", "9"))]),
    ])
    .await;
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.next().await, "blind pod watch");
    let missing = bench.readiness.missing();
    assert_eq!(
        missing[0].to_string(),
        "pod watch: cannot watch: etcd is away (HTTP 500); the API server is http://api.example"
    );
    assert_eq!(bench.next().await, "blind pod watch");
    assert_eq!(bench.next().await, "pod a");
    bench.ready().await;
    assert!(bench.asked()[2].contains("resourceVersion=5"), "{:?}", bench.asked());
}

#[tokio::test]
async fn an_object_of_an_unknown_form_is_counted_and_the_others_go_on() {
    let odd = |version: &str| {
        let metadata = json!({"namespace": "default", "name": "odd", "resourceVersion": version});
        json!({"metadata": metadata, "spec": "of a future version"})
    };
    let mut bench = watch(vec![
        list("5", "", &[odd("2"), pod("a", "1")]),
        Answer::Ended(vec![event("MODIFIED", &odd("7"))]),
        Answer::Open(vec![event("MODIFIED", &pod("a", "9"))]),
    ])
    .await;
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.unreadable.load(Ordering::Relaxed), 2);
    assert!(bench.asked()[2].contains("resourceVersion=7"), "{:?}", bench.asked());
    assert_eq!(bench.item.failures(), 0);
}

#[tokio::test]
async fn a_refused_first_list_names_the_permission_and_reports_no_blindness() {
    let forbidden = json!({"kind": "Status", "message": "pods is forbidden", "code": 403});
    let mut bench =
        watch(vec![Answer::Whole(403, forbidden), list("5", "", &[pod("a", "1")])]).await;
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.item.failures(), 1);
    assert_eq!(bench.asked().len(), 2);
}

#[tokio::test]
async fn a_full_channel_makes_the_watch_wait_and_drops_nothing() {
    let pods: Vec<Value> = (0..50).map(|n| pod(&n.to_string(), "1")).collect();
    let mut bench = watch(vec![list("5", "", &pods)]).await;
    sleep(Duration::from_millis(100)).await;
    for n in 0..50 {
        assert_eq!(bench.next().await, format!("pod {n}"));
    }
}

#[test]
fn a_refusal_says_whether_credentials_or_permission_is_missing() {
    let refused = |code: u16| {
        let status = json!({"status": "Failure", "message": "no", "reason": "", "code": code});
        let status = serde_json::from_value(status).expect("a Status");
        explain("cannot list", kube::Error::Api(status)).to_string()
    };
    assert!(refused(401).contains("check the credentials"), "{}", refused(401));
    assert!(refused(403).contains("check the ClusterRole"), "{}", refused(403));
}

#[test]
fn a_cause_that_is_already_told_is_not_told_twice() {
    let io = || std::io::Error::other("connection refused");
    let told = kube::Error::ReadEvents(io());
    assert_eq!(words(&told), "Error reading events stream: connection refused");
    let untold = anyhow::Error::new(io()).context("cannot connect");
    assert_eq!(words(untold.as_ref()), "cannot connect: connection refused");
}

#[tokio::test]
async fn an_event_may_name_its_type_last_and_an_event_that_is_cut_off_comes_again() {
    let last = |kind: &str, object: &Value| format!("{{\"object\":{object},\"type\":\"{kind}\"}}");
    let cut = "{\"type\":\"ADDED\",\"object\":{\"meta".to_owned();
    let mut bench = watch(vec![
        list("5", "", &[]),
        Answer::Raw(format!("{}\n{cut}", last("ADDED", &pod("a", "6")))),
        Answer::Open(vec![event("ADDED", &pod("b", "7"))]),
    ])
    .await;
    assert_eq!(bench.next().await, "pod a");
    assert_eq!(bench.next().await, "pod b");
    assert!(bench.asked()[2].contains("resourceVersion=6"), "{:?}", bench.asked());
    assert_eq!(bench.item.failures(), 0);
}

#[tokio::test]
async fn an_api_server_that_is_away_is_asked_again_at_longer_and_longer_intervals() {
    let away = || Answer::Whole(503, json!({"kind": "Status", "message": "away", "code": 503}));
    let mut bench = watch(vec![list("5", "", &[pod("a", "1")]), away(), away(), away()]).await;
    assert_eq!(bench.next().await, "pod a");
    let mut blind = vec![bench.next_blind().await];
    while bench.asked().len() < 5 {
        blind.push(bench.next_blind().await);
    }
    // 0.8 s, doubled each time, each with up to as much again.
    let away = blind[blind.len() - 1].until.seconds_since(blind[0].from);
    assert!((5.6..13.0).contains(&away), "{away} s");
    let told = blind.windows(2).all(|pair| pair[0].until == pair[1].from);
    assert!(told, "no gap: {blind:?}");
    let longest =
        blind[1..].iter().map(|span| span.until.seconds_since(span.from)).fold(0.0, f64::max);
    assert!(longest < 3.0, "no timeline closes before it is told: {longest} s");
    bench.ready().await;
    assert_eq!(bench.item.failures(), 3);
    assert_eq!(bench.asked().len(), 5, "one list, four openings of a watch");
}

//! The agent's HTTP API: metrics, health, and the timelines as JSON (docs/api.md).
//!
//! A shell: it reads what other parts keep and changes nothing.

pub mod terminations;

use std::io::ErrorKind;
use std::iter::once;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::clock::{self, WallOffset};
use crate::correlate::Timeline;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

use terminations::{API_VERSION, ClockState, Termination, Terminations};

/// The content type of Prometheus' text format (`prometheus::TEXT_FORMAT`, spelled out).
const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How long the correlator may take to answer. It takes facts and questions as they come, so only a
/// long queue or a starved node delays it; Prometheus gives up after 10 s by default.
const ANSWER: Duration = Duration::from_secs(5);

/// Every timeline that is kept, and whether it is closed.
pub type Timelines = Vec<(Timeline, bool)>;

/// A question to the owner of the correlator: all timelines, please.
pub type Question = oneshot::Sender<Timelines>;

/// What the API reads.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The node's name.
    pub node: Arc<str>,
    /// What must work.
    pub readiness: Readiness,
    /// What is exported.
    pub metrics: Metrics,
    /// Where to ask for timelines.
    pub questions: mpsc::Sender<Question>,
}

/// Takes the port, so that a conflict shows before anything else is set up.
///
/// # Errors
/// When the address is taken or may not be used.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => "stop what listens there, or choose another --listen",
            ErrorKind::AddrNotAvailable => "no address of this host: choose another --listen",
            _ => "choose another --listen",
        };
        anyhow!(error).context(format!("cannot listen on {address}: {advice}"))
    })
}

/// Serves until the process ends.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, sources: Sources) -> anyhow::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/v1/terminations", get(terminations))
        .fallback(not_found)
        .with_state(sources);
    axum::serve(listener, routes).await.context("the HTTP server failed")
}

async fn metrics(State(sources): State<Sources>) -> Response {
    match sources.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

async fn readyz(State(sources): State<Sources>) -> Response {
    let missing = sources.readiness.missing();
    if missing.is_empty() {
        return lines(once("ok".to_owned()).chain(remarks(&sources))).into_response();
    }
    let missing = lines(missing.iter().map(ToString::to_string));
    (StatusCode::SERVICE_UNAVAILABLE, missing).into_response()
}

fn remarks(sources: &Sources) -> impl Iterator<Item = String> {
    sources.readiness.remarks().into_iter().map(|remark| remark.to_string())
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.map(|line| line + "\n").collect()
}

async fn terminations(State(sources): State<Sources>) -> Response {
    let (question, answer) = oneshot::channel();
    let asked = async {
        sources.questions.send(question).await.ok()?;
        answer.await.ok()
    };
    let Ok(Some(mut timelines)) = timeout(ANSWER, asked).await else {
        let words =
            format!("the correlator did not answer within {ANSWER:?}: see the agent's log\n");
        return (StatusCode::SERVICE_UNAVAILABLE, words).into_response();
    };
    timelines.sort_by_key(|(timeline, _)| timeline.deletion_requested.map(|instant| instant.at));
    let offset = WallOffset::measure();
    let terminations = timelines
        .iter()
        .map(|(timeline, closed)| Termination::new(timeline, *closed, offset))
        .collect();
    axum::Json(Terminations {
        api_version: API_VERSION.to_owned(),
        node: sources.node.to_string(),
        clock: ClockState { max_error_seconds: clock::max_error_seconds() },
        terminations,
    })
    .into_response()
}

async fn not_found() -> (StatusCode, &'static str) {
    (
        StatusCode::NOT_FOUND,
        "nothing here: there are /metrics, /livez, /readyz and /v1/terminations\n",
    )
}

#[cfg(test)]
mod tests;

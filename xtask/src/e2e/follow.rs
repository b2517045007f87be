//! Follows a collection of the API: a list, then its changes, for as long as it is wanted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::api::{self, Api};
use crate::lab::clock;

/// Before a refused watch is begun anew: short for a test, long for an API server that starts.
const PAUSE: Duration = Duration::from_millis(100);
/// "That version is too old": list again.
const GONE: u16 = 410;

/// What is new.
#[derive(Clone, Debug)]
pub(super) enum News {
    /// All that there is.
    Listed(Vec<Value>),
    /// An object was added or changed.
    Changed(Value),
    /// An object is gone; this was its last state.
    Deleted(Value),
}

/// Calls `tell` with each piece of news and the moment of its receipt (ns of `CLOCK_BOOTTIME`),
/// until `stop` is set and one more piece comes, or the API server is gone after that.
pub(super) fn follow(
    api: &Api,
    path: &str,
    stop: &AtomicBool,
    mut tell: impl FnMut(u64, News),
    mut complain: impl FnMut(&anyhow::Error),
) {
    let mut version = None;
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = step(api, path, stop, &mut version, &mut tell)
            && !stop.load(Ordering::Relaxed)
        {
            if api::status(&error) == Some(GONE) {
                version = None;
            } else {
                complain(&error.context(format!("cannot follow {path}")));
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// One list, if one is due, and one watch to its end. `version` is where the next one begins.
fn step(
    api: &Api,
    path: &str,
    stop: &AtomicBool,
    version: &mut Option<String>,
    tell: &mut impl FnMut(u64, News),
) -> Result<()> {
    let from = if let Some(from) = version.take() {
        from
    } else {
        let mut list = api.get(path)?;
        let Value::Array(items) = list["items"].take() else { bail!("{path} is no list") };
        tell(clock::boot_ns(), News::Listed(items));
        version_of(&list)?
    };
    let current = version.insert(from);
    for event in api.watch(path, current)? {
        let at_ns = clock::boot_ns();
        // It broke off, and goes on where it was.
        let Ok(mut event) = event else { return Ok(()) };
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let object = event["object"].take();
        if event["type"] == "ERROR" {
            *version = None;
            return Ok(());
        }
        *current = version_of(&object)?;
        match event["type"].as_str() {
            Some("ADDED" | "MODIFIED") => tell(at_ns, News::Changed(object)),
            Some("DELETED") => tell(at_ns, News::Deleted(object)),
            Some("BOOKMARK") => {}
            other => bail!("an event of type {other:?}"),
        }
    }
    Ok(())
}

fn version_of(object: &Value) -> Result<String> {
    let version = object["metadata"]["resourceVersion"].as_str();
    Ok(version.context("no resourceVersion")?.to_owned())
}

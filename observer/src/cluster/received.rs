//! The API server's answers: pages of a list and lines of a watch.
//!
//! Pure. Each object is parsed straight into its trimmed type; one that is not as expected is told
//! apart by its metadata and stops nothing.

use anyhow::{Context as _, bail};
use kube::core::response::Status;
use kube::core::watch::Bookmark;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::clock::WallOffset;
use crate::facts::{BootNs, ClusterFact};

use super::watch::Watched;

/// An object as it came. Any object has metadata; the rest may be of a form that this daemon does
/// not know.
#[derive(Debug)]
pub(super) enum Received<K> {
    /// As expected.
    Readable(K),
    /// Anything else.
    Unreadable(AnyMetadata),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnyObject {
    metadata: AnyMetadata,
}

/// What every object says of itself.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct AnyMetadata {
    /// `metadata.namespace`
    pub(super) namespace: Option<String>,
    /// `metadata.name`
    pub(super) name: String,
    resource_version: String,
}

impl<'de, K: Watched> Deserialize<'de> for Received<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(<&RawValue>::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<K: Watched> Received<K> {
    /// The text is read a second time only when the object is not as expected: to buffer every
    /// object for that case (`untagged`) takes several times the time and memory.
    fn read(object: &RawValue) -> serde_json::Result<Self> {
        match serde_json::from_str(object.get()) {
            Ok(object) => Ok(Self::Readable(object)),
            Err(_unexpected) => {
                let AnyObject { metadata } = serde_json::from_str(object.get())?;
                Ok(Self::Unreadable(metadata))
            }
        }
    }

    /// `metadata.resourceVersion`
    pub(super) fn resource_version(&self) -> &str {
        match self {
            Self::Readable(object) => object.resource_version(),
            Self::Unreadable(metadata) => &metadata.resource_version,
        }
    }
}

/// A page of a list.
#[derive(Deserialize)]
#[serde(bound = "K: Watched")]
pub(super) struct Page<K> {
    /// Where to go on.
    pub(super) metadata: PageMetadata,
    /// The objects.
    pub(super) items: Option<Vec<Received<K>>>,
}

/// `metadata` of a list.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    /// The version of the whole list.
    pub(super) resource_version: Option<String>,
    /// What to ask for the next page with.
    #[serde(rename = "continue")]
    pub(super) next: Option<String>,
}

/// One line of a watch.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    change: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// What a line of a watch says.
pub(super) enum Event<K> {
    /// Added or changed.
    Present(Received<K>),
    /// Gone; this was its last state.
    Deleted(Received<K>),
    /// Nothing up to this version is missing.
    Bookmark(String),
    /// The watch ends with it.
    Error(Box<Status>),
}

impl<K: Watched> Event<K> {
    /// Reads a line.
    ///
    /// # Errors
    /// When it is neither an event nor a failure.
    pub(super) fn read(line: &[u8]) -> anyhow::Result<Self> {
        let Ok(Line { change, object }) = serde_json::from_slice(line) else {
            // A failure may come as it is.
            let status = serde_json::from_slice(line).context("a line is no event")?;
            return Ok(Self::Error(Box::new(status)));
        };
        match change {
            "ADDED" | "MODIFIED" => Ok(Self::Present(Received::read(object)?)),
            "DELETED" => Ok(Self::Deleted(Received::read(object)?)),
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(object.get())?;
                Ok(Self::Bookmark(bookmark.metadata.resource_version))
            }
            "ERROR" => Ok(Self::Error(Box::new(serde_json::from_str(object.get())?))),
            other => bail!("an event of the unknown type {other}"),
        }
    }
}

/// What the readable objects say of a page of a list, or of an event of a watch, without a server;
/// nothing when it is neither.
pub(super) fn replay<K: Watched>(body: &[u8], at: BootNs, offset: WallOffset) -> Vec<ClusterFact> {
    let mut received = Vec::new();
    if let Ok(page) = serde_json::from_slice::<Page<K>>(body) {
        received = page.items.unwrap_or_default();
    } else if let Ok(Event::Present(object) | Event::Deleted(object)) = Event::read(body) {
        received.push(object);
    }
    let mut facts = Vec::new();
    for object in received {
        if let Received::Readable(object) = object {
            let key = object.key();
            facts.push(object.observed(at, offset));
            facts.push(K::removed(key, at));
        }
    }
    facts
}

//! Cilium in place of kube-proxy: the maps that its programs balance connections by.
//!
//! Read whole, read-only, where cilium-agent pins them. The pins are opened for each reading, so
//! maps that the agent made anew after an upgrade are followed. Refuses maps whose sizes are not
//! those of a known release. A reading while the agent writes may mix two states: the caller, who
//! is told of writes, repeats it.
//!
//! - [`entries`]: the bytes. [`selection`]: what they send connections to.
//! - `pins`: the system calls.

pub mod entries;
mod pins;
pub mod selection;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use self::entries::{BackendsVersion, Endpoint, Sizes, Slot};
use self::pins::Pinned;
use super::reach::Reached;
use super::rules::Family;

/// Where cilium-agent pins its maps, unless told otherwise (`--bpf-root`).
pub const MAPS: &str = "/sys/fs/bpf/tc/globals";

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// The newer first: while an upgrade migrates backends both exist.
const VERSIONS: [(BackendsVersion, &str); 2] =
    [(BackendsVersion::V3, "v3"), (BackendsVersion::V2, "v2")];

/// Reads the maps below one directory.
#[derive(Clone, Debug)]
pub struct Reader {
    maps: PathBuf,
    /// Whether it is an error that there are none.
    required: bool,
}

impl Reader {
    /// Of the maps pinned in `maps`.
    #[must_use]
    pub fn new(maps: PathBuf, required: bool) -> Self {
        Self { maps, required }
    }

    /// What the maps send new connections to now; nothing when there are none. Blocks while the
    /// kernel copies.
    ///
    /// # Errors
    /// When a map cannot be opened or its layout is not known.
    pub fn read(&self) -> anyhow::Result<Reached> {
        let mut reached = Reached::default();
        let mut found = false;
        for family in FAMILIES {
            let Some(services) = open(&self.maps, &services_name(family))? else { continue };
            found = true;
            let of_family = read_family(&self.maps, family, &services)?;
            reached.backends.extend(of_family.backends);
            reached.draining.extend(of_family.draining);
            reached.unresolved += of_family.unresolved;
        }
        if self.required && !found {
            bail!(
                "no maps of Cilium in {}: is Cilium running on this node, and is the node's \
                 /sys/fs/bpf mounted here?",
                self.maps.display()
            );
        }
        Ok(reached)
    }
}

/// The ids of the maps in `maps` that [`Reader`] reads; those that cannot be opened are left out.
#[must_use]
pub fn map_ids(maps: &Path) -> BTreeSet<u32> {
    let names = FAMILIES.into_iter().flat_map(|family| {
        let backends = VERSIONS.map(|(_, version)| backends_name(family, version));
        backends.into_iter().chain([services_name(family)])
    });
    names.filter_map(|name| open(maps, &name).ok().flatten()).map(|map| map.id).collect()
}

fn read_family(maps: &Path, family: Family, services: &Pinned) -> anyhow::Result<Reached> {
    let name = services_name(family);
    check(&name, services, entries::service_sizes(family))?;
    let Some((version, name_of_backends, backends)) = open_backends(maps, family)? else {
        bail!(
            "{name} is in {} but neither version 2 nor 3 of the backends: Cilium 1.11 or newer is \
             needed",
            maps.display()
        );
    };
    check(&name_of_backends, &backends, entries::backend_sizes(family, version))?;
    let mut slots: Vec<Slot> = Vec::new();
    services
        .read(|key, value| slots.extend(entries::slot(family, key, value)))
        .with_context(|| format!("cannot read {name}"))?;
    let mut endpoints: Vec<Endpoint> = Vec::new();
    backends
        .read(|key, value| endpoints.extend(entries::endpoint(family, version, key, value)))
        .with_context(|| format!("cannot read {name_of_backends}"))?;
    Ok(selection::reached(&slots, &endpoints))
}

fn open_backends(
    maps: &Path,
    family: Family,
) -> anyhow::Result<Option<(BackendsVersion, String, Pinned)>> {
    for (version, suffix) in VERSIONS {
        let name = backends_name(family, suffix);
        if let Some(map) = open(maps, &name)? {
            return Ok(Some((version, name, map)));
        }
    }
    Ok(None)
}

/// `None` when nothing is pinned under this name.
fn open(maps: &Path, name: &str) -> anyhow::Result<Option<Pinned>> {
    let path = maps.join(name);
    // Asked first, for older kernels let nobody without CAP_BPF know that there is none.
    let map = match path.try_exists() {
        Ok(true) => pins::open(&path),
        Ok(false) => return Ok(None),
        Err(error) => Err(error),
    };
    match map {
        Ok(map) => Ok(Some(map)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!(
                "cannot open the map pinned at {} (needs CAP_BPF, and the node's bpf file system)",
                path.display()
            )
        }),
    }
}

fn check(name: &str, map: &Pinned, known: Sizes) -> anyhow::Result<()> {
    let Sizes { key, value } = map.sizes;
    if map.sizes != known {
        bail!(
            "{name} has keys of {key} bytes and values of {value}, but {} and {} are known: its \
             backends stay unknown with this release of Cilium",
            known.key,
            known.value
        );
    }
    Ok(())
}

fn services_name(family: Family) -> String {
    format!("cilium_{}_services_v2", prefix(family))
}

fn backends_name(family: Family, version: &str) -> String {
    format!("cilium_{}_backends_{version}", prefix(family))
}

fn prefix(family: Family) -> &'static str {
    match family {
        Family::V4 => "lb4",
        Family::V6 => "lb6",
    }
}

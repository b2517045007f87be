//! Which pod a cgroup belongs to.
//!
//! The kernel programs report the inode number of a cgroup's directory, which is never reused, and
//! each directory as it is made, before anything can be in it. What was there before is found by a
//! walk of the tree at the start; so is what the programs could not report.

mod hierarchy;
mod names;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::hierarchy::{Controller, Hierarchy};
pub(crate) use self::names::pod_of_directory;
use super::decode::NewCgroup;
use crate::facts::{BootNs, PodUid};

/// A walk of the tree costs some milliseconds on a full node; ids that are not in it must not cause
/// more than this many.
const SCAN_INTERVAL: Duration = Duration::from_millis(50);
/// Remembered cgroups, far above what lives on one node; past it only living ones are kept.
const MAX_KNOWN: usize = 65_536;

/// Where in a pod a cgroup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pod.
    pub pod: PodUid,
    /// The cgroup of its container, which is this one or above it; `None` for the pod's own.
    pub container: Option<u64>,
}

/// What is known of a cgroup.
#[derive(Clone, Debug)]
enum Known {
    /// It is not below the root, or was gone before it was looked for.
    Elsewhere,
    /// It is below the root; in which pod, if in any.
    Below(Option<Place>),
}

/// Cgroups seen so far. Directories that are gone stay known: a process's last events may come
/// after its directory was removed.
pub struct Cgroups {
    root: PathBuf,
    known: HashMap<u64, Known>,
    next_scan: BootNs,
}

impl Cgroups {
    /// Knows what is below `root` now.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        let mut cgroups = Self { root, known: HashMap::new(), next_scan: BootNs(0) };
        cgroups.scan();
        cgroups
    }

    /// Where a cgroup is; `None` when it is in no pod, or was never seen. Walks the tree when the
    /// id is new.
    pub fn place(&mut self, id: u64, now: BootNs) -> Option<Place> {
        if id == 0 {
            return None;
        }
        if !self.known.contains_key(&id) && now >= self.next_scan {
            self.look_for(id, now);
        }
        match self.known.get(&id)? {
            Known::Below(place) => place.clone(),
            Known::Elsewhere => None,
        }
    }

    /// Takes a cgroup that was just made. One whose parent was missed stays unknown.
    pub fn made(&mut self, made: &NewCgroup<'_>) {
        if self.known.len() > MAX_KNOWN {
            self.scan();
        }
        let known = match self.known.get(&made.parent) {
            None => return,
            Some(Known::Elsewhere) => Known::Elsewhere,
            Some(Known::Below(parent)) => {
                Known::Below(names::place(parent.as_ref(), made.name, made.id))
            }
        };
        self.known.insert(made.id, known);
    }

    /// Whether any pod's cgroup was seen.
    #[must_use]
    pub fn knows_a_pod(&self) -> bool {
        self.known.values().any(|known| matches!(known, Known::Below(Some(_))))
    }

    fn look_for(&mut self, id: u64, now: BootNs) {
        self.scan();
        if let Entry::Vacant(missed) = self.known.entry(id) {
            missed.insert(Known::Elsewhere);
            self.next_scan = now.plus(SCAN_INTERVAL);
        }
    }

    fn scan(&mut self) {
        if self.known.len() > MAX_KNOWN {
            self.known.clear();
        }
        if let Ok(root) = fs::metadata(&self.root) {
            self.known.insert(root.ino(), Known::Below(None));
        }
        let root = self.root.clone();
        self.scan_below(&root, None);
    }

    /// Directories vanish while they are walked: what cannot be read is passed over.
    fn scan_below(&mut self, directory: &Path, parent: Option<&Place>) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name();
            let place = names::place(parent, &name.to_string_lossy(), entry.ino());
            self.known.insert(entry.ino(), Known::Below(place.clone()));
            self.scan_below(&entry.path(), place.as_ref());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tempfile::TempDir;

    use super::*;

    const UID: &str = "0f6c3b1e-8a86-4c34-9d0b-4f3b1c2d9e77";

    fn pod() -> PodUid {
        PodUid(Arc::from(UID))
    }

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).expect("metadata").ino()
    }

    fn cgroups() -> (TempDir, Cgroups) {
        let root = tempfile::tempdir().expect("temporary directory");
        let cgroups = Cgroups::new(root.path().to_path_buf());
        (root, cgroups)
    }

    #[test]
    fn containers_belong_to_the_pod_above_and_stay_known_when_gone() {
        let (root, mut cgroups) = cgroups();
        let container = root.path().join(format!("kubepods/pod{UID}/c1"));
        let nested = container.join("init.scope");
        fs::create_dir_all(&nested).expect("directories");
        let (id, below, outside) = (inode(&container), inode(&nested), inode(root.path()));
        let place = Some(Place { pod: pod(), container: Some(id) });
        assert_eq!(cgroups.place(id, BootNs(0)), place);
        assert_eq!(cgroups.place(below, BootNs(0)), place);
        assert_eq!(cgroups.place(outside, BootNs(0)), None);
        fs::remove_dir_all(&container).expect("remove");
        assert_eq!(cgroups.place(below, BootNs(1)), place);
    }

    #[test]
    fn an_id_that_is_not_found_stops_scans_for_a_while() {
        let (root, mut cgroups) = cgroups();
        assert_eq!(cgroups.place(u64::MAX, BootNs(0)), None);
        let directory = root.path().join(format!("pod{UID}"));
        fs::create_dir(&directory).expect("directory");
        let id = inode(&directory);
        assert_eq!(cgroups.place(id, BootNs(1)), None, "too soon to look again");
        let later = BootNs(0).plus(SCAN_INTERVAL);
        assert_eq!(cgroups.place(id, later), Some(Place { pod: pod(), container: None }));
    }

    #[test]
    fn ids_that_are_found_do_not_stop_scans() {
        let (root, mut cgroups) = cgroups();
        for name in ["a", "b"] {
            let directory = root.path().join(format!("pod{UID}/{name}"));
            fs::create_dir_all(&directory).expect("directories");
            let id = inode(&directory);
            let place = Place { pod: pod(), container: Some(id) };
            assert_eq!(cgroups.place(id, BootNs(0)), Some(place));
        }
    }

    #[test]
    fn what_was_made_and_removed_unseen_is_known() {
        let (root, mut cgroups) = cgroups();
        assert!(!cgroups.knows_a_pod());
        let name = format!("pod{UID}");
        cgroups.made(&NewCgroup { id: 70, parent: inode(root.path()), name: &name });
        assert!(cgroups.knows_a_pod());
        cgroups.made(&NewCgroup { id: 71, parent: 70, name: "c1" });
        let place = Place { pod: pod(), container: Some(71) };
        assert_eq!(cgroups.place(71, BootNs(0)), Some(place));
    }

    #[test]
    fn what_is_made_outside_the_root_is_no_pod_of_this_node() {
        let (_root, mut cgroups) = cgroups();
        assert_eq!(cgroups.place(90, BootNs(0)), None);
        let name = format!("pod{UID}");
        cgroups.made(&NewCgroup { id: 91, parent: 90, name: &name });
        cgroups.made(&NewCgroup { id: 92, parent: 91, name: "c1" });
        assert_eq!(cgroups.place(92, BootNs(0)), None);
        assert!(!cgroups.knows_a_pod());
    }

    #[test]
    fn what_is_made_below_a_missed_directory_is_looked_for() {
        let (root, mut cgroups) = cgroups();
        let container = root.path().join(format!("pod{UID}/c1"));
        fs::create_dir_all(&container).expect("directories");
        let id = inode(&container);
        let parent = inode(&root.path().join(format!("pod{UID}")));
        cgroups.made(&NewCgroup { id, parent, name: "c1" });
        let place = Place { pod: pod(), container: Some(id) };
        assert_eq!(cgroups.place(id, BootNs(0)), Some(place));
    }
}

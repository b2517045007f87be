//! Which pod a cgroup belongs to.
//!
//! The kernel programs report a cgroup v2 id, which is the inode number of its directory and is
//! never reused. The kubelet names a pod's directory after its UID: `pod<uid>` (cgroupfs driver)
//! or `kubepods-<class>-pod<uid with underscores>.slice` (systemd driver), with one directory per
//! container below.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::facts::{BootNs, PodUid};

/// A walk of the tree costs some milliseconds on a full node; unknown ids (processes of no pod in
/// short-lived cgroups) must not cause more than this many.
const SCAN_INTERVAL: Duration = Duration::from_millis(50);
/// Remembered cgroups, far above what lives on one node; past it only living ones are kept.
const MAX_KNOWN: usize = 65_536;

/// Cgroup ids seen so far. Directories that are gone stay known: a process's last events may come
/// after its directory was removed.
pub struct Cgroups {
    root: PathBuf,
    known: HashMap<u64, Option<PodUid>>,
    next_scan: BootNs,
}

impl Cgroups {
    /// Looks below `root`, the mount point of the cgroup v2 hierarchy.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root, known: HashMap::new(), next_scan: BootNs(0) }
    }

    /// The pod of a cgroup; `None` when it is in none, or was never seen. Walks the tree when the
    /// id is new.
    pub fn pod(&mut self, id: u64, now: BootNs) -> Option<PodUid> {
        if id == 0 {
            return None;
        }
        if let Some(pod) = self.known.get(&id) {
            return pod.clone();
        }
        if now < self.next_scan {
            return None;
        }
        self.next_scan = now.plus(SCAN_INTERVAL);
        self.scan();
        self.known.entry(id).or_insert(None).clone()
    }

    fn scan(&mut self) {
        if self.known.len() > MAX_KNOWN {
            self.known.clear();
        }
        if let Ok(root) = fs::metadata(&self.root) {
            self.known.insert(root.ino(), None);
        }
        let root = self.root.clone();
        self.scan_below(&root, None);
    }

    /// Directories vanish while they are walked: what cannot be read is passed over.
    fn scan_below(&mut self, directory: &Path, pod: Option<&PodUid>) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let own = entry.file_name().to_str().and_then(pod_of_directory);
            let pod = own.as_ref().or(pod);
            self.known.insert(entry.ino(), pod.cloned());
            self.scan_below(&entry.path(), pod);
        }
    }
}

/// The pod UID in a directory's name, if the kubelet made it for a pod.
pub(crate) fn pod_of_directory(name: &str) -> Option<PodUid> {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = match name.rsplit_once("-pod") {
        Some((prefix, uid)) if prefix.starts_with("kubepods") => uid,
        _ => name.strip_prefix("pod")?,
    };
    let hex = uid.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'-' | b'_'));
    // A UUID, or the 32 digits of a static pod's configuration hash.
    (hex && uid.len() >= 32).then(|| PodUid(Arc::from(uid.replace('_', "-"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f6c3b1e-8a86-4c34-9d0b-4f3b1c2d9e77";

    #[test]
    fn names_of_both_cgroup_drivers_give_the_uid() {
        let underscored = UID.replace('-', "_");
        for name in [
            format!("pod{UID}"),
            format!("kubepods-burstable-pod{underscored}.slice"),
            format!("kubepods-besteffort-pod{underscored}.slice"),
            format!("kubepods-pod{underscored}.slice"),
        ] {
            assert_eq!(pod_of_directory(&name), Some(PodUid(Arc::from(UID))), "{name}");
        }
    }

    #[test]
    fn other_names_are_no_pods() {
        for name in [
            "kubepods.slice",
            "kubepods-burstable.slice",
            "podman-1234.scope",
            "podinfo",
            "cri-containerd-0123456789abcdef0123456789abcdef.scope",
            "system-pod0f6c3b1e_8a86_4c34_9d0b_4f3b1c2d9e77.slice",
        ] {
            assert_eq!(pod_of_directory(name), None, "{name}");
        }
    }

    #[test]
    fn containers_belong_to_the_pod_above_and_stay_known_when_gone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let pod = root.path().join(format!("kubepods/pod{UID}"));
        let container = pod.join("c1");
        fs::create_dir_all(&container).expect("directories");
        let id = fs::metadata(&container).expect("metadata").ino();
        let outside = fs::metadata(root.path()).expect("metadata").ino();

        let mut cgroups = Cgroups::new(root.path().to_path_buf());
        assert_eq!(cgroups.pod(id, BootNs(0)), Some(PodUid(Arc::from(UID))));
        assert_eq!(cgroups.pod(outside, BootNs(0)), None);
        fs::remove_dir(&container).expect("remove");
        assert_eq!(cgroups.pod(id, BootNs(1)), Some(PodUid(Arc::from(UID))));
    }

    #[test]
    fn an_unknown_id_scans_at_most_once_per_interval() {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut cgroups = Cgroups::new(root.path().to_path_buf());
        assert_eq!(cgroups.pod(u64::MAX, BootNs(0)), None);
        let pod = root.path().join(format!("pod{UID}"));
        fs::create_dir(&pod).expect("directory");
        let id = fs::metadata(&pod).expect("metadata").ino();
        assert_eq!(cgroups.pod(id, BootNs(1)), None, "too soon to look again");
        let later = BootNs(0).plus(SCAN_INTERVAL);
        assert_eq!(cgroups.pod(id, later), Some(PodUid(Arc::from(UID))));
    }
}

//! What the names of cgroup directories say. Pure.
//!
//! The kubelet names a pod's directory after its UID: `pod<uid>` (cgroupfs driver) or
//! `kubepods-<class>-pod<uid with underscores>.slice` (systemd driver), below any `--cgroup-root`.
//! The runtime makes one directory per container in it, and names it as it likes.

use std::sync::Arc;

use super::Place;
use crate::facts::PodUid;

/// The processes by which CRI-O and Podman watch a container: in the pod's directory, but in the
/// node's network, and no part of the workload.
const MONITORS: [&str; 2] = ["crio-conmon-", "libpod-conmon-"];

/// The place of a directory within its parent's. Inside a pod no name is looked at any more: what
/// runs there may be a whole node of another cluster.
pub(super) fn place(parent: Option<&Place>, name: &str, id: u64) -> Option<Place> {
    match parent {
        Some(Place { container: None, .. }) if is_monitor(name) => None,
        Some(Place { container: None, pod }) => {
            Some(Place { pod: pod.clone(), container: Some(id) })
        }
        Some(inside) => Some(inside.clone()),
        None => {
            let pod = pod_of_directory(name)?;
            Some(Place { pod, container: name.contains(':').then_some(id) })
        }
    }
}

fn is_monitor(name: &str) -> bool {
    MONITORS.iter().any(|monitor| name.starts_with(monitor))
}

/// The pod UID in a directory's name, if the kubelet made it for a pod.
pub(crate) fn pod_of_directory(name: &str) -> Option<PodUid> {
    // `<slice>:<runtime>:<container>` is what a runtime that was not told of the systemd driver
    // makes of the kubelet's words, as one directory.
    let name = name.split_once(':').map_or(name, |(slice, _)| slice);
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = match name.rsplit_once("-pod") {
        Some((class, uid)) if is_class(class) => uid,
        _ => name.strip_prefix("pod")?,
    };
    let hex = uid.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'-' | b'_'));
    // A UUID, or the 32 digits of a static pod's configuration hash.
    (hex && matches!(uid.len(), 32 | 36)).then(|| PodUid(Arc::from(uid.replace('_', "-"))))
}

/// `kubepods`, with its class, below any parent slices, which a slice's name repeats.
fn is_class(slice: &str) -> bool {
    let classes = ["-burstable", "-besteffort"];
    let kubepods = classes.iter().find_map(|class| slice.strip_suffix(class)).unwrap_or(slice);
    kubepods == "kubepods" || kubepods.ends_with("-kubepods")
}

#[cfg(test)]
mod tests {
    const UID: &str = "0f6c3b1e-8a86-4c34-9d0b-4f3b1c2d9e77";
    const SLICE_UID: &str = "0f6c3b1e_8a86_4c34_9d0b_4f3b1c2d9e77";
    const HASH: &str = "5b1c8e0f7a6d4c3b2a190807f6e5d4c3";
    const ID: &str = "9a3c5e7f1b2d4c6e8f0a1b2c3d4e5f60718293a4b5c6d7e8f9a0b1c2d3e4f506";

    /// The pod of a path's last directory, and the depth of its container's. Each directory's id is
    /// its depth.
    fn placed(path: &str) -> Option<(String, Option<u64>)> {
        let mut place = None;
        for (depth, name) in (1..).zip(path.split('/')) {
            place = super::place(place.as_ref(), name, depth);
        }
        place.map(|place| (place.pod.0.to_string(), place.container))
    }

    #[test]
    fn every_layout_gives_the_pod_and_the_container() {
        let burstable = format!("kubepods-burstable-pod{SLICE_UID}.slice");
        let systemd = format!("kubepods.slice/kubepods-burstable.slice/{burstable}");
        let kind = format!(
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
             kubelet-kubepods-besteffort-pod{SLICE_UID}.slice"
        );
        let cases = [
            // systemd driver: containerd, CRI-O, CRI-O with crun, cri-dockerd
            (format!("{systemd}/cri-containerd-{ID}.scope"), 4),
            (format!("{systemd}/crio-{ID}.scope"), 4),
            (format!("{systemd}/crio-{ID}.scope/container"), 4),
            (format!("{systemd}/docker-{ID}.scope"), 4),
            // Guaranteed
            (format!("kubepods.slice/kubepods-pod{SLICE_UID}.slice/crio-{ID}.scope"), 3),
            // cgroupfs driver: containerd and cri-dockerd, CRI-O, Guaranteed
            (format!("kubepods/burstable/pod{UID}/{ID}"), 4),
            (format!("kubepods/besteffort/pod{UID}/crio-{ID}"), 4),
            (format!("kubepods/pod{UID}/{ID}"), 3),
            // kind, with either driver; a node that is a Docker container
            (format!("{kind}/cri-containerd-{ID}.scope"), 5),
            (format!("kubelet/kubepods/burstable/pod{UID}/{ID}"), 5),
            (format!("docker/{ID}/kubepods/pod{UID}/{ID}"), 5),
            // The runtime was not told of the kubelet's driver.
            (format!("{burstable}:cri-containerd:{ID}"), 1),
            (format!("system.slice/containerd.service/{burstable}:cri-containerd:{ID}"), 3),
            // systemd inside the container; a cluster inside the container
            (format!("{systemd}/cri-containerd-{ID}.scope/system.slice/a.service"), 4),
            (format!("{systemd}/crio-{ID}.scope/kubelet/kubepods/pod{HASH}/{ID}"), 4),
        ];
        for (path, container) in cases {
            assert_eq!(placed(&path), Some((UID.to_owned(), Some(container))), "{path}");
        }
    }

    #[test]
    fn a_pods_own_directory_has_no_container() {
        for path in [
            format!("kubepods/burstable/pod{UID}"),
            format!("kubepods.slice/kubepods-pod{SLICE_UID}.slice"),
        ] {
            assert_eq!(placed(&path), Some((UID.to_owned(), None)), "{path}");
        }
    }

    #[test]
    fn a_static_pod_is_told_by_its_hash() {
        for path in [
            format!("kubepods/burstable/pod{HASH}/{ID}"),
            format!("kubepods.slice/kubepods-burstable-pod{HASH}.slice/crio-{ID}.scope"),
        ] {
            assert_eq!(placed(&path).expect("a pod").0, HASH, "{path}");
        }
    }

    #[test]
    fn what_watches_a_container_is_not_in_the_pod() {
        for path in [
            format!("kubepods.slice/kubepods-pod{SLICE_UID}.slice/crio-conmon-{ID}.scope"),
            format!("kubepods/pod{UID}/crio-conmon-{ID}"),
            format!("kubepods/pod{UID}/libpod-conmon-{ID}"),
        ] {
            assert_eq!(placed(&path), None, "{path}");
        }
    }

    #[test]
    fn other_names_are_no_pods() {
        for name in [
            "",
            "pod",
            "kubepods.slice",
            "kubepods-burstable.slice",
            "podman-1234.scope",
            "podinfo",
            "system.slice/containerd.service",
            "cri-containerd-0123456789abcdef0123456789abcdef.scope",
            "system-pod0f6c3b1e_8a86_4c34_9d0b_4f3b1c2d9e77.slice",
            "notkubepods-pod0f6c3b1e_8a86_4c34_9d0b_4f3b1c2d9e77.slice",
            "machine.slice/libpod-0123456789abcdef0123456789abcdef.scope",
        ] {
            assert_eq!(placed(name), None, "{name}");
        }
    }
}

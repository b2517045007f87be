//! Containers that are over before anybody could look: for the machine's own kernel and a guest's.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use observer::facts::{Happening, KernelEvent};
use observer::kernel::cgroups::Hierarchy;
use observer::kernel::{self, Started};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// More than a rollout ends at once on one node.
const PODS: usize = 100;
/// Enough for their events and for those of whatever else runs.
const CAPACITY: usize = 16_384;
/// Far more than the events need; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A mounted hierarchy with a directory in it that holds the pods.
pub(crate) struct Mount {
    _directory: TempDir,
    mounted: PathBuf,
    /// What is given to the agent.
    root: PathBuf,
    /// Where the pods are.
    node: PathBuf,
}

impl Mount {
    /// Version 2, where the agent is given a part of the hierarchy; or version 1, where it is given
    /// a directory of controllers, here with this one.
    pub(crate) fn new(controller: Option<&str>) -> Self {
        let directory = TempDir::new().expect("a directory");
        let (kind, mounted) = match controller {
            None => ("cgroup2", directory.path().to_owned()),
            Some(name) => ("cgroup", directory.path().join(name)),
        };
        fs::create_dir_all(&mounted).expect("a directory");
        mount(Some("none"), &mounted, Some(kind), MsFlags::empty(), controller)
            .unwrap_or_else(|error| panic!("needs root: cannot mount {kind}: {error}"));
        let node = mounted.join(format!("observer-test-{}", std::process::id()));
        fs::create_dir(&node).expect("a cgroup");
        let root = controller.map_or(node.clone(), |_| directory.path().to_owned());
        Self { _directory: directory, mounted, root, node }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // What stays behind shows it.
        let _removed = fs::remove_dir(&self.node);
        let _unmounted = umount2(&self.mounted, MntFlags::MNT_DETACH);
    }
}

/// A container of a pod of its own, from before its directory is made until it is removed.
struct Container {
    uid: String,
    pid: u32,
    inode: u64,
}

impl Container {
    fn run(node: &Path, number: usize) -> Self {
        let uid = format!("0f6c3b1e-8a86-4c34-9d0b-{number:012x}");
        let pod = node.join(format!("pod{uid}"));
        let own = pod.join("c1");
        fs::create_dir_all(&own).expect("cgroups");
        let inode = fs::metadata(&own).expect("metadata").ino();
        let mut process = Command::new("sh")
            .arg("-c")
            .arg(format!("echo 0 > {}/cgroup.procs", own.display()))
            .spawn()
            .expect("sh");
        let pid = process.id();
        assert!(process.wait().expect("wait").success());
        for directory in [&own, &pod] {
            fs::remove_dir(directory).expect("an empty cgroup");
        }
        Self { uid, pid, inode }
    }
}

/// Runs containers one after the other and looks at nothing until all are over.
pub(crate) fn every_short_container_is_told(mount: &Mount) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(async {
        let hierarchy = Hierarchy::find(&mount.root).expect("cgroups");
        let Started { probes, events, .. } = kernel::start(hierarchy).expect("starts");
        let hook = probes.states().iter().find(|probe| probe.signal == "cgroup_made");
        let problem = hook.expect("a state").problem.clone();
        assert_eq!(problem, None);
        let containers: Vec<Container> =
            (0..PODS).map(|number| Container::run(&mount.node, number)).collect();
        let (sender, mut received) = mpsc::channel(CAPACITY);
        let reader = tokio::spawn(events.run(sender));
        let mut awaited: BTreeMap<u32, &Container> =
            containers.iter().map(|container| (container.pid, container)).collect();
        while !awaited.is_empty() {
            let event = tokio::time::timeout(PATIENCE, received.recv()).await;
            let event: KernelEvent = event.expect("exits of all").expect("the reader runs");
            if event.happening != Happening::Exited {
                continue;
            }
            if let Some(container) = awaited.remove(&event.pid) {
                let pod = event.pod.map(|pod| pod.0.to_string());
                let told = (pod.as_deref(), event.cgroup_id);
                assert_eq!(told, (Some(&*container.uid), container.inode));
            }
        }
        reader.abort();
    });
}

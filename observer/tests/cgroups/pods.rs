//! Containers that are over before anybody could look: for the machine's own kernel and a guest's.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use observer::facts::{Happening, KernelEvent};
use observer::kernel::cgroups::Hierarchy;
use observer::kernel::{self, Events, Probes, Started};
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

/// A container of a pod of its own.
#[derive(Clone, Debug)]
struct Container {
    uid: String,
    directory: PathBuf,
    inode: u64,
}

impl Container {
    fn make(node: &Path, number: usize) -> Self {
        let uid = format!("0f6c3b1e-8a86-4c34-9d0b-{number:012x}");
        let directory = node.join(format!("pod{uid}/c1"));
        fs::create_dir_all(&directory).expect("cgroups");
        let inode = fs::metadata(&directory).expect("metadata").ino();
        Self { uid, directory, inode }
    }

    fn remove(&self) {
        for directory in self.directory.ancestors().take(2) {
            fs::remove_dir(directory).expect("an empty cgroup");
        }
    }
}

/// A kernel side that is not read before all is over, and its events.
fn started(mount: &Mount) -> (Probes, Events) {
    let hierarchy = Hierarchy::find(&mount.root).expect("cgroups");
    let Started { probes, events, .. } = kernel::start(hierarchy).expect("the kernel side starts");
    let hook = probes.states().iter().find(|probe| probe.signal == "cgroup_made");
    assert_eq!(hook.expect("a state").problem, None);
    (probes, events)
}

/// Reads events until none of `awaited` is left, each with its pod and container.
fn assert_told<K: Ord + Debug>(
    mount: &Mount,
    act: impl FnOnce() -> BTreeMap<K, Container>,
    key: impl Fn(&KernelEvent) -> K,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(async {
        let (_probes, events) = started(mount);
        let mut awaited = act();
        let (sender, mut received) = mpsc::channel(CAPACITY);
        let reader = tokio::spawn(events.run(sender));
        while !awaited.is_empty() {
            let event = tokio::time::timeout(PATIENCE, received.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("missing: {awaited:?}"));
            let event = event.expect("the reader runs");
            if let Some(container) = awaited.remove(&key(&event)) {
                let pod = event.pod.map(|pod| pod.0.to_string());
                let told = (pod.as_deref(), event.cgroup_id);
                assert_eq!(told, (Some(&*container.uid), container.inode));
                assert!(event.in_node_network, "it shares this process's");
            }
        }
        reader.abort();
    });
}

/// Runs containers one after the other and looks at nothing until all are over.
pub(crate) fn every_short_container_is_told(mount: &Mount) {
    let run = |number| {
        let container = Container::make(&mount.node, number);
        let procs = container.directory.join("cgroup.procs");
        let script = format!("echo 0 > {}", procs.display());
        let mut process = Command::new("sh").arg("-c").arg(script).spawn().expect("sh");
        let pid = process.id();
        assert!(process.wait().expect("wait").success());
        container.remove();
        ((pid, Happening::Exited), container)
    };
    assert_told(mount, || (0..PODS).map(run).collect(), |event| (event.pid, event.happening));
}

/// This process listens as one of a pod, and leaves it again.
pub(crate) fn a_listener_is_told(mount: &Mount) {
    let enter = |cgroup: &Path| fs::write(cgroup.join("cgroup.procs"), "0").expect("enter");
    let listen = || {
        let container = Container::make(&mount.node, 0);
        enter(&container.directory);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        enter(&mount.mounted);
        container.remove();
        [Happening::ListenerOpened, Happening::ListenerClosed]
            .map(|happening| ((port, happening, true), container.clone()))
            .into()
    };
    // Other networks have ports of their own.
    let key = |event: &KernelEvent| (event.local.port(), event.happening, event.in_node_network);
    assert_told(mount, listen, key);
}

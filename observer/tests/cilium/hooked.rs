//! With the kernel's hook: each removal is told once, in the span it is said to have happened in.

use std::path::Path;
use std::time::Duration;

use observer::clock;
use observer::dataplane::cilium::map_ids;
use observer::dataplane::{Commit, CommitSignal, SilentTable};
use observer::facts::{BackendChange, BackendStep, BootNs, Happening, KernelEvent};
use observer::kernel::cgroups::Hierarchy;
use observer::kernel::counters::SIGNAL_NAMES;
use observer::kernel::probes::MAP_COMMIT;
use observer::kernel::watched::WatchedMaps;
use observer::kernel::{self, Started};
use tokio::sync::mpsc::{self, Receiver};

use super::maps::{ACTIVE, TERMINATING, V4, V6, pinned, with_bpffs};
use super::running::{Running, in_runtime, v4, v6};

/// How long nothing more may come before it counts as nothing.
const SETTLED: Duration = Duration::from_millis(200);
/// It ends a wait for an event that would never come.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is watched by the kernel, and counted there.
struct Hooked {
    probes: kernel::Probes,
    counters: kernel::counters::Counters,
    watched: WatchedMaps,
    events: Receiver<KernelEvent>,
}

impl Hooked {
    fn start(maps: &Path) -> Self {
        let hierarchy = Hierarchy::find(Path::new("/sys/fs/cgroup")).expect("cgroups");
        let Started { mut probes, events, counters, mut watched, .. } =
            kernel::start(hierarchy).expect("kernel side starts");
        probes.watch(&MAP_COMMIT, true).expect("attach");
        let state = probes.states().iter().find(|probe| probe.signal == MAP_COMMIT.name);
        let state = state.expect("the hook's state");
        assert!(state.method.is_some(), "{:?}", state.problem);
        watched.set(&map_ids(maps)).expect("watch the maps");
        let (sender, receiver) = mpsc::channel(4096);
        tokio::spawn(events.run(sender));
        Self { probes, counters, watched, events: receiver }
    }

    /// How many changes of watched maps the kernel counted.
    fn counted(&self) -> u64 {
        let index = SIGNAL_NAMES.iter().position(|name| *name == MAP_COMMIT.name);
        self.counters.read().expect("counts").signals[index.expect("the signal")].seen
    }

    /// The maps of the changes that were told up to now: so many at least.
    async fn told(&mut self, expected: usize) -> Vec<u32> {
        let mut told = Vec::new();
        while told.len() < expected {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
            if let Happening::MapCommit { map } = event.expect("in time").expect("runs").happening {
                told.push(map);
            }
        }
        // The ring is in order per processor only. On a quiet machine nothing follows at all.
        let late = clock::now().plus(SETTLED);
        while let Ok(Some(event)) = tokio::time::timeout(SETTLED, self.events.recv()).await {
            if let Happening::MapCommit { map } = event.happening {
                told.push(map);
            }
            if event.at > late {
                break;
            }
        }
        told
    }

    /// Passes on what is told, as the agent does.
    fn feed(self, running: &Running) {
        let commits = running.commits.clone();
        let Self { probes, watched, mut events, .. } = self;
        tokio::spawn(async move {
            let _attached = (probes, watched);
            while let Some(event) = events.recv().await {
                if let Happening::MapCommit { .. } = event.happening {
                    let signal = CommitSignal::Commit(Commit::new(event.at, SilentTable::Cilium));
                    commits.send(signal).await.expect("the follower runs");
                }
            }
        });
    }
}

/// The span that is stated for a change lies around the write that made it.
fn assert_covers(change: &BackendChange, (begun, ended): (BootNs, BootNs)) {
    let from = change.at.minus(change.uncertainty);
    assert!(change.at >= begun && from <= ended, "{change:?} of {begun:?} to {ended:?}");
}

#[test]
fn a_roll_is_told_as_it_happened_in_both_ip_versions() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let (mut four, mut six) =
                (V4::create(&maps, "lb4", "v3"), V6::create(&maps, "lb6", "v3"));
            for id in 1..=3 {
                four.backend(id, ACTIVE);
                six.backend(id, ACTIVE);
            }
            four.service(1, &[1, 2, 3], &[], 0);
            six.service(1, &[1, 2, 3], &[], 0);
            let hooked = Hooked::start(&maps);
            let (mut running, present, draining) = Running::start(maps).await;
            assert_eq!((present.len(), draining.len()), (6, 0));
            hooked.feed(&running);

            // A new pod takes the place of the third.
            four.backend(4, ACTIVE);
            four.backend(3, TERMINATING);
            let begun = clock::now();
            let (_, ended) = four.service(1, &[1, 2, 4], &[3], 3);
            let mut steps = Vec::new();
            for _ in 0..2 {
                let change = running.change().await;
                assert_covers(&change, (begun, ended));
                steps.push((change.backend, change.step));
            }
            steps.sort();
            assert_eq!(steps, [(v4(3), BackendStep::Draining), (v4(4), BackendStep::Added)]);

            // Only the count shrinks.
            six.backend(3, TERMINATING);
            let shrunk = six.service(1, &[1, 2], &[3], 3);
            let removed = running.until(&v6(3), BackendStep::Draining).await;
            assert_covers(&removed, shrunk);

            // The pods are gone: their entries go too.
            four.service(1, &[1, 2, 4], &[], 4);
            four.remove_backend(3);
            assert_eq!(running.change().await.step, BackendStep::Removed);
            six.service(1, &[1, 2], &[], 3);
            six.remove_backend(3);
            assert_eq!(running.change().await.backend, v6(3));
            assert_eq!(running.counters.table_failures.get(), 0);
        });
    });
}

#[test]
fn removals_lie_within_the_span_stated_time_after_time() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            for id in 1..=2 {
                four.backend(id, ACTIVE);
            }
            four.service(1, &[1, 2], &[], 0);
            let hooked = Hooked::start(&maps);
            let (mut running, ..) = Running::start(maps).await;
            hooked.feed(&running);
            let mut widest = Duration::ZERO;
            for _ in 0..50 {
                let removed = four.service(1, &[1], &[2], 2);
                let change = running.until(&v4(2), BackendStep::Draining).await;
                assert_covers(&change, removed);
                widest = widest.max(change.uncertainty);
                let added = four.service(1, &[1, 2], &[], 2);
                assert_covers(&running.until(&v4(2), BackendStep::Added).await, added);
            }
            println!("widest span of a removal: {widest:?}");
        });
    });
}

#[test]
fn thousands_of_writes_are_counted_and_told_a_few_times() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            let mut hooked = Hooked::start(&maps);
            let ids: Vec<u32> = (1..=5_000).collect();
            for id in &ids {
                four.backend(*id, ACTIVE);
            }
            four.service(1, &ids, &[], 0);
            let told = hooked.told(1).await;
            assert_eq!(hooked.counted(), 5_000 + 5_000 + 1);
            assert!(told.len() < 10_001 / 2, "{} told", told.len());
        });
    });
}

#[test]
fn other_maps_cost_nothing_and_nothing_is_read() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            four.backend(1, ACTIVE);
            four.service(1, &[1], &[], 0);
            let mut other = pinned::<[u8; 12], [u8; 12]>(&maps, "cilium_ipcache_v2");
            let mut hooked = Hooked::start(&maps);
            let (mut running, ..) = Running::start(maps).await;
            let reads = running.counters.table_reads.get();
            for _ in 0..1_000 {
                other.insert([0; 12], [0; 12], 0).expect("write");
                other.remove(&[0; 12]).expect("remove");
            }
            assert_eq!(hooked.told(0).await, Vec::<u32>::new());
            assert_eq!(hooked.counted(), 0);
            hooked.feed(&running);
            assert_eq!(running.counters.table_reads.get(), reads);
            assert!(running.is_silent());
        });
    });
}

#[test]
fn failed_calls_change_nothing_and_deletions_count() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            four.backend(1, ACTIVE);
            let mut hooked = Hooked::start(&maps);
            four.remove_backend(1);
            assert_eq!((hooked.told(1).await.len(), hooked.counted()), (1, 1));
            assert!(four.try_remove_backend(1).is_err(), "it is gone already");
            assert_eq!((hooked.told(0).await.len(), hooked.counted()), (0, 1));
        });
    });
}

#[test]
fn a_map_that_is_no_longer_watched_is_not_told_of() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            let mut hooked = Hooked::start(&maps);
            hooked.watched.set(&std::collections::BTreeSet::new()).expect("none");
            four.backend(1, ACTIVE);
            assert_eq!((hooked.told(0).await.len(), hooked.counted()), (0, 0));
            hooked.watched.set(&map_ids(&maps)).expect("again");
            four.backend(1, TERMINATING);
            assert_eq!((hooked.told(1).await.len(), hooked.counted()), (1, 1));
        });
    });
}

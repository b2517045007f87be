//! The kernel side: loads the programs, reads their events and counts.
//!
//! First stage of the data path. Everything is detached when the parts returned by [`start`] are
//! dropped: nothing is pinned.

pub mod addresses;
pub mod btf;
pub mod cgroups;
pub mod commits;
pub mod counters;
pub mod decode;
pub mod layout;
pub mod probes;
pub mod watched;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, anyhow};
use aya::maps::{Map, MapData, RingBuf};
use aya::{Ebpf, EbpfLoader, Endianness};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use observer_common::Layout;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use self::addresses::Addresses;
use self::btf::Btf;
use self::cgroups::{Cgroups, Hierarchy};
use self::commits::Commits;
use self::counters::Counters;
use self::layout::Resolved;
use self::probes::{Probe, SIGNALS, Signal, Types};
use self::watched::WatchedMaps;
use crate::clock;
use crate::facts::KernelEvent;

const BTF_PATH: &str = "/sys/kernel/btf/vmlinux";
static PROGRAMS: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/observer-programs"));

/// Why the kernel side cannot start.
#[derive(Debug)]
pub enum StartError {
    /// The running kernel has no usable type information.
    NoBtf(anyhow::Error),
    /// The process may not load programs or read the node's rules.
    NoPermission(anyhow::Error),
    /// Anything else.
    Failed(anyhow::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBtf(error) => write!(
                f,
                "cannot read the kernel's type information ({error:#}): run a kernel built with \
                 CONFIG_DEBUG_INFO_BTF=y, and in a container mount the host's /sys"
            ),
            Self::NoPermission(error) => write!(
                f,
                "not permitted ({error:#}): run as root, or with the capabilities BPF, PERFMON, \
                 NET_ADMIN and NET_RAW"
            ),
            Self::Failed(error) => write!(f, "cannot load the kernel programs: {error:#}"),
        }
    }
}

impl std::error::Error for StartError {}

/// The running kernel side, in parts that different tasks own.
pub struct Started {
    /// Keeps the programs attached.
    pub probes: Probes,
    /// Delivers the details.
    pub events: Events,
    /// Reads the counts.
    pub counters: Counters,
    /// Tells the programs which addresses matter.
    pub addresses: Addresses,
    /// Tells the programs which maps matter.
    pub watched: WatchedMaps,
    /// Tells when commits began.
    pub commits: Commits,
}

/// Loads the programs and attaches every signal that this kernel supports. `hierarchy` tells pods.
///
/// # Errors
/// See [`StartError`]. A signal that cannot be attached is no error: see [`Probes::states`].
pub fn start(hierarchy: Hierarchy) -> Result<Started, StartError> {
    let loader = loader();
    let types = read_types().map_err(StartError::NoBtf)?;
    let netns = own_netns_inum().map_err(StartError::Failed)?;
    let mut resolved = layout::resolve(&types.kernel, netns);
    if let Some(controller) = hierarchy.controller {
        resolved.tell_by(controller, &types.kernel).map_err(StartError::Failed)?;
    }
    let layout = probes::layout_for_programs(&types.kernel, &resolved);
    let mut ebpf = load(loader, &layout).map_err(classify)?;
    let log = aya_log::EbpfLogger::init(&mut ebpf).map_err(|error| classify(error.into()))?;
    let mut take = |name: &str| -> anyhow::Result<Map> {
        ebpf.take_map(name).ok_or_else(|| anyhow!("the object has no map {name}"))
    };
    let counters = Counters::new(&mut take).map_err(StartError::Failed)?;
    let addresses = Addresses::new(&mut take).map_err(StartError::Failed)?;
    let watched = WatchedMaps::new(&mut take).map_err(StartError::Failed)?;
    let commits = Commits::new(&mut take).map_err(StartError::Failed)?;
    let ring = take("EVENTS").and_then(|map| Ok(RingBuf::try_from(map)?));
    let ring = ring.map_err(StartError::Failed)?;
    let states = SIGNALS
        .iter()
        .map(|signal| probes::attach(signal, &mut ebpf, &resolved, Some(&types)))
        .collect();
    let probes = Probes { ebpf, resolved, states };
    probes.refuse_if_none_may_attach()?;
    // What is made from here on, the programs tell.
    let cgroups = Cgroups::new(hierarchy.root);
    let events = Events { ring, log, cgroups, own_netns_inum: netns, counts: Arc::default() };
    Ok(Started { probes, events, counters, addresses, watched, commits })
}

/// A new loader reads all of the kernel's types, which our programs need none of: they are dropped
/// here, before [`read_types`] reads them once more.
fn loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

fn read_types() -> anyhow::Result<Types> {
    let bytes = fs::read(BTF_PATH).with_context(|| BTF_PATH.to_owned())?;
    let kernel = Btf::parse(bytes)?;
    let loader = aya::Btf::parse(&kernel.only_tracepoints()?, Endianness::Little)?;
    Ok(Types { kernel, loader })
}

/// The inode number of the calling thread's network namespace.
fn own_netns_inum() -> anyhow::Result<u32> {
    let path = "/proc/thread-self/ns/net";
    let inode = fs::metadata(path).with_context(|| format!("cannot read {path}"))?.ino();
    u32::try_from(inode).with_context(|| format!("{path} has the odd inode {inode}"))
}

fn load<'a>(mut loader: EbpfLoader<'a>, layout: &'a Layout) -> anyhow::Result<Ebpf> {
    // Before Linux 5.11 maps count against this limit; afterwards it does not matter, so a refusal
    // is not fatal here: map creation will tell.
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%error, "the memory lock limit stays as it is");
    }
    Ok(loader.override_global("LAYOUT", layout, true).load(PROGRAMS)?)
}

fn classify(error: anyhow::Error) -> StartError {
    if is_permission_error(&error) {
        StartError::NoPermission(error)
    } else {
        StartError::Failed(error)
    }
}

/// Whether the kernel refused for lack of privileges.
#[must_use]
pub fn is_permission_error(error: &anyhow::Error) -> bool {
    let denied = |io: &io::Error| io.kind() == io::ErrorKind::PermissionDenied;
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(denied)
            || matches!(cause.downcast_ref(), Some(Errno::EPERM | Errno::EACCES))
    })
}

/// The loaded programs. Dropping it detaches them.
pub struct Probes {
    ebpf: Ebpf,
    resolved: Resolved,
    states: Vec<Probe>,
}

impl Probes {
    /// What became of each signal.
    #[must_use]
    pub fn states(&self) -> &[Probe] {
        &self.states
    }

    /// Fields and enumerators that the running kernel lacks.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.resolved.missing
    }

    /// Attaches or detaches a signal that is not needed all the time; gives what became of it, unless
    /// it is not wanted.
    ///
    /// # Errors
    /// When a program cannot be unloaded, or the kernel's types no longer be read. A failed attach shows in [`Self::states`].
    pub fn watch(&mut self, signal: &Signal, wanted: bool) -> anyhow::Result<Option<&Probe>> {
        let known = self.states.iter().position(|probe| probe.signal == signal.name);
        match (wanted, known) {
            (true, None) => {
                let types = signal.needs_types().then(read_types).transpose()?;
                let Self { ebpf, resolved, states } = self;
                states.push(probes::attach(signal, ebpf, resolved, types.as_ref()));
            }
            (false, Some(index)) => {
                probes::detach(signal, &mut self.ebpf)?;
                self.states.remove(index);
            }
            _ => {}
        }
        Ok(self.states.iter().find(|probe| probe.signal == signal.name))
    }

    /// Map creation needs fewer capabilities than tracing: tell a lack of them from a kernel that
    /// lacks the hooks.
    fn refuse_if_none_may_attach(&self) -> Result<(), StartError> {
        if self.states.iter().any(|probe| probe.method.is_some()) {
            return Ok(());
        }
        let problems: Vec<&str> =
            self.states.iter().filter_map(|probe| probe.problem.as_deref()).collect();
        let error = anyhow!("no signal could be attached: {}", problems.join("; "));
        let denied = problems.iter().any(|problem| problem.contains("Operation not permitted"));
        Err(if denied { StartError::NoPermission(error) } else { StartError::Failed(error) })
    }
}

/// What the reader of the ring buffer counted.
#[derive(Debug, Default)]
pub struct EventCounts {
    /// Records that are not this daemon's.
    pub undecodable: AtomicU64,
    /// Events delivered.
    pub delivered: AtomicU64,
    /// Whether the directory of any pod was seen.
    pub knows_a_pod: AtomicBool,
}

/// The reader of the ring buffer and of the programs' own log.
pub struct Events {
    ring: RingBuf<MapData>,
    log: aya_log::EbpfLogger<&'static dyn log::Log>,
    cgroups: Cgroups,
    own_netns_inum: u32,
    counts: Arc<EventCounts>,
}

impl Events {
    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Arc<EventCounts> {
        Arc::clone(&self.counts)
    }

    /// Delivers events until the receiver is gone. A full channel makes the reader wait: the ring
    /// buffer takes up the burst, and the kernel counts what it cannot hold.
    ///
    /// # Errors
    /// When the ring buffer cannot be polled.
    pub async fn run(self, facts: mpsc::Sender<KernelEvent>) -> anyhow::Result<()> {
        let Self { ring, log, cgroups, own_netns_inum, counts } = self;
        let mut records = Records { cgroups, own_netns_inum, counts };
        records.note_pods();
        let mut ring = pollable(ring).context("cannot poll the ring buffer")?;
        let mut log = pollable(log).context("cannot poll the programs' log")?;
        loop {
            tokio::select! {
                ready = ring.readable_mut() => {
                    let mut ready = ready.context("cannot poll the ring buffer")?;
                    while let Some(record) = ready.get_inner_mut().next() {
                        let event = records.take(&record);
                        drop(record);
                        let Some(event) = event else { continue };
                        if facts.send(event).await.is_err() {
                            return Ok(());
                        }
                        records.counts.delivered.fetch_add(1, Ordering::Relaxed);
                    }
                    ready.clear_ready();
                }
                ready = log.readable_mut() => {
                    let mut ready = ready.context("cannot poll the programs' log")?;
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
            }
        }
    }
}

/// What records become events with.
struct Records {
    cgroups: Cgroups,
    own_netns_inum: u32,
    counts: Arc<EventCounts>,
}

impl Records {
    /// The event of a record, if it has one. The ring buffer keeps what causes before what is
    /// caused: a cgroup comes before all that happens in it.
    fn take(&mut self, record: &[u8]) -> Option<KernelEvent> {
        if let Some(made) = decode::new_cgroup(record) {
            self.cgroups.made(&made);
            self.note_pods();
            return None;
        }
        let Ok(mut event) = decode::decode(record, self.own_netns_inum) else {
            self.counts.undecodable.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        if let Some(place) = self.cgroups.place(event.cgroup_id, clock::now()) {
            event.pod = Some(place.pod);
            event.cgroup_id = place.container.unwrap_or(event.cgroup_id);
        }
        Some(event)
    }

    fn note_pods(&self) {
        if !self.counts.knows_a_pod.load(Ordering::Relaxed) && self.cgroups.knows_a_pod() {
            self.counts.knows_a_pod.store(true, Ordering::Relaxed);
        }
    }
}

#[expect(unsafe_code, reason = "tokio asks for a promise that its type system cannot check")]
fn pollable<T: AsRawFd>(source: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: aya's ring buffer and logger own their file descriptor, always return the same one
    // and close it only when dropped, which is after the `AsyncFd` that owns them deregistered it.
    unsafe { AsyncFd::register(source) }.map_err(io::Error::from)
}

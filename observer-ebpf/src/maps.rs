//! Every map: who inserts, who deletes, what happens when it is full.

use aya_ebpf::{
    macros::map,
    maps::{HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use observer_common::{ArrivalCount, ArrivalKey, Event, Ip, ProbedPort, SignalCounts, signal};

/// Details for the daemon, which drains it. Full: the detail is lost and counted in
/// [`SignalCounts::ring_full`]. 1 MiB holds about 10,000 events.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// When each thread began its latest commit to `nf_tables` and the one before (`CLOCK_BOOTTIME`,
/// ns; 0: none). The program inserts, nobody deletes. Full: the entry that was used least recently
/// goes, of a process long gone.
#[map]
pub static TASK_TO_COMMITS: LruHashMap<u32, [u64; 2]> = LruHashMap::with_max_entries(1_024, 0);

/// Exact counts per signal, indexed by [`signal`]. The programs add; nobody deletes or resets.
#[map]
pub static SIGNAL_TO_COUNTS: PerCpuArray<SignalCounts> =
    PerCpuArray::with_max_entries(signal::COUNT, 0);

/// Failed connects by errno; the last index takes any that is larger. As above.
#[map]
pub static ERRNO_TO_COUNT: PerCpuArray<u64> = PerCpuArray::with_max_entries(ERRNO_COUNT, 0);

/// One more than the largest errno that Linux defines for sockets (133, `EHWPOISON`).
pub const ERRNO_COUNT: u32 = 134;

/// Exact counts of new connections at local pods. The programs insert and add; the daemon deletes
/// the entries of pods that are long gone. Full: counted in [`SignalCounts::map_full`].
#[map]
pub static ARRIVAL_TO_COUNT: PerCpuHashMap<ArrivalKey, ArrivalCount> =
    PerCpuHashMap::with_max_entries(16_384, 0);

/// The addresses of this node's pods. The daemon inserts a pod's address when the watch shows it
/// and deletes it when the pod's history is dropped. Full: the daemon counts and reports it; that
/// pod's arrivals are not counted. 4,096 is far above any kubelet's pod limit.
#[map]
pub static LOCAL_ADDRESSES: HashMap<Ip, u8> = HashMap::with_max_entries(4_096, 0);

/// The ports of this node's pods that the kubelet probes. The daemon inserts them with the pod and
/// deletes them with it. Full: the daemon reports it; that pod's probes count as connections.
#[map]
pub static PROBED_PORTS: HashMap<ProbedPort, u8> = HashMap::with_max_entries(8_192, 0);

/// Which class (`observer_common::source`) an address range belongs to. The daemon inserts the
/// configured ranges and this node's own addresses. Full: the daemon reports it.
#[map]
pub static RANGE_TO_SOURCE: LpmTrie<Ip, u8> = LpmTrie::with_max_entries(8_192, 0);

/// The maps of a dataplane whose changes matter, by map id, each with when a change of it was last
/// told (`CLOCK_BOOTTIME`, ns). The daemon inserts and deletes; the program updates the time. Full:
/// the daemon reports it. A dataplane has four such maps, and twice as many while it migrates them.
#[map]
pub static WATCHED_MAPS: HashMap<u32, u64> = HashMap::with_max_entries(64, 0);

/// How many details a source of trouble may still send. The programs insert; the kernel evicts the
/// least recently used when full, which gives that key a fresh budget and costs no count.
#[map]
pub static KEY_TO_BUDGET: LruHashMap<BudgetKey, Budget> = LruHashMap::with_max_entries(8_192, 0);

/// The call of IPVS or legacy iptables that a thread is in. `call` inserts at its entry and deletes
/// at its return. The kernel evicts the least recently used when full: an IPVS call's length and
/// destination are then not known, and a legacy call is not told. Calls wait for each other, so one
/// entry of each kind is the rule.
#[map]
pub static THREAD_TO_CALL: LruHashMap<u64, Call> = LruHashMap::with_max_entries(1_024, 0);

/// What the entry of a call leaves for its return.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Call {
    pub begun_ns: u64,
    /// The destination; zero when it may be any.
    pub address: Ip,
    pub port: u32,
    pub reserved: u32,
}

/// One source of trouble: a signal at one pod (or address), whoever the peers are, so that neither
/// a port scan nor a flood from many sources takes another pod's details.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BudgetKey {
    pub netns_cookie: u64,
    pub cgroup_id: u64,
    pub local_address: Ip,
    pub signal: u32,
    pub reserved: u32,
}

impl BudgetKey {
    #[inline(always)]
    pub fn of(event: &Event) -> Self {
        Self {
            netns_cookie: event.netns_cookie,
            cgroup_id: event.cgroup_id,
            local_address: match event.signal {
                // The destination is the sender's choice: a scan would get a budget for each.
                signal::NETFILTER_DROP | signal::ICMP_UNREACHABLE => Ip { first: 0, last: 0 },
                _ => event.local_address,
            },
            signal: event.signal,
            reserved: 0,
        }
    }
}

/// What one key sent in its current window, and what it could not send since.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Budget {
    pub window_start_ns: u64,
    pub sent: u32,
    pub suppressed: u32,
}

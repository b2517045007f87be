//! Counting, always; sending a detail, within its key's budget.

use aya_ebpf::{
    EbpfContext,
    helpers::bpf_ktime_get_boot_ns,
    maps::{lpm_trie::Key, ring_buf::RingBufEntry},
};
use aya_log_ebpf::warn;
use observer_common::{
    ArrivalCount, ArrivalKey, Event, Ip, ProbedPort, SignalCounts, outcome, signal, source,
};

use crate::maps::{
    ARRIVAL_TO_COUNT, Budget, BudgetKey, ERRNO_COUNT, ERRNO_TO_COUNT, EVENTS, KEY_TO_BUDGET,
    LOCAL_ADDRESSES, PROBED_PORTS, RANGE_TO_SOURCE, SIGNAL_TO_COUNTS,
};

/// Details per key and second. A rollout refuses tens per second at one pod; more is a flood.
const BURST: u32 = 64;
/// The same for signals and exits, by container: the end of its main process must not be lost among
/// short-lived helpers' ends.
const PROCESS_BURST: u32 = 512;
/// Length of a budget's window.
const WINDOW_NS: u64 = 1_000_000_000;

/// A new event, stamped now.
#[inline(always)]
pub fn event(signal: u32) -> Event {
    Event { boot_ns: now(), signal, ..Event::default() }
}

#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without arguments (Linux 5.8).
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Counts the event and sends it unless its key has spent its budget.
#[inline(always)]
pub fn send(ctx: &impl EbpfContext, event: &mut Event) {
    if within_budget(event) {
        send_always(ctx, event);
    } else if let Some(counts) = counts(event.signal) {
        counts.seen += 1;
        counts.suppressed += 1;
    }
}

/// As [`send`], without a budget: for what is rare by nature and must not be missed.
#[inline(always)]
pub fn send_always(ctx: &impl EbpfContext, event: &Event) {
    let Some(counts) = counts(event.signal) else { return };
    counts.seen += 1;
    if EVENTS.output::<Event>(event, 0).is_err() {
        count_ring_full(ctx, event.signal, counts);
    }
}

/// Counts, and gives room for a record that is larger than the stack should hold.
#[inline(always)]
pub fn reserve<T: 'static>(ctx: &impl EbpfContext, signal: u32) -> Option<RingBufEntry<T>> {
    let counts = counts(signal)?;
    counts.seen += 1;
    let record = EVENTS.reserve::<T>(0);
    if record.is_none() {
        count_ring_full(ctx, signal, counts);
    }
    record
}

#[inline(always)]
fn count_ring_full(ctx: &impl EbpfContext, signal: u32, counts: &mut SignalCounts) {
    if counts.ring_full == 0 {
        warn!(ctx, "ring buffer full: signal {} loses details", signal);
    }
    counts.ring_full += 1;
}

/// Counts without sending.
#[inline(always)]
pub fn count(signal: u32) {
    if let Some(counts) = counts(signal) {
        counts.seen += 1;
    }
}

/// Counts a failed connect by its errno.
#[inline(always)]
pub fn count_errno(errno: u32) {
    let index = if errno < ERRNO_COUNT { errno } else { ERRNO_COUNT - 1 };
    if let Some(count) = ERRNO_TO_COUNT.get_ptr_mut(index) {
        // SAFETY: this CPU's own element, which one program alone counts in. (Different programs do
        // nest on one CPU: an interrupt's inside a system call's.)
        unsafe { *count += 1 };
    }
}

/// Whether the address is one of this node's pods.
#[inline(always)]
pub fn is_local_pod(address: &Ip) -> bool {
    LOCAL_ADDRESSES.get_ptr(address).is_some()
}

/// Where the event's peer is: one of [`source`].
#[inline(always)]
pub fn source_of(event: &Event) -> u8 {
    let range = Key::new(128, event.remote_address);
    RANGE_TO_SOURCE.get(range).copied().unwrap_or(source::UNCLASSIFIED)
}

/// Whether a connection is taken for one of the kubelet's probes: from the node itself to a port
/// that it probes. They go on to the pod's end, need no sleep, and nobody misses them when refused.
#[inline(always)]
pub fn is_probe(event: &Event, source: u8) -> bool {
    let port =
        ProbedPort { address: event.local_address, port: u32::from(event.local_port), reserved: 0 };
    source == source::NODE && PROBED_PORTS.get_ptr(port).is_some()
}

/// Counts a new connection at a local pod under its exact key.
#[inline(always)]
pub fn count_arrival(ctx: &impl EbpfContext, event: &Event, source: u8, outcome: u8) {
    let key = ArrivalKey {
        address: event.local_address,
        netns_cookie: event.netns_cookie,
        port: event.local_port,
        outcome,
        source,
        reserved: 0,
    };
    if let Some(arrivals) = ARRIVAL_TO_COUNT.get_ptr_mut(key) {
        // SAFETY: this CPU's own value.
        unsafe {
            (*arrivals).count += 1;
            (*arrivals).last_boot_ns = event.boot_ns;
        }
        return;
    }
    let first = ArrivalCount { count: 1, last_boot_ns: event.boot_ns };
    if ARRIVAL_TO_COUNT.insert(key, first, 0).is_err()
        && let Some(counts) = counts(event.signal)
    {
        if counts.map_full == 0 {
            warn!(ctx, "arrival map full: outcome {} not counted per pod", outcome_name(outcome));
        }
        counts.map_full += 1;
    }
}

fn outcome_name(outcome: u8) -> &'static str {
    if outcome == outcome::REFUSED { "refused" } else { "accepted" }
}

#[inline(always)]
fn counts(signal: u32) -> Option<&'static mut SignalCounts> {
    let counts = SIGNAL_TO_COUNTS.get_ptr_mut(signal)?;
    // SAFETY: this CPU's own element, alive as long as the map, which outlives the program.
    Some(unsafe { &mut *counts })
}

#[inline(always)]
fn within_budget(event: &mut Event) -> bool {
    let key = BudgetKey::of(event);
    let Some(budget) = KEY_TO_BUDGET.get_ptr_mut(key) else {
        let fresh = Budget { window_start_ns: event.boot_ns, sent: 1, suppressed: 0 };
        // A failed insert costs this key its budget's memory, never the event.
        let _inserted = KEY_TO_BUDGET.insert(key, fresh, 0);
        return true;
    };
    // SAFETY: map memory, valid until the program ends. Two CPUs may race on one key: the budget
    // is then off by a few details, the counts are not affected.
    let budget = unsafe { &mut *budget };
    if event.boot_ns.saturating_sub(budget.window_start_ns) >= WINDOW_NS {
        budget.window_start_ns = event.boot_ns;
        budget.sent = 0;
    }
    let burst = match event.signal {
        signal::PROCESS_SIGNALLED | signal::PROCESS_EXITED => PROCESS_BURST,
        _ => BURST,
    };
    if budget.sent >= burst {
        budget.suppressed += 1;
        return false;
    }
    budget.sent += 1;
    event.suppressed = budget.suppressed;
    budget.suppressed = 0;
    true
}

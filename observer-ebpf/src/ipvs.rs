//! Calls that change the table of IPVS: what they change, and when they begin and return. The
//! change takes effect between the two.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_task},
};
use observer_common::{Ip, signal};

use crate::{
    layout::offset,
    maps::{Call, THREAD_TO_CALL},
    memory::{Address, read, read_or_zero},
    report, task,
};

/// Offsets in `struct ip_vs_dest_user_kern` (include/net/ip_vs.h), which has been the same since
/// Linux 5.10 at least (to 7.2) and is in no BTF of the kernel proper. Were it another, a wrong
/// destination would be told, which no backend is: the daemon then only knows less exactly when a
/// backend changed.
const ADDRESS: u32 = 0;
const PORT: u32 = 16;
const FAMILY: u32 = 36;
const AF_INET: u16 = 2;

/// Entry of a call that adds, edits or deletes one destination.
#[inline(always)]
pub fn destination_call(destination: Address) -> u32 {
    let address = match read(destination, FAMILY) {
        Some(AF_INET) => Ip::mapped(read_or_zero(destination, ADDRESS)),
        _ => Ip {
            first: read_or_zero(destination, ADDRESS),
            last: read_or_zero(destination, ADDRESS + 8),
        },
    };
    let port_be: u16 = read_or_zero(destination, PORT);
    begin(address, u16::from_be(port_be))
}

/// Entry of a call that deletes all destinations of a service, or of all services.
#[inline(always)]
pub fn service_call() -> u32 {
    begin(Ip { first: 0, last: 0 }, 0)
}

#[inline(always)]
fn begin(address: Ip, port: u16) -> u32 {
    let call = Call { begun_ns: report::now(), address, port: port.into(), reserved: 0 };
    // A failed insert costs this call its length and destination, never the event.
    let _inserted = THREAD_TO_CALL.insert(bpf_get_current_pid_tgid(), call, 0);
    0
}

/// Return of any of them, in this node's network namespace. Also of one that failed: the table is
/// then found as it was.
#[inline(always)]
pub fn returned(ctx: &impl EbpfContext) -> u32 {
    let mut event = report::event(signal::IPVS_COMMIT);
    let thread = bpf_get_current_pid_tgid();
    // Before Linux 7.2 a flush calls what deletes a service: the inner call's return takes the
    // entry, and nothing changes between the last of these and the outer return.
    // SAFETY: copied before this thread, the only one with this key, changes it.
    if let Some(call) = unsafe { THREAD_TO_CALL.get(thread) }.copied() {
        event.code = nanoseconds(event.boot_ns.saturating_sub(call.begun_ns));
        event.local_address = call.address;
        event.local_port = call.port as u16;
        let _removed = THREAD_TO_CALL.remove(thread);
    }
    // SAFETY: a helper without arguments.
    task::fill(&mut event, unsafe { bpf_get_current_task() });
    if event.netns_inum != offset!(own_netns_inum) {
        return 0;
    }
    report::send_always(ctx, &event);
    0
}

/// At least 1, for 0 means that it is not known.
#[inline(always)]
fn nanoseconds(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX).max(1)
}

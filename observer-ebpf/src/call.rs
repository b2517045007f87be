//! Kernel functions whose entry and return are both hooked: what a call leaves from the one for the
//! other. What it changes takes effect between the two.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use observer_common::{Event, Ip};

use crate::{
    maps::{Call, THREAD_TO_CALL},
    report,
};

/// Entry of a call that changes this destination, or any when it is zero.
#[inline(always)]
pub fn begin(address: Ip, port: u16) {
    let call = Call { begun_ns: report::now(), address, port: port.into(), reserved: 0 };
    // A failed insert costs this call its length and destination, never the event of IPVS.
    let _inserted = THREAD_TO_CALL.insert(bpf_get_current_pid_tgid(), call, 0);
}

/// Return: fills in the call's length, as `code`, and destination. Whether its entry was seen.
#[inline(always)]
pub fn end(event: &mut Event) -> bool {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: copied before this thread, the only one with this key, changes it.
    let Some(call) = unsafe { THREAD_TO_CALL.get(thread) }.copied() else { return false };
    event.code = nanoseconds(event.boot_ns.saturating_sub(call.begun_ns));
    event.local_address = call.address;
    event.local_port = call.port as u16;
    let _removed = THREAD_TO_CALL.remove(thread);
    true
}

/// At least 1, for 0 means that it is not known.
#[inline(always)]
fn nanoseconds(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX).max(1)
}

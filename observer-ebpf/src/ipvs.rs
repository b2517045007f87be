//! Calls that change the table of IPVS, and what they change.

use aya_ebpf::EbpfContext;
use observer_common::{Ip, signal};

use crate::{
    call,
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
    call::begin(address, u16::from_be(port_be));
    0
}

/// Entry of a call that deletes all destinations of a service, or of all services.
#[inline(always)]
pub fn service_call() -> u32 {
    call::begin(Ip { first: 0, last: 0 }, 0);
    0
}

/// Return of any of them. Also of one that failed: the table is then found as it was.
///
/// Before Linux 7.2 a flush calls what deletes a service: the inner call's return takes the entry,
/// and nothing changes between the last of these and the outer return.
#[inline(always)]
pub fn returned(ctx: &impl EbpfContext) -> u32 {
    let mut event = report::event(signal::IPVS_COMMIT);
    call::end(&mut event);
    task::send_of_own_netns(ctx, &mut event);
    0
}

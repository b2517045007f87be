//! Calls that replace a table of legacy iptables, where the kernel has kprobes.

use aya_ebpf::programs::{ProbeContext, RetProbeContext};
use observer_common::{Ip, signal};

use crate::{
    call,
    memory::{Address, read},
    report, task,
};

/// Offset of `name` in `struct xt_table` (include/linux/netfilter/x_tables.h), from Linux 5.10 to
/// 7.2; from 6.1 on it is in no BTF of the kernel proper.
const NAME: u32 = 56;
/// The tables that send nothing anywhere, as the first eight bytes of their names. Any other name,
/// or none where the offset is another, may be `nat`.
const OTHER_TABLES: [[u8; 8]; 4] =
    [*b"filter\0\0", *b"mangle\0\0", *b"raw\0\0\0\0\0", *b"security"];

/// `xt_replace_table(table, num_counters, ..)`. Without counters to take over the kernel makes the
/// table itself, for somebody who only reads it.
#[inline(always)]
pub fn replace_call(ctx: &ProbeContext) -> u32 {
    let counters: u32 = ctx.arg(1).unwrap_or_default();
    let table: Address = ctx.arg(0).unwrap_or_default();
    if counters != 0 && !is_other_table(table) {
        call::begin(Ip { first: 0, last: 0 }, 0);
    }
    0
}

/// Its return: the old table, or null when it failed.
#[inline(always)]
pub fn replaced(ctx: &RetProbeContext) -> u32 {
    let mut event = report::event(signal::LEGACY_CALL);
    let old_table: Address = ctx.ret();
    if call::end(&mut event) && old_table != 0 {
        task::send_of_own_netns(ctx, &mut event);
    }
    0
}

#[inline(always)]
fn is_other_table(table: Address) -> bool {
    let Some(name) = read::<u64>(table, NAME) else { return false };
    OTHER_TABLES.iter().any(|other| name == u64::from_ne_bytes(*other))
}

//! When commits of netfilter rules begin, on kernels with kprobes.

use aya_ebpf::{EbpfContext, programs::ProbeContext};

use crate::{
    layout::offset,
    maps::TASK_TO_COMMITS,
    memory::{Address, read_or_zero},
    report,
};

/// `nf_tables_commit(net, skb)` is entered: also for a transaction that changes nothing. A failed
/// insert leaves the commit without this stamp, and with the uncertainty it has without kprobes.
#[inline(always)]
pub fn begun(ctx: &ProbeContext) -> u32 {
    let net: Address = ctx.arg(0).unwrap_or_default();
    let inum: u32 = read_or_zero(net, offset!(net_inum));
    if inum == offset!(own_netns_inum) {
        let task = ctx.pid();
        // SAFETY: the value of this thread, which is here and so cannot change it.
        let before = unsafe { TASK_TO_COMMITS.get(task) }.map_or(0, |[latest, _]| *latest);
        let _inserted = TASK_TO_COMMITS.insert(task, [report::now(), before], 0);
    }
    0
}

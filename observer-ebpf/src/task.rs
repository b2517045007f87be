//! Stages that start from a `struct task_struct`, and what a task, socket or device points to: its
//! network namespace.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_current_task, bpf_probe_read_user},
};
use observer_common::{Event, signal};

use crate::{
    cgroup,
    layout::offset,
    memory::{Address, argument, read, read_or_zero},
    report,
};

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// `setsockopt` in the x86-64 system call table, part of the kernel's user interface.
const NR_SETSOCKOPT: u64 = 54;
/// `IPT_SO_SET_REPLACE` and `IP6T_SO_SET_REPLACE` (include/uapi/linux/netfilter_ipv{4,6}).
const SO_SET_REPLACE: u64 = 64;
const SOL_IP: u64 = 0;
const SOL_IPV6: u64 = 41;

/// `signal_generate`, also for a signal that the process ignores: the kubelet did send it.
#[inline(always)]
pub fn signalled(ctx: &impl EbpfContext, number: u32) -> i32 {
    if number != SIGTERM && number != SIGKILL {
        return 0;
    }
    let mut event = report::event(signal::PROCESS_SIGNALLED);
    fill(&mut event, argument(ctx, 2));
    event.code = number;
    report::send(ctx, &mut event);
    0
}

/// An end of the process in the first argument.
#[inline(always)]
pub fn happened(ctx: &impl EbpfContext, signal: u32) -> i32 {
    let mut event = report::event(signal);
    fill(&mut event, argument(ctx, 0));
    report::send(ctx, &mut event);
    0
}

/// `sched_process_exit` where the kernel does not say whether the whole process is dead.
#[inline(always)]
pub fn leader_exited(ctx: &impl EbpfContext) -> i32 {
    let task = argument(ctx, 0);
    // Not compared as options: Linux 5.10 and 6.1 refuse to read the unset half of one.
    let pid: u32 = read_or_zero(task, offset!(task_pid));
    let tgid: u32 = read_or_zero(task, offset!(task_tgid));
    if pid != tgid {
        return 0;
    }
    happened(ctx, signal::PROCESS_EXITED)
}

/// `sys_exit`: after a successful replacement, in this node's namespace, the new table is in force.
#[inline(always)]
pub fn system_call_returned(ctx: &impl EbpfContext, result: i64) -> i32 {
    if result != 0 {
        return 0;
    }
    let regs = argument(ctx, 0);
    if read(regs, offset!(regs_nr)) != Some(NR_SETSOCKOPT) {
        return 0;
    }
    if read(regs, offset!(regs_arg2)) != Some(SO_SET_REPLACE) {
        return 0;
    }
    let family = match read(regs, offset!(regs_arg1)) {
        Some(SOL_IP) => 4,
        Some(SOL_IPV6) => 6,
        _ => return 0,
    };
    if is_other_table(read_or_zero(regs, offset!(regs_arg3))) {
        return 0;
    }
    let mut event = report::event(signal::LEGACY_COMMIT);
    event.code = family;
    send_of_own_netns(ctx, &mut event);
    0
}

/// Sends the event of a call that the current task made in this node's network namespace.
#[inline(always)]
pub fn send_of_own_netns(ctx: &impl EbpfContext, event: &mut Event) {
    // SAFETY: a helper without arguments.
    fill(event, unsafe { bpf_get_current_task() });
    if event.netns_inum == offset!(own_netns_inum) {
        report::send_always(ctx, event);
    }
}

/// Whether `struct ipt_replace` in user memory names a table other than `nat`, the only one that
/// holds backends: a restore replaces several, one after the other. Memory that cannot be read
/// without a page fault counts as `nat`.
#[inline(always)]
fn is_other_table(replacement: Address) -> bool {
    // SAFETY: the helper checks the address; any four bytes are a valid array.
    let name = unsafe { bpf_probe_read_user(replacement as *const [u8; 4]) };
    name.is_ok_and(|name| name != *b"nat\0")
}

/// The task's ids, and the network namespace it is in.
#[inline(always)]
fn fill(event: &mut Event, task: Address) {
    event.pid = read_or_zero(task, offset!(task_tgid));
    event.cgroup_id = cgroup::id(cgroup::of_task(task));
    // An exiting task may have left its namespaces already: then both stay 0.
    let nsproxy: Address = read_or_zero(task, offset!(task_nsproxy));
    fill_netns(event, read_or_zero(nsproxy, offset!(nsproxy_net)));
}

/// From a `struct net`.
#[inline(always)]
pub fn fill_netns(event: &mut Event, net: Address) {
    event.netns_inum = read_or_zero(net, offset!(net_inum));
    event.netns_cookie = read_or_zero(net, offset!(net_cookie));
}

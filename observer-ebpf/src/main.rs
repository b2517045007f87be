//! The attach points. Each hook returns early for what it does not care about, then hands over to
//! the stage that reads the kernel's structures (`socket`, `packet`, `task`; for commits also
//! `bpf_call`, `commit`, `ipvs`, `legacy`) and to `report`, which counts and sends.
//!
//! Which of these programs are attached is the daemon's choice: it reads the running kernel's BTF
//! and leaves out what that kernel cannot run. Names are the daemon's contract: see
//! `observer::kernel::probes`.

#![no_std]
#![no_main]

mod bpf_call;
mod call;
mod cgroup;
mod commit;
mod ipvs;
mod layout;
mod legacy;
mod maps;
mod memory;
mod packet;
mod report;
mod socket;
mod task;

use aya_ebpf::{
    macros::{btf_tracepoint, kprobe, kretprobe},
    programs::{BtfTracePointContext, ProbeContext, RetProbeContext},
};
use observer_common::signal;

/// `inet_sock_set_state(sk, oldstate, newstate)`: failed connects, passive opens, listeners.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn socket_state(ctx: BtfTracePointContext) -> i32 {
    socket::state_changed(&ctx, ctx.arg(1), ctx.arg(2))
}

/// `tcp_send_reset(sk, skb, reason)`, Linux 6.10: a RST leaves, with or without a socket.
#[btf_tracepoint(function = "tcp_send_reset")]
pub fn reset_sent(ctx: BtfTracePointContext) -> i32 {
    packet::reset_sent(&ctx, ctx.arg(2))
}

/// `tcp_receive_reset(sk)`: a RST reached a socket.
#[btf_tracepoint(function = "tcp_receive_reset")]
pub fn reset_received(ctx: BtfTracePointContext) -> i32 {
    socket::reset_received(&ctx)
}

/// `inet_sk_error_report(sk)`, Linux 5.15: a socket is told of an error.
#[btf_tracepoint(function = "inet_sk_error_report")]
pub fn socket_error(ctx: BtfTracePointContext) -> i32 {
    socket::error_reported(&ctx)
}

/// `icmp_send(skb, type, code)`, absent in Linux 5.10: this node answers a packet by ICMP (IPv4
/// only: there is no such tracepoint for ICMPv6).
#[btf_tracepoint(function = "icmp_send")]
pub fn icmp_sent(ctx: BtfTracePointContext) -> i32 {
    packet::icmp_sent(&ctx, ctx.arg(1), ctx.arg(2))
}

/// `kfree_skb(skb, location, reason, ..)`, reason since Linux 5.17.
#[btf_tracepoint(function = "kfree_skb")]
pub fn packet_dropped(ctx: BtfTracePointContext) -> i32 {
    packet::dropped(&ctx, ctx.arg(2))
}

/// `signal_generate(sig, info, task, group, result)`: SIGTERM and SIGKILL.
#[btf_tracepoint(function = "signal_generate")]
pub fn process_signalled(ctx: BtfTracePointContext) -> i32 {
    task::signalled(&ctx, ctx.arg(0))
}

/// `sched_process_exit(task, group_dead)`, the second argument since Linux 6.16.
#[btf_tracepoint(function = "sched_process_exit")]
pub fn process_exited(ctx: BtfTracePointContext) -> i32 {
    let group_dead: u32 = ctx.arg(1);
    // A C bool: only the low byte is defined.
    if group_dead & 0xff == 0 {
        return 0;
    }
    task::happened(&ctx, signal::PROCESS_EXITED)
}

/// `sched_process_exit(task)`, before Linux 6.16: the leader's end stands for the process's.
#[btf_tracepoint(function = "sched_process_exit")]
pub fn process_leader_exited(ctx: BtfTracePointContext) -> i32 {
    task::leader_exited(&ctx)
}

/// `mark_victim(task, uid)`; older kernels pass a bare pid (5.10 does, 6.1.192 does not): BTF
/// decides.
#[btf_tracepoint(function = "mark_victim")]
pub fn oom_victim(ctx: BtfTracePointContext) -> i32 {
    task::happened(&ctx, signal::OOM_KILLED)
}

/// `sys_exit(regs, ret)`: a legacy iptables table was replaced. It runs at the end of every system
/// call, so the daemon attaches it only while legacy tables are in use.
#[btf_tracepoint(function = "sys_exit")]
pub fn legacy_commit(ctx: BtfTracePointContext) -> i32 {
    task::system_call_returned(&ctx, ctx.arg(1))
}

/// `sys_exit(regs, ret)`: elements of a watched map were changed. As above, attached only while
/// there is such a map.
#[btf_tracepoint(function = "sys_exit")]
pub fn map_commit(ctx: BtfTracePointContext) -> i32 {
    bpf_call::returned(&ctx, ctx.arg(1))
}

/// `cgroup_mkdir(cgrp, path)`: before the new directory can be seen, so before anything is in it.
#[btf_tracepoint(function = "cgroup_mkdir")]
pub fn cgroup_made(ctx: BtfTracePointContext) -> i32 {
    cgroup::made(&ctx)
}

/// `xt_replace_table(table, num_counters, newinfo, error)`.
#[kprobe]
pub fn legacy_replace_call(ctx: ProbeContext) -> u32 {
    legacy::replace_call(&ctx)
}

/// Its return: a legacy iptables table was replaced.
#[kretprobe]
pub fn legacy_replaced(ctx: RetProbeContext) -> u32 {
    legacy::replaced(&ctx)
}

/// `ip_vs_{add,edit,del}_dest(svc, udest)`.
#[kprobe]
pub fn ipvs_destination_call(ctx: ProbeContext) -> u32 {
    ipvs::destination_call(ctx.arg(1).unwrap_or(0))
}

/// `ip_vs_unlink_service(svc, ..)`, `ip_vs_flush(ipvs, ..)` and their like.
#[kprobe]
pub fn ipvs_service_call(_ctx: ProbeContext) -> u32 {
    ipvs::service_call()
}

/// The return of any of them.
#[kretprobe]
pub fn ipvs_commit(ctx: RetProbeContext) -> u32 {
    ipvs::returned(&ctx)
}

/// `nf_tables_commit(net, skb)`: new rules take effect from here on.
#[kprobe]
pub fn nft_commit(ctx: ProbeContext) -> u32 {
    commit::begun(&ctx)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that this cannot be reached.
    loop {}
}

/// Licence of the object: helpers such as `bpf_probe_read_kernel` are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

//! Stages that start from a `struct sock`.

use aya_ebpf::{EbpfContext, helpers::bpf_get_current_task};
use observer_common::{Event, Ip, Layout, outcome, signal};

use crate::{
    cgroup,
    layout::offset,
    memory::{Address, argument, read, read_or_zero},
    report,
    task::fill_netns,
};

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const IPPROTO_TCP: u16 = 6;

// include/net/tcp_states.h; part of the kernel's user interface (struct tcp_info).
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_SYN_RECV: u32 = 3;
const TCP_TIME_WAIT: u32 = 6;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;

/// `inet_sock_set_state`: the hottest hook, so the states are compared before anything is read.
#[inline(always)]
pub fn state_changed(ctx: &impl EbpfContext, old: u32, new: u32) -> i32 {
    let signal = match (old, new) {
        (TCP_SYN_RECV, TCP_ESTABLISHED) => signal::PASSIVE_OPEN,
        (TCP_SYN_SENT, TCP_CLOSE) => signal::CONNECT_FAILED,
        // A child starts as a copy of its listener: LISTEN to SYN_RECV is no close.
        (TCP_LISTEN, TCP_CLOSE) => signal::LISTENER_CLOSED,
        (_, TCP_LISTEN) => signal::LISTENER_OPENED,
        _ => return 0,
    };
    let sk = argument(ctx, 0);
    // sk_protocol was a bit field's byte before Linux 5.6 and is a u16 since.
    if read::<u16>(sk, offset!(sk_protocol)) != Some(IPPROTO_TCP) {
        return 0;
    }
    let mut event = report::event(signal);
    fill(&mut event, sk);
    if signal == signal::PASSIVE_OPEN {
        if report::is_local_pod(&event.local_address) {
            let source = report::source_of(&event);
            if !report::is_probe(&event, source) {
                report::count(signal);
                report::count_arrival(ctx, &event, source, outcome::ACCEPTED);
            }
        }
        return 0;
    }
    event.cgroup_id = match signal {
        signal::LISTENER_OPENED | signal::LISTENER_CLOSED => listener_cgroup_id(sk),
        _ => cgroup_id(sk),
    };
    if signal == signal::CONNECT_FAILED {
        event.code = read_or_zero(sk, offset!(sk_err));
        report::count_errno(event.code);
    }
    report::send(ctx, &mut event);
    0
}

/// `tcp_receive_reset`.
#[inline(always)]
pub fn reset_received(ctx: &impl EbpfContext) -> i32 {
    let sk = argument(ctx, 0);
    let mut event = report::event(signal::RESET_RECEIVED);
    fill(&mut event, sk);
    event.cgroup_id = cgroup_id(sk);
    event.code = state(sk);
    report::send(ctx, &mut event);
    0
}

/// `inet_sk_error_report`: only while connecting; later errors have their own signals, and the
/// hook also fires with `sk_err` 0 on ordinary closes.
#[inline(always)]
pub fn error_reported(ctx: &impl EbpfContext) -> i32 {
    let sk = argument(ctx, 0);
    if state(sk) != TCP_SYN_SENT || read(sk, offset!(sk_protocol)) != Some(IPPROTO_TCP) {
        return 0;
    }
    let mut event = report::event(signal::CONNECT_ERROR);
    fill(&mut event, sk);
    event.cgroup_id = cgroup_id(sk);
    event.code = read_or_zero(sk, offset!(sk_err));
    report::send(ctx, &mut event);
    0
}

/// A RST that a socket sends.
#[inline(always)]
pub fn reset_sent(ctx: &impl EbpfContext, sk: Address, reason: u32) -> i32 {
    let mut event = report::event(signal::RESET_SENT);
    fill(&mut event, sk);
    let state = state(sk);
    // Mini sockets end before `sk_cgrp_data`.
    if state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV {
        event.cgroup_id = cgroup_id(sk);
    }
    event.code = reason;
    report::send(ctx, &mut event);
    0
}

/// Tuple and network namespace, from the part that full and mini sockets share.
#[inline(always)]
fn fill(event: &mut Event, sk: Address) {
    event.socket = sk;
    match read_or_zero::<u16>(sk, offset!(skc_family)) {
        AF_INET => {
            event.local_address = Ip::mapped(read_or_zero(sk, offset!(skc_rcv_saddr)));
            event.remote_address = Ip::mapped(read_or_zero(sk, offset!(skc_daddr)));
        }
        // Also right for IPv4-mapped peers; the IPv4 fields of a native IPv6 socket are junk.
        AF_INET6 => {
            event.local_address = read_or_zero(sk, offset!(skc_v6_rcv_saddr));
            event.remote_address = read_or_zero(sk, offset!(skc_v6_daddr));
        }
        _ => {}
    }
    event.remote_port = u16::from_be(read_or_zero(sk, offset!(skc_dport)));
    event.local_port = local_port(sk);
    fill_netns(event, read_or_zero(sk, offset!(skc_net)));
}

/// `skc_num` is 0 once the socket is closed; `inet_sport` stays, but only full sockets have it.
#[inline(always)]
fn local_port(sk: Address) -> u16 {
    match read_or_zero::<u16>(sk, offset!(skc_num)) {
        0 if state(sk) != TCP_TIME_WAIT && state(sk) != TCP_NEW_SYN_RECV => {
            u16::from_be(read_or_zero(sk, offset!(inet_sport)))
        }
        port => port,
    }
}

#[inline(always)]
fn state(sk: Address) -> u32 {
    u32::from(read_or_zero::<u8>(sk, offset!(skc_state)))
}

#[inline(always)]
fn cgroup_id(sk: Address) -> u64 {
    cgroup::id(read_or_zero(sk, offset!(sk_cgroup)))
}

/// A listener comes and goes in its process's system calls: where a socket has no cgroup that tells
/// pods, the process has.
#[inline(always)]
fn listener_cgroup_id(sk: Address) -> u64 {
    if offset!(sk_cgroup) != Layout::ABSENT {
        return cgroup_id(sk);
    }
    // SAFETY: a helper without arguments.
    cgroup::id(cgroup::of_task(unsafe { bpf_get_current_task() }))
}

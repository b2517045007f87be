//! Stages that start from a `struct sk_buff`.

use aya_ebpf::EbpfContext;
use observer_common::{Event, Ip, outcome, signal};

use crate::{
    layout::offset,
    memory::{Address, argument, read, read_or_zero},
    report, socket,
    task::fill_netns,
};

const ICMP_DEST_UNREACH: u32 = 3;
const IPPROTO_TCP: u8 = 6;
const TCP_FLAG_SYN: u8 = 0x02;
const TCP_FLAG_ACK: u8 = 0x10;

/// `tcp_send_reset`. A RST that answers a SYN is a refusal, whatever socket it met; else a socket
/// sent it (on its own, or in answer to a segment), or nobody was there.
#[inline(always)]
pub fn reset_sent(ctx: &impl EbpfContext, reason: u32) -> i32 {
    let (sk, skb) = (argument(ctx, 0), argument(ctx, 1));
    let flags = tcp_flags(skb);
    if flags.is_some_and(is_first_syn) {
        return refused(ctx, skb);
    }
    if sk != 0 {
        return socket::reset_sent(ctx, sk, reason);
    }
    let mut event = report::event(signal::STRAY_RESET);
    if fill(&mut event, skb) {
        event.code = reason;
        report::send(ctx, &mut event);
    }
    0
}

/// `icmp_send`.
#[inline(always)]
pub fn icmp_sent(ctx: &impl EbpfContext, kind: u32, code: u32) -> i32 {
    if kind != ICMP_DEST_UNREACH {
        return 0;
    }
    let mut event = report::event(signal::ICMP_UNREACHABLE);
    if fill(&mut event, argument(ctx, 0)) {
        event.code = code;
        report::send(ctx, &mut event);
    }
    0
}

/// `kfree_skb`: netfilter drops; and segments that met no socket, where `tcp_send_reset` does not
/// tell (before Linux 6.10; else the reason is absent from the layout).
#[inline(always)]
pub fn dropped(ctx: &impl EbpfContext, reason: u32) -> i32 {
    if reason == offset!(reason_netfilter_drop) {
        let mut event = report::event(signal::NETFILTER_DROP);
        if fill(&mut event, argument(ctx, 0)) {
            report::send(ctx, &mut event);
        }
    } else if reason == offset!(reason_no_socket) {
        let skb = argument(ctx, 0);
        if tcp_flags(skb).is_some_and(is_first_syn) {
            return refused(ctx, skb);
        }
        let mut event = report::event(signal::STRAY_RESET);
        if fill(&mut event, skb) {
            report::send(ctx, &mut event);
        }
    }
    0
}

#[inline(always)]
fn refused(ctx: &impl EbpfContext, skb: Address) -> i32 {
    let mut event = report::event(signal::REFUSED);
    if !fill(&mut event, skb) {
        return 0;
    }
    if report::is_local_pod(&event.local_address) {
        let source = report::source_of(&event);
        if report::is_probe(&event, source) {
            return 0;
        }
        report::count_arrival(ctx, &event, source, outcome::REFUSED);
        event.code = 1;
    }
    report::send(ctx, &mut event);
    0
}

#[inline(always)]
fn is_first_syn(flags: u8) -> bool {
    flags & (TCP_FLAG_SYN | TCP_FLAG_ACK) == TCP_FLAG_SYN
}

/// The receiver of the packet is `local`: it is the one that answered or was kept from answering.
/// False when the packet is not TCP over IPv4 or IPv6 without extension headers.
#[inline(always)]
fn fill(event: &mut Event, skb: Address) -> bool {
    let Some((network, transport)) = headers(skb) else { return false };
    if transport.ipv4 {
        event.remote_address = Ip::mapped(read_or_zero(network, 12));
        event.local_address = Ip::mapped(read_or_zero(network, 16));
    } else {
        event.remote_address = read_or_zero(network, 8);
        event.local_address = read_or_zero(network, 24);
    }
    event.remote_port = u16::from_be(read_or_zero(transport.at, 0));
    event.local_port = u16::from_be(read_or_zero(transport.at, 2));
    let dev: Address = read_or_zero(skb, offset!(skb_dev));
    fill_netns(event, read_or_zero(dev, offset!(dev_net)));
    true
}

#[inline(always)]
fn tcp_flags(skb: Address) -> Option<u8> {
    let (_, transport) = headers(skb)?;
    read(transport.at, 13)
}

struct Transport {
    at: Address,
    ipv4: bool,
}

/// The IP header and the TCP header behind it. The transport offset of the `sk_buff` is not used:
/// it is unset on the forward path.
#[inline(always)]
fn headers(skb: Address) -> Option<(Address, Transport)> {
    let head: Address = read(skb, offset!(skb_head))?;
    let network_offset: u16 = read(skb, offset!(skb_network_header))?;
    let network = head + u64::from(network_offset);
    let first: u8 = read(network, 0)?;
    let (protocol_offset, length, ipv4) = match first >> 4 {
        4 => (9, u64::from(first & 0x0f) * 4, true),
        6 => (6, 40, false),
        _ => return None,
    };
    if read::<u8>(network, protocol_offset)? != IPPROTO_TCP {
        return None;
    }
    Some((network, Transport { at: network + length, ipv4 }))
}

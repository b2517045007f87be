//! How soon after a commit it is known, and that the stated uncertainty covers it.
//!
//! The transaction is written to the kernel directly, so that the moments before and after the
//! system call, between which the commit happened, are known.

use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use observer::clock;
use observer::dataplane::{Settings, Update, run};
use observer::facts::{BackendStep, BootNs};
use tokio::sync::mpsc;

use super::namespace::{in_namespace, nft, runtime};

const COMMITS: u32 = 200;
/// `NFNL_SUBSYS_NFTABLES`, with `NFT_MSG_NEWSETELEM` and `NFT_MSG_DELSETELEM`
const ADD: u16 = 0x0a0c;
const DELETE: u16 = 0x0a0e;

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("a small attribute");
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + body.len()).expect("a small message");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// A transaction that adds or deletes the one element of the map `m`: backend 10.0.0.1:8080.
fn transaction(kind: u16) -> Vec<u8> {
    let key = attribute(1, &attribute(1, &[0; 4]));
    let data = attribute(2, &attribute(1, &[10, 0, 0, 1, 0x1f, 0x90, 0, 0]));
    let element = if kind == ADD { [key, data].concat() } else { key };
    let list = attribute(3, &attribute(1, &element));
    let body = [attribute(1, b"t\0"), attribute(2, b"m\0"), list].concat();
    [
        message(16, 1, 0, 10, &[]),
        message(kind, 1 | 4 | 0x400, 2, 0, &body),
        message(17, 1, 0, 10, &[]),
    ]
    .concat()
}

fn percentiles(mut values: Vec<i64>) -> String {
    values.sort_unstable();
    let at = |percent: usize| values[(values.len() - 1) * percent / 100] / 1000;
    format!("median {} µs, p99 {} µs, max {} µs", at(50), at(99), at(100))
}

fn nanos(from: BootNs, until: BootNs) -> i64 {
    until.0.cast_signed() - from.0.cast_signed()
}

#[test]
fn a_commit_lies_within_the_uncertainty_stated() {
    in_namespace(|| {
        nft("table ip t {
                map m { type mark : ipv4_addr . inet_service; }
                chain c {
                    type nat hook prerouting priority 0;
                    meta l4proto tcp dnat ip to meta mark map @m
                }
            }");
        let (_legacy, signals) = mpsc::channel(1);
        let (sender, mut updates) = mpsc::channel(1024);
        std::thread::spawn(move || {
            runtime().block_on(run(Settings::default(), signals, sender)).expect("follow");
        });
        assert!(matches!(updates.blocking_recv(), Some(Update::Present { .. })));
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .expect("open a netlink socket");
        let (mut since_before, mut since_after, mut outside) = (Vec::new(), Vec::new(), 0);
        for turn in 0..COMMITS {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let (kind, step) =
                [(ADD, BackendStep::Added), (DELETE, BackendStep::Removed)][turn as usize % 2];
            let before = clock::now();
            send(socket.as_raw_fd(), &transaction(kind), MsgFlags::empty()).expect("commit");
            let after = clock::now();
            let mut answer = [0; 256];
            recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).expect("an answer");
            assert_eq!(answer[16..20], [0; 4], "the kernel took the transaction");
            let change = loop {
                if let Update::Change(change) = updates.blocking_recv().expect("it still runs") {
                    break change;
                }
            };
            assert_eq!(change.step, step);
            since_before.push(nanos(before, change.at));
            since_after.push(nanos(after, change.at));
            let earliest = change.at.minus(change.uncertainty);
            outside += u32::from(change.at < before || earliest > after);
        }
        println!("received after the call began: {}", percentiles(since_before));
        println!("received after the call ended: {}", percentiles(since_after));
        assert_eq!(outside, 0, "commits outside the span stated");
    });
}

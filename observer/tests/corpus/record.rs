//! Makes the binary part of the corpus anew, from the recorded rules and this machine's kernel:
//! `cargo test -p observer --test corpus -- --ignored remake`. Needs root, nftables and iptables.
//!
//! The JSON, the names, Cilium's maps and IPVS's answers in the corpus are written by hand, in the
//! form of the API server's, the agents', the kubelet's, Cilium's and the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use observer::dataplane::nft::Subscription;
use observer::dataplane::{Counters, Family};
use observer::fuzzing::{self, legacy_table};

use namespace::{captured, dump, feed, in_namespace, next, nft};

#[expect(dead_code, reason = "the dataplane's tests use the rest")]
#[path = "../dataplane/namespace.rs"]
mod namespace;

/// One sync of kube-proxy for one Service with an IPv6 endpoint.
const IP6TABLES: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-SEP-A - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d fd01::1/128 -p tcp -m tcp --dport 80 -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -m comment --comment \"default/web:http\" -m tcp -j DNAT \
--to-destination [fd00::12]:8080
COMMIT
";
/// Expressions of every kind that `nft` 1.0.6 can write without modules that not every kernel has.
const FOREIGN: &str = "
table inet foreign {
    set seen { type ipv4_addr; flags dynamic, timeout; timeout 60s; }
    map ports { type inet_service : ipv4_addr . inet_service; flags interval;
        elements = { 1-9 : 10.9.9.9 . 90, 80 : 10.9.9.8 . 80 } }
    counter hits { }
    chain transit {
        type filter hook forward priority 0;
        ct state established,related accept
        ip saddr @seen counter log prefix \"x\" limit rate 1/second drop
        update @seen { ip saddr timeout 10s } counter name hits
        jhash ip saddr mod 2 vmap { 0 : accept, 1 : drop }
    }
    chain entry {
        type nat hook prerouting priority 0;
        fib daddr type local ip protocol tcp redirect to :9
        meta l4proto tcp dnat ip to 10.9.9.1:80 comment \"default/web:http\"
        dnat ip to tcp dport map @ports
        meta l4proto udp dnat ip6 to [fd00::1]:53
    }
}
";

fn write(parser: &str, name: &str, bytes: &[u8]) {
    let folder = super::fuzz().join("corpus").join(parser);
    fs::create_dir_all(&folder).expect("the parser's folder");
    fs::write(folder.join(name), bytes).expect("write a file of the corpus");
}

#[test]
#[ignore = "writes into observer/fuzz/corpus; run it when the captures or the tools change"]
fn remake_the_corpus() {
    for (name, load) in [
        ("nftables-1.36", nftables as fn(&str)),
        ("nftables-1.35", nftables),
        ("iptables-nft", |rules| feed(&["iptables-nft-restore"], rules)),
    ] {
        let extension = if name.starts_with("nft") { "nft" } else { "txt" };
        in_namespace(move || {
            let mut subscription = Subscription::open(16 << 20).expect("subscribe");
            load(&captured(&format!("{name}/0-before.{extension}")));
            write("nft_dump", name, &dump_answers());
            // Removes what the first has.
            load(&captured(&format!("{name}/6-none.{extension}")));
            write("nft_notifications", name, &notifications(&mut subscription));
        });
    }
    in_namespace(|| {
        nft(FOREIGN);
        write("nft_dump", "foreign", &dump_answers());
        feed(&["iptables-legacy-restore"], &captured("iptables-legacy/0-before.txt"));
        write("legacy_table", "ipv4", &legacy(4, Family::V4));
        feed(&["ip6tables-legacy-restore"], IP6TABLES);
        write("legacy_table", "ipv6", &legacy(6, Family::V6));
    });
    write("kernel_btf", "needed-types", &needed_types());
    // Any 88 bytes are a record once the signal is known: one per family and direction.
    write("kernel_event", "refused", &record(4, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]));
    write("kernel_event", "connect-failed-ipv6", &record(0, [0xfd; 12]));
    write("kernel_event", "unknown-signal", &record(99, [0; 12]));
}

fn nftables(rules: &str) {
    nft(&format!("flush ruleset\n{rules}"));
}

fn notifications(subscription: &mut Subscription) -> Vec<u8> {
    let counters = Counters::default();
    let last = dump(&counters).generation();
    let mut bytes = Vec::new();
    loop {
        let datagram = next(subscription).datagram.expect("nothing is lost");
        bytes.extend(&datagram);
        if fuzzing::commits(&datagram).iter().any(|(number, _)| *number == last) {
            return bytes;
        }
    }
}

/// The kernel's answers to the requests of a dump, numbered from 1.
fn dump_answers() -> Vec<u8> {
    /// `NFT_MSG_GETTABLE`, `_GETCHAIN`, `_GETSET`, `_GETRULE`, `_GETSETELEM`
    const EVERYTHING: [u8; 4] = [1, 4, 10, 7];
    const ELEMENTS: u8 = 13;
    let follow = dump(&Counters::default());
    let mut requests: Vec<_> = EVERYTHING.map(|kind| (kind, 0, Vec::new())).into();
    for (id, table) in follow.ruleset().tables() {
        // In the same order in every run.
        for map in table.maps.keys().collect::<BTreeSet<_>>() {
            let body = [attribute(1, &id.name), attribute(2, map)].concat();
            requests.push((ELEMENTS, id.family.number(), body));
        }
    }
    let answers = (1..).zip(requests);
    answers
        .flat_map(|(sequence, (kind, family, body))| ask(sequence, kind, family, &body))
        .collect()
}

fn attribute(kind: u16, name: &str) -> Vec<u8> {
    let length = u16::try_from(name.len() + 5).expect("a short name");
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Everything the kernel answers to one request.
fn ask(sequence: u32, kind: u8, family: u8, body: &[u8]) -> Vec<u8> {
    /// `NFNL_SUBSYS_NFTABLES`; `NLM_F_REQUEST | NLM_F_DUMP`; `NLMSG_DONE`
    const SUBSYSTEM: u8 = 10;
    const DUMP: u16 = 0x301;
    const DONE: u16 = 3;
    let asks = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .expect("a netlink socket");
    let mut request = u32::try_from(20 + body.len()).expect("short").to_ne_bytes().to_vec();
    request.extend([kind, SUBSYSTEM]);
    request.extend(DUMP.to_ne_bytes());
    request.extend(sequence.to_ne_bytes());
    request.extend([0; 4]);
    request.extend([family, 0, 0, 0]);
    request.extend(body);
    send(asks.as_raw_fd(), &request, MsgFlags::empty()).expect("ask");
    let (mut answer, mut at) = (Vec::new(), 0);
    loop {
        let mut buffer = vec![0; 1 << 16];
        let length = recv(asks.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("an answer");
        answer.extend(&buffer[..length]);
        while at < answer.len() {
            if half(&answer, at + 4) == DONE {
                return answer;
            }
            at += word(&answer, at).next_multiple_of(4);
        }
    }
}

fn legacy(version: u8, family: Family) -> Vec<u8> {
    let (info, entries) = legacy_table(family).expect("the legacy nat table");
    [&[version][..], &info, &entries].concat()
}

/// A record of the ring buffer whose remote address begins like this.
fn record(signal: u32, prefix: [u8; 12]) -> Vec<u8> {
    let mut bytes: Vec<u8> = (1..=4_u64).flat_map(u64::to_ne_bytes).collect();
    bytes.extend([[0_u8; 10].as_slice(), &[0xff, 0xff, 10, 0, 0, 7]].concat());
    bytes.extend([prefix.as_slice(), &[198, 51, 100, 7]].concat());
    bytes.extend([signal, 1, 2, 3, 4].iter().flat_map(|word| word.to_ne_bytes()));
    bytes.extend([8080_u16, 40000].iter().flat_map(|port| port.to_ne_bytes()));
    bytes
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn word(bytes: &[u8], at: usize) -> usize {
    let word = u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    usize::try_from(word).expect("32 bits")
}

/// The running kernel's types that `layout` looks up, without what their pointers lead to: some
/// kilobytes of its five million bytes.
fn needed_types() -> Vec<u8> {
    const WANTED: [&str; 8] = [
        "btf_trace_inet_sock_set_state",
        "kernfs_node",
        "nsproxy",
        "pt_regs",
        "sk_buff",
        "skb_drop_reason",
        "sock_common",
        "possible_net_t",
    ];
    let whole = Whole::read();
    let mut part =
        Part { whole: &whole, ids: BTreeMap::new(), types: Vec::new(), strings: vec![0] };
    for id in 1..whole.types.len() {
        let name = whole.name(word(&whole.bytes, whole.types[id]));
        // Not the forward declarations (`BTF_KIND_FWD` 7).
        if WANTED.iter().any(|wanted| wanted.as_bytes() == name) && whole.kind(id) != 7 {
            part.take(id);
        }
    }
    part.finish()
}

/// The kernel's BTF, and where its types and strings are.
struct Whole {
    bytes: Vec<u8>,
    strings: usize,
    types: Vec<usize>,
}

impl Whole {
    fn read() -> Self {
        let bytes = fs::read("/sys/kernel/btf/vmlinux").expect("the kernel's BTF");
        let start = word(&bytes, 4);
        let (first, strings) = (start + word(&bytes, 8), start + word(&bytes, 16));
        let (end, mut at) = (first + word(&bytes, 12), first);
        let mut whole = Self { bytes, strings, types: vec![0] };
        while at < end {
            whole.types.push(at);
            at += whole.words(whole.types.len() - 1) * 4;
        }
        whole
    }

    fn kind(&self, id: usize) -> usize {
        word(&self.bytes, self.types[id] + 4) >> 24 & 0x1f
    }

    fn members(&self, id: usize) -> usize {
        word(&self.bytes, self.types[id] + 4) & 0xffff
    }

    /// How many words a type is long.
    fn words(&self, id: usize) -> usize {
        3 + match self.kind(id) {
            // INT, VAR, DECL_TAG; ARRAY; STRUCT, UNION, DATASEC, ENUM64; ENUM, FUNC_PROTO
            1 | 14 | 17 => 1,
            3 => 3,
            4 | 5 | 15 | 19 => 3 * self.members(id),
            6 | 13 => 2 * self.members(id),
            _ => 0,
        }
    }

    fn name(&self, at: usize) -> &[u8] {
        self.bytes[self.strings + at..].split(|byte| *byte == 0).next().expect("a string")
    }
}

/// Some of its types under new numbers.
struct Part<'w> {
    whole: &'w Whole,
    /// New numbers by old.
    ids: BTreeMap<usize, usize>,
    types: Vec<Vec<u32>>,
    strings: Vec<u8>,
}

impl Part<'_> {
    /// The new number of a type, which is copied with what it holds by value.
    fn take(&mut self, id: usize) -> usize {
        if id == 0 {
            return 0;
        }
        if let Some(known) = self.ids.get(&id) {
            return *known;
        }
        let new = self.types.len() + 1;
        self.ids.insert(id, new);
        self.types.push(Vec::new());
        let from = self.whole.types[id];
        let old: Vec<usize> =
            (0..self.whole.words(id)).map(|at| word(&self.whole.bytes, from + at * 4)).collect();
        let mut words = old.clone();
        let kind = self.whole.kind(id);
        let (names, types): (Vec<usize>, Vec<usize>) = match kind {
            // PTR: only a prototype is worth following.
            2 if old[2] == 0 || self.whole.kind(old[2]) != 13 => {
                words[2] = 0;
                (vec![0], vec![])
            }
            3 => (vec![0], vec![3, 4]),
            4 | 5 => ((0..old.len()).step_by(3).collect(), (4..old.len()).step_by(3).collect()),
            6 => ([0].into_iter().chain((3..old.len()).step_by(2)).collect(), vec![]),
            13 => (
                [0].into_iter().chain((3..old.len()).step_by(2)).collect(),
                [2].into_iter().chain((4..old.len()).step_by(2)).collect(),
            ),
            1 | 7 | 16 => (vec![0], vec![]),
            19 => ((0..old.len()).step_by(3).collect(), vec![]),
            _ => (vec![0], vec![2]),
        };
        for at in names {
            words[at] = self.string(old[at]);
        }
        for at in types {
            words[at] = self.take(old[at]);
        }
        self.types[new - 1] =
            words.into_iter().map(|word| u32::try_from(word).expect("32 bits")).collect();
        new
    }

    fn string(&mut self, at: usize) -> usize {
        if at == 0 {
            return 0;
        }
        let new = self.strings.len();
        self.strings.extend(self.whole.name(at));
        self.strings.push(0);
        new
    }

    fn finish(self) -> Vec<u8> {
        let types: Vec<u8> =
            self.types.concat().iter().flat_map(|word| word.to_ne_bytes()).collect();
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("small");
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length(&types), length(&types), length(&self.strings)] {
            bytes.extend(word.to_ne_bytes());
        }
        [bytes, types, self.strings].concat()
    }
}

//! The wire contract between the kernel programs and the daemon.
//!
//! Every type is `repr(C)`, fixed width and free of implicit padding, so that both sides see the
//! same bytes; sizes and offsets are asserted below at compile time. There is no logic here.
//!
//! Addresses are [`Ip`]s, IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2). Ports are in host order.
//! Times are nanoseconds of `CLOCK_BOOTTIME` (`bpf_ktime_get_boot_ns`, Linux 5.8).

#![no_std]

use core::mem::{offset_of, size_of};

/// What a hook saw. The value is the index of [`SignalCounts`] in the map `SIGNAL_TO_COUNTS`.
pub mod signal {
    /// A socket left `SYN_SENT` for `CLOSE`: a connect failed. `code` is `sk_err` (an errno, or 0
    /// when the kernel kept the error as soft).
    pub const CONNECT_FAILED: u32 = 0;
    /// A passive open reached `ESTABLISHED` at a local pod. Counted, never sent as an event.
    pub const PASSIVE_OPEN: u32 = 1;
    /// A socket entered `LISTEN`.
    pub const LISTENER_OPENED: u32 = 2;
    /// A socket left `LISTEN`.
    pub const LISTENER_CLOSED: u32 = 3;
    /// A RST answered a SYN that met no socket: the peer sees "connection refused". `code` is 1
    /// when it was counted for a local pod.
    pub const REFUSED: u32 = 4;
    /// A RST answered any other segment that met no socket.
    pub const STRAY_RESET: u32 = 5;
    /// A RST left an existing socket. `code` is the kernel's `sk_rst_reason` (Linux 6.10), else 0.
    pub const RESET_SENT: u32 = 6;
    /// A RST reached a socket. `code` is the socket's TCP state.
    pub const RESET_RECEIVED: u32 = 7;
    /// A socket in `SYN_SENT` was told of an error, by ICMP for instance. `code` is `sk_err`.
    pub const CONNECT_ERROR: u32 = 8;
    /// This node sent ICMP "destination unreachable". `code` is the ICMP code.
    pub const ICMP_UNREACHABLE: u32 = 9;
    /// A TCP segment was dropped by netfilter.
    pub const NETFILTER_DROP: u32 = 10;
    /// SIGTERM or SIGKILL was sent to a process. `code` is the signal number.
    pub const PROCESS_SIGNALLED: u32 = 11;
    /// A process (thread group leader) ended.
    pub const PROCESS_EXITED: u32 = 12;
    /// The kernel's out-of-memory killer chose a process.
    pub const OOM_KILLED: u32 = 13;
    /// The legacy iptables table `nat` was replaced. `code` is the protocol family, 4 or 6.
    pub const LEGACY_COMMIT: u32 = 14;
    /// A call that changes the table of IPVS returned. `code` is how long it took, in ns, at most
    /// [`u32::MAX`], or 0 when that is not known; the local end is the only destination that it can
    /// have changed, zero when it may be any.
    pub const IPVS_COMMIT: u32 = 15;
    /// Elements of a map in `WATCHED_MAPS` were changed by a `bpf(2)` call. Counted each time; sent
    /// for the first of each map in [`super::MAP_COMMIT_WINDOW_NS`]. `code` is the map's id.
    pub const MAP_COMMIT: u32 = 16;
    /// As [`LEGACY_COMMIT`], where the kernel's own function is hooked: `code` is how long it took,
    /// as in [`IPVS_COMMIT`], and the protocol family is not known.
    pub const LEGACY_CALL: u32 = 17;
    /// A directory was made in the cgroup hierarchy that tells pods. Sent as a
    /// [`CgroupMade`](super::CgroupMade), every time.
    pub const CGROUP_MADE: u32 = 18;
    /// How many signals there are.
    pub const COUNT: u32 = 19;
}

/// After a [`signal::MAP_COMMIT`] of a map is sent, none is sent for this long, in ns: what changes
/// a Service's entries one by one makes thousands of calls in a row, and 1 ms is far below what
/// matters to a preStop sleep.
pub const MAP_COMMIT_WINDOW_NS: u64 = 1_000_000;

/// Which end started the connection that an [`ArrivalKey`] counts, seen from the pod's node.
pub mod source {
    /// No configured range contains the address.
    pub const UNCLASSIFIED: u8 = 0;
    /// A pod of this node.
    pub const SAME_NODE: u8 = 1;
    /// Inside the cluster's ranges.
    pub const CLUSTER: u8 = 2;
    /// Outside the cluster's ranges: a load balancer, for instance.
    pub const EXTERNAL: u8 = 3;
    /// The node itself: the kubelet's probes, and connections that the node masquerades.
    pub const NODE: u8 = 4;
}

/// What became of a new connection attempt at a pod.
pub mod outcome {
    /// The handshake completed.
    pub const ACCEPTED: u8 = 0;
    /// A RST answered the SYN.
    pub const REFUSED: u8 = 1;
}

/// The 16 bytes of an IPv6 address, in network order in memory.
///
/// Two words rather than a byte array: the BPF back end turns every copy of a byte array into a
/// loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Ip {
    /// Bytes 0 to 7.
    pub first: u64,
    /// Bytes 8 to 15.
    pub last: u64,
}

impl Ip {
    /// `::ffff:a.b.c.d`, from the four bytes as they lie in memory.
    #[must_use]
    #[inline]
    pub const fn mapped(v4_be: u32) -> Self {
        let last = 0xffff_0000_0000 | u32::from_be(v4_be) as u64;
        Self { first: 0, last: last.to_be() }
    }

    /// From the 16 bytes in network order.
    #[must_use]
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        let whole = u128::from_be_bytes(octets);
        #[expect(clippy::cast_possible_truncation, reason = "the two halves of the 16 bytes")]
        Self { first: ((whole >> 64) as u64).to_be(), last: (whole as u64).to_be() }
    }

    /// The 16 bytes in network order.
    #[must_use]
    pub const fn octets(self) -> [u8; 16] {
        let (first, last) = (u64::from_be(self.first), u64::from_be(self.last));
        (((first as u128) << 64) | last as u128).to_be_bytes()
    }
}

/// One record of the ring buffer, of two kinds: the other is [`CgroupMade`].
///
/// `local` is the end the hook ran for: the listener's, the pod's that refused, the caller's
/// whose connect failed. A field that the hook cannot know is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// `CLOCK_BOOTTIME` when the hook ran, in ns.
    pub boot_ns: u64,
    /// The network namespace's cookie, never reused while the machine runs (Linux 5.10).
    pub netns_cookie: u64,
    /// The cgroup of the socket or task (the inode of its directory), in the hierarchy that tells
    /// pods.
    pub cgroup_id: u64,
    /// The kernel address of the socket: it joins events of one socket and is never shown.
    pub socket: u64,
    /// Address of the local end.
    pub local_address: Ip,
    /// Address of the remote end.
    pub remote_address: Ip,
    /// One of [`signal`].
    pub signal: u32,
    /// What `signal` says it is.
    pub code: u32,
    /// Inode number of the network namespace, as `/proc/PID/ns/net` shows it.
    pub netns_inum: u32,
    /// Thread group id in the root pid namespace, for process signals.
    pub pid: u32,
    /// Events with the same budget key that were counted but not sent since the last one sent.
    pub suppressed: u32,
    /// Port of the local end.
    pub local_port: u16,
    /// Port of the remote end.
    pub remote_port: u16,
}

/// The other record of the ring buffer, told from an [`Event`] by its size: a new cgroup, before
/// anything can be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CgroupMade {
    /// The inode of its directory.
    pub id: u64,
    /// Its parent's.
    pub parent: u64,
    /// The name of its directory, ended by a zero byte; a longer one is cut. The kubelet's names
    /// for pods are at most 80 bytes long.
    pub name: [u8; 128],
}

/// What one CPU counted for one signal. Cumulative; never reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SignalCounts {
    /// How often it happened.
    pub seen: u64,
    /// Details withheld because their key's budget was spent.
    pub suppressed: u64,
    /// Details lost because the ring buffer was full.
    pub ring_full: u64,
    /// Happenings that a full map could not count per key.
    pub map_full: u64,
}

/// Key of the set `PROBED_PORTS`: a pod's port that the kubelet probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ProbedPort {
    /// The pod's address.
    pub address: Ip,
    /// The pod's port.
    pub port: u32,
    /// Always zero.
    pub reserved: u32,
}

/// Key of the map `ARRIVAL_TO_COUNT`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ArrivalKey {
    /// The pod's address.
    pub address: Ip,
    /// The pod's network namespace, which tells two pods apart that had the same address.
    pub netns_cookie: u64,
    /// The pod's port.
    pub port: u16,
    /// One of [`outcome`].
    pub outcome: u8,
    /// One of [`source`].
    pub source: u8,
    /// Always zero.
    pub reserved: u32,
}

/// What one CPU counted for one [`ArrivalKey`]. Cumulative; never reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ArrivalCount {
    /// How many.
    pub count: u64,
    /// `CLOCK_BOOTTIME` of the latest, in ns.
    pub last_boot_ns: u64,
}

/// What the daemon tells the programs before they load: the running kernel's layout, from its BTF.
///
/// An offset is in bytes; [`Layout::ABSENT`] marks a field this kernel lacks, and every program
/// that needs it is then left unattached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Layout {
    /// `sock_common.skc_family`
    pub skc_family: u32,
    /// `sock_common.skc_state`
    pub skc_state: u32,
    /// `sock_common.skc_dport`
    pub skc_dport: u32,
    /// `sock_common.skc_num`
    pub skc_num: u32,
    /// `sock_common.skc_daddr`
    pub skc_daddr: u32,
    /// `sock_common.skc_rcv_saddr`
    pub skc_rcv_saddr: u32,
    /// `sock_common.skc_v6_daddr`
    pub skc_v6_daddr: u32,
    /// `sock_common.skc_v6_rcv_saddr`
    pub skc_v6_rcv_saddr: u32,
    /// `sock_common.skc_net`
    pub skc_net: u32,
    /// `sock.sk_err`
    pub sk_err: u32,
    /// `sock.sk_protocol`
    pub sk_protocol: u32,
    /// `sock.sk_cgrp_data.cgroup` (Linux 5.15; before, a tagged word)
    pub sk_cgroup: u32,
    /// `inet_sock.inet_sport`
    pub inet_sport: u32,
    /// `net.ns.inum`
    pub net_inum: u32,
    /// `net.net_cookie`
    pub net_cookie: u32,
    /// `net_device.nd_net`
    pub dev_net: u32,
    /// `sk_buff.dev`
    pub skb_dev: u32,
    /// `sk_buff.head`
    pub skb_head: u32,
    /// `sk_buff.network_header`
    pub skb_network_header: u32,
    /// `task_struct.tgid`
    pub task_tgid: u32,
    /// `task_struct.pid`
    pub task_pid: u32,
    /// `task_struct.nsproxy`
    pub task_nsproxy: u32,
    /// `task_struct.cgroups`
    pub task_cgroups: u32,
    /// `task_struct.files`
    pub task_files: u32,
    /// `files_struct.fdt`
    pub files_fdt: u32,
    /// `fdtable.max_fds`
    pub fdt_max_fds: u32,
    /// `fdtable.fd`
    pub fdt_fd: u32,
    /// `file.private_data`
    pub file_private_data: u32,
    /// `bpf_map.id`
    pub map_id: u32,
    /// `nsproxy.net_ns`
    pub nsproxy_net: u32,
    /// `css_set.dfl_cgrp`, or the element of `css_set.subsys` of a cgroup v1 controller
    pub css_set_cgroup: u32,
    /// `cgroup_subsys_state.cgroup`, where the above is such an element; absent otherwise
    pub css_cgroup: u32,
    /// `cgroup.root`
    pub cgroup_root: u32,
    /// `cgroup_root.hierarchy_id`
    pub root_hierarchy_id: u32,
    /// `cgroup.kn`
    pub cgroup_kn: u32,
    /// `kernfs_node.id`
    pub kernfs_id: u32,
    /// `kernfs_node.parent` (`__parent` since Linux 6.15)
    pub kernfs_parent: u32,
    /// `kernfs_node.name`
    pub kernfs_name: u32,
    /// `pt_regs.orig_ax` (x86-64)
    pub regs_nr: u32,
    /// `pt_regs.di`: the first argument of a system call (x86-64)
    pub regs_arg0: u32,
    /// `pt_regs.si`: the second argument of a system call (x86-64)
    pub regs_arg1: u32,
    /// `pt_regs.dx`: the third argument of a system call (x86-64)
    pub regs_arg2: u32,
    /// `pt_regs.r10`: the fourth argument of a system call (x86-64)
    pub regs_arg3: u32,
    /// `SKB_DROP_REASON_NETFILTER_DROP`
    pub reason_netfilter_drop: u32,
    /// `SKB_DROP_REASON_NO_SOCKET`, or absent when `tcp_send_reset` tells instead (Linux 6.10).
    pub reason_no_socket: u32,
    /// Inode number of the daemon's own network namespace: the node's.
    pub own_netns_inum: u32,
    /// Number of the cgroup hierarchy that tells pods; 0 is cgroup v2.
    pub hierarchy_id: u32,
}

impl Layout {
    /// Marks a field that the running kernel does not have.
    pub const ABSENT: u32 = u32::MAX;
}

const _: () = {
    assert!(size_of::<Event>() == 88);
    assert!(offset_of!(Event, local_address) == 32);
    assert!(offset_of!(Event, signal) == 64);
    assert!(offset_of!(Event, suppressed) == 80);
    assert!(offset_of!(Event, remote_port) == 86);
    assert!(size_of::<CgroupMade>() == 144);
    assert!(offset_of!(CgroupMade, name) == 16);
    assert!(size_of::<SignalCounts>() == 32);
    assert!(size_of::<ProbedPort>() == 24);
    assert!(size_of::<ArrivalKey>() == 32);
    assert!(offset_of!(ArrivalKey, port) == 24);
    assert!(size_of::<ArrivalCount>() == 16);
    assert!(size_of::<Layout>() == 47 * 4);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for plain bytes is an unsafe trait")]
mod user {
    use super::{ArrivalCount, ArrivalKey, Event, Ip, Layout, ProbedPort, SignalCounts};

    // SAFETY: `repr(C)`, integers only, no padding (asserted above).
    unsafe impl aya::Pod for Event {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Ip {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbedPort {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SignalCounts {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ArrivalKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ArrivalCount {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Layout {}
}

#[cfg(test)]
mod tests {
    use super::Ip;

    #[test]
    fn addresses_keep_their_bytes_in_network_order() {
        let octets = [0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(Ip::from_octets(octets).octets(), octets);
        let v4 = u32::from_ne_bytes([198, 51, 100, 7]);
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 7];
        assert_eq!(Ip::mapped(v4).octets(), mapped);
        assert_eq!(Ip::mapped(v4), Ip::from_octets(mapped));
    }
}

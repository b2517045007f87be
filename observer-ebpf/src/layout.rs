//! The running kernel's structure layout, resolved by the daemon from BTF before the load.

use observer_common::Layout;

/// Overwritten by the daemon (`.rodata` is frozen at load, so the verifier sees constants).
#[unsafe(no_mangle)]
pub static LAYOUT: Layout = ABSENT;

/// Reads one field of [`LAYOUT`]. Volatile, or the compiler would fold in the placeholder.
macro_rules! offset {
    ($field:ident) => {
        // SAFETY: a valid, aligned static that nothing writes after the load.
        unsafe { core::ptr::read_volatile(&raw const $crate::layout::LAYOUT.$field) }
    };
}
pub(crate) use offset;

const ABSENT: Layout = Layout {
    skc_family: Layout::ABSENT,
    skc_state: Layout::ABSENT,
    skc_dport: Layout::ABSENT,
    skc_num: Layout::ABSENT,
    skc_daddr: Layout::ABSENT,
    skc_rcv_saddr: Layout::ABSENT,
    skc_v6_daddr: Layout::ABSENT,
    skc_v6_rcv_saddr: Layout::ABSENT,
    skc_net: Layout::ABSENT,
    sk_err: Layout::ABSENT,
    sk_protocol: Layout::ABSENT,
    sk_cgroup: Layout::ABSENT,
    inet_sport: Layout::ABSENT,
    net_inum: Layout::ABSENT,
    net_cookie: Layout::ABSENT,
    dev_net: Layout::ABSENT,
    skb_dev: Layout::ABSENT,
    skb_head: Layout::ABSENT,
    skb_network_header: Layout::ABSENT,
    task_tgid: Layout::ABSENT,
    task_pid: Layout::ABSENT,
    task_nsproxy: Layout::ABSENT,
    task_cgroups: Layout::ABSENT,
    task_files: Layout::ABSENT,
    files_fdt: Layout::ABSENT,
    fdt_max_fds: Layout::ABSENT,
    fdt_fd: Layout::ABSENT,
    file_private_data: Layout::ABSENT,
    map_id: Layout::ABSENT,
    nsproxy_net: Layout::ABSENT,
    css_set_cgroup: Layout::ABSENT,
    css_cgroup: Layout::ABSENT,
    cgroup_root: Layout::ABSENT,
    root_hierarchy_id: Layout::ABSENT,
    cgroup_kn: Layout::ABSENT,
    kernfs_id: Layout::ABSENT,
    kernfs_parent: Layout::ABSENT,
    kernfs_name: Layout::ABSENT,
    regs_nr: Layout::ABSENT,
    regs_arg0: Layout::ABSENT,
    regs_arg1: Layout::ABSENT,
    regs_arg2: Layout::ABSENT,
    regs_arg3: Layout::ABSENT,
    reason_netfilter_drop: Layout::ABSENT,
    reason_no_socket: Layout::ABSENT,
    own_netns_inum: Layout::ABSENT,
    hierarchy_id: Layout::ABSENT,
};

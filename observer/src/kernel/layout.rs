//! What the kernel programs must know of the running kernel, from its BTF.

use anyhow::Context as _;
use observer_common::Layout;

use super::btf::Btf;
use super::cgroups::Controller;

/// The layout, and the fields this kernel lacks, by their kernel names.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the programs are told.
    pub layout: Layout,
    /// `struct.field` or `enum.ENUMERATOR` of everything absent.
    pub missing: Vec<String>,
}

/// Bytes of a pointer.
const POINTER_BYTES: u32 = 8;

/// Resolves every offset and value. `own_netns_inum` is the node's network namespace. Cgroups are
/// those of version 2.
#[must_use]
pub fn resolve(btf: &Btf, own_netns_inum: u32) -> Resolved {
    let mut missing = Vec::new();
    let mut note = |found: Option<u32>, scope: &str, name: &str| {
        found.unwrap_or_else(|| {
            missing.push(format!("{scope}.{name}"));
            Layout::ABSENT
        })
    };
    let mut field = |scope: &str, path: &str| note(btf.field_offset(scope, path), scope, path);
    let mut layout = Layout {
        skc_family: field("sock_common", "skc_family"),
        skc_state: field("sock_common", "skc_state"),
        skc_dport: field("sock_common", "skc_dport"),
        skc_num: field("sock_common", "skc_num"),
        skc_daddr: field("sock_common", "skc_daddr"),
        skc_rcv_saddr: field("sock_common", "skc_rcv_saddr"),
        skc_v6_daddr: field("sock_common", "skc_v6_daddr"),
        skc_v6_rcv_saddr: field("sock_common", "skc_v6_rcv_saddr"),
        skc_net: field("sock_common", "skc_net.net"),
        sk_err: field("sock", "sk_err"),
        sk_protocol: field("sock", "sk_protocol"),
        // Before Linux 5.15 this was a tagged word, `val`, that is not decoded here.
        sk_cgroup: field("sock", "sk_cgrp_data.cgroup"),
        inet_sport: field("inet_sock", "inet_sport"),
        net_inum: field("net", "ns.inum"),
        net_cookie: field("net", "net_cookie"),
        dev_net: field("net_device", "nd_net.net"),
        skb_dev: field("sk_buff", "dev"),
        skb_head: field("sk_buff", "head"),
        skb_network_header: field("sk_buff", "network_header"),
        task_tgid: field("task_struct", "tgid"),
        task_pid: field("task_struct", "pid"),
        task_nsproxy: field("task_struct", "nsproxy"),
        task_cgroups: field("task_struct", "cgroups"),
        task_files: field("task_struct", "files"),
        files_fdt: field("files_struct", "fdt"),
        fdt_max_fds: field("fdtable", "max_fds"),
        fdt_fd: field("fdtable", "fd"),
        file_private_data: field("file", "private_data"),
        map_id: field("bpf_map", "id"),
        nsproxy_net: field("nsproxy", "net_ns"),
        css_set_cgroup: field("css_set", "dfl_cgrp"),
        css_cgroup: Layout::ABSENT,
        cgroup_root: field("cgroup", "root"),
        root_hierarchy_id: field("cgroup_root", "hierarchy_id"),
        cgroup_kn: field("cgroup", "kn"),
        kernfs_id: field("kernfs_node", "id"),
        kernfs_parent: match btf.field_offset("kernfs_node", "__parent") {
            Some(renamed) => renamed,
            None => field("kernfs_node", "parent"),
        },
        kernfs_name: field("kernfs_node", "name"),
        // The register names are x86-64's; elsewhere they are absent and the program stays off.
        regs_nr: field("pt_regs", "orig_ax"),
        regs_arg0: field("pt_regs", "di"),
        regs_arg1: field("pt_regs", "si"),
        regs_arg2: field("pt_regs", "dx"),
        regs_arg3: field("pt_regs", "r10"),
        reason_netfilter_drop: Layout::ABSENT,
        reason_no_socket: Layout::ABSENT,
        own_netns_inum,
        hierarchy_id: 0,
    };
    let mut reason =
        |name: &str| note(btf.enumerator("skb_drop_reason", name), "skb_drop_reason", name);
    layout.reason_netfilter_drop = reason("SKB_DROP_REASON_NETFILTER_DROP");
    layout.reason_no_socket = reason("SKB_DROP_REASON_NO_SOCKET");
    Resolved { layout, missing }
}

impl Resolved {
    /// Tells tasks' cgroups by a controller's version 1 hierarchy. A socket then has none: the
    /// kernel notes its cgroup v2 only.
    ///
    /// # Errors
    /// When the kernel has no such controller.
    pub fn tell_by(&mut self, controller: Controller, btf: &Btf) -> anyhow::Result<()> {
        let element = format!("{}_cgrp_id", controller.name);
        let index = btf
            .enumerator("cgroup_subsys_id", &element)
            .with_context(|| format!("this kernel has no cgroup_subsys_id.{element}"))?;
        let array = btf.field_offset("css_set", "subsys");
        let array = array.context("this kernel has no css_set.subsys")?;
        let cgroup = btf.field_offset("cgroup_subsys_state", "cgroup");
        self.layout.css_set_cgroup = array + index * POINTER_BYTES;
        self.layout.css_cgroup = cgroup.context("this kernel has no cgroup_subsys_state.cgroup")?;
        self.layout.sk_cgroup = Layout::ABSENT;
        self.layout.hierarchy_id = controller.hierarchy_id;
        Ok(())
    }
}

//! Which hook feeds which signal, and how it is attached.
//!
//! Each signal has an ordered list of methods; the first that the running kernel supports and that
//! attaches is used, and which one is exported. What a kernel supports is read from its BTF, never
//! from its version: argument lists and fields are back-ported.

use std::collections::BTreeSet;

use anyhow::{Context as _, anyhow};
use aya::{
    Ebpf,
    programs::{BtfTracePoint, KProbe, Program, ProgramError},
};
use observer_common::Layout;

use super::btf::Btf;
use super::layout::Resolved;

/// A source of kernel facts, as metrics and readiness name it.
#[derive(Clone, Copy, Debug)]
pub struct Signal {
    /// Its name in metrics.
    pub name: &'static str,
    /// Whether the product is blind without it: then the daemon is not ready.
    pub essential: bool,
    methods: &'static [Method],
}

/// One way of attaching a program.
#[derive(Clone, Copy, Debug)]
struct Method {
    attach: Attach,
    program: &'static str,
    /// The tracepoint must pass at least this many arguments.
    arguments: u32,
    /// This argument must be a pointer.
    pointer: Option<u32>,
    /// Fields and enumerators without which the program would report nothing of use.
    needs: &'static [&'static str],
}

#[derive(Clone, Copy, Debug)]
enum Attach {
    /// A BTF-typed raw tracepoint (Linux 5.5).
    TpBtf(&'static str),
    /// All of these kernel functions: their entry or their return, as the program's section says.
    /// A module's function is there only while the module is, and its probe ends with it.
    KProbe(&'static [Function]),
}

/// A kernel function to attach to.
#[derive(Clone, Copy, Debug)]
struct Function {
    /// What different kernels call it: the first name that can be attached to is used.
    names: &'static [&'static str],
    /// One more program, for its entry, where the method's own is for its return.
    entry: Option<&'static str>,
}

impl Attach {
    fn label(self) -> &'static str {
        match self {
            Self::TpBtf(_) => "tp_btf",
            Self::KProbe(_) => "kprobe",
        }
    }
}

impl Method {
    /// Every program it attaches, once.
    fn programs(&self) -> BTreeSet<&'static str> {
        let functions = match self.attach {
            Attach::TpBtf(_) => &[],
            Attach::KProbe(functions) => functions,
        };
        let entries = functions.iter().filter_map(|function| function.entry);
        entries.chain([self.program]).collect()
    }
}

const SOCKET: &[&str] = &[
    "sock_common.skc_family",
    "sock_common.skc_state",
    "sock_common.skc_dport",
    "sock_common.skc_num",
    "sock_common.skc_daddr",
    "sock_common.skc_rcv_saddr",
    "sock_common.skc_v6_daddr",
    "sock_common.skc_v6_rcv_saddr",
    "sock_common.skc_net.net",
    "sock.sk_protocol",
    "net.net_cookie",
];
const CONNECT: &[&str] = &["sock_common.skc_state", "sock.sk_err", "sock.sk_protocol"];
const PACKET: &[&str] = &["sk_buff.head", "sk_buff.network_header", "sk_buff.dev"];
const DROP: &[&str] =
    &["sk_buff.head", "sk_buff.network_header", "skb_drop_reason.SKB_DROP_REASON_NETFILTER_DROP"];
const TASK: &[&str] =
    &["task_struct.tgid", "task_struct.cgroups", "css_set.dfl_cgrp", "cgroup.kn", "kernfs_node.id"];
const CGROUP: &[&str] = &[
    "cgroup.kn",
    "cgroup.root",
    "cgroup_root.hierarchy_id",
    "kernfs_node.id",
    "kernfs_node.parent",
    "kernfs_node.name",
];
const SYSTEM_CALL: &[&str] = &[
    "pt_regs.orig_ax",
    "pt_regs.si",
    "pt_regs.dx",
    "pt_regs.r10",
    "task_struct.nsproxy",
    "nsproxy.net_ns",
    "net.ns.inum",
];

const BPF_CALL: &[&str] = &[
    "pt_regs.orig_ax",
    "pt_regs.di",
    "pt_regs.si",
    "task_struct.files",
    "files_struct.fdt",
    "fdtable.max_fds",
    "fdtable.fd",
    "file.private_data",
    "bpf_map.id",
];

const fn tp_btf(
    tracepoint: &'static str,
    program: &'static str,
    arguments: u32,
    needs: &'static [&'static str],
) -> Method {
    Method { attach: Attach::TpBtf(tracepoint), program, arguments, pointer: None, needs }
}

/// The signal whose program is attached only while legacy iptables is in use. The kprobe tells more
/// exactly and costs nothing while no table is replaced.
pub const LEGACY_COMMIT: Signal = Signal {
    name: "legacy_commit",
    essential: false,
    methods: &[
        Method {
            attach: Attach::KProbe(&[Function {
                names: &["xt_replace_table"],
                entry: Some("legacy_replace_call"),
            }]),
            program: "legacy_replaced",
            arguments: 0,
            pointer: None,
            needs: CURRENT_NETNS,
        },
        tp_btf("sys_exit", "legacy_commit", 2, SYSTEM_CALL),
    ],
};

/// The signal whose program is attached only while there are maps to watch.
pub const MAP_COMMIT: Signal = Signal {
    name: "map_commit",
    essential: false,
    methods: &[tp_btf("sys_exit", "map_commit", 2, BPF_CALL)],
};

const CURRENT_NETNS: &[&str] = &["task_struct.nsproxy", "nsproxy.net_ns", "net.ns.inum"];

const fn destination_call(name: &'static [&'static str]) -> Function {
    Function { names: name, entry: Some("ipvs_destination_call") }
}

const fn service_call(names: &'static [&'static str]) -> Function {
    Function { names, entry: Some("ipvs_service_call") }
}

/// Every call that changes what IPVS sends new connections to. Attached only while it is in use.
/// The suffixes are the compiler's.
pub const IPVS_COMMIT: Signal = Signal {
    name: "ipvs_commit",
    essential: false,
    methods: &[Method {
        attach: Attach::KProbe(&[
            destination_call(&["ip_vs_add_dest"]),
            destination_call(&["ip_vs_edit_dest"]),
            destination_call(&["ip_vs_del_dest"]),
            // Renamed in Linux 7.2 or shortly before (not in 6.18).
            service_call(&["ip_vs_unlink_service", "ip_vs_del_service"]),
            service_call(&["ip_vs_flush", "ip_vs_flush.isra.0", "ip_vs_flush.constprop.0"]),
        ]),
        program: "ipvs_commit",
        arguments: 0,
        pointer: None,
        needs: CURRENT_NETNS,
    }],
};

/// The signal whose program stamps the beginning of commits to `nf_tables`. Its function may be a
/// module's, which reading the rules loads: to be attached after that.
pub const NFT_COMMIT: Signal = Signal {
    name: "nft_commit",
    essential: false,
    methods: &[Method {
        attach: Attach::KProbe(&[Function { names: &["nf_tables_commit"], entry: None }]),
        program: "nft_commit",
        arguments: 0,
        pointer: None,
        needs: &["net.ns.inum"],
    }],
};

/// Everything attached from the start.
pub const SIGNALS: &[Signal] = &[
    Signal {
        name: "cgroup_made",
        // Without it directories are looked for when a process of an unknown one does something.
        essential: false,
        methods: &[tp_btf("cgroup_mkdir", "cgroup_made", 1, CGROUP)],
    },
    Signal {
        name: "socket_state",
        essential: true,
        methods: &[tp_btf("inet_sock_set_state", "socket_state", 3, SOCKET)],
    },
    Signal {
        name: "reset_sent",
        // Where the tracepoint lacks the third argument it does not fire without a socket either
        // (before Linux 6.10); `packet_dropped` then tells of refusals.
        essential: false,
        methods: &[tp_btf("tcp_send_reset", "reset_sent", 3, PACKET)],
    },
    Signal {
        name: "packet_dropped",
        essential: true,
        methods: &[tp_btf("kfree_skb", "packet_dropped", 3, DROP)],
    },
    Signal {
        name: "reset_received",
        essential: false,
        methods: &[tp_btf("tcp_receive_reset", "reset_received", 1, SOCKET)],
    },
    Signal {
        name: "socket_error",
        essential: false,
        methods: &[tp_btf("inet_sk_error_report", "socket_error", 1, CONNECT)],
    },
    Signal {
        name: "icmp_sent",
        essential: false,
        methods: &[tp_btf("icmp_send", "icmp_sent", 3, PACKET)],
    },
    Signal {
        name: "process_signalled",
        essential: true,
        methods: &[tp_btf("signal_generate", "process_signalled", 3, TASK)],
    },
    Signal {
        name: "process_exited",
        essential: true,
        methods: &[
            tp_btf("sched_process_exit", "process_exited", 2, TASK),
            tp_btf("sched_process_exit", "process_leader_exited", 1, TASK),
        ],
    },
    Signal {
        name: "oom_victim",
        essential: false,
        methods: &[Method { pointer: Some(0), ..tp_btf("mark_victim", "oom_victim", 1, TASK) }],
    },
];

/// What became of one signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// [`Signal::name`].
    pub signal: &'static str,
    /// [`Signal::essential`].
    pub essential: bool,
    /// The method in use; `None` when the signal is off.
    pub method: Option<&'static str>,
    /// Why it is off, one reason per method tried.
    pub problem: Option<String>,
}

/// Whether `tcp_send_reset` tells of resets without a socket on this kernel.
#[must_use]
pub fn resets_tell_refusals(btf: &Btf) -> bool {
    btf.tracepoint_arguments("tcp_send_reset").is_some_and(|arguments| arguments >= 3)
}

/// The kernel's types, for this daemon's own questions and for the loader: some 10 MB, so they are
/// read when they are needed and not kept.
pub struct Types {
    /// What tracepoints pass.
    pub kernel: Btf,
    /// What programs are loaded with: the tracepoints only.
    pub loader: aya::Btf,
}

impl Signal {
    /// Whether to attach it takes [`Types`].
    #[must_use]
    pub fn needs_types(&self) -> bool {
        self.methods.iter().any(|method| matches!(method.attach, Attach::TpBtf(_)))
    }
}

/// Attaches a signal by the first method that works; without `types`, one that needs none.
#[must_use]
pub fn attach(
    signal: &Signal,
    ebpf: &mut Ebpf,
    resolved: &Resolved,
    types: Option<&Types>,
) -> Probe {
    let mut problems = Vec::new();
    for method in signal.methods {
        let outcome =
            supported(method, resolved, types).and_then(|()| attach_program(method, ebpf, types));
        match outcome {
            Ok(()) => {
                return Probe {
                    signal: signal.name,
                    essential: signal.essential,
                    method: Some(method.attach.label()),
                    problem: None,
                };
            }
            Err(error) => problems.push(format!("{}: {error:#}", method.attach.label())),
        }
    }
    Probe {
        signal: signal.name,
        essential: signal.essential,
        method: None,
        problem: Some(problems.join("; ")),
    }
}

/// Detaches and unloads a signal's programs.
///
/// # Errors
/// When the kernel refuses to unload one.
pub fn detach(signal: &Signal, ebpf: &mut Ebpf) -> anyhow::Result<()> {
    signal.methods.iter().try_for_each(|method| unload(method, ebpf))
}

fn unload(method: &Method, ebpf: &mut Ebpf) -> anyhow::Result<()> {
    for name in method.programs() {
        if program(name, ebpf)?.fd().is_err() {
            continue;
        }
        let unloaded = match method.attach {
            Attach::TpBtf(_) => typed::<BtfTracePoint>(name, ebpf)?.unload(),
            Attach::KProbe(_) => typed::<KProbe>(name, ebpf)?.unload(),
        };
        unloaded.with_context(|| format!("cannot unload {name}"))?;
    }
    Ok(())
}

fn supported(method: &Method, resolved: &Resolved, types: Option<&Types>) -> anyhow::Result<()> {
    if let Attach::TpBtf(tracepoint) = method.attach {
        supported_tracepoint(method, tracepoint, &known(types)?.kernel)?;
    }
    let absent: Vec<&str> = method
        .needs
        .iter()
        .copied()
        .filter(|need| resolved.missing.iter().any(|m| m == need))
        .collect();
    if !absent.is_empty() {
        anyhow::bail!("this kernel has no {}", absent.join(", "));
    }
    Ok(())
}

fn known(types: Option<&Types>) -> anyhow::Result<&Types> {
    types.context("the kernel's types are not read")
}

fn supported_tracepoint(method: &Method, tracepoint: &str, kernel: &Btf) -> anyhow::Result<()> {
    let arguments = kernel
        .tracepoint_arguments(tracepoint)
        .ok_or_else(|| anyhow!("this kernel has no tracepoint {tracepoint}"))?;
    if arguments < method.arguments {
        anyhow::bail!(
            "tracepoint {tracepoint} passes {arguments} arguments, {} are needed",
            method.arguments
        );
    }
    if let Some(index) = method.pointer
        && !kernel.tracepoint_argument_is_pointer(tracepoint, index)
    {
        anyhow::bail!("argument {index} of tracepoint {tracepoint} is no pointer");
    }
    Ok(())
}

fn attach_program(method: &Method, ebpf: &mut Ebpf, types: Option<&Types>) -> anyhow::Result<()> {
    match method.attach {
        Attach::TpBtf(tracepoint) => {
            let program: &mut BtfTracePoint = typed(method.program, ebpf)?;
            let types = &known(types)?.loader;
            program.load(tracepoint, types).map_err(|error| brief(method.program, error))?;
            program.attach().with_context(|| format!("cannot attach to {tracepoint}"))?;
            Ok(())
        }
        Attach::KProbe(functions) => attach_functions(method, functions, ebpf).or_else(|error| {
            // Some of the functions would tell half of the story.
            unload(method, ebpf)?;
            Err(error)
        }),
    }
}

fn attach_functions(
    method: &Method,
    functions: &[Function],
    ebpf: &mut Ebpf,
) -> anyhow::Result<()> {
    for name in method.programs() {
        let program: &mut KProbe = typed(name, ebpf)?;
        program.load().map_err(|error| brief(name, error))?;
    }
    for function in functions {
        // The return last: it is what reports, and relies on the entry.
        for name in function.entry.into_iter().chain([method.program]) {
            attach_function(function, typed(name, ebpf)?)?;
        }
    }
    Ok(())
}

fn attach_function(function: &Function, program: &mut KProbe) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    for name in function.names {
        match program.attach(name, 0) {
            Ok(_) => return Ok(()),
            Err(error) => {
                let error = anyhow::Error::new(error);
                problems.push(format!("cannot attach to {name}: {error:#}"));
            }
        }
    }
    Err(anyhow!(problems.join("; ")))
}

/// The verifier explains itself in thousands of lines: all of them go to the debug log, the last
/// ones, which say what it refused, to the person.
fn brief(program: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = &error else { return error.into() };
    let log = verifier_log.to_string();
    tracing::debug!(program, log, "the verifier's log");
    let mut last: Vec<&str> = log.lines().rev().filter(|line| !line.is_empty()).take(6).collect();
    last.reverse();
    anyhow!("cannot load {program}: {io_error} ({})", last.join("; "))
}

fn program<'a>(name: &str, ebpf: &'a mut Ebpf) -> anyhow::Result<&'a mut Program> {
    ebpf.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))
}

fn typed<'a, T>(name: &str, ebpf: &'a mut Ebpf) -> anyhow::Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    program(name, ebpf)?.try_into().with_context(|| format!("{name} is of another type"))
}

/// What the programs are told: the layout, without the fallback where the first choice works.
#[must_use]
pub fn layout_for_programs(kernel: &Btf, resolved: &Resolved) -> Layout {
    let mut layout = resolved.layout;
    if resets_tell_refusals(kernel) {
        layout.reason_no_socket = Layout::ABSENT;
    }
    layout
}

//! The stage for `bpf(2)` calls that change elements of a watched map.
//!
//! Most calls are about other maps: those end here, before anything is counted. The descriptor is
//! looked up after the call: one that was closed or replaced meanwhile names no watched map, or
//! another one, and then a table is read in vain.

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_get_current_task, bpf_probe_read_user},
};
use observer_common::{MAP_COMMIT_WINDOW_NS, signal};

use crate::{
    layout::offset,
    maps::WATCHED_MAPS,
    memory::{Address, argument, read, read_or_zero},
    report,
};

/// `bpf` in the x86-64 system call table, part of the kernel's user interface.
const NR_BPF: u64 = 321;

/// Commands of `enum bpf_cmd` (include/uapi/linux/bpf.h) that change elements.
const MAP_UPDATE_ELEM: u64 = 2;
const MAP_DELETE_ELEM: u64 = 3;
const MAP_LOOKUP_AND_DELETE_ELEM: u64 = 21;
const MAP_LOOKUP_AND_DELETE_BATCH: u64 = 25;
const MAP_UPDATE_BATCH: u64 = 26;
const MAP_DELETE_BATCH: u64 = 27;

/// Where `union bpf_attr` holds the map's descriptor, for single elements and for batches.
const ELEMENT_MAP_FD: u64 = 0;
const BATCH_MAP_FD: u64 = 36;

/// Bytes of a pointer in the descriptor table.
const POINTER_BYTES: u64 = 8;

/// `sys_exit`: a change of a watched map is in force.
#[inline(always)]
pub fn returned(ctx: &impl EbpfContext, result: i64) -> i32 {
    let regs = argument(ctx, 0);
    if read(regs, offset!(regs_nr)) != Some(NR_BPF) {
        return 0;
    }
    let Some(fd_at) = changed_map_fd(read_or_zero(regs, offset!(regs_arg0)), result) else {
        return 0;
    };
    let attributes: Address = read_or_zero(regs, offset!(regs_arg1));
    // SAFETY: the helper checks the address; any four bytes are a number.
    let Ok(fd) = (unsafe { bpf_probe_read_user((attributes + fd_at) as *const u32) }) else {
        return 0;
    };
    tell(ctx, map_id(fd));
    0
}

/// Where the attributes name the map, when the call changed elements. A batch that failed may have
/// changed some.
#[inline(always)]
fn changed_map_fd(command: u64, result: i64) -> Option<u64> {
    match command {
        MAP_UPDATE_ELEM | MAP_DELETE_ELEM | MAP_LOOKUP_AND_DELETE_ELEM if result == 0 => {
            Some(ELEMENT_MAP_FD)
        }
        MAP_UPDATE_BATCH | MAP_DELETE_BATCH | MAP_LOOKUP_AND_DELETE_BATCH => Some(BATCH_MAP_FD),
        _ => None,
    }
}

/// The id of the map behind a descriptor of the current task; 0, which no map has, for none.
#[inline(always)]
fn map_id(fd: u32) -> u32 {
    // SAFETY: a helper without arguments.
    let task: Address = unsafe { bpf_get_current_task() };
    let files: Address = read_or_zero(task, offset!(task_files));
    let table: Address = read_or_zero(files, offset!(files_fdt));
    let size: u32 = read_or_zero(table, offset!(fdt_max_fds));
    if fd >= size {
        return 0;
    }
    let descriptors: Address = read_or_zero(table, offset!(fdt_fd));
    if descriptors == 0 {
        return 0;
    }
    let file: Address = read_or_zero(descriptors + u64::from(fd) * POINTER_BYTES, 0);
    let map: Address = read_or_zero(file, offset!(file_private_data));
    read_or_zero(map, offset!(map_id))
}

/// Counts a change of a watched map, and tells of it unless one was told just before.
#[inline(always)]
fn tell(ctx: &impl EbpfContext, map: u32) {
    let Some(told_at) = WATCHED_MAPS.get_ptr_mut(map) else { return };
    let mut event = report::event(signal::MAP_COMMIT);
    // SAFETY: map memory, valid until the program ends. Two processors that race tell twice.
    unsafe {
        if event.boot_ns.saturating_sub(*told_at) < MAP_COMMIT_WINDOW_NS {
            report::count(signal::MAP_COMMIT);
            return;
        }
        *told_at = event.boot_ns;
    }
    event.code = map;
    report::send_always(ctx, &event);
}

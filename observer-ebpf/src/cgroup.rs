//! Which cgroup a task is in, and which are made.

use aya_ebpf::{EbpfContext, helpers::bpf_probe_read_kernel_str_bytes};
use observer_common::{CgroupMade, Layout, signal};

use crate::{
    layout::offset,
    memory::{Address, argument, read, read_or_zero},
    report,
};

/// From a `struct task_struct`: its `struct cgroup` in the hierarchy that tells pods.
#[inline(always)]
pub fn of_task(task: Address) -> Address {
    let css_set = read_or_zero(task, offset!(task_cgroups));
    let found = read_or_zero(css_set, offset!(css_set_cgroup));
    if offset!(css_cgroup) == Layout::ABSENT {
        return found;
    }
    read_or_zero(found, offset!(css_cgroup))
}

/// From a `struct cgroup`: the inode number of its directory.
#[inline(always)]
pub fn id(cgroup: Address) -> u64 {
    read_or_zero(read_or_zero(cgroup, offset!(cgroup_kn)), offset!(kernfs_id))
}

/// `cgroup_mkdir`, of any hierarchy: an id means nothing in another.
#[inline(always)]
pub fn made(ctx: &impl EbpfContext) -> i32 {
    let cgroup = argument(ctx, 0);
    let root: Address = read_or_zero(cgroup, offset!(cgroup_root));
    let Some(hierarchy) = read::<u32>(root, offset!(root_hierarchy_id)) else { return 0 };
    if hierarchy != offset!(hierarchy_id) {
        return 0;
    }
    let node: Address = read_or_zero(cgroup, offset!(cgroup_kn));
    let id = read_or_zero(node, offset!(kernfs_id));
    let parent = read_or_zero(read_or_zero(node, offset!(kernfs_parent)), offset!(kernfs_id));
    let name: Address = read_or_zero(node, offset!(kernfs_name));
    let Some(mut record) = report::reserve::<CgroupMade>(ctx, signal::CGROUP_MADE) else {
        return 0;
    };
    let made = record.as_mut_ptr();
    // SAFETY: memory of the ring buffer, ours until it is submitted; integers and bytes only.
    unsafe {
        (*made).id = id;
        (*made).parent = parent;
        if bpf_probe_read_kernel_str_bytes(name as *const u8, &mut (*made).name).is_err() {
            (*made).name[0] = 0;
        }
    }
    record.submit(0);
    0
}

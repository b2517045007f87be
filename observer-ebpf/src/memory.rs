//! Reading kernel memory at offsets that are known only at load.

use aya_ebpf::{EbpfContext, helpers::bpf_probe_read_kernel};
use observer_common::Layout;

/// The address of a kernel object. Never dereferenced: only read through the helper, which fails
/// on a bad address instead of faulting.
pub type Address = u64;

/// The `index`th argument of a tracepoint, as a plain number: read directly, the verifier would track
/// it as a typed pointer and refuse arithmetic and copies that vary from kernel to kernel.
#[inline(always)]
pub fn argument(ctx: &impl EbpfContext, index: u32) -> Address {
    read_or_zero(ctx.as_ptr() as Address, index * 8)
}

/// Reads a `T` at `base + offset`; `None` for a null base, an absent field or a failed read.
#[inline(always)]
pub fn read<T>(base: Address, offset: u32) -> Option<T> {
    if base == 0 || offset == Layout::ABSENT {
        return None;
    }
    // SAFETY: the helper checks the address; every `T` used here is an integer or an array of
    // them, valid for any bytes.
    unsafe { bpf_probe_read_kernel((base + u64::from(offset)) as *const T) }.ok()
}

/// As [`read`], with 0 for what cannot be read: an unknown field of an event.
#[inline(always)]
pub fn read_or_zero<T: Default>(base: Address, offset: u32) -> T {
    read(base, offset).unwrap_or_default()
}

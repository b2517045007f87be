//! How the C library's allocator gives memory back. The daemon's first minute takes far more than the
//! rest of its life: the kernel's types, the first lists and the whole rule set are read and dropped.

use nix::libc::{M_ARENA_MAX, M_MMAP_THRESHOLD, mallopt};

/// Blocks from this size on are mapped one by one, and unmapped when they are freed. It is the C
/// library's own first value; but it raises that, up to 32 MiB, each time such a block is freed, and
/// what is below stays with the process.
const MAPPED_BYTES: i32 = 128 << 10;

/// All threads share what one of them freed: they wait far more than they allocate.
const ARENAS: i32 = 1;

/// Makes the allocator give memory back. To be called before threads are started; measured by
/// `cargo xtask bench cluster`, where it saves a quarter of what is resident.
#[expect(unsafe_code, reason = "the standard library has no such setting")]
pub fn give_back_early() {
    // SAFETY: `mallopt` takes plain numbers and may be called at any time. It refuses by returning
    // 0, after which the allocator works as before.
    unsafe {
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES);
        mallopt(M_ARENA_MAX, ARENAS);
    }
}

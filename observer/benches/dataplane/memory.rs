//! Counts the heap: what is in use, and the most that was since the last look.
#![expect(unsafe_code, reason = "an allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

#[global_allocator]
static HEAP: Counting = Counting;

static IN_USE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted in bytes asked for.
struct Counting;

// SAFETY: every call goes to `System` unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let in_use = IN_USE_BYTES.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK_BYTES.fetch_max(in_use, Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `System`, by `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes in use now.
pub(crate) fn in_use_bytes() -> usize {
    IN_USE_BYTES.load(Relaxed)
}

/// The most that was in use since the last call.
pub(crate) fn take_peak_bytes() -> usize {
    PEAK_BYTES.swap(in_use_bytes(), Relaxed)
}

//! The `bpf(2)` calls that open a pinned map for reading and copy it out.
//!
//! By hand, as aya opens pins for writing too, which a reader does not need, and reads maps one
//! element at a time.
#![expect(unsafe_code, reason = "aya has no read-only open and no batch lookup")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::maps::{MapData, MapInfo};
use nix::errno::Errno;
use nix::libc;

use super::entries::Sizes;

/// Commands of `enum bpf_cmd` (include/uapi/linux/bpf.h): Linux 4.4, and 5.6 for the batch.
const OBJ_GET: libc::c_long = 7;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
/// `BPF_F_RDONLY` (Linux 4.15).
const READ_ONLY: u32 = 1 << 3;
/// Elements copied by one call: 100 KB at most, and above what any bucket of a hash map holds.
const BATCH: u32 = 4096;

/// `union bpf_attr` for [`OBJ_GET`].
#[repr(C)]
struct Open {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` for [`MAP_LOOKUP_BATCH`].
#[repr(C)]
struct Lookup {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// A map that is pinned somewhere.
pub(super) struct Pinned {
    map: MapData,
    /// Identifies it while the machine runs, unlike the pin's path.
    pub(super) id: u32,
    pub(super) sizes: Sizes,
}

/// Opens what is pinned at `path`, for reading.
pub(super) fn open(path: &Path) -> io::Result<Pinned> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let map = MapData::from_fd(open_fd(&path)?).map_err(io::Error::other)?;
    let info: MapInfo = map.info().map_err(io::Error::other)?;
    let bytes = |size: u32| usize::try_from(size).unwrap_or(usize::MAX);
    let sizes = Sizes { key: bytes(info.key_size()), value: bytes(info.value_size()) };
    Ok(Pinned { id: info.id(), sizes, map })
}

fn open_fd(path: &CStr) -> io::Result<OwnedFd> {
    let mut attributes = Open { path: address(path.as_ptr()), fd: 0, flags: READ_ONLY };
    // SAFETY: the attributes are as this command reads them; the path ends with 0 and outlives the
    // call.
    let fd = unsafe { bpf(OBJ_GET, &raw mut attributes) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the call returned a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Pinned {
    /// Hands every element to `take`, as key and value. One that is there all the time is handed
    /// over once; one that comes, changes or goes meanwhile as it was before or after.
    pub(super) fn read(&self, mut take: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let batch = usize::try_from(BATCH).unwrap_or(usize::MAX);
        let mut keys = vec![0_u8; self.sizes.key * batch];
        let mut values = vec![0_u8; self.sizes.value * batch];
        // Where the walk stands: the number of a bucket, in hash maps.
        let (mut from, mut to) = (0_u64, 0_u64);
        let mut first = true;
        loop {
            let mut attributes = Lookup {
                in_batch: if first { 0 } else { address(&raw const from) },
                out_batch: address(&raw mut to),
                keys: address(keys.as_mut_ptr()),
                values: address(values.as_mut_ptr()),
                count: BATCH,
                map_fd: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
                element_flags: 0,
                flags: 0,
            };
            // SAFETY: both buffers have room for `count` elements of the map's own sizes, and the
            // positions for the four bytes of a hash map's; all outlive the call.
            let outcome = unsafe { bpf(MAP_LOOKUP_BATCH, &raw mut attributes) };
            let is_last = match outcome {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(error) => return Err(error),
            };
            let read = usize::try_from(attributes.count).unwrap_or(usize::MAX).min(batch);
            let elements =
                keys.chunks_exact(self.sizes.key).zip(values.chunks_exact(self.sizes.value));
            elements.take(read).for_each(|(key, value)| take(key, value));
            if is_last {
                return Ok(());
            }
            (from, first) = (to, false);
        }
    }
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// # Safety
/// `attributes` must be what the kernel reads and writes for `command`.
unsafe fn bpf<T>(command: libc::c_long, attributes: *mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    Ok(Errno::result(result)?)
}

//! A bpf file system of the test's own, and in it what cilium-agent writes.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use observer::clock;
use observer::facts::BootNs;

/// Values of a backend's state (`BE_STATE_*`).
pub(crate) const ACTIVE: u8 = 0;
pub(crate) const TERMINATING: u8 = 1;
/// The port of every backend.
pub(crate) const PORT: u16 = 8080;
/// The port of every Service.
pub(crate) const SERVICE_PORT: u16 = 443;
/// Enough for every test.
const ELEMENTS: u32 = 65_536;

/// Runs `test` on a thread of its own in new mount and network namespaces, with the directory where
/// an own bpf file system is mounted. All of it goes with the thread.
pub(crate) fn with_bpffs(test: impl FnOnce(PathBuf) + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("make namespaces: this test needs root");
        let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, all, None::<&str>).expect("keep mounts private");
        let directory = tempfile::tempdir().expect("a directory");
        let none = MsFlags::empty();
        mount(Some("bpffs"), directory.path(), Some("bpf"), none, None::<&str>).expect("bpffs");
        let maps = directory.path().join("tc/globals");
        fs::create_dir_all(&maps).expect("make the directory of the maps");
        test(maps);
        nix::mount::umount(directory.path()).expect("unmount the bpffs");
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A hash map pinned as `name`.
pub(crate) fn pinned<K: Pod, V: Pod>(maps: &Path, name: &str) -> HashMap<MapData, K, V> {
    let path = maps.join(name);
    HashMap::<MapData, K, V>::create(ELEMENTS, 0).expect("make a map").pin(&path).expect("pin it");
    let map = MapData::from_pin(&path).expect("open the pin");
    Map::HashMap(map).try_into().expect("a hash map")
}

/// The maps of one IP version: `KEY` bytes name a Service's slot, `BACKEND` describe a backend.
pub(crate) struct Balancer<const KEY: usize, const BACKEND: usize> {
    services: HashMap<MapData, [u8; KEY], [u8; 12]>,
    backends: HashMap<MapData, [u8; 4], [u8; BACKEND]>,
}

pub(crate) type V4 = Balancer<12, 12>;
pub(crate) type V4WithBackends2 = Balancer<12, 8>;
pub(crate) type V6 = Balancer<24, 24>;

impl<const KEY: usize, const BACKEND: usize> Balancer<KEY, BACKEND> {
    pub(crate) fn create(maps: &Path, family: &str, backends: &str) -> Self {
        Self {
            services: pinned(maps, &format!("cilium_{family}_services_v2")),
            backends: pinned(maps, &format!("cilium_{family}_backends_{backends}")),
        }
    }

    /// Writes a backend, whose address ends with its id: 10.1.x.y or `fd01::x:y`.
    pub(crate) fn backend(&mut self, id: u32, state: u8) {
        let mut value = [0; BACKEND];
        let address = KEY - 8;
        let network: &[u8] = if address == 4 { &[10, 1] } else { &[0xfd, 1] };
        value[..2].copy_from_slice(network);
        let low = u16::try_from(id).expect("a small id");
        value[address - 2..address].copy_from_slice(&low.to_be_bytes());
        value[address..address + 2].copy_from_slice(&PORT.to_be_bytes());
        value[address + 2..address + 4].copy_from_slice(&[6, state]);
        self.backends.insert(id.to_ne_bytes(), value, 0).expect("write a backend");
    }

    pub(crate) fn remove_backend(&mut self, id: u32) {
        self.try_remove_backend(id).expect("remove a backend");
    }

    pub(crate) fn try_remove_backend(&mut self, id: u32) -> Result<(), MapError> {
        self.backends.remove(&id.to_ne_bytes())
    }

    /// Writes a Service as `BPFOps.updateFrontend` does: every slot, active backends first, then
    /// how many are active, then removes slots left over from `before`. Gives the moments around
    /// the write that makes the new count hold.
    pub(crate) fn service(
        &mut self,
        service: u16,
        active: &[u32],
        terminating: &[u32],
        before: usize,
    ) -> (BootNs, BootNs) {
        let ids: Vec<u32> = active.iter().chain(terminating).copied().collect();
        for (index, id) in ids.iter().enumerate() {
            self.services.insert(slot(service, index + 1), named(*id), 0).expect("write a slot");
        }
        let mut head = [0; 12];
        let count = |list: &[u32]| u16::try_from(list.len()).expect("few").to_ne_bytes();
        head[4..6].copy_from_slice(&count(active));
        head[10..12].copy_from_slice(&count(terminating));
        let begun = clock::now();
        self.services.insert(slot(service, 0), head, 0).expect("write the head");
        let ended = clock::now();
        for index in ids.len()..before {
            self.services.remove(&slot::<KEY>(service, index + 1)).expect("remove a slot");
        }
        (begun, ended)
    }

    /// Marks a Service's connections as a proxy's.
    pub(crate) fn give_to_proxy(&mut self, service: u16) {
        let key = slot(service, 0);
        let mut head = self.services.get(&key, 0).expect("the head");
        head[9] |= 1 << 2;
        self.services.insert(key, head, 0).expect("write the head");
    }
}

/// Service `n` is TCP port 443 of 10.96.x.y or `fd60::x:y`.
fn slot<const KEY: usize>(service: u16, number: usize) -> [u8; KEY] {
    let mut key = [0; KEY];
    let address = KEY - 8;
    let network: &[u8] = if address == 4 { &[10, 96] } else { &[0xfd, 0x60] };
    key[..2].copy_from_slice(network);
    key[address - 2..address].copy_from_slice(&service.to_be_bytes());
    key[address..address + 2].copy_from_slice(&SERVICE_PORT.to_be_bytes());
    let number = u16::try_from(number).expect("few slots");
    key[address + 2..address + 4].copy_from_slice(&number.to_ne_bytes());
    key[address + 4] = 6;
    key
}

fn named(backend: u32) -> [u8; 12] {
    let mut value = [0; 12];
    value[..4].copy_from_slice(&backend.to_ne_bytes());
    value
}

//! What a reading costs with 10,000 Services of 5 backends: 60,000 slots and 50,000 backends.

use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeVal;
use observer::dataplane::cilium::Reader;

use super::maps::{ACTIVE, V4, with_bpffs};

const SERVICES: u16 = 10_000;
const BACKENDS: u32 = 5;
const READINGS: i32 = 3;

fn processor_time() -> (TimeVal, TimeVal) {
    let usage: Usage = getrusage(UsageWho::RUSAGE_THREAD).expect("ask for the time used");
    (usage.user_time(), usage.system_time())
}

#[test]
fn ten_thousand_services_are_read_whole() {
    with_bpffs(|maps| {
        let mut four = V4::create(&maps, "lb4", "v3");
        for service in 0..SERVICES {
            let first = u32::from(service) * BACKENDS;
            let ids: Vec<u32> = (first..first + BACKENDS).collect();
            for id in &ids {
                four.backend(*id, ACTIVE);
            }
            four.service(service, &ids, &[], 0);
        }
        let reader = Reader::new(maps, true);
        let before = processor_time();
        for _ in 0..READINGS {
            let reached = reader.read().expect("readable");
            assert_eq!((reached.backends.len(), reached.unresolved), (50_000, 0));
            assert!(reached.draining.is_empty());
        }
        let after = processor_time();
        let each = |after: TimeVal, before: TimeVal| {
            let micros = |time: TimeVal| time.tv_sec() * 1_000_000 + time.tv_usec();
            (micros(after) - micros(before)) / i64::from(READINGS)
        };
        println!(
            "one reading: {} µs in the process, {} µs in the kernel",
            each(after.0, before.0),
            each(after.1, before.1)
        );
    });
}

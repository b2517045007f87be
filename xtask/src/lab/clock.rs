//! The lab's one clock: `CLOCK_BOOTTIME`, as the agent's kernel programs stamp, and wall time for
//! what an API object says.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Now, in ns of `CLOCK_BOOTTIME`.
#[must_use]
pub fn boot_ns() -> u64 {
    nanos(read(ClockId::CLOCK_BOOTTIME))
}

/// A span in ns.
#[must_use]
pub fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// `later - earlier` in seconds, signed.
#[must_use]
pub fn seconds_between(earlier_ns: u64, later_ns: u64) -> f64 {
    let span = Duration::from_nanos(later_ns.abs_diff(earlier_ns)).as_secs_f64();
    if later_ns < earlier_ns { -span } else { span }
}

/// Sleeps until a moment of `CLOCK_BOOTTIME`; returns at once when it has passed.
pub fn sleep_until(moment_ns: u64) {
    std::thread::sleep(Duration::from_nanos(moment_ns.saturating_sub(boot_ns())));
}

/// The wall clock in whole seconds since the Unix epoch.
pub(crate) fn wall_seconds() -> i64 {
    i64::try_from(read(ClockId::CLOCK_REALTIME).as_secs()).unwrap_or(i64::MAX)
}

/// A wall time as `metav1.Time` writes it: UTC, whole seconds.
pub(crate) fn rfc3339(wall_seconds: i64) -> String {
    jiff::Timestamp::from_second(wall_seconds).unwrap_or_default().to_string()
}

fn read(clock: ClockId) -> Duration {
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

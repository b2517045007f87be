//! The only place that reads a clock.
//!
//! Everything inside the daemon is `CLOCK_BOOTTIME`, as the kernel programs stamp it. Wall time
//! appears at the edges only: in what the API server says and in what a person reads.

use std::time::Duration;

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

use crate::facts::BootNs;

/// How far the wall clock is ahead of the boot clock. It changes with NTP and steps: measure it
/// again whenever a wall time is converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallOffset {
    ahead_ns: i128,
}

/// Now, on `CLOCK_BOOTTIME`.
#[must_use]
pub fn now() -> BootNs {
    BootNs(u64::try_from(read_ns(ClockId::CLOCK_BOOTTIME)).unwrap_or_default())
}

impl WallOffset {
    /// Reads both clocks; the wall clock's reading lies between two readings of the boot clock, so
    /// the error is at most half their distance (well under a microsecond, unless preempted).
    #[must_use]
    pub fn measure() -> Self {
        let before = read_ns(ClockId::CLOCK_BOOTTIME);
        let wall = read_ns(ClockId::CLOCK_REALTIME);
        let after = read_ns(ClockId::CLOCK_BOOTTIME);
        Self { ahead_ns: wall - i128::midpoint(before, after) }
    }

    /// An offset given rather than measured, for callers that replay recordings.
    #[must_use]
    pub fn fixed(wall_ns: i128, boot: BootNs) -> Self {
        Self { ahead_ns: wall_ns - i128::from(boot.0) }
    }

    /// The boot-clock moment of a wall time given in ns since the Unix epoch; 0 when before boot.
    #[must_use]
    pub fn to_boot(self, wall_ns: i128) -> BootNs {
        BootNs(u64::try_from((wall_ns - self.ahead_ns).max(0)).unwrap_or(u64::MAX))
    }

    /// The wall time, in ns since the Unix epoch, of a boot-clock moment.
    #[must_use]
    pub fn to_wall_ns(self, at: BootNs) -> i128 {
        i128::from(at.0) + self.ahead_ns
    }

    /// The same for a person; a wall clock beyond the year 9999 is shown as that limit rather than
    /// as an error.
    #[must_use]
    pub fn to_timestamp(self, at: BootNs) -> Timestamp {
        Timestamp::from_nanosecond(self.to_wall_ns(at)).unwrap_or(Timestamp::MAX)
    }
}

/// The kernel's own bound on the error of `CLOCK_REALTIME`, in s (`adjtimex(2)`, `maxerror`); 16 s
/// or more when nothing disciplines the clock, `None` when the kernel does not say.
#[must_use]
#[expect(unsafe_code, reason = "no safe wrapper of adjtimex is among the dependencies")]
pub fn max_error_seconds() -> Option<f64> {
    // SAFETY: `timex` is plain integers, for which all zeroes is a value; `modes` 0 only reads, and
    // the kernel writes no more than the struct.
    let (state, maxerror) = unsafe {
        let mut timex: nix::libc::timex = std::mem::zeroed();
        (nix::libc::adjtimex(&raw mut timex), timex.maxerror)
    };
    let microseconds = u64::try_from(maxerror).ok().filter(|_| state >= 0)?;
    Some(Duration::from_micros(microseconds).as_secs_f64())
}

fn read_ns(clock: ClockId) -> i128 {
    let time = clock_gettime(clock).map(Duration::from).unwrap_or_default();
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

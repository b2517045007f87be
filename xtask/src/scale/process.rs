//! What a process takes, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// The most that was resident at a time, its program's own pages included (`VmHWM`).
    pub(crate) peak: u64,
    /// Resident now (`Rss` of `smaps_rollup`).
    pub(crate) resident: u64,
    /// Of that, heap and stacks (`Anonymous`).
    pub(crate) anonymous: u64,
}

/// Reads the memory of a process.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}: did it end?"))
    };
    let (status, rollup) = (read("status")?, read("smaps_rollup")?);
    Ok(Memory {
        peak: field(&status, "VmHWM:")?,
        resident: field(&rollup, "Rss:")?,
        anonymous: field(&rollup, "Anonymous:")?,
    })
}

fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kib.with_context(|| format!("the kernel shows no {name}"))? * 1024)
}

/// User and system time of a process so far.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // After the name, which may hold anything: `utime` and `stime` are fields 14 and 15.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel's tick is unknown")?;
    Ok(Duration::from_secs(ticks) / u32::try_from(per_second)?)
}

//! The memory that a process takes, as the kernel counts it.

use std::fs;

use anyhow::{Context, Result};

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

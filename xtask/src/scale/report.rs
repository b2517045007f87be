//! The table: figures beside their bounds.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;

use super::process::Memory;
use super::{CHANGES_PER_SECOND, CHURN, Figures, Size};
use crate::step::say;

const SYNC_SECONDS: f64 = 10.0;
const CPU_PERCENT: f64 = 5.0;

/// A figure, and the bound it has to keep.
struct Row {
    what: String,
    measured: String,
    bound: Option<String>,
    kept: bool,
}

/// Adds the lines of one size; how many bounds were missed.
pub(super) fn add(table: &mut String, size: &Size, figures: &Figures) -> Result<usize> {
    let mut missed = 0;
    let rows = memory_rows(size, figures).into_iter().chain(work_rows(size, figures));
    for Row { what, measured, bound, kept } in rows {
        let verdict = match (&bound, kept) {
            (None, _) => "",
            (Some(_), true) => "kept",
            (Some(_), false) => "**missed**",
        };
        missed += usize::from(bound.is_some() && !kept);
        let bound = bound.unwrap_or_default();
        writeln!(table, "| {}: {what} | {bound} | {measured} | {verdict} |", size.name)?;
        say(&format!("  {what}: {measured} {verdict}"));
    }
    Ok(missed)
}

fn memory_rows(size: &Size, figures: &Figures) -> Vec<Row> {
    let bound = size.resident_mb;
    let peak = figures.churned.0.peak;
    let row = |what: &str, measured, bytes: u64| Row {
        what: what.to_owned(),
        measured,
        bound: Some(format!("{bound} MB")),
        kept: bytes <= bound * 1_000_000,
    };
    let resident = |what, Memory { resident, anonymous, .. }: Memory| {
        let measured = format!("{}, anonymous {}", mb(resident), mb(anonymous));
        row(what, measured, resident)
    };
    vec![
        resident("resident after the first sync", figures.synced.0),
        resident("resident after the changes", figures.churned.0),
        row("peak of resident memory, start included", mb(peak), peak),
    ]
}

fn work_rows(size: &Size, figures: &Figures) -> Vec<Row> {
    let Figures { slices, ready_seconds, synced, churned, sync_cpu, cpu_percent } = figures;
    let changes = CHURN.as_secs() * u64::from(CHANGES_PER_SECOND);
    let note = |what, measured| Row { what, measured, bound: None, kept: true };
    let large = |words: String| size.large.then_some(words);
    vec![
        Row {
            what: "start to ready: both watches synced, rules read".to_owned(),
            measured: format!("{ready_seconds:.1} s, CPU {:.1} s", sync_cpu.as_secs_f64()),
            bound: large(format!("{SYNC_SECONDS} s")),
            kept: *ready_seconds <= SYNC_SECONDS,
        },
        Row {
            what: format!("CPU at {CHANGES_PER_SECOND} endpoint changes a second, of one core"),
            measured: format!("{cpu_percent:.1} %"),
            bound: large(format!("{CPU_PERCENT} %")),
            kept: *cpu_percent <= CPU_PERCENT,
        },
        Row {
            what: "watches begun".to_owned(),
            measured: churned.1.watches.to_string(),
            bound: Some("2".to_owned()),
            kept: churned.1.watches == 2,
        },
        note(
            format!("received: first lists, of {slices} slices"),
            format!("{}, {} pages", mb(synced.1.bytes), synced.1.pages),
        ),
        note(format!("received: {changes} changes"), mb(churned.1.bytes - synced.1.bytes)),
    ]
}

fn mb(bytes: u64) -> String {
    format!("{:.1} MB", Duration::from_micros(bytes).as_secs_f64())
}

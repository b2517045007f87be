//! The table: figures beside their bounds.

use std::time::Duration;

use crate::say;

/// A bound that the large set of rules has to keep, and whether it did.
pub(crate) struct Bound {
    pub(crate) words: String,
    pub(crate) kept: bool,
}

/// One line: a figure at both sizes.
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) figures: [String; 2],
    pub(crate) bound: Option<Bound>,
}

/// All lines, in the order they were measured.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// A line without a bound.
    pub(crate) fn note(&mut self, what: impl Into<String>, figures: [String; 2]) {
        self.add(Row { what: what.into(), figures, bound: None });
    }

    /// A line with a bound.
    pub(crate) fn check(
        &mut self,
        what: impl Into<String>,
        figures: [String; 2],
        words: impl Into<String>,
        kept: bool,
    ) {
        let bound = Some(Bound { words: words.into(), kept });
        self.add(Row { what: what.into(), figures, bound });
    }

    fn add(&mut self, row: Row) {
        say(&format!("  {}: {}", row.what, row.figures.join(" | ")));
        self.rows.push(row);
    }

    /// What did not keep its bound.
    pub(crate) fn missed(&self) -> Vec<&str> {
        let missed = |row: &&Row| row.bound.as_ref().is_some_and(|bound| !bound.kept);
        self.rows.iter().filter(missed).map(|row| &*row.what).collect()
    }

    /// As a table in Markdown.
    pub(crate) fn table(&self) -> String {
        let line = |Row { what, figures: [small, large], bound }: &Row| {
            let (words, verdict) = match bound {
                Some(bound) => (&*bound.words, if bound.kept { "kept" } else { "**missed**" }),
                None => ("", ""),
            };
            format!("| {what} | {small} | {large} | {words} | {verdict} |\n")
        };
        let lines: Vec<String> = self.rows.iter().map(line).collect();
        let heading = "| figure | 1,000 Services | 10,000 Services | bound | |\n\
                       | --- | --- | --- | --- | --- |\n";
        heading.to_owned() + &lines.concat()
    }
}

/// The value below which this share of the sorted values lies: the nearest rank.
fn quantile(values: &[Duration], percent: usize) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// The middle one.
pub(crate) fn median(values: &[Duration]) -> Duration {
    quantile(values, 50)
}

/// All but one in a hundred are at most this; the greatest of fewer than a hundred.
pub(crate) fn p99(values: &[Duration]) -> Duration {
    quantile(values, 99)
}

/// In milliseconds.
pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}

/// Median and 99th percentile.
pub(crate) fn spread(values: &[Duration]) -> String {
    format!("{}, p99 {}", ms(median(values)), ms(p99(values)))
}

/// In millions of bytes.
pub(crate) fn mb(bytes: usize) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

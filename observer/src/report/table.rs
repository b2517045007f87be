//! The report for a person: one row per workload, at most [`WIDTH`] columns wide.
//!
//! Pure. A figure that is not known is `-`.

use std::fmt::Write as _;

use super::merge::{Report, WorkloadLine};

/// Fits a terminal that is not maximised, and a pasted comment.
pub const WIDTH: usize = 100;

/// Heading lines and width of each column; every column but the first and the node is a number.
const COLUMNS: [(&str, &str, usize); 9] = [
    ("", "workload", 30),
    ("termin-", "ations", 7),
    ("gap", "max s", 7),
    ("slowest", "node", 12),
    ("head", "start s", 7),
    ("arrival", "tail s", 7),
    ("short-", "fall s", 7),
    ("", "refused", 7),
    ("sleep", "s", 5),
];

/// Renders the whole report; ends with a newline.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut text = String::new();
    if report.workloads.is_empty() {
        text.push_str("No termination seen yet: delete a pod, then ask again.\n");
    } else {
        line(&mut text, &COLUMNS.map(|(above, _, _)| above.to_owned()));
        line(&mut text, &COLUMNS.map(|(_, below, _)| below.to_owned()));
    }
    for workload in &report.workloads {
        line(&mut text, &row(workload));
        let recommendation = &workload.recommendation;
        for note in std::iter::once(&recommendation.because).chain(&recommendation.warnings) {
            note_lines(&mut text, note);
        }
    }
    if report.unattributed_terminations > 0 {
        let count = report.unattributed_terminations;
        let note = format!(
            "{count} more seen only by other nodes than the pod's own: ask the agents of all nodes"
        );
        note_lines(&mut text, &note);
    }
    text
}

fn row(workload: &WorkloadLine) -> [String; 9] {
    let kind = workload.kind.to_lowercase();
    [
        format!("{}/{kind}/{}", workload.namespace, workload.name),
        workload.terminations.to_string(),
        seconds(workload.gap_seconds),
        workload.slowest_node.clone().unwrap_or_else(unknown),
        seconds(workload.head_start_seconds),
        seconds(workload.arrival_tail_seconds),
        seconds(workload.shortfall_seconds),
        workload.refused.to_string(),
        workload.recommendation.sleep_seconds.map_or_else(unknown, |sleep| sleep.to_string()),
    ]
}

fn unknown() -> String {
    "-".to_owned()
}

fn seconds(figure: Option<f64>) -> String {
    figure.map_or_else(unknown, |figure| format!("{figure:.2}"))
}

/// Names are aligned left and cut to their column, numbers are aligned right and never cut.
fn line(text: &mut String, cells: &[String; 9]) {
    let mut columns = Vec::new();
    for (index, (cell, (_, _, width))) in cells.iter().zip(COLUMNS).enumerate() {
        columns.push(match index {
            0 | 3 => format!("{:<width$}", cut(cell, width)),
            _ => format!("{cell:>width$}"),
        });
    }
    text.push_str(columns.join(" ").trim_end());
    text.push('\n');
}

/// The end of a name tells more than its beginning.
fn cut(name: &str, width: usize) -> String {
    let length = name.chars().count();
    if length <= width {
        return name.to_owned();
    }
    std::iter::once('…').chain(name.chars().skip(length - width + 1)).collect()
}

/// Breaks a note at spaces, indented below its row.
fn note_lines(text: &mut String, note: &str) {
    const INDENT: &str = "  ";
    let mut column = 0;
    for word in note.split(' ') {
        let length = word.chars().count();
        if column == 0 || column + 1 + length > WIDTH {
            let newline = if column == 0 { "" } else { "\n" };
            let _infallible = write!(text, "{newline}{INDENT}{word}");
            column = INDENT.len() + length;
        } else {
            let _infallible = write!(text, " {word}");
            column += 1 + length;
        }
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recommend::Recommendation;

    fn workload() -> WorkloadLine {
        WorkloadLine {
            namespace: "default".to_owned(),
            kind: "Deployment".to_owned(),
            name: "web".to_owned(),
            terminations: 3,
            censored: 1,
            gap_seconds: Some(3.0149),
            slowest_node: Some("node-2".to_owned()),
            head_start_seconds: Some(0.02),
            arrival_tail_seconds: None,
            shortfall_seconds: Some(2.99),
            refused: 412,
            recommendation: Recommendation {
                sleep_seconds: Some(5),
                provisional: true,
                samples: 2,
                margin_seconds: 1.0,
                because: "largest need in 2 terminations is 3.01 s".to_owned(),
                warnings: vec!["word ".repeat(40).trim_end().to_owned()],
            },
        }
    }

    fn report(workloads: Vec<WorkloadLine>, unattributed_terminations: usize) -> Report {
        Report {
            api_version: String::new(),
            nodes: Vec::new(),
            workloads,
            unattributed_terminations,
        }
    }

    #[test]
    fn a_row_has_its_figures_under_headings_with_units() {
        let text = render(&report(vec![workload()], 0));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..4],
            [
                "                               termin-     gap slowest         head arrival  short-         sleep",
                "workload                        ations   max s node         start s  tail s  fall s refused     s",
                "default/deployment/web               3    3.01 node-2          0.02       -    2.99     412     5",
                "  largest need in 2 terminations is 3.01 s",
            ]
        );
    }

    #[test]
    fn no_line_is_wider_than_promised() {
        let mut long = workload();
        long.name = "a-name-as-long-as-kubernetes-allows-it-to-be".to_owned();
        long.slowest_node = Some("ip-10-0-12-34.eu-central-1.compute.internal".to_owned());
        let text = render(&report(vec![long], 2));
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(WIDTH), "{text}");
        assert!(text.contains("…as-kubernetes-allows-it-to-be"), "{text}");
        assert!(text.ends_with("ask the agents of all nodes\n"), "{text}");
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let mut unknown = workload();
        unknown.gap_seconds = None;
        unknown.slowest_node = None;
        unknown.recommendation.sleep_seconds = None;
        let text = render(&report(vec![unknown], 0));
        let row = text.lines().nth(2).expect("a row");
        assert_eq!(row.split_whitespace().filter(|cell| *cell == "-").count(), 4, "{row}");
    }

    #[test]
    fn an_empty_report_says_what_to_do() {
        let text = render(&report(vec![], 0));
        assert_eq!(text, "No termination seen yet: delete a pod, then ask again.\n");
    }
}

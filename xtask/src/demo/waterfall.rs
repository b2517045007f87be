//! One termination as a waterfall for a terminal of 80 columns. Pure: from the agent's JSON.
//!
//! An instant that nobody reported has no line.

use serde_json::Value;

use crate::lab::clock::seconds_between;

/// Columns of the bars; with names and figures a line has at most 80.
const BAR: usize = 44;

/// The lines of the waterfall: what, its instant, what its bar is drawn with, and the instant that
/// the bar begins at (the deletion request when not given).
const LINES: [(&str, &str, char, Option<&str>); 10] = [
    ("deletion requested", "deletionRequested", ' ', None),
    ("endpoint terminating", "endpointTerminating", ' ', None),
    ("SIGTERM", "sigterm", ' ', None),
    ("listener closed", "listenerClosed", '=', None),
    ("refused", "lastRefused", '#', Some("firstRefused")),
    ("last new connection", "lastNewConnection", '.', None),
    ("backend removed", "backendRemoved", '-', None),
    ("SIGKILL", "sigkill", ' ', None),
    ("process exited", "processExited", ' ', None),
    ("pod removed", "podRemoved", ' ', None),
];

/// Renders an element of `terminations`; ends with a newline.
pub(super) fn render(termination: &Value) -> String {
    let boot_ns = |instant: &str| termination["instants"][instant]["bootNs"].as_u64();
    let name = termination["pod"]["name"].as_str().unwrap_or("?");
    let Some(requested_ns) = boot_ns("deletionRequested") else {
        return format!("{name}: nobody saw the deletion request\n");
    };
    let offset = |instant: &str| Some(seconds_between(requested_ns, boot_ns(instant)?));
    let mut lines: Vec<(f64, f64, char, String)> = LINES
        .iter()
        .filter_map(|(what, instant, drawn, from)| {
            let from = from.and_then(offset).unwrap_or(0.0);
            let what = match *what {
                "refused" => format!("refused: {}", termination["refused"]),
                other => other.to_owned(),
            };
            Some((offset(instant)?, from, *drawn, what))
        })
        .collect();
    lines.sort_by(|one, other| one.0.total_cmp(&other.0));
    let span = lines.last().map_or(0.0, |last| last.0).max(0.001);

    let mut text = format!("{name}: seconds after its deletion was requested\n");
    for (at, from, drawn, what) in lines {
        let bar = bar(from / span, at / span, drawn);
        text += format!("  {what:<21} {bar:<BAR$} {at:>8.3}").trim_end();
        text.push('\n');
    }
    let figures = [
        ("= head start", "headStartSeconds"),
        ("- gap", "gapSeconds"),
        (". arrival tail", "arrivalTailSeconds"),
        ("shortfall", "shortfallSeconds"),
    ];
    let shown = figures.map(|(name, field)| match termination[field].as_f64() {
        Some(seconds) => format!("{name} {seconds:.3} s"),
        None => format!("{name} unknown"),
    });
    text + "  " + &shown.join(", ") + "\n"
}

/// From one fraction of the width to another, ending in a mark.
fn bar(from: f64, to: f64, drawn: char) -> String {
    let (begin, end) = (column(from), column(to));
    let space = " ".repeat(begin.min(end));
    let body: String = std::iter::repeat_n(drawn, end.saturating_sub(begin)).collect();
    format!("{space}{body}|")
}

/// The column of a fraction: the last whose share of the width begins at or before it. Outside of
/// 0 to 1 it is the nearest end.
fn column(fraction: f64) -> usize {
    (1..BAR).take_while(|column| column_begin(*column) <= fraction).count()
}

fn column_begin(column: usize) -> f64 {
    f64::from(u32::try_from(column).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(BAR - 1).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn termination(instants: &Value) -> Value {
        json!({
            "pod": {"name": "web-1"}, "refused": 87, "instants": instants,
            "gapSeconds": 1.6, "headStartSeconds": 0.02, "arrivalTailSeconds": null,
            "shortfallSeconds": 1.58,
        })
    }

    #[test]
    fn lines_are_in_the_order_of_time_and_fit_the_terminal() {
        let text = render(&termination(&json!({
            "deletionRequested": {"bootNs": 1_000_000_000_u64},
            "listenerClosed": {"bootNs": 1_020_000_000_u64},
            "firstRefused": {"bootNs": 1_030_000_000_u64},
            "lastRefused": {"bootNs": 2_590_000_000_u64},
            "backendRemoved": {"bootNs": 2_600_000_000_u64},
            "sigterm": null,
        })));
        let names: Vec<&str> =
            text.lines().skip(1).filter_map(|line| line.get(2..22)).map(str::trim).collect();
        assert_eq!(
            names[..4],
            ["deletion requested", "listener closed", "refused: 87", "backend removed"]
        );
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        assert!(text.contains("1.600\n"), "{text}");
        assert!(text.contains("arrival tail unknown"), "{text}");
    }

    #[test]
    fn without_a_request_there_is_nothing_to_draw() {
        let text = render(&termination(&json!({"deletionRequested": null})));
        assert_eq!(text, "web-1: nobody saw the deletion request\n");
    }

    #[test]
    fn an_instant_before_the_request_is_drawn_at_the_beginning() {
        assert_eq!(bar(0.0, -0.5, ' '), "|");
        assert_eq!(bar(0.0, 1.0, '=').len(), BAR);
    }
}

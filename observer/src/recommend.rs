//! From the terminations of one workload to the preStop sleep it needs.
//!
//! Pure. For now the bound is the largest need seen, so every figure is provisional; [`bound`] is
//! where the order statistics go. It refuses to name a figure without a complete termination.

use serde::{Deserialize, Serialize};

/// What is kept of the grace period for the container to be reaped after its processes ended; the
/// kubelet itself never grants less than 2 s after a preStop hook (`minimumGracePeriodInSeconds`).
const HEADROOM_SECONDS: f64 = 2.0;

/// The margin unless another is asked for: one kube-proxy `minSyncPeriod` (1 s by default), since
/// a change that just misses a sync waits that long.
pub const DEFAULT_MARGIN_SECONDS: f64 = 1.0;

/// What is known of one workload's terminations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// Of each complete termination: the larger of gap (over all nodes) and arrival tail, in s.
    pub needed_seconds: Vec<f64>,
    /// Terminations that are over but no samples: counted, never silently left out.
    pub censored: usize,
    /// The longest drain, in s.
    pub drain_seconds: Option<f64>,
    /// The sleep that the latest pod had, in s.
    pub pre_stop_sleep_seconds: Option<f64>,
    /// The latest pod's `terminationGracePeriodSeconds`.
    pub grace_period_seconds: Option<f64>,
}

/// What to set, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Recommendation {
    /// `lifecycle.preStop.sleep.seconds` to set; null when nothing supports a figure.
    pub sleep_seconds: Option<u64>,
    /// Whether more terminations may still raise it.
    pub provisional: bool,
    /// How many complete terminations it rests on.
    pub samples: usize,
    /// What was added to the bound.
    pub margin_seconds: f64,
    /// The reason, in words.
    pub because: String,
    /// What else to change or to know, in words.
    pub warnings: Vec<String>,
}

/// The sleep that would have covered every complete termination, plus `margin_seconds`, in whole
/// seconds as the API wants them.
#[must_use]
pub fn recommend(evidence: &Evidence, margin_seconds: f64) -> Recommendation {
    let bound = bound(&evidence.needed_seconds);
    let sleep_seconds = bound.map(|needed| whole_seconds(needed + margin_seconds));
    Recommendation {
        sleep_seconds,
        provisional: true,
        samples: evidence.needed_seconds.len(),
        margin_seconds,
        because: because(evidence, bound, margin_seconds),
        warnings: sleep_seconds.map(|sleep| warnings(evidence, sleep)).unwrap_or_default(),
    }
}

/// What the sleep must cover: the largest need seen.
fn bound(needed_seconds: &[f64]) -> Option<f64> {
    needed_seconds.iter().copied().reduce(f64::max)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float-to-int cast saturates, and the value is not below 0"
)]
fn whole_seconds(seconds: f64) -> u64 {
    seconds.max(0.0).ceil() as u64
}

#[expect(clippy::cast_precision_loss, reason = "seconds of a sleep are far below 2^52")]
fn float(seconds: u64) -> f64 {
    seconds as f64
}

fn because(evidence: &Evidence, bound: Option<f64>, margin_seconds: f64) -> String {
    let reason = match (bound, evidence.needed_seconds.len()) {
        (None, _) => "no complete termination seen yet".to_owned(),
        (Some(needed), samples) => {
            let plural = if samples == 1 { "" } else { "s" };
            format!(
                "largest need in {samples} termination{plural} is {needed:.2} s, plus \
                 {margin_seconds} s margin; provisional"
            )
        }
    };
    match evidence.censored {
        0 => reason,
        censored => format!("{reason}; {censored} censored, not counted"),
    }
}

fn warnings(evidence: &Evidence, sleep: u64) -> Vec<String> {
    let present =
        evidence.pre_stop_sleep_seconds.filter(|present| whole_seconds(*present) != sleep);
    let present = present.map(|present| format!("you wait {present} s, you need {sleep} s"));
    present.into_iter().chain(grace_warning(evidence, sleep)).collect()
}

/// The grace period covers the sleep and the drain together: what is left of it when the sleep
/// ends is all the time the process has.
fn grace_warning(evidence: &Evidence, sleep: u64) -> Option<String> {
    let grace = evidence.grace_period_seconds?;
    let drain = evidence.drain_seconds.unwrap_or(0.0);
    let least = float(sleep) + drain + HEADROOM_SECONDS;
    let remedy = format!("set terminationGracePeriodSeconds to {} or more", whole_seconds(least));
    if float(sleep) >= grace {
        Some(format!(
            "a sleep at or above the grace period ({grace} s) leaves no time to drain: {remedy}"
        ))
    } else if least > grace {
        Some(format!(
            "sleep {sleep} s + drain {drain:.1} s + headroom {HEADROOM_SECONDS} s exceed the grace \
             period ({grace} s): {remedy}"
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needed(seconds: &[f64]) -> Evidence {
        Evidence { needed_seconds: seconds.to_vec(), ..Evidence::default() }
    }

    #[test]
    fn the_largest_need_plus_margin_is_rounded_up() {
        let recommendation = recommend(&needed(&[0.2, 3.01, 2.5]), 1.0);
        assert_eq!(recommendation.sleep_seconds, Some(5));
        assert_eq!((recommendation.samples, recommendation.provisional), (3, true));
        assert_eq!(
            recommendation.because,
            "largest need in 3 terminations is 3.01 s, plus 1 s margin; provisional"
        );
        assert_eq!(recommendation.warnings, Vec::<String>::new());
    }

    #[test]
    fn a_whole_sum_is_not_rounded_further() {
        assert_eq!(recommend(&needed(&[3.0]), 1.0).sleep_seconds, Some(4));
        assert_eq!(recommend(&needed(&[0.0]), 0.0).sleep_seconds, Some(0));
    }

    #[test]
    fn a_need_below_zero_is_no_sleep() {
        assert_eq!(recommend(&needed(&[-0.5]), 0.25).sleep_seconds, Some(0));
    }

    #[test]
    fn without_a_complete_termination_there_is_no_figure_but_a_reason() {
        let evidence = Evidence {
            censored: 2,
            pre_stop_sleep_seconds: Some(5.0),
            grace_period_seconds: Some(1.0),
            ..Evidence::default()
        };
        let recommendation = recommend(&evidence, 1.0);
        assert_eq!((recommendation.sleep_seconds, recommendation.samples), (None, 0));
        assert_eq!(
            recommendation.because,
            "no complete termination seen yet; 2 censored, not counted"
        );
        assert_eq!(recommendation.warnings, Vec::<String>::new());
    }

    #[test]
    fn censored_terminations_are_shown_beside_the_samples() {
        let evidence = Evidence { censored: 1, ..needed(&[2.0]) };
        let because = recommend(&evidence, 1.0).because;
        assert!(because.contains("in 1 termination is"), "{because}");
        assert!(because.ends_with("; 1 censored, not counted"), "{because}");
    }

    #[test]
    fn a_sleep_that_differs_from_the_need_is_named() {
        let evidence = Evidence { pre_stop_sleep_seconds: Some(30.0), ..needed(&[2.5]) };
        assert_eq!(recommend(&evidence, 1.0).warnings, ["you wait 30 s, you need 4 s"]);
        let evidence = Evidence { pre_stop_sleep_seconds: Some(4.0), ..needed(&[2.5]) };
        assert_eq!(recommend(&evidence, 1.0).warnings, Vec::<String>::new());
    }

    #[test]
    fn a_sleep_at_the_grace_period_leaves_no_time_to_drain() {
        let evidence = Evidence {
            grace_period_seconds: Some(4.0),
            drain_seconds: Some(0.5),
            ..needed(&[2.5])
        };
        assert_eq!(
            recommend(&evidence, 1.0).warnings,
            ["a sleep at or above the grace period (4 s) leaves no time to drain: \
              set terminationGracePeriodSeconds to 7 or more"]
        );
    }

    #[test]
    fn the_drain_must_fit_behind_the_sleep() {
        let evidence = Evidence {
            grace_period_seconds: Some(30.0),
            drain_seconds: Some(25.5),
            ..needed(&[2.5])
        };
        assert_eq!(
            recommend(&evidence, 1.0).warnings,
            ["sleep 4 s + drain 25.5 s + headroom 2 s exceed the grace period (30 s): \
              set terminationGracePeriodSeconds to 32 or more"]
        );
    }
}

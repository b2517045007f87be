//! Any order of facts and any repetition give the same timelines.

use std::time::Duration;

use proptest::prelude::*;

use super::story::*;
use super::*;

/// Three terminations that overlap, two of them on one address, with jittered times.
fn stories() -> impl Strategy<Value = Vec<Fact>> {
    (0_u64..400, 0_u64..400, 14_000_u64..40_000).prop_map(|(early, late, reuse)| {
        let shift = |facts: Vec<Fact>, by: u64| {
            facts.into_iter().map(move |fact| shifted(fact, by)).collect::<Vec<_>>()
        };
        let mut facts = shift(TELLER.story(), early);
        facts.extend(shift(Teller { pod: OTHER, address: 9, netns: 90 }.story(), late));
        facts.extend(shift(Teller { pod: REUSER, address: 7, netns: 71 }.story(), reuse));
        facts
    })
}

fn shifted(fact: Fact, ms: u64) -> Fact {
    let later = |at: BootNs| at.plus(Duration::from_millis(ms));
    match fact {
        Fact::Cluster(ClusterFact::Pod(mut pod)) => {
            pod.at = later(pod.at);
            if let Some(deletion) = &mut pod.deletion {
                deletion.not_before = later(deletion.not_before);
            }
            Fact::Cluster(ClusterFact::Pod(pod))
        }
        Fact::Cluster(ClusterFact::PodRemoved { at, uid }) => {
            Fact::Cluster(ClusterFact::PodRemoved { at: later(at), uid })
        }
        Fact::Endpoint(step) => Fact::Endpoint(EndpointStep { at: later(step.at), ..step }),
        Fact::Backend(change) => Fact::Backend(BackendChange { at: later(change.at), ..change }),
        Fact::Kernel(event) => Fact::Kernel(KernelEvent { at: later(event.at), ..event }),
        Fact::Arrivals(arrivals) => {
            Fact::Arrivals(Arrivals { last: later(arrivals.last), ..arrivals })
        }
        fact @ Fact::Cluster(_) => fact,
    }
}

proptest! {
    #[test]
    fn any_order_and_any_repetition_give_the_same_timelines(
        (facts, shuffled, repeated) in stories().prop_flat_map(|facts| {
            let repeats = proptest::sample::subsequence(facts.clone(), 0..facts.len());
            (Just(facts.clone()), Just(facts).prop_shuffle(), repeats)
        }),
        advances in 0_usize..8,
    ) {
        let expected = correlate(facts.clone());
        let mut actual = Correlator::new("node-1");
        let mix: Vec<Fact> = shuffled.into_iter().chain(repeated).collect();
        let pause = mix.len() / (advances + 1);
        for (index, fact) in mix.into_iter().enumerate() {
            if index % pause.max(1) == 0 {
                // Time passes between arrivals, not enough for anything to close.
                prop_assert_eq!(actual.advance(at(12_000)), vec![]);
            }
            record(&mut actual, fact);
        }
        prop_assert_eq!(actual.timelines(), expected.timelines());
        prop_assert_eq!(actual.refused_by_workload(), expected.refused_by_workload());
        prop_assert_eq!(expected.timelines().len(), 3);
        for (timeline, _) in expected.timelines() {
            assert_seconds(timeline.gap_seconds(), 1.3);
            prop_assert_eq!(timeline.refused, 5);
            prop_assert!(timeline.censored.is_empty());
        }
    }
}

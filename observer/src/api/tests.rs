use crate::sample;

use super::*;

/// A served API on a port of its own; the correlator is a task that always answers the same.
async fn served(readiness: Readiness) -> String {
    let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let (questions, mut asked) = mpsc::channel::<Question>(1);
    tokio::spawn(async move {
        while let Some(question) = asked.recv().await {
            question.send(vec![(sample::timeline(), true)]).expect("somebody waits");
        }
    });
    let metrics = Metrics::new().expect("metrics");
    let sources = Sources { node: "node-1".into(), readiness, metrics, questions };
    tokio::spawn(serve(listener, sources));
    format!("http://{address}")
}

/// Status and body.
async fn ask(url: String) -> (u16, String) {
    let asked = tokio::task::spawn_blocking(move || {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut response = ureq::Agent::new_with_config(config).get(&url).call().expect("answer");
        let body = response.body_mut().read_to_string().expect("a body");
        (response.status().as_u16(), body)
    });
    asked.await.expect("no panic")
}

#[tokio::test]
async fn a_living_agent_says_so_even_when_it_is_not_ready() {
    let readiness = Readiness::default();
    let watch = readiness.expect("pod watch", "cannot list: connection refused");
    let _probe = readiness.expect("probe refused", "this kernel has no BTF");
    let url = served(readiness).await;
    assert_eq!(ask(format!("{url}/livez")).await, (200, "ok\n".to_owned()));
    let missing =
        "pod watch: cannot list: connection refused\nprobe refused: this kernel has no BTF\n";
    assert_eq!(ask(format!("{url}/readyz")).await, (503, missing.to_owned()));
    watch.up();
    let (status, body) = ask(format!("{url}/readyz")).await;
    assert_eq!((status, body.lines().count()), (503, 1));
}

#[tokio::test]
async fn ready_when_nothing_is_missing() {
    let url = served(Readiness::default()).await;
    assert_eq!(ask(format!("{url}/readyz")).await, (200, "ok\n".to_owned()));
}

#[tokio::test]
async fn metrics_are_text_that_names_the_version() {
    let url = served(Readiness::default()).await;
    let (status, body) = ask(format!("{url}/metrics")).await;
    assert_eq!(status, 200);
    assert!(body.contains(&format!("version=\"{}\"", env!("CARGO_PKG_VERSION"))), "{body}");
}

#[tokio::test]
async fn terminations_are_versioned_and_named_by_node() {
    let url = served(Readiness::default()).await;
    let (status, body) = ask(format!("{url}/v1/terminations")).await;
    assert_eq!(status, 200);
    let answer: Terminations = serde_json::from_str(&body).expect("the documented shape");
    assert_eq!((answer.api_version.as_str(), answer.node.as_str()), ("observer/v1", "node-1"));
    assert_eq!(answer.terminations.len(), 1);
    assert_eq!(answer.terminations[0].pod.name, "web-a");
}

#[tokio::test]
async fn an_unknown_path_names_the_known_ones() {
    let url = served(Readiness::default()).await;
    let (status, body) = ask(format!("{url}/terminations")).await;
    assert_eq!(status, 404);
    assert!(body.contains("/v1/terminations"), "{body}");
}

#[tokio::test]
async fn a_taken_port_says_what_to_do() {
    let first = bind(([127, 0, 0, 1], 0).into()).await.expect("a port");
    let address = first.local_addr().expect("bound");
    let error = bind(address).await.expect_err("taken");
    let words = format!("{error:#}");
    assert!(words.starts_with(&format!("cannot listen on {address}: stop what")), "{words}");
    assert!(words.contains("Address already in use"), "{words}");
}

#[tokio::test]
async fn an_address_of_another_host_is_not_said_to_be_taken() {
    // 192.0.2.0/24 is for documentation: no host has it.
    let error = bind(([192, 0, 2, 1], 9464).into()).await.expect_err("not here");
    let words = format!("{error:#}");
    assert!(words.contains("no address of this host") && !words.contains("stop"), "{words}");
}

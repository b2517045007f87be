//! `observer report`: asks the agents, merges their answers, prints the recommendation.
//!
//! A shell around `merge` and `table`, which are pure. An agent that does not answer is named and
//! left out; the report fails only when none answers.

mod merge;
mod table;

use std::io::Write;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::api::terminations::{API_VERSION, Terminations};

pub use merge::{NodeAnswer, NodeLine, Report, WorkloadLine, merge};
pub use table::{WIDTH, render};

/// How long one agent may take. It answers from memory, within milliseconds.
const ANSWER: Duration = Duration::from_secs(10);

/// How many agents are asked at once.
const AT_ONCE: usize = 16;

/// The largest answer that is read: some 30,000 terminations.
const ANSWER_BYTES: u64 = 64 << 20;

/// How the report is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// Columns for a person.
    Table,
    /// JSON for a program.
    Json,
}

/// Prints the report of the agents at `urls` to `out`, and a line per silent agent to `errors`.
///
/// # Errors
/// When no agent answers, or a writer fails.
pub fn run(
    urls: &[String],
    output: Output,
    margin_seconds: f64,
    out: &mut dyn Write,
    errors: &mut dyn Write,
) -> anyhow::Result<()> {
    let answers = ask_all(urls);
    let report = merge(&answers, margin_seconds);
    let silent: Vec<&str> = report.nodes.iter().filter_map(|node| node.error.as_deref()).collect();
    for error in &silent {
        writeln!(errors, "error: {error}").context("writing errors")?;
    }
    match output {
        Output::Table if silent.len() == report.nodes.len() => {}
        Output::Table => out.write_all(render(&report).as_bytes()).context("writing the report")?,
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, &report).context("writing the report")?;
            writeln!(out).context("writing the report")?;
        }
    }
    if silent.len() == report.nodes.len() {
        bail!("no agent answered");
    }
    Ok(())
}

fn ask_all(urls: &[String]) -> Vec<NodeAnswer> {
    let config = ureq::Agent::config_builder().timeout_global(Some(ANSWER)).build();
    let agent = ureq::Agent::new_with_config(config);
    let mut answers = Vec::with_capacity(urls.len());
    for group in urls.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let asking: Vec<_> = group.iter().map(|url| scope.spawn(|| ask(&agent, url))).collect();
            for (url, thread) in group.iter().zip(asking) {
                let answer = thread.join().unwrap_or_else(|_panic| bail!("asking it panicked"));
                let answer = answer.map_err(|error| format!("{url}: {error:#}"));
                answers.push(NodeAnswer { url: url.clone(), answer });
            }
        });
    }
    answers
}

fn ask(agent: &ureq::Agent, url: &str) -> anyhow::Result<Terminations> {
    let place = format!("{}/v1/terminations", url.trim_end_matches('/'));
    let mut response = agent.get(&place).call().context(
        "no answer: check that the agent runs there (GET /readyz) and that its port is reachable",
    )?;
    let body = response.body_mut().with_config().limit(ANSWER_BYTES).read_to_string();
    let body = body.context("the answer broke off")?;
    read_answer(&body)
}

/// An agent's answer from its JSON.
///
/// # Errors
/// When it is no agent's, or another version's.
pub(crate) fn read_answer(body: &str) -> anyhow::Result<Terminations> {
    let answer: Terminations = serde_json::from_str(body)
        .context("not an observer's answer: check that the URL is an agent's --listen address")?;
    if answer.api_version != API_VERSION {
        bail!("it speaks {}, this report {API_VERSION}: use the same version", answer.api_version);
    }
    Ok(answer)
}

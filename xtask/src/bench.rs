//! `cargo xtask bench`: speed and size, measured on this machine. No test asserts them, for they
//! depend on what else runs.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::{
    build::{self, cargo, root},
    setup, step,
};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The part of the observer
    #[arg(value_enum)]
    part: Part,
    /// Also write the table to docs/bench-PART.md
    #[arg(long)]
    save: bool,
}

/// A part of the observer that has a benchmark.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Part {
    /// The reader of the node's rules, beside what a person would use instead.
    Dataplane,
    /// An agent on a node of a large cluster.
    Cluster,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Dataplane => "dataplane",
            Self::Cluster => "cluster",
        }
    }
}

/// Builds optimised, measures, and prints a table to standard output.
///
/// # Errors
/// A missing tool, a failed build, or a figure that misses its bound; the bench has said which.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run(setup::Task::Network)?;
    let name = args.part.name();
    let save = args.save.then(|| format!("{}/docs/bench-{name}.md", root()));
    match args.part {
        Part::Dataplane => dataplane(save),
        Part::Cluster => {
            build::observer(build::Profile::Release)?;
            let observer = Path::new(root()).join("target/release/observer");
            xtask::scale::run(&observer, save.as_deref().map(Path::new))
        }
    }
}

fn dataplane(save: Option<String>) -> Result<()> {
    let mut bench = cargo("bench");
    bench.args(["--package=observer", "--bench", "dataplane"]);
    if let Some(file) = save {
        bench.args(["--", "--save", &file]);
    }
    step::shown(&mut bench)
}

//! What the commands share with the tests: the lab, and the demo that it runs.

pub mod lab;

pub mod demo {
    //! Placeholder until the demo is merged.
    /// Placeholder.
    #[derive(Debug, clap::Args)]
    pub struct Args {}
    /// Placeholder.
    ///
    /// # Errors
    /// Always.
    pub fn run(_args: Args) -> anyhow::Result<()> {
        anyhow::bail!("the demo is not merged yet")
    }
}

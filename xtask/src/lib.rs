//! What the commands share with the tests: the lab and the demo.
pub mod demo {
    //! Placeholder.
    /// Placeholder.
    #[derive(Debug, clap::Args)]
    pub struct Args {}
    /// Placeholder.
    ///
    /// # Errors
    /// Always.
    pub fn run(_args: &Args) -> anyhow::Result<()> {
        anyhow::bail!("placeholder")
    }
}
pub mod lab {
    //! Placeholder.
    pub mod pod {
        //! Placeholder.
        /// Placeholder.
        #[derive(Debug, clap::Args)]
        pub struct Args {}
        /// Placeholder.
        ///
        /// # Errors
        /// Always.
        pub fn run(_args: &Args) -> anyhow::Result<()> {
            anyhow::bail!("placeholder")
        }
    }
}

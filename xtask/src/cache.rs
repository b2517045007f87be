//! Where downloads and builds are kept: outside the checkout, for all checkouts of a person.

use std::env;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// `$XDG_CACHE_HOME/observer/<part>`, or below `~/.cache`. Need not exist yet.
///
/// # Errors
/// When neither variable says where that is.
pub(crate) fn directory(part: &str) -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .with_context(|| format!("neither XDG_CACHE_HOME nor HOME says where to keep {part}"))?;
    Ok(base.join("observer").join(part))
}

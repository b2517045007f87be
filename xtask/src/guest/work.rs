//! A directory for one run at a time, in a place that stays the same: what a killed run left there,
//! the next one removes.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::step;

/// An empty directory, removed at the end. The kernel lets go of the lock when its process ends.
#[derive(Debug)]
pub(crate) struct Work {
    path: PathBuf,
    _lock: File,
}

impl Work {
    /// Waits for its turn, and empties the directory.
    pub(crate) fn begin(path: &Path) -> Result<Self> {
        let begin = || -> Result<Self> {
            let lock = path.with_extension("lock");
            fs::create_dir_all(path.parent().context("a directory to work in")?)?;
            let lock = File::options().create(true).append(true).open(lock)?;
            if let Err(TryLockError::WouldBlock) = lock.try_lock() {
                step::say(&format!("waiting for another run in {}", path.display()));
                lock.lock()?;
            }
            if path.exists() {
                fs::remove_dir_all(path)?;
            }
            fs::create_dir(path)?;
            Ok(Self { path: path.to_owned(), _lock: lock })
        };
        begin().with_context(|| format!("cannot work in {}", path.display()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            step::say(&format!("{} stays: {error}", self.path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_gone() {
        let parent = tempfile::tempdir().expect("temporary directory");
        let path = parent.path().join("work");
        fs::create_dir(&path).expect("a directory");
        fs::write(path.join("left"), "").expect("a file");
        let work = Work::begin(&path).expect("nobody else works here");
        assert_eq!(fs::read_dir(work.path()).expect("it is there").count(), 0);
        drop(work);
        assert!(!path.exists());
    }

    #[test]
    fn a_second_run_waits_for_the_first() {
        let parent = tempfile::tempdir().expect("temporary directory");
        let path = parent.path().join("work");
        let first = Work::begin(&path).expect("nobody else works here");
        fs::write(path.join("of-the-first"), "").expect("a file");
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let second = Work::begin(&path).expect("after the first");
                fs::read_dir(second.path()).expect("it is there").count()
            });
            assert!(path.join("of-the-first").exists());
            drop(first);
            assert_eq!(second.join().expect("no panic"), 0);
        });
    }
}

//! Debian's kernels for virtual machines, fetched once and kept.
//!
//! Kept below `$XDG_CACHE_HOME/observer/guest` (or `~/.cache`), outside the checkout; a kernel
//! stays the same until its directory is removed. A directory appears only complete, by a rename.

use std::cmp::Reverse;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};

use super::apt::Apt;
use super::work::Work;
use crate::{cache, step};

/// What split packages are called, before the version.
const PARTS: &[&str] = &["linux-base-", "linux-binary-", "linux-modules-"];
/// Part of the kept directories' path: raise it when their layout changes.
const LAYOUT: &str = "1";
/// Debian's flavour without drivers for real hardware: the smallest.
const FLAVOUR: &str = "-cloud-amd64";

/// A kernel series and the Debian suite that carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    series: &'static str,
    suite: &'static str,
    /// What tests rely on and later kernels have built in, without a trace.
    pub(super) modules: &'static [&'static str],
}

/// Oldest first. No suite carries a cloud kernel of 5.15 or 6.6.
pub const RELEASES: &[Release] = &[
    Release { series: "5.10", suite: "bullseye", modules: &["nft_counter"] },
    Release { series: "6.1", suite: "bookworm", modules: &[] },
    Release { series: "6.12", suite: "trixie", modules: &[] },
    Release { series: "6.18", suite: "trixie-backports", modules: &[] },
    Release { series: "7.2", suite: "trixie-backports", modules: &[] },
];

impl fmt::Display for Release {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.series)
    }
}

impl FromStr for Release {
    type Err = String;

    fn from_str(series: &str) -> Result<Self, String> {
        RELEASES.iter().copied().find(|release| release.series == series).ok_or_else(|| {
            let known: Vec<&str> = RELEASES.iter().map(|release| release.series).collect();
            format!("known are {}", known.join(", "))
        })
    }
}

/// A kernel on this machine.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` tells it.
    pub version: String,
    /// The bootable file.
    pub image: PathBuf,
    /// Its modules, compressed, with `modules.dep`.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kept kernel of this release; fetches it the first time.
    ///
    /// # Errors
    /// No directory to keep it in, no Debian mirror, or a failed download.
    pub fn get(release: Release) -> Result<Self> {
        let kept = cache::directory("guest")?.join(LAYOUT).join(release.series);
        if !kept.exists() {
            fetch(release, &kept).with_context(|| format!("cannot fetch Linux {release}"))?;
        }
        Self::kept(&kept).with_context(|| format!("remove {} and try again", kept.display()))
    }

    fn kept(directory: &Path) -> Result<Self> {
        let mut versions = fs::read_dir(directory.join("lib/modules"))?;
        let modules = versions.next().context("no modules")??.path();
        let version = modules.file_name().context("no version")?.to_string_lossy().into_owned();
        let image = directory.join("vmlinuz");
        ensure!(image.is_file(), "{} is missing", image.display());
        Ok(Self { version, image, modules })
    }
}

fn fetch(release: Release, kept: &Path) -> Result<()> {
    let work = Work::begin(&kept.with_file_name("partial"))?;
    if kept.exists() {
        // Another run fetched it meanwhile.
        return Ok(());
    }
    let apt = Apt::of_suite(release.suite, work.path())?;
    let name = newest(&apt.names(&format!("linux-image-{release}."))?)
        .with_context(|| format!("{} has no kernel {release} any more", release.suite))?;
    let unpacked = work.path().join("unpacked");
    apt.unpack(&packages(&name, &apt.show(&name)?), &unpacked)?;

    let complete = work.path().join("complete");
    let version = name.trim_start_matches("linux-image-");
    let in_usr = |file: &str| format!("usr/lib/modules/{version}{file}");
    fs::create_dir_all(complete.join("lib/modules"))?;
    let image = first_of(&unpacked, &[&format!("boot/vmlinuz-{version}"), &in_usr("/vmlinuz")])?;
    fs::rename(image, complete.join("vmlinuz"))?;
    let from = first_of(&unpacked, &[&in_usr(""), &format!("lib/modules/{version}")])?;
    fs::rename(from, complete.join("lib/modules").join(version))?;
    step::titled(
        "guest: indexing modules",
        Command::new("depmod").arg("--basedir").arg(&complete).arg(version),
    )?;
    fs::rename(&complete, kept).with_context(|| format!("cannot write {}", kept.display()))
}

/// Where this Debian release has it.
fn first_of(directory: &Path, places: &[&str]) -> Result<PathBuf> {
    let places = places.iter().map(|place| directory.join(place));
    let none = || format!("the package has none of {places:?}");
    places.clone().find(|place| place.exists()).with_context(none)
}

/// The newest of the packages that hold a kernel of our flavour.
fn newest(names: &[String]) -> Option<String> {
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    let ours = names.iter().filter(|name| name.ends_with(FLAVOUR));
    ours.min_by_key(|name| Reverse(numbers(name))).cloned()
}

/// The packages to unpack: from 6.19 on `linux-image-*` is empty and depends on the ones that hold
/// the kernel (`linux-binary-*`), its modules, and what is said of both (`linux-base-*`).
fn packages(name: &str, shown: &str) -> Vec<String> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let split = depends
        .split(", ")
        .filter_map(|dependency| dependency.split(' ').next())
        .filter(|name| PARTS.iter().any(|part| name.starts_with(part)));
    std::iter::once(name).chain(split).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_chosen_by_number() {
        let names = [
            "linux-image-6.12.94+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-6.12.108+deb13-cloud-amd64-unsigned",
            "linux-image-6.12.109+deb13-amd64",
        ];
        let newest = newest(&names.map(str::to_owned));
        assert_eq!(newest.as_deref(), Some("linux-image-6.12.107+deb13-cloud-amd64"));
    }

    #[test]
    fn split_packages_come_with_their_parts_and_no_others() {
        let shown = "Package: linux-image-7\nDepends: dracut | initramfs-tools (>= 0.120), \
            linux-base-7 (= 7-1), linux-binary-7 (= 7-1), linux-modules-7 (= 7-1)\nSize: 1924\n";
        assert_eq!(
            packages("linux-image-7", shown),
            ["linux-image-7", "linux-base-7", "linux-binary-7", "linux-modules-7"]
        );
        assert_eq!(packages("linux-image-6", "Depends: kmod\n"), ["linux-image-6"]);
    }

    #[test]
    fn an_unknown_release_names_the_known_ones() {
        assert_eq!("6.12".parse::<Release>().map(|known| known.suite), Ok("trixie"));
        let error = "5.15".parse::<Release>().expect_err("not in Debian");
        assert_eq!(error, "known are 5.10, 6.1, 6.12, 6.18, 7.2");
    }
}

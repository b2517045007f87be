//! Kubernetes' own programs and etcd, compiled from their Go modules once and kept.
//!
//! `modules/go.mod` pins the versions and `modules/go.sum` what every module must hash to. Kept
//! below `$XDG_CACHE_HOME/observer/kubernetes` (or `~/.cache`), by version and by a hash of all that
//! decides the outcome; a directory appears only complete, by a rename.

use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::guest::work::Work;
use crate::{cache, step};

const GO_MOD: &str = include_str!("modules/go.mod");
const GO_SUM: &str = include_str!("modules/go.sum");
/// As `modules/go.mod` requires it.
const VERSION: &str = "v1.36.3";
/// What `--version` and the API tell; clients read the minor version.
const LINKED: &str = "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 -X \
                      k8s.io/component-base/version.gitMajor=1 -X \
                      k8s.io/component-base/version.gitMinor=36";
/// Name and package of each program.
const PROGRAMS: &[(&str, &str)] = &[
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
];
/// The compiler: Kubernetes 1.36 wants 1.26. Any Go from 1.19 on, Debian 12's, can fetch it.
const TOOLCHAIN: &str = "go1.26.8";
/// The first release that fetches the compiler which `go.mod` names by itself.
const SELF_UPDATING: (u32, u32) = (1, 21);

/// A directory with all the programs.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// A person's own programs.
    ///
    /// # Errors
    /// Names those that are missing.
    pub(crate) fn in_directory(directory: &Path) -> Result<Self> {
        let is_missing = |name: &&str| !directory.join(name).is_file();
        let missing: Vec<&str> =
            PROGRAMS.iter().map(|(name, _)| *name).filter(is_missing).collect();
        ensure!(missing.is_empty(), "{} lacks {}", directory.display(), missing.join(", "));
        Ok(Self { directory: directory.to_owned() })
    }

    /// The kept programs, when an earlier run compiled them.
    pub(crate) fn kept() -> Option<Self> {
        Self::in_directory(&kept_directory().ok()?).ok()
    }

    /// The kept programs; compiles them the first time, which takes some minutes.
    ///
    /// # Errors
    /// No Go, no directory to keep them in, a failed download or compilation.
    pub(crate) fn get() -> Result<Self> {
        if let Some(kept) = Self::kept() {
            return Ok(kept);
        }
        let kept = kept_directory()?;
        compile(&kept).context("cannot compile Kubernetes; `--binaries DIR` takes your own")?;
        Self::in_directory(&kept)
    }

    /// The path of one of them.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn kept_directory() -> Result<PathBuf> {
    let mut inputs = DefaultHasher::new();
    (GO_MOD, GO_SUM, LINKED, PROGRAMS, TOOLCHAIN).hash(&mut inputs);
    Ok(cache::directory("kubernetes")?.join(format!("{VERSION}-{:016x}", inputs.finish())))
}

fn compile(kept: &Path) -> Result<()> {
    let work = Work::begin(&kept.with_added_extension("partial"))?;
    if kept.exists() {
        // Another run compiled them meanwhile.
        return Ok(());
    }
    let go = compiler(work.path())?;
    fs::write(work.path().join("go.mod"), GO_MOD)?;
    fs::write(work.path().join("go.sum"), GO_SUM)?;
    let complete = work.path().join("complete");
    for (name, package) in PROGRAMS {
        step::titled(
            &format!("kubernetes: compiling {name} (minutes, once)"),
            self::go(&go, work.path())
                .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false"])
                .args(["-ldflags", LINKED, "-o"])
                .arg(complete.join(name))
                .arg(package),
        )?;
    }
    fs::rename(&complete, kept).with_context(|| format!("cannot write {}", kept.display()))
}

/// The `go` in the search path when it can be, or become, what `go.mod` asks for; else one that it
/// fetches as the module that newer releases would fetch by themselves, checked alike.
fn compiler(directory: &Path) -> Result<PathBuf> {
    let found = PathBuf::from("go");
    let version = output(go(&found, directory).args(["env", "GOVERSION"]))?;
    let release = release(&version).with_context(|| format!("which Go is {version:?}?"))?;
    if release >= SELF_UPDATING {
        return Ok(found);
    }
    let module = format!("golang.org/toolchain@v0.0.1-{TOOLCHAIN}.linux-{}", architecture()?);
    step::say(&format!("kubernetes: fetching {TOOLCHAIN}, as {} is too old", version.trim()));
    let fetched = output(go(&found, directory).args(["mod", "download", "-json", &module]))?;
    let fetched: Value = serde_json::from_str(&fetched)?;
    let root = Path::new(fetched["Dir"].as_str().context("go does not say where it put it")?);
    // Modules come without the permission to run.
    for programs in [root.join("bin"), tools(root)?] {
        for program in fs::read_dir(&programs)? {
            let program = program?.path();
            fs::set_permissions(&program, Permissions::from_mode(0o755))
                .with_context(|| format!("cannot make {} a program", program.display()))?;
        }
    }
    Ok(root.join("bin/go"))
}

/// `pkg/tool/<system>_<architecture>`, the only directory there.
fn tools(root: &Path) -> Result<PathBuf> {
    let mut tools = fs::read_dir(root.join("pkg/tool"))?;
    Ok(tools.next().context("the Go toolchain has no tools")??.path())
}

/// What `go env GOVERSION` prints, such as `go1.26.8`.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().strip_prefix("go")?.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("{other} is not what Kubernetes is tried on here: give --binaries DIR"),
    }
}

/// A command of Go that no setting of this machine's user changes.
fn go(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).env("GOTOOLCHAIN", "auto").env("GOWORK", "off");
    command.env("CGO_ENABLED", "0").env_remove("GOFLAGS").env_remove("GOROOT");
    command
}

fn output(command: &mut Command) -> Result<String> {
    Ok(crate::lab::command::run(None, command, "")?.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_version_is_what_the_programs_tell() {
        assert!(GO_MOD.contains(&format!("k8s.io/kubernetes {VERSION}\n")));
        assert!(LINKED.contains(VERSION));
        assert!(GO_MOD.contains(&format!("\ntoolchain {TOOLCHAIN}\n")));
        for (name, package) in PROGRAMS {
            assert!(GO_MOD.contains(&format!("\t{package}\n")), "{name}");
        }
    }

    #[test]
    fn releases_of_go_are_compared_by_number() {
        assert_eq!(release("go1.19.8\n"), Some((1, 19)));
        assert!(release("go1.26rc1") > Some(SELF_UPDATING));
        assert_eq!(release("devel"), None);
    }

    #[test]
    fn missing_programs_are_named() {
        let directory = tempfile::tempdir().expect("temporary directory");
        for (name, _) in &PROGRAMS[1..] {
            fs::write(directory.path().join(name), "").expect("a file");
        }
        let error = Binaries::in_directory(directory.path()).expect_err("one is missing");
        assert!(error.to_string().ends_with("lacks etcd"), "{error}");
        fs::write(directory.path().join("etcd"), "").expect("a file");
        Binaries::in_directory(directory.path()).expect("all are there");
    }
}

//! Debian packages of any suite, without a change to this machine.
//!
//! A private set of package lists over the mirror that this machine is configured for: signatures
//! are checked against Debian's keys, the machine's sources and lists are only read. Refuses a
//! machine that has no Debian mirror configured: no address is guessed.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::step;

/// Debian's own keys for all its suites, from the package `debian-archive-keyring`, which every
/// Debian has.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists of one suite, in a directory of their own.
pub(super) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Fetches the lists of `suite` into `directory`, which is the caller's to remove.
    pub(super) fn of_suite(suite: &str, directory: &Path) -> Result<Self> {
        let sources =
            output(Command::new("apt-get").args(["indextargets", "Created-By: Packages"]))
                .context("asking for this machine's package sources; a kernel comes from Debian")?;
        let mirror = mirror(&sources).context(
            "no Debian mirror among this machine's package sources, or their lists are missing: \
             run `apt-get update`",
        )?;
        let source = format!("deb [arch=amd64 signed-by={KEYS}] {mirror} {suite} main\n");
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part)).context("cannot write package lists")?;
        }
        fs::write(directory.join("sources.list"), source)?;
        let apt = Self { directory: directory.to_owned() };
        step::titled(
            &format!("guest: refreshing the package lists of {suite}"),
            apt.command("apt-get").args(["update", "-q"]),
        )?;
        Ok(apt)
    }

    /// The names of all packages that begin with `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// What a package says of itself, as `Field: value` lines.
    pub(super) fn show(&self, package: &str) -> Result<String> {
        output(self.command("apt-cache").args(["show", "--no-all-versions", package]))
    }

    /// Unpacks packages into `target` without installing them.
    pub(super) fn unpack(&self, packages: &[String], target: &Path) -> Result<()> {
        let archives = self.directory.join("packages");
        fs::create_dir_all(&archives)?;
        step::titled(
            &format!("guest: fetching {}", packages.join(" ")),
            self.command("apt-get").args(["download", "-q"]).args(packages).current_dir(&archives),
        )?;
        for archive in fs::read_dir(&archives)? {
            let archive = archive?.path();
            let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
            step::titled(
                &format!("guest: unpacking {name}"),
                Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(target),
            )?;
        }
        Ok(())
    }

    /// One of apt's programs, turned to these lists; the machine's other settings (proxies) stay.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let own = |setting: &str, path: &str| option(setting, self.directory.join(path));
        for setting in [
            own("Dir::Etc::sourcelist", "sources.list"),
            option("Dir::Etc::sourceparts", "/dev/null"),
            own("Dir::State::lists", "lists"),
            // What is installed does not matter for what can be fetched.
            option("Dir::State::status", "/dev/null"),
            own("Dir::Cache", "cache"),
            option("Acquire::Languages", "none"),
        ] {
            command.arg("-o").arg(setting);
        }
        command
    }
}

fn option(setting: &str, value: impl AsRef<OsStr>) -> OsString {
    let mut option = OsString::from(format!("{setting}="));
    option.push(value);
    option
}

/// The mirror of Debian's main archive among what `apt-get indextargets` prints: blocks of
/// `Field: value`. Security and update suites are on mirrors of their own or lack old kernels.
fn mirror(index_targets: &str) -> Option<&str> {
    index_targets.split("\n\n").find_map(|block| {
        let field =
            |name: &str| block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let suite = field("Release")?;
        let main = field("Component") == Some("main") && !suite.contains(['-', '/']);
        let debian = field("Origin") == Some("Debian") && field("Label") == Some("Debian");
        field("Repo-URI").filter(|_| main && debian)
    })
}

/// What a program prints; its error output when it fails.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{program} did not start"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed ({}): {}", output.status, errors.trim());
    match String::from_utf8(output.stdout) {
        Ok(text) => Ok(text),
        Err(error) => bail!("{program} printed no text: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECURITY: &str = "Label: Debian-Security\nOrigin: Debian\nComponent: main\n\
        Release: bookworm-security\nRepo-URI: http://mirror.example/debian-security/\n";
    const FOREIGN: &str = "Label: Tools\nOrigin: Tools\nComponent: main\nRelease: stable\n\
        Repo-URI: http://tools.example/\n";
    const MAIN: &str = "Label: Debian\nOrigin: Debian\nComponent: main\nRelease: bookworm\n\
        Repo-URI: http://mirror.example/debian/\n";

    #[test]
    fn the_main_archives_mirror_is_found_among_others() {
        let found = [FOREIGN, SECURITY, MAIN].join("\n");
        assert_eq!(mirror(&found), Some("http://mirror.example/debian/"));
    }

    #[test]
    fn without_a_mirror_of_debian_none_is_guessed() {
        assert_eq!(mirror(&[FOREIGN, SECURITY].join("\n")), None);
        assert_eq!(mirror(""), None);
    }
}

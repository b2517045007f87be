//! Which module files a guest needs, in the order in which they load.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::kernels::Kernel;

/// Puts the wanted modules and what they depend on into `target`, decompressed (busybox loads no
/// other); returns their file names, dependencies first.
pub(super) fn copy(kernel: &Kernel, wanted: &[String], target: &Path) -> Result<Vec<String>> {
    let read = |name: &str| {
        let path = kernel.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let (dependencies, builtin) = (read("modules.dep")?, read("modules.builtin")?);
    let index = Index::parse(&dependencies, &builtin);
    let mut names = Vec::new();
    for path in index.ordered(wanted).with_context(|| format!("Linux {}", kernel.version))? {
        let name = format!("{}.ko", name(path));
        decompress(&kernel.modules.join(path), &target.join(&name))?;
        names.push(name);
    }
    Ok(names)
}

fn decompress(from: &Path, to: &Path) -> Result<()> {
    if from.extension().is_none_or(|extension| extension != "xz") {
        fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
        return Ok(());
    }
    let file = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut xz = Command::new("xz");
    let xz = xz.args(["--decompress", "--stdout"]).arg(from).stdin(Stdio::null()).stdout(file);
    let status = xz.status().context("xz did not start")?;
    ensure!(status.success(), "xz cannot decompress {} ({status})", from.display());
    Ok(())
}

/// What `depmod` found out about a kernel's modules.
struct Index<'a> {
    /// Each module's path, and the paths of what it depends on, at any depth.
    files: BTreeMap<String, (&'a str, Vec<&'a str>)>,
    /// Those that are part of the kernel itself.
    builtin: BTreeSet<String>,
}

impl<'a> Index<'a> {
    /// Reads `modules.dep` (`path: path path`, what loads last first) and `modules.builtin`.
    fn parse(dependencies: &'a str, builtin: &str) -> Self {
        let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
        let files =
            lines.map(|(path, needs)| (name(path), (path, needs.split_whitespace().collect())));
        Self { files: files.collect(), builtin: builtin.lines().map(name).collect() }
    }

    /// The files to load, each once, dependencies first.
    fn ordered(&self, wanted: &[String]) -> Result<Vec<&'a str>> {
        let mut ordered: Vec<&str> = Vec::new();
        for module in wanted {
            let module = name(module);
            let Some((path, needs)) = self.files.get(&module) else {
                if self.builtin.contains(&module) {
                    continue;
                }
                bail!("has no module {module}");
            };
            for file in needs.iter().rev().chain([path]) {
                if !ordered.contains(file) {
                    ordered.push(file);
                }
            }
        }
        Ok(ordered)
    }
}

/// A module's name by its path; the kernel takes `-` and `_` for the same.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/net/ipvs/ip_vs_rr.ko.xz: kernel/net/ipvs/ip_vs.ko.xz \
        kernel/net/nf_conntrack.ko.xz kernel/lib/libcrc32c.ko.xz\n\
        kernel/net/ipvs/ip_vs.ko.xz: kernel/net/nf_conntrack.ko.xz kernel/lib/libcrc32c.ko.xz\n\
        kernel/net/nf_conntrack.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
        kernel/lib/libcrc32c.ko.xz:\n\
        kernel/net/nf-odd.ko:\n";

    fn ordered(wanted: &[&str]) -> Result<Vec<String>> {
        let index = Index::parse(DEPENDENCIES, "kernel/net/bridge.ko\n");
        let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
        Ok(index.ordered(&wanted)?.into_iter().map(name).collect())
    }

    #[test]
    fn each_module_comes_once_and_after_what_it_needs() {
        let files = ordered(&["nf_conntrack", "ip_vs_rr", "ip_vs"]).expect("all are there");
        assert_eq!(files, ["libcrc32c", "nf_conntrack", "ip_vs", "ip_vs_rr"]);
    }

    #[test]
    fn dashes_and_built_in_modules_are_no_trouble() {
        assert_eq!(ordered(&["nf_odd", "bridge"]).expect("both are there"), ["nf_odd"]);
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_named() {
        let error = ordered(&["ip_vs", "ip_vs_new"]).expect_err("not there");
        assert_eq!(error.to_string(), "has no module ip_vs_new");
    }
}

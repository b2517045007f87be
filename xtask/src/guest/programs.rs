//! This machine's programs and their shared libraries, copied into a guest's root file system.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::apt::output;

/// What iptables loads at run time by name, so that `ldd` does not tell.
const XTABLES: &str = "/usr/lib/x86_64-linux-gnu/xtables";

/// Copies programs (paths, or names in the search path) to `root`'s `/bin`, and their libraries to
/// where they are here.
pub(super) fn copy(programs: &[PathBuf], root: &Path) -> Result<()> {
    let mut libraries = BTreeSet::new();
    for program in programs {
        let found = find(program)
            .with_context(|| format!("{} is not installed here", program.display()))?;
        let name = found.file_name().context("a program has a name")?;
        place(&found, &root.join("bin").join(name))?;
        libraries.extend(libraries_of(&found)?);
        if name.to_string_lossy().contains("tables") {
            libraries.extend(extensions()?);
        }
    }
    for library in libraries {
        place(&library, &root.join(library.strip_prefix("/")?))?;
    }
    Ok(())
}

fn find(program: &Path) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // An absolute path stays what it is.
    env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// Without debugging information: it is most of a test program, and a guest's files are its memory.
fn place(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a file is in a directory")?;
    fs::create_dir_all(directory)?;
    output(Command::new("objcopy").arg("--strip-debug").arg(from).arg(to))
        .with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn extensions() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(XTABLES).with_context(|| format!("cannot read {XTABLES}"))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The libraries a program is linked with; none if it is static.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    let printed = ldd.arg(program).output().context("ldd did not start")?;
    // It fails on static programs, with words of its own.
    libraries(&String::from_utf8_lossy(&printed.stdout))
        .with_context(|| format!("{} does not run here", program.display()))
}

/// Reads what `ldd` prints: `name => /path (address)`, or `/path (address)` for the loader.
fn libraries(ldd: &str) -> Result<Vec<PathBuf>> {
    let missing = ldd.lines().find(|line| line.contains("=> not found"));
    ensure!(missing.is_none(), "library missing: {}", missing.unwrap_or_default().trim());
    let words = ldd.lines().filter_map(|line| {
        let target = line.split_once("=> ").map_or(line, |(_, target)| target);
        target.split_whitespace().next()
    });
    Ok(words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_told_from_what_the_kernel_provides() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibmnl.so.0 => /lib/x86_64-linux-gnu/libmnl.so.0 (0x00007f11)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f33)\n";
        let found = libraries(ldd).expect("complete");
        let expected = ["/lib/x86_64-linux-gnu/libmnl.so.0", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert_eq!(libraries("\tstatically linked\n").expect("static"), [] as [PathBuf; 0]);
    }

    #[test]
    fn a_missing_library_is_named_before_a_guest_boots() {
        let error = libraries("\tlibgone.so.1 => not found\n").expect_err("missing");
        assert!(error.to_string().contains("libgone.so.1"), "{error}");
    }
}

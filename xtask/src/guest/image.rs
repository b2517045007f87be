//! The root file system of a guest: an initramfs with busybox, programs, modules and an init.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt::output;
use super::emulator::{ENDED, STARTED};
use super::kernels::Kernel;
use super::{Guest, modules, programs};

/// Set in a guest and nowhere else: tests that change a machine for good look for it.
pub const GUEST_VARIABLE: &str = "OBSERVER_GUEST";

/// What init mounts: file system, directory.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("tracefs", "/sys/kernel/tracing"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
];

/// Packs the image of `guest` below `directory`, and returns its path.
///
/// # Errors
/// A program or module that is not there, or a failed tool; it is named.
pub fn build(guest: &Guest, kernel: &Kernel, directory: &Path) -> Result<PathBuf> {
    let root = directory.join("root");
    for empty in ["bin", "dev", "modules", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(empty))?;
    }
    let mut all: Vec<PathBuf> = guest.programs.iter().map(PathBuf::from).collect();
    all.extend(["busybox".into(), guest.program.clone()]);
    programs::copy(&all, &root)?;
    let release = guest.release.modules.iter().map(|&name| name.to_owned());
    let wanted: Vec<String> = guest.modules.iter().cloned().chain(release).collect();
    let modules = modules::copy(kernel, &wanted, &root.join("modules"))?;

    let init = root.join("init");
    fs::write(&init, script(guest, &modules)?)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let image = directory.join("image");
    // Not compressed: a guest unpacks more slowly than it reads.
    let pack = "find . -mindepth 1 | cpio --create --format=newc --owner=+0:+0 --quiet";
    let pack = format!("{pack} --file=../image");
    output(Command::new("sh").args(["-c", &pack]).current_dir(&root)).context("packing")?;
    Ok(image)
}

/// What the guest runs as its first process. The first serial port shows what is printed, the
/// second carries what [`super::emulator`] reads.
fn script(guest: &Guest, modules: &[String]) -> Result<String> {
    let mut script = String::from("#!/bin/busybox sh\n/bin/busybox --install -s /bin\n");
    script += "export PATH=/bin HOME=/root\n";
    for (kind, directory) in MOUNTS {
        writeln!(script, "mkdir -p {directory}; mount -t {kind} {kind} {directory}")?;
    }
    script += "stty -onlcr </dev/ttyS0; stty raw </dev/ttyS1\n";
    for module in modules {
        writeln!(script, "insmod /modules/{module}")?;
    }
    script += "ip link set lo up\n";
    let name = guest.program.file_name().context("a program has a name")?;
    let mut words = vec![quoted(&format!("/bin/{}", name.to_string_lossy()))];
    words.extend(guest.arguments.iter().map(|argument| quoted(argument)));
    writeln!(script, "echo {STARTED} >/dev/ttyS1")?;
    writeln!(script, "{GUEST_VARIABLE}=1 {}; code=$?", words.join(" "))?;
    // Setting a port waits until all is sent.
    script += "stty -onlcr </dev/ttyS0\n";
    writeln!(script, "echo {ENDED} $code >/dev/ttyS1; stty raw </dev/ttyS1\npoweroff -f")?;
    Ok(script)
}

/// One word to a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_reach_the_program_as_they_are() {
        let word = "it's $HOME; \"\\ *";
        let echoed =
            output(Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]));
        assert_eq!(echoed.expect("sh"), word);
    }

    #[test]
    fn modules_are_loaded_before_the_program_starts() {
        let guest = Guest {
            release: "6.12".parse().expect("known"),
            modules: Vec::new(),
            programs: Vec::new(),
            program: "/target/debug/tests".into(),
            arguments: vec!["--ignored".into()],
            directory: PathBuf::new(),
        };
        let script = script(&guest, &["x_tables.ko".into(), "ip_tables.ko".into()]).expect("text");
        let at = |words: &str| script.find(words).unwrap_or_else(|| panic!("{words}: {script}"));
        assert!(at("x_tables.ko") < at("ip_tables.ko"));
        assert!(at("ip_tables.ko") < at("echo started"));
        assert!(at("echo started") < at("OBSERVER_GUEST=1 '/bin/tests' '--ignored'"));
    }
}

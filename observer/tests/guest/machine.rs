//! The guest a test has to itself, and the tools in it.

use std::env;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use observer::kernel::cgroups::Hierarchy;

/// Fails anywhere but in a guest.
pub(crate) fn require_guest() {
    assert!(
        env::var_os("OBSERVER_GUEST").is_some(),
        "this test changes the machine that it runs on: run it by `cargo xtask guest`"
    );
}

/// Runs `test` on a thread of its own in a new network namespace, whose rules go with the thread.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace");
        // Without any address IPVS takes all destinations for broadcasts, and refuses them.
        run("ip link set lo up", "");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a tool (words between spaces) with `input` on standard input; it has to succeed. Returns
/// what it prints.
pub(crate) fn run(command: &str, input: &str) -> String {
    let mut words = command.split(' ');
    let mut child = Command::new(words.next().expect("a program"))
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("write the input");
    let output = child.wait_with_output().expect("wait for the tool");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} failed: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

/// The guest's cgroups.
pub(crate) fn hierarchy() -> Hierarchy {
    Hierarchy::find(Path::new("/sys/fs/cgroup")).expect("cgroups")
}

/// An async runtime on this thread.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("build a runtime")
}

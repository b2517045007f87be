//! Boots an image in QEMU and waits for its end, a bounded time.
//!
//! No hardware virtualisation is asked for: the same run everywhere. Two serial ports: one goes to
//! standard output as it comes, one to a file of ours, where kernel messages cannot garble the
//! guest's exit code.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::step;

/// What init says on the second port when it starts the program.
pub(super) const STARTED: &str = "started";
/// What it says when the program is over, with its exit code.
pub(super) const ENDED: &str = "ended";

/// Far more than the tests take (a minute); an emulated kernel can hang.
const PATIENCE: Duration = Duration::from_mins(10);
/// How often the emulator is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Without `cmpxchg16b`: with it, 2 of 20 emulated boots of 6.12 crashed right after one.
const PROCESSOR: &str = "max,-cx16";
/// A kernel, the image twice while it is unpacked, and tests with memory of their own.
const MEMORY: &str = "1024M";

/// Boots until the guest powers off, and returns its program's exit code. A guest that crashes
/// before its program starts is booted once more, and that is said.
///
/// # Errors
/// No emulator, a second crash, or a guest that ended or hung without an exit code.
pub fn run(kernel: &Path, image: &Path, directory: &Path) -> Result<u8> {
    match boot(kernel, image, directory)? {
        End::Code(code) => Ok(code),
        End::Lost(how) => bail!("{how}: its last messages are above"),
        End::Crash(how) => {
            step::say(&format!("guest: {how}: an emulator's crash is known; booting once more"));
            match boot(kernel, image, directory)? {
                End::Code(code) => Ok(code),
                End::Lost(how) | End::Crash(how) => bail!("{how}: its last messages are above"),
            }
        }
    }
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The program ended with this code.
    Code(u8),
    /// Nothing of ours ran yet, or the emulator itself died.
    Crash(String),
    /// The program ran, and its end is not known: it took the kernel down, or took too long.
    Lost(String),
}

fn boot(kernel: &Path, image: &Path, directory: &Path) -> Result<End> {
    let report = directory.join("report");
    fs::write(&report, "")?;
    let started = step::now();
    let mut emulator = command(kernel, image, &report)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start setpriv qemu-system-x86_64: run `cargo xtask setup`")?;
    let mut booted = None;
    let status = loop {
        if let Some(status) = emulator.try_wait()? {
            break Some(status);
        }
        if booted.is_none() && fs::read_to_string(&report)?.contains(STARTED) {
            booted = Some(started.elapsed());
        }
        if started.elapsed() > PATIENCE {
            stop(&mut emulator)?;
            break None;
        }
        std::thread::sleep(POLL);
    };
    step::say(&format!(
        "guest: off after {:.1} s, of which boot {:.1} s",
        started.elapsed().as_secs_f64(),
        booted.unwrap_or_default().as_secs_f64()
    ));
    Ok(judge(status, &fs::read_to_string(&report)?))
}

fn command(kernel: &Path, image: &Path, report: &Path) -> Command {
    // The emulator does not outlive this program, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig=TERM", "qemu-system-x86_64", "-nodefaults", "-no-user-config"])
        .args(["-accel", "tcg", "-cpu", PROCESSOR, "-m", MEMORY, "-display", "none", "-no-reboot"])
        .args(["-append", "console=ttyS0 panic=-1 quiet", "-serial", "stdio"])
        .arg("-serial")
        .arg(format!("file:{}", report.display()))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(image);
    command
}

fn stop(emulator: &mut Child) -> Result<()> {
    emulator.kill()?;
    emulator.wait()?;
    Ok(())
}

/// `status` is `None` when patience ended.
fn judge(status: Option<ExitStatus>, report: &str) -> End {
    let code = report.lines().find_map(|line| line.strip_prefix(ENDED)?.trim().parse().ok());
    if let Some(code) = code {
        return End::Code(code);
    }
    match status {
        None => End::Lost(format!("the guest was not done after {} s", PATIENCE.as_secs())),
        Some(status) if !status.success() => End::Crash(format!("the emulator failed ({status})")),
        Some(_) if report.contains(STARTED) => {
            End::Lost("the guest went down while its program ran".into())
        }
        Some(_) => End::Crash("the guest went down before its program started".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    /// How QEMU ends when the guest powers off.
    fn off() -> ExitStatus {
        ExitStatus::from_raw(0)
    }

    #[test]
    fn the_programs_code_is_the_guests() {
        assert_eq!(judge(Some(off()), "started\nended 101\n"), End::Code(101));
        assert_eq!(judge(None, "started\r\nended 0\r\n"), End::Code(0), "hung at power-off");
    }

    #[test]
    fn only_what_happens_before_the_program_starts_is_tried_again() {
        assert!(matches!(judge(Some(off()), ""), End::Crash(_)));
        assert!(matches!(judge(Some(off()), "started\n"), End::Lost(_)));
        assert!(matches!(judge(None, ""), End::Lost(_)));
        let aborted = Some(ExitStatus::from_raw(6));
        assert!(matches!(judge(aborted, "started\n"), End::Crash(_)), "the emulator's own crash");
    }

    #[test]
    fn a_code_cut_short_is_none() {
        assert!(matches!(judge(Some(off()), "started\nended "), End::Lost(_)));
    }
}

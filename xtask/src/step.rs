//! Running other programs: says what is done, shows that it goes on, keeps quiet when it went well.

use std::{
    fs::File,
    io::{IsTerminal as _, Read as _, Seek as _, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// How often a silent program is looked at: short enough for an elapsed time that ticks.
const POLL: Duration = Duration::from_millis(100);
/// Without a terminal, how often a line says that a silent program still runs.
const STILL_RUNNING: Duration = Duration::from_secs(20);
/// How much of a failed program's output is shown: enough for a compiler's last error.
const SHOWN_LINES: usize = 40;

/// One line to the person who runs this, apart from what a program writes to standard output.
#[expect(clippy::print_stderr, reason = "progress and errors of a command-line tool")]
pub fn say(line: &str) {
    eprintln!("{line}");
}

/// The one clock of the commands: how long steps take.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "elapsed time is shown, nothing is decided by it")]
pub fn now() -> Instant {
    Instant::now()
}

/// Runs a program that shows its own progress.
///
/// # Errors
/// The program does not start, or ends with anything but 0.
pub fn shown(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{program} did not start"))?;
    if !status.success() {
        bail!("{} failed ({status})", words(command));
    }
    Ok(())
}

/// Runs a program silently under a title and an elapsed time; shows its output only if it fails.
///
/// # Errors
/// The program does not start, or ends with anything but 0.
pub fn titled(title: &str, command: &mut Command) -> Result<()> {
    let mut log = tempfile::tempfile().context("no temporary file for a program's output")?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn()
        .with_context(|| format!("{program} did not start"))?;
    let started = now();
    let terminal = std::io::stderr().is_terminal();
    let mut next_line = STILL_RUNNING;
    if !terminal {
        say(title);
    }
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let elapsed = started.elapsed();
        if terminal {
            write!(std::io::stderr(), "\r{title} {} s ", elapsed.as_secs())?;
        } else if elapsed > next_line {
            next_line += STILL_RUNNING;
            say(&format!("{title}: {} s so far", elapsed.as_secs()));
        }
        std::thread::sleep(POLL);
    };
    if terminal {
        say("");
    }
    if !status.success() {
        say(&last_lines(&mut log)?);
        bail!("{} failed ({status})", words(command));
    }
    Ok(())
}

fn last_lines(log: &mut File) -> Result<String> {
    let mut text = Vec::new();
    log.rewind()?;
    log.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n"))
}

/// The command as a person would type it.
fn words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_is_named_with_its_arguments() {
        let error =
            titled("Failing", Command::new("sh").args(["-c", "exit 3"])).expect_err("fails");
        assert_eq!(error.to_string(), "sh -c exit 3 failed (exit status: 3)");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = shown(&mut Command::new("/nonexistent/tool")).expect_err("fails");
        assert_eq!(error.to_string(), "/nonexistent/tool did not start");
    }

    #[test]
    fn only_the_end_of_a_long_output_is_kept() {
        let mut log = tempfile::tempfile().expect("temporary file");
        for line in 0..100 {
            writeln!(log, "{line}").expect("write");
        }
        let shown = last_lines(&mut log).expect("read");
        assert_eq!(shown.lines().next(), Some("60"));
        assert_eq!(shown.lines().last(), Some("99"));
    }
}

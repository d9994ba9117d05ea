//! Another program, run to its end or for as long as it may take.

use std::io::{self, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

/// How a program ended.
#[derive(Debug)]
pub struct Finished {
    /// Its status; none where it took too long and was ended.
    pub status: Option<ExitStatus>,
    /// What it wrote, read as UTF-8 with marks for what is none.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// Runs `command` and collects what it writes; after `limit` it is killed.
///
/// # Errors
/// When it cannot be started or waited for.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<Finished> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            break None;
        }
        sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(20));
    };
    let text = |reader: Option<JoinHandle<String>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
    Ok(Finished { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Reads in a thread of its own, so that a full pipe stops nobody.
fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str, limit: Duration) -> Finished {
        run(Command::new("sh").args(["-c", text]), limit).unwrap()
    }

    #[test]
    fn both_streams_and_the_status_are_kept() {
        let done = shell("echo out; echo err >&2; exit 3", Duration::from_secs(20));
        assert_eq!((done.status.and_then(|s| s.code()), &*done.stdout, &*done.stderr), (Some(3), "out\n", "err\n"));
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let done = shell("echo begun; exec sleep 60", Duration::from_millis(300));
        assert!(done.status.is_none() && done.stdout == "begun\n", "{done:?}");
    }
}

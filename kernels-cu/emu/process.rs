//! Another program, run to its end or for as long as it may take.

use std::io::{self, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
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
    let (stdout, stderr) = (child.stdout.take().map(Reader::start), child.stderr.take().map(Reader::start));
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
    // Programs that it started may outlive it and hold its streams open: nobody waits for those.
    let until = Instant::now() + if status.is_some() { LINGER } else { Duration::from_millis(100) };
    let text = |reader: Option<Reader>| reader.map(|r| r.text(until)).unwrap_or_default();
    Ok(Finished { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Longest wait for the rest of what a program wrote, after its end.
const LINGER: Duration = Duration::from_secs(5);

/// Reads in a thread of its own, so that a full pipe stops nobody.
struct Reader {
    read: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Reader {
    fn start(mut from: impl Read + Send + 'static) -> Reader {
        let read = Arc::new(Mutex::new(Vec::new()));
        let kept = read.clone();
        let thread = spawn(move || {
            let mut piece = [0; 1 << 14];
            // What was read before an error is still worth showing.
            while let Ok(n @ 1..) = from.read(&mut piece) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&piece[..n]);
            }
        });
        Reader { read, thread }
    }

    /// Everything up to the end of the stream, or what has come by then.
    fn text(self, until: Instant) -> String {
        while !self.thread.is_finished() && Instant::now() < until {
            sleep(Duration::from_millis(1));
        }
        String::from_utf8_lossy(&self.read.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
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

    #[test]
    fn what_it_left_running_holds_nobody() {
        let begun = Instant::now();
        let done = shell("echo begun; sleep 60 & sleep 60", Duration::from_millis(300));
        assert!(done.status.is_none() && done.stdout == "begun\n", "{done:?}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}

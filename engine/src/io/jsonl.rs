//! Append-only logs with one JSON object per line, as training writes them.
//!
//! Every line is handed to the system as soon as it is complete, so a killed run leaves at most one torn line at the
//! end. A resumed run cuts the log back to the step it resumes from, so that no step appears twice.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::io::files;

/// An open log.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    file: File,
}

impl JsonLog {
    /// Starts an empty log, replacing an old one.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|e| Error::io(path, "create", &e))?;
        Ok(JsonLog { path: path.to_path_buf(), file })
    }

    /// Continues a log after training step `last_step`: drops the lines of later steps and a torn last line.
    /// Lines without a number `step` belong to the step before them. A missing log starts empty.
    ///
    /// # Errors
    /// "damaged log line" for a complete line that is not a JSON object, or an I/O error.
    pub fn resume(path: &Path, last_step: u64) -> Result<Self> {
        let keep = if path.is_file() { kept_length(path, &files::read_bytes(path)?, last_step)? } else { 0 };
        let wrap = |e: std::io::Error| Error::io(path, "resume", &e);
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(wrap)?;
        // A pipe or a device has nothing to cut back.
        if file.metadata().map_err(wrap)?.is_file() {
            file.set_len(keep as u64).map_err(wrap)?;
            file.seek(SeekFrom::End(0)).map_err(wrap)?;
        }
        Ok(JsonLog { path: path.to_path_buf(), file })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// When `record` cannot be JSON or the disk is full.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(|e| {
            Error::failure(self.path.display().to_string(), "log record is not json").is(e).must("a JSON object")
        })?;
        line.push(b'\n');
        // One call per line: the file has no buffer of its own, so nothing is left to flush.
        self.file.write_all(&line).map_err(|e| Error::io(&self.path, "append to", &e))
    }
}

/// Reads all complete lines of a log; a torn last line is left out.
///
/// # Errors
/// "damaged log line", or an I/O error.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let bytes = files::read_bytes(path)?;
    complete_lines(&bytes).enumerate().map(|(i, line)| parse_line(path, i, line)).collect()
}

fn complete_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"))
}

fn parse_line(path: &Path, index: usize, line: &[u8]) -> Result<Value> {
    let value = serde_json::from_slice::<Value>(line).ok().filter(Value::is_object);
    value.ok_or_else(|| {
        Error::failure(format!("{} line {}", path.display(), index + 1), "damaged log line")
            .must("a JSON object")
            .fix("remove the line, or start a new run folder")
    })
}

/// Bytes up to and including the last line that belongs to a step of at most `last_step`.
fn kept_length(path: &Path, bytes: &[u8], last_step: u64) -> Result<usize> {
    let mut keep = 0;
    for (index, line) in complete_lines(bytes).enumerate() {
        let value = parse_line(path, index, line)?;
        if value.get("step").and_then(Value::as_u64).is_some_and(|step| step > last_step) {
            break;
        }
        keep += line.len();
    }
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use serde_json::json;

    #[test]
    fn resume_cuts_later_steps_and_a_torn_line() {
        let path = test_dir("jsonl").join("log.jsonl");
        let mut log = JsonLog::create(&path).unwrap();
        log.append(&json!({"event": "start"})).unwrap();
        for step in 1..=5 {
            log.append(&json!({"step": step, "loss": 0.5})).unwrap();
        }
        drop(log);
        std::fs::write(&path, [files::read_bytes(&path).unwrap(), b"{\"step\": 6, \"lo".to_vec()].concat()).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);

        let mut log = JsonLog::resume(&path, 3).unwrap();
        log.append(&json!({"step": 4, "loss": 0.25})).unwrap();
        let lines = read(&path).unwrap();
        assert_eq!(lines.len(), 5);
        assert_eq!(lines[4], json!({"step": 4, "loss": 0.25}));

        drop(JsonLog::resume(&path, 99).unwrap());
        assert_eq!(read(&path).unwrap().len(), 5);
    }

    #[test]
    fn missing_log_starts_empty_and_damage_is_named() {
        let path = test_dir("jsonl_bad").join("log.jsonl");
        JsonLog::resume(&path, 7).unwrap();
        assert!(read(&path).unwrap().is_empty());
        std::fs::write(&path, "{\"step\":1}\nrubbish\n{\"step\":2}\n").unwrap();
        let error = JsonLog::resume(&path, 7).unwrap_err().to_string();
        assert!(error.contains("log.jsonl line 2: damaged log line"), "{error}");
    }
}

//! The peer's process: it answers one JSON line for each JSON line it is sent.

use graft_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A program that speaks the protocol.
#[derive(Clone, Debug)]
pub struct Program {
    /// Name in rows and tables.
    pub name: &'static str,
    /// What is started: a Python, or the peer itself.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Set in its environment.
    pub environment: Vec<(&'static str, String)>,
    /// The script that sets it up, from the root of the repository.
    pub setup: &'static str,
}

/// The peers that measure operators, by the name of `--peer`.
pub const OPERATOR_PEERS: [&str; 3] = ["pytorch", "onnxruntime", "candle"];

/// The program of a peer of operators.
///
/// # Errors
/// No peer has the name.
pub fn operators(name: &str, root: &Path, threads: usize) -> Result<Program> {
    let peers = root.join("tools/peers");
    let flag = [OsString::from("--threads"), OsString::from(threads.to_string())];
    let python = |name, folder: &str, script: &str, setup| Program {
        name,
        program: root.join(folder).join("bin/python"),
        arguments: [&[peers.join(script).into_os_string()], &flag[..]].concat(),
        environment: Vec::new(),
        setup,
    };
    Ok(match name {
        "pytorch" => python("PyTorch", ".venv-torch-cpu", "pytorch_ops.py", "tools/peers/setup_torch_cpu.sh"),
        "onnxruntime" => python("ONNX Runtime", ".venv-onnx", "onnx_ops.py", "tools/peers/setup_onnx.sh"),
        "candle" => Program {
            name: "candle",
            program: root.join("target/candle-peer/release/candle-peer"),
            arguments: Vec::new(),
            environment: vec![("RAYON_NUM_THREADS", threads.to_string())],
            setup: "tools/peers/setup_candle.sh",
        },
        other => return Err(Error::usage("--peer", "unknown peer").is(other).must(OPERATOR_PEERS.join(", "))),
    })
}

/// A running peer.
pub struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Name and versions, as it states them.
    pub about: Value,
}

impl Peer {
    /// Starts it and waits for its first line, which says who it is.
    ///
    /// # Errors
    /// When it is not there, or ends.
    pub fn start(program: &Program) -> Result<Peer> {
        let fix = format!("run {}", program.setup);
        let place = program.program.display().to_string();
        let mut child = Command::new(&program.program)
            .args(&program.arguments)
            .envs(program.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::failure(&place, format!("cannot start: {e}")).fix(&fix))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::failure(place, "no pipes to the peer"));
        };
        let mut peer = Peer { child, input, output: BufReader::new(output), about: Value::Null };
        peer.about = peer.answer().map_err(|e| e.fix(fix))?;
        Ok(peer)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// When the peer ended, or answers with an error.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.input, "{request}").map_err(|e| Error::failure("peer", format!("cannot be asked: {e}")))?;
        let answer = self.answer()?;
        match answer["error"].as_str() {
            Some(error) => Err(Error::failure("peer", error).is(format!("asked {request}"))),
            None => Ok(answer),
        }
    }

    /// As [`Peer::ask`], for a number of milliseconds.
    ///
    /// # Errors
    /// As [`Peer::ask`]; an answer without one.
    pub fn milliseconds(&mut self, request: &Value) -> Result<f64> {
        let answer = self.ask(request)?;
        answer["ms"].as_f64().ok_or_else(|| Error::failure("peer", "stated no time").is(answer))
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| Error::failure("peer", format!("cannot be read: {e}")))?;
        serde_json::from_str(&line).map_err(|_| {
            Error::failure("peer", "ended or gave no answer; its own message is above").is(format!("{line:?}"))
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must not outlive us, and is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sets a peer up where it is missing.
///
/// # Errors
/// What its script ended with.
pub fn set_up(program: &Program, root: &Path) -> Result<()> {
    if program.program.exists() {
        return Ok(());
    }
    let status = Command::new(root.join(program.setup)).status();
    let status = status.map_err(|e| Error::failure(program.setup, format!("cannot start: {e}")))?;
    if status.success() && program.program.exists() {
        return Ok(());
    }
    Err(Error::failure(program.setup, "could not set the peer up").is(status).fix("its own message is above"))
}

/// What is written down of a peer that cannot run.
pub fn could_not_run(program: &Program, why: &Error) -> Value {
    json!({ "peer": { "name": program.name }, "could_not_run": why.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        Program {
            name: "sh",
            program: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: Vec::new(),
            setup: "nothing",
        }
    }

    #[test]
    fn requests_are_answered_line_by_line() {
        let script = r#"echo '{"name":"x"}'; read l; echo '{"ms":2.5}'; read l; echo '{"error":"no"}'"#;
        let mut peer = Peer::start(&shell(script)).unwrap();
        assert_eq!(peer.about["name"], "x");
        assert_eq!(peer.milliseconds(&json!({ "ask": "run" })).unwrap(), 2.5);
        assert!(peer.ask(&json!({ "ask": "run" })).unwrap_err().to_string().contains("no"));
        assert!(peer.ask(&json!({ "ask": "run" })).is_err());
    }

    #[test]
    fn a_peer_that_is_not_there_says_how_to_get_it() {
        let missing = Program { program: "/nonexistent".into(), ..shell("") };
        let error = Peer::start(&missing).err().unwrap();
        assert!(error.to_string().contains("run nothing"), "{error}");
        assert_eq!(could_not_run(&missing, &error)["peer"]["name"], "sh");
    }
}

//! A row's folder and the processes that it starts.

use super::fakes::Fakes;
use graft_tools::codegen::workspace_root;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names the part that a child process plays.
pub const CHILD: &str = "GRAFT_DRIVER_CHILD";

/// Where a row works.
pub struct Lab<'f> {
    pub fakes: &'f Fakes,
    pub folder: PathBuf,
}

/// What a child said.
pub struct Said {
    pub good: bool,
    /// Stdout and stderr.
    pub text: String,
    /// What the fakes were asked, a line a call worth telling.
    pub calls: Vec<String>,
}

impl<'f> Lab<'f> {
    pub fn new(fakes: &'f Fakes, row: &str) -> Result<Lab<'f>, String> {
        let name: String = row.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
        let folder = workspace_root().join("target/driver/rows").join(name);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(Lab { fakes, folder })
    }

    /// Runs a part of [`super::child`] on the fakes; `variables` change what they are.
    pub fn run(&self, part: &str, variables: &[(&str, &str)]) -> Result<Said, String> {
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        self.run_as(&program, part, variables)
    }

    /// As [`Lab::run`], by another copy of this program.
    pub fn run_as(&self, program: &Path, part: &str, variables: &[(&str, &str)]) -> Result<Said, String> {
        let log = self.folder.join("calls");
        let _ = std::fs::remove_file(&log);
        let mut command = Command::new(program);
        // Compiled kernels are shared by the rows, except those that are about the cache.
        command
            .current_dir(&self.folder)
            .env(CHILD, part)
            .env("LD_LIBRARY_PATH", &self.fakes.both)
            .env("GRAFT_CACHE", workspace_root().join("target/driver/cache"))
            .env("FAKE_LOG", &log)
            .env_remove("GRAFT_NVRTC")
            .envs(self.fakes.variables.iter().map(|(k, v)| (*k, v.as_str())))
            .envs(variables.iter().copied());
        let output = command.output().map_err(|e| format!("{}: {e}", program.display()))?;
        let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        let calls = std::fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_string).collect();
        Ok(Said { good: output.status.success(), text, calls })
    }

    /// Runs a part that must succeed.
    pub fn done(&self, part: &str, variables: &[(&str, &str)]) -> Result<Said, String> {
        let said = self.run(part, variables)?;
        if said.good { Ok(said) } else { Err(format!("{part}: {}", said.text.trim())) }
    }

    /// Runs a part that must fail with one line that has all of these words.
    pub fn refused(&self, part: &str, variables: &[(&str, &str)], words: &[&str]) -> Result<(), String> {
        let said = self.run(part, variables)?;
        if said.good {
            return Err(format!("{part}: did not fail: {}", said.text.trim()));
        }
        let line = said.text.lines().find(|l| words.iter().all(|w| l.contains(w)));
        line.map(|_| ()).ok_or_else(|| format!("{part}: no line has {words:?}: {}", said.text.trim()))
    }
}

impl Said {
    /// How many calls begin with these words.
    pub fn count(&self, words: &str) -> usize {
        self.calls.iter().filter(|c| c.starts_with(words)).count()
    }

    /// How many lines have these words.
    pub fn lines(&self, words: &str) -> usize {
        self.text.lines().filter(|l| l.contains(words)).count()
    }
}

/// Fails with what was and what must be.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, must: T) -> Result<(), String> {
    if is == must { Ok(()) } else { Err(format!("{what}: is {is:?}, must be {must:?}")) }
}

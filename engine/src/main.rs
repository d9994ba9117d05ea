//! The `graft` program: everything is in [`graft_engine::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    graft_engine::cli::run(std::env::args_os())
}

//! `cargo xtask`: developer commands.

use graft_tools::codegen;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let root = codegen::workspace_root();
    let outcome = match words.as_slice() {
        ["codegen"] => codegen::write(&root).map(|paths| {
            paths.iter().for_each(|p| println!("wrote {}", p.display()));
            println!("generated files are up to date");
        }),
        _ => Err("usage: cargo xtask codegen".to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

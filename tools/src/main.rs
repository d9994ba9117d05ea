//! `cargo xtask`: developer commands.

use graft_tools::cubins::Choice;
use graft_tools::{codegen, cubins, new_op, nvcc, tidy};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND
  codegen   write the files that follow from kernels-cu/*/op.toml
  cubins    compile every CUDA source ahead of time into target/release/graft.cubins (--only OP: those of one operator)
            (--target sm_90a: for one kind of device alone, into target/sm_90a.cubins)
  kernels   compile every CUDA source and write the table of its resources
  new-op OP a new operator that works, to be turned into the one that is wanted
  tidy      check the rules of the house (also a test)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let root = codegen::workspace_root();
    let outcome = match words.as_slice() {
        ["codegen"] => write_generated(&root),
        ["cubins"] => write_cubins(&root, Choice::default()),
        ["cubins", "--only", op] => write_cubins(&root, Choice { op: Some(op), target: None }),
        ["cubins", "--target", target] => write_cubins(&root, Choice { op: None, target: Some(target) }),
        ["kernels"] => write_resources(&root),
        ["new-op", name] => write_operator(&root, name),
        ["tidy"] => report_findings(&root),
        _ => Err(USAGE.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn write_operator(root: &Path, name: &str) -> Result<(), String> {
    for path in new_op::write(root, name)? {
        println!("wrote {path}");
    }
    write_generated(root)?;
    println!("next: graft op check {name}");
    Ok(())
}

fn write_generated(root: &Path) -> Result<(), String> {
    for path in codegen::write(root)? {
        println!("wrote {}", path.display());
    }
    println!("generated files are up to date");
    Ok(())
}

fn write_resources(root: &Path) -> Result<(), String> {
    let (rows, findings) = nvcc::gate(&nvcc::Nvcc::find(root)?, root)?;
    if !findings.is_empty() {
        return Err(findings.join("\n"));
    }
    let path = root.join(nvcc::TABLE);
    std::fs::write(&path, nvcc::render_table(&rows)).map_err(|e| format!("{}: {e}", path.display()))?;
    println!("wrote {}: {} kernels", path.display(), rows.len());
    Ok(())
}

fn write_cubins(root: &Path, choice: Choice<'_>) -> Result<(), String> {
    let (path, content) = cubins::write(root, choice)?;
    println!("wrote {}: {content}", path.display());
    Ok(())
}

fn report_findings(root: &Path) -> Result<(), String> {
    let findings = tidy::check(root)?;
    for finding in &findings {
        println!("{finding}");
    }
    match findings.iter().filter(|f| !f.warning).count() {
        0 => {
            println!("tidy: every rule holds");
            Ok(())
        }
        n => Err(format!("tidy: {n} findings")),
    }
}

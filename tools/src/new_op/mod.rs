//! `cargo xtask new-op NAME`: an operator that works, to be turned into the one that is wanted.
//!
//! What an operator consists of by hand: the contract, oracle, CPU path, kernels with their launcher and README in one
//! directory, and one line in `kernels-cu/lib.rs`. The rest follows from `cargo xtask codegen`. The template scales rows
//! by factors: forward, backward, both working types, a sum without atomics.

use std::path::Path;

/// Files of the directory: name and text. `OP` and `CAMEL` stand for the operator's names.
const FILES: [(&str, &str); 6] = [
    ("op.toml", include_str!("op.toml")),
    ("mod.rs", include_str!("mod.rs.txt")),
    ("cpu.rs", include_str!("cpu.rs.txt")),
    ("launch.rs", include_str!("launch.rs.txt")),
    ("OP.cu", include_str!("kernel.cu.txt")),
    ("README.md", include_str!("README.md.txt")),
];

/// The files of operator `name`: path below `kernels-cu` and text.
fn files(name: &str) -> Vec<(String, String)> {
    let camel: String =
        name.split('_').filter_map(|word| Some(word.get(..1)?.to_uppercase() + word.get(1..)?)).collect();
    let fill = |text: &str| text.replace("CAMEL", &camel).replace("OP", name);
    FILES.iter().map(|(file, text)| (format!("{name}/{}", fill(file)), fill(text))).collect()
}

/// Writes the directory and the line in `lib.rs`; gives the paths.
///
/// # Errors
/// A name that is no identifier or is taken, or a file that cannot be written.
pub fn write(root: &Path, name: &str) -> Result<Vec<String>, String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(good) || name.ends_with('_') {
        return Err(format!("{name:?} is no name of an operator: lower case, digits and _"));
    }
    let kernels = root.join("kernels-cu");
    if kernels.join(name).exists() {
        return Err(format!("kernels-cu/{name} is there already"));
    }
    let library = kernels.join("lib.rs");
    let text = std::fs::read_to_string(&library).map_err(|e| format!("{}: {e}", library.display()))?;
    let text = with_module(&text, name)?;
    let folder = kernels.join(name);
    std::fs::create_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut written = Vec::new();
    for (path, content) in files(name) {
        let place = kernels.join(&path);
        std::fs::write(&place, content).map_err(|e| format!("{}: {e}", place.display()))?;
        written.push(format!("kernels-cu/{path}"));
    }
    std::fs::write(&library, text).map_err(|e| format!("{}: {e}", library.display()))?;
    written.push("kernels-cu/lib.rs".to_string());
    Ok(written)
}

/// `lib.rs` with the operator's line at its place in the alphabet.
fn with_module(text: &str, name: &str) -> Result<String, String> {
    let line = format!("pub mod {name};");
    let mut lines: Vec<&str> = text.lines().collect();
    // The operators are the last block of modules.
    let end = lines.iter().rposition(|l| l.starts_with("pub mod ")).ok_or("lib.rs lists no modules")?;
    let start = lines[..end].iter().rposition(|l| !l.starts_with("pub mod ")).map_or(0, |at| at + 1);
    let at = start + lines[start..=end].iter().take_while(|l| **l < line.as_str()).count();
    lines.insert(at, &line);
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_codegen::{contract::Contract, cuda};

    #[test]
    fn the_template_is_a_contract_with_kernels() {
        let files = files("scale_rows");
        let text = |name: &str| &files.iter().find(|(path, _)| path.ends_with(name)).unwrap().1;
        let contract = Contract::parse("op.toml", text("op.toml")).unwrap();
        assert_eq!((contract.name.as_str(), contract.cuda.unwrap().elements.len()), ("scale_rows", 2));
        let names: Vec<String> =
            cuda::kernels("scale_rows.cu", text("scale_rows.cu")).unwrap().into_iter().map(|k| k.name).collect();
        assert_eq!(names, ["scale_rows_forward", "scale_rows_backward"]);
        assert!(text("launch.rs").contains("launchers::scale_rows::{ScaleRowsBackward, ScaleRowsForward}"));
        assert!(files.iter().all(|(_, text)| !text.contains("OP") && !text.contains("CAMEL")));
    }

    #[test]
    fn the_line_finds_its_place() {
        let text = "pub mod check;\n\npub mod axpy;\npub mod gemm;\n\npub struct X;\n";
        let want = "pub mod check;\n\npub mod axpy;\npub mod embed;\npub mod gemm;\n\npub struct X;\n";
        assert_eq!(with_module(text, "embed").unwrap(), want);
        assert!(with_module(text, "zeta").unwrap().contains("pub mod gemm;\npub mod zeta;\n\npub struct"));
    }

    #[test]
    fn a_wrong_name_is_refused() {
        assert!(write(Path::new("."), "Gemm").unwrap_err().contains("no name of an operator"));
        assert!(write(Path::new("nowhere"), "gemm").unwrap_err().contains("nowhere"));
    }
}

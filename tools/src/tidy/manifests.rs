//! Cargo manifests: who depends on whom, and on what from outside.

use super::{Finding, Tree};
use std::collections::BTreeSet;
use toml::{Table, Value};

/// Every member: folder, package, and the packages of the workspace that it may use.
const MEMBERS: [(&str, &str, &[&str]); 6] = [
    ("engine", "graft-engine", &["graft-kernels"]),
    ("kernels-cu", "graft-kernels", &[]),
    ("codegen", "graft-codegen", &[]),
    ("tests", "graft-tests", &["graft-engine", "graft-kernels", "graft-codegen", "graft-tools"]),
    ("benches", "graft-benches", &["graft-engine", "graft-kernels"]),
    ("tools", "graft-tools", &["graft-codegen"]),
];

/// Crates from outside that were looked at and taken: each is the well-kept standard for its job.
const APPROVED: [&str; 28] = [
    "approx",
    "bytemuck",
    "clap",
    "criterion",
    "cudarc",
    "faer",
    "flate2",
    "gemm",
    "half",
    "indicatif",
    "libloading",
    "memmap2",
    "png",
    "proptest",
    "pulp",
    "rayon",
    "realfft",
    "resvg",
    "rustix",
    "safetensors",
    "serde",
    "serde_json",
    "sha2",
    "tar",
    "toml",
    "yaml-rust2",
    "zip",
    // Ours.
    "graft-*",
];

const SECTIONS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

fn table<'t>(parent: &'t Table, key: &str) -> Option<&'t Table> {
    parent.get(key).and_then(Value::as_table)
}

/// Manifests of the members that exist, parsed.
fn manifests(tree: &Tree) -> (Vec<(String, Table)>, Vec<Finding>) {
    let (mut parsed, mut findings) = (Vec::new(), Vec::new());
    for (path, text) in tree.texts().filter(|(path, _)| path.ends_with("Cargo.toml")) {
        match text.parse::<Table>() {
            Ok(manifest) => parsed.push((path.to_string(), manifest)),
            Err(e) => findings.push(Finding::new(path, 0, format!("cannot be read: {e}"))),
        }
    }
    (parsed, findings)
}

/// Packages of the workspace depend on each other only along the arrows of `ARCHITECTURE.md`.
pub(super) fn crate_arrows(tree: &Tree) -> Vec<Finding> {
    let (manifests, mut findings) = manifests(tree);
    for (path, manifest) in manifests {
        let Some(folder) = path.strip_suffix("/Cargo.toml") else { continue };
        let Some((_, _, allowed)) = MEMBERS.iter().find(|(member, ..)| *member == folder) else {
            // A nested workspace of its own (fuzz wrappers) must not be a member.
            if !manifest.contains_key("workspace") {
                findings.push(Finding::new(&path, 0, "unknown package; add it to MEMBERS with its arrows"));
            }
            continue;
        };
        for section in SECTIONS {
            for name in table(&manifest, section).into_iter().flat_map(Table::keys) {
                if name.starts_with("graft-") && !allowed.contains(&name.as_str()) {
                    findings.push(Finding::new(&path, 0, format!("{section}: {folder} must not depend on {name}")));
                }
            }
        }
        let lints = table(&manifest, "lints").and_then(|l| l.get("workspace")).and_then(Value::as_bool);
        if lints != Some(true) {
            findings.push(Finding::new(&path, 0, "[lints] workspace = true is missing"));
        }
    }
    findings
}

/// Outside crates are exactly the approved ones, declared once in the root manifest.
pub(super) fn approved_dependencies(tree: &Tree) -> Vec<Finding> {
    let (manifests, mut findings) = manifests(tree);
    let mut declared = BTreeSet::new();
    for (path, manifest) in &manifests {
        if path == "Cargo.toml" {
            let shared = table(manifest, "workspace").and_then(|w| table(w, "dependencies"));
            declared.extend(shared.into_iter().flat_map(Table::keys).filter(|n| !n.starts_with("graft-")).cloned());
            continue;
        }
        if manifest.contains_key("workspace") {
            continue;
        }
        for section in SECTIONS {
            for (name, value) in table(manifest, section).into_iter().flatten() {
                if value.get("workspace").and_then(Value::as_bool) != Some(true) {
                    findings.push(Finding::new(
                        path,
                        0,
                        format!("{name}: state the version in the root Cargo.toml and write `{name}.workspace = true`"),
                    ));
                }
            }
        }
    }
    for name in &declared {
        if !APPROVED.contains(&name.as_str()) {
            findings.push(Finding::new(
                "Cargo.toml",
                0,
                format!("dependency {name} is not in the approved list of tidy"),
            ));
        }
    }
    for name in APPROVED.iter().filter(|n| !n.contains('*')) {
        if !declared.is_empty() && !declared.contains(*name) {
            findings.push(Finding::new(
                "Cargo.toml",
                0,
                format!("approved dependency {name} is not declared any more; take it off the list of tidy"),
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINTS: &str = "[lints]\nworkspace = true\n";

    #[test]
    fn a_dependency_against_the_arrows_is_found() {
        let bad = format!("[dependencies]\ngraft-engine.workspace = true\n{LINTS}");
        let findings = crate_arrows(&Tree::of(&[("kernels-cu/Cargo.toml", &bad)]));
        assert_eq!(findings.len(), 1);
        assert!(findings[0].message.contains("must not depend on graft-engine"), "{}", findings[0]);
        assert!(crate_arrows(&Tree::of(&[("tests/Cargo.toml", &bad)])).is_empty());
    }

    #[test]
    fn an_unknown_member_and_missing_lints_are_found() {
        assert_eq!(crate_arrows(&Tree::of(&[("extra/Cargo.toml", LINTS)])).len(), 1);
        assert_eq!(crate_arrows(&Tree::of(&[("engine/Cargo.toml", "[package]\n")])).len(), 1);
    }

    #[test]
    fn unapproved_unused_and_private_versions_are_found() {
        let mut root = String::from("[workspace.dependencies]\nleftpad = \"1\"\n");
        root.extend(APPROVED.iter().filter(|n| !n.contains('*') && **n != "zip").map(|n| format!("{n} = \"1\"\n")));
        let findings = approved_dependencies(&Tree::of(&[
            ("Cargo.toml", &root),
            ("engine/Cargo.toml", "[dependencies]\nclap = \"4\"\n"),
        ]));
        let text: Vec<String> = findings.iter().map(Finding::to_string).collect();
        assert_eq!(text.len(), 3, "{text:?}");
        assert!(text.iter().any(|t| t.contains("leftpad is not in the approved list")));
        assert!(text.iter().any(|t| t.contains("zip is not declared")));
        assert!(text.iter().any(|t| t.contains("clap.workspace = true")));
    }
}

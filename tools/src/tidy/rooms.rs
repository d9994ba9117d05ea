//! Rooms of the engine: who may name whom.

use super::{Finding, Tree};

/// Rooms from the ground up; a room may name only those before it. `error` and `io` have rules of their own.
const LADDER: [&str; 13] = [
    "tensor", "backend", "autograd", "ops", "nn", "models", "sample", "train", "eval", "report", "graft", "verify",
    "serve",
];

/// The lowest room that may use files, through `io`.
const FIRST_WITH_FILES: &str = "models";

/// Rooms that must not know what runs their operators.
const BACKEND_FREE: [&str; 2] = ["nn", "models"];

fn rank(room: &str) -> Option<usize> {
    LADDER.iter().position(|r| *r == room)
}

/// Why `from` must not use `crate::<to>::<next>`, where that is so.
fn objection(from: &str, to: &str, next: &str) -> Option<String> {
    let known = |room: &str| rank(room).is_some() || ["io", "error", "cli"].contains(&room);
    if !known(to) {
        return Some(format!("names {to}, which is no room of the engine"));
    }
    let allowed = match (from, to) {
        _ if from == to || to == "error" => true,
        ("cli", _) => true,
        (_, "cli") | ("error", _) | ("io", _) => false,
        ("backend", "io") => next == "cache",
        (_, "io") => rank(from) >= rank(FIRST_WITH_FILES),
        (_, "backend") if BACKEND_FREE.contains(&from) => false,
        _ => rank(to) < rank(from),
    };
    (!allowed).then(|| format!("{from} must not use {to}: arrows point down the ladder of ARCHITECTURE.md"))
}

/// First path segments after `crate::` in a line, each with the segment that follows it.
fn named_rooms(line: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for rest in line.split("crate::").skip(1) {
        let inside = rest.strip_prefix('{').and_then(|group| group.split_once('}')).map(|(group, _)| group);
        for path in inside.map_or(vec![rest], |group| group.split(',').collect()) {
            let mut segments = path.trim().split("::").map(word);
            let first = segments.next().unwrap_or_default();
            if !first.is_empty() && first.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit()) {
                found.push((first, segments.next().unwrap_or_default()));
            }
        }
    }
    found
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Every use of `crate::<room>` in the engine follows the ladder; tests are free.
pub(super) fn room_arrows(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.rust("engine/src/") {
        let inside = path.trim_start_matches("engine/src/");
        if inside == "lib.rs" || inside == "main.rs" {
            continue;
        }
        let room = inside.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        if objection("cli", room, "").is_some() {
            findings.push(Finding::new(path, 0, "unknown room; give it a place in LADDER and in ARCHITECTURE.md"));
            continue;
        }
        // `super` at the root of a room leads out of it, where the search for `crate::` would not look.
        let at_root = inside == format!("{room}/mod.rs") || inside == format!("{room}.rs");
        for (line, code) in source.code() {
            let objections = named_rooms(code).into_iter().filter_map(|(to, next)| objection(room, &to, &next));
            findings.extend(objections.map(|o| Finding::new(path, line, o)));
            if code.contains("super::super::") || at_root && code.trim_start().starts_with("use super::") {
                findings.push(Finding::new(path, line, "write `crate::…` instead of a chain of `super`"));
            }
        }
    }
    findings
}

/// The ground of the engine knows the kernels' data types; models and what lies above them call operators by `ops`.
pub(super) fn rooms_of_the_kernels(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for room in BACKEND_FREE {
        for (path, source) in tree.rust(&format!("engine/src/{room}/")) {
            for (line, code) in source.code().filter(|(_, code)| code.contains("::cpu::") || code.contains("cudarc")) {
                let what = code.trim();
                findings.push(Finding::new(path, line, format!("{room} must not name a backend: {what}")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(path: &str, text: &str) -> Vec<String> {
        room_arrows(&Tree::of(&[(path, text)])).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn arrows_up_the_ladder_are_found() {
        assert_eq!(messages("engine/src/tensor/mod.rs", "use crate::error::Error;\nuse crate::ops::gemm;").len(), 1);
        assert_eq!(messages("engine/src/nn/mha.rs", "use crate::{ops::gemm, models::dit};").len(), 1);
        assert_eq!(messages("engine/src/io/png.rs", "fn f(t: &crate::tensor::Tensor) {}").len(), 1);
        assert!(messages("engine/src/models/dit.rs", "use crate::io::json;\nuse crate::nn::Linear;").is_empty());
    }

    #[test]
    fn models_name_no_backend_and_backends_only_the_cache() {
        assert_eq!(messages("engine/src/models/dit.rs", "use crate::backend::cpu;").len(), 1);
        assert_eq!(messages("engine/src/backend/cuda/mod.rs", "use crate::io::files;\nuse crate::io::cache;").len(), 1);
        let tree = Tree::of(&[("engine/src/nn/a.rs", "graft_kernels::gemm::cpu::forward(x);")]);
        assert_eq!(rooms_of_the_kernels(&tree).len(), 1);
    }

    #[test]
    fn unknown_rooms_and_chains_of_super_are_found() {
        assert_eq!(messages("engine/src/attic/mod.rs", "").len(), 1);
        assert_eq!(messages("engine/src/nn/a.rs", "use crate::attic::x;").len(), 1);
        assert_eq!(messages("engine/src/nn/mod.rs", "use super::models;").len(), 1);
        assert_eq!(messages("engine/src/nn/operators/mha.rs", "use super::super::super::models;").len(), 1);
    }

    #[test]
    fn tests_are_free() {
        assert!(messages("engine/src/tensor/mod.rs", "#[cfg(test)]\nmod tests { use crate::models::dit; }").is_empty());
    }
}

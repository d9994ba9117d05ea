//! What every file must look like: documented, short, finished, free of machine paths, small.

use super::{Finding, Tree};

/// Lines above which a file should be split, and above which it must be.
const SOFT_LINES: usize = 400;
const HARD_LINES: usize = 600;

/// Bytes that one committed file may have.
const LARGEST_FILE: u64 = 10 << 20;

/// First words of a generated file, which obeys its generator instead.
const GENERATED: &str = "// @generated";

/// Words that mark unfinished work, spelled apart so that this file does not contain them.
const MARKERS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// Attributes that hide a test or accept any panic.
const WEAK_TESTS: [&str; 2] = ["#[ignore", "#[should_panic"];

/// Beginnings of absolute paths that exist on one machine only, spelled apart for the same reason.
const MACHINE_PATHS: [&str; 6] = [
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("/t", "mp/"),
    concat!("C:", "\\"),
];

/// Every Rust file begins with `//!` and says what it is for.
pub(super) fn module_documentation(tree: &Tree) -> Vec<Finding> {
    let rust = tree.texts().filter(|(path, text)| path.ends_with(".rs") && !text.starts_with(GENERATED));
    let bare = rust.filter(|(_, text)| !text.trim_start().starts_with("//! "));
    bare.map(|(path, _)| Finding::new(path, 1, "begin the module with `//!` and what it is for")).collect()
}

/// Files stay short enough to be read at one sitting.
pub(super) fn file_length(tree: &Tree) -> Vec<Finding> {
    let is_source = |path: &str| [".rs", ".py", ".cu", ".cuh", ".sh"].iter().any(|e| path.ends_with(e));
    let sources = tree.texts().filter(|(path, text)| is_source(path) && !text.starts_with(GENERATED));
    sources
        .filter_map(|(path, text)| match text.lines().count() {
            n if n > HARD_LINES => {
                Some(Finding::new(path, 0, format!("{n} lines; split it, {HARD_LINES} is the limit")))
            }
            n if n > SOFT_LINES => Some(Finding::warning(path, format!("{n} lines; aim at 200 to 300"))),
            _ => None,
        })
        .collect()
}

/// Nothing unfinished, no test that is skipped or that any panic satisfies.
pub(super) fn leftovers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.all_rust() {
        for (line, text) in source.comments() {
            let marker = MARKERS.iter().find(|m| text.contains(**m));
            findings.extend(marker.map(|m| Finding::new(path, line, format!("{m}: finish it or open an issue"))));
        }
        for (line, text) in source.all_code() {
            let weak = WEAK_TESTS.iter().find(|w| text.contains(**w));
            findings.extend(
                weak.map(|w| Finding::new(path, line, format!("{w}]: a test runs, and states what it expects"))),
            );
        }
    }
    let is_script = |path: &str| [".py", ".sh", ".cu", ".cuh", ".toml", "Makefile"].iter().any(|e| path.ends_with(e));
    for (path, text) in tree.texts().filter(|(path, _)| is_script(path)) {
        for (i, line) in text.lines().enumerate() {
            let marker = MARKERS.iter().find(|m| line.contains(**m));
            findings.extend(marker.map(|m| Finding::new(path, i + 1, format!("{m}: finish it or open an issue"))));
        }
    }
    findings
}

/// No path that exists on one machine only.
pub(super) fn machine_paths(tree: &Tree) -> Vec<Finding> {
    // Recorded data may quote whatever it was recorded from.
    let texts = tree.texts().filter(|(path, _)| !path.starts_with("tests/golden/"));
    let lines = texts.flat_map(|(path, text)| text.lines().enumerate().map(move |(i, line)| (path, i + 1, line)));
    lines
        .filter_map(|(path, line, text)| {
            let starts =
                |at: usize| at == 0 || !text[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}/".contains(c));
            let hit = MACHINE_PATHS.iter().find(|p| text.match_indices(**p).any(|(at, _)| starts(at)))?;
            Some(Finding::new(path, line, format!("absolute path {hit}…: use a path relative to the repository")))
        })
        .collect()
}

/// No file that makes every clone slow.
pub(super) fn large_files(tree: &Tree) -> Vec<Finding> {
    let large = tree.sizes().filter(|(_, bytes)| *bytes > LARGEST_FILE);
    large
        .map(|(path, bytes)| {
            Finding::new(path, 0, format!("{bytes} bytes; the limit is {LARGEST_FILE}, larger data is fetched"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rule: fn(&Tree) -> Vec<Finding>, path: &str, text: &str) -> Vec<Finding> {
        rule(&Tree::of(&[(path, text)]))
    }

    #[test]
    fn a_module_without_documentation_is_found() {
        assert_eq!(of(module_documentation, "a.rs", "use x;\n").len(), 1);
        assert!(of(module_documentation, "a.rs", "//! What it is for.\n").is_empty());
        assert!(of(module_documentation, "a.rs", "// @generated by x\n").is_empty());
    }

    #[test]
    fn long_files_are_found() {
        assert!(of(file_length, "a.rs", &"x\n".repeat(400)).is_empty());
        assert!(of(file_length, "a.rs", &"x\n".repeat(401))[0].warning);
        assert!(!of(file_length, "a.py", &"x\n".repeat(601))[0].warning);
        assert!(of(file_length, "a.rs", &format!("// @generated\n{}", "x\n".repeat(900))).is_empty());
    }

    #[test]
    fn leftovers_are_found() {
        let [later, broken, unsure] = MARKERS;
        assert_eq!(
            of(leftovers, "a.rs", &format!("// {later}: later\nlet s = \"{broken}\";\n/* {unsure} */")).len(),
            2
        );
        assert_eq!(of(leftovers, "a.py", &format!("# {broken}\n")).len(), 1);
        assert_eq!(
            of(leftovers, "a.rs", "#[test]\n#[ignore]\nfn f() {}\n#[should_panic(expected = \"x\")]\nfn g() {}").len(),
            2
        );
    }

    #[test]
    fn machine_paths_are_found() {
        let [home, root, ..] = MACHINE_PATHS;
        assert_eq!(of(machine_paths, "a.md", &format!("see {home}me/x\nand \"{root}y\"")).len(), 2);
        assert!(of(machine_paths, "a.md", &format!("shared{home}x and https://example.org/{}", &root[1..])).is_empty());
    }

    #[test]
    fn a_large_file_is_found() {
        assert_eq!(of(large_files, "a.bin", &"x".repeat((10 << 20) + 1)).len(), 1);
        assert!(of(large_files, "a.bin", "x").is_empty());
    }
}

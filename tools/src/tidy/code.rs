//! What code may do where: files, output, `unsafe`, panics.

use super::source::Source;
use super::{Finding, Tree};

/// Places that may contain `unsafe`, each with its reason; a place that ends in `/` is a folder.
const UNSAFE: [(&str, &str); 12] = [
    ("engine/src/backend/cuda/", "calls into the driver"),
    ("engine/src/backend/emu/", "calls into compiled kernels"),
    ("engine/src/tensor/device.rs", "declares a cache line of floats to be plain data"),
    ("engine/src/io/map.rs", "maps files into memory"),
    ("kernels-cu/examples/cust/src/queue.rs", "launches kernels by way of cust"),
    ("kernels-cu/gemm/product.rs", "hands disjoint parts of one matrix to threads"),
    ("kernels-cu/gemm/product/few_rows.rs", "SIMD inner loops"),
    ("kernels-cu/gemm/product/micro.rs", "SIMD inner loops"),
    ("kernels-cu/gemm/product/pack.rs", "SIMD inner loops"),
    ("kernels-cu/gemm/product/packed.rs", "SIMD inner loops"),
    ("kernels-cu/gemm/product/windows.rs", "SIMD inner loops"),
    ("tests/counting.rs", "an allocator that counts"),
];

/// Files outside tests that may panic, each with its reason.
const PANICS: [(&str, &str); 0] = [];

/// Whether `code` has `word` with no identifier character before it, nor after it where it ends in a letter.
fn has_word(code: &str, word: &str) -> bool {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    let open_end = !word.ends_with(in_name);
    code.match_indices(word)
        .any(|(i, _)| !code[..i].ends_with(in_name) && (open_end || !code[i + word.len()..].starts_with(in_name)))
}

fn lines_with<'s>(source: &'s Source, patterns: &'s [&str]) -> impl Iterator<Item = (usize, &'s str)> {
    source.code().filter_map(move |(line, code)| patterns.iter().find(|p| has_word(code, p)).map(|p| (line, *p)))
}

/// Only `engine/src/io` opens files; the emulator's builds are folders of what the host compiler made, examples are
/// programs of their own, and `pages` maps memory of no file.
pub(super) fn files_only_in_io(tree: &Tree) -> Vec<Finding> {
    let outside = ["engine/src/", "kernels-cu/", "codegen/src/"].into_iter().flat_map(|folder| tree.rust(folder));
    let places = ["engine/src/io/", "kernels-cu/emu/", "kernels-cu/examples/", "engine/src/tensor/pages.rs"];
    let chosen = outside.filter(|(path, _)| !places.iter().any(|place| path.starts_with(place)));
    chosen
        .flat_map(|(path, source)| {
            lines_with(source, &["std::fs", "fs::", "OpenOptions", "File::open(", "File::create(", "memmap2"])
                .map(|(line, p)| Finding::new(path, line, format!("{p}: only engine/src/io touches files")))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Only `engine/src/cli` prints, and nobody ends the process: `main` returns an exit code.
pub(super) fn output_only_in_cli(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in
        ["engine/src/", "kernels-cu/", "codegen/src/"].into_iter().flat_map(|folder| tree.rust(folder))
    {
        let printing = ["println!", "print!", "eprintln!", "eprint!", "dbg!", "io::stdout", "io::stderr"];
        // Examples and benches of the kernels are programs of their own.
        let speaks = path.starts_with("engine/src/cli/") || path.contains("/examples/");
        let printed = lines_with(source, &printing).filter(|_| !speaks);
        findings.extend(printed.map(|(line, p)| Finding::new(path, line, format!("{p}: only engine/src/cli prints"))));
        let exits = lines_with(source, &["process::exit", "process::abort"]);
        findings.extend(
            exits.map(|(line, p)| Finding::new(path, line, format!("{p}: return an ExitCode from main instead"))),
        );
    }
    findings
}

/// `unsafe` stands only in the listed files, and the list has no entry that needs none.
pub(super) fn unsafe_only_where_listed(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, source) in tree.all_rust() {
        let place = UNSAFE
            .iter()
            .find(|(place, _)| if place.ends_with('/') { path.starts_with(place) } else { path == *place });
        let mut uses = source.all_code().filter(|(_, code)| has_word(code, "unsafe") || has_word(code, "unsafe_code"));
        match (place, uses.next()) {
            (None, Some((line, _))) => {
                findings.push(Finding::new(
                    path,
                    line,
                    "unsafe: not in the list of tidy, which gives each place and its reason",
                ));
            }
            (Some((place, _)), None) if !place.ends_with('/') => {
                findings.push(Finding::new(path, 0, "has no unsafe any more; take it off the list of tidy"));
            }
            _ => {}
        }
    }
    findings
}

/// Library code returns errors: it does not panic on purpose.
pub(super) fn no_panics(tree: &Tree) -> Vec<Finding> {
    let panics = [".unwrap()", ".expect(", "panic!(", "todo!(", "unimplemented!("];
    let mut findings = Vec::new();
    for (path, source) in
        ["engine/src/", "kernels-cu/", "codegen/src/", "tools/src/"].into_iter().flat_map(|folder| tree.rust(folder))
    {
        if path.contains("/examples/") || PANICS.iter().any(|(allowed, _)| *allowed == path) {
            continue;
        }
        for (line, code) in source.code() {
            for p in panics.iter().filter(|p| code.contains(**p)) {
                findings.push(Finding::new(
                    path,
                    line,
                    format!("{p}: return an error, or restructure so that it cannot happen"),
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rule: fn(&Tree) -> Vec<Finding>, path: &str, text: &str) -> usize {
        rule(&Tree::of(&[(path, text)])).len()
    }

    #[test]
    fn file_access_outside_io_is_found() {
        assert_eq!(of(files_only_in_io, "engine/src/train/a.rs", "let t = std::fs::read(p)?;"), 1);
        assert_eq!(of(files_only_in_io, "engine/src/train/a.rs", "use std::fs::File;\nFile::open(p)?;"), 2);
        assert_eq!(of(files_only_in_io, "engine/src/train/a.rs", "LossCoefs::new(p)?;"), 0);
        assert_eq!(of(files_only_in_io, "engine/src/train/a.rs", "TensorFile::open(p)?; // std::fs"), 0);
        assert_eq!(of(files_only_in_io, "engine/src/io/a.rs", "std::fs::read(p)?;"), 0);
        assert_eq!(
            of(files_only_in_io, "engine/src/train/a.rs", "#[cfg(test)]\nmod tests { fn f() { std::fs::read(p); } }"),
            0
        );
    }

    #[test]
    fn output_outside_cli_is_found() {
        assert_eq!(of(output_only_in_cli, "engine/src/train/a.rs", "println!(\"x\");"), 1);
        assert_eq!(of(output_only_in_cli, "kernels-cu/a.rs", "eprintln!(\"x\");"), 1);
        assert_eq!(of(output_only_in_cli, "engine/src/cli/a.rs", "println!(\"x\"); std::process::exit(1)"), 1);
    }

    #[test]
    fn unsafe_is_found_and_a_needless_permission_too() {
        assert_eq!(of(unsafe_only_where_listed, "engine/src/nn/a.rs", "#[allow(unsafe_code)]\nfn f() {}"), 1);
        assert_eq!(of(unsafe_only_where_listed, "engine/src/nn/a.rs", "// unsafe\nlet unsafe_not = \"unsafe\";"), 0);
        assert_eq!(of(unsafe_only_where_listed, "engine/src/io/map.rs", "unsafe { map() }"), 0);
        assert_eq!(of(unsafe_only_where_listed, "engine/src/io/map.rs", "map()"), 1);
    }

    #[test]
    fn panics_are_found_outside_tests() {
        assert_eq!(of(no_panics, "engine/src/a.rs", "x.unwrap(); y.expect(\"z\"); panic!(\"w\")"), 3);
        assert_eq!(of(no_panics, "kernels-cu/a.rs", "todo!(); unimplemented!()"), 2);
        assert_eq!(of(no_panics, "engine/src/a.rs", "x.unwrap_or(0);\n#[cfg(test)]\nfn f() { x.unwrap() }"), 0);
    }
}

//! What each kernel uses, the table of it, and what the gate objects to.

use super::compile::Compiled;
use super::sass::{Function, functions};
use std::path::Path;

/// The committed table, relative to the repository.
pub const TABLE: &str = "kernels-cu/resources.csv";

const HEADER: &str = "source,kernel,element,arch,registers,shared,stack,spills,hmma,gmma,roles";

/// One kernel for one architecture.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resources {
    /// Path of the source.
    pub source: String,
    /// Name of the kernel.
    pub kernel: String,
    /// Working type that the source was compiled for; empty where it has none.
    pub element: String,
    /// `80` or `90a`.
    pub arch: String,
    /// Registers a thread at launch.
    pub registers: usize,
    /// Bytes of static shared memory.
    pub shared: usize,
    /// Bytes of a thread's stack frame.
    pub stack: usize,
    /// Bytes of spill stores and loads.
    pub spills: usize,
    /// Instructions of `mma.sync`.
    pub hmma: usize,
    /// Instructions of `wgmma`.
    pub gmma: usize,
    /// Register limits of the roles, each with what is used under it.
    pub roles: String,
}

/// The number before or after a word of the assembler's log.
fn number(line: &str, after: &str) -> usize {
    let words: Vec<&str> = line.split([' ', ',']).filter(|w| !w.is_empty()).collect();
    let phrase: Vec<&str> = after.split(' ').collect();
    let at = words.windows(phrase.len()).position(|w| w == phrase.as_slice());
    at.and_then(|i| words.get(i.checked_sub(1)?)?.parse().ok()).unwrap_or(0)
}

/// Reads log and disassembly.
pub fn collect(source: &str, element: &str, arch: &str, compiled: &Compiled) -> Vec<Resources> {
    let code = functions(&compiled.sass);
    let mut rows: Vec<Resources> = Vec::new();
    for line in compiled.log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            let empty = Function::default();
            let f = code.iter().find(|f| f.name == kernel).unwrap_or(&empty);
            rows.push(Resources {
                source: source.to_string(),
                element: element.to_string(),
                arch: arch.to_string(),
                registers: 0,
                shared: 0,
                stack: 0,
                spills: 0,
                hmma: f.count(&["HMMA", "IMMA", "QMMA"]),
                gmma: f.count(&["HGMMA", "QGMMA", "IGMMA"]),
                roles: f.roles(),
                kernel,
            });
        }
        let Some(row) = rows.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            row.stack = number(line, "bytes stack frame");
            row.spills = number(line, "bytes spill stores") + number(line, "bytes spill loads");
        } else if line.contains("Used ") {
            row.registers = number(line, "registers");
            row.shared = number(line, "bytes smem");
        }
    }
    rows.sort();
    rows
}

/// What must not be.
pub fn complaints(source: &str, arch: &str, text: &str, compiled: &Compiled, rows: &[Resources]) -> Vec<String> {
    let place = format!("{source} for sm_{arch}");
    let mut found: Vec<String> = compiled
        .log
        .lines()
        .filter(|l| l.contains("(C75") || l.contains("warning"))
        .map(|l| format!("{place}: {}", l.trim()))
        .collect();
    for row in rows.iter().filter(|r| r.stack + r.spills > 0) {
        let (stack, spills) = (row.stack, row.spills);
        found.push(format!("{place}: {}: {stack} bytes of stack, {spills} bytes of spills; none may be", row.kernel));
    }
    // Kernels whose body is for bf16 alone are empty in f32, where no way takes them.
    let guarded = ["if_bf16", "if constexpr (sizeof(T) == 2)"].iter().any(|w| text.contains(w));
    let empty = guarded && rows.iter().all(|r| r.element == "f32");
    let meant = |words: &[&str]| !empty && words.iter().any(|w| text.contains(w));
    if meant(&["wgmma_ss<", "wgmma_rs<"]) && rows.iter().all(|r| r.gmma == 0) {
        found.push(format!("{place}: calls wgmma, but no HGMMA is in the code"));
    }
    if meant(&["mma_m16n8k16<", "mma_m16n8k8<", "mma_m16n8k32_s8("]) && rows.iter().all(|r| r.hmma == 0) {
        found.push(format!("{place}: calls mma.sync, but no HMMA is in the code"));
    }
    if rows.is_empty() {
        found.push(format!("{place}: has no kernel"));
    }
    found
}

/// The table as text.
pub fn render_table(rows: &[Resources]) -> String {
    let line = |r: &Resources| {
        let numbers = [r.registers, r.shared, r.stack, r.spills, r.hmma, r.gmma].map(|n| n.to_string()).join(",");
        format!("{},{},{},{},{numbers},{}\n", r.source, r.kernel, r.element, r.arch, r.roles)
    };
    let mut sorted = rows.to_vec();
    sorted.sort();
    format!("{HEADER}\n{}", sorted.iter().map(line).collect::<String>())
}

/// The committed table, empty where there is none.
pub fn read_table(root: &Path) -> String {
    std::fs::read_to_string(root.join(TABLE)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled() -> Compiled {
        let log = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : Function properties for k\n    \
            8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nptxas info    : Used 168 registers, used 2 barriers, 1040 bytes smem\n\
            ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n";
        Compiled { log: log.to_string(), sass: "Function : k\n/*0000*/ MOV R1, R2 ;\n".to_string() }
    }

    #[test]
    fn the_log_is_read() {
        let rows = collect("a.cu", "bf16", "90a", &compiled());
        assert_eq!(rows.len(), 1);
        let r = &rows[0];
        assert_eq!((r.registers, r.shared, r.stack, r.spills, r.gmma), (168, 1040, 8, 16, 0));
    }

    #[test]
    fn spills_serialised_and_missing_wgmma_are_found() {
        let (c, rows) = (compiled(), collect("a.cu", "bf16", "90a", &compiled()));
        let found = complaints("a.cu", "90a", "wgmma_ss<bf16, 64>(", &c, &rows);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("C7510") && found[1].contains("16 bytes of spills") && found[2].contains("HGMMA"));
        assert!(complaints("a.cu", "90a", "", &c, &[]).iter().any(|f| f.contains("has no kernel")));
    }
}

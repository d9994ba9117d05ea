//! What the main loop of a tensor-core kernel executes beside its products: the best proxy for speed with no GPU.

use std::collections::BTreeMap;

/// The tightest loop of a kernel that has tensor-core instructions of a warpgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MainLoop {
    /// Operations in order, without predicates, operands and modifiers past the first: `HGMMA.64x192x16`, `MUFU.EX2`.
    pub operations: Vec<String>,
}

/// Address and text of each instruction of kernel `name` in what `cuobjdump -sass` prints.
fn addressed<'s>(sass: &'s str, name: &str) -> Vec<(u64, &'s str)> {
    let of_kernel = sass.lines().skip_while(|l| l.trim().strip_prefix("Function : ") != Some(name)).skip(1);
    let of_kernel = of_kernel.take_while(|l| !l.trim().starts_with("Function : "));
    let parsed = of_kernel.filter_map(|line| {
        let (address, rest) = line.trim().strip_prefix("/*")?.split_once("*/")?;
        let (text, _) = rest.split_once(';')?;
        Some((u64::from_str_radix(address, 16).ok()?, text.trim()))
    });
    parsed.collect()
}

fn words(instruction: &str) -> impl Iterator<Item = &str> {
    instruction.split_whitespace().skip_while(|w| w.starts_with('@'))
}

/// Where a branch goes, if the instruction is one.
fn target(instruction: &str) -> Option<u64> {
    let operation = words(instruction).next()?;
    let last = instruction.rsplit([' ', ',']).next()?;
    if operation == "BRA" || operation.starts_with("BRA.") {
        return u64::from_str_radix(last.strip_prefix("0x")?, 16).ok();
    }
    None
}

impl MainLoop {
    /// The loop of kernel `name`; none where no loop has such instructions.
    pub fn find(sass: &str, name: &str) -> Option<MainLoop> {
        let code = addressed(sass, name);
        let body = |from: u64, to: u64| code.iter().filter(move |(at, _)| (from..=to).contains(at));
        let loops = code.iter().filter_map(|(at, text)| target(text).filter(|to| to < at).map(|to| (to, *at)));
        let busy = loops.filter(|(from, to)| body(*from, *to).any(|(_, text)| text.contains("GMMA.")));
        let (from, to) = busy.min_by_key(|(from, to)| to - from)?;
        let operation = |text: &&str| words(text).next().map(|w| w.split('.').take(2).collect::<Vec<_>>().join("."));
        Some(MainLoop { operations: body(from, to).filter_map(|(_, text)| operation(text)).collect() })
    }

    /// How many operations begin with `beginning`.
    pub fn count(&self, beginning: &str) -> usize {
        self.operations.iter().filter(|o| o.starts_with(beginning)).count()
    }

    /// Operations that begin with `beginning` before the last wait for products in flight.
    pub fn before_last_wait(&self, beginning: &str) -> usize {
        let last = self.operations.iter().rposition(|o| o == "WARPGROUP.DEPBAR").unwrap_or(0);
        self.operations.iter().take(last).filter(|o| o.starts_with(beginning)).count()
    }

    /// Counts of the operations that cost an attention kernel time, per score of a thread.
    pub fn per_score(&self, scores: usize) -> BTreeMap<&'static str, f64> {
        let of = ["MUFU.EX2", "FMNMX", "FFMA", "FADD", "FMUL", "F2FP", "MOV", "R2UR", "LDL", "STL"];
        of.into_iter().map(|o| (o, self.count(o) as f64 / scores as f64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Function : other\n/*0000*/ HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24 ;\nFunction : k\n\
        /*0000*/ FADD R1, R2, R3 ;\n/*0010*/ HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;\n\
        /*0020*/ MUFU.EX2 R1, R2 ;\n/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n/*0040*/ MUFU.EX2 R1, R2 ;\n\
        /*0050*/ @P0 BRA 0x10 ;\n/*0060*/ FADD R1, R2, R3 ;\n/*0070*/ BRA 0x0 ;\n/*0080*/ BRA 0x80 ;\n";

    #[test]
    fn the_tightest_loop_with_products_is_found() {
        let main = MainLoop::find(TEXT, "k").unwrap();
        assert_eq!(main.operations.len(), 5, "{main:?}");
        assert_eq!((main.count("MUFU"), main.before_last_wait("MUFU"), main.count("FADD")), (2, 1, 0));
        assert_eq!(main.per_score(2)["MUFU.EX2"], 1.0);
    }

    #[test]
    fn a_kernel_without_such_a_loop_has_none() {
        assert_eq!(MainLoop::find(TEXT, "other"), None);
        assert_eq!(MainLoop::find(TEXT, "missing"), None);
    }
}

//! Machine code as text: its functions, what they execute, and how many registers each role uses.

use std::collections::BTreeMap;

/// One kernel of a disassembly.
#[derive(Clone, Debug, Default)]
pub struct Function {
    /// Name in the object.
    pub name: String,
    /// Instructions without addresses and encodings.
    pub instructions: Vec<String>,
}

/// The functions of what `cuobjdump -sass` prints.
pub fn functions(sass: &str) -> Vec<Function> {
    let mut found: Vec<Function> = Vec::new();
    for line in sass.lines() {
        if let Some(name) = line.trim().strip_prefix("Function : ") {
            found.push(Function { name: name.to_string(), instructions: Vec::new() });
            continue;
        }
        // `/*0010*/  MOV R1, c[0x0][0x28] ;   /* encoding */`
        let Some((_, rest)) = line.trim().strip_prefix("/*").and_then(|l| l.split_once("*/")) else { continue };
        let Some((instruction, _)) = rest.split_once(';') else { continue };
        if let Some(f) = found.last_mut() {
            f.instructions.push(instruction.trim().to_string());
        }
    }
    found
}

/// The operation of an instruction, without its predicate: `HGMMA.64x72x16.F32.BF16`.
fn operation(instruction: &str) -> &str {
    let mut words = instruction.split_whitespace();
    match words.next() {
        Some(word) if word.starts_with('@') => words.next().unwrap_or_default(),
        word => word.unwrap_or_default(),
    }
}

impl Function {
    /// How many instructions have an operation that begins with one of these.
    pub fn count(&self, beginnings: &[&str]) -> usize {
        self.instructions.iter().filter(|i| beginnings.iter().any(|b| operation(i).starts_with(b))).count()
    }

    /// For a kernel whose warpgroups change their register limits: each limit with the registers used between that
    /// change and the next, as `limit:used`, in the order of the code.
    pub fn roles(&self) -> String {
        let mut roles: Vec<(String, usize)> = Vec::new();
        for instruction in &self.instructions {
            if operation(instruction).starts_with("USETMAXREG") {
                let limit = instruction.rsplit([' ', ',']).next().unwrap_or_default();
                let limit = limit.trim_start_matches("0x");
                let limit = usize::from_str_radix(limit, 16).map_or(limit.to_string(), |n| n.to_string());
                roles.push((limit, 0));
            } else if let Some((_, used)) = roles.last_mut() {
                *used = (*used).max(registers(instruction));
            }
        }
        roles.iter().map(|(limit, used)| format!("{limit}:{used}")).collect::<Vec<_>>().join(" ")
    }

    /// The code with registers, uniform registers, predicates and labels numbered in the order of their appearance:
    /// equal for equal work.
    pub fn normalised(&self) -> Vec<String> {
        let mut names: BTreeMap<String, usize> = BTreeMap::new();
        let useful = |i: &&String| !["NOP", "BRA"].contains(&operation(i));
        self.instructions.iter().filter(useful).map(|i| rename(i, &mut names)).collect()
    }
}

/// One more than the highest register that an instruction names.
fn registers(instruction: &str) -> usize {
    let names = instruction.split(|c: char| !c.is_alphanumeric());
    names.filter_map(|n| n.strip_prefix('R')?.parse::<usize>().ok()).max().map_or(0, |r| r + 1)
}

fn rename(instruction: &str, names: &mut BTreeMap<String, usize>) -> String {
    let mut out = String::new();
    let mut word = String::new();
    for c in instruction.chars().chain([' ']) {
        if c.is_alphanumeric() {
            word.push(c);
            continue;
        }
        let numbered = ["UR", "UP", "R", "P"]
            .iter()
            .find(|p| word.strip_prefix(**p).is_some_and(|n| !n.is_empty() && n.chars().all(|d| d.is_ascii_digit())));
        match numbered {
            Some(prefix) => {
                let next = names.len();
                let number = *names.entry(word.clone()).or_insert(next);
                out.push_str(&format!("{prefix}#{number}"));
            }
            None => out.push_str(&word),
        }
        word.clear();
        out.push(c);
    }
    out.trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\t\tFunction : k\n\t.headerflags\n        /*0000*/  MOV R1, c[0x0][0x28] ;  /* 0x1 */\n        \
        /*0010*/  @P0 USETMAXREG.DEALLOC.CTAPOOL 0x28 ;\n  /*0020*/ IADD3 R9, R8, R7, RZ ;\n  \
        /*0030*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;\n  /*0040*/ HGMMA.64x72x16.F32.BF16 R24, gdesc[UR4], R24 ;\n";

    #[test]
    fn functions_roles_and_counts() {
        let found = functions(TEXT);
        assert_eq!((found.len(), found[0].name.as_str(), found[0].instructions.len()), (1, "k", 5));
        assert_eq!(found[0].roles(), "40:10 232:25");
        assert_eq!(found[0].count(&["HGMMA", "QGMMA"]), 1);
    }

    #[test]
    fn renaming_makes_equal_work_equal() {
        let of = |text: &str| Function { name: String::new(), instructions: vec![text.to_string()] }.normalised();
        assert_eq!(of("FADD R3, R5, R5"), of("FADD R7, R1, R1"));
        assert_ne!(of("FADD R3, R5, R5"), of("FADD R3, R5, R6"));
    }
}

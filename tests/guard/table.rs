//! The accepted values, and how measured ones compare with them.

use std::collections::BTreeMap;
use std::fmt;

/// First line of the file.
const COLUMNS: &str = "kind,on,case,what,value";

/// Share by which a value may grow: the emulator counts exactly; libraries and compilers move the rest a little.
fn tolerance(kind: &str) -> f64 {
    match kind {
        "emulator" => 0.0,
        "allocations" | "instructions" => 0.02,
        _ => 0.05,
    }
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// On what it depends besides the program: instruction sets, or nothing.
    pub on: String,
    /// What was run.
    pub case: String,
    /// What was counted.
    pub what: String,
    /// How much.
    pub value: u64,
}

/// What a comparison says.
pub struct Finding {
    /// Whether it fails the test.
    pub fails: bool,
    /// In words.
    pub text: String,
}

type Key = (String, String, String, String);

/// The accepted values by kind, machine, case and what is counted.
#[derive(Debug, Default, PartialEq)]
pub struct Table(BTreeMap<Key, u64>);

impl Table {
    /// Reads the file; nothing where it is empty.
    ///
    /// # Errors
    /// The line that is no row.
    pub fn parse(text: &str) -> Result<Table, String> {
        let mut rows = BTreeMap::new();
        for line in text.lines().filter(|line| *line != COLUMNS) {
            let fields: Vec<&str> = line.split(',').collect();
            let (&[kind, on, case, what, value], false) = (fields.as_slice(), line.is_empty()) else {
                return Err(format!("no row: {line:?}"));
            };
            let value = value.parse().map_err(|_| format!("no number: {line:?}"))?;
            rows.insert([kind, on, case, what].map(str::to_string).into(), value);
        }
        Ok(Table(rows))
    }

    /// Takes what was measured as the values of its kind; those on other machines stay.
    pub fn accept(&mut self, kind: &str, found: &[Measured]) {
        self.0.retain(|(k, on, ..), _| k != kind || !found.iter().any(|m| m.on == *on));
        for m in found {
            self.0.insert((kind.to_string(), m.on.clone(), m.case.clone(), m.what.clone()), m.value);
        }
    }

    /// Everything that differs from what was accepted.
    pub fn compare(&self, kind: &str, found: &[Measured]) -> Vec<Finding> {
        let mut findings = Vec::new();
        let known_machine = |on: &str| self.0.keys().any(|(k, o, ..)| k == kind && o == on);
        for m in found {
            let name = format!("{kind}: {}: {}", m.case, m.what);
            if !known_machine(&m.on) {
                if self.0.keys().any(|(k, ..)| k == kind) {
                    findings.push(Finding { fails: false, text: format!("{name}: no row on {}: not compared", m.on) });
                } else {
                    findings.push(Finding { fails: true, text: format!("{name}: {} and no row", m.value) });
                }
                continue;
            }
            let key = (kind.to_string(), m.on.clone(), m.case.clone(), m.what.clone());
            let Some(&before) = self.0.get(&key) else {
                findings.push(Finding { fails: true, text: format!("{name}: {} and no row", m.value) });
                continue;
            };
            let change = m.value as f64 / (before as f64).max(1.0) - 1.0;
            let (grew, fell) = (m.value as f64 > before as f64 * (1.0 + tolerance(kind)), change < -tolerance(kind));
            if grew || (fell && m.value < before) {
                let word = if grew { "grew" } else { "fell" };
                let text = format!("{name} {word} from {before} to {} ({:+.1} %)", m.value, 100.0 * change);
                findings.push(Finding { fails: grew, text });
            }
        }
        for (k, on, case, what) in self.0.keys() {
            let measured = found.iter().any(|m| m.on == *on && m.case == *case && m.what == *what);
            if k == kind && found.iter().any(|m| m.on == *on) && !measured {
                findings
                    .push(Finding { fails: true, text: format!("{kind}: {case}: {what}: was not measured any more") });
            }
        }
        findings
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{COLUMNS}")?;
        self.0.iter().try_for_each(|((kind, on, case, what), value)| writeln!(f, "{kind},{on},{case},{what},{value}"))
    }
}

fn of(on: &str, case: &str, value: u64) -> Measured {
    Measured { on: on.into(), case: case.into(), what: "count".into(), value }
}

#[test]
fn growth_beyond_the_tolerance_fails_and_says_how_much() {
    let mut table = Table::default();
    table.accept("size", &[of("any", "graft", 1000)]);
    let said = |value: u64| -> Vec<(bool, String)> {
        table.compare("size", &[of("any", "graft", value)]).into_iter().map(|f| (f.fails, f.text)).collect()
    };
    assert_eq!(said(1050), []);
    assert_eq!(said(1051), [(true, "size: graft: count grew from 1000 to 1051 (+5.1 %)".to_string())]);
    assert_eq!(said(900), [(false, "size: graft: count fell from 1000 to 900 (-10.0 %)".to_string())]);
    // What the emulator counts is exact.
    table.accept("emulator", &[of("any", "gemm", 0)]);
    assert!(table.compare("emulator", &[of("any", "gemm", 1)])[0].fails);
    assert!(table.compare("emulator", &[of("any", "gemm", 0)]).is_empty());
}

#[test]
fn rows_that_come_and_go_are_noticed_and_other_machines_are_not() {
    let mut table = Table::default();
    table.accept("allocations", &[of("avx2", "a", 1), of("avx2", "b", 2)]);
    let fails = |found: &[Measured]| table.compare("allocations", found).iter().filter(|f| f.fails).count();
    assert_eq!(fails(&[of("avx2", "a", 1)]), 1);
    assert_eq!(fails(&[of("avx2", "a", 1), of("avx2", "b", 2), of("avx2", "c", 3)]), 1);
    assert_eq!(fails(&[of("neon", "a", 9), of("neon", "b", 9)]), 0);
    let mut other = Table::parse(&table.to_string()).unwrap();
    assert_eq!(other, table);
    other.accept("allocations", &[of("neon", "a", 9)]);
    assert!(other.to_string().contains("allocations,avx2,b,count,2\nallocations,neon,a,count,9\n"));
    assert!(Table::parse("a,b").is_err() && Table::parse("a,b,c,d,e").is_err());
}

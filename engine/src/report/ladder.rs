//! The ladders of operators on a page: what was tried, predicted and measured, beside the rows of what came of it.

use super::html::Html;
use super::parts;
use super::results::ladders::Ladder;
use std::collections::BTreeMap;

/// Draws the ladders of the operators in `rows`, whose lines stand under `heads` before them.
pub fn draw(h: &mut Html, ladders: &[Ladder], heads: &[&str], rows: &BTreeMap<&str, Vec<Vec<String>>>) {
    let heads: Vec<String> = heads.iter().map(|head| (*head).to_string()).collect();
    let measured: Vec<&Ladder> = ladders.iter().filter(|ladder| rows.contains_key(ladder.op.as_str())).collect();
    if measured.is_empty() {
        return;
    }
    let note = "What was tried on the way to each operator, what it was predicted to bring, and what it brought when it was tried. The rows above each ladder are those of this page.";
    parts::section(h, "Ladders", note, |h| {
        for of_op in measured.chunk_by(|a, b| a.op == b.op) {
            let op = of_op[0].op.as_str();
            h.leaf("h3", &[], op);
            parts::table(h, &heads, rows.get(op).map(Vec::as_slice).unwrap_or_default());
            for ladder in of_op {
                h.element("div", &[("class", "ladder")], |h| {
                    h.leaf("h3", &[], &format!("Ladder of {op}{}", ladder.title));
                    blocks(h, &ladder.text);
                });
            }
        }
    });
}

/// What a ladder holds of Markdown: tables, and paragraphs with code between backticks.
fn blocks(h: &mut Html, text: &str) {
    let of_table = |line: &str| line.starts_with('|');
    for block in text.split("\n\n").map(|block| block.lines().collect::<Vec<_>>()) {
        for part in block.chunk_by(|a, b| of_table(a) == of_table(b)) {
            match part {
                // The line below the heads only rules them off.
                [heads, _, rows @ ..] if of_table(heads) => {
                    parts::table(h, &cells(heads), &rows.iter().map(|row| cells(row)).collect::<Vec<_>>());
                }
                lines => h.element("p", &[], |h| inline(h, &lines.join(" "))),
            }
        }
    }
}

/// The cells of a line of a table, as plain text.
fn cells(line: &str) -> Vec<String> {
    let line = line.trim();
    let line = line.strip_prefix('|').unwrap_or(line);
    line.strip_suffix('|').unwrap_or(line).split('|').map(|cell| cell.trim().replace('`', "")).collect()
}

fn inline(h: &mut Html, text: &str) {
    for (index, part) in text.split('`').enumerate() {
        if index % 2 == 1 { h.leaf("code", &[], part) } else { h.text(part) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::{self, check::well_formed};

    #[test]
    fn a_ladder_stands_below_the_rows_of_its_operator() {
        let ladder = |op: &str, text: &str| Ladder { op: op.into(), title: " (CPU)".into(), text: text.into() };
        let text = "One `f32` line\nand <more>.\n\n| idea | ms |\n|---|---|\n| `a` | 1 |\n| b | |\n\nend";
        let ladders = [ladder("gemm", text), ladder("philox", "nothing of it was measured")];
        let rows = BTreeMap::from([("gemm", vec![vec!["gemm/fc1".to_string()]])]);
        let page = html::page("p", |h| draw(h, &ladders, &["case"], &rows));
        well_formed(&page);
        for part in [
            "<td>gemm/fc1</td>",
            "Ladder of gemm (CPU)",
            "<p>One <code>f32</code> line and &lt;more&gt;.</p>",
            "<th scope=\"col\">idea</th><th scope=\"col\">ms</th>",
            "<tr><td>a</td><td>1</td></tr><tr><td>b</td><td></td></tr>",
            "<p>end</p>",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("philox"));
        assert!(!html::page("p", |h| draw(h, &ladders, &["case"], &BTreeMap::new())).contains("Ladders"));
    }
}

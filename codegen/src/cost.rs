//! Values of the cost formulas, and the table of them in an operator's README.

use crate::contract::Contract;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Lines that enclose the generated part of a README.
const BEGIN: &str = "<!-- generated: costs -->";
const END: &str = "<!-- end -->";

/// Value of an expression with `+ - * /`, parentheses, whole numbers and dims.
///
/// # Errors
/// What cannot be read.
pub fn evaluate(text: &str, dims: &BTreeMap<String, usize>) -> Result<f64, String> {
    let mut rest = text;
    let value = sum(&mut rest, dims)?;
    if rest.trim().is_empty() { Ok(value) } else { Err(format!("{text}: cannot read {rest:?}")) }
}

fn accept(rest: &mut &str, operators: [char; 2]) -> Option<char> {
    let trimmed = rest.trim_start();
    let found = trimmed.chars().next().filter(|c| operators.contains(c))?;
    *rest = &trimmed[1..];
    Some(found)
}

fn sum(rest: &mut &str, dims: &BTreeMap<String, usize>) -> Result<f64, String> {
    let mut value = product(rest, dims)?;
    while let Some(operator) = accept(rest, ['+', '-']) {
        let term = product(rest, dims)?;
        value = if operator == '+' { value + term } else { value - term };
    }
    Ok(value)
}

fn product(rest: &mut &str, dims: &BTreeMap<String, usize>) -> Result<f64, String> {
    let mut value = atom(rest, dims)?;
    while let Some(operator) = accept(rest, ['*', '/']) {
        let factor = atom(rest, dims)?;
        value = if operator == '*' { value * factor } else { value / factor };
    }
    Ok(value)
}

fn atom(rest: &mut &str, dims: &BTreeMap<String, usize>) -> Result<f64, String> {
    if accept(rest, ['(', '(']).is_some() {
        let value = sum(rest, dims)?;
        return accept(rest, [')', ')'])
            .map(|_| value)
            .ok_or_else(|| format!("no closing parenthesis before {rest:?}"));
    }
    let trimmed = rest.trim_start();
    let end = trimmed.find(|c: char| !c.is_alphanumeric()).unwrap_or(trimmed.len());
    let (word, after) = trimmed.split_at(end);
    *rest = after;
    match (word.parse::<f64>(), dims.get(word)) {
        (Ok(number), _) => Ok(number),
        (_, Some(&dim)) => Ok(dim as f64),
        _ => Err(format!("{word:?} is neither a number nor a dim")),
    }
}

/// Table of the forward costs of an operator's real cases.
fn table(c: &Contract) -> Result<String, String> {
    let mut out = String::from("| case | dims | MFLOP | MB at the least | FLOP per byte |\n|---|---|---|---|---|\n");
    for case in c.case.iter().filter(|case| case.tier == "real") {
        let place = |e: String| format!("{}: case {}: {e}", c.name, case.name);
        let flops = evaluate(&c.cost.flops, &case.dims).map_err(place)?;
        let bytes = evaluate(&c.cost.bytes, &case.dims).map_err(place)?;
        let dims: Vec<String> =
            c.dims.iter().map(|d| format!("{d} {}", case.dims.get(d).copied().unwrap_or(0))).collect();
        let _ = writeln!(
            out,
            "| `{}` | {} | {:.3} | {:.3} | {:.2} |",
            case.name,
            dims.join(", "),
            flops / 1e6,
            bytes / 1e6,
            flops / bytes
        );
    }
    Ok(out)
}

/// A README with its generated part brought up to date; one without the part gets it at its end.
///
/// # Errors
/// When a formula cannot be evaluated.
pub fn refresh_readme(c: &Contract, text: &str) -> Result<String, String> {
    let table = table(c)?;
    let marked = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    Ok(match marked {
        Some((head, tail)) => format!("{head}{BEGIN}\n{table}{END}{tail}"),
        None => format!(
            "{}\n\n## Costs of one forward call, all tensors in f32\n\n{BEGIN}\n{table}{END}\n",
            text.trim_end()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_have_values() {
        let dims = BTreeMap::from([("B".to_string(), 2), ("Gh".to_string(), 3)]);
        assert_eq!(evaluate("4*(B*Gh + 1)/7 - B", &dims), Ok(2.0));
        assert!(evaluate("B*X", &dims).is_err() && evaluate("(B", &dims).is_err() && evaluate("B B", &dims).is_err());
    }

    #[test]
    fn a_readme_keeps_its_words_and_gets_its_numbers() {
        let contract = Contract::parse(
            "t",
            "name = 't'\nsummary = ''\nformula = []\ndims = ['L']\n[[input]]\nname = 'x'\nshape = ['L']\ndoc = ''\n\
             [cost]\nflops = '2*L'\nbytes = '4*L'\n\
             [[case]]\nname = 'a'\ntier = 'tiny'\ndims = { L = 1 }\n[[case]]\nname = 'b'\ntier = 'real'\ndims = { L = 1000000 }\n",
        )
        .unwrap();
        let text = refresh_readme(&contract, &format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        assert!(text.starts_with("before\n") && text.ends_with("\nafter\n") && !text.contains("old"));
        assert!(text.contains("| `b` | L 1000000 | 2.000 | 4.000 | 0.50 |") && !text.contains("`a`"), "{text}");
        let appended = refresh_readme(&contract, "no marks\n").unwrap();
        assert!(appended.starts_with("no marks\n\n## Costs") && appended.contains("| `b` |"));
        assert_eq!(refresh_readme(&contract, &appended).unwrap(), appended);
    }
}

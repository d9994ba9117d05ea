//! Identifiers and expressions shared by the emitters.

use crate::contract::{Contract, Tensor};

/// `ln_modulate` → `LnModulate`.
pub fn camel(snake: &str) -> String {
    snake
        .split('_')
        .map(|word| {
            let mut letters = word.chars();
            letters.next().map(|first| first.to_uppercase().collect::<String>() + letters.as_str()).unwrap_or_default()
        })
        .collect()
}

/// A dim expression in Rust: dim letters become the local variables of [`dim_locals`] (`Gh*P` → `gh*p`).
pub fn rust_expr(expr: &str) -> String {
    expr.to_lowercase()
}

/// `let Dims { b, n, d } = dims;` with only the letters that `text` uses, so that no variable is unused.
pub fn dim_locals(contract: &Contract, text: &str) -> String {
    let used: Vec<String> = contract.dims.iter().map(|d| d.to_lowercase()).filter(|d| mentions(text, d)).collect();
    if used.is_empty() { String::new() } else { format!("let Dims {{ {}, .. }} = dims;", used.join(", ")) }
}

/// Whether the identifier `name` occurs as a whole word in `text`.
pub fn mentions(text: &str, name: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name)
}

/// Number of elements of a tensor as a Rust expression over the dim locals.
pub fn len_expr(tensor: &Tensor) -> String {
    if tensor.shape.is_empty() {
        return "1".into();
    }
    tensor.shape.iter().map(|s| factor(s)).collect::<Vec<_>>().join(" * ")
}

/// A dim expression, parenthesised where it is a sum.
pub fn factor(expr: &str) -> String {
    let e = rust_expr(expr);
    if e.contains(['+', '-', '/']) { format!("({e})") } else { e }
}

/// `[B, N, D]` as written in documentation.
pub fn shape_doc(tensor: &Tensor) -> String {
    format!("[{}]", tensor.shape.join(", "))
}

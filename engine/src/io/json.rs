//! JSON as Python writes it: `NaN`, `Infinity` and `-Infinity` are accepted where a value may stand.
//!
//! JSON has no such numbers, but released scheduler configurations contain them. Each becomes the *string* of the same
//! spelling, so that nothing is lost and everything else stays ordinary JSON; [`number`] turns it into the `f64`.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::io::{atomic, files};

/// Python's spellings of the values that JSON lacks.
const LITERALS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Reads a JSON file.
///
/// # Errors
/// "`<file name>` missing", "`<file name>` is not valid json" with line and column, or an I/O error.
pub fn read(path: &Path) -> Result<Value> {
    let name = files::file_name(path);
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), format!("{name} missing"))
            .fix("check the path, or download the file"));
    }
    parse(&path.display().to_string(), &name, &files::read_bytes(path)?)
}

/// Parses JSON bytes: `place` is the full path for messages, `name` the file name in the problem.
///
/// # Errors
/// "`<name>` is not valid json" with line and column.
pub fn parse(place: &str, name: &str, bytes: &[u8]) -> Result<Value> {
    let refuse = |is: String| {
        Error::failure(place, format!("{name} is not valid json")).is(is).must("JSON").fix("correct the file by hand")
    };
    let text = std::str::from_utf8(bytes)
        .map_err(|e| refuse(format!("an invalid UTF-8 byte at offset {}", e.valid_up_to())))?;
    let found = find_literals(text);
    serde_json::from_str(&quote(text, &found)).map_err(|e| {
        let column = original_column(text, &found, e.line(), e.column());
        let full = e.to_string();
        let reason = full.rsplit_once(" at line ").map_or(full.as_str(), |(reason, _)| reason);
        refuse(format!("{} at line {} column {column}", files::printable(reason), e.line()))
    })
}

/// Writes a value as indented JSON, atomically, with a final line break.
///
/// # Errors
/// The I/O errors of [`atomic::write_atomic`].
pub fn write(path: &Path, value: &Value) -> Result<()> {
    atomic::write_bytes(path, format!("{value:#}\n").as_bytes())
}

/// A number, or one of Python's literals as [`parse`] returns them; `None` for anything else.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => match s.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// Byte ranges of the literals that stand outside strings, as whole words.
fn find_literals(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let is_word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'+' | b'.');
    let mut found = Vec::new();
    let (mut at, mut in_string) = (0, false);
    while let Some(&byte) = bytes.get(at) {
        if in_string {
            match byte {
                b'\\' => at += 1,
                b'"' => in_string = false,
                _ => {}
            }
            at += 1;
        } else if is_word(byte) {
            let length = bytes[at..].iter().take_while(|&&b| is_word(b)).count();
            // Words are ASCII, so the range lies on character boundaries.
            let word = at..at + length;
            at = word.end;
            // A literal is a value, never the key of an object.
            let is_key = bytes[at..].iter().find(|b| !b.is_ascii_whitespace()) == Some(&b':');
            if !is_key && LITERALS.iter().any(|literal| literal.as_bytes() == &bytes[word.clone()]) {
                found.push(word);
            }
        } else {
            in_string = byte == b'"';
            at += 1;
        }
    }
    found
}

/// `text` with each literal in quotation marks.
fn quote(text: &str, literals: &[Range<usize>]) -> String {
    let mut out = String::with_capacity(text.len() + 2 * literals.len());
    let mut done = 0;
    for literal in literals {
        out.push_str(&text[done..literal.start]);
        out.push('"');
        out.push_str(&text[literal.clone()]);
        out.push('"');
        done = literal.end;
    }
    out.push_str(&text[done..]);
    out
}

/// Undoes the shift that the quotation marks gave to a column (in bytes, from 1) of `line` (from 1).
fn original_column(text: &str, literals: &[Range<usize>], line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let mut column = column;
    for literal in literals.iter().filter(|literal| literal.start >= start) {
        if start + column <= literal.end {
            break;
        }
        column -= 2;
    }
    column
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{golden, test_dir};
    use serde_json::json;

    fn parsed(text: &str) -> Value {
        parse("f", "f", text.as_bytes()).unwrap()
    }

    #[test]
    fn python_literals_become_numbers() {
        let value = parsed(r#"{"a": -Infinity, "b": [NaN, Infinity], "NaN": "x NaN \" -Infinity", "c": 1e3}"#);
        assert_eq!(number(&value["a"]), Some(f64::NEG_INFINITY));
        assert!(number(&value["b"][0]).unwrap().is_nan());
        assert_eq!(number(&value["b"][1]), Some(f64::INFINITY));
        assert_eq!(value["NaN"], json!("x NaN \" -Infinity"));
        assert_eq!(number(&value["c"]), Some(1000.0));
        assert_eq!(number(&json!("inf")), None);
        assert_eq!(number(&json!(null)), None);
    }

    #[test]
    fn only_whole_words_are_literals() {
        for bad in ["NaNs", "+Infinity", "--Infinity", "Infinity1", "[NaN NaN]", "{NaN: 1}", "\"a\" NaN"] {
            assert!(parse("f", "f", bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_give_line_and_column_of_the_file() {
        let error = parse("dir/config.json", "config.json", b"{\n \"a\": [NaN, NaN, x]}").unwrap_err().to_string();
        let expected = "dir/config.json: config.json is not valid json; is expected value at line 2 column 18;";
        assert!(error.starts_with(expected), "{error}");
        assert!(parse("f", "f", b"\"\xff\"").unwrap_err().to_string().contains("offset 1"));
        assert!(parse("f", "f", "[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn golden_configs() {
        let config = |case: &str| read(&golden(&format!("safetensors_bad/{case}/model/config.json")));
        let minus = config("model_config_minus_infinity").unwrap();
        assert_eq!(number(&minus["lambda_min_clipped"]), Some(f64::NEG_INFINITY));
        assert_eq!(config("model_config_invalid_json").unwrap_err().problem(), "config.json is not valid json");
        assert_eq!(config("model_config_missing").unwrap_err().problem(), "config.json missing");
    }

    #[test]
    fn written_values_read_back() {
        let path = test_dir("json").join("a.json");
        let value = json!({"b": [1, 2.5], "a": "x"});
        write(&path, &value).unwrap();
        assert_eq!(read(&path).unwrap(), value);
        assert!(files::read_text(&path).unwrap().ends_with("}\n"));
    }
}

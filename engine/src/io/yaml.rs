//! Reading YAML configurations: a tree of nodes that know their line and column.
//!
//! Plain data only: one document, no anchors, no repeated keys, and no nesting that a configuration would not have.

use crate::error::{Error, Result};
use yaml_rust2::Event;
use yaml_rust2::parser::Parser;
use yaml_rust2::scanner::{Marker, TScalarStyle};

/// Deepest nesting.
const DEEPEST: usize = 64;

/// A part of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What stands there.
    pub value: Value,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// A word or number as it is written.
    Text(String),
    /// Items in order.
    List(Vec<Node>),
    /// Keys, all different, with their values in order.
    Map(Vec<(Node, Node)>),
}

impl Node {
    /// `config.yaml:3:5`.
    pub fn place(&self, file: &str) -> String {
        format!("{file}:{}:{}", self.line, self.column)
    }

    /// The word or number as it is written.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Whether there is nothing: empty, null, or Python's `None`, which YAML takes for a word.
    pub fn is_none(&self) -> bool {
        self.value == Value::Null || self.text() == Some("None")
    }

    /// A finite number.
    pub fn number(&self) -> Option<f64> {
        self.text()?.parse().ok().filter(|n: &f64| n.is_finite())
    }

    /// A whole number that is not negative.
    pub fn whole(&self) -> Option<u64> {
        self.text()?.parse().ok()
    }

    /// Items of a list.
    pub fn items(&self) -> Option<&[Node]> {
        match &self.value {
            Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// Keys and values of a map.
    pub fn entries(&self) -> Option<&[(Node, Node)]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// The value of a key of a map.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries()?.iter().find(|(k, _)| k.text() == Some(key)).map(|(_, value)| value)
    }
}

/// A list or map that has begun; a map alternates keys and values.
struct Open {
    at: Marker,
    is_map: bool,
    nodes: Vec<Node>,
}

/// Reads a document; `file` names it in messages.
///
/// # Errors
/// File, line and column of what is not YAML, or is more than plain data.
pub fn parse(file: &str, text: &str) -> Result<Node> {
    let mut parser = Parser::new_from_str(text);
    let (mut open, mut root): (Vec<Open>, Option<Node>) = (Vec::new(), None);
    loop {
        let (event, at) = parser.next_token().map_err(|e| refuse(file, e.marker(), e.info()))?;
        let finished = match event {
            Event::StreamEnd => break,
            Event::Nothing | Event::StreamStart | Event::DocumentStart | Event::DocumentEnd => continue,
            Event::Alias(_) => return Err(refuse(file, &at, "anchors are not read").fix("write the value out")),
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() == DEEPEST {
                    return Err(refuse(file, &at, "nested too deeply").must(format!("at most {DEEPEST} levels")));
                }
                open.push(Open { at, is_map: matches!(event, Event::MappingStart(..)), nodes: Vec::new() });
                continue;
            }
            Event::Scalar(text, style, ..) => {
                let null = style == TScalarStyle::Plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL");
                node(&at, if null { Value::Null } else { Value::Text(text) })
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(done) => {
                    // The parser places a map behind its first key.
                    let first = done.nodes.first().filter(|_| done.is_map).map(|key| (key.line, key.column));
                    let (line, column) = first.unwrap_or((done.at.line(), done.at.col() + 1));
                    Node { line, column, value: close(file, done.is_map, done.nodes)? }
                }
                None => return Err(refuse(file, &at, "ends what has not begun")),
            },
        };
        match open.last_mut() {
            Some(parent) => parent.nodes.push(finished),
            None if root.is_some() => return Err(refuse(file, &at, "more than one document")),
            None => root = Some(finished),
        }
    }
    Ok(root.unwrap_or(Node { line: 1, column: 1, value: Value::Null }))
}

fn node(at: &Marker, value: Value) -> Node {
    Node { line: at.line(), column: at.col() + 1, value }
}

fn close(file: &str, is_map: bool, nodes: Vec<Node>) -> Result<Value> {
    if !is_map {
        return Ok(Value::List(nodes));
    }
    let mut entries: Vec<(Node, Node)> = Vec::with_capacity(nodes.len() / 2);
    let mut nodes = nodes.into_iter();
    while let (Some(key), Some(value)) = (nodes.next(), nodes.next()) {
        let place = key.place(file);
        let Some(name) = key.text() else {
            return Err(Error::usage(place, "a key that is not a word or number"));
        };
        if entries.iter().any(|(known, _)| known.text() == Some(name)) {
            return Err(Error::usage(place, "a key stands twice").is(name).fix("remove one of the two"));
        }
        entries.push((key, value));
    }
    Ok(Value::Map(entries))
}

fn refuse(file: &str, at: &Marker, problem: &str) -> Error {
    Error::usage(format!("{file}:{}:{}", at.line(), at.col() + 1), format!("not a YAML configuration: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_places() {
        let text = "a:\n  b: 'x y'  # remark\n  c: [1, 2.5e-1, ~]\nd:\n  - 7: \"p\"\n  - 8: null\ne:\nf: None\n";
        let root = parse("f.yaml", text).unwrap();
        let a = root.get("a").unwrap();
        let b = a.get("b").unwrap();
        assert_eq!((b.text(), b.place("f.yaml")), (Some("x y"), "f.yaml:2:6".to_string()));
        let c = a.get("c").unwrap().items().unwrap();
        assert_eq!((c[0].whole(), c[1].number(), &c[2].value), (Some(1), Some(0.25), &Value::Null));
        let d = root.get("d").unwrap().items().unwrap();
        assert_eq!(d[0].entries().unwrap()[0].0.text(), Some("7"));
        assert_eq!((d[1].get("8").unwrap().is_none(), d[0].entries().unwrap()[0].0.line), (true, 5));
        assert!(root.get("e").unwrap().is_none() && root.get("f").unwrap().is_none());
        assert_eq!(parse("f.yaml", "").unwrap().value, Value::Null);
        // A quoted null is a word.
        assert_eq!(parse("f.yaml", "'null'").unwrap().text(), Some("null"));
    }

    #[test]
    fn what_is_not_plain_data_is_refused_with_its_place() {
        let deep = "[".repeat(100) + &"]".repeat(100);
        for (text, word) in [
            ("a: &x 1\nb: *x\n", "f.yaml:2:4: not a YAML configuration: anchors are not read"),
            ("a: 1\na: 2\n", "f.yaml:2:1: a key stands twice; is a"),
            ("? [1]\n: 2\n", "a key that is not a word or number"),
            ("a: 1\n---\nb: 2\n", "more than one document"),
            ("a: [1, 2\n", "not a YAML configuration"),
            ("a: 1\n b: 2\n", "f.yaml:2"),
            (deep.as_str(), "nested too deeply"),
        ] {
            let message = parse("f.yaml", text).unwrap_err().to_string();
            assert!(message.contains(word), "{message} without {word}");
        }
    }
}

//! The text of a plan, which knows line and column of every part.

use crate::error::Error;
use std::ops::Range;

/// A file's text with the name it goes by in messages.
#[derive(Clone, Debug)]
pub(super) struct SourceText {
    pub name: String,
    pub text: String,
}

impl SourceText {
    /// `plan.toml:3:9`: file, line and column (in characters), both from 1.
    pub fn place(&self, at: &Range<usize>) -> String {
        let before = self.text.get(..at.start).unwrap_or(&self.text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        let line = before.matches('\n').count() + 1;
        format!("{}:{line}:{}", self.name, before[line_start..].chars().count() + 1)
    }

    /// A usage error at a part of the text, whose text it shows.
    pub fn error(&self, at: &Range<usize>, problem: impl Into<String>) -> Error {
        let error = Error::usage(self.place(at), problem);
        match self.text.get(at.clone()).and_then(|t| t.lines().next()) {
            Some(part) if !part.is_empty() => error.is(part),
            _ => error,
        }
    }

    /// Moves what the TOML reader says into the form of every other message.
    pub fn refuse(&self, e: &toml::de::Error) -> Error {
        let at = e.span().unwrap_or(0..0);
        let message = e.message().trim_end().replace('\n', " ");
        match message.split_once(", expected ") {
            Some((problem, must)) => Error::usage(self.place(&at), problem).must(must),
            None => Error::usage(self.place(&at), message),
        }
        .fix("correct the plan; `graft plan check` tells when it is right")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_count_characters_from_one() {
        let text = SourceText { name: "p".into(), text: "a = 1\nnäme = 2\n".into() };
        assert_eq!(text.place(&(0..1)), "p:1:1");
        let at = text.text.find('2').unwrap();
        assert_eq!(text.place(&(at..at + 1)), "p:2:8");
        assert_eq!(text.error(&(at..at + 1), "wrong").to_string(), "p:2:8: wrong; is 2");
        assert_eq!(text.place(&(999..1000)), "p:3:1");
    }
}

//! A Rust file taken apart: code without comments and literals, comments alone, and which lines only exist in tests.

/// A Rust file; every view has the same lines as the file.
pub(super) struct Source {
    /// Code; comments and the contents of literals are blank.
    code: Vec<String>,
    /// Comments; everything else is blank.
    comments: Vec<String>,
    /// Whether the line belongs to an item under `#[cfg(test)]`.
    tests: Vec<bool>,
    test_modules: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Code,
    Line,
    Block(usize),
    Text,
    Raw(usize),
}

impl Source {
    pub(super) fn new(text: &str) -> Source {
        let (code, comments) = split(text);
        let (tests, test_modules) = test_lines(&code);
        let lines = |text: &str| text.lines().map(str::to_string).collect();
        Source { code: lines(&code), comments: lines(&comments), tests, test_modules }
    }

    /// Lines of code outside tests, numbered from 1.
    pub(super) fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let outside = |i: usize| !self.tests.get(i).copied().unwrap_or(false);
        self.code.iter().enumerate().filter(move |(i, _)| outside(*i)).map(|(i, line)| (i + 1, line.as_str()))
    }

    /// Lines of code, tests included.
    pub(super) fn all_code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.code.iter().enumerate().map(|(i, line)| (i + 1, line.as_str()))
    }

    /// Comments by line.
    pub(super) fn comments(&self) -> impl Iterator<Item = (usize, &str)> {
        self.comments.iter().enumerate().map(|(i, line)| (i + 1, line.as_str()))
    }

    /// Names of the modules that are declared here for tests only.
    pub(super) fn test_modules(&self) -> &[String] {
        &self.test_modules
    }
}

/// Separates code from comments; literals vanish from both.
fn split(text: &str) -> (String, String) {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut code, mut comments) = (String::new(), String::new());
    let (mut state, mut i) = (State::Code, 0);
    while i < chars.len() {
        let c = at(i);
        let mut taken = 1;
        if c == '\n' {
            state = if state == State::Line { State::Code } else { state };
            code.push('\n');
            comments.push('\n');
            i += 1;
            continue;
        }
        let (mut to_code, mut to_comments) = (' ', ' ');
        match state {
            State::Code => {
                let word_before = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_') && at(i - 1) != 'b';
                let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                if c == '/' && at(i + 1) == '/' {
                    state = State::Line;
                } else if c == '/' && at(i + 1) == '*' {
                    (state, taken) = (State::Block(1), 2);
                } else if c == 'r' && !word_before && at(i + 1 + hashes) == '"' {
                    (state, taken) = (State::Raw(hashes), hashes + 2);
                } else if c == '"' {
                    (state, to_code) = (State::Text, '"');
                } else if c == '\'' && at(i + 1) == '\\' {
                    // The escaped character itself may be a quote.
                    taken = 3 + (i + 3..).take_while(|&j| at(j) != '\'' && at(j) != '\0').count() + 1;
                } else if c == '\'' && at(i + 2) == '\'' {
                    taken = 3;
                } else {
                    to_code = c;
                }
            }
            State::Line => to_comments = c,
            State::Block(depth) => {
                to_comments = c;
                if c == '*' && at(i + 1) == '/' {
                    taken = 2;
                    state = if depth == 1 { State::Code } else { State::Block(depth - 1) };
                } else if c == '/' && at(i + 1) == '*' {
                    (state, taken) = (State::Block(depth + 1), 2);
                }
            }
            State::Text => match c {
                '\\' if at(i + 1) != '\n' => taken = 2,
                '"' => (state, to_code) = (State::Code, '"'),
                _ => {}
            },
            State::Raw(hashes) => {
                if c == '"' && (1..=hashes).all(|k| at(i + k) == '#') {
                    (state, taken) = (State::Code, hashes + 1);
                }
            }
        }
        code.push(to_code);
        comments.push(to_comments);
        i += taken;
    }
    (code, comments)
}

/// Lines of the items under `#[cfg(test)]`, and the names of modules among them that live in files of their own.
fn test_lines(code: &str) -> (Vec<bool>, Vec<String>) {
    const MARK: &str = "#[cfg(test)]";
    let mut lines = vec![false; code.lines().count()];
    let mut modules = Vec::new();
    let mut from = 0;
    while let Some(start) = code[from..].find(MARK).map(|i| from + i) {
        let body = start + MARK.len();
        let end = item_end(code, body);
        let item = code[body..end].trim();
        let name = item.split("mod ").nth(1).and_then(|rest| rest.trim().strip_suffix(';'));
        modules.extend(name.map(str::to_string));
        let line = |offset: usize| code[..offset].matches('\n').count();
        for covered in lines.iter_mut().take(line(end) + 1).skip(line(start)) {
            *covered = true;
        }
        from = end;
    }
    (lines, modules)
}

/// End of the item that begins at `start`: its `;`, or the brace that closes its body.
fn item_end(code: &str, start: usize) -> usize {
    let mut depth = 0usize;
    for (i, c) in code[start..].char_indices() {
        match c {
            ';' if depth == 0 => return start + i + 1,
            '{' => depth += 1,
            '}' if depth <= 1 => return start + i + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_are_no_code() {
        let (code, comments) =
            split("let a = \"unsafe // \\\" x\"; // really unsafe\nlet b = '\"'; /* in */ let c = r#\"panic!\"#;");
        assert!(!code.contains("unsafe") && !code.contains("panic") && !code.contains("in "), "{code}");
        assert!(code.contains("let b =") && code.contains("let c ="));
        assert!(comments.contains("really unsafe") && !comments.contains("panic"));
        assert_eq!(code.lines().count(), 2);
    }

    #[test]
    fn lifetimes_and_escaped_quotes_do_not_confuse() {
        let (code, _) = split(r"fn f<'a>(x: &'a str) { g('\'', b'\\', '\u{41}'); h() }");
        assert!(code.contains("&'a str") && code.contains("h()"), "{code}");
    }

    #[test]
    fn test_items_end_at_their_brace() {
        let source = Source::new(
            "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { c() }\n}\nfn d() {}\n#[cfg(test)]\npub(crate) mod golden;\n",
        );
        let kept: Vec<usize> = source.code().map(|(line, _)| line).collect();
        assert_eq!(kept, [1, 6]);
        assert_eq!(source.test_modules(), ["golden"]);
    }
}

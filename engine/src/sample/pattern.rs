//! A small matcher of patterns, for the rules by which captions are cleaned: classes, groups with alternatives, repeats,
//! anchors, word boundaries and what must not follow. A repeat of a group is at most one, so that the work on a text is
//! bounded by the square of its length.

/// What a place of the text must be.
enum Node {
    /// One character in, or not in, a set.
    One {
        set: Vec<Item>,
        negated: bool,
    },
    /// A set repeated at least and at most so often, as often as possible first.
    Many {
        set: Vec<Item>,
        negated: bool,
        least: usize,
        most: usize,
    },
    /// One of several ways, or none where it may be left out.
    Group {
        ways: Vec<Vec<Node>>,
        optional: bool,
    },
    /// None of several ways may follow.
    NotAhead(Vec<Vec<Node>>),
    Start,
    End,
    Boundary,
}

/// Members of a set.
#[derive(Clone)]
enum Item {
    Range(char, char),
    Class(char),
}

/// A pattern.
pub(super) struct Pattern(Vec<Vec<Node>>);

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

impl Item {
    fn has(&self, c: char) -> bool {
        match self {
            Item::Range(low, high) => (*low..=*high).contains(&c),
            Item::Class('d') => c.is_numeric(),
            Item::Class('D') => !c.is_numeric(),
            Item::Class('w') => is_word(c),
            Item::Class('s') => c.is_whitespace(),
            Item::Class(_) => !c.is_whitespace(),
        }
    }
}

fn in_set(set: &[Item], negated: bool, c: char) -> bool {
    set.iter().any(|item| item.has(c)) != negated
}

impl Pattern {
    /// Reads a pattern; those of this program are constants, and what is no syntax of a pattern stands for itself.
    pub fn new(text: &str) -> Pattern {
        let chars: Vec<char> = text.chars().collect();
        Pattern(Parser { chars: &chars, at: 0 }.ways())
    }

    /// Length of the match that begins at a place of the text, where there is one.
    fn at(&self, text: &[char], place: usize) -> Option<usize> {
        let mut end = None;
        any(&self.0, text, place, &mut |found| {
            end = Some(found);
            true
        });
        end.map(|end| end - place)
    }

    /// Number of matches that do not overlap.
    pub fn count(&self, text: &[char]) -> usize {
        let (mut at, mut count) = (0, 0);
        while at < text.len() {
            let len = self.at(text, at).unwrap_or(0);
            count += usize::from(len > 0);
            at += len.max(1);
        }
        count
    }

    /// The text with every match replaced by what `with` makes of it.
    pub fn replace(&self, text: &[char], with: impl Fn(&[char]) -> String) -> Vec<char> {
        let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
        while at < text.len() {
            match self.at(text, at) {
                Some(len) if len > 0 => {
                    out.extend(with(&text[at..at + len]).chars());
                    at += len;
                }
                _ => {
                    out.push(text[at]);
                    at += 1;
                }
            }
        }
        out
    }
}

/// Whether one of several ways fits at a place and what follows it does too.
fn any(ways: &[Vec<Node>], text: &[char], at: usize, then: &mut dyn FnMut(usize) -> bool) -> bool {
    ways.iter().any(|way| fits(way, text, at, then))
}

fn fits(nodes: &[Node], text: &[char], at: usize, then: &mut dyn FnMut(usize) -> bool) -> bool {
    let Some((node, rest)) = nodes.split_first() else { return then(at) };
    match node {
        Node::One { set, negated } => {
            text.get(at).is_some_and(|c| in_set(set, *negated, *c)) && fits(rest, text, at + 1, then)
        }
        Node::Many { set, negated, least, most } => {
            let run = text[at..].iter().take(*most).take_while(|c| in_set(set, *negated, **c)).count();
            run >= *least && (*least..=run).rev().any(|count| fits(rest, text, at + count, then))
        }
        Node::Group { ways, optional } => {
            any(ways, text, at, &mut |next| fits(rest, text, next, then)) || (*optional && fits(rest, text, at, then))
        }
        Node::NotAhead(ways) => !any(ways, text, at, &mut |_| true) && fits(rest, text, at, then),
        Node::Start => at == 0 && fits(rest, text, at, then),
        Node::End => at == text.len() && fits(rest, text, at, then),
        Node::Boundary => {
            let before = at.checked_sub(1).and_then(|i| text.get(i)).is_some_and(|c| is_word(*c));
            let after = text.get(at).is_some_and(|c| is_word(*c));
            before != after && fits(rest, text, at, then)
        }
    }
}

struct Parser<'c> {
    chars: &'c [char],
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek();
        self.at += 1;
        c
    }

    fn skip(&mut self, text: &str) -> bool {
        let found = text.chars().eq(self.chars.iter().skip(self.at).take(text.chars().count()).copied());
        if found {
            self.at += text.chars().count();
        }
        found
    }

    /// Alternatives, up to the end or a closing bracket.
    fn ways(&mut self) -> Vec<Vec<Node>> {
        let mut ways = vec![Vec::new()];
        while let Some(c) = self.peek().filter(|c| *c != ')') {
            if c == '|' {
                self.at += 1;
                ways.push(Vec::new());
            } else {
                let node = self.node();
                if let Some(way) = ways.last_mut() {
                    way.push(node);
                }
            }
        }
        ways
    }

    fn node(&mut self) -> Node {
        if self.skip("(?!") {
            let ways = self.ways();
            self.skip(")");
            return Node::NotAhead(ways);
        }
        if self.skip("(?:") || self.skip("(") {
            let ways = self.ways();
            self.skip(")");
            return Node::Group { ways, optional: self.skip("?") };
        }
        let (set, negated) = match self.next() {
            Some('^') => return Node::Start,
            Some('$') => return Node::End,
            Some('\\') if self.peek() == Some('b') => {
                self.at += 1;
                return Node::Boundary;
            }
            Some('\\') => (vec![self.escaped()], false),
            Some('[') => self.set(),
            Some('.') => (Vec::new(), true),
            c => (c.map(|c| Item::Range(c, c)).into_iter().collect(), false),
        };
        let (least, most) = match self.peek() {
            Some('?') => (0, 1),
            Some('*') => (0, usize::MAX),
            Some('+') => (1, usize::MAX),
            Some('{') => {
                self.at += 1;
                let least = self.number().unwrap_or(0);
                let most = if self.skip(",") { self.number().unwrap_or(usize::MAX) } else { least };
                (least, most)
            }
            _ => return Node::One { set, negated },
        };
        self.at += 1;
        Node::Many { set, negated, least, most }
    }

    fn number(&mut self) -> Option<usize> {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect::<String>().parse().ok()
    }

    fn escaped(&mut self) -> Item {
        match self.next().unwrap_or('\\') {
            c @ ('d' | 'D' | 'w' | 's' | 'S') => Item::Class(c),
            c => Item::Range(c, c),
        }
    }

    fn set(&mut self) -> (Vec<Item>, bool) {
        let (negated, mut items) = (self.skip("^"), Vec::new());
        while let Some(c) = self.next().filter(|c| *c != ']') {
            let item = if c == '\\' { self.escaped() } else { Item::Range(c, c) };
            let range = self.peek() == Some('-') && self.chars.get(self.at + 1).is_some_and(|c| *c != ']');
            match item {
                Item::Range(low, _) if range => {
                    self.at += 1;
                    let high = self.next().unwrap_or(low);
                    items.push(Item::Range(low, high));
                }
                item => items.push(item),
            }
        }
        (items, negated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replace(pattern: &str, text: &str) -> String {
        let text: Vec<char> = text.chars().collect();
        Pattern::new(pattern).replace(&text, |m| format!("<{}>", m.iter().collect::<String>())).into_iter().collect()
    }

    #[test]
    fn patterns_by_hand() {
        for (pattern, text, want) in [
            (r"\b\d{6,}\b", "12345 1234567 a123456", "12345 <1234567> a123456"),
            (r"#\d{1,3}\b", "#12 #1234 #7", "<#12> #1234 <#7>"),
            (r"[a-c]+\.(?:png|jpe?g)", "abc.jpg x.png ab.jpeg.", "<abc.jpg> x.png <ab.jpeg>."),
            (r"(free\s)?download(\sfree)?", "free download free downloads", "<free download free> <download>s"),
            (r"^[\-:]", "-a-b", "<->a-b"),
            (r"[\-:]$", "-a-", "-a<->"),
            (r"[^\s]{2}(?!x)", "abx cd", "abx <cd>"),
            (r"a.c", "abc a\u{e9}c", "<abc> <a\u{e9}c>"),
            (r"\D[,/]\b", "a,b 1,2", "<a,>b 1,2"),
        ] {
            assert_eq!(replace(pattern, text), want, "{pattern}");
        }
        let text: Vec<char> = "a-b_c-".chars().collect();
        assert_eq!(Pattern::new(r"(?:\-|\_)").count(&text), 3);
        // A long run takes time, not stack.
        let run: Vec<char> = std::iter::repeat_n('x', 3000).collect();
        assert_eq!(Pattern::new(r"[\S]+\.png").count(&run), 0);
    }
}

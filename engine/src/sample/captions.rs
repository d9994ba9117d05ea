//! How diffusers cleans a prompt before PixArt's text encoder reads it: captions of the training data were web texts,
//! and went the same way. The rules are those of its pipeline in their order; [`super::repair`] stands for its library
//! for broken text.

use super::pattern::Pattern;
use super::repair;

/// Ideographs and their marks, which the rules drop, as pairs of first and last.
const IDEOGRAPHS: [(char, char); 7] = [
    ('\u{31c0}', '\u{31ef}'),
    ('\u{31f0}', '\u{31ff}'),
    ('\u{3200}', '\u{32ff}'),
    ('\u{3300}', '\u{33ff}'),
    ('\u{3400}', '\u{4dbf}'),
    ('\u{4dc0}', '\u{4dff}'),
    ('\u{4e00}', '\u{9fff}'),
];
/// Every kind of dash.
const DASHES: &str = "\u{2d}\u{58a}\u{5be}\u{1400}\u{1806}\u{2010}\u{2011}\u{2012}\u{2013}\u{2014}\u{2015}\u{2e17}\u{2e1a}\u{2e3a}\u{2e3b}\u{2e40}\u{301c}\u{3030}\u{30a0}\u{fe31}\u{fe32}\u{fe58}\u{fe63}\u{ff0d}";
const ADDRESS: &str = r"(?:\/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))";

/// Rules before entities are resolved, as pattern and replacement.
const FIRST: [(&str, &str); 9] = [
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
];
/// Rules on punctuation.
const PUNCTUATION: [(&str, &str); 4] =
    [("[\"']{2,}", "\""), (r"[\.]{2,}", " "), ("[#®•©™&@·º½¾¿¡§~()\\[\\]{}|\\\\/\\*]{1,}", " "), (r"\s+\.\s+", " ")];
/// Rules after entities are resolved.
const LAST: [(&str, &str); 11] = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
];

/// A prompt as diffusers' pipelines for PixArt encode it: the rules are applied twice.
pub fn clean(prompt: &str) -> String {
    once(&once(prompt))
}

/// Options that the original program reads out of a prompt.
const FLAGS: [&str; 3] = ["--aspect_ratio", "--ar", "--hw"];

/// A prompt as the original program encodes it: as it is, up to the options that it reads the size from. Also that
/// option, where there is one.
pub fn original(prompt: &str) -> (String, Option<&str>) {
    let found = FLAGS.iter().filter_map(|flag| Some((at_word(prompt, flag)?, *flag))).min();
    let text = found.map_or(prompt, |(at, _)| &prompt[..at]);
    (text.trim().to_string(), found.map(|(_, flag)| flag))
}

/// Where a flag stands as a word of its own.
fn at_word(text: &str, flag: &str) -> Option<usize> {
    let ends = |at: &usize| text[at + flag.len()..].chars().next().is_none_or(char::is_whitespace);
    text.match_indices(flag).map(|(at, _)| at).find(ends)
}

fn once(prompt: &str) -> String {
    let text = unquote(prompt).trim().to_lowercase().replace("<person>", "person");
    let mut text: Vec<char> = text.chars().collect();
    for scheme in ["https?:", "www:"] {
        text = apply(&text, &format!(r"\b((?:{scheme}{ADDRESS}"), "");
    }
    let text = without_tags(&text.iter().collect::<String>());
    let mut text = apply(&text.chars().collect::<Vec<_>>(), r"@[\w\d]+\b", "");
    text.retain(|c| !IDEOGRAPHS.iter().any(|(first, last)| (*first..=*last).contains(c)));
    text = apply(&text, &format!("[{}]+", DASHES.replacen('-', r"\-", 1)), "-");
    text = apply(&text, "[`´«»“”¨]", "\"");
    text = apply(&text, "[‘’]", "'");
    for (pattern, with) in FIRST.iter().chain(&PUNCTUATION) {
        text = apply(&text, pattern, with);
    }
    let joints = Pattern::new(r"(?:\-|\_)");
    if joints.count(&text) > 3 {
        text = joints.replace(&text, |_| " ".into());
    }
    let resolved = unescape(&unescape(&repair::fix(&text.iter().collect::<String>())));
    text = resolved.chars().collect();
    for (pattern, with) in LAST {
        text = apply(&text, pattern, with);
    }
    text = Pattern::new(r"\D[,\./]\b").replace(&text, |found| found.iter().chain(&[' ']).collect());
    text = apply(&text, r"\s+", " ");
    if let [first, middle @ .., last] = text.as_slice()
        && !middle.is_empty()
        && ['"', '\''].contains(first)
        && ['"', '\''].contains(last)
    {
        text = middle.to_vec();
    }
    text = apply(&text, r"^['\_,\-\:;]", "");
    text = apply(&text, r"['\_,\-\:\-\+]$", "");
    text = apply(&text, r"^\.\S+$", "");
    text.iter().collect::<String>().trim().to_string()
}

fn apply(text: &[char], pattern: &str, with: &str) -> Vec<char> {
    Pattern::new(pattern).replace(text, |_| with.to_string())
}

/// Resolves `+` and `%20` as addresses have them.
fn unquote(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        let code = hex.filter(|pair| pair.chars().all(|c| c.is_ascii_hexdigit()));
        match (bytes[at], code.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The text of a page: tags go, entities are resolved.
fn without_tags(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(open) = rest.find('<') {
        let tag = &rest[open + 1..];
        let is_tag = tag.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '/' | '!' | '?'));
        match tag.find('>').filter(|_| is_tag) {
            Some(close) => {
                out.push_str(&rest[..open]);
                rest = &tag[close + 1..];
            }
            None => {
                out.push_str(&rest[..=open]);
                rest = tag;
            }
        }
    }
    unescape(&(out + rest))
}

/// Resolves the entities that texts have: by number, and the common names.
fn unescape(text: &str) -> String {
    const NAMES: [(&str, char); 9] = [
        ("amp", '&'),
        ("lt", '<'),
        ("gt", '>'),
        ("quot", '"'),
        ("apos", '\''),
        ("nbsp", '\u{a0}'),
        ("ndash", '\u{2013}'),
        ("mdash", '\u{2014}'),
        ("hellip", '\u{2026}'),
    ];
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        let end = tail.find(';').filter(|end| *end <= 8);
        let found = end.and_then(|end| {
            let name = &tail[..end];
            let number = name.strip_prefix('#').and_then(|digits| match digits.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16).ok(),
                None => digits.parse().ok(),
            });
            number.and_then(char::from_u32).or(NAMES.iter().find(|(known, _)| *known == name).map(|(_, c)| *c))
        });
        match (found, end) {
            (Some(c), Some(end)) => {
                out.push(c);
                rest = &tail[end + 1..];
            }
            _ => {
                out.push('&');
                rest = tail;
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_reads_prompts_as_they_are() {
        for (prompt, want, flag) in [
            ("  A Red Fox, https://example.com ", "A Red Fox, https://example.com", None),
            ("a fox --ar 16:9", "a fox", Some("--ar")),
            ("a fox --aspect_ratio 1:2 --hw 512:512", "a fox", Some("--aspect_ratio")),
            ("a fox--area", "a fox--area", None),
        ] {
            assert_eq!(original(prompt), (want.to_string(), flag));
        }
    }

    #[test]
    fn captions_by_hand() {
        for (prompt, want) in [
            ("  A Red Fox ", "a red fox"),
            ("a fox,sleeping.now", "a fox, sleeping. now"),
            ("an <person> at https://example.com/x today", "an person at today"),
            ("see www.example.org, <b>bold</b> &amp; calm", "see , bold calm"),
            ("a “quoted” – word…", "a \"quoted\" - word…"),
            ("by @somebody #12 #1234 1234567 img_01.png", "by 1234"),
            ("one-two_three-four-five six", "one two three four five six"),
            ("one-two six", "one-two six"),
            ("cat (cute) [small] a/b", "cat cute small a b"),
            ("jc6640 sku12ab free shipping 12x34 page 5", ""),
            ("日本 fox", "fox"),
            ("'a fox'", "a fox"),
            ("a%20fox+in snow", "a fox in snow"),
            ("wait... what", "wait what"),
            ("a fox:", "a fox"),
            ("lighting (4k:1.2), art by SenseiJaye, f/1.8, 35mm", "lighting 4k:1.2 , art by senseijaye, f 1.8, 35mm"),
            ("a cat--with 3.5mm 1.2.3.4 at 12:30 ", "a cat-with 3.5mm at 12:30"),
            ("an o\u{fb03}ce \u{e2}\u{20ac}\u{a6} fox", "an office … fox"),
        ] {
            assert_eq!(clean(prompt), want, "{prompt}");
        }
    }
}

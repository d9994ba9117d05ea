//! Repair of broken text: what the library ftfy, which diffusers' cleaning of prompts calls, does to captions as they
//! occur: UTF-8 that was read as Windows-1252 or Latin-1, terminal colours, curly quotes, ligatures, full-width letters,
//! line ends, and control characters.
//!
//! Two of its steps are left out. It weighs how likely a run of letters is a mistake, where here a run is one if its
//! bytes are UTF-8 and begin as such mistakes do; and it composes letters with their accents, which the tokenizer of T5
//! does to everything that it reads.

/// What the bytes 0x80 to 0x9f are in Windows-1252; 0 where nothing is, which Latin-1 reads as a control character.
const WINDOWS_1252: [u16; 32] = [
    0x20ac, 0, 0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021, 0x02c6, 0x2030, 0x0160, 0x2039, 0x0152, 0, 0x017d, 0, 0,
    0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014, 0x02dc, 0x2122, 0x0161, 0x203a, 0x0153, 0, 0x017e, 0x0178,
];
/// Repairs that are tried after one another: text may have been broken more than once.
const ROUNDS: usize = 4;
/// Letters in one glyph, and what they are.
const LIGATURES: [(char, &str); 9] = [
    ('\u{132}', "IJ"),
    ('\u{133}', "ij"),
    ('\u{149}', "\u{2bc}n"),
    ('\u{fb00}', "ff"),
    ('\u{fb01}', "fi"),
    ('\u{fb02}', "fl"),
    ('\u{fb03}', "ffi"),
    ('\u{fb04}', "ffl"),
    ('\u{fb06}', "st"),
];

/// The text as it was meant.
pub fn fix(text: &str) -> String {
    let mut text = without_colours(text);
    for _ in 0..ROUNDS {
        let again = decoded(&text);
        if again == text {
            break;
        }
        text = again;
    }
    plain(&text)
}

/// The byte that Windows-1252, or Latin-1 where that has nothing, writes for a character.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0..=0xff => Some(code as u8),
        _ => WINDOWS_1252.iter().position(|w| u32::from(*w) == code).map(|i| 0x80 + i as u8),
    }
}

/// Characters whose bytes are those of one in UTF-8 become that one.
fn decoded(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while at < chars.len() {
        match sequence(&chars[at..]) {
            Some((c, len)) => {
                out.push(c);
                at += len;
            }
            None => {
                out.push(chars[at]);
                at += 1;
            }
        }
    }
    out
}

/// The character that the first of `chars` are the bytes of, and how many they are.
fn sequence(chars: &[char]) -> Option<(char, usize)> {
    let len = match byte_of(*chars.first()?)? {
        // Accented capitals of Latin alphabets and what follows them in words are far more often meant.
        0xc2 | 0xc3 => 2,
        0xe2 | 0xe3 | 0xef => 3,
        0xf0 => 4,
        _ => return None,
    };
    let bytes: Vec<u8> = chars.get(..len)?.iter().map(|c| byte_of(*c)).collect::<Option<_>>()?;
    let found = std::str::from_utf8(&bytes).ok()?.chars().next()?;
    Some((found, len))
}

/// Without the codes that colour a terminal: escape, bracket, numbers, and the letter that ends them.
fn without_colours(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("\u{1b}[") {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 2..];
        let end = tail.find(|c: char| !(c.is_ascii_digit() || c == ';')).unwrap_or(tail.len());
        rest = match tail[end..].chars().next() {
            Some(c) if c.is_ascii_alphabetic() => &tail[end + 1..],
            _ => tail,
        };
    }
    out + rest
}

/// What Latin-1 reads as a control character where Windows-1252 has another.
fn of_windows(c: char) -> char {
    let meant = match c {
        '\u{80}'..='\u{9f}' => char::from_u32(u32::from(WINDOWS_1252[(u32::from(c) - 0x80) as usize])),
        _ => None,
    };
    meant.filter(|meant| *meant != '\0').unwrap_or(c)
}

fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut after_return = false;
    for c in text.chars().map(of_windows) {
        let is_second = after_return && c == '\n';
        after_return = c == '\r';
        match c {
            '\n' if is_second => {}
            '\r' | '\u{2028}' | '\u{2029}' => out.push('\n'),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\u{2018}'..='\u{201b}' | '\u{2bc}' => out.push('\''),
            '\u{3000}' => out.push(' '),
            // Full-width forms lie in the order of ASCII.
            '\u{ff01}'..='\u{ff5e}' => out.extend(char::from_u32(u32::from(c) - 0xff01 + 0x21)),
            '\u{0}'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' => {}
            '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}' => {}
            _ => match LIGATURES.iter().find(|(ligature, _)| *ligature == c) {
                Some((_, letters)) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_texts_by_hand() {
        for (text, want) in [
            ("caf\u{c3}\u{a9}", "café"),
            ("the museum\u{e2}\u{20ac}\u{2122}s fox", "the museum's fox"),
            ("\u{e2}\u{20ac}\u{153}quoted\u{e2}\u{20ac}\u{9d}", "\"quoted\""),
            ("5\u{c2}\u{a0}cm", "5\u{a0}cm"),
            ("\u{f0}\u{178}\u{a6}\u{160}", "🦊"),
            // Broken twice.
            ("caf\u{c3}\u{192}\u{c2}\u{a9}", "café"),
            ("\u{1b}[31mred\u{1b}[0m fox", "red fox"),
            ("o\u{fb03}ce \u{ff26}\u{ff4f}\u{ff58}", "office Fox"),
            ("a\r\nb\rc\u{2028}d", "a\nb\nc\nd"),
            ("\u{feff}fo\u{0}x", "fox"),
            ("\u{2018}fox\u{2019} \u{201c}den\u{201d}", "'fox' \"den\""),
            ("\u{93}fox\u{94}", "\"fox\""),
            // What is meant stays.
            (
                "São Paulo, naïve Ångström, Ğ, 日本, ÉCOLE, à la carte, Ãtico",
                "São Paulo, naïve Ångström, Ğ, 日本, ÉCOLE, à la carte, Ãtico",
            ),
        ] {
            assert_eq!(fix(text), want, "{text}");
        }
    }
}

//! Markup that is balanced and escaped by construction: elements are closures, text and attributes are escaped.

/// Style sheet of every report, for light and dark screens and for paper.
const STYLE: &str = include_str!("style.css");

/// Attributes of an element.
pub type Attributes<'a> = &'a [(&'a str, &'a str)];

/// A fragment of HTML or SVG under construction.
#[derive(Debug, Default)]
pub struct Html {
    out: String,
}

impl Html {
    /// `<tag …>body</tag>`. Tag and attribute names are the caller's own words, never data.
    pub fn element(&mut self, tag: &str, attributes: Attributes<'_>, body: impl FnOnce(&mut Html)) {
        self.open(tag, attributes);
        self.out.push('>');
        body(self);
        self.out.push_str("</");
        self.out.push_str(tag);
        self.out.push('>');
    }

    /// An element that holds only text.
    pub fn leaf(&mut self, tag: &str, attributes: Attributes<'_>, text: &str) {
        self.element(tag, attributes, |h| h.text(text));
    }

    /// An element without content: `<img …/>`, or a shape of SVG.
    pub fn empty(&mut self, tag: &str, attributes: Attributes<'_>) {
        self.open(tag, attributes);
        self.out.push_str("/>");
    }

    /// Text, escaped.
    pub fn text(&mut self, text: &str) {
        escape(&mut self.out, text);
    }

    /// A PNG picture as part of the page; `alt` describes it to those who cannot see it.
    pub fn picture(&mut self, png: &[u8], alt: &str) {
        let source = format!("data:image/png;base64,{}", base64(png));
        self.empty("img", &[("src", &source), ("alt", alt)]);
    }

    fn open(&mut self, tag: &str, attributes: Attributes<'_>) {
        self.out.push('<');
        self.out.push_str(tag);
        for (name, value) in attributes {
            self.out.push(' ');
            self.out.push_str(name);
            self.out.push_str("=\"");
            escape(&mut self.out, value);
            self.out.push('"');
        }
    }
}

/// Colours and lines of charts that are files of their own, on white paper.
const SVG_STYLE: &str = "svg{font:12px system-ui,sans-serif}text{fill:#5d6671}.grid{stroke:#eceef0}.axis{stroke:#e1e4e8}.mark{stroke:#1d2126;stroke-dasharray:4 3}\
.s0{color:#2667c9}.s1{color:#d5641c}.s2{color:#178a66}.s3{color:#9d3f93}.s4{color:#8a6d00}.s5{color:#66707b}\
.band,.bar,.dot{fill:currentColor}.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.band{stroke:none;opacity:.18}";

/// A picture that is a file of its own, of a size in its units.
pub fn svg_file(width: f64, height: f64, title: &str, body: impl FnOnce(&mut Html)) -> String {
    let mut h = Html::default();
    let view = format!("0 0 {width} {height}");
    let [wide, high] = [width, height].map(|n| n.to_string());
    let attributes = [
        ("xmlns", "http://www.w3.org/2000/svg"),
        ("viewBox", view.as_str()),
        ("width", wide.as_str()),
        ("height", high.as_str()),
        ("role", "img"),
        ("aria-label", title),
    ];
    h.element("svg", &attributes, |h| {
        // As in a page: the style sheet is this program's own.
        h.element("style", &[], |h| h.out.push_str(SVG_STYLE));
        h.empty("rect", &[("width", &wide), ("height", &high), ("fill", "#ffffff")]);
        body(h);
    });
    h.out.push('\n');
    h.out
}

/// A whole page around `body`.
pub fn page(title: &str, body: impl FnOnce(&mut Html)) -> String {
    let mut h = Html { out: "<!DOCTYPE html>\n".into() };
    h.element("html", &[("lang", "en")], |h| {
        h.element("head", &[], |h| {
            h.empty("meta", &[("charset", "utf-8")]);
            h.empty("meta", &[("name", "viewport"), ("content", "width=device-width, initial-scale=1")]);
            h.empty("meta", &[("name", "color-scheme"), ("content", "light dark")]);
            h.leaf("title", &[], title);
            // The one place that is not escaped: a style sheet of this program.
            h.element("style", &[], |h| h.out.push_str(STYLE));
        });
        h.element("body", &[], |h| h.element("main", &[], body));
    });
    h.out.push('\n');
    h.out
}

/// Appends `text` so that it means itself, in content and in quoted attributes; control characters, which XML does
/// not allow, become the replacement character.
fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

/// Base64 with padding (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let filled = digit <= group.len();
            out.push(if filled { char::from(DIGITS[(word >> (18 - 6 * digit) & 63) as usize]) } else { '=' });
        }
    }
    out
}

/// Checks for tests what browsers would forgive.
#[cfg(test)]
pub(super) mod check {
    /// Panics unless every element is closed in its order; returns the text between the tags.
    pub fn well_formed(page: &str) -> String {
        let (mut open, mut text) = (Vec::<&str>::new(), String::new());
        let mut rest = page.trim_start_matches("<!DOCTYPE html>\n");
        while let Some(at) = rest.find('<') {
            text.push_str(&rest[..at]);
            let end = at + rest[at..].find('>').expect("a tag ends");
            let tag = &rest[at + 1..end];
            assert!(!tag.contains('<'), "unescaped < in {tag}");
            assert!(tag.matches('"').count().is_multiple_of(2), "odd quotes in {tag}");
            if let Some(closing) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(closing), "closing tag");
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().expect("a tag has a name"));
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "left open: {open:?}");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_attributes_are_escaped() {
        let mut h = Html::default();
        h.leaf("p", &[("title", "a\"b<")], "x < y & 'z'\u{7}\n");
        assert_eq!(h.out, "<p title=\"a&quot;b&lt;\">x &lt; y &amp; &#39;z&#39;\u{fffd}\n</p>");
    }

    #[test]
    fn base64_of_the_standard() {
        let pairs = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (bytes, want) in pairs {
            assert_eq!(base64(bytes.as_bytes()), want);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }

    #[test]
    fn pages_are_well_formed() {
        let page = page("a < b", |h| {
            h.element("p", &[], |h| h.text("body"));
            h.picture(&[1, 2, 3], "\"quoted\"");
        });
        let text = check::well_formed(&page);
        assert!(text.contains("a &lt; b") && text.contains("body"));
        assert!(page.contains("src=\"data:image/png;base64,AQID\" alt=\"&quot;quoted&quot;\""));
        // Nothing is fetched from anywhere.
        assert!(!page.contains("http") && !page.contains("<script") && !page.contains("url("));
    }

    #[test]
    fn the_checker_notices_wrong_nesting() {
        assert!(std::panic::catch_unwind(|| check::well_formed("<a><b></a></b>")).is_err());
        assert_eq!(check::well_formed("<a><b></b></a>"), "");
    }
}

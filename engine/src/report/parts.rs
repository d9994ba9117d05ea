//! Parts that every page is made of.

use super::html::Html;

/// A section with its heading and a sentence on how to read it.
pub(super) fn section(h: &mut Html, title: &str, note: &str, body: impl FnOnce(&mut Html)) {
    h.element("section", &[], |h| {
        h.leaf("h2", &[], title);
        if !note.is_empty() {
            h.leaf("p", &[("class", "note")], note);
        }
        body(h);
    });
}

/// A table that scrolls where it is wider than the page.
pub(super) fn table(h: &mut Html, header: &[String], rows: &[Vec<String>]) {
    h.element("div", &[("class", "scroll")], |h| {
        h.element("table", &[], |h| {
            h.element("thead", &[], |h| {
                h.element("tr", &[], |h| header.iter().for_each(|name| h.leaf("th", &[("scope", "col")], name)));
            });
            h.element("tbody", &[], |h| {
                for row in rows {
                    h.element("tr", &[], |h| row.iter().for_each(|cell| h.leaf("td", &[], cell)));
                }
            });
        });
    });
}

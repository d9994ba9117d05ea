//! The marked places of a document.

use crate::error::{Error, Result};

const BEGIN: &str = "<!-- generated: ";
const CLOSE: &str = " -->";
const END: &str = "<!-- end -->";

/// What stands at a mark, if the mark is known.
pub type Filler<'f> = dyn Fn(&str) -> Option<Result<String>> + 'f;

/// `text` with every marked place filled anew.
///
/// # Errors
/// A mark that is not closed or that no table has; those of the tables.
pub fn fill(text: &str, document: &str, filler: &Filler<'_>) -> Result<String> {
    let (mut out, mut rest) = (String::new(), text);
    let mut marks = 0;
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let without =
            |end: &str| Error::failure(document, "a mark that is not closed").must(format!("{end:?} after it"));
        let (mark, after) = after.split_once(CLOSE).ok_or_else(|| without(CLOSE))?;
        let (_, after) = after.split_once(END).ok_or_else(|| without(END))?;
        let filled = filler(mark).ok_or_else(|| Error::failure(document, "a mark that no table has").is(mark))??;
        out.push_str(&format!("{before}{BEGIN}{mark}{CLOSE}\n{filled}{END}"));
        rest = after;
        marks += 1;
    }
    if marks == 0 {
        return Err(Error::failure(document, "holds no mark").must(format!("lines {BEGIN}NAME{CLOSE} and {END}")));
    }
    Ok(out + rest)
}

/// Names of the marks of a document, in order.
#[cfg(test)]
pub fn names(text: &str) -> Vec<&str> {
    text.split(BEGIN).skip(1).filter_map(|rest| Some(rest.split_once(CLOSE)?.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_filled_and_the_rest_stays() {
        let text = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb\n<!-- generated: y -->\n<!-- end -->\nc";
        let filler = |mark: &str| (mark != "z").then(|| Ok(format!("new {mark}\n")));
        let want = "a\n<!-- generated: x -->\nnew x\n<!-- end -->\nb\n<!-- generated: y -->\nnew y\n<!-- end -->\nc";
        assert_eq!(fill(text, "d", &filler).unwrap(), want);
        assert_eq!(names(text), ["x", "y"]);
        assert!(fill("no marks", "d", &filler).is_err());
        assert!(fill("<!-- generated: x -->\nopen", "d", &filler).is_err());
        assert!(fill("<!-- generated: z --><!-- end -->", "d", &filler).unwrap_err().to_string().contains("is z"));
    }
}

//! Pictures with captions: the emoji that `graft-tools` renders, four styles of every concept.

use crate::error::{Error, Result};
use crate::io::datasets::{ImageSet, Split, read_sheet};
use crate::io::files::read_text;
use serde_json::Value;
use std::path::Path;

/// Styles of the emoji, in the order of the labels.
const STYLES: [&str; 4] = ["fluent", "noto", "openmoji", "twemoji"];
const FIX_RENDER: &str = "fetch the emoji sets and render them again";

/// Pictures with captions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionedSet {
    /// Pictures; a label is the number of a style.
    pub images: ImageSet,
    /// Caption of every picture.
    pub captions: Vec<String>,
    /// What every picture shows, whatever its style.
    pub concepts: Vec<String>,
}

/// The emoji in `dir`: `sheet.png`, whose rows are pictures of 32 x 32, and `captions.jsonl`. Pairs of concept and style
/// that are held out are the split for evaluation.
///
/// # Errors
/// A file that is missing or damaged, or lines that do not fit the rows.
pub fn emoji(dir: &Path, split: Split) -> Result<CaptionedSet> {
    let path = dir.join("captions.jsonl");
    let place = path.display().to_string();
    let pixels = read_sheet(&dir.join("sheet.png"))?;
    let rows: Vec<&[u8]> = pixels.chunks_exact(IMAGE).collect();
    let text = read_text(&path)?;
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() != rows.len() || rows.is_empty() {
        return Err(Error::failure(&place, "lines and pictures differ in number")
            .is(format!("{} lines", lines.len()))
            .must(format!("{}, as the sheet has rows", rows.len()))
            .fix(FIX_RENDER));
    }
    let images = ImageSet {
        n: 0,
        channels: 3,
        height: 32,
        width: 32,
        pixels: Vec::new(),
        labels: Vec::new(),
        class_names: STYLES.to_vec(),
    };
    let mut set = CaptionedSet { images, captions: Vec::new(), concepts: Vec::new() };
    for (number, (line, row)) in lines.iter().zip(rows).enumerate() {
        let wrong = || {
            Error::failure(format!("{place}: line {}", number + 1), "not a caption")
                .must("caption, concept, style and held_out")
                .fix(FIX_RENDER)
        };
        let value: Value = serde_json::from_str(line).map_err(|_| wrong())?;
        let word = |key: &str| value[key].as_str().ok_or_else(wrong);
        let style = STYLES.iter().position(|style| Some(*style) == value["style"].as_str()).ok_or_else(wrong)?;
        if value["held_out"].as_bool().ok_or_else(wrong)? == (split == Split::Test) {
            set.images.n += 1;
            set.images.pixels.extend_from_slice(row);
            set.images.labels.push(style as u8);
            set.captions.push(word("caption")?.to_string());
            set.concepts.push(word("concept")?.to_string());
        }
    }
    Ok(set)
}

/// Bytes of a picture.
const IMAGE: usize = 32 * 32 * 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::io::png;
    use std::collections::BTreeMap;

    #[test]
    fn held_out_pairs_are_a_split_of_their_own() {
        let dir = test_dir("captioned");
        let pixels: Vec<u8> = (0..3 * IMAGE).map(|i| (i / IMAGE) as u8).collect();
        let sheet = png::Image::new(1024, 3, 3, pixels).unwrap();
        png::write(&dir.join("sheet.png"), &sheet, &BTreeMap::new()).unwrap();
        let line = |concept: &str, style: &str, out: bool| {
            format!(
                "{{\"caption\":\"{concept}, {style} style\",\"concept\":\"{concept}\",\"style\":\"{style}\",\
                 \"held_out\":{out}}}\n"
            )
        };
        let lines = [line("ant", "noto", false), line("bee", "twemoji", true), line("bee", "fluent", false)];
        std::fs::write(dir.join("captions.jsonl"), lines.concat()).unwrap();
        let (train, test) = (emoji(&dir, Split::Train).unwrap(), emoji(&dir, Split::Test).unwrap());
        assert_eq!((train.concepts, train.images.labels.clone()), (vec!["ant".into(), "bee".into()], vec![1, 0]));
        assert_eq!((train.images.image(1)[0], test.images.image(0)[0]), (2, 1));
        assert_eq!(test.captions, ["bee, twemoji style"]);
        std::fs::write(dir.join("captions.jsonl"), lines[..2].concat()).unwrap();
        let error = emoji(&dir, Split::Train).unwrap_err();
        assert_eq!(error.problem(), "lines and pictures differ in number");
        std::fs::write(dir.join("captions.jsonl"), [&lines[0], &lines[1], "{}\n"].concat()).unwrap();
        assert!(emoji(&dir, Split::Train).unwrap_err().to_string().contains("line 3: not a caption"));
    }
}

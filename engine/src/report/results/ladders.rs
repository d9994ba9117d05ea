//! The ladder of each operator: what was tried, predicted and measured, out of its README.

use super::rows::entries;
use crate::error::Result;
use crate::io::files;
use std::path::Path;

const HEADING: &str = "## Ladder";

/// A ladder of an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Ladder {
    /// Name of the operator.
    pub op: String,
    /// The rest of the heading: ` (CUDA)`.
    pub title: String,
    /// What stands below the heading, in Markdown.
    pub text: String,
}

/// The ladders in the READMEs of the operators whose folders are in `kernels`, in the order of their names.
///
/// # Errors
/// A folder or README that cannot be read.
pub fn read(kernels: &Path) -> Result<Vec<Ladder>> {
    let mut ladders = Vec::new();
    for folder in entries(kernels)? {
        let path = folder.join("README.md");
        if path.is_file() {
            ladders.extend(of(&files::file_name(&folder), &files::read_text(&path)?));
        }
    }
    Ok(ladders)
}

/// The ladders of a README.
fn of(op: &str, readme: &str) -> Vec<Ladder> {
    let parts = readme.split("\n## ").filter_map(|part| part.strip_prefix(&HEADING[3..]));
    let parts = parts.map(|part| part.split_once('\n').unwrap_or((part, "")));
    parts.map(|(title, text)| Ladder { op: op.into(), title: title.into(), text: text.trim().into() }).collect()
}

/// Sections of a document in `docs`, one under the other.
pub(super) fn sections(ladders: &[Ladder]) -> String {
    if ladders.is_empty() {
        return "No operator has a ladder.\n".into();
    }
    let section =
        |Ladder { op, title, text }: &Ladder| format!("### [{op}](../kernels-cu/{op}/README.md){title}\n\n{text}\n\n");
    ladders.iter().map(section).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_ends_with_the_next_heading() {
        let text = "# op\n\n## Costs\n\nx\n\n## Ladder (CPU)\n\n| idea |\n\n### more\n\n## Rest\n\ny\n";
        let want = Ladder { op: "op".into(), title: " (CPU)".into(), text: "| idea |\n\n### more".into() };
        assert_eq!(of("op", text), [want]);
        assert!(of("op", "# op\n").is_empty());
    }

    #[test]
    fn operators_have_ladders() {
        let text = sections(&read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels-cu")).unwrap());
        assert!(text.contains("### [gated_conv](../kernels-cu/gated_conv/README.md) (CPU)\n"), "{text}");
    }
}

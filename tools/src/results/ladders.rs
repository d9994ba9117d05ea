//! The ladder of each operator: what was tried, predicted and measured, out of its README.

use super::rows::entries;
use std::path::Path;

const HEADING: &str = "## Ladder";

/// The ladders of all operators, one under the other.
///
/// # Errors
/// A folder or README that cannot be read.
pub fn ladders(root: &Path) -> Result<String, String> {
    let mut out = String::new();
    for folder in entries(&root.join("kernels-cu"))? {
        let path = folder.join("README.md");
        if !path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        for (title, body) in sections(&text) {
            out += &format!("### [{name}](../kernels-cu/{name}/README.md){title}\n\n{}\n\n", body.trim());
        }
    }
    Ok(if out.is_empty() { "No operator has a ladder.\n".into() } else { out })
}

/// The rest of the heading and the text of every ladder of a README.
fn sections(text: &str) -> Vec<(&str, &str)> {
    let parts = text.split("\n## ").filter_map(|part| part.strip_prefix(&HEADING[3..]));
    parts.map(|part| part.split_once('\n').unwrap_or((part, ""))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ladder_ends_with_the_next_heading() {
        let text = "# op\n\n## Costs\n\nx\n\n## Ladder (CPU)\n\n| idea |\n\n### more\n\n## Rest\n\ny\n";
        assert_eq!(sections(text), [(" (CPU)", "\n| idea |\n\n### more\n")]);
        assert!(sections("# op\n").is_empty());
    }

    #[test]
    fn operators_have_ladders() {
        let text = ladders(&crate::codegen::workspace_root()).unwrap();
        assert!(text.contains("### [gated_conv](../kernels-cu/gated_conv/README.md) (CPU)\n"), "{text}");
    }
}

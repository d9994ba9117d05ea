//! Which layers a graft takes.

use super::text::SourceText;
use crate::error::Result;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};
use std::fmt;
use std::ops::Range;
use toml::Spanned;

/// Layers as a plan writes them: a pattern's name or a list of 0-based numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layers {
    /// `"all"`, `"every-other"`, `"3-of-4"` or `"deep:n"`.
    Pattern(String),
    /// `[1, 3, 5]`.
    List(Vec<Spanned<i64>>),
}

const PATTERNS: &str = "\"all\", \"every-other\", \"3-of-4\", \"deep:n\" or a list of layers such as [1, 3, 5]";

/// A chosen layer and the part of the plan that chose it.
pub(super) type Chosen = (usize, Range<usize>);

impl Layers {
    /// The layers of a model with `depth` blocks, in rising order; `span` is where the plan says them.
    ///
    /// # Errors
    /// An unknown pattern, a layer that the model does not have, a layer listed twice, or none at all.
    pub(super) fn select(&self, depth: usize, text: &SourceText, span: Range<usize>) -> Result<Vec<Chosen>> {
        let mut chosen: Vec<Chosen> = match self {
            Layers::Pattern(name) => {
                let layers: Vec<usize> = match (name.as_str(), name.strip_prefix("deep:").map(str::parse::<usize>)) {
                    ("all", _) => (0..depth).collect(),
                    ("every-other", _) => (1..depth).step_by(2).collect(),
                    ("3-of-4", _) => (0..depth).filter(|i| i % 4 != 0).collect(),
                    (_, Some(Ok(n))) if n >= 1 && n <= depth => (depth - n..depth).collect(),
                    (_, Some(Ok(_))) => {
                        let error = text.error(&span, "deep:n does not fit the base model");
                        return Err(error.must(format!("deep:1 to deep:{depth}, as the base has {depth} blocks")));
                    }
                    _ => return Err(text.error(&span, "unknown layer pattern").must(PATTERNS)),
                };
                layers.into_iter().map(|layer| (layer, span.clone())).collect()
            }
            Layers::List(list) => {
                let layer = |s: &Spanned<i64>| {
                    let found = usize::try_from(*s.get_ref()).ok().filter(|l| *l < depth);
                    found.map(|l| (l, s.span())).ok_or_else(|| {
                        text.error(&s.span(), "layer out of range")
                            .must(format!("0 to {}, as the base has {depth} blocks", depth.saturating_sub(1)))
                            .fix("layers count from 0; check that the plan is meant for this base model")
                    })
                };
                list.iter().map(layer).collect::<Result<_>>()?
            }
        };
        chosen.sort_by_key(|(layer, _)| *layer);
        if let Some(pair) = chosen.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(text
                .error(&pair[1].1, "layer listed twice")
                .must("each layer once")
                .fix("remove one of the two"));
        }
        if chosen.is_empty() {
            return Err(text.error(&span, "no layer is chosen").must(PATTERNS));
        }
        Ok(chosen)
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Layers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(PATTERNS)
            }

            fn visit_str<E>(self, name: &str) -> std::result::Result<Layers, E> {
                Ok(Layers::Pattern(name.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Layers, A::Error> {
                let mut layers = Vec::new();
                while let Some(layer) = list.next_element()? {
                    layers.push(layer);
                }
                Ok(Layers::List(layers))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(value: &str, depth: usize) -> Result<Vec<usize>> {
        #[derive(serde::Deserialize)]
        struct Holder {
            layers: Spanned<Layers>,
        }
        let text = SourceText { name: "plan.toml".into(), text: format!("layers = {value}") };
        let held: Holder = toml::from_str(&text.text).unwrap();
        let chosen = held.layers.get_ref().select(depth, &text, held.layers.span())?;
        Ok(chosen.into_iter().map(|(layer, _)| layer).collect())
    }

    #[test]
    fn patterns() {
        assert_eq!(select("\"all\"", 4).unwrap(), [0, 1, 2, 3]);
        assert_eq!(select("\"every-other\"", 28).unwrap(), (0..14).map(|i| 2 * i + 1).collect::<Vec<_>>());
        assert_eq!(select("\"3-of-4\"", 9).unwrap(), [1, 2, 3, 5, 6, 7]);
        assert_eq!(select("\"3-of-4\"", 28).unwrap().len(), 21);
        assert_eq!(select("\"deep:2\"", 12).unwrap(), [10, 11]);
        assert_eq!(select("[5, 1, 3]", 6).unwrap(), [1, 3, 5]);
    }

    #[test]
    fn errors_point_at_the_part() {
        let message = |value: &str| select(value, 6).unwrap_err().to_string();
        assert!(
            message("\"every-third\"")
                .starts_with("plan.toml:1:10: unknown layer pattern; is \"every-third\"; must be \"all\"")
        );
        assert!(message("\"deep:7\"").contains("must be deep:1 to deep:6"));
        assert!(message("[1, 6]").starts_with("plan.toml:1:14: layer out of range; is 6; must be 0 to 5"));
        assert!(message("[-1]").contains("plan.toml:1:11: layer out of range; is -1"));
        assert!(message("[1, 2, 1]").contains("layer listed twice; is 1"));
        assert!(message("[]").contains("no layer is chosen"));
    }
}

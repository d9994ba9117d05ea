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
    /// One of [`PATTERNS`].
    Pattern(String),
    /// `[1, 3, 5]`.
    List(Vec<Spanned<i64>>),
}

const PATTERNS: &str = "\"all\", \"every-other\", \"3-of-4\", \"deep:n\", \"top-local:n\", \"low-local:n\", \
                        \"auto:ratio\", \"paper-pixart\" or a list of layers such as [1, 3, 5]";

/// Layers of PixArt-Σ whose self-attention the paper replaces (its §5), of 28.
pub const PAPER_PIXART: [usize; 14] = [8, 10, 12, 14, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27];

/// A pattern whose layers depend on what the base model does; [`super::choose`] finds them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measured {
    /// The n layers whose attention is most local.
    TopLocal(usize),
    /// The n layers whose attention is least local.
    LowLocal(usize),
    /// This share of all layers: those whose operator a short stage 1 imitates best.
    Auto(f64),
}

impl Measured {
    /// Number of layers that it takes of `depth`.
    pub fn count(self, depth: usize) -> usize {
        match self {
            Measured::TopLocal(n) | Measured::LowLocal(n) => n,
            Measured::Auto(ratio) => ((ratio * depth as f64).round() as usize).max(1),
        }
    }
}

/// A chosen layer and the part of the plan that chose it.
pub(super) type Chosen = (usize, Range<usize>);

impl Layers {
    /// The measured pattern that a plan names, if it is one.
    ///
    /// # Errors
    /// A number that it cannot have, at `span`.
    pub(super) fn measured(&self, text: &SourceText, span: &Range<usize>) -> Result<Option<Measured>> {
        let Layers::Pattern(name) = self else { return Ok(None) };
        let Some((kind, number)) = name.split_once(':') else { return Ok(None) };
        let count = number.parse::<usize>().ok().filter(|n| *n >= 1);
        let (found, must) = match kind {
            "top-local" => (count.map(Measured::TopLocal), "top-local:n with n at least 1"),
            "low-local" => (count.map(Measured::LowLocal), "low-local:n with n at least 1"),
            "auto" => {
                let ratio = number.parse::<f64>().ok().filter(|r| *r > 0.0 && *r <= 1.0);
                (ratio.map(Measured::Auto), "auto:ratio with a ratio above 0 and at most 1, such as auto:0.5")
            }
            _ => return Ok(None),
        };
        found.map(Some).ok_or_else(|| text.error(span, "not a number of layers").must(must))
    }

    /// The layers of a model with `depth` of what is called `word` (blocks, or pairs of them), in rising order; `span` is
    /// where the plan says them.
    ///
    /// # Errors
    /// An unknown pattern, a measured one, a layer that the model does not have, a layer listed twice, or none at all.
    pub(super) fn select(
        &self,
        word: &str,
        depth: usize,
        text: &SourceText,
        span: Range<usize>,
    ) -> Result<Vec<Chosen>> {
        let mut chosen: Vec<Chosen> = match self {
            Layers::Pattern(name) => {
                let layers = pattern(name, (depth, word), text, &span)?;
                layers.into_iter().map(|layer| (layer, span.clone())).collect()
            }
            Layers::List(list) => {
                let layer = |s: &Spanned<i64>| {
                    let found = usize::try_from(*s.get_ref()).ok().filter(|l| *l < depth);
                    found.map(|l| (l, s.span())).ok_or_else(|| {
                        text.error(&s.span(), "layer out of range")
                            .must(format!("0 to {}, as the base has {depth} {word}", depth.saturating_sub(1)))
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

/// Layers of a pattern that depends on the depth alone.
fn pattern(name: &str, (depth, word): (usize, &str), text: &SourceText, span: &Range<usize>) -> Result<Vec<usize>> {
    Ok(match (name, name.strip_prefix("deep:").map(str::parse::<usize>)) {
        ("all", _) => (0..depth).collect(),
        ("every-other", _) => (1..depth).step_by(2).collect(),
        ("3-of-4", _) => (0..depth).filter(|i| i % 4 != 0).collect(),
        ("paper-pixart", _) if depth == 28 => PAPER_PIXART.to_vec(),
        ("paper-pixart", _) => {
            let error = text.error(span, "paper-pixart does not fit the base model");
            return Err(error.must(format!("a base of 28 blocks; this one has {depth}")));
        }
        (_, Some(Ok(n))) if n >= 1 && n <= depth => (depth - n..depth).collect(),
        (_, Some(Ok(_))) => {
            let error = text.error(span, "deep:n does not fit the base model");
            return Err(error.must(format!("deep:1 to deep:{depth}, as the base has {depth} {word}")));
        }
        _ => return Err(text.error(span, "unknown layer pattern").must(PATTERNS)),
    })
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
        let chosen = held.layers.get_ref().select("blocks", depth, &text, held.layers.span())?;
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
        let pixart = select("\"paper-pixart\"", 28).unwrap();
        assert_eq!((pixart.len(), &pixart[..7]), (14, &[8, 10, 12, 14, 16, 18, 20][..]));
        assert_eq!(pixart[6..], (20..28).collect::<Vec<_>>());
    }

    #[test]
    fn errors_point_at_the_part() {
        let message = |value: &str| select(value, 6).unwrap_err().to_string();
        assert!(
            message("\"every-third\"")
                .starts_with("plan.toml:1:10: unknown layer pattern; is \"every-third\"; must be \"all\"")
        );
        assert!(message("\"deep:7\"").contains("must be deep:1 to deep:6"));
        assert!(message("\"paper-pixart\"").contains("must be a base of 28 blocks; this one has 6"));
        assert!(message("[1, 6]").starts_with("plan.toml:1:14: layer out of range; is 6; must be 0 to 5"));
        assert!(message("[-1]").contains("plan.toml:1:11: layer out of range; is -1"));
        assert!(message("[1, 2, 1]").contains("layer listed twice; is 1"));
        assert!(message("[]").contains("no layer is chosen"));
    }

    #[test]
    fn measured_patterns_are_recognised_and_counted() {
        let text = SourceText { name: "plan.toml".into(), text: "layers = 1".into() };
        let measured = |name: &str| Layers::Pattern(name.into()).measured(&text, &(9..10));
        assert_eq!(measured("top-local:3").unwrap(), Some(Measured::TopLocal(3)));
        assert_eq!(measured("low-local:1").unwrap(), Some(Measured::LowLocal(1)));
        assert_eq!(measured("auto:0.5").unwrap(), Some(Measured::Auto(0.5)));
        assert_eq!(measured("deep:2").unwrap(), None);
        for wrong in ["top-local:0", "low-local:x", "auto:0", "auto:1.5", "auto:nan"] {
            let message = measured(wrong).unwrap_err().to_string();
            assert!(message.starts_with("plan.toml:1:10: not a number of layers"), "{wrong}: {message}");
        }
        assert_eq!([0.5, 0.75, 0.01].map(|r| Measured::Auto(r).count(28)), [14, 21, 1]);
    }
}

//! What a PixArt transformer reads of a text: its real tokens, and the keys and values that every block makes of them.

use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::ops::{act, contracts};
use crate::tensor::Tensor;

/// Text features without the tokens that do not count.
#[derive(Clone, Debug)]
pub struct Text {
    /// `[B, L, C]`, L the largest number of tokens that count.
    pub features: Var,
    /// Tokens of each sample, from the first on.
    pub counts: Vec<usize>,
    /// Whether cross-attention to texts of one token may be replaced by what it always gives. It changes the rounding,
    /// so it must not depend on which other texts are in the batch.
    pub constant: bool,
}

impl Text {
    /// Takes the tokens of `features [B, T, C]` whose mask, B rows of T, is not 0; all of them without a mask.
    ///
    /// # Errors
    /// A mask of another length.
    pub fn new(g: &Graph<'_>, features: &Var, mask: Option<&[i32]>) -> Result<Text> {
        let (b, t, c) = (features.dim(0), features.dim(1), features.dim(2));
        let device = features.tensor().device().clone();
        let Some(mask) = mask else {
            return Ok(Text { features: features.clone(), counts: vec![t; b], constant: false });
        };
        if mask.len() != b * t {
            return Err(Error::failure("pixart: text_mask", "wrong length").is(mask.len()).must(format!("{b} x {t}")));
        }
        let rows = mask.chunks(t.max(1)).enumerate().map(|(sample, mask)| {
            let counted = mask.iter().enumerate().filter(|(_, m)| **m != 0);
            counted.map(|(token, _)| (sample * t + token) as i32).collect()
        });
        let kept: Vec<Vec<i32>> = rows.collect();
        let counts: Vec<usize> = kept.iter().map(Vec::len).collect();
        let longest = kept.iter().map(Vec::len).max().unwrap_or(0).max(1);
        if longest == t && kept.iter().all(|rows| rows.last().is_none_or(|last| *last as usize % t + 1 == rows.len())) {
            return Ok(Text { features: features.clone(), counts, constant: false });
        }
        // What fills up a shorter text is never read.
        let index: Vec<i32> = kept
            .iter()
            .flat_map(|rows| rows.iter().copied().chain(std::iter::repeat_n(0, longest - rows.len())))
            .collect();
        let index = Tensor::from_i32(&device, &[b * longest], &index)?;
        let table = g.reshape(features, &[b * t, c])?;
        let rows = g.embed(&table, &index, None, contracts::embed::Params { act: act::NONE })?;
        Ok(Text { features: g.reshape(&rows, &[b, longest, c])?, counts, constant: false })
    }
}

/// Keys and values of the text in every block; they do not depend on the timestep and serve all steps.
#[derive(Clone, Debug)]
pub struct Keys {
    pub(super) blocks: Vec<Key>,
    pub(super) counts: Tensor,
}

impl Keys {
    /// Those of several texts of one sample each, in one batch. A text's keys are then the same whatever the others are,
    /// where those of a batch made at once are rounded by its longest text.
    ///
    /// # Errors
    /// No text at all, or some by their tokens and some as constants.
    pub fn join(texts: &[Keys]) -> Result<Keys> {
        let Some(first) = texts.first() else {
            return Err(Error::failure("pixart: texts", "none to join").must("at least one"));
        };
        let device = first.counts.device().clone();
        let (mut blocks, mut counts) = (Vec::with_capacity(first.blocks.len()), Vec::with_capacity(texts.len()));
        for text in texts {
            counts.push(text.blocks.first().map_or(0, |key| match key {
                Key::Tokens(kv) => kv.dim(1) as i32,
                Key::Constant(_) => 1,
            }));
        }
        let longest = counts.iter().copied().max().unwrap_or(1) as usize;
        for index in 0..first.blocks.len() {
            let parts: Option<Vec<(&Tensor, bool)>> =
                texts.iter().map(|text| text.blocks.get(index).map(Key::tensor)).collect();
            let parts =
                parts.filter(|parts| parts.iter().all(|(_, constant)| *constant == parts[0].1)).ok_or_else(|| {
                    Error::failure("pixart: texts", "keys of different kinds")
                        .must("all by tokens, or all as constants")
                })?;
            let (one, constant) = parts[0];
            let mut shape = one.shape().dims().to_vec();
            shape[0] = texts.len();
            if !constant {
                shape[1] = longest;
            }
            let each = shape[1..].iter().product::<usize>();
            let mut all = device.empty_of(&shape, one.dtype())?;
            if !device.is_dry() {
                let values = parts.iter().map(|(part, _)| part.values()).collect::<Result<Vec<_>>>()?;
                all.edit(|all| {
                    for (row, values) in all.chunks_mut(each.max(1)).zip(&values) {
                        row[..values.len()].copy_from_slice(values);
                        row[values.len()..].fill(0.0);
                    }
                })?;
            }
            let all = Var::constant(all);
            blocks.push(if constant { Key::Constant(all) } else { Key::Tokens(all) });
        }
        Ok(Keys { blocks, counts: Tensor::from_i32(&device, &[counts.len()], &counts)? })
    }
}

/// What one block knows of the text.
#[derive(Clone, Debug)]
pub(super) enum Key {
    /// `[B, L, 2, H, E]` keys and values.
    Tokens(Var),
    /// `[B, D]` what cross-attention to a single token adds to every token of the picture.
    Constant(Var),
}

impl Key {
    fn tensor(&self) -> (&Tensor, bool) {
        match self {
            Key::Tokens(kv) => (kv.tensor(), false),
            Key::Constant(added) => (added.tensor(), true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Precision;
    use crate::tensor::Device;

    #[test]
    fn tokens_that_count_move_to_the_front() {
        let (device, g) = (Device::cpu(), Graph::inference(Precision::F32));
        let values: Vec<f32> = (0..8).map(|v| v as f32).collect();
        let features = Var::constant(Tensor::from_f32(&device, &[2, 4, 1], &values).unwrap());
        let text = Text::new(&g, &features, Some(&[0, 1, 0, 1, 1, 0, 0, 0])).unwrap();
        assert_eq!(text.counts, [2, 1]);
        assert_eq!(text.features.tensor().f32s().unwrap()[..3], [1.0, 3.0, 4.0]);
        // A mask without holes that reaches the end changes nothing.
        let whole = Text::new(&g, &features, Some(&[1, 1, 0, 0, 1, 1, 1, 1])).unwrap();
        assert_eq!((whole.features.dim(1), whole.counts), (4, vec![2, 4]));
        assert!(Text::new(&g, &features, Some(&[1; 7])).is_err());
    }
}

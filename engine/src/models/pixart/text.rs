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
    /// `[B]` i32: tokens of each sample, from the first on.
    pub counts: Tensor,
    /// Whether cross-attention to texts of one token may be replaced by what it always gives. It changes the rounding,
    /// so it must not depend on which other texts are in the batch.
    pub constant: bool,
}

impl Text {
    /// Takes the tokens of `features [B, T, C]` whose mask `[B, T]` is not 0; all of them without a mask.
    ///
    /// # Errors
    /// A mask of another shape.
    pub fn new(g: &Graph<'_>, features: &Var, mask: Option<&Tensor>) -> Result<Text> {
        let (b, t, c) = (features.dim(0), features.dim(1), features.dim(2));
        let device = features.tensor().device().clone();
        let Some(mask) = mask else {
            let counts = Tensor::from_i32(&device, &[b], &vec![t as i32; b])?;
            return Ok(Text { features: features.clone(), counts, constant: false });
        };
        if mask.shape().dims() != [b, t] {
            return Err(Error::failure("pixart: text_mask", "wrong shape")
                .is(mask.shape())
                .must(format!("[{b}, {t}]")));
        }
        let kept: Vec<Vec<i32>> = mask
            .i32s()?
            .chunks(t.max(1))
            .enumerate()
            .map(|(sample, mask)| {
                let counted = mask.iter().enumerate().filter(|(_, m)| **m != 0);
                counted.map(|(token, _)| (sample * t + token) as i32).collect()
            })
            .collect();
        let counts: Vec<i32> = kept.iter().map(|rows| rows.len() as i32).collect();
        let longest = kept.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let counts = Tensor::from_i32(&device, &[b], &counts)?;
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

/// What one block knows of the text.
#[derive(Clone, Debug)]
pub(super) enum Key {
    /// `[B, L, 2, H, E]` keys and values.
    Tokens(Var),
    /// `[B, D]` what cross-attention to a single token adds to every token of the picture.
    Constant(Var),
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
        let mask = |m: &[i32]| Tensor::from_i32(&device, &[2, 4], m).unwrap();
        let text = Text::new(&g, &features, Some(&mask(&[0, 1, 0, 1, 1, 0, 0, 0]))).unwrap();
        assert_eq!(text.counts.i32s().unwrap(), [2, 1]);
        assert_eq!(text.features.tensor().f32s().unwrap()[..3], [1.0, 3.0, 4.0]);
        // A mask without holes that reaches the end changes nothing.
        let whole = Text::new(&g, &features, Some(&mask(&[1, 1, 0, 0, 1, 1, 1, 1]))).unwrap();
        assert_eq!((whole.features.dim(1), whole.counts.i32s().unwrap()), (4, &[2, 4][..]));
        assert!(Text::new(&g, &features, Some(&Tensor::from_i32(&device, &[8], &[1; 8]).unwrap())).is_err());
    }
}

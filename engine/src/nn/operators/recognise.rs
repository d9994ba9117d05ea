//! Which operator a checkpoint holds at a site, told by the names and shapes of its tensors.
//!
//! Checkpoints of other programs do not name their operators. Each kind says through [`Operator::told_by`] which
//! options the shapes give; here the kinds of a site are tried in the order of the registry. A kind is taken only where
//! an operator built with these options has exactly the tensors that were found.

use super::{BlockDims, Kind, Operator, REGISTRY, Site, Spec, build};
use crate::autograd::ParamStore;
use crate::nn::{Builder, Scheme};
use crate::tensor::Device;
use std::collections::BTreeMap;

/// Rows of tokens in the published models.
const PUBLISHED_GRID: usize = 16;

/// Shapes of tensors by name.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// An operator that was recognised.
#[derive(Clone, Debug, PartialEq)]
pub struct Recognised {
    /// Kind and options.
    pub spec: Spec,
    /// Options that the tensors do not tell, so that the published value was taken.
    pub assumed: &'static [&'static str],
}

/// The operator of a site whose tensors, named below the site, are exactly `found`.
pub fn recognise(site: Site, found: &Shapes, dims: BlockDims) -> Option<Recognised> {
    REGISTRY.iter().filter(|kind| kind.site == site).find_map(|kind| {
        let (example, own) = blank(kind, &Spec::new(kind.name), dims)?;
        if !own.keys().eq(found.keys()) {
            return None;
        }
        let (operator, own) = blank(kind, &example.told_by(found, dims)?, dims)?;
        (own == *found).then(|| Recognised { spec: operator.spec(), assumed: operator.untold() })
    })
}

/// An operator whose tensors are all that a file has, and the site that it fits. The width is told by the matrices,
/// the heads by `heads_of` that width, the tokens by filters that have one row for each of a square grid.
pub fn recognise_alone(
    found: &Shapes,
    heads_of: impl Fn(usize) -> Option<usize>,
) -> Option<(Site, BlockDims, Recognised)> {
    let of_rank = |rank: usize, axis: usize| {
        let sizes = found.values().filter(move |shape| shape.len() == rank).map(move |shape| shape[axis]);
        sizes.collect::<std::collections::BTreeSet<usize>>()
    };
    let square = |tokens: &usize| tokens.isqrt().pow(2) == *tokens && *tokens > 0;
    let mut grids: Vec<usize> = of_rank(3, 0).iter().filter(|t| square(t)).map(|t| t.isqrt()).collect();
    grids.push(PUBLISHED_GRID);
    for width in of_rank(2, 1).into_iter().filter(|width| *width > 0) {
        let heads = heads_of(width).filter(|heads| width.is_multiple_of((*heads).max(1))).unwrap_or(1);
        for grid in &grids {
            let dims = BlockDims { width, heads, grid: [*grid, *grid] };
            let site = |site: Site| Some((site, dims, recognise(site, found, dims)?));
            if let Some(known) = site(Site::Attn).or_else(|| site(Site::Mlp)) {
                return Some(known);
            }
        }
    }
    None
}

/// Names of the operators that [`recognise`] may find at a site.
pub fn recognisable(site: Site) -> Vec<&'static str> {
    REGISTRY.iter().filter(|kind| kind.site == site).map(|kind| kind.name).collect()
}

/// An operator without values, and the shapes of its tensors.
fn blank(kind: &Kind, spec: &Spec, dims: BlockDims) -> Option<(Box<dyn Operator>, Shapes)> {
    let (mut params, device) = (ParamStore::default(), Device::dry());
    // An operator that cannot take these sizes is not the one that was found.
    let operator = build(spec, kind.site, dims, &mut Builder::new(&mut params, &device, 0, Scheme::Unset)).ok()?;
    let shapes = params.iter().map(|(_, p)| (p.name.clone(), p.value.shape().dims().to_vec())).collect();
    Some((operator, shapes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIMS: BlockDims = BlockDims { width: 40, heads: 5, grid: [4, 4] };

    fn shapes(rows: &[(&str, &[usize])]) -> Shapes {
        rows.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
    }

    fn found(site: Site, rows: &[(&str, &[usize])]) -> Option<String> {
        recognise(site, &shapes(rows), DIMS).map(|r| r.spec.to_string())
    }

    #[test]
    fn names_tell_the_kind_and_shapes_the_options() {
        let timm: [(&str, &[usize]); 4] =
            [("qkv.weight", &[120, 40]), ("qkv.bias", &[120]), ("proj.weight", &[40, 40]), ("proj.bias", &[40])];
        assert_eq!(found(Site::Attn, &timm).unwrap(), "mha(heads=5)");
        let flash: [(&str, &[usize]); 4] = [
            ("Wqkv.weight", &[120, 40]),
            ("Wqkv.bias", &[120]),
            ("out_proj.weight", &[40, 40]),
            ("out_proj.bias", &[40]),
        ];
        let window = recognise(Site::Attn, &shapes(&flash), DIMS).unwrap();
        assert_eq!((window.spec.to_string().as_str(), window.assumed), ("swa(heads=5, window=4)", &["window"][..]));
        let hyena = |taps: usize| {
            let filter = [120, 1, taps];
            let rows: [(&str, &[usize]); 6] = [
                ("in_proj.weight", &[120, 40]),
                ("in_proj.bias", &[120]),
                ("short_filter.weight", &filter),
                ("short_filter.bias", &[120]),
                ("out_proj.weight", &[40, 40]),
                ("out_proj.bias", &[40]),
            ];
            found(Site::Attn, &rows).unwrap()
        };
        assert_eq!(
            (hyena(4).as_str(), hyena(3).as_str()),
            ("hyena_x(direction=causal, taps=4)", "hyena_x(direction=causal, taps=3)")
        );
        for (kind, options) in [
            ("hyena_se", &[("taps", 3.0)][..]),
            ("hyena_y", &[("taps", 5.0)]),
            ("mamba2", &[("state", 8.0), ("head_width", 20.0), ("expand", 3.0)]),
            ("mlp_hyena_x", &[("ratio", 3.0), ("taps", 2.0)]),
        ] {
            let spec = options.iter().fold(Spec::new(kind), |spec, (name, value)| spec.with(name, *value));
            let entry = REGISTRY.iter().find(|k| k.name == kind).unwrap();
            let (operator, own) = blank(entry, &spec, DIMS).unwrap();
            assert_eq!(recognise(entry.site, &own, DIMS).unwrap().spec, operator.spec(), "{kind}");
        }
        for (hidden, ratio) in [(120, "3"), (160, "4"), (240, "6"), (100, "2.5")] {
            let rows: [(&str, &[usize]); 4] = [
                ("fc1.weight", &[hidden, 40]),
                ("fc1.bias", &[hidden]),
                ("fc2.weight", &[40, hidden]),
                ("fc2.bias", &[40]),
            ];
            assert_eq!(found(Site::Mlp, &rows).unwrap(), format!("mlp(ratio={ratio})"));
            assert_eq!(found(Site::Attn, &rows), None);
        }
        // Every hidden width that fits has a ratio which gives it back.
        for hidden in 1..400 {
            let rows: [(&str, &[usize]); 4] = [
                ("fc1.weight", &[hidden, 40]),
                ("fc1.bias", &[hidden]),
                ("fc2.weight", &[40, hidden]),
                ("fc2.bias", &[40]),
            ];
            assert!(found(Site::Mlp, &rows).is_some(), "{hidden}");
        }
    }

    #[test]
    fn an_operator_alone_tells_its_width() {
        let rows: [(&str, &[usize]); 4] = [
            ("fc1.weight", &[3456, 1152]),
            ("fc1.bias", &[3456]),
            ("fc2.weight", &[1152, 3456]),
            ("fc2.bias", &[1152]),
        ];
        let (site, dims, known) = recognise_alone(&shapes(&rows), |_| None).unwrap();
        assert_eq!((site, dims.width, known.spec.to_string().as_str()), (Site::Mlp, 1152, "mlp(ratio=3)"));
        assert!(recognise_alone(&shapes(&rows[1..]), |_| None).is_none());
        assert!(recognise_alone(&Shapes::new(), |_| None).is_none());
    }

    #[test]
    fn what_does_not_fit_to_the_last_shape_is_not_taken() {
        let rows: [(&str, &[usize]); 4] =
            [("qkv.weight", &[120, 40]), ("qkv.bias", &[121]), ("proj.weight", &[40, 40]), ("proj.bias", &[40])];
        assert_eq!(found(Site::Attn, &rows), None);
        assert_eq!(found(Site::Attn, &rows[..3]), None);
        assert_eq!(found(Site::Attn, &[]), None);
        assert!(recognisable(Site::Attn).contains(&"hyena_x"));
        assert!(recognisable(Site::BlockPair).is_empty());
    }
}

//! Grafted checkpoints as other programs write them: only tensors, whose operators must be recognised.

use crate::torch_file::checkpoint;
use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::io::safetensors::TensorFile;
use graft_engine::models::dit::{self, Conversion, Dit, DitConfig, Layout, Run};
use graft_engine::nn::operators::{BlockDims, REGISTRY, Shapes, Site, Spec, recognise, recognise_alone};
use graft_engine::tensor::{Device, Tensor};
use graft_kernels::rng::Philox;
use graft_tests::scratch::Scratch;
use std::collections::BTreeMap;
use std::path::Path;

fn folder(name: &str) -> Scratch {
    Scratch::new(&format!("checkpoints-{name}"))
}

type Named = (String, Vec<usize>, Vec<f32>);

fn tensors(model: &Dit) -> Vec<Named> {
    let own = model.params.iter();
    own.map(|(_, p)| (p.name.clone(), p.value.shape().dims().to_vec(), p.value.to_vec().unwrap())).collect()
}

/// A model of a published width (the number of heads follows from it) with other operators in its second block.
fn grafted(attn: Spec, mlp: Spec) -> Dit {
    let sizes = DitConfig { input_size: 32, patch: 8, in_channels: 1, classes: 3, ..DitConfig::plain(2, 384, 6) };
    let mut config = sizes;
    (config.blocks[1].attn, config.blocks[1].mlp) = (attn, mlp);
    let mut model = Dit::new(config, &Device::cpu(), 1).unwrap();
    let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for id in ids {
        let mut value = model.params.get(id).value.copy().unwrap();
        let values = value.f32s_mut().unwrap();
        let mut noise = vec![0.0; values.len()];
        Philox::new(2, id.index() as u64).fill_normal(&mut noise);
        values.iter_mut().zip(&noise).for_each(|(v, n)| *v += 0.02 * n);
        model.params.set(id, value).unwrap();
    }
    model
}

fn predict(model: &Dit) -> Vec<f32> {
    let device = model.device();
    let mut noise = vec![0.0; 1024];
    Philox::new(5, 0).fill_normal(&mut noise);
    let x = Var::constant(Tensor::from_f32(device, &[1, 1, 32, 32], &noise).unwrap());
    let (t, y) = (Tensor::from_f32(device, &[1], &[300.0]).unwrap(), Tensor::from_i32(device, &[1], &[2]).unwrap());
    let out = model.forward(&Graph::inference(Precision::F32), &x, &t, &y, Run::default()).unwrap();
    out.tensor().to_vec().unwrap()
}

#[test]
fn a_published_file_loads_without_a_word_about_its_operators() {
    let dir = folder("published");
    let model = grafted(Spec::new("hyena_x"), Spec::new("mlp").with("ratio", 3.0));
    let path = dir.join("model.pt");
    std::fs::write(&path, checkpoint("ema", &tensors(&model))).unwrap();
    let loaded = dit::load(&path, &Device::cpu()).unwrap();
    let block = &loaded.config.blocks[1];
    assert_eq!(
        (block.attn.to_string().as_str(), block.mlp.to_string().as_str()),
        ("hyena_x(direction=causal, taps=4)", "mlp(ratio=3)")
    );
    assert_eq!(loaded.config.blocks[0].attn.to_string(), "mha(heads=6)");
    assert_eq!(predict(&loaded), predict(&model));
    assert!(dit::assumptions(&path).unwrap().is_empty());
    // As a folder of either layout it predicts the same, and says by itself what it is.
    for (layout, name) in [(Layout::Original, "original"), (Layout::Diffusers, "diffusers")] {
        let (options, extra) = (BTreeMap::new(), BTreeMap::new());
        let conversion = Conversion { layout, dtype: None, options, extra };
        dit::convert(&path, &dir.join(name), &conversion).unwrap();
        assert_eq!(predict(&dit::load(&dir.join(name), &Device::cpu()).unwrap()), predict(&model), "{name}");
    }
}

#[test]
fn windows_that_a_file_does_not_state_may_be_stated() {
    let dir = folder("window");
    let model = grafted(Spec::new("swa").with("window", 2.0), Spec::new("mlp"));
    let path = dir.join("model.pt");
    std::fs::write(&path, checkpoint("ema", &tensors(&model))).unwrap();
    let open = dit::assumptions(&path).unwrap();
    assert_eq!(open.iter().map(|a| (a.block, a.site, a.option)).collect::<Vec<_>>(), [(1, Site::Attn, "window")]);
    let published = dit::load(&path, &Device::cpu()).unwrap();
    assert_eq!(published.config.blocks[1].attn.to_string(), "swa(heads=6, window=4)");
    assert_ne!(predict(&published), predict(&model));
    let options = BTreeMap::from([("window".to_string(), 2.0)]);
    let conversion = Conversion { layout: Layout::Diffusers, dtype: None, options, extra: BTreeMap::new() };
    let (.., open) = dit::convert(&path, &dir.join("out"), &conversion).unwrap();
    assert!(open.is_empty());
    assert_eq!(predict(&dit::load(&dir.join("out"), &Device::cpu()).unwrap()), predict(&model));
    assert!(dit::assumptions(&dir.join("out")).unwrap().is_empty());
}

/// The recorded operators of the published kinds, in their own names, are recognised for what they are.
#[test]
fn recorded_operators_are_recognised() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/operators");
    let mut seen = 0;
    for (case, kind) in PUBLISHED {
        let file = root.join(case).join("model/operator.safetensors");
        let Some(known) = REGISTRY.iter().find(|k| k.name == *kind).filter(|_| file.exists()) else { continue };
        let file = TensorFile::open(&file).unwrap();
        let found: Shapes = file.iter().map(|t| (t.name.to_string(), t.shape.to_vec())).collect();
        let told = recognise(known.site, &found, BlockDims { width: 40, heads: 5, grid: [4, 4] });
        assert_eq!(told.map(|k| k.spec.kind).as_deref(), Some(*kind), "{case}");
        let (site, dims, told) = recognise_alone(&found, |_| Some(5)).unwrap();
        assert_eq!((site, dims.width, told.spec.kind.as_str()), (known.site, 40, *kind), "{case}");
        seen += 1;
    }
    assert!(seen >= 3);
}

/// Recorded cases and what their operators are; those of kinds that are not there yet are left out.
const PUBLISHED: &[(&str, &str)] = &[
    ("mha", "mha"),
    ("swa_w4", "swa"),
    ("hyena_x", "hyena_x"),
    ("hyena_se", "hyena_se"),
    ("hyena_y", "hyena_y"),
    ("mamba2", "mamba2"),
    ("mlp_r3", "mlp"),
    ("mlp_hyena_x", "mlp_hyena_x"),
];

//! What is read off the tensors of a checkpoint, in either layout; sizes of the published models.

use super::*;
use crate::autograd::Precision;
use crate::io::files::test_dir;
use crate::io::safetensors::{TensorRecord, write};
use crate::nn::operators::Spec;
use std::collections::BTreeMap;
use std::path::Path;

/// Two blocks with operators of their own, told size and aspect ratio.
fn model() -> PixArt {
    let mut config = PixArtConfig {
        sample_size: 8,
        interpolation: 0.5,
        caption_channels: 10,
        max_tokens: 120,
        micro_conditions: true,
        ..PixArtConfig::plain(3, 24, 3)
    };
    config.blocks[1].attn = Spec::new("mha_qk_norm").with("heads", 3.0);
    config.blocks[2].attn = Spec::new("kv_compress").with("heads", 3.0).with("factor", 2.0);
    config.blocks[2].mlp = Spec::new("mlp").with("ratio", 2.5);
    PixArt::random(config, &Device::cpu(), 9).unwrap()
}

fn save(model: &PixArt, file: &Path, layout: Layout, prefix: &str, more: &[(&str, Vec<usize>, Vec<f32>)]) {
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (_, param) in model.params.iter() {
        let (parts, values) = (layout.parts(&param.name), param.value.to_vec().unwrap());
        let mut shape = param.value.shape().dims().to_vec();
        shape[0] /= parts.len();
        for (name, values) in parts.iter().zip(values.chunks(values.len() / parts.len())) {
            tensors.push((format!("{prefix}{name}"), shape.clone(), values.to_vec()));
        }
    }
    tensors.extend(more.iter().map(|(name, shape, values)| (format!("{prefix}{name}"), shape.clone(), values.clone())));
    let records = tensors.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
    write(file, records, &BTreeMap::new()).unwrap();
}

fn predict(model: &PixArt, size: [usize; 2]) -> Vec<f32> {
    let (device, g) = (model.device().clone(), Graph::inference(Precision::F32));
    let draw = |shape: &[usize], seed: u64| {
        let mut t = device.empty(shape).unwrap();
        Philox::new(seed, 0).fill_normal(t.f32s_mut().unwrap());
        t
    };
    let text = Text::new(&g, &Var::constant(draw(&[2, 5, 10], 1)), None).unwrap();
    let keys = model.keys(&g, &text).unwrap();
    let t = Tensor::from_f32(&device, &[2], &[999.0, 12.5]).unwrap();
    let micro = MicroConditions {
        size: Tensor::from_f32(&device, &[2, 2], &[64.0, 96.0, 512.0, 512.0]).unwrap(),
        aspect: Tensor::from_f32(&device, &[2], &[0.67, 1.0]).unwrap(),
    };
    let x = Var::constant(draw(&[2, 4, size[0], size[1]], 2));
    model.forward(&g, &x, &t, &keys, Some(&micro), Run::default()).unwrap().tensor().to_vec().unwrap()
}

#[test]
fn sizes_and_operators_are_read_off_the_tensors() {
    let (model, dir) = (model(), test_dir("pixart_load"));
    let want = [predict(&model, [8, 8]), predict(&model, [4, 12])];
    for (layout, prefix) in [(Layout::Original, ""), (Layout::Original, "model."), (Layout::Diffusers, "")] {
        let folder = dir.join(format!("{layout:?}{prefix}"));
        std::fs::create_dir_all(&folder).unwrap();
        let table = positions::table(&[0.0, 2.0, 4.0, 6.0], &[0.0, 2.0, 4.0, 6.0], 24);
        let more: &[(&str, Vec<usize>, Vec<f32>)] = match layout {
            // The size that positions are relative to, and their density, stand in the table alone.
            Layout::Original => &[("pos_embed", vec![1, 16, 24], table)],
            Layout::Diffusers => &[],
        };
        save(&model, &folder.join("model.safetensors"), layout, prefix, more);
        let stated = match layout {
            Layout::Original => r#"{"num_heads": 3}"#,
            Layout::Diffusers => {
                r#"{"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single", "num_attention_heads": 3,
                    "num_layers": 3, "sample_size": 8, "interpolation_scale": 0.5}"#
            }
        };
        std::fs::write(folder.join("config.json"), stated).unwrap();
        assert!(is_pixart(&folder).unwrap());
        let loaded = load(&folder, &Device::cpu(), false).unwrap();
        assert_eq!(loaded.config, model.config, "{layout:?}");
        assert_eq!([predict(&loaded, [8, 8]), predict(&loaded, [4, 12])], want);
        // Rounded weights are near.
        let rounded = predict(&load(&folder, &Device::cpu(), true).unwrap(), [8, 8]);
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let error = norm(&mut rounded.iter().zip(&want[0]).map(|(a, b)| a - b));
        assert!(error > 0.0 && error < 0.03 * norm(&mut want[0].iter().copied()), "{error}");
    }
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_named() {
    let (model, dir) = (model(), test_dir("pixart_bad"));
    let message = |name: &str, config: &str, more: &[(&str, Vec<usize>, Vec<f32>)]| {
        let folder = dir.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        save(&model, &folder.join("model.safetensors"), Layout::Original, "", more);
        std::fs::write(folder.join("config.json"), config).unwrap();
        load(&folder, &Device::cpu(), false).map(|_| ()).unwrap_err().to_string()
    };
    let sizes = r#"{"num_heads": 3, "sample_size": 8"#;
    for (name, config, word) in [
        ("heads", "{}", "the number of heads cannot be told"),
        ("size", r#"{"num_heads": 3}"#, "the size that positions are relative to is not stated"),
        ("depth", &format!("{sizes}, \"depth\": 7}}"), "states another depth than the tensors have; is 7; must be 3"),
        ("class", &format!("{sizes}, \"_class_name\": \"DiTTransformer2DModel\"}}"), "no PixArt transformer"),
        ("word", r#"{"num_heads": "three"}"#, "not a whole number"),
    ] {
        assert!(message(name, config, &[]).contains(word), "{name}");
    }
    let stray = [("transformer_blocks.0.attn1.to_q.weight", vec![1], vec![0.0])];
    let mixed = message("mixed", &format!("{sizes}}}"), &stray);
    assert!(mixed.contains("transformer_blocks.0.attn1.to_q.weight: unexpected tensor"), "{mixed}");
    let unknown = message("operator", &format!("{sizes}}}"), &[("blocks.0.attn.extra", vec![1], vec![0.0])]);
    assert!(unknown.contains("blocks.0.attn: unknown operator; is extra [1]"), "{unknown}");
}

#[test]
fn the_published_sizes() {
    for (side, tokens) in [(256, 16), (512, 32), (1024, 64), (2048, 128)] {
        let config = PixArtConfig::sigma_xl(side).unwrap();
        assert_eq!(config.base(), tokens);
        let model = PixArt::unset(config, &Device::dry()).unwrap();
        assert_eq!(model.params.elements(), 610_856_096);
    }
    assert!(PixArtConfig::sigma_xl(300).is_err());
    // Row 7 and column 100 at 2048 pixels: coordinates 1.75 and 25.
    let table = positions::table(&[1.75], &[25.0], 1152);
    for (i, want) in [(0, -0.132_351_75), (288, 0.991_202_8), (576, 0.983_985_96), (864, -0.178_246_06)] {
        assert!((table[i] - want).abs() < 1e-6, "{i}: {}", table[i]);
    }
}

/// Timesteps that are embedded together, and the noise alone, give the bits of a forward pass on its own.
#[test]
fn steps_made_at_once_keep_their_bits() {
    for bf16 in [false, true] {
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let mut config = PixArtConfig { sample_size: 8, caption_channels: 10, ..PixArtConfig::plain(2, 24, 3) };
        config.blocks[1].attn = Spec::new("mha_qk_norm").with("heads", 3.0);
        let device = Device::cpu();
        let model = PixArt::random_in(config, &device, 9, bf16).unwrap();
        let draw = |shape: &[usize], seed: u64| {
            let mut t = device.empty(shape).unwrap();
            Philox::new(seed, 0).fill_normal(t.f32s_mut().unwrap());
            t
        };
        let g = Graph::inference(precision);
        let text = Text::new(&g, &Var::constant(draw(&[2, 5, 10], 1)), None).unwrap();
        let (keys, x) = (model.keys(&g, &text).unwrap(), Var::constant(draw(&[2, 4, 8, 6], 2)));
        let times = [999.0, 500.0, 49.95, 0.0];
        let t = Tensor::from_f32(&device, &[4], &times).unwrap();
        let [all, noise] = [Outputs::All, Outputs::Noise].map(|outputs| model.moments(&g, &t, None, outputs).unwrap());
        assert_eq!((all.len(), all.channels(), noise.channels()), (4, 8, 4));
        for (step, time) in times.into_iter().enumerate() {
            let one = Tensor::from_f32(&device, &[2], &[time; 2]).unwrap();
            let alone = model.forward(&g, &x, &one, &keys, None, Run::default()).unwrap().tensor().to_vec().unwrap();
            let mut seen = Vec::new();
            let mut watch = |block: usize, _: &Tensor| {
                seen.push(block);
                Ok(())
            };
            let at = |moments: &Moments, watch: Option<&mut Watch<'_>>| {
                model
                    .forward_at(&g, &x, (moments, step), &keys, Run::default(), watch)
                    .unwrap()
                    .tensor()
                    .to_vec()
                    .unwrap()
            };
            assert!(at(&all, Some(&mut watch)) == alone, "step {step}, bf16 {bf16}");
            assert_eq!(seen, [0, 1]);
            let noise = at(&noise, None);
            // Channels 0 to 3 of 8, of two samples of 48 pixels.
            let want: Vec<f32> = alone.chunks(8 * 48).flat_map(|sample| sample[..4 * 48].to_vec()).collect();
            assert!(noise == want, "step {step}, bf16 {bf16}");
        }
        let beyond = model.forward_at(&g, &x, (&all, 4), &keys, Run::default(), None).unwrap_err().to_string();
        assert!(beyond.contains("beyond the timesteps that were made; is 4; must be below 4"), "{beyond}");
    }
}

#[test]
fn sites_are_shown_in_order_and_nothing_changes() {
    use crate::models::sites::SiteModel;
    let config = PixArtConfig { sample_size: 8, caption_channels: 10, ..PixArtConfig::plain(2, 24, 3) };
    let model = PixArt::random(config, &Device::cpu(), 9).unwrap();
    let (device, g) = (PixArt::device(&model).clone(), Graph::inference(Precision::F32));
    let draw = |shape: &[usize], seed: u64| {
        let mut t = device.empty(shape).unwrap();
        Philox::new(seed, 0).fill_normal(t.f32s_mut().unwrap());
        t
    };
    let text = Text::new(&g, &Var::constant(draw(&[2, 5, 10], 1)), Some(&[1, 1, 0, 0, 0, 1, 1, 1, 1, 1])).unwrap();
    let condition = TextCondition { text, micro: None };
    let (x, t) = (Var::constant(draw(&[2, 4, 8, 8], 2)), Tensor::from_f32(&device, &[2], &[999.0, 12.5]).unwrap());
    let plain = model.predict(&g, &x, &t, &condition, false, None).unwrap().tensor().to_vec().unwrap();
    let mut seen = Vec::new();
    let mut observer = |s: &crate::models::sites::Seen<'_>| {
        let operator = model.operator(s.block, s.site).unwrap();
        let again = operator.forward(&g, &model.params, s.input, None)?.tensor().to_vec()?;
        assert_eq!(again, s.output.tensor().to_vec()?);
        let (gates, row) = s.gate.unwrap();
        assert_eq!((gates.tensor().shape().dims(), s.condition.is_none()), (&[2, 6, 24][..], true));
        seen.push((s.block, s.site, row));
        Ok(())
    };
    let observed = model.predict(&g, &x, &t, &condition, false, Some(&mut observer)).unwrap();
    let observed = observed.tensor().to_vec().unwrap();
    assert_eq!(seen, [(0, Site::Attn, 2), (0, Site::Mlp, 5), (1, Site::Attn, 2), (1, Site::Mlp, 5)]);
    let size = plain.iter().map(|v| v.abs()).fold(0.0, f32::max);
    assert!(observed.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= 1e-5 * size));
}

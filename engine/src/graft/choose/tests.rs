//! Ranks by hand, and choices on a small model: kept, made again, broken off.

use super::*;
use crate::graft::plan::tests::plan;
use crate::io::datasets::ImageSet;
use crate::io::files::test_dir;
use crate::models::dit::DitConfig;
use crate::tensor::Device;
use graft_kernels::rng::Philox;

#[test]
fn ranks_by_hand() {
    let locality = [Some(0.5), None, Some(0.9), Some(0.1), Some(0.5)];
    assert_eq!(by_locality((0..5).collect(), &locality, true), [2, 0, 4, 3]);
    assert_eq!(by_locality((0..5).collect(), &locality, false), [3, 0, 4, 2]);
    // 0.301 and 0.304 count as equal, so that the more local layer goes first; layer 1 was not measured.
    let residuals = [Some(0.301), None, Some(0.304), Some(0.2), Some(0.9)];
    assert_eq!(by_residual((0..5).collect(), &residuals, &locality), [3, 2, 0, 4]);
}

fn base() -> Dit {
    let sizes = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(4, 16, 2) };
    let mut model = Dit::new(sizes, &Device::cpu(), 1).unwrap();
    let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for id in ids {
        let mut value = model.params.get(id).value.copy().unwrap();
        let mut noise = vec![0.0; value.len()];
        Philox::new(2, id.index() as u64).fill_normal(&mut noise);
        value.f32s_mut().unwrap().iter_mut().zip(&noise).for_each(|(v, n)| *v += 0.1 * n);
        model.params.set(id, value).unwrap();
    }
    model
}

fn data() -> RunData {
    let images = |n: usize, seed| {
        let mut rng = Philox::new(seed, 0);
        let pixels = (0..64 * n).map(|_| rng.below(256) as u8).collect();
        let labels = (0..n).map(|i| (i % 3) as u8).collect();
        ImageSet { n, channels: 1, height: 8, width: 8, pixels, labels, class_names: vec!["a", "b", "c"] }
    };
    RunData { train: images(16, 1), held_out: images(8, 2) }
}

fn graft(layers: &str, operator: &str) -> String {
    format!("[[graft]]\nsite = \"attn\"\nlayers = \"{layers}\"\noperator = {{ kind = \"{operator}\" }}\n")
}

const SELECT: &str = "[distill]\nheld_out = 1\n[select]\nsamples = 3\nsteps = 2\nupdates = 3\nbatch = 4\n";

fn chosen(text: &str, folder: Option<&Path>) -> Result<Vec<Vec<usize>>> {
    let plan = plan(&(text.to_string() + SELECT))?;
    let decided = choose(&plan, &base(), folder, Some(&data()), &mut |_| ControlFlow::Continue(()))?.unwrap();
    let sites = decided.resolve(&base().config)?.len();
    let layers: Vec<Vec<usize>> = decided.chosen().into_iter().map(|(.., layers)| layers).collect();
    assert_eq!(sites, layers.iter().map(Vec::len).sum::<usize>() + text.matches("deep:1").count());
    Ok(layers)
}

#[test]
fn the_most_and_the_least_local_layers_share_the_model() {
    let select = plan(&(graft("all", "mha") + SELECT)).unwrap().select;
    let protocol =
        Protocol { samples: select.samples, steps: select.steps, guidance: select.guidance, seed: select.seed };
    let band = locality::measured(&base(), protocol, &[], &[], &mut |_, _| {}).unwrap().band(2);
    let order = by_locality((0..4).collect(), &band, true);
    let sorted = |layers: &[usize]| {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers
    };
    // 16 tokens: the band is 2 wide.
    let both = graft("top-local:1", "hyena_x") + &graft("low-local:3", "mha");
    assert_eq!(chosen(&both, None).unwrap(), [vec![order[0]], sorted(&order[1..])]);
    // A layer that another graft claims is no candidate.
    let rest = graft("low-local:3", "hyena_x") + &graft("deep:1", "mha");
    assert_eq!(chosen(&rest, None).unwrap(), [[0, 1, 2]]);
    let message = chosen(&(graft("low-local:4", "hyena_x") + &graft("deep:1", "mha")), None).unwrap_err();
    let message = message.to_string();
    assert!(message.starts_with("plan.toml:8:10: more layers than there are"), "{message}");
    assert!(message.contains("must be at most 3"), "{message}");
}

#[test]
fn an_automatic_choice_is_kept_and_can_be_made_again() {
    let (first, second) = (test_dir("auto1"), test_dir("auto2"));
    let text = graft("auto:0.5", "hyena_x");
    let layers = chosen(&text, Some(&first)).unwrap();
    assert_eq!(layers[0].len(), 2);
    assert_eq!(chosen(&text, Some(&second)).unwrap(), layers);
    let kept = read(&first.join(FILE)).unwrap();
    let found = kept.choices[0].residuals.clone().unwrap();
    assert_eq!(found, read(&second.join(FILE)).unwrap().choices[0].residuals.clone().unwrap());
    // The residuals say why: no layer that was left has a smaller one by more than a hundredth.
    let worst = layers[0].iter().map(|l| found[*l].unwrap()).fold(0.0, f64::max);
    let left = (0..4).filter(|l| !layers[0].contains(l)).map(|l| found[l].unwrap()).fold(9.0, f64::min);
    assert!(worst <= left + 0.01, "{found:?} {layers:?}");
    // What the folder keeps is taken without measuring.
    let plan = plan(&(text.clone() + SELECT)).unwrap();
    let kept = super::kept(&plan, &first).unwrap();
    assert_eq!(kept.chosen()[0].2, layers[0]);
    let again = choose(&plan, &base(), Some(&first), None, &mut |_| ControlFlow::Break(())).unwrap().unwrap();
    assert_eq!(again.chosen(), kept.chosen());
    // Without a folder there is no place for a short stage 1.
    let message = chosen(&text, None).unwrap_err().to_string();
    assert!(message.contains("decided by a short stage 1") && message.contains("--run DIR"), "{message}");
}

#[test]
fn a_choice_that_is_broken_off_goes_on() {
    let (whole, broken) = (test_dir("auto-whole"), test_dir("auto-broken"));
    let text = graft("auto:0.25", "hyena_x");
    let layers = chosen(&text, Some(&whole)).unwrap();
    let plan = plan(&(text.clone() + SELECT)).unwrap();
    let stopped = choose(&plan, &base(), Some(&broken), Some(&data()), &mut |_| ControlFlow::Break(())).unwrap();
    assert!(stopped.is_none() && !broken.join(FILE).exists());
    assert_eq!(chosen(&text, Some(&broken)).unwrap(), layers);
    let residuals = |dir: &Path| read(&dir.join(FILE)).unwrap().choices[0].residuals.clone();
    assert_eq!(residuals(&whole), residuals(&broken));
}

//! The parts of a text-to-image model and where they are: one folder with all, a transformer whose other parts lie
//! elsewhere, or each on its own.

use crate::error::{Error, Result};
use crate::io::{atomic, hub, json};
use serde_json::json;
use std::path::{Path, PathBuf};

/// File in the folder of a grafted transformer that names the model whose other parts it shares.
const BASE: &str = "base.json";

/// Says in the folder of a grafted transformer whose other parts it shares.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_base(folder: &Path, base: &Path) -> Result<()> {
    // A run folder may be used from another working directory.
    let base = hub::resolve(base)?;
    let base = std::path::absolute(&base).unwrap_or(base);
    atomic::ensure_writable_dir(folder)?;
    json::write(&folder.join(BASE), &json!({ "model": base }))
}

/// The model whose other parts a grafted transformer shares, where its folder names one.
fn read_base(folder: &Path) -> Result<Option<PathBuf>> {
    let path = folder.join(BASE);
    if !path.is_file() {
        return Ok(None);
    }
    let value = json::read(&path)?;
    let model = value["model"].as_str().map(PathBuf::from);
    model.map(Some).ok_or_else(|| {
        Error::failure(path.display().to_string(), "names no model").must("\"model\": the folder of the base model")
    })
}

/// Parts that the caller names; each goes before what a folder has.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// A folder with the parts that the model's has not.
    pub components: Option<PathBuf>,
    /// The transformer.
    pub transformer: Option<PathBuf>,
    /// The autoencoder.
    pub vae: Option<PathBuf>,
    /// The text encoder.
    pub text_encoder: Option<PathBuf>,
    /// The tokenizer.
    pub tokenizer: Option<PathBuf>,
}

/// Where the parts of a model are, as far as they were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Components {
    /// The transformer.
    pub transformer: PathBuf,
    /// The autoencoder.
    pub vae: Option<PathBuf>,
    /// The text encoder.
    pub text_encoder: Option<PathBuf>,
    /// The tokenizer.
    pub tokenizer: Option<PathBuf>,
    /// `scheduler_config.json`.
    pub scheduler: Option<PathBuf>,
}

impl Components {
    /// Finds the parts of `model`: a pipeline folder, a transformer, or the id of either in the hub's cache.
    ///
    /// # Errors
    /// A part that was named and is not there.
    pub fn find(model: &Path, overrides: &Overrides) -> Result<Components> {
        let given = |path: &Option<PathBuf>, option: &str| -> Result<Option<PathBuf>> {
            let Some(path) = path else { return Ok(None) };
            let path = hub::resolve(path)?;
            match path.exists() {
                true => Ok(Some(path)),
                false => {
                    Err(Error::usage(option, "no such file or folder").is(path.display()).must("a folder or file"))
                }
            }
        };
        let model = super::last_stage(&hub::resolve(model)?);
        let components = given(&overrides.components, "--components")?;
        // A transformer inside a pipeline has its siblings beside it.
        let above = |path: &Path| path.parent().filter(|p| p.join("model_index.json").is_file()).map(Path::to_path_buf);
        let base = read_base(&model)?;
        let beside_base = base.as_deref().and_then(above);
        let roots = [components, Some(model.clone()), above(&model), base, beside_base];
        let roots: Vec<PathBuf> = roots.into_iter().flatten().collect();
        let part = |name: &str| roots.iter().map(|root| root.join(name)).find(|path| path.is_dir());
        let pick = |given: Option<PathBuf>, name: &str| {
            // A whole pipeline may stand where one of its parts is asked for.
            given.map(|path| if path.join(name).is_dir() { path.join(name) } else { path }).or_else(|| part(name))
        };
        let transformer = given(&overrides.transformer, "--transformer")?
            .map_or_else(|| super::component(&model, "transformer"), |path| super::component(&path, "transformer"));
        let text_encoder = pick(given(&overrides.text_encoder, "--text-encoder")?, "text_encoder");
        let mut tokenizer = pick(given(&overrides.tokenizer, "--tokenizer")?, "tokenizer");
        if tokenizer.is_none() {
            // Beside the text encoder, or in its folder.
            let near = text_encoder.iter().flat_map(|p| [Some(p.clone()), p.parent().map(|p| p.join("tokenizer"))]);
            tokenizer = near.flatten().find(|p| ["spiece.model", "tokenizer.json"].iter().any(|f| p.join(f).is_file()));
        }
        Ok(Components {
            transformer,
            vae: pick(given(&overrides.vae, "--vae")?, "vae"),
            text_encoder,
            tokenizer,
            scheduler: part("scheduler").map(|p| p.join("scheduler_config.json")).filter(|p| p.is_file()),
        })
    }

    /// The autoencoder.
    ///
    /// # Errors
    /// Where there is none.
    pub fn vae(&self) -> Result<&Path> {
        self.needed(self.vae.as_deref(), "the autoencoder", "vae", "--vae")
    }

    /// The text encoder and its tokenizer.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn text(&self) -> Result<(&Path, &Path)> {
        let encoder =
            self.needed(self.text_encoder.as_deref(), "the text encoder", "text_encoder", "--text-encoder")?;
        Ok((encoder, self.needed(self.tokenizer.as_deref(), "the tokenizer", "tokenizer", "--tokenizer")?))
    }

    fn needed<'p>(&self, path: Option<&'p Path>, what: &str, folder: &str, option: &str) -> Result<&'p Path> {
        path.ok_or_else(|| {
            Error::usage(format!("{}", self.transformer.display()), format!("{what} is missing"))
                .is(format!("no folder {folder}"))
                .must("beside the transformer")
                .fix(format!("give the folder of the other parts with --components, or {what} with {option}"))
        })
    }
}

/// Writes `model_index.json` and the scheduler of a text-to-image model without an autoencoder, whose other parts lie in
/// the folder: DPM-Solver++ on the linear schedule of PixArt, for a transformer that predicts noise or `velocity`.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_index(folder: &Path, velocity: bool) -> Result<()> {
    let scheduler = json!({
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "final_sigmas_type": "zero",
        "lower_order_final": true,
        "num_train_timesteps": 1000,
        "prediction_type": if velocity { "v_prediction" } else { "epsilon" },
        "solver_order": 2,
        "solver_type": "midpoint",
        "timestep_spacing": "linspace",
    });
    atomic::ensure_writable_dir(&folder.join("scheduler"))?;
    json::write(&folder.join("scheduler/scheduler_config.json"), &scheduler)?;
    let index = json!({
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [null, null],
    });
    json::write(&folder.join("model_index.json"), &index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    fn touch(path: PathBuf) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "{}").unwrap();
    }

    #[test]
    fn parts_are_found_in_every_layout() {
        let dir = test_dir("pipeline");
        for file in ["model_index.json", "transformer/config.json", "vae/config.json", "tokenizer/spiece.model"] {
            touch(dir.join("whole").join(file));
        }
        touch(dir.join("bare/transformer/config.json"));
        touch(dir.join("other/text_encoder/config.json"));
        touch(dir.join("other/scheduler/scheduler_config.json"));
        let find = |model: &str, overrides: &Overrides| Components::find(&dir.join(model), overrides).unwrap();
        let whole = find("whole", &Overrides::default());
        assert_eq!(whole.transformer, dir.join("whole/transformer"));
        assert_eq!((whole.vae().unwrap(), whole.scheduler.is_none()), (dir.join("whole/vae").as_path(), true));
        let error = whole.text().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("the text encoder is missing; is no folder text_encoder"), "{error}");
        // The transformer alone sees what lies beside it.
        assert_eq!(find("whole/transformer", &Overrides::default()).vae, whole.vae);
        let split = Overrides {
            components: Some(dir.join("other")),
            vae: Some(dir.join("whole")),
            tokenizer: Some(dir.join("whole/tokenizer/spiece.model")),
            ..Overrides::default()
        };
        let split = find("bare", &split);
        assert_eq!(split.transformer, dir.join("bare/transformer"));
        assert_eq!(split.vae, Some(dir.join("whole/vae")));
        assert_eq!(split.text().unwrap().0, dir.join("other/text_encoder"));
        assert!(split.scheduler.is_some());
        // A grafted transformer alone, and the run that it belongs to.
        touch(dir.join("run/stage1/config.json"));
        write_base(&dir.join("run/stage1"), &dir.join("whole")).unwrap();
        touch(dir.join("run/plan.toml"));
        for model in ["run/stage1", "run"] {
            let grafted = find(model, &Overrides::default());
            assert_eq!((grafted.transformer, grafted.vae), (dir.join("run/stage1"), whole.vae.clone()), "{model}");
        }
        touch(dir.join("run/stage2/config.json"));
        assert_eq!(find("run", &Overrides::default()).transformer, dir.join("run/stage2"));
        let none = Overrides { vae: Some(dir.join("none")), ..Overrides::default() };
        assert!(Components::find(&dir.join("whole"), &none).unwrap_err().to_string().contains("--vae"));
    }
}

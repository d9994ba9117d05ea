//! Reader of a `scheduler_config.json` in the diffusers layout: accepts what the engine computes exactly, refuses
//! the rest.
//!
//! Missing fields take the defaults of the scheduler class. JSON has no infinities, so the reader of the file must
//! turn the literal `-Infinity` (found in released files) into null or the string "-Infinity" first.

use crate::error::{Error, Result};
use crate::sample::dpm::DpmEndPoint;
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Prediction, Sampler};
use serde_json::{Map, Value, json};

const PLACE: &str = "scheduler_config.json";

/// Sampler and noise schedule that a model was released with.
#[derive(Clone, Debug, PartialEq)]
pub struct SolverConfig {
    /// The sampler, with the settings of the file.
    pub sampler: Sampler,
    /// The noise schedule the model was trained with.
    pub schedule: Schedule,
    /// What the model predicts.
    pub prediction: Prediction,
}

/// Fields that must have the one supported value: name, and the supported values; the first is the class default.
type Fixed = [(&'static str, &'static [&'static str])];

const COMMON: &Fixed = &[
    ("prediction_type", &["\"epsilon\"", "\"v_prediction\""]),
    ("thresholding", &["false"]),
    ("rescale_betas_zero_snr", &["false"]),
];
const DPM: &Fixed = &[
    ("algorithm_type", &["\"dpmsolver++\""]),
    ("solver_order", &["2"]),
    ("solver_type", &["\"midpoint\""]),
    ("timestep_spacing", &["\"linspace\""]),
    ("final_sigmas_type", &["\"zero\""]),
    ("lambda_min_clipped", &["null", "\"-Infinity\""]),
    ("variance_type", &["null"]),
];
const DDIM: &Fixed = &[
    ("clip_sample", &["false"]),
    ("set_alpha_to_one", &["true"]),
    ("steps_offset", &["0"]),
    ("timestep_spacing", &["\"leading\""]),
];

/// Fields without influence on the supported settings. The last-step switches of DPM-Solver++ are among them because
/// the step onto zero noise is of first order in any case; `steps_offset` only matters to other spacings there.
const IGNORED: [&str; 8] = [
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "clip_sample_range",
    "euler_at_final",
    "lower_order_final",
    "steps_offset",
    "flow_shift",
    "time_shift_type",
];
/// Fields that make up the noise schedule; checked where they are read.
const SCHEDULE: [&str; 5] = ["beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas"];

impl SolverConfig {
    /// Reads a `DPMSolverMultistepScheduler` or `DDIMScheduler` configuration.
    ///
    /// # Errors
    /// A usage error naming the field when the class, a value or an unknown active field is not supported.
    pub fn from_scheduler_json(config: &Value) -> Result<Self> {
        let fields = config
            .as_object()
            .ok_or_else(|| Error::usage(PLACE, "not a configuration").is(kind(config)).must("a JSON object"))?;
        let (sampler, fixed, required): (_, _, &[&str]) = match fields.get("_class_name").and_then(Value::as_str) {
            Some("DPMSolverMultistepScheduler") => (Sampler::DpmPlusPlus { end: DpmEndPoint::Zero }, DPM, &[]),
            // The class clips by default, which is wrong for latents: a file must switch it off explicitly.
            Some("DDIMScheduler") => (Sampler::Ddim { eta: 0.0 }, DDIM, &["clip_sample"]),
            other => {
                return Err(Error::usage(format!("{PLACE}: _class_name"), "unsupported scheduler")
                    .is(other.unwrap_or("missing"))
                    .must("DPMSolverMultistepScheduler or DDIMScheduler")
                    .fix("choose a sampler and steps explicitly"));
            }
        };
        if let Some(name) = required.iter().find(|name| !fields.contains_key(**name)) {
            return Err(Error::usage(format!("{PLACE}: {name}"), "missing").must("given"));
        }
        for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with('_')) {
            check_field(name, value, &[COMMON, fixed])?;
        }
        Ok(SolverConfig { sampler, schedule: schedule(fields)?, prediction: Prediction::stated(config) })
    }
}

impl Prediction {
    /// What a scheduler's configuration says, of whatever class it is: noise where it says nothing.
    pub fn stated(config: &Value) -> Prediction {
        match config.get("prediction_type").and_then(Value::as_str) {
            Some("v_prediction") => Prediction::Velocity,
            _ => Prediction::Noise,
        }
    }
}

/// A known field must have a supported value; an unknown one must be switched off (false or null).
fn check_field(name: &str, value: &Value, tables: &[&Fixed]) -> Result<()> {
    let known = tables.iter().flat_map(|table| table.iter()).find(|(field, _)| *field == name);
    let place = || format!("{PLACE}: {name}");
    match known {
        Some((_, supported)) if supported.contains(&value.to_string().as_str()) => Ok(()),
        Some((_, supported)) => Err(Error::usage(place(), "unsupported value").is(value).must(supported.join(" or "))),
        None if IGNORED.contains(&name) || SCHEDULE.contains(&name) => Ok(()),
        None if matches!(value, Value::Null | Value::Bool(false)) => Ok(()),
        None => Err(Error::usage(place(), "unknown setting").is(value).must("absent, null or false")),
    }
}

fn schedule(fields: &Map<String, Value>) -> Result<Schedule> {
    let number = |name: &str, default: f64| {
        let value = fields.get(name).unwrap_or(&Value::Null);
        match value {
            Value::Null => Ok(default),
            _ => value
                .as_f64()
                .ok_or_else(|| Error::usage(format!("{PLACE}: {name}"), "not a number").is(value).must("a number")),
        }
    };
    if let Some(betas) = fields.get("trained_betas").filter(|betas| !betas.is_null()) {
        let list: Option<Vec<f64>> = betas.as_array().and_then(|b| b.iter().map(Value::as_f64).collect());
        let list = list.ok_or_else(|| {
            Error::usage(format!("{PLACE}: trained_betas"), "not a list of numbers").is(kind(betas)).must("numbers")
        })?;
        return Schedule::from_betas(list).map_err(|e| e.context(PLACE));
    }
    let shape = fields.get("beta_schedule").cloned().unwrap_or_else(|| json!("linear"));
    if shape != "linear" {
        return Err(Error::usage(format!("{PLACE}: beta_schedule"), "unsupported value").is(shape).must("\"linear\""));
    }
    let count = fields.get("num_train_timesteps").cloned().unwrap_or_else(|| json!(1000));
    let timesteps = count.as_u64().filter(|n| (1..=MOST_TIMESTEPS).contains(n)).ok_or_else(|| {
        Error::usage(format!("{PLACE}: num_train_timesteps"), "out of range")
            .is(&count)
            .must(format!("1 to {MOST_TIMESTEPS}"))
    })?;
    Schedule::linear(number("beta_start", 1e-4)?, number("beta_end", 0.02)?, timesteps as usize)
        .map_err(|e| e.context(PLACE))
}

/// Bound on a file's claim, so that a damaged number cannot exhaust memory.
const MOST_TIMESTEPS: u64 = 1_000_000;

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::Case;

    fn released() -> Value {
        let text = Case::open("samplers/dpm_solver_pp_2m_n20").text("model/scheduler/scheduler_config.json");
        assert!(text.contains(": -Infinity"));
        serde_json::from_str(&text.replace(": -Infinity", ": \"-Infinity\"")).unwrap()
    }

    #[test]
    fn released_pixart_configuration() {
        let config = SolverConfig::from_scheduler_json(&released()).unwrap();
        assert_eq!(config.sampler, Sampler::DpmPlusPlus { end: DpmEndPoint::Zero });
        assert_eq!(config.schedule, Schedule::default());
    }

    #[test]
    fn ddim_configuration() {
        let mut value = json!({"_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0",
            "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": false,
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": true,
            "steps_offset": 0, "trained_betas": null});
        let config = SolverConfig::from_scheduler_json(&value).unwrap();
        assert_eq!(config.sampler, Sampler::Ddim { eta: 0.0 });
        assert_eq!(config.schedule, Schedule::default());
        value.as_object_mut().unwrap().remove("clip_sample");
        let e = SolverConfig::from_scheduler_json(&value).unwrap_err().to_string();
        assert!(e.contains("clip_sample: missing"), "{e}");
    }

    #[test]
    fn other_schedules() {
        let mut value = released();
        value["beta_end"] = json!(0.01);
        value["num_train_timesteps"] = json!(500);
        let config = SolverConfig::from_scheduler_json(&value).unwrap();
        assert_eq!(config.schedule, Schedule::linear(1e-4, 0.01, 500).unwrap());
        value["trained_betas"] = json!([0.1, 0.2]);
        let config = SolverConfig::from_scheduler_json(&value).unwrap();
        assert_eq!(config.schedule, Schedule::from_betas(vec![0.1, 0.2]).unwrap());
    }

    #[test]
    fn what_is_predicted_is_read() {
        let mut config = released();
        assert_eq!(SolverConfig::from_scheduler_json(&config).unwrap().prediction, Prediction::Noise);
        config["prediction_type"] = json!("v_prediction");
        assert_eq!(SolverConfig::from_scheduler_json(&config).unwrap().prediction, Prediction::Velocity);
    }

    #[test]
    fn unsupported_fields_are_named() {
        for (field, value) in [
            ("_class_name", json!("EulerDiscreteScheduler")),
            ("algorithm_type", json!("sde-dpmsolver++")),
            ("solver_order", json!(3)),
            ("solver_type", json!("heun")),
            ("prediction_type", json!("sample")),
            ("thresholding", json!(true)),
            ("use_karras_sigmas", json!(true)),
            ("use_flow_sigmas", json!(true)),
            ("timestep_spacing", json!("trailing")),
            ("final_sigmas_type", json!("sigma_min")),
            ("lambda_min_clipped", json!(-5.1)),
            ("variance_type", json!("learned_range")),
            ("rescale_betas_zero_snr", json!(true)),
            ("beta_schedule", json!("squaredcos_cap_v2")),
            ("num_train_timesteps", json!(0)),
            ("num_train_timesteps", json!(1e18)),
            ("beta_start", json!("small")),
            ("trained_betas", json!([0.1, "x"])),
            ("invented_setting", json!(0.5)),
        ] {
            let mut config = released();
            config[field] = value;
            let e = SolverConfig::from_scheduler_json(&config).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            assert!(e.to_string().starts_with(&format!("scheduler_config.json: {field}: ")), "{e}");
            assert!(e.to_string().contains("must be"), "{e}");
        }
        assert_eq!(SolverConfig::from_scheduler_json(&json!([])).unwrap_err().exit_code(), 2);
    }
}

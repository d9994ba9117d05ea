//! Time and memory of the stages of a long command: what is planned is told beforehand, what was used as each ends,
//! and all of it can be kept as a line of JSON.

use crate::backend::cpu;
use crate::error::Result;
use crate::io::jsonl::JsonLog;
use crate::io::system;
use crate::tensor::{Device, MemoryPlan};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What a stage is planned to hold.
pub struct Planned {
    /// Name of the stage.
    pub name: &'static str,
    /// Bytes in all, and of what they are made where that is known.
    pub bytes: usize,
    /// Parts of the bytes.
    pub parts: Option<MemoryPlan>,
}

impl Planned {
    /// A stage whose parts are known.
    pub fn of(name: &'static str, plan: MemoryPlan) -> Planned {
        Planned { name, bytes: plan.total(), parts: Some(plan) }
    }
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The lines that tell a plan: every stage with its parts, and the largest, since they follow one another.
pub fn told(planned: &[Planned]) -> Vec<String> {
    let parts = |stage: &Planned| stage.parts.as_ref().map_or(String::new(), |plan| format!(" ({plan})"));
    let mut lines: Vec<String> =
        planned.iter().map(|stage| format!("{}: {:.2} GiB{}", stage.name, gib(stage.bytes), parts(stage))).collect();
    let most = planned.iter().map(|stage| stage.bytes).max().unwrap_or(0);
    lines.push(format!("at most {:.2} GiB, as the stages follow one another", gib(most)));
    lines
}

/// Times within a stage.
pub struct Laps {
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Laps {
    /// Ends a lap: the time since the one before, in seconds.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, (now - self.last).as_secs_f64()));
        self.last = now;
    }
}

/// The stages of a command as they run.
pub struct Stages {
    planned: Vec<Planned>,
    started: Instant,
    load: Option<f64>,
    done: Vec<Value>,
}

impl Stages {
    /// Says what is planned.
    pub fn begin(planned: Vec<Planned>) -> Stages {
        let each: Vec<String> = planned.iter().map(|stage| format!("{} {:.2}", stage.name, gib(stage.bytes))).collect();
        if !each.is_empty() {
            eprintln!("memory planned, in GiB: {}", each.join(", "));
        }
        Stages { planned, started: Instant::now(), load: system::load_average(), done: Vec::new() }
    }

    /// Runs a stage that works on `device`, and says what it took: on the host the memory of the whole process, on
    /// another device that of its tensors.
    ///
    /// # Errors
    /// Those of the work.
    pub fn run<R>(
        &mut self,
        name: &'static str,
        device: &Device,
        work: impl FnOnce(&mut Laps) -> Result<R>,
    ) -> Result<R> {
        device.trim();
        device.reset_peak();
        system::forget_peak();
        let begun = Instant::now();
        let mut laps = Laps { last: begun, laps: Vec::new() };
        let result = work(&mut laps)?;
        let seconds = begun.elapsed().as_secs_f64();
        let tensors = device.memory().peak;
        let peak = if device.is_gpu() { tensors } else { system::peak_resident().unwrap_or(tensors) };
        let planned = self.planned.iter().find(|stage| stage.name == name).map(|stage| stage.bytes);
        let against = planned.map_or(String::new(), |bytes| format!(", planned {:.2}", gib(bytes)));
        eprintln!("{name}: {seconds:.1} s, {:.2} GiB at most{against}", gib(peak));
        self.done.push(json!({
            "stage": name,
            "seconds": seconds,
            "laps": laps.laps,
            "bytes_planned": planned,
            "bytes_peak": peak,
            "bytes_of_tensors": tensors,
        }));
        Ok(result)
    }

    /// Adds what ran as a line to a file, with `about` and what this machine is.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, path: &Path, about: &Value, device: &Device) -> Result<()> {
        let mut row = json!({
            "case": "text_to_image",
            "version": env!("CARGO_PKG_VERSION"),
            "processor": system::processor(),
            "device": device.describe(),
            "instructions": cpu::instruction_sets(),
            "threads": cpu::threads(),
            "load_average_before": self.load,
            "unix_time": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
            "seconds": self.started.elapsed().as_secs_f64(),
            "stages": self.done,
        });
        if let (Some(row), Some(about)) = (row.as_object_mut(), about.as_object()) {
            row.extend(about.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        JsonLog::resume(path, u64::MAX)?.append(&row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{self, test_dir};

    #[test]
    fn stages_are_timed_and_kept() {
        let device = Device::cpu();
        let mut plan = MemoryPlan::default();
        plan.add("weights", 3 << 30);
        let planned = || vec![Planned::of("work", plan.clone()), Planned { name: "rest", bytes: 1 << 30, parts: None }];
        assert_eq!(told(&planned())[0], "work: 3.00 GiB (3072.0 MiB: 3072.0 weights)");
        assert_eq!(told(&planned())[2], "at most 3.00 GiB, as the stages follow one another");
        let mut stages = Stages::begin(planned());
        let found = stages.run("work", &device, |laps| {
            let held = device.empty(&[1 << 20])?;
            laps.end("made");
            Ok(held.len())
        });
        assert_eq!(found.unwrap(), 1 << 20);
        let failed: Result<()> = stages.run("rest", &device, |_| Err(crate::error::Error::failure("a", "b")));
        assert!(failed.is_err());
        let path = test_dir("stages").join("rows.jsonl");
        for _ in 0..2 {
            stages.keep(&path, &json!({ "seed": 4 }), &device).unwrap();
        }
        let text = files::read_text(&path).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((rows.len(), &rows[1]["seed"]), (2, &json!(4)));
        let stage = &rows[1]["stages"][0];
        assert_eq!(
            (&stage["stage"], &stage["bytes_planned"], &stage["laps"][0][0]),
            (&json!("work"), &json!(3u64 << 30), &json!("made"))
        );
        assert!(stage["bytes_of_tensors"].as_u64() >= Some(4 << 20), "{stage}");
        assert_eq!(rows[1]["stages"].as_array().map(Vec::len), Some(1));
    }
}

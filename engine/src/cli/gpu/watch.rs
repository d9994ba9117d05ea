//! Clock, power, temperature and memory of the GPU while steps run, by `nvidia-smi`.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// What is asked, in the order of [`Reading`].
const QUERY: &str = "--query-gpu=clocks.sm,power.draw,temperature.gpu,memory.used";

/// One line of the tool; a value that the device does not tell is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reading {
    sm_mhz: f64,
    watts: f64,
    celsius: f64,
    mib: f64,
}

impl Reading {
    fn parse(line: &str) -> Option<Reading> {
        let mut values = line.split(',').map(|word| word.trim().parse().unwrap_or(f64::NAN));
        let mut next = || values.next();
        let reading = Reading { sm_mhz: next()?, watts: next()?, celsius: next()?, mib: next()? };
        next().is_none().then_some(reading)
    }
}

/// The tool, running; its lines are read as they come.
pub struct Watch {
    child: Child,
    readings: Arc<Mutex<Vec<Reading>>>,
}

impl Watch {
    /// Watches the first visible device; None where the tool is not there.
    pub fn start() -> Option<Watch> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let first = visible.split(',').next().filter(|d| !d.is_empty()).unwrap_or("0").to_string();
        let mut command = Command::new("nvidia-smi");
        command.args([QUERY, "--format=csv,noheader,nounits", "--loop-ms=200", "-i", &first]);
        Watch::of(command)
    }

    /// Reads what `command` prints until it is dropped.
    fn of(mut command: Command) -> Option<Watch> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let lines = BufReader::new(child.stdout.take()?).lines();
        let readings = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&readings);
        std::thread::spawn(move || {
            for reading in lines.map_while(Result::ok).filter_map(|line| Reading::parse(&line)) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).push(reading);
            }
        });
        Some(Watch { child, readings })
    }

    /// What was read since the last call: the median clock and its lowest, most power, heat and memory. Null where
    /// nothing was.
    pub fn since(&self) -> Value {
        let taken = std::mem::take(&mut *self.readings.lock().unwrap_or_else(PoisonError::into_inner));
        let sorted = |value: fn(&Reading) -> f64| {
            let mut values: Vec<f64> = taken.iter().map(value).filter(|v| v.is_finite()).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let most = |value: fn(&Reading) -> f64| sorted(value).last().copied();
        let clocks = sorted(|r| r.sm_mhz);
        if taken.is_empty() {
            return Value::Null;
        }
        json!({
            "sm_mhz": clocks.get(clocks.len() / 2),
            "sm_mhz_min": clocks.first(),
            "watts_max": most(|r| r.watts),
            "celsius_max": most(|r| r.celsius),
            "memory_mib_max": most(|r| r.mib),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_the_tool_prints_is_summed_up() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "printf '1500, 300.5, 40, 100\\n1900, 650, 55, 900\\n1800, [N/A], 50, 800\\nError\\n'"]);
        let watch = Watch::of(shell).unwrap();
        let begun = std::time::Instant::now();
        while watch.readings.lock().unwrap().len() < 3 && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let want = json!({ "sm_mhz": 1800.0, "sm_mhz_min": 1500.0, "watts_max": 650.0, "celsius_max": 55.0, "memory_mib_max": 900.0 });
        assert_eq!(watch.since(), want);
        assert_eq!(watch.since(), Value::Null);
    }

    #[test]
    fn a_machine_without_the_tool_is_not_watched() {
        assert!(Watch::of(Command::new("no-such-tool")).is_none());
    }
}

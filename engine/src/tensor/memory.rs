//! How much memory something needs, and for what: planned before it runs, on a device that only counts.

use super::Device;
use serde::Serialize;
use std::fmt;

/// Bytes by purpose, in the order in which they are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// What for, and how many bytes.
    pub parts: Vec<(&'static str, usize)>,
}

impl MemoryPlan {
    /// Adds a part.
    pub fn add(&mut self, purpose: &'static str, bytes: usize) {
        self.parts.push((purpose, bytes));
    }

    /// Adds what work on a dry device takes beyond the `before` bytes that it held: tensors that are alive at once
    /// under `purpose`, and the rest that the pool keeps because sizes differ.
    pub fn add_work(&mut self, purpose: &'static str, device: &Device, before: usize) {
        let alive = device.memory().peak.saturating_sub(before);
        self.add(purpose, alive);
        self.add("kept by the pool", device.held().saturating_sub(before + alive));
    }

    /// Bytes of one purpose.
    pub fn of(&self, purpose: &str) -> usize {
        self.parts.iter().filter(|(name, _)| *name == purpose).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes in all.
    pub fn total(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl fmt::Display for MemoryPlan {
    /// `12.5 MiB: 10.0 weights, 2.5 activations`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:.1} MiB", mib(self.total()))?;
        for (i, (purpose, bytes)) in self.parts.iter().enumerate() {
            write!(f, "{} {:.1} {purpose}", if i == 0 { ":" } else { "," }, mib(*bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_on_a_dry_device_is_counted() {
        let device = Device::dry();
        let size = 1 << 26;
        let weights = device.empty(&[size]).unwrap();
        let before = device.held();
        device.reset_peak();
        drop((device.empty(&[size]).unwrap(), device.empty(&[2 * size]).unwrap()));
        drop(device.empty(&[3 * size]).unwrap());
        let mut plan = MemoryPlan::default();
        plan.add("weights", weights.bytes());
        plan.add_work("work", &device, before);
        assert_eq!(plan.parts, [("weights", 256 << 20), ("work", 768 << 20), ("kept by the pool", 768 << 20)]);
        assert_eq!(plan.to_string(), "1792.0 MiB: 256.0 weights, 768.0 work, 768.0 kept by the pool");
        assert_eq!((plan.total(), plan.of("work")), (1792 << 20, 768 << 20));
    }
}

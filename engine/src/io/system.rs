//! What the system says: memory of this process, free space of a disk.

use std::path::Path;

use crate::error::{Error, Result};
use crate::io::files;

/// Bytes of memory that this process holds; nothing where the system does not tell.
pub fn resident() -> Option<usize> {
    stated("VmRSS:")
}

/// Most bytes that this process held since its start or the last [`forget_peak`]; nothing where the system does not
/// tell.
pub fn peak_resident() -> Option<usize> {
    stated("VmHWM:")
}

/// Has [`peak_resident`] count anew from what is held now, where the system allows it.
pub fn forget_peak() {
    // Only a convenience: where it is refused, the peak of the whole run is what is told.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn stated(field: &str) -> Option<usize> {
    let status = files::read_text(Path::new("/proc/self/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().trim_end_matches(" kB").parse::<usize>().ok()? << 10)
}

/// Name of the processor, as the system states it; the architecture where it does not.
pub fn processor() -> String {
    let info = files::read_text(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// Processes that wanted a processor over the last minute, on average; nothing where the system does not tell.
pub fn load_average() -> Option<f64> {
    files::read_text(Path::new("/proc/loadavg")).ok()?.split_whitespace().next()?.parse().ok()
}

/// Bytes that may still be written to the disk of an existing folder; nothing where the system does not tell.
///
/// # Errors
/// When the folder cannot be looked at.
#[cfg(unix)]
pub fn free_space(folder: &Path) -> Result<Option<u64>> {
    let stat = rustix::fs::statvfs(folder).map_err(|e| Error::io(folder, "ask for free space of", &e.into()))?;
    Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// As on Unix.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub fn free_space(_folder: &Path) -> Result<Option<u64>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_is_touched_is_resident() {
        let before = resident().unwrap();
        let touched = vec![1u8; 64 << 20];
        let after = resident().unwrap();
        assert!(after >= before + (48 << 20), "{before} {after} {}", touched[1 << 20]);
        assert!(peak_resident().unwrap() >= after);
    }

    #[test]
    #[cfg(unix)]
    fn a_disk_has_free_space_and_a_missing_folder_is_named() {
        assert!(free_space(&std::env::temp_dir()).unwrap().unwrap() > 0);
        let error = free_space(Path::new("/nowhere/at/all")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all: cannot ask for free space of"), "{error}");
    }
}

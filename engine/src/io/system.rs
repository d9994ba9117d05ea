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

/// The clock of the processor's cores in MHz, their mean; nothing where the system does not tell.
pub fn processor_mhz() -> Option<f64> {
    let of_core = |core: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq");
        files::read_text(Path::new(&path)).ok()?.trim().parse::<f64>().ok().map(|khz| khz / 1e3)
    };
    let clocks: Vec<f64> = (0..).map_while(of_core).collect();
    (!clocks.is_empty()).then(|| clocks.iter().sum::<f64>() / clocks.len() as f64)
}

/// Clock of a GPU's multiprocessors in MHz and its power in watts, as `nvidia-smi` tells them; nothing without it.
pub fn gpu_clock_and_power() -> (Option<f64>, Option<f64>) {
    let query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"];
    let said = std::process::Command::new("nvidia-smi").args(query).output().ok().filter(|o| o.status.success());
    let text = said.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let mut fields = text.trim().split(',').map(|field| field.trim().parse::<f64>().ok());
    (fields.next().flatten(), fields.next().flatten())
}

/// Has the system drop what it keeps of a file in memory, so that the next reader waits for the disk.
///
/// # Errors
/// A file that cannot be opened or written back, or a system that refuses.
#[cfg(target_os = "linux")]
pub fn forget_file(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, "open", &e))?;
    // What is not on the disk yet stays in memory.
    file.sync_all().map_err(|e| Error::io(path, "write back", &e))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
        .map_err(|e| Error::io(path, "drop the cached pages of", &e.into()))
}

/// Has the system drop what it keeps of a file in memory, so that the next reader waits for the disk.
///
/// # Errors
/// Always: there is no such call here.
#[cfg(not(target_os = "linux"))]
pub fn forget_file(path: &Path) -> Result<()> {
    Err(Error::failure(path.display().to_string(), "this system cannot drop the cached pages of a file"))
}

/// Reads a file from its beginning to its end by large reads, as a disk is fastest. Returns its bytes.
///
/// # Errors
/// A file that cannot be read.
pub fn read_through(path: &Path, part: usize) -> Result<u64> {
    let mut file = std::fs::File::open(path).map_err(|e| Error::io(path, "open", &e))?;
    let (mut held, mut total) = (vec![0u8; part.max(1)], 0);
    loop {
        match std::io::Read::read(&mut file, &mut held).map_err(|e| Error::io(path, "read", &e))? {
            0 => return Ok(total),
            read => total += read as u64,
        }
    }
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
    fn a_file_is_read_to_its_end_after_it_was_forgotten() {
        let path = files::test_dir("forget").join("a");
        std::fs::write(&path, vec![7u8; 100_000]).unwrap();
        forget_file(&path).unwrap();
        assert_eq!(read_through(&path, 4096).unwrap(), 100_000);
        assert!(forget_file(Path::new("/nowhere/at/all")).is_err());
    }

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

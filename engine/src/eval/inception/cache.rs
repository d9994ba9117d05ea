//! What the network saw, remembered by the content of the pictures: reference images are read once.

use super::{FEATURES, Inception, SPATIAL, Seen};
use crate::error::Result;
use crate::io::pictures::Pictures;
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{atomic, hash};
use std::collections::BTreeMap;
use std::path::Path;

/// Features of pictures: those in `cache`, or new ones, which are kept there.
///
/// # Errors
/// As [`Inception::read`], a folder that cannot be written, or a damaged file in it.
pub fn read(
    network: &Inception,
    pictures: &Pictures,
    cache: Option<&Path>,
    report: &mut dyn FnMut(usize),
) -> Result<Seen> {
    let Some(folder) = cache else { return network.read(pictures, report) };
    atomic::ensure_writable_dir(folder)?;
    let path = folder.join(format!("inception-{}.safetensors", key(network, pictures)));
    if path.exists() {
        let file = TensorFile::open(&path)?;
        let values = |name: &str, width: usize| {
            let view = file.get(name).filter(|v| v.shape == [pictures.n, width]);
            view.map(|v| v.to_f32()).transpose()
        };
        if let (Some(pool), Some(spatial)) = (values("pool3", FEATURES)?, values("spatial", SPATIAL)?) {
            return Ok(Seen { pool, spatial });
        }
    }
    let seen = network.read(pictures, report)?;
    let records = [
        TensorRecord::f32("pool3", &[pictures.n, FEATURES], &seen.pool),
        TensorRecord::f32("spatial", &[pictures.n, SPATIAL], &seen.spatial),
    ];
    safetensors::write(&path, records, &BTreeMap::new())?;
    Ok(seen)
}

/// Names the pictures and the network by their content.
fn key(network: &Inception, pictures: &Pictures) -> String {
    let shape = [pictures.n, pictures.height, pictures.width, pictures.channels];
    let parts = format!("{shape:?} {} {}", hash::sha256(pictures.pixels()), network.digest);
    hash::sha256(parts.as_bytes())[..32].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::inception::tests::blank;
    use crate::io::files::{list, test_dir};

    #[test]
    fn pictures_are_read_once_and_other_pictures_or_networks_anew() {
        let dir = test_dir("inception_cache");
        let (network, other) = (blank(0.5), blank(0.25));
        let picture = |grey: u8| Pictures::new("x", [1, 2, 2, 1], vec![grey; 4]).unwrap();
        let see = |network: &Inception, grey: u8| {
            let mut read = 0;
            let seen = super::read(network, &picture(grey), Some(&dir), &mut |n| read = n).unwrap();
            (read, seen.pool[7], seen.len())
        };
        assert_eq!(see(&network, 1), (1, 0.5, 1));
        assert_eq!(see(&network, 1), (0, 0.5, 1));
        assert_eq!(see(&network, 2), (1, 0.5, 1));
        assert_eq!(see(&other, 1), (1, 0.25, 1));
        assert_eq!(list(&dir).unwrap().len(), 3);
    }
}

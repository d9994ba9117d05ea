//! What samples are compared with: the argument of `--ref`.

use crate::error::{Error, Result};
use crate::io::datasets::{ImageSet, Split};
use crate::io::npz::Npz;
use crate::io::pictures::{self, Pictures};
use crate::train::config::DataConfig;
use std::path::{Path, PathBuf};

/// Names of data sets.
const NAMES: [&str; 3] = ["fashion-mnist", "mnist", "cifar10"];
/// Folders that hold data sets by name, in the order in which they are tried.
const PLACES: [&str; 2] = ["data-cache", "assets"];

/// Real images, or statistics of them.
#[derive(Debug)]
pub enum Real {
    /// A data set with training and test images.
    Set(DataConfig),
    /// A folder of PNGs.
    Folder(PathBuf),
    /// Arrays: statistics, or images.
    Arrays(PathBuf),
}

impl Real {
    /// Finds out what the argument names.
    ///
    /// # Errors
    /// A name that is unknown, or a path with nothing that can be compared with.
    pub fn parse(text: &str) -> Result<Real> {
        let set = |kind: &str, dir: &Path| Real::Set(DataConfig { kind: kind.into(), dir: dir.display().to_string() });
        if let Some((kind, dir)) = text.split_once('=').filter(|(kind, _)| NAMES.contains(kind)) {
            return Ok(set(kind, Path::new(dir)));
        }
        if NAMES.contains(&text) {
            let found = PLACES.iter().map(|place| Path::new(place).join(text)).find(|dir| dir.is_dir());
            let dir = found.ok_or_else(|| {
                Error::failure(format!("--ref {text}"), "data set not found")
                    .must(format!("in data-cache/{text} or assets/{text} below this folder"))
                    .fix(format!("fetch it with tools/setup/fetch_data.py, or write {text}=DIR"))
            })?;
            return Ok(set(text, &dir));
        }
        let path = Path::new(text);
        if path.is_file() && path.extension().is_some_and(|e| e == "npz") {
            return Ok(Real::Arrays(path.to_path_buf()));
        }
        if !path.is_dir() {
            return Err(Error::usage("--ref", "neither a data set nor a place with one")
                .is(format!("{text:?}"))
                .must(format!("{}, NAME=DIR, a folder, or an .npz file", NAMES.join(", "))));
        }
        if path.join("test_batch.png").exists() {
            return Ok(set("cifar10", path));
        }
        if pictures::is_folder_of_pngs(path)? {
            return Ok(Real::Folder(path.to_path_buf()));
        }
        // MNIST and Fashion-MNIST differ in the names of their classes alone, which no score uses.
        Ok(set("fashion-mnist", path))
    }

    /// The data set of this name, for what needs labels and held-out images.
    ///
    /// # Errors
    /// When it is no data set, or its files are missing or damaged.
    pub fn test_images(&self) -> Result<ImageSet> {
        match self {
            Real::Set(data) => data.load(Split::Test),
            Real::Folder(path) | Real::Arrays(path) => Err(Error::usage("--ref", "no data set with labels")
                .is(path.display())
                .must(format!("{}, or the folder of one", NAMES.join(", ")))),
        }
    }

    /// Statistics that were computed elsewhere, where these are such.
    ///
    /// # Errors
    /// A damaged file, or one with neither statistics nor images.
    pub fn statistics(&self) -> Result<Option<(Npz, String)>> {
        let Real::Arrays(path) = self else { return Ok(None) };
        let npz = Npz::open(path)?;
        let place = path.display().to_string();
        match (npz.has("mu"), npz.has("arr_0")) {
            (true, _) => Ok(Some((npz, place))),
            (false, true) => Ok(None),
            _ => Err(Error::failure(place, "neither statistics nor images").must("mu and sigma, or arr_0")),
        }
    }

    /// Real pictures without statistics or labels, at most `most`.
    ///
    /// # Errors
    /// No picture, or damaged ones.
    pub fn pictures(&self, most: Option<usize>) -> Result<Pictures> {
        let most = most.unwrap_or(usize::MAX);
        match self {
            Real::Set(data) => {
                let set = data.load(Split::Train)?;
                Pictures::of_set(&set, 0..set.n.min(most))
            }
            Real::Folder(dir) => pictures::read_folder(dir, most),
            Real::Arrays(path) => Npz::open(path)?.pictures("arr_0")?.first(most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_places() {
        let Real::Set(data) = Real::parse("mnist=/a/b=c").unwrap() else { panic!("no set") };
        assert_eq!((data.kind.as_str(), data.dir.as_str()), ("mnist", "/a/b=c"));
        let assets = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fashion-mnist");
        let Real::Set(data) = Real::parse(assets).unwrap() else { panic!("no set") };
        assert_eq!((data.kind.as_str(), data.dir.as_str()), ("fashion-mnist", assets));
        let message = |text: &str| Real::parse(text).unwrap_err().to_string();
        assert!(message("no-such-thing").contains("--ref: neither a data set"));
        assert!(message("cifar10").contains("cifar10=DIR") || Path::new("data-cache/cifar10").is_dir());
    }
}

//! Checkpoints that `torch.save` wrote (`.pt`, `.pth`, `.bin`): an uncompressed zip archive with a pickle of the object
//! tree and one entry of raw bytes per storage. Nothing in the file is executed; see [`crate::io::pickle`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::io::archive::StoredZip;
use crate::io::dtype::FileDtype;
use crate::io::files::printable;
use crate::io::map::Mapped;
use crate::io::pickle::{self, Object, Pickle, TensorRef};

/// Where a checkpoint keeps its weights, in the order of preference; without any of them it is the weights itself.
/// Averaged weights (`ema`) are the ones that published samples come from.
const WEIGHT_KEYS: [&str; 3] = ["ema", "state_dict", "model"];
/// Prefix that data-parallel training puts before every name.
const PARALLEL_PREFIX: &str = "module.";
const PICKLE: &str = "data.pkl";

/// A `torch.save` checkpoint over the bytes `B`.
#[derive(Debug)]
pub struct TorchFile<B: AsRef<[u8]> = Mapped> {
    zip: StoredZip<B>,
    pickle: Pickle,
    /// Folder of the archive that everything lies in, with a final slash; or empty.
    prefix: String,
}

/// One tensor of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct TorchTensor<'a, B: AsRef<[u8]> = Mapped> {
    file: &'a TorchFile<B>,
    /// Name in the checkpoint, without a data-parallel prefix.
    pub name: &'a str,
    tensor: &'a TensorRef,
}

impl TorchFile {
    /// Maps the checkpoint at `path` and reads its object tree; tensors are read when used.
    ///
    /// # Errors
    /// "not a torch checkpoint", "legacy torch checkpoint", "big-endian checkpoint", a damaged archive, or
    /// anything that [`pickle::parse`] refuses, e.g. "forbidden pickle global".
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&path.display().to_string(), Mapped::open(path)?)
    }

    /// As [`Mapped::release`].
    pub fn release(&self) {
        self.zip.source().release();
    }
}

impl<B: AsRef<[u8]>> TorchFile<B> {
    /// Reads a checkpoint that is already in memory; `place` names it in errors.
    ///
    /// # Errors
    /// As [`TorchFile::open`].
    pub fn parse(place: &str, bytes: B) -> Result<Self> {
        check_magic(place, bytes.as_ref())?;
        let zip = StoredZip::parse(place, bytes)?;
        let pickles = zip.names().filter(|name| *name == PICKLE || name.ends_with("/data.pkl"));
        let name = match pickles.collect::<Vec<_>>()[..] {
            [only] => only.to_owned(),
            [] => return Err(not_torch(place, "a zip archive without data.pkl")),
            _ => return Err(not_torch(place, "a zip archive with two data.pkl")),
        };
        let prefix = name[..name.len() - PICKLE.len()].to_owned();
        let order = format!("{prefix}byteorder");
        // Files from before torch 2.1 do not state it and are little-endian.
        if zip.contains(&order) && zip.get(&order)? != b"little" {
            return Err(Error::failure(place, "big-endian checkpoint")
                .must("little-endian")
                .fix("save it again on a little-endian machine, or as safetensors"));
        }
        let pickle = pickle::parse(&format!("{place}: {}", printable(&name)), zip.get(&name)?)?;
        Ok(TorchFile { zip, pickle, prefix })
    }

    /// The file's name in messages.
    pub fn place(&self) -> &str {
        self.zip.place()
    }

    /// The object tree.
    pub fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// The model's weights by name.
    ///
    /// Taken from the entry `ema`, else `state_dict`, else `model`, else from the checkpoint itself. Entries that are
    /// not tensors are training state and are left out; a `module.` prefix is removed.
    ///
    /// # Errors
    /// "no tensors in the checkpoint", "duplicate tensor name" after removing the prefix, a storage that is missing or
    /// compressed, or "size does not match" when it is not as long as the pickle says.
    pub fn state_dict(&self) -> Result<BTreeMap<&str, TorchTensor<'_, B>>> {
        let root = self.pickle.root();
        let nested = WEIGHT_KEYS.iter().filter_map(|key| self.pickle.get(root, key));
        for candidate in nested.chain([root]) {
            let tensors = self.tensors(candidate)?;
            if !tensors.is_empty() {
                return Ok(tensors);
            }
        }
        Err(Error::failure(self.place(), "no tensors in the checkpoint")
            .must(format!("a dictionary of tensors, or one below {}", WEIGHT_KEYS.join(", ")))
            .fix("save model.state_dict() with torch.save"))
    }

    /// Refuses a tensor whose storage is absent, or not as long as the pickle says; no stored bytes are read for it.
    fn check_storage(&self, name: &str, tensor: &TensorRef) -> Result<()> {
        let entry = self.entry(tensor);
        let Some(stored) = self.zip.len_of(&entry) else {
            return self.zip.get(&entry).map(|_| ()).map_err(|e| e.context(printable(name)));
        };
        if Some(stored) == tensor.storage_len.checked_mul(tensor.dtype.bits() / 8) {
            return Ok(());
        }
        Err(Error::failure(format!("{}: {}", self.place(), printable(name)), "size does not match shape and dtype")
            .is(format!("{stored} bytes of storage"))
            .must(format!("{} elements of {}", tensor.storage_len, tensor.dtype))
            .fix("the file is damaged: download or save it again"))
    }

    /// Name of the archive's entry that holds the storage of a tensor.
    fn entry(&self, tensor: &TensorRef) -> String {
        format!("{}data/{}", self.prefix, tensor.storage)
    }

    fn tensors<'a>(&'a self, object: &'a Object) -> Result<BTreeMap<&'a str, TorchTensor<'a, B>>> {
        let mut latest = BTreeMap::new();
        if let Object::Dict(pairs) = object {
            for &(key, value) in pairs {
                if let (Object::Str(name), Object::Tensor(tensor)) =
                    (self.pickle.object(key), self.pickle.object(value))
                {
                    self.check_storage(name, tensor)?;
                    latest.insert(&**name, &**tensor);
                }
            }
        }
        let mut tensors = BTreeMap::new();
        for (full, tensor) in latest {
            let name = full.strip_prefix(PARALLEL_PREFIX).unwrap_or(full);
            if tensors.insert(name, TorchTensor { file: self, name, tensor }).is_some() {
                return Err(Error::failure(format!("{}: {}", self.place(), printable(name)), "duplicate tensor name")
                    .is(format!("there with and without {PARALLEL_PREFIX}"))
                    .must("there once"));
            }
        }
        Ok(tensors)
    }
}

/// Tells the file kinds apart that people take for each other.
fn check_magic(place: &str, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"PK\x03\x04") {
        return Ok(());
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(not_torch(place, "a pointer of Git LFS, not the file itself").fix("fetch it with git lfs pull"));
    }
    // Before torch 1.6 a checkpoint was a row of bare pickles.
    if bytes.starts_with(&[0x80, 0x02]) {
        return Err(Error::failure(place, "legacy torch checkpoint")
            .is("the format from before torch 1.6")
            .must("the zip format")
            .fix("in a safe environment, torch.load it and torch.save it again, or save it as safetensors"));
    }
    Err(not_torch(place, "no zip archive"))
}

fn not_torch(place: &str, is: &str) -> Error {
    Error::failure(place, "not a torch checkpoint").is(is).must("a file that torch.save wrote").fix("check the path")
}

impl<'a, B: AsRef<[u8]>> TorchTensor<'a, B> {
    /// File and tensor, for the place of an error.
    pub fn place(&self) -> String {
        format!("{}: {}", self.file.place(), printable(self.name))
    }

    /// Element type in the file.
    pub fn dtype(&self) -> FileDtype {
        self.tensor.dtype
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        &self.tensor.shape
    }

    /// Little-endian elements in row-major order; a copy only when the tensor is stored otherwise.
    ///
    /// # Errors
    /// A missing, compressed or damaged archive entry.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        let tensor = self.tensor;
        // Storages have byte-wide elements only, `TensorRef::fits` bounded all products by the storage, and
        // `check_storage` has compared its length.
        let width = tensor.dtype.bits() / 8;
        let storage = self.file.zip.get(&self.file.entry(tensor)).map_err(|e| e.context(printable(self.name)))?;
        if tensor.is_empty() {
            return Ok(Cow::Borrowed(&[]));
        }
        let count: usize = tensor.shape.iter().product();
        if is_contiguous(tensor) {
            return Ok(Cow::Borrowed(&storage[tensor.offset * width..][..count * width]));
        }
        let mut out = Vec::with_capacity(count * width);
        let mut index = vec![0; tensor.shape.len()];
        for _ in 0..count {
            let at: usize = index.iter().zip(&tensor.strides).map(|(i, s)| i * s).sum::<usize>() + tensor.offset;
            out.extend_from_slice(&storage[at * width..][..width]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < tensor.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Ok(Cow::Owned(out))
    }

    /// Elements as `f32`; exactness as [`FileDtype::decode_f32`].
    ///
    /// # Errors
    /// Those of [`TorchTensor::bytes`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.tensor.dtype.decode_f32(&self.bytes()?, &self.place())
    }

    /// Integer elements as `i64`.
    ///
    /// # Errors
    /// Those of [`TorchTensor::bytes`], and "unsupported dtype" for floating-point types.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        self.tensor.dtype.decode_i64(&self.bytes()?, &self.place())
    }
}

/// Whether the elements lie in row-major order without gaps; the stride of a dimension of one does not matter.
fn is_contiguous(tensor: &TensorRef) -> bool {
    let mut expected = 1;
    tensor.shape.iter().zip(&tensor.strides).rev().all(|(&dim, &stride)| {
        let fits = dim == 1 || stride == expected;
        expected *= dim;
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::archive::stored_zip;
    use crate::io::files::{golden, read_bytes};
    use zip::CompressionMethod::Stored;

    fn checkpoint(name: &str) -> TorchFile {
        TorchFile::open(&golden(&format!("dit_original/pickle_checkpoint/model/{name}"))).unwrap()
    }

    #[test]
    fn averaged_weights_win_and_equal_the_flat_file() {
        let (nested, flat) = (checkpoint("checkpoint.pt"), checkpoint("flat.pt"));
        let (ema, flat) = (nested.state_dict().unwrap(), flat.state_dict().unwrap());
        assert_eq!(ema.len(), 32);
        assert!(ema.keys().eq(flat.keys()));
        for (name, tensor) in &ema {
            assert_eq!(tensor.shape(), flat[name].shape());
            assert_eq!(tensor.to_f32().unwrap(), flat[name].to_f32().unwrap(), "{name}");
        }
        let raw = nested.tensors(nested.pickle.get(nested.pickle.root(), "model").unwrap()).unwrap();
        let weight = "x_embedder.proj.weight";
        assert_eq!(ema[weight].shape(), [24, 4, 2, 2]);
        assert_ne!(ema[weight].to_f32().unwrap(), raw[weight].to_f32().unwrap());
    }

    #[test]
    fn code_is_refused_and_not_run() {
        let path = golden("dit_original/pickle_must_be_refused/model/checkpoint.pt");
        let error = TorchFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("forbidden pickle global posix.system"), "{error}");
        assert!(!Path::new("golden_marker_must_not_exist").exists());
    }

    /// A checkpoint `{<key>: <2 x 2 tensor with the given strides>, "epoch": 3}` over the floats 1, 2, 3, 4, 5.
    fn matrix(key: &str, arguments: &[u8], byteorder: &[u8]) -> Vec<u8> {
        let mut pickle = b"\x80\x02}(X".to_vec();
        pickle.extend((key.len() as u32).to_le_bytes());
        pickle.extend(key.as_bytes());
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n");
        pickle.extend(b"X\x01\0\0\x000X\x03\0\0\0cpuK\x05tQ");
        pickle.extend(arguments);
        pickle.extend(b"\x89NtRX\x05\0\0\0epochK\x03u.");
        let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        stored_zip(&[("a/data.pkl", &pickle), ("a/byteorder", byteorder), ("a/data/0", &data)], Stored)
    }

    #[test]
    fn strides_offsets_and_prefix() {
        // Offset, shape and strides as pickled; the elements they pick.
        let cases: [(&[u8], [f32; 4]); 3] = [
            (b"K\0K\x02K\x02\x86K\x02K\x01\x86", [1.0, 2.0, 3.0, 4.0]),
            (b"K\x01K\x02K\x02\x86K\x01K\x02\x86", [2.0, 4.0, 3.0, 5.0]),
            (b"K\x01K\x02K\x02\x86K\x02K\x01\x86", [2.0, 3.0, 4.0, 5.0]),
        ];
        for (arguments, expected) in cases {
            let file = TorchFile::parse("f", matrix("module.w", arguments, b"little")).unwrap();
            let weights = file.state_dict().unwrap();
            assert_eq!(weights.keys().copied().collect::<Vec<_>>(), ["w"]);
            assert_eq!(weights["w"].shape(), [2, 2]);
            assert_eq!(weights["w"].to_f32().unwrap(), expected);
        }
    }

    #[test]
    fn foreign_files_are_told_apart() {
        let problem = |bytes: &[u8]| TorchFile::parse("f", bytes).unwrap_err().problem().to_owned();
        assert_eq!(problem(b""), "not a torch checkpoint");
        assert_eq!(problem(&[0x80, 0x02, 0x8a]), "legacy torch checkpoint");
        assert_eq!(problem(&matrix("w", b"K\0K\x02K\x02\x86K\x02K\x01\x86", b"big")), "big-endian checkpoint");
        assert_eq!(problem(&stored_zip(&[("a", b"")], Stored)), "not a torch checkpoint");
        assert_eq!(problem(&stored_zip(&[("a/data.pkl", b"}.")], Stored)[..40]), "damaged zip archive");
        let empty = TorchFile::parse("f", stored_zip(&[("a/data.pkl", b"}.")], Stored)).unwrap();
        assert_eq!(empty.state_dict().unwrap_err().problem(), "no tensors in the checkpoint");
    }

    #[test]
    fn damaged_storage_is_noticed() {
        let path = golden("dit_original/pickle_checkpoint/model/flat.pt");
        let mut bytes = read_bytes(&path).unwrap();
        let zip = StoredZip::parse("f", &bytes[..]).unwrap();
        let at = zip.get("flat/data/3").unwrap().as_ptr().addr() - bytes.as_ptr().addr();
        bytes[at] ^= 1;
        let file = TorchFile::parse("f", &bytes[..]).unwrap();
        let weights = file.state_dict().unwrap();
        let error = weights["t_embedder.mlp.0.weight"].to_f32().unwrap_err().to_string();
        assert!(error.contains("t_embedder.mlp.0.weight") && error.contains("damaged zip entry"), "{error}");
    }
}

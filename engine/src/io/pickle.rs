//! A restricted unpickler: it reads the object tree of a `torch.save` file and executes nothing.
//!
//! A pickle is a program for a small stack machine that may call any Python function by name. This reader knows a
//! closed list of names ([`Global`]), and "calling" one of them only builds inert data: a tensor becomes a description
//! of where its bytes lie. Any other name is refused. Objects live in an arena and refer to each other by index,
//! as pickles may share objects and even form cycles. The stack machine itself is in the private module `unpickle`.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::unpickle::Machine;

/// Longest accepted pickle. The tensors' bytes are not in it; the largest real ones have a few megabytes.
const MAX_BYTES: usize = 64 << 20;

/// Index of an object in its [`Pickle`].
pub type Id = u32;

/// A tensor as the pickle describes it; its bytes lie elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRef {
    /// Element type of the storage.
    pub dtype: FileDtype,
    /// Name of the storage that holds the elements; several tensors may share one.
    pub storage: Arc<str>,
    /// Elements in the storage.
    pub storage_len: usize,
    /// Position of the first element in the storage.
    pub offset: usize,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Distance in elements between neighbours of each dimension.
    pub strides: Vec<usize>,
}

impl TensorRef {
    /// Elements of the tensor; `None` when the count overflows.
    pub fn len(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
    }

    /// Whether a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Whether every element lies in the storage, and the elements are no more than the storage has: a tensor that
    /// repeats elements could otherwise claim any amount of memory.
    pub(super) fn fits(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |at, (&dim, &stride)| {
            // A dimension is at least 1 here.
            at.checked_add((dim - 1).checked_mul(stride)?)
        });
        last.is_some_and(|last| last < self.storage_len) && self.len().is_some_and(|n| n <= self.storage_len)
    }
}

/// The names that a pickle may mention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Global {
    /// `collections.OrderedDict`: read as a dictionary.
    OrderedDict,
    /// `argparse.Namespace`: training arguments, read as a dictionary.
    Namespace,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// `torch.<Type>Storage`.
    Storage(FileDtype),
    /// `torch.Size`: read as a tuple.
    Size,
    /// `torch.device`: read as [`Object::Opaque`].
    Device,
    /// `_codecs.encode`: how old protocols write bytes.
    Encode,
}

impl Global {
    /// The known name `module.name`, if it is one.
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("argparse", "Namespace") => Global::Namespace,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "Size") => Global::Size,
            ("torch", "device") => Global::Device,
            ("_codecs", "encode") => Global::Encode,
            ("torch", storage) => Global::Storage(match storage {
                "FloatStorage" => FileDtype::F32,
                "HalfStorage" => FileDtype::F16,
                "BFloat16Storage" => FileDtype::Bf16,
                "DoubleStorage" => FileDtype::F64,
                "LongStorage" => FileDtype::I64,
                "IntStorage" => FileDtype::I32,
                "ShortStorage" => FileDtype::I16,
                "CharStorage" => FileDtype::I8,
                "ByteStorage" => FileDtype::U8,
                "BoolStorage" => FileDtype::Bool,
                _ => return None,
            }),
            _ => return None,
        })
    }
}

/// One object of a pickle.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// Text.
    Str(Arc<str>),
    /// Bytes.
    Bytes(Arc<[u8]>),
    /// A list or a set.
    List(Vec<Id>),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A dictionary, ordered dictionary or namespace, as pairs in file order; a later key replaces an earlier one.
    Dict(Vec<(Id, Id)>),
    /// A name from the closed list.
    Global(Global),
    /// A reference to `len` elements of a storage.
    Storage {
        /// Element type.
        dtype: FileDtype,
        /// Name of the storage.
        key: Arc<str>,
        /// Elements in it.
        len: usize,
    },
    /// A tensor.
    Tensor(Box<TensorRef>),
    /// Something without meaning for weights: a device, or an integer beyond 64 bits.
    Opaque,
}

/// A pickle that was read.
#[derive(Debug)]
pub struct Pickle {
    pub(super) objects: Vec<Object>,
    pub(super) root: Id,
}

impl Pickle {
    /// The outermost object.
    pub fn root(&self) -> &Object {
        self.object(self.root)
    }

    /// The object at `id`; [`Object::None`] for an index that is not from this pickle.
    pub fn object(&self, id: Id) -> &Object {
        self.objects.get(id as usize).unwrap_or(&Object::None)
    }

    /// The value of text key `key` when `object` is a dictionary that has it.
    pub fn get(&self, object: &Object, key: &str) -> Option<&Object> {
        let Object::Dict(pairs) = object else { return None };
        let is_key = |id: Id| matches!(self.object(id), Object::Str(text) if **text == *key);
        pairs.iter().rev().find(|(k, _)| is_key(*k)).map(|(_, v)| self.object(*v))
    }
}

/// Reads the pickle `bytes`; `place` names it in errors.
///
/// # Errors
/// "forbidden pickle global" with its name, "unsupported pickle opcode", "damaged pickle", "pickle too large", or
/// "invalid tensor in pickle". Nothing of the pickle is ever executed.
pub fn parse(place: &str, bytes: &[u8]) -> Result<Pickle> {
    if bytes.len() > MAX_BYTES {
        return Err(Error::failure(place, "pickle too large")
            .is(format!("{} bytes", bytes.len()))
            .must(format!("at most {MAX_BYTES} bytes"))
            .fix("save the weights alone, without training state"));
    }
    Machine::new(place, bytes).run()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `c<module>\n<name>\n`: the opcode that names a global.
    fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }

    fn read(parts: &[&[u8]]) -> Result<Pickle> {
        parse("f", &[&[0x80, 2], &parts.concat()[..], b"."].concat())
    }

    fn problem(parts: &[&[u8]]) -> String {
        read(parts).unwrap_err().to_string()
    }

    #[test]
    fn plain_values() {
        let p = read(&[b"}(X\x01\0\0\0aK\x05X\x01\0\0\0bG\x3f\xf8\0\0\0\0\0\0X\x01\0\0\0c\x8a\x02\xff\xffu"]).unwrap();
        assert_eq!(p.get(p.root(), "a"), Some(&Object::Int(5)));
        assert_eq!(p.get(p.root(), "b"), Some(&Object::Float(1.5)));
        assert_eq!(p.get(p.root(), "c"), Some(&Object::Int(-1)));
        assert_eq!(p.get(p.root(), "d"), None);
    }

    /// What Python 3.11 writes for `{'args': Namespace(lr=0.5, n=None), 'l': [1, -2, 2**70, True], 't': (1, 2, 3, 4),
    /// 'b': b'\x00\xff'}` with protocols 2 to 5.
    #[test]
    fn protocols_of_python() {
        #[rustfmt::skip]
        let dumps: [&[u8]; 4] = [
            b"\x80\x02}q\0(X\x04\0\0\0argsq\x01cargparse\nNamespace\nq\x02)\x81q\x03}q\x04(X\x02\0\0\0lrq\x05\
              G?\xe0\0\0\0\0\0\0X\x01\0\0\0nq\x06NubX\x01\0\0\0lq\x07]q\x08(K\x01J\xfe\xff\xff\xff\x8a\x09\0\
              \0\0\0\0\0\0\0@\x88eX\x01\0\0\0tq\x09(K\x01K\x02K\x03K\x04tq\nX\x01\0\0\0bq\x0bc_codecs\nencode\
              \nq\x0cX\x03\0\0\0\0\xc3\xbfq\x0dX\x06\0\0\0latin1q\x0e\x86q\x0fRq\x10u.",
            b"\x80\x03}q\0(X\x04\0\0\0argsq\x01cargparse\nNamespace\nq\x02)\x81q\x03}q\x04(X\x02\0\0\0lrq\x05\
              G?\xe0\0\0\0\0\0\0X\x01\0\0\0nq\x06NubX\x01\0\0\0lq\x07]q\x08(K\x01J\xfe\xff\xff\xff\x8a\x09\0\
              \0\0\0\0\0\0\0@\x88eX\x01\0\0\0tq\x09(K\x01K\x02K\x03K\x04tq\nX\x01\0\0\0bq\x0bC\x02\0\xffq\x0c\
              u.",
            b"\x80\x04\x95s\0\0\0\0\0\0\0}\x94(\x8c\x04args\x94\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\
              \x94)\x81\x94}\x94(\x8c\x02lr\x94G?\xe0\0\0\0\0\0\0\x8c\x01n\x94Nub\x8c\x01l\x94]\x94(K\x01J\
              \xfe\xff\xff\xff\x8a\x09\0\0\0\0\0\0\0\0@\x88e\x8c\x01t\x94(K\x01K\x02K\x03K\x04t\x94\x8c\x01b\
              \x94C\x02\0\xff\x94u.",
            b"\x80\x05\x95s\0\0\0\0\0\0\0}\x94(\x8c\x04args\x94\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\
              \x94)\x81\x94}\x94(\x8c\x02lr\x94G?\xe0\0\0\0\0\0\0\x8c\x01n\x94Nub\x8c\x01l\x94]\x94(K\x01J\
              \xfe\xff\xff\xff\x8a\x09\0\0\0\0\0\0\0\0@\x88e\x8c\x01t\x94(K\x01K\x02K\x03K\x04t\x94\x8c\x01b\
              \x94C\x02\0\xff\x94u.",
        ];
        for dump in dumps {
            let p = parse("f", dump).unwrap();
            let get = |key| p.get(p.root(), key).unwrap();
            assert_eq!(p.get(get("args"), "lr"), Some(&Object::Float(0.5)));
            assert_eq!(p.get(get("args"), "n"), Some(&Object::None));
            assert_eq!(get("b"), &Object::Bytes([0, 255].into()));
            let (Object::List(list), Object::Tuple(tuple)) = (get("l"), get("t")) else { panic!("{p:?}") };
            let list: Vec<_> = list.iter().map(|&id| p.object(id)).collect();
            assert_eq!(list, [&Object::Int(1), &Object::Int(-2), &Object::Opaque, &Object::Bool(true)]);
            assert_eq!((tuple.len(), p.object(tuple[3])), (4, &Object::Int(4)));
        }
    }

    #[test]
    fn forbidden_globals_are_named() {
        for (module, name) in [("posix", "system"), ("builtins", "eval"), ("torch", "load"), ("os", "system\u{7}")] {
            let error = problem(&[&global(module, name)]);
            let shown = format!("forbidden pickle global {module}.{}", name.escape_debug());
            assert!(error.contains(&shown), "{error}");
        }
        // The same through the stack (protocol 4).
        let error = problem(&[b"\x8c\x02nt\x8c\x06system\x93"]);
        assert!(error.contains("forbidden pickle global nt.system"), "{error}");
    }

    #[test]
    fn namespace_and_ordered_dict_are_dictionaries() {
        let args = read(&[&global("argparse", "Namespace"), b")\x81}X\x02\0\0\0lrK\x03sb"]).unwrap();
        assert_eq!(args.get(args.root(), "lr"), Some(&Object::Int(3)));
        // The attributes of an ordered dictionary (`_metadata` of a state dict) are not its items.
        let dict = read(&[&global("collections", "OrderedDict"), b")RX\x01\0\0\0xK\x07s}X\x01\0\0\0yK\x08sb"]).unwrap();
        assert_eq!(dict.get(dict.root(), "x"), Some(&Object::Int(7)));
        assert_eq!(dict.get(dict.root(), "y"), None);
    }

    /// A tensor over 4 floats with the given rebuild arguments after the storage.
    fn tensor(arguments: &[u8]) -> Result<Pickle> {
        let storage =
            [b"((X\x07\0\0\0storage", &global("torch", "FloatStorage")[..], b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"];
        read(&[&global("torch._utils", "_rebuild_tensor_v2"), &storage.concat(), arguments, b"\x89NtR"])
    }

    #[test]
    fn tensors_are_described() {
        // Offset 0, shape (2, 2), strides (1, 2): a transposed matrix.
        let p = tensor(b"K\0K\x02K\x02\x86K\x01K\x02\x86").unwrap();
        let Object::Tensor(tensor) = p.root() else { panic!("{:?}", p.root()) };
        assert_eq!((tensor.dtype, tensor.offset, tensor.storage_len), (FileDtype::F32, 0, 4));
        assert_eq!((&tensor.shape[..], &tensor.strides[..], &*tensor.storage), (&[2, 2][..], &[1, 2][..], "0"));
    }

    #[test]
    fn tensors_outside_their_storage_are_refused() {
        for (arguments, why) in [
            (&b"K\x01K\x02K\x02\x86K\x02K\x01\x86"[..], "offset 1 over the end"),
            (b"K\0K\x02K\x02\x86K\x01\x85", "ranks differ"),
            (b"K\0J\xff\xff\xff\xff\x85K\x01\x85", "negative dimension"),
            (b"K\0J\0\0\0\x40\x85K\0\x85", "a billion elements over one"),
        ] {
            let error = tensor(arguments).unwrap_err().to_string();
            assert!(error.contains("invalid tensor in pickle"), "{why}: {error}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        assert!(parse("f", b"").unwrap_err().problem().contains("damaged pickle"));
        for bad in [
            &b"0"[..],
            b"(1",
            b"t",
            b"h\x05",
            b"X\xff\xff\xff\xffa",
            b"Na",
            b"}(Nu",
            b"NNR",
            b"NNb",
            b"NQ",
            b"\x85",
            b"]Q",
        ] {
            let error = problem(&[bad]);
            assert!(error.contains("damaged pickle"), "{bad:?}: {error}");
        }
        assert!(problem(&[b"iposix\nsystem\n"]).contains("unsupported pickle opcode; is 0x69"));
    }

    #[test]
    fn repetition_is_bounded() {
        let many = vec![b'N'; 5 << 20];
        assert!(problem(&[&many]).contains("pickle too large"));
    }

    #[test]
    fn cycles_do_no_harm() {
        let p = read(&[b"]q\0h\0a"]).unwrap();
        assert_eq!(p.root(), &Object::List(vec![0]));
    }
}

//! What the known names of a pickle mean: each builds inert data, none calls anything.

use std::fmt::Display;

use crate::error::{Error, Result};
use crate::io::files::printable;
use crate::io::pickle::{Global, Id, Object, TensorRef};
use crate::io::unpickle::Machine;

/// Most dimensions of a tensor.
const MAX_RANK: usize = 32;

impl Machine<'_> {
    fn bad_tensor(&self, is: impl Display) -> Error {
        self.error("invalid tensor in pickle").is(is).fix("save the tensor with .contiguous(), or as safetensors")
    }

    pub(super) fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let global = Global::find(module, name).ok_or_else(|| {
            let shown = printable(&format!("{module}.{name}"));
            self.error(&format!("forbidden pickle global {shown}"))
                .is("a function or class that could run code")
                .must("tensors, numbers, text and plain containers only")
                .fix("nothing was executed; if you trust the file, save its weights as safetensors where it was made")
        })?;
        self.push(Object::Global(global))
    }

    /// REDUCE and NEWOBJ: builds the inert meaning of `callee(*arguments)`.
    pub(super) fn call(&mut self, callee: Id, arguments: Id) -> Result<()> {
        let &Object::Global(global) = self.object(callee) else {
            return Err(self.damaged("a call of something that is not a name"));
        };
        let Object::Tuple(arguments) = self.object(arguments) else {
            return Err(self.damaged("a call without an argument tuple"));
        };
        let object = match (global, &arguments[..]) {
            (Global::OrderedDict | Global::Namespace, []) => Object::Dict(Vec::new()),
            (Global::OrderedDict, &[items]) => {
                let pairs = self.pair_list(items)?;
                self.spend(pairs.len())?;
                Object::Dict(pairs)
            }
            (Global::RebuildTensor, &[storage, offset, shape, strides, _, _])
            | (Global::RebuildTensor, &[storage, offset, shape, strides, _, _, _]) => {
                let tensor = self.tensor(storage, offset, shape, strides)?;
                // A tensor and each of its dimensions weigh more than an object does.
                self.spend(8 + 4 * tensor.shape.len())?;
                Object::Tensor(Box::new(tensor))
            }
            (Global::RebuildParameter, &[tensor, _, _]) => {
                // The parameter is its tensor.
                return match self.object(tensor) {
                    Object::Tensor(_) => self.push_id(tensor),
                    _ => Err(self.damaged("a parameter that is not a tensor")),
                };
            }
            (Global::Size, &[dims]) if matches!(self.object(dims), Object::Tuple(_) | Object::List(_)) => {
                return self.push_id(dims);
            }
            (Global::Device, _) => Object::Opaque,
            (Global::Encode, &[text, encoding]) => {
                let bytes = self.encode(text, encoding)?;
                self.spend(bytes.len())?;
                Object::Bytes(bytes.into())
            }
            _ => return Err(self.damaged("a call with unexpected arguments")),
        };
        self.push(object)?;
        if global == Global::Namespace {
            let id = self.top()?;
            self.namespaces.insert(id);
        }
        Ok(())
    }

    fn pair_list(&self, items: Id) -> Result<Vec<(Id, Id)>> {
        let (Object::List(items) | Object::Tuple(items)) = self.object(items) else {
            return Err(self.damaged("a dictionary of something that is not a list"));
        };
        let pair = |&item: &Id| match self.object(item) {
            Object::List(pair) | Object::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => Err(self.damaged("a dictionary entry that is not a pair")),
        };
        items.iter().map(pair).collect()
    }

    /// `text.encode("latin1")`, how protocols before 3 write bytes.
    fn encode(&self, text: Id, encoding: Id) -> Result<Vec<u8>> {
        let latin1 = self.str_at(encoding).is_some_and(|e| matches!(&*e, "latin1" | "latin-1"));
        let text = self.str_at(text).filter(|_| latin1);
        let bytes = text.and_then(|text| text.chars().map(|c| u8::try_from(c).ok()).collect());
        bytes.ok_or_else(|| self.damaged("bytes in an unknown encoding"))
    }

    /// BUILD: sets the attributes of an object. They are the items of a namespace and without meaning elsewhere.
    pub(super) fn build(&mut self) -> Result<()> {
        let (state, target) = (self.pop()?, self.top()?);
        if !matches!(self.object(target), Object::Dict(_)) {
            return Err(self.damaged("attributes for something that has none"));
        }
        if self.namespaces.contains(&target) {
            let Object::Dict(pairs) = self.object(state) else {
                return Err(self.damaged("attributes that are not a dictionary"));
            };
            let pairs = pairs.clone();
            self.spend(pairs.len())?;
            self.extend_dict(&pairs)?;
        }
        Ok(())
    }

    /// The persistent id `("storage", class, key, location, length)`.
    pub(super) fn storage(&self, id: Id) -> Result<Object> {
        let bad = || self.damaged("a persistent id that is not a storage");
        let Object::Tuple(parts) = self.object(id) else { return Err(bad()) };
        let &[tag, class, key, _location, len] = &parts[..] else { return Err(bad()) };
        let is_storage = self.str_at(tag).is_some_and(|tag| &*tag == "storage");
        match (self.object(class), self.str_at(key), self.object(len)) {
            (&Object::Global(Global::Storage(dtype)), Some(key), &Object::Int(len)) if is_storage => {
                let len = usize::try_from(len).map_err(|_| bad())?;
                Ok(Object::Storage { dtype, key, len })
            }
            _ => Err(bad()),
        }
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Result<TensorRef> {
        let Object::Storage { dtype, key, len } = self.object(storage) else {
            return Err(self.bad_tensor("without a storage"));
        };
        let (shape, strides) = (self.dims(shape)?, self.dims(strides)?);
        let offset = self.dim(offset)?;
        if shape.len() != strides.len() {
            return Err(self.bad_tensor(format!("shape {shape:?} with strides {strides:?}")));
        }
        let tensor = TensorRef { dtype: *dtype, storage: key.clone(), storage_len: *len, offset, shape, strides };
        if !tensor.fits() {
            let TensorRef { storage_len, offset, shape, strides, .. } = tensor;
            return Err(self.bad_tensor(format!(
                "shape {shape:?}, strides {strides:?}, offset {offset} over a storage of {storage_len} elements"
            )));
        }
        Ok(tensor)
    }

    fn dim(&self, id: Id) -> Result<usize> {
        match *self.object(id) {
            Object::Int(value) => usize::try_from(value).map_err(|_| self.bad_tensor(value)),
            _ => Err(self.bad_tensor("a dimension that is not an integer")),
        }
    }

    fn dims(&self, id: Id) -> Result<Vec<usize>> {
        match self.object(id) {
            Object::Tuple(dims) | Object::List(dims) if dims.len() <= MAX_RANK => {
                dims.iter().map(|&id| self.dim(id)).collect()
            }
            _ => Err(self.bad_tensor("a shape that is not a short tuple")),
        }
    }
}

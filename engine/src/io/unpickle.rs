//! The stack machine behind [`crate::io::pickle`].
//!
//! Opcodes are those of Python's `pickletools`, protocols 2 to 5, without the ones that name a function in any other way
//! than the two that [`Global::find`] judges. Work and memory are bounded: every opcode that makes or copies a
//! reference pays from one budget, and nothing is allocated by a length that the bytes do not back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::files::printable;
use crate::io::pickle::{Global, Id, Object, Pickle, TensorRef};

/// Most objects and references of one pickle.
const MAX_OBJECTS: usize = 4 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 32;
/// Longest module or function name.
const MAX_NAME: usize = 1024;

/// The stack machine.
pub(super) struct Machine<'a> {
    place: &'a str,
    bytes: &'a [u8],
    /// Position of the next byte.
    at: usize,
    /// Position of the current opcode, for messages.
    op_at: usize,
    stack: Vec<Id>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    objects: Vec<Object>,
    /// Which dictionaries stand for an object whose attributes are the items.
    namespaces: HashSet<Id>,
    /// Objects and references made so far.
    spent: usize,
}

impl<'a> Machine<'a> {
    /// A machine about to read `bytes`; `place` names them in errors.
    pub(super) fn new(place: &'a str, bytes: &'a [u8]) -> Self {
        Machine {
            place,
            bytes,
            at: 0,
            op_at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            objects: Vec::new(),
            namespaces: HashSet::new(),
            spent: 0,
        }
    }

    /// Runs to the STOP opcode.
    pub(super) fn run(mut self) -> Result<Pickle> {
        loop {
            self.op_at = self.at;
            let [opcode] = self.take()?;
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok(Pickle { objects: self.objects, root });
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => {
                // Protocol number; each opcode is judged on its own.
                self.take::<1>()?;
            }
            0x95 => {
                // A frame only announces the bytes that follow.
                self.take::<8>()?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let top = self.top()?;
                self.push_id(top)?;
            }
            b'N' => self.push(Object::None)?,
            0x88 => self.push(Object::Bool(true))?,
            0x89 => self.push(Object::Bool(false))?,
            b'J' => {
                let value = i32::from_le_bytes(self.take()?);
                self.push(Object::Int(value.into()))?;
            }
            b'K' => {
                let [value] = self.take()?;
                self.push(Object::Int(value.into()))?;
            }
            b'M' => {
                let value = u16::from_le_bytes(self.take()?);
                self.push(Object::Int(value.into()))?;
            }
            0x8a => self.long::<1>()?,
            0x8b => self.long::<4>()?,
            b'G' => {
                let value = f64::from_be_bytes(self.take()?);
                self.push(Object::Float(value))?;
            }
            0x8c => self.text::<1>()?,
            b'X' => self.text::<4>()?,
            0x8d => self.text::<8>()?,
            // Python 2 strings: text or bytes, whatever they hold.
            b'U' => self.old_string::<1>()?,
            b'T' => self.old_string::<4>()?,
            b'C' => self.binary::<1>()?,
            b'B' => self.binary::<4>()?,
            0x8e | 0x96 => self.binary::<8>()?,
            b']' | 0x8f => self.push(Object::List(Vec::new()))?,
            b')' => self.push(Object::Tuple(Vec::new()))?,
            b'}' => self.push(Object::Dict(Vec::new()))?,
            b'l' | 0x91 => {
                let items = self.pop_mark()?;
                self.push(Object::List(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push(Object::Tuple(items))?;
            }
            0x85..=0x87 => {
                let height = self.stack.len().checked_sub(usize::from(opcode - 0x84));
                let height = height.filter(|&h| h >= self.floor()).ok_or_else(|| self.damaged("stack underflow"))?;
                let items = self.stack.split_off(height);
                self.push(Object::Tuple(items))?;
            }
            b'd' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.push(Object::Dict(pairs))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(&[item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.extend_list(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(&[(key, value)])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.extend_dict(&pairs)?;
            }
            b'q' => {
                let [slot] = self.take()?;
                self.memoize(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.take()?);
                self.memoize(slot)?;
            }
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => {
                let [slot] = self.take()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.take()?);
                self.recall(slot)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.str_at(module), self.str_at(name)) {
                    (Some(module), Some(name)) => self.global(&module, &name)?,
                    _ => return Err(self.damaged("a global whose name is not text")),
                }
            }
            b'R' | 0x81 => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                self.call(callee, arguments)?;
            }
            b'b' => self.build()?,
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage)?;
            }
            _ => {
                return Err(self
                    .error("unsupported pickle opcode")
                    .is(format!("0x{opcode:02x}"))
                    .must("an opcode that torch.save writes")
                    .fix("save the weights again with torch.save, or as safetensors"));
            }
        }
        Ok(())
    }

    // ---- errors and budget

    fn error(&self, problem: &str) -> Error {
        Error::failure(format!("{} at byte {}", self.place, self.op_at), problem)
    }

    fn damaged(&self, is: &str) -> Error {
        self.error("damaged pickle").is(is).fix("download or save the file again")
    }

    fn bad_tensor(&self, is: impl std::fmt::Display) -> Error {
        self.error("invalid tensor in pickle").is(is).fix("save the tensor with .contiguous(), or as safetensors")
    }

    /// Accounts for `count` new objects or references.
    fn spend(&mut self, count: usize) -> Result<()> {
        self.spent = self.spent.saturating_add(count);
        if self.spent > MAX_OBJECTS {
            let must = format!("at most {MAX_OBJECTS} objects");
            return Err(self
                .error("pickle too large")
                .is(format!("more than {MAX_OBJECTS} objects"))
                .must(must)
                .fix("save the weights alone, without training state"));
        }
        Ok(())
    }

    // ---- input

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let found = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let found = *found.ok_or_else(|| self.damaged("cut off"))?;
        self.at += N;
        Ok(found)
    }

    /// The bytes after a little-endian length of `N` bytes.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8]> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.take::<N>()?);
        let length = usize::try_from(u64::from_le_bytes(wide)).ok();
        let end = length.and_then(|length| self.at.checked_add(length)).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.damaged("cut off"))?;
        let start = std::mem::replace(&mut self.at, end);
        Ok(&self.bytes[start..end])
    }

    /// The bytes up to the next line break, as text.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().take(MAX_NAME).position(|&b| b == b'\n');
        let length = length.ok_or_else(|| self.damaged("a name without an end"))?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| self.damaged("a name that is not UTF-8"))
    }

    fn long<const N: usize>(&mut self) -> Result<()> {
        let bytes = self.counted::<N>()?;
        let object = match (bytes.len(), bytes.last()) {
            (0, _) | (_, None) => Object::Int(0),
            (1..=8, Some(&last)) => {
                let fill = if last >= 0x80 { 0xff } else { 0 };
                let mut wide = [fill; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Object::Int(i64::from_le_bytes(wide))
            }
            _ => Object::Opaque,
        };
        self.push(object)
    }

    fn text<const N: usize>(&mut self) -> Result<()> {
        let bytes = self.counted::<N>()?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.damaged("text that is not UTF-8"))?;
        self.push(Object::Str(text.into()))
    }

    fn old_string<const N: usize>(&mut self) -> Result<()> {
        let bytes = self.counted::<N>()?;
        self.push(std::str::from_utf8(bytes).map_or_else(|_| Object::Bytes(bytes.into()), |t| Object::Str(t.into())))
    }

    fn binary<const N: usize>(&mut self) -> Result<()> {
        let bytes = self.counted::<N>()?;
        self.push(Object::Bytes(bytes.into()))
    }

    // ---- stack, memo, containers

    /// Height below which the current mark's items end.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn object(&self, id: Id) -> &Object {
        // Ids come from `push` alone and objects are never removed.
        &self.objects[id as usize]
    }

    fn str_at(&self, id: Id) -> Option<Arc<str>> {
        match self.object(id) {
            Object::Str(text) => Some(text.clone()),
            _ => None,
        }
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        self.spend(1)?;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, object: Object) -> Result<()> {
        // The budget keeps the count far below 2^32.
        let id = self.objects.len() as Id;
        self.objects.push(object);
        self.push_id(id)
    }

    fn top(&self) -> Result<Id> {
        let items = &self.stack[self.floor().min(self.stack.len())..];
        items.last().copied().ok_or_else(|| self.damaged("stack underflow"))
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// Everything above the last mark, and the mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let height = self.marks.pop().filter(|&height| height <= self.stack.len());
        let height = height.ok_or_else(|| self.damaged("no mark"))?;
        Ok(self.stack.split_off(height))
    }

    fn memoize(&mut self, slot: u32) -> Result<()> {
        let top = self.top()?;
        self.spend(1)?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<()> {
        let id = *self.memo.get(&slot).ok_or_else(|| self.damaged("an empty memo slot"))?;
        self.push_id(id)
    }

    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.damaged("a key without a value"));
        }
        Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
    }

    fn extend_list(&mut self, items: &[Id]) -> Result<()> {
        let top = self.top()?;
        match &mut self.objects[top as usize] {
            Object::List(list) => list.extend(items),
            _ => return Err(self.damaged("items for something that is not a list")),
        }
        Ok(())
    }

    fn extend_dict(&mut self, pairs: &[(Id, Id)]) -> Result<()> {
        let top = self.top()?;
        match &mut self.objects[top as usize] {
            Object::Dict(dict) => dict.extend(pairs),
            _ => return Err(self.damaged("entries for something that is not a dictionary")),
        }
        Ok(())
    }

    // ---- what globals mean

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
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
    fn call(&mut self, callee: Id, arguments: Id) -> Result<()> {
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
                // A dimension weighs more than an object does.
                self.spend(4 * tensor.shape.len())?;
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
    fn build(&mut self) -> Result<()> {
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
    fn storage(&self, id: Id) -> Result<Object> {
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

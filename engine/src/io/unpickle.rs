//! The stack machine behind [`crate::io::pickle`].
//!
//! Opcodes are those of Python's `pickletools`, protocols 2 to 5, without the ones that name a function in any other
//! way than the two that [`crate::io::pickle::Global`] judges. Work and memory are bounded: every opcode that makes or
//! copies a reference pays from one budget, and nothing is allocated by a length that the bytes do not back. What the
//! known names mean is in [`crate::io::unpickle_globals`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::pickle::{Id, Object, Pickle};

/// Most objects and references of one pickle.
const MAX_OBJECTS: usize = 4 << 20;
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
    pub(super) namespaces: HashSet<Id>,
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
            b'(' => {
                self.spend(1)?;
                self.marks.push(self.stack.len());
            }
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

    pub(super) fn error(&self, problem: &str) -> Error {
        Error::failure(format!("{} at byte {}", self.place, self.op_at), problem)
    }

    pub(super) fn damaged(&self, is: &str) -> Error {
        self.error("damaged pickle").is(is).fix("download or save the file again")
    }

    /// Accounts for `count` new objects or references.
    pub(super) fn spend(&mut self, count: usize) -> Result<()> {
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

    pub(super) fn object(&self, id: Id) -> &Object {
        // Ids come from `push` alone and objects are never removed.
        &self.objects[id as usize]
    }

    pub(super) fn str_at(&self, id: Id) -> Option<Arc<str>> {
        match self.object(id) {
            Object::Str(text) => Some(text.clone()),
            _ => None,
        }
    }

    pub(super) fn push_id(&mut self, id: Id) -> Result<()> {
        self.spend(1)?;
        self.stack.push(id);
        Ok(())
    }

    pub(super) fn push(&mut self, object: Object) -> Result<()> {
        // The budget keeps the count far below 2^32.
        let id = self.objects.len() as Id;
        self.objects.push(object);
        self.push_id(id)
    }

    pub(super) fn top(&self) -> Result<Id> {
        let items = &self.stack[self.floor().min(self.stack.len())..];
        items.last().copied().ok_or_else(|| self.damaged("stack underflow"))
    }

    pub(super) fn pop(&mut self) -> Result<Id> {
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

    pub(super) fn extend_dict(&mut self, pairs: &[(Id, Id)]) -> Result<()> {
        let top = self.top()?;
        match &mut self.objects[top as usize] {
            Object::Dict(dict) => dict.extend(pairs),
            _ => return Err(self.damaged("entries for something that is not a dictionary")),
        }
        Ok(())
    }
}

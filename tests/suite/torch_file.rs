//! Checkpoints as `torch.save` lays them out, and as nobody should: zip archives and pickles made by hand.

/// An entry of a hand-made zip archive; what is not given is as it should be.
#[derive(Clone, Default)]
pub struct Entry<'a> {
    pub name: &'a str,
    pub data: Vec<u8>,
    pub size: Option<u32>,
    pub crc: Option<u32>,
    pub method: u16,
    pub flags: u16,
    /// Offset of another entry's local header, for two entries that share bytes.
    pub at: Option<u32>,
}

/// A stored entry.
pub fn entry<'a>(name: &'a str, data: &[u8]) -> Entry<'a> {
    Entry { name, data: data.to_vec(), ..Entry::default() }
}

/// CRC-32 (IEEE 802.3), bit by bit.
fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// The fields that the local and the central header of an entry share.
fn header(e: &Entry<'_>) -> Vec<u8> {
    let size = e.size.unwrap_or(e.data.len() as u32);
    let mut out = Vec::new();
    for value in [20, e.flags, e.method, 0, 0x21] {
        out.extend(value.to_le_bytes());
    }
    for value in [e.crc.unwrap_or_else(|| crc32(&e.data)), size, size] {
        out.extend(value.to_le_bytes());
    }
    out.extend((e.name.len() as u16).to_le_bytes());
    out.extend(0u16.to_le_bytes());
    out
}

/// An archive of these entries.
pub fn zip(entries: &[Entry<'_>]) -> Vec<u8> {
    let (mut out, mut central) = (Vec::new(), Vec::new());
    for e in entries {
        let at = e.at.unwrap_or(out.len() as u32);
        if e.at.is_none() {
            out.extend([&b"PK\x03\x04"[..], &header(e), e.name.as_bytes(), &e.data].concat());
        }
        central.extend([&b"PK\x01\x02\x14\0"[..], &header(e), &[0; 10], &at.to_le_bytes(), e.name.as_bytes()].concat());
    }
    let start = out.len() as u32;
    out.extend(&central);
    let count = (entries.len() as u16).to_le_bytes();
    let sizes = [(central.len() as u32).to_le_bytes(), start.to_le_bytes()].concat();
    out.extend([&b"PK\x05\x06\0\0\0\0"[..], &count, &count, &sizes, b"\0\0"].concat());
    out
}

/// The opcodes that push text.
pub fn text(value: &str) -> Vec<u8> {
    [&b"X"[..], &(value.len() as u32).to_le_bytes(), value.as_bytes()].concat()
}

/// A checkpoint `{key: {name: tensor, …}}` of f32 tensors, each with its own storage.
pub fn checkpoint(key: &str, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let mut pickle = [&b"\x80\x02}"[..], &text(key), b"ccollections\nOrderedDict\n)R("].concat();
    let int = |value: usize| [&b"J"[..], &(value as u32).to_le_bytes()].concat();
    let tuple = |values: Vec<usize>| [vec![b'('], values.into_iter().flat_map(int).collect(), vec![b't']].concat();
    for (i, (name, shape, values)) in tensors.iter().enumerate() {
        let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        pickle.extend(text(name));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle
            .extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text(&i.to_string()), text("cpu")].concat());
        pickle.extend(
            [int(values.len()), b"tQK\0".to_vec(), tuple(shape.clone()), tuple(strides), b"\x89}tR".to_vec()].concat(),
        );
    }
    pickle.extend(b"us.");
    let names: Vec<String> = (0..tensors.len()).map(|i| format!("model/data/{i}")).collect();
    let data = names
        .iter()
        .zip(tensors)
        .map(|(name, (.., values))| entry(name, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()));
    zip(&[entry("model/data.pkl", &pickle)].into_iter().chain(data).collect::<Vec<_>>())
}

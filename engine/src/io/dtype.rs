//! Element types of tensors on disk and their conversion to the two types the engine computes from.
//!
//! Numbers are little-endian, as safetensors and `torch.save` on every supported machine store them. Source slices
//! may have any alignment: elements are assembled from their bytes, never reinterpreted in place.

use std::fmt;

use half::{bf16, f16};

use crate::error::{Error, Result};

// `f32` data is also *written* by viewing the machine's own representation as bytes.
const _: () = assert!(cfg!(target_endian = "little"), "tensor files are little-endian");

/// Declares the enum, its names in safetensors headers and its widths from one table.
macro_rules! file_dtypes {
    ($($variant:ident $name:literal $bits:literal $doc:literal,)*) => {
        /// Element type of a tensor on disk; the set of the safetensors format.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum FileDtype { $(#[doc = $doc] $variant,)* }

        impl FileDtype {
            /// All types, in declaration order.
            pub const ALL: &[FileDtype] = &[$(FileDtype::$variant,)*];

            /// The name in a safetensors header.
            pub fn name(self) -> &'static str {
                match self { $(FileDtype::$variant => $name,)* }
            }

            /// The type of a safetensors header name; `None` for an unknown name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(FileDtype::$variant),)* _ => None }
            }

            /// Width of one element in bits; below 8 for packed types.
            pub fn bits(self) -> usize {
                match self { $(FileDtype::$variant => $bits,)* }
            }
        }
    };
}

file_dtypes! {
    Bool "BOOL" 8 "One byte, 0 or 1.",
    F4 "F4" 4 "4-bit float of the OCP microscaling formats, two per byte.",
    F6E2M3 "F6_E2M3" 6 "6-bit float of the OCP microscaling formats.",
    F6E3M2 "F6_E3M2" 6 "6-bit float of the OCP microscaling formats.",
    U8 "U8" 8 "Unsigned byte.",
    I8 "I8" 8 "Signed byte.",
    F8E5M2 "F8_E5M2" 8 "8-bit float, 5 exponent bits (arXiv 2209.05433).",
    F8E4M3 "F8_E4M3" 8 "8-bit float, 4 exponent bits (arXiv 2209.05433).",
    F8E8M0 "F8_E8M0" 8 "8-bit power-of-two scale of the OCP microscaling formats.",
    F8E4M3Fnuz "F8_E4M3FNUZ" 8 "8-bit float without infinities or negative zero (arXiv 2206.02915).",
    F8E5M2Fnuz "F8_E5M2FNUZ" 8 "8-bit float without infinities or negative zero (arXiv 2206.02915).",
    I16 "I16" 16 "Signed 16-bit integer.",
    U16 "U16" 16 "Unsigned 16-bit integer.",
    F16 "F16" 16 "IEEE 754 half precision.",
    Bf16 "BF16" 16 "bfloat16: the upper half of an f32.",
    I32 "I32" 32 "Signed 32-bit integer.",
    U32 "U32" 32 "Unsigned 32-bit integer.",
    F32 "F32" 32 "IEEE 754 single precision.",
    C64 "C64" 64 "Complex number of two f32.",
    F64 "F64" 64 "IEEE 754 double precision.",
    I64 "I64" 64 "Signed 64-bit integer.",
    U64 "U64" 64 "Unsigned 64-bit integer.",
}

impl FileDtype {
    /// Whether this is a floating-point type that [`FileDtype::decode_f32`] reads, so fit for a weight.
    pub fn is_weight(self) -> bool {
        matches!(self, FileDtype::F64 | FileDtype::F32 | FileDtype::F16 | FileDtype::Bf16)
    }

    /// Bytes that a tensor of this type and `shape` occupies; `None` when that overflows or is not a whole number.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let bits = count.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Decodes little-endian elements to `f32`.
    ///
    /// Exact for F32, F16, BF16, BOOL and the 8- and 16-bit integers. F64 and the 32- and 64-bit integers round to
    /// nearest-even (F64 beyond the range of f32 becomes infinite, integers stay exact up to 2^24). A trailing part
    /// of an element is ignored; callers check sizes first. `place` names the tensor for the error.
    ///
    /// # Errors
    /// "unsupported dtype" for packed, 8-bit float and complex types.
    pub fn decode_f32(self, bytes: &[u8], place: &str) -> Result<Vec<f32>> {
        Ok(match self {
            FileDtype::F32 => elements(bytes, f32::from_le_bytes),
            FileDtype::F16 => elements(bytes, |b| f16::from_le_bytes(b).to_f32()),
            FileDtype::Bf16 => elements(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            FileDtype::F64 => elements(bytes, |b| f64::from_le_bytes(b) as f32),
            FileDtype::Bool => elements(bytes, |[b]| f32::from(b != 0)),
            FileDtype::U8 => elements(bytes, |[b]| f32::from(b)),
            FileDtype::I8 => elements(bytes, |b| f32::from(i8::from_le_bytes(b))),
            FileDtype::U16 => elements(bytes, |b| f32::from(u16::from_le_bytes(b))),
            FileDtype::I16 => elements(bytes, |b| f32::from(i16::from_le_bytes(b))),
            FileDtype::U32 => elements(bytes, |b| u32::from_le_bytes(b) as f32),
            FileDtype::I32 => elements(bytes, |b| i32::from_le_bytes(b) as f32),
            FileDtype::U64 => elements(bytes, |b| u64::from_le_bytes(b) as f32),
            FileDtype::I64 => elements(bytes, |b| i64::from_le_bytes(b) as f32),
            _ => return Err(self.unsupported(place, "F64, F32, F16, BF16, BOOL or an integer type")),
        })
    }

    /// Decodes little-endian integers (or BOOL) to `i64`, exactly.
    ///
    /// # Errors
    /// "unsupported dtype" for floating-point types, "integer out of range" for a U64 beyond i64.
    pub fn decode_i64(self, bytes: &[u8], place: &str) -> Result<Vec<i64>> {
        Ok(match self {
            FileDtype::Bool => elements(bytes, |[b]| i64::from(b != 0)),
            FileDtype::U8 => elements(bytes, |[b]| i64::from(b)),
            FileDtype::I8 => elements(bytes, |b| i64::from(i8::from_le_bytes(b))),
            FileDtype::U16 => elements(bytes, |b| i64::from(u16::from_le_bytes(b))),
            FileDtype::I16 => elements(bytes, |b| i64::from(i16::from_le_bytes(b))),
            FileDtype::U32 => elements(bytes, |b| i64::from(u32::from_le_bytes(b))),
            FileDtype::I32 => elements(bytes, |b| i64::from(i32::from_le_bytes(b))),
            FileDtype::I64 => elements(bytes, i64::from_le_bytes),
            FileDtype::U64 => {
                let values = elements(bytes, u64::from_le_bytes);
                let convert = |v: u64| {
                    i64::try_from(v).map_err(|_| {
                        Error::failure(place, "integer out of range").is(v).must("at most 9223372036854775807")
                    })
                };
                values.into_iter().map(convert).collect::<Result<_>>()?
            }
            _ => return Err(self.unsupported(place, "an integer type")),
        })
    }

    fn unsupported(self, place: &str, must: &str) -> Error {
        Error::failure(place, "unsupported dtype").is(self).must(must).fix("convert the file to a supported dtype")
    }
}

impl fmt::Display for FileDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Decodes whole `N`-byte elements of a slice of any alignment.
fn elements<T, const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| decode(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_match_the_safetensors_crate() {
        for &dtype in FileDtype::ALL {
            assert_eq!(FileDtype::from_name(dtype.name()), Some(dtype));
            let quoted = format!("\"{}\"", dtype.name());
            let theirs: safetensors::Dtype = serde_json::from_str(&quoted).unwrap();
            assert_eq!(theirs.bitsize(), dtype.bits(), "{dtype}");
        }
        assert_eq!(FileDtype::from_name("F13"), None);
    }

    #[test]
    fn byte_lengths() {
        assert_eq!(FileDtype::F32.byte_len(&[2, 3]), Some(24));
        assert_eq!(FileDtype::F32.byte_len(&[]), Some(4));
        assert_eq!(FileDtype::F4.byte_len(&[3]), None);
        assert_eq!(FileDtype::F64.byte_len(&[usize::MAX / 4]), None);
    }

    #[test]
    fn literal_values() {
        let f32_of = |dtype: FileDtype, bytes: &[u8]| dtype.decode_f32(bytes, "t").unwrap();
        assert_eq!(f32_of(FileDtype::F16, &[0x00, 0x3c, 0x01, 0x00]), [1.0, 5.960_464_5e-8]);
        assert_eq!(f32_of(FileDtype::Bf16, &[0x80, 0x3f, 0x80, 0xff])[0], 1.0);
        assert_eq!(f32_of(FileDtype::Bf16, &[0x80, 0xff]), [f32::NEG_INFINITY]);
        assert_eq!(f32_of(FileDtype::F64, &1e300f64.to_le_bytes()), [f32::INFINITY]);
        assert_eq!(f32_of(FileDtype::I8, &[0xff, 0x7f]), [-1.0, 127.0]);
        assert_eq!(f32_of(FileDtype::I64, &(-3i64).to_le_bytes()), [-3.0]);
        assert_eq!(FileDtype::I16.decode_i64(&[0xfe, 0xff], "t").unwrap(), [-2]);
        assert_eq!(FileDtype::U64.decode_i64(&[7, 0, 0, 0, 0, 0, 0, 0], "t").unwrap(), [7]);
    }

    #[test]
    fn refusals_name_the_tensor_and_the_dtype() {
        let error = FileDtype::F8E4M3.decode_f32(&[0], "f: w").unwrap_err().to_string();
        assert!(error.starts_with("f: w: unsupported dtype; is F8_E4M3; must be"), "{error}");
        assert!(FileDtype::F32.decode_i64(&[0; 4], "t").is_err());
        assert_eq!(FileDtype::U64.decode_i64(&[0xff; 8], "t").unwrap_err().problem(), "integer out of range");
    }
}

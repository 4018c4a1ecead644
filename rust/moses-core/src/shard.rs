//! A strict reader of safetensors headers (the format of huggingface/safetensors).
//!
//! Nothing of the data is read. A header is accepted only if every dtype is known, every size is the product of its
//! shape, and the tensors cover the data from its first to its last byte without hole or overlap.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::limits::{MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS};
use crate::{Error, Result};

/// The data types of the format and their bits.
const DTYPES: &[(&str, u64)] = &[
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
];

/// The bits of a value of a dtype; 0 of one that is unknown.
pub(crate) fn bits(dtype: &str) -> u64 {
    DTYPES.iter().find(|(name, _)| *name == dtype).map_or(0, |(_, bits)| *bits)
}

/// Where a tensor lies in the data, which begins after the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its dtype, as the format names it.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its first byte.
    pub begin: u64,
    /// The byte after its last.
    pub end: u64,
}

/// What a safetensors file says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// Its tensors, by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Its `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Reads the header of the file at `path`.
///
/// # Errors
/// `safetensors_invalid`, `io`.
pub fn read_header(path: &Path) -> Result<Header> {
    let shown = path.display().to_string();
    let file = std::fs::File::open(path).map_err(Error::io(&*shown, "opening"))?;
    Ok(read_header_of(&file, &shown)?.0)
}

/// Reads the header of an open file, and where its data begins; `shown` is its path for messages.
///
/// # Errors
/// `safetensors_invalid`, `io`.
pub(crate) fn read_header_of(mut file: &std::fs::File, shown: &str) -> Result<(Header, u64)> {
    let metadata = file.metadata().map_err(Error::io(shown, "looking at"))?;
    if !metadata.is_file() {
        return Err(Error::Safetensors { path: shown.to_owned(), problem: "it is not a regular file".to_owned() });
    }
    let head = metadata.len().min(MAX_HEADER_BYTES.saturating_add(8));
    let mut bytes = Vec::new();
    let mut length = [0; 8];
    if head >= 8 {
        file.read_exact(&mut length).map_err(Error::io(shown, "reading"))?;
        let wanted = u64::from_le_bytes(length).min(head.saturating_sub(8));
        file.take(wanted).read_to_end(&mut bytes).map_err(Error::io(shown, "reading"))?;
    }
    let declared = u64::from_le_bytes(length);
    parse_header(declared, &bytes, metadata.len())
        .map(|header| (header, declared.saturating_add(8)))
        .map_err(|problem| Error::Safetensors { path: shown.to_owned(), problem })
}

/// Checks a header: the declared length, the bytes after it (as many as there are), and the size of the file.
fn parse_header(declared: u64, header: &[u8], file_bytes: u64) -> std::result::Result<Header, String> {
    if file_bytes < 8 {
        return Err(format!("it has {file_bytes} bytes where the length of the header takes 8"));
    }
    if declared > MAX_HEADER_BYTES {
        return Err(format!("its header declares {declared} bytes, over the limit of {MAX_HEADER_BYTES}"));
    }
    if header.len() as u64 != declared {
        return Err(format!("its header declares {declared} bytes and the file ends after {}", header.len()));
    }
    let text = std::str::from_utf8(header).map_err(|error| format!("its header is not UTF-8 ({error})"))?;
    if !text.starts_with('{') {
        return Err("its header does not start with {".to_owned());
    }
    let header: Header = serde_json::from_str(text).map_err(|error| format!("its header is not right: {error}"))?;
    check_tensors(&header, file_bytes.saturating_sub(8).saturating_sub(declared))?;
    Ok(header)
}

fn check_tensors(header: &Header, data_bytes: u64) -> std::result::Result<(), String> {
    let mut placed: Vec<(u64, u64, &str)> = Vec::with_capacity(header.tensors.len());
    for (name, tensor) in &header.tensors {
        let bits = bits(tensor.dtype);
        let bits = tensor.shape.iter().try_fold(bits, |product, &size| product.checked_mul(size));
        let bytes = tensor.end.checked_sub(tensor.begin);
        if bits.is_none() || bits != bytes.and_then(|bytes| bytes.checked_mul(8)) {
            return Err(format!(
                "tensor {name:?} of {} {:?} cannot lie at bytes {}..{}",
                tensor.dtype, tensor.shape, tensor.begin, tensor.end
            ));
        }
        placed.push((tensor.begin, tensor.end, name));
    }
    placed.sort_unstable();
    let mut next = 0;
    for (begin, end, name) in placed {
        if begin != next {
            return Err(format!("tensor {name:?} begins at byte {begin} where the one before ends at {next}"));
        }
        next = end;
    }
    if next != data_bytes {
        return Err(format!("its tensors take {next} bytes and the file has {data_bytes} after the header"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header::default();
                let mut metadata_seen = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut metadata_seen, true) {
                            return Err(de::Error::custom("__metadata__ is there twice"));
                        }
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    if header.tensors.len() >= MAX_TENSORS {
                        return Err(de::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let tensor = map.next_value()?;
                    if header.tensors.insert(name.clone(), tensor).is_some() {
                        return Err(de::Error::custom(format!("tensor {name:?} is there twice")));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

impl<'de> Deserialize<'de> for Tensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields<'a> {
            #[serde(borrow)]
            dtype: std::borrow::Cow<'a, str>,
            shape: Shape,
            data_offsets: (u64, u64),
        }
        let fields = Fields::deserialize(deserializer)?;
        let dtype = DTYPES.iter().find(|(dtype, _)| *dtype == fields.dtype);
        let (dtype, _) = dtype.ok_or_else(|| de::Error::custom(format!("unknown dtype {:?}", fields.dtype)))?;
        Ok(Self { dtype, shape: fields.shape.0, begin: fields.data_offsets.0, end: fields.data_offsets.1 })
    }
}

/// A shape with a cap on its dimensions, held while it is read.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> std::result::Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = sizes.next_element()? {
                    if shape.len() >= MAX_DIMENSIONS {
                        return Err(de::Error::custom(format!("more than {MAX_DIMENSIONS} dimensions")));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(header: &str, data_bytes: u64) -> std::result::Result<Header, String> {
        let length = header.len() as u64;
        parse_header(length, header.as_bytes(), 8 + length + data_bytes)
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#;

    #[test]
    fn a_good_header_is_read() {
        let header = parse(GOOD, 26).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors["a"], Tensor { dtype: "F32", shape: vec![2, 3], begin: 0, end: 24 });
        assert!(header.tensors["b"].shape.is_empty());
        assert_eq!(parse("{}", 0).unwrap(), Header::default());
    }

    #[test]
    fn each_broken_rule_is_named() {
        let tensor = |inside: &str| format!("{{\"a\":{{{inside}}}}}");
        for (header, data_bytes, problem) in [
            (GOOD.to_owned(), 27, "the file has 27"),
            (GOOD.to_owned(), 25, "the file has 25"),
            (GOOD.replace("[24,26]", "[25,27]"), 27, "begins at byte 25"),
            (GOOD.replace("[24,26]", "[23,25]"), 25, "begins at byte 23"),
            (GOOD.replace("[0,24]", "[24,0]"), 26, "cannot lie"),
            (GOOD.replace("[2,3]", "[2,4]"), 26, "cannot lie"),
            (GOOD.replace("[2,3]", "[4294967296,4294967296,6]"), 26, "cannot lie"),
            (GOOD.replace("[2,3]", "[-2,3]"), 26, "not right"),
            (GOOD.replace("F32", "F31"), 26, "unknown dtype"),
            (GOOD.replace("\"b\"", "\"a\""), 26, "twice"),
            (tensor(r#""dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1"#), 0, "unknown field"),
            (tensor(&format!(r#""dtype":"U8","shape":[{}1],"data_offsets":[0,1]"#, "1,".repeat(40))), 1, "dimensions"),
            ("[".repeat(1_000_000), 0, "does not start"),
            (format!("{{\"a\":{}", "[".repeat(1_000_000)), 0, "not right"),
        ] {
            let error = parse(&header, data_bytes).unwrap_err();
            assert!(error.contains(problem), "{error} does not say {problem}");
        }
        assert!(parse_header(u64::MAX, b"", 100).unwrap_err().contains("over the limit"));
        assert!(parse_header(50, b"{}", 10).unwrap_err().contains("the file ends"));
        assert!(parse_header(0, b"", 7).unwrap_err().contains("7 bytes"));
    }

    proptest! {
        #[test]
        fn no_header_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), file_bytes in 0_u64..1000) {
            let _ = parse_header(bytes.len() as u64, &bytes, file_bytes);
        }

        #[test]
        fn flipped_bits_never_panic(position in 0..GOOD.len(), bit in 0..8) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[position] ^= 1_u8 << bit;
            if let Ok(header) = parse_header(bytes.len() as u64, &bytes, 8 + bytes.len() as u64 + 26) {
                prop_assert!(header.tensors.values().all(|tensor| tensor.end <= 26));
            }
        }
    }
}

//! Reading and writing of small binary formats: little-endian, lengths checked before anything is taken.

use crate::limits::MAX_NAME_BYTES;
use crate::{Error, Result};

/// Reads from a slice; every error says of what and where.
pub(crate) struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes, rest: bytes }
    }

    pub(crate) fn offset(&self) -> u64 {
        self.bytes.len().saturating_sub(self.rest.len()) as u64
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn malformed(&self, problem: impl Into<String>) -> Error {
        Error::Malformed { what: self.what, offset: self.offset(), problem: problem.into() }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(count) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(Error::Truncated { what: self.what, offset: self.bytes.len() as u64 }),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn byte(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// LEB128, at most 64 bits, no longer than it must be.
    pub(crate) fn varint(&mut self) -> Result<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits.checked_shl(shift).is_none_or(|shifted| shifted >> shift != bits) {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.malformed("a number is longer than it must be"));
                }
                return Ok(value);
            }
        }
        Err(self.malformed("a number has more than 64 bits"))
    }

    pub(crate) fn varint_u32(&mut self) -> Result<u32> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| self.malformed(format!("{value} has more than 32 bits")))
    }

    /// A number with a cap; a count of things is also bounded by the bytes that are left, so that it may be reserved.
    pub(crate) fn count(&mut self, limit: u64) -> Result<usize> {
        let value = self.varint()?;
        if value > limit {
            return Err(Error::Oversized { what: self.what, value, limit });
        }
        if value > self.remaining() as u64 {
            return Err(Error::Truncated { what: self.what, offset: self.bytes.len() as u64 });
        }
        Ok(value as usize)
    }

    pub(crate) fn string(&mut self) -> Result<&'a str> {
        let count = self.count(MAX_NAME_BYTES)?;
        let bytes = self.take(count)?;
        std::str::from_utf8(bytes).map_err(|_| self.malformed("a name is not UTF-8"))
    }

    pub(crate) fn end(&self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed(format!("{} bytes too many", self.rest.len()))) }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn varint_bytes(value: u64) -> u64 {
    u64::from((value | 1).ilog2() / 7).saturating_add(1)
}

pub(crate) fn put_string(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

//! Bytes that are computed: averages, noisy copies, fresh weights. Streamed in pieces; the same on every machine but for the
//! last bit of `ln` and `cos`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use half::{bf16, f16};

use crate::checkpoint::Region;

/// Values that one piece has: a piece of float64 and one of bytes stay far below the cap of a worker.
const PIECE: u64 = 1 << 16;

/// Gives an open shard by its number.
pub(super) type Open<'a> = dyn Fn(u32) -> io::Result<std::sync::Arc<File>> + 'a;
/// Takes the number of the first value and the values of a piece, which it may change.
type Values<'a, E> = dyn FnMut(u64, &mut [f64]) -> Result<(), E> + 'a;

/// `constant + sum of weight * source + (noise * deviation + normal) * n`, n being normal, value by value.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// Where it comes from, and the weights.
    pub sources: Vec<(Region, f64)>,
    /// Noise, relative to the standard deviation of the sources' average.
    pub noise: f64,
    /// Noise, absolute.
    pub normal: f64,
    /// Added everywhere.
    pub constant: f64,
    /// The dtype of sources and result.
    pub dtype: &'static str,
    /// How many values.
    pub num_values: u64,
    /// Of the random numbers.
    pub stream: u64,
}

/// Bytes of a value of a dtype that can be computed with.
#[must_use]
pub(crate) fn value_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" => Some(8),
        "F32" => Some(4),
        "F16" | "BF16" => Some(2),
        _ => None,
    }
}

/// The sum of squares of the values of a stretch; `None` where its dtype is not one to compute with.
///
/// # Errors
/// Of the operating system.
pub(super) fn sum_of_squares(region: Region, dtype: &'static str, file: &Open<'_>) -> io::Result<Option<f64>> {
    let Some(width) = value_bytes(dtype) else { return Ok(None) };
    let num_values = region.len.checked_div(width).unwrap_or(0);
    let sources = vec![(region, 1.0)];
    let made = Made { sources, noise: 0.0, normal: 0.0, constant: 0.0, dtype, num_values, stream: 0 };
    let mut sum = 0.0;
    made.pieces(file, &mut |_, values| {
        sum += values.iter().map(|value| value * value).sum::<f64>();
        Ok::<(), io::Error>(())
    })?;
    Ok(Some(sum))
}

/// The seed of one expert's one matrix.
#[must_use]
pub(crate) fn stream(seed: u64, block: &str, slot: u64, role: &str) -> u64 {
    let text = format!("moses surgery {seed} {block} {slot} {role}");
    let hash = crate::hash::hash(text.as_bytes());
    let first: [u8; 8] = std::array::from_fn(|at| hash.as_bytes().get(at).copied().unwrap_or(0));
    u64::from_le_bytes(first)
}

impl Made {
    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.num_values.saturating_mul(value_bytes(self.dtype).unwrap_or(0))
    }

    /// Whether it has no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.num_values == 0
    }

    /// Gives the bytes to `each`, piece by piece; `files` are the shards by number.
    ///
    /// # Errors
    /// Of the operating system, and of `each`.
    pub(super) fn write<E: From<io::Error>>(
        &self,
        file: &Open<'_>,
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let deviation = if self.noise == 0.0 { 0.0 } else { self.deviation(file)? };
        let scale = self.noise.mul_add(deviation, self.normal);
        let mut bytes = Vec::new();
        self.pieces(file, &mut |first, values| {
            bytes.clear();
            for (value, index) in values.iter_mut().zip(first..) {
                if scale != 0.0 {
                    *value = normal(self.stream, index).mul_add(scale, *value);
                }
                encode(self.dtype, *value, &mut bytes);
            }
            each(&bytes)
        })
    }

    fn deviation(&self, file: &Open<'_>) -> io::Result<f64> {
        let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
        self.pieces(file, &mut |_, values| {
            for &value in values.iter() {
                sum += value;
                squares = value.mul_add(value, squares);
                count += 1.0;
            }
            Ok::<(), io::Error>(())
        })?;
        let mean = sum / f64::max(count, 1.0);
        Ok(f64::max(squares / f64::max(count, 1.0) - mean * mean, 0.0).sqrt())
    }

    fn pieces<E: From<io::Error>>(&self, file: &Open<'_>, each: &mut Values<'_, E>) -> Result<(), E> {
        let width = value_bytes(self.dtype).unwrap_or(1);
        let mut values = Vec::new();
        let mut bytes = Vec::new();
        let mut first: u64 = 0;
        while first < self.num_values {
            let count = self.num_values.saturating_sub(first).min(PIECE);
            values.clear();
            values.resize(usize::try_from(count).unwrap_or(0), self.constant);
            for (region, weight) in &self.sources {
                bytes.resize(usize::try_from(count.saturating_mul(width)).unwrap_or(0), 0);
                let at = region.offset.saturating_add(first.saturating_mul(width));
                file(region.shard)?.read_exact_at(&mut bytes, at)?;
                decode(self.dtype, &bytes, |place, value| {
                    if let Some(sum) = values.get_mut(place) {
                        // An expert with weight 1 alone must come out with its own bits, -0 too.
                        *sum = if self.sources.len() == 1 && *weight == 1.0 && self.constant == 0.0 {
                            value
                        } else {
                            value.mul_add(*weight, *sum)
                        };
                    }
                });
            }
            each(first, &mut values)?;
            first = first.saturating_add(count);
        }
        Ok(())
    }
}

fn decode(dtype: &str, bytes: &[u8], mut each: impl FnMut(usize, f64)) {
    fn values<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = (usize, [u8; N])> + '_ {
        bytes.chunks_exact(N).map(|chunk| chunk.try_into().unwrap_or([0; N])).enumerate()
    }
    match dtype {
        "F64" => values(bytes).for_each(|(at, value)| each(at, f64::from_le_bytes(value))),
        "F32" => values(bytes).for_each(|(at, value)| each(at, f64::from(f32::from_le_bytes(value)))),
        "F16" => values(bytes).for_each(|(at, value)| each(at, f16::from_le_bytes(value).to_f64())),
        _ => values(bytes).for_each(|(at, value)| each(at, bf16::from_le_bytes(value).to_f64())),
    }
}

#[allow(clippy::cast_possible_truncation)] // Rounding to the dtype is what this is for.
fn encode(dtype: &str, value: f64, bytes: &mut Vec<u8>) {
    match dtype {
        "F64" => bytes.extend(value.to_le_bytes()),
        "F32" => bytes.extend((value as f32).to_le_bytes()),
        "F16" => bytes.extend(f16::from_f64(value).to_le_bytes()),
        _ => bytes.extend(bf16::from_f64(value).to_le_bytes()),
    }
}

/// Normal number `index` of a stream (Box and Muller 1958), from a hash of the index: no number depends on another.
fn normal(stream: u64, index: u64) -> f64 {
    let pair = index >> 1;
    let first = uniform(mix(stream ^ mix(pair.wrapping_mul(2))));
    let second = uniform(mix(stream ^ mix(pair.wrapping_mul(2).wrapping_add(1))));
    let radius = (-2.0 * first.ln()).sqrt();
    let angle = std::f64::consts::TAU * second;
    radius * if index & 1 == 0 { angle.cos() } else { angle.sin() }
}

/// In (0, 1].
#[allow(clippy::cast_precision_loss)] // 53 bits are exact.
fn uniform(bits: u64) -> f64 {
    ((bits >> 11).saturating_add(1)) as f64 / (1_u64 << 53) as f64
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(bits: u64) -> u64 {
    let mut mixed = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::cast_precision_loss)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_is_normal_and_repeats() {
        let values: Vec<f64> = (0..100_000).map(|index| normal(7, index)).collect();
        let mean = values.iter().sum::<f64>() / 1e5;
        let power = |n: i32| values.iter().map(|value| (value - mean).powi(n)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.01 && (power(2) - 1.0).abs() < 0.02, "{mean} {}", power(2));
        assert!(power(3).abs() < 0.05 && (power(4) - 3.0).abs() < 0.1);
        assert_eq!(normal(7, 5).to_bits(), values[5].to_bits());
        assert_ne!(stream(0, "a", 1, "up"), stream(0, "a", 1, "down"));
    }
}

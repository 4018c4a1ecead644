//! The work as a list of byte moves, and the text that says what it is before it is done.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::made::Made;
use crate::checkpoint::{Region, SourceFile};

/// Where a stretch of an output tensor comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Bytes of a shard of a source, those of the second source counted on from the first's.
    Copy(Region),
    /// Computed bytes.
    Make(Made),
}

impl Piece {
    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Copy(region) => region.len,
            Self::Make(made) => made.len(),
        }
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first byte that it comes from.
    pub(super) fn begin(&self) -> (u32, u64) {
        match self {
            Self::Copy(region) => (region.shard, region.offset),
            Self::Make(made) => made.sources.first().map_or((u32::MAX, 0), |(region, _)| (region.shard, region.offset)),
        }
    }
}

/// What surgery does to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It stays as it is.
    Kept,
    /// The same bytes under another name.
    Renamed,
    /// Put together from parts of what was there.
    Cut,
    /// Of a new expert, whole or in part.
    Made,
}

/// A tensor of the output.
#[derive(Debug, Clone)]
pub struct OutTensor {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its bytes, in order.
    pub pieces: Vec<Piece>,
    /// What it is.
    pub fate: Fate,
}

impl OutTensor {
    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pieces.iter().fold(0, |sum: u64, piece| sum.saturating_add(piece.len()))
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it was, which is where it stays: the shard and the byte.
    pub(super) fn home(&self) -> (u32, u64) {
        self.pieces.first().map_or((0, 0), Piece::begin)
    }
}

/// A shard of the output.
#[derive(Debug)]
pub struct OutShard {
    /// Its file name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// What it has.
    pub content: ShardContent,
}

impl OutShard {
    /// The tensors that are written into it; none where it is a source's.
    #[must_use]
    pub fn tensors(&self) -> &[OutTensor] {
        match &self.content {
            ShardContent::Tensors(_, tensors) => tensors,
            ShardContent::Whole(_) => &[],
        }
    }
}

/// What a shard has.
#[derive(Debug)]
pub enum ShardContent {
    /// All of a source's shard, header and data.
    Whole(u32),
    /// A header, then tensors without gap.
    Tensors(Vec<u8>, Vec<OutTensor>),
}

/// Another file of the output.
#[derive(Debug)]
pub enum OutFile {
    /// With this content.
    Bytes(String, Vec<u8>),
    /// That of the source.
    Copy(SourceFile),
}

/// The work.
#[derive(Debug)]
pub struct Job {
    /// The folders of the sources.
    pub source_paths: Vec<std::path::PathBuf>,
    /// All shards of all sources.
    pub sources: Vec<SourceFile>,
    /// The shards to write, or to link.
    pub shards: Vec<OutShard>,
    /// The files to write.
    pub files: Vec<OutFile>,
    /// What is written of the work itself.
    pub record: Value,
    /// Tensors by fate, and how many are in no output: kept, renamed, cut, made, dropped.
    pub counts: BTreeMap<&'static str, u64>,
    /// Whether the first source's folder is to become the output.
    pub in_place: bool,
    /// What a user should know before.
    pub notes: Vec<String>,
}

impl Job {
    /// Bytes that are written; shards that do not change are, unless they are linked.
    #[must_use]
    pub fn bytes_written(&self, linked: bool) -> u64 {
        let written = |shard: &&OutShard| !(linked && matches!(shard.content, ShardContent::Whole(_)));
        self.shards.iter().filter(written).fold(0, |sum: u64, shard| sum.saturating_add(shard.bytes))
    }

    /// The plan for people and programs.
    #[must_use]
    pub fn describe(&self, linked: bool) -> Value {
        let linked = linked || self.in_place;
        let written = self.bytes_written(linked);
        let whole = |shard: &&OutShard| matches!(shard.content, ShardContent::Whole(_));
        json!({
            "tensors": self.counts,
            "shards": self.shards.iter().map(|shard| json!({
                "name": shard.name,
                "bytes": shard.bytes,
                "unchanged": matches!(shard.content, ShardContent::Whole(_)),
            })).collect::<Vec<_>>(),
            "unchanged_shards": self.shards.iter().filter(whole).count(),
            "bytes_read": self.bytes_read(linked),
            "bytes_written": written,
            "files": self.files.iter().map(|file| match file {
                OutFile::Bytes(name, _) => name,
                OutFile::Copy(source) => &source.name,
            }).collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }

    fn bytes_read(&self, linked: bool) -> u64 {
        let mut sum: u64 = 0;
        for shard in &self.shards {
            match &shard.content {
                ShardContent::Whole(_) if linked => {}
                ShardContent::Whole(_) => sum = sum.saturating_add(shard.bytes),
                ShardContent::Tensors(_, tensors) => {
                    for piece in tensors.iter().flat_map(|tensor| &tensor.pieces) {
                        let read = match piece {
                            Piece::Copy(region) => region.len,
                            // Noise reads its source twice: once for the deviation.
                            Piece::Make(made) => {
                                let passes = if made.noise == 0.0 { 1 } else { 2 };
                                made.len().saturating_mul(made.sources.len() as u64).saturating_mul(passes)
                            }
                        };
                        sum = sum.saturating_add(read);
                    }
                }
            }
        }
        sum
    }
}

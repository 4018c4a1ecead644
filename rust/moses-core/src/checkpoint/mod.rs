//! A checkpoint on disk as its headers tell it: config, index, shards, tensors, and where every expert's bytes lie.
//!
//! Nothing of the tensors is read, nothing outside the folder is opened (but the blobs of a hub cache), and what
//! contradicts itself is an error: transformers loads every tensor of every shard that the index lists, in the order of the
//! files' names, so a tensor that the index does not name may win over the one that it does.

mod describe;
mod experts;
mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

pub(crate) use experts::UNEVEN;
pub use experts::{Gate, MoeLayer, Part};
pub use files::SourceFile;

use crate::document::Document;
use crate::layout::ModelType;
use crate::limits::{
    MAX_CHECKPOINT_TENSORS, MAX_CONFIG_BYTES, MAX_FILES_BESIDE, MAX_INDEX_BYTES, MAX_METADATA_BYTES, MAX_SHARDS,
};
use crate::{Error, Result};

/// The config of a checkpoint.
pub const CONFIG: &str = "config.json";
/// Its index, where it has several shards.
pub const INDEX: &str = "model.safetensors.index.json";
/// Its shard, where it has one.
pub const SINGLE: &str = "model.safetensors";
/// What surgery writes of itself.
pub const RECORD: &str = "moses_surgery.json";
const SHARD_SUFFIX: &str = ".safetensors";
/// Weights in other formats; the pickled ones first.
const PICKLES: &[&str] = &[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"];
const OTHER_WEIGHTS: &[&str] = &[".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".ot"];

/// A stretch of bytes of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    /// The shard, in the order of names.
    pub shard: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: Box<str>,
    /// Its dtype, as safetensors names it.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where its bytes lie.
    pub region: Region,
}

/// A file of tensors.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub file: SourceFile,
    /// Its `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// How many tensors it has, those counted that another shard hides.
    pub num_tensors: usize,
}

/// A checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its folder, without links.
    pub path: PathBuf,
    /// Its config.
    pub config: Document,
    /// `model_type` of the config.
    pub model_type: String,
    /// What the table of layouts has of it.
    pub kind: Option<&'static ModelType>,
    /// The shards, in the order of their names.
    pub shards: Vec<Shard>,
    /// The tensors, in the order of their names.
    pub tensors: Vec<TensorEntry>,
    /// Tensors that a later shard hides: shard and name.
    pub superseded: Vec<(u32, String, u64)>,
    /// What the index says besides.
    pub index_metadata: Option<Document>,
    /// Whether it has an index.
    pub indexed: bool,
    /// Layers with experts, in the order of their numbers.
    pub layers: Vec<MoeLayer>,
    /// Other files: tokenizer, generation config, code.
    pub files: Vec<SourceFile>,
    /// What lies there and is no part of the checkpoint.
    pub left_out: Vec<String>,
}

impl Checkpoint {
    /// Reads what the folder at `path` says of itself.
    ///
    /// # Errors
    /// `checkpoint_invalid`, `shard_path`, `shard_missing`, `shard_extra`, `tensor_missing`, `tensor_unlisted`,
    /// `weights_pickled`, `experts_misfit`, `tensor_unknown`, `safetensors_invalid`, `format_oversized`, `io`.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let path = path.canonicalize().map_err(Error::io(&*shown, "opening"))?;
        let (names, folders) = files::list(&path)?;
        let config = files::read(&path, CONFIG, MAX_CONFIG_BYTES)?.ok_or_else(|| {
            let problem = format!("it has no {CONFIG}");
            Error::Checkpoint { path: shown.clone(), problem }
        })?;
        let at = |name: &str| path.join(name).display().to_string();
        let config = Document::parse(&config)
            .map_err(|problem| Error::Checkpoint { path: at(CONFIG), problem: format!("not JSON ({problem})") })?;
        let model_type = config.text("model_type").unwrap_or_default();
        let (index, index_metadata) = match files::read(&path, INDEX, MAX_INDEX_BYTES)? {
            Some(bytes) => {
                let index: Index = serde_json::from_slice(&bytes).map_err(|error| Error::Checkpoint {
                    path: at(INDEX),
                    problem: format!("its index is not right ({error})"),
                })?;
                (Some(index.weight_map), index.metadata)
            }
            None => (None, None),
        };
        let listed = shard_names(&path, &names, index.clone())?;
        let index = index.map(|index| index.tensors);
        let mut found = Self {
            model_type,
            kind: None,
            config,
            shards: Vec::new(),
            tensors: Vec::new(),
            superseded: Vec::new(),
            index_metadata,
            indexed: index.is_some(),
            layers: Vec::new(),
            files: Vec::new(),
            left_out: folders.into_iter().map(|name| format!("{name}/")).collect(),
            path,
        };
        found.kind = ModelType::find(&found.model_type);
        for (number, name) in listed.iter().enumerate() {
            found.read_shard(number, name, index.as_ref())?;
        }
        found.tensors.sort_by(|left, right| left.name.cmp(&right.name));
        for (tensor, &shard) in index.iter().flatten() {
            if found.tensor(tensor).is_none() {
                let shard = listed.get(shard as usize).cloned().unwrap_or_default();
                return Err(Error::TensorMissing { path: found.shown(), tensor: tensor.clone(), shard });
            }
        }
        found.add_files_beside(names, &listed)?;
        found.layers = experts::find(&found)?;
        Ok(found)
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(self.place(name)?)
    }

    /// Where among `tensors` the tensor of this name is.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| (*tensor.name).cmp(name)).ok()
    }

    /// The path, for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        self.path.display().to_string()
    }

    fn read_shard(&mut self, number: usize, name: &str, index: Option<&BTreeMap<String, u32>>) -> Result<()> {
        let shard = u32::try_from(number).unwrap_or(u32::MAX);
        let found = files::resolve(&self.path, name)?;
        let file = found.ok_or_else(|| Error::ShardMissing { path: self.shown(), name: name.to_owned() })?;
        let (header, data) = crate::shard::read_header_of(&file.open()?, &file.path.display().to_string())?;
        let metadata_bytes = header.metadata.iter().map(|(key, value)| key.len().saturating_add(value.len()));
        if metadata_bytes.sum::<usize>() > MAX_METADATA_BYTES {
            let problem = format!("its __metadata__ has over {MAX_METADATA_BYTES} bytes");
            return Err(Error::Safetensors { path: file.path.display().to_string(), problem });
        }
        let num_tensors = header.tensors.len();
        if self.tensors.len().saturating_add(self.superseded.len()).saturating_add(num_tensors) > MAX_CHECKPOINT_TENSORS
        {
            return Err(Error::Oversized {
                what: "checkpoint",
                value: self.tensors.len().saturating_add(num_tensors) as u64,
                limit: MAX_CHECKPOINT_TENSORS as u64,
            });
        }
        for (tensor, place) in header.tensors {
            let unlisted = |problem| Error::TensorUnlisted {
                path: self.path.display().to_string(),
                tensor: tensor.clone(),
                shard: name.to_owned(),
                problem,
            };
            let len = place.end.saturating_sub(place.begin);
            match index.map(|index| index.get(&tensor)) {
                Some(None) => return Err(unlisted("is not named by the index")),
                Some(Some(&home)) if home < shard => {
                    return Err(unlisted(
                        "would hide the one that the index names, for shards are read in the order of names",
                    ));
                }
                Some(Some(&home)) if home > shard => self.superseded.push((shard, tensor, len)),
                _ => self.tensors.push(TensorEntry {
                    name: tensor.into(),
                    dtype: place.dtype,
                    shape: place.shape,
                    region: Region { shard, offset: place.begin.saturating_add(data), len },
                }),
            }
        }
        self.shards.push(Shard { file, metadata: header.metadata, num_tensors });
        Ok(())
    }

    fn add_files_beside(&mut self, names: BTreeSet<String>, listed: &[String]) -> Result<()> {
        for name in names {
            if [CONFIG, INDEX, RECORD].contains(&&*name) || listed.contains(&name) {
                continue;
            }
            if name.ends_with(SHARD_SUFFIX) {
                return Err(Error::ShardExtra { path: self.shown(), name });
            }
            let weights = PICKLES.iter().chain(OTHER_WEIGHTS).any(|suffix| name.ends_with(suffix));
            if weights || name.ends_with(".bin.index.json") {
                self.left_out.push(name);
                continue;
            }
            if self.files.len() >= MAX_FILES_BESIDE {
                let value = self.files.len() as u64;
                return Err(Error::Oversized { what: "folder", value, limit: MAX_FILES_BESIDE as u64 });
            }
            if let Some(file) = files::resolve(&self.path, &name)? {
                self.files.push(file);
            }
        }
        Ok(())
    }
}

/// The shards in the order of their names, which is the order in which transformers reads them.
fn shard_names(path: &Path, names: &BTreeSet<String>, index: Option<WeightMap>) -> Result<Vec<String>> {
    let shown = || path.display().to_string();
    let is_pickle = |name: &&String| PICKLES.iter().any(|suffix| name.ends_with(suffix));
    let Some(index) = index else {
        if names.contains(SINGLE) {
            return Ok(vec![SINGLE.to_owned()]);
        }
        let pickle = names.iter().find(is_pickle);
        return Err(match (pickle, names.iter().find(|name| name.ends_with(SHARD_SUFFIX))) {
            (_, Some(shard)) => Error::Checkpoint {
                path: shown(),
                problem: format!("it has {shard:?} and neither {SINGLE} nor {INDEX}"),
            },
            (Some(name), None) => Error::Pickled { path: shown(), name: name.clone() },
            (None, None) => Error::Checkpoint { path: shown(), problem: format!("it has no {SINGLE}") },
        });
    };
    if names.contains(SINGLE) && !index.shards.iter().any(|name| name == SINGLE) {
        // transformers would load it, and not look at the index.
        return Err(Error::ShardExtra { path: shown(), name: SINGLE.to_owned() });
    }
    for name in &index.shards {
        if is_pickle(&name) {
            return Err(Error::Pickled { path: shown(), name: name.clone() });
        }
        files::check_name(path, name)?;
        if !name.ends_with(SHARD_SUFFIX) {
            let problem = format!("its index names {name:?}, which is not a safetensors file");
            return Err(Error::Checkpoint { path: shown(), problem });
        }
    }
    if index.shards.is_empty() {
        return Err(Error::Checkpoint { path: shown(), problem: "its index names no tensor".to_owned() });
    }
    Ok(index.shards)
}

/// The index file.
#[derive(serde::Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Option<Document>,
    weight_map: WeightMap,
}

/// Which tensor is in which shard.
#[derive(Debug, Default, Clone)]
struct WeightMap {
    /// In the order of their names.
    shards: Vec<String>,
    tensors: BTreeMap<String, u32>,
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of shards by tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<WeightMap, A::Error> {
                let mut found = WeightMap::default();
                let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
                    let number = *numbers.entry(shard).or_insert(next);
                    if number as usize >= MAX_SHARDS || found.tensors.len() >= MAX_CHECKPOINT_TENSORS {
                        let problem = format!("over {MAX_SHARDS} shards or {MAX_CHECKPOINT_TENSORS} tensors");
                        return Err(de::Error::custom(problem));
                    }
                    if found.tensors.insert(tensor.clone(), number).is_some() {
                        return Err(de::Error::custom(format!("tensor {tensor:?} is there twice")));
                    }
                }
                // From the order of the file to the order of names.
                let mut places = vec![0_u32; numbers.len()];
                for (place, (shard, number)) in (0_u32..).zip(numbers) {
                    if let Some(slot) = places.get_mut(number as usize) {
                        *slot = place;
                    }
                    found.shards.push(shard);
                }
                for number in found.tensors.values_mut() {
                    *number = places.get(*number as usize).copied().unwrap_or(0);
                }
                Ok(found)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

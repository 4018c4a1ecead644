//! The experts of a checkpoint: found by the names of its tensors, by the table of layouts, and checked against gates and
//! config.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{CONFIG, Checkpoint, Region, TensorEntry};
use crate::layout::{GateKind, Layout, LayoutNames, ModelType};
use crate::limits::MAX_EXPERTS;
use crate::{Error, Result};

/// Key of the config for layers with different numbers of experts, which only moses writes and reads.
pub(crate) const UNEVEN: &str = "moses_num_experts";

/// A stretch of an expert: one of its matrices, whatever the layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it is: `gate`, `up`, `down`; of tensors that the table does not have, the end of the name.
    pub role: Cow<'static, str>,
    /// Its dtype.
    pub dtype: &'static str,
    /// Its shape, without the axis of the expert.
    pub shape: Vec<u64>,
    /// Where its bytes lie.
    pub region: Region,
    /// Its tensor, by its place in the checkpoint.
    pub tensor: u32,
}

/// A tensor of the gate; a row for each expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// Which of the gates of the layout's names.
    pub number: usize,
    /// What it holds.
    pub kind: GateKind,
    /// Its tensor, by its place in the checkpoint.
    pub tensor: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
}

/// A layer with experts.
#[derive(Debug, Clone)]
pub struct MoeLayer {
    /// The path of its block: `model.layers.3`.
    pub block: String,
    /// How its experts lie.
    pub layout: Layout,
    /// What its tensors are called.
    pub names: &'static LayoutNames,
    /// The parts of each expert, in the order of roles.
    pub experts: Vec<Vec<Part>>,
    /// Its gates.
    pub gates: Vec<Gate>,
}

impl MoeLayer {
    /// How many experts it has.
    #[must_use]
    pub fn num_experts(&self) -> u64 {
        self.experts.len() as u64
    }

    /// All tensors of its experts and gates, by their places.
    pub fn tensors(&self) -> impl Iterator<Item = u32> + '_ {
        let parts = self.experts.iter().flatten().map(|part| part.tensor);
        parts.chain(self.gates.iter().map(|gate| gate.tensor))
    }
}

/// What is found of a block while names are read.
#[derive(Default)]
struct Block<'a> {
    single: BTreeMap<u64, Vec<(&'a str, u32)>>,
    joint: Vec<(&'a str, u32)>,
}

/// Finds the layers with experts. A model type that the table does not have has none.
pub(super) fn find(checkpoint: &Checkpoint) -> Result<Vec<MoeLayer>> {
    let Some(kind) = checkpoint.kind else { return Ok(Vec::new()) };
    let mut blocks: BTreeMap<(&str, &str), Block<'_>> = BTreeMap::new();
    for (place, tensor) in (0_u32..).zip(&checkpoint.tensors) {
        let Some((block, experts, rest)) = split(kind, &tensor.name) else { continue };
        let found = blocks.entry((block, experts)).or_default();
        match rest.split_once('.').and_then(|(number, suffix)| Some((expert_number(number)?, suffix))) {
            Some((number, suffix)) => found.single.entry(number).or_default().push((suffix, place)),
            None => found.joint.push((rest, place)),
        }
    }
    let mut layers = Vec::new();
    for ((block, experts), found) in blocks {
        layers.push(layer(checkpoint, kind, block, experts, &found)?);
    }
    layers.sort_by(|left, right| order(&left.block).cmp(&order(&right.block)));
    if let Some(pair) = layers.windows(2).find(|pair| matches!(pair, [a, b] if a.block == b.block)) {
        let layer = pair.first().map(|layer| layer.block.clone()).unwrap_or_default();
        return Err(misfit(checkpoint, &layer, "it has experts in two layouts".to_owned()));
    }
    check_config(checkpoint, kind, &layers)?;
    Ok(layers)
}

/// The block, the path of the experts below it, and the rest of a tensor's name.
fn split<'a>(kind: &'static ModelType, name: &'a str) -> Option<(&'a str, &'static str, &'a str)> {
    kind.layouts.iter().find_map(|names| {
        let (before, after) = name.split_once(names.experts)?;
        let (block, rest) = (before.strip_suffix('.')?, after.strip_prefix('.')?);
        let (stack, number) = block.rsplit_once('.')?;
        let is_layer = stack == "layers" || stack.ends_with(".layers");
        (is_layer && number.bytes().all(|byte| byte.is_ascii_digit())).then_some((block, names.experts, rest))
    })
}

/// Blocks by number, not by text: layer 10 comes after layer 9.
fn order(block: &str) -> (&str, u64) {
    let (stack, number) = block.rsplit_once('.').unwrap_or(("", block));
    (stack, number.parse().unwrap_or(u64::MAX))
}

fn expert_number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    // 007 and +7 are other names than 7.
    (number.to_string() == text).then_some(number)
}

fn misfit(checkpoint: &Checkpoint, layer: &str, problem: String) -> Error {
    Error::Experts { path: checkpoint.shown(), layer: layer.to_owned(), problem }
}

fn entry(checkpoint: &Checkpoint, place: u32) -> Result<&TensorEntry> {
    checkpoint.tensors.get(place as usize).ok_or_else(|| misfit(checkpoint, "tensor", "it is lost".to_owned()))
}

fn layer(
    checkpoint: &Checkpoint,
    kind: &'static ModelType,
    block: &str,
    path: &str,
    found: &Block<'_>,
) -> Result<MoeLayer> {
    if !found.single.is_empty() && !found.joint.is_empty() {
        let stray = found.joint.first().map_or("", |(suffix, _)| *suffix);
        return Err(misfit(checkpoint, block, format!("it has single experts and also {path}.{stray}")));
    }
    let with_path = || kind.layouts.iter().filter(|names| names.experts == path);
    let names = if found.joint.is_empty() {
        with_path().find(|names| names.layout == Layout::PerExpert)
    } else {
        let has = |wanted: &str| found.joint.iter().any(|(suffix, _)| *suffix == wanted);
        let complete = |names: &&LayoutNames| names.tensors.iter().all(|(suffix, _)| has(suffix));
        let joint = || with_path().filter(|names| names.layout != Layout::PerExpert);
        joint().find(complete).or_else(|| joint().next())
    };
    let names = names.ok_or_else(|| {
        let problem = format!("{} does not have experts in this layout", kind.name);
        misfit(checkpoint, block, problem)
    })?;
    let experts = match names.layout {
        Layout::PerExpert => single_experts(checkpoint, block, names, found)?,
        Layout::Fused | Layout::Mxfp4 => joint_experts(checkpoint, block, names, found)?,
    };
    let gates = gates(checkpoint, block, names, experts.len() as u64)?;
    Ok(MoeLayer { block: block.to_owned(), layout: names.layout, names, experts, gates })
}

fn single_experts(
    checkpoint: &Checkpoint,
    block: &str,
    names: &'static LayoutNames,
    found: &Block<'_>,
) -> Result<Vec<Vec<Part>>> {
    let mut experts: Vec<Vec<Part>> = Vec::new();
    let mut first: &[(&str, u32)] = &[];
    for (wanted, (&number, tensors)) in (0_u64..).zip(&found.single) {
        if number != wanted {
            return Err(misfit(checkpoint, block, format!("expert {wanted} is missing, and expert {number} is there")));
        }
        if number == 0 {
            first = tensors;
            for (suffix, _) in names.tensors {
                // Quantised experts have their matrices under other names (qweight, scales), which move with them.
                let stem = suffix.strip_suffix("weight").unwrap_or(suffix);
                if !tensors.iter().any(|(there, _)| there.starts_with(stem)) {
                    return Err(misfit(checkpoint, block, format!("its experts have no {suffix}")));
                }
            }
        }
        if tensors.iter().map(|(suffix, _)| suffix).ne(first.iter().map(|(suffix, _)| suffix)) {
            return Err(misfit(checkpoint, block, format!("expert {number} has other tensors than expert 0")));
        }
        let mut parts = Vec::with_capacity(tensors.len());
        for (suffix, place) in tensors {
            let tensor = entry(checkpoint, *place)?;
            let named = names.tensors.iter().find(|(name, _)| name == suffix).and_then(|(_, roles)| roles.first());
            parts.push(Part {
                role: named.map_or_else(|| Cow::Owned((*suffix).to_owned()), |role| Cow::Borrowed(*role)),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                region: tensor.region,
                tensor: *place,
            });
        }
        if let Some(zero) = experts.first() {
            for (part, like) in parts.iter().zip(zero) {
                if (&part.shape, part.dtype) != (&like.shape, like.dtype) {
                    let what = format!(
                        "{} of expert {number} is {} {:?}, that of expert 0 {} {:?}",
                        part.role, part.dtype, part.shape, like.dtype, like.shape
                    );
                    return Err(misfit(checkpoint, block, what));
                }
            }
        }
        experts.push(parts);
    }
    Ok(experts)
}

fn joint_experts(
    checkpoint: &Checkpoint,
    block: &str,
    names: &'static LayoutNames,
    found: &Block<'_>,
) -> Result<Vec<Vec<Part>>> {
    for (suffix, _) in names.tensors {
        if !found.joint.iter().any(|(there, _)| there == suffix) {
            return Err(misfit(checkpoint, block, format!("its experts have no {suffix}")));
        }
    }
    let mut experts: Vec<Vec<Part>> = Vec::new();
    for (suffix, place) in &found.joint {
        let tensor = entry(checkpoint, *place)?;
        let Some((_, roles)) = names.tensors.iter().find(|(name, _)| name == suffix) else {
            return Err(Error::TensorUnknown {
                path: checkpoint.shown(),
                tensor: tensor.name.to_string(),
                problem:
                    "lies among the experts and is in no layout that surgery knows: it can be neither cut nor left"
                        .to_owned(),
            });
        };
        let wrong = |problem: &str| misfit(checkpoint, block, format!("{suffix} {:?} {problem}", tensor.shape));
        let (&count, rest) = tensor.shape.split_first().ok_or_else(|| wrong("has no axis of experts"))?;
        if count == 0 || count > MAX_EXPERTS {
            return Err(wrong("cannot be split into experts"));
        }
        if experts.is_empty() {
            experts.resize(usize::try_from(count).unwrap_or(0), Vec::new());
        }
        let pieces = roles.len() as u64;
        let stride = tensor.region.len.checked_div(count.saturating_mul(pieces)).unwrap_or(0);
        if experts.len() as u64 != count {
            return Err(wrong("has another number of experts than its other tensors"));
        }
        let mut shape = rest.to_vec();
        let divided = shape.first_mut().is_none_or(|rows| {
            let fits = rows.checked_rem(pieces) == Some(0);
            *rows = rows.checked_div(pieces).unwrap_or(0);
            fits
        });
        if !divided || stride.saturating_mul(count).saturating_mul(pieces) != tensor.region.len {
            return Err(wrong("cannot be split into whole experts"));
        }
        let mut offset = tensor.region.offset;
        for parts in &mut experts {
            for role in *roles {
                let region = Region { shard: tensor.region.shard, offset, len: stride };
                parts.push(Part {
                    role: Cow::Borrowed(*role),
                    dtype: tensor.dtype,
                    shape: shape.clone(),
                    region,
                    tensor: *place,
                });
                offset = offset.saturating_add(stride);
            }
        }
    }
    Ok(experts)
}

fn gates(checkpoint: &Checkpoint, block: &str, names: &'static LayoutNames, num_experts: u64) -> Result<Vec<Gate>> {
    let mut gates = Vec::new();
    let module = format!("{block}.{}.", names.gate_module);
    let first = checkpoint.tensors.partition_point(|tensor| *tensor.name < *module);
    for (place, tensor) in checkpoint.tensors.iter().enumerate().skip(first) {
        let Some(rest) = tensor.name.strip_prefix(&module) else { break };
        let named =
            names.gates.iter().position(|gate| gate.name.strip_prefix(names.gate_module) == Some(&format!(".{rest}")));
        let Some((number, gate)) = named.and_then(|number| Some((number, names.gates.get(number)?))) else {
            return Err(Error::TensorUnknown {
                path: checkpoint.shown(),
                tensor: tensor.name.to_string(),
                problem: "belongs to the gate and is in no layout that surgery knows: it can be neither cut nor left"
                    .to_owned(),
            });
        };
        if tensor.shape.first() != Some(&num_experts) {
            let what = format!("{rest} of the gate is {:?} and there are {num_experts} experts", tensor.shape);
            return Err(misfit(checkpoint, block, what));
        }
        gates.push(Gate {
            number,
            kind: gate.kind,
            tensor: u32::try_from(place).unwrap_or(u32::MAX),
            row_bytes: tensor.region.len.checked_div(num_experts).unwrap_or(0),
        });
    }
    gates.sort_by_key(|gate| gate.number);
    if gates.first().map(|gate| gate.kind) != Some(GateKind::Row) {
        let wanted = names.gates.first().map_or("", |gate| gate.name);
        return Err(misfit(checkpoint, block, format!("it has experts and no {wanted}")));
    }
    Ok(gates)
}

/// The config says as many experts as there are: where it says more, transformers makes up the rest at random.
fn check_config(checkpoint: &Checkpoint, kind: &'static ModelType, layers: &[MoeLayer]) -> Result<()> {
    let Some(first) = layers.first() else { return Ok(()) };
    let wrong =
        |problem: String| Error::Checkpoint { path: checkpoint.path.join(CONFIG).display().to_string(), problem };
    let most = layers.iter().map(MoeLayer::num_experts).max().unwrap_or(0);
    let mut said = false;
    for key in kind.num_experts.iter().filter(|key| checkpoint.config.has(key)) {
        said = true;
        if checkpoint.config.count(key) != Some(most) {
            let value = checkpoint.config.get(key).unwrap_or_default();
            return Err(wrong(format!("{key} is {value} and {} has {} experts", first.block, first.num_experts())));
        }
    }
    if !said {
        return Err(wrong(format!("it has no {}", kind.num_experts.first().unwrap_or(&"number of experts"))));
    }
    let uneven = layers.iter().find(|layer| layer.num_experts() != most);
    if let Some(layer) = uneven.filter(|_| !checkpoint.config.has(UNEVEN)) {
        let problem = format!("it has {} experts where another layer has {most}", layer.num_experts());
        return Err(misfit(checkpoint, &layer.block, problem));
    }
    Ok(())
}

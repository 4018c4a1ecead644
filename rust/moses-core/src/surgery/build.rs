//! From checkpoints and a plan to the list of byte moves; everything that can be refused is refused here.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::in_place;
use super::job::{Fate, Job, OutFile, OutShard, OutTensor, Piece, ShardContent};
use super::layer::{Joined, identity, is_known};
use super::request::{LayerRequest, NewRows, Options, Request, SlotRequest};
use crate::checkpoint::{CONFIG, Checkpoint, INDEX, SINGLE, UNEVEN};
use crate::document::Document;
use crate::layout::{Dense, GateKind, Layout, ModelType};
use crate::{Error, Result};

/// What the shards of an output are made of.
pub(super) struct Drawn {
    pub(super) tensors: Vec<OutTensor>,
    pub(super) shards: Vec<OutShard>,
}

/// Plans the work.
///
/// # Errors
/// `model_type_unknown`, `plan_misfit`, `top_k_too_large`, `groups_misfit`, `uneven_experts`, `tensor_unknown`,
/// `surgery_unsupported`.
pub fn build(sources: &[&Checkpoint], request: &Request, options: &Options) -> Result<Job> {
    let wrong = |problem: &str| Error::PlanMisfit { what: "the plan".to_owned(), problem: problem.to_owned() };
    let main = *sources.first().ok_or_else(|| wrong("it has no checkpoint"))?;
    let kind = known(main)?;
    if main.layers.is_empty() {
        let problem = "it has no layer with experts".to_owned();
        return Err(Error::PlanMisfit { what: main.shown(), problem });
    }
    for other in sources.iter().skip(1) {
        if known(other)?.name != kind.name {
            let problem = format!("it is a {} and {} is a {}", other.model_type, main.shown(), kind.name);
            return Err(Error::PlanMisfit { what: other.shown(), problem });
        }
    }
    if options.in_place && sources.len() > 1 {
        return Err(wrong("only one checkpoint can change in place"));
    }
    let requests = requests(sources, main, request)?;
    check_counts(main, kind, request, options, &requests)?;
    check_quantised(main, options, &requests)?;

    let mut touched = vec![false; main.tensors.len()];
    let mut tensors = Vec::new();
    let dense = requests.iter().any(|wanted| wanted.dense);
    let dense_type = if dense { kind.dense(&main.config) } else { None };
    for name in dense_type.iter().flat_map(|dense| left_out(main, dense)) {
        if let Some(touched) = main.place(&name).and_then(|place| touched.get_mut(place)) {
            *touched = true;
        }
    }
    for (layer, wanted) in main.layers.iter().zip(&requests) {
        let layout = options.layout.unwrap_or(layer.layout);
        if wanted.dense || layout != layer.layout || *wanted != identity(layer) {
            let names = kind.names(layout).ok_or_else(|| unsupported(layer.block.as_str(), layout, kind))?;
            for place in layer.tensors() {
                if let Some(touched) = touched.get_mut(place as usize) {
                    *touched = true;
                }
            }
            tensors.extend(joined(sources, main, request, &layer.block)?.tensors(wanted, names, dense_type)?);
        }
    }
    carry(main, &touched, &mut tensors)?;
    let counts = counts(main, &touched, &tensors);
    let drawn = Drawn { tensors, shards: Vec::new() };
    let drawn = if options.in_place { in_place::draw(main, drawn)? } else { draw(sources, drawn) };
    let notes = notes(sources, main, request, &requests, &drawn);
    let config = if dense {
        dense_config(main, kind, dense_type, &drawn.tensors)?
    } else {
        config(main, kind, request, &requests)
    };
    let config = config.to_text().into_bytes();
    let record = record(sources, request, options, kind, &requests);
    Ok(Job { in_place: options.in_place, notes, ..job(sources, main, drawn, config, counts, record)? })
}

/// All tensors that no layer's surgery touches stay as they are.
pub(super) fn carry(main: &Checkpoint, touched: &[bool], tensors: &mut Vec<OutTensor>) -> Result<()> {
    for (tensor, touched) in main.tensors.iter().zip(touched) {
        if !touched {
            tensors.push(OutTensor {
                name: tensor.name.to_string(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                pieces: vec![Piece::Copy(tensor.region)],
                fate: Fate::Kept,
            });
        }
    }
    check_names(main, tensors)
}

pub(super) fn counts(main: &Checkpoint, touched: &[bool], tensors: &[OutTensor]) -> BTreeMap<&'static str, u64> {
    let num_touched = touched.iter().filter(|touched| **touched).count() as u64;
    let mut counts = count(tensors);
    counts.insert("dropped", dropped(main, num_touched, touched, tensors));
    counts
}

/// The job of shards that were drawn, with config, index and the files beside.
pub(super) fn job(
    sources: &[&Checkpoint],
    main: &Checkpoint,
    drawn: Drawn,
    config: Vec<u8>,
    counts: BTreeMap<&'static str, u64>,
    record: Value,
) -> Result<Job> {
    let mut files = vec![OutFile::Bytes(CONFIG.to_owned(), config)];
    if drawn.shards.iter().all(|shard| shard.name != SINGLE) {
        files.push(OutFile::Bytes(INDEX.to_owned(), index(main, &drawn)?));
    }
    files.extend(main.files.iter().cloned().map(OutFile::Copy));
    Ok(Job {
        source_paths: sources.iter().map(|source| source.path.clone()).collect(),
        sources: sources.iter().flat_map(|source| source.shards.iter().map(|shard| shard.file.clone())).collect(),
        record,
        shards: drawn.shards,
        files,
        counts,
        in_place: false,
        notes: Vec::new(),
    })
}

fn known(checkpoint: &Checkpoint) -> Result<&'static ModelType> {
    let unknown = || Error::ModelType { path: checkpoint.shown(), model_type: checkpoint.model_type.clone() };
    checkpoint.kind.ok_or_else(unknown)
}

fn unsupported(block: &str, layout: Layout, kind: &ModelType) -> Error {
    let problem = format!("{} has no {} layout: choose another", kind.name, layout.name());
    Error::Unsupported { what: block.to_owned(), problem }
}

fn joined<'a>(sources: &'a [&'a Checkpoint], main: &Checkpoint, request: &Request, block: &str) -> Result<Joined<'a>> {
    let mut shift: u32 = 0;
    let mut layers = Vec::with_capacity(sources.len());
    for &source in sources {
        let layer = source.layers.iter().find(|layer| layer.block == block).ok_or_else(|| Error::PlanMisfit {
            what: source.shown(),
            problem: format!("it has no experts at {block}"),
        })?;
        layers.push((source, layer, shift));
        shift = shift.saturating_add(u32::try_from(source.shards.len()).unwrap_or(u32::MAX));
    }
    let range = main.config.get("initializer_range").and_then(|value| value.as_f64());
    let range = range.filter(|range| range.is_finite() && *range >= 0.0);
    Ok(Joined { layers, new_rows: request.new_rows, seed: request.seed, initializer_range: range.unwrap_or(0.02) })
}

/// The request for each layer of the first checkpoint, in order.
fn requests(sources: &[&Checkpoint], main: &Checkpoint, request: &Request) -> Result<Vec<LayerRequest>> {
    let mut named: BTreeMap<&str, &LayerRequest> = BTreeMap::new();
    for wanted in &request.layers {
        if named.insert(&wanted.layer, wanted).is_some() {
            let problem = "it is named twice".to_owned();
            return Err(Error::PlanMisfit { what: wanted.layer.clone(), problem });
        }
    }
    let mut found = Vec::with_capacity(main.layers.len());
    for layer in &main.layers {
        let Some(wanted) = named.remove(layer.block.as_str()) else {
            found.push(identity(layer));
            continue;
        };
        let there = joined(sources, main, request, &layer.block)?.layers;
        let there: u64 = there.iter().fold(0, |sum: u64, (_, layer, _)| sum.saturating_add(layer.num_experts()));
        if wanted.before != there {
            let problem = format!("the plan is for {} experts and there are {there}", wanted.before);
            return Err(Error::PlanMisfit { what: layer.block.clone(), problem });
        }
        found.push(wanted.clone());
    }
    if let Some(stray) = named.keys().next() {
        let problem = format!("{} has no experts there", main.shown());
        return Err(Error::PlanMisfit { what: (*stray).to_owned(), problem });
    }
    Ok(found)
}

fn check_counts(
    main: &Checkpoint,
    kind: &'static ModelType,
    request: &Request,
    options: &Options,
    requests: &[LayerRequest],
) -> Result<()> {
    let top_k = request.top_k.or_else(|| kind.top_k.iter().find_map(|key| main.config.count(key)));
    let groups = main.groups();
    let selected = kind.groups.as_ref().and_then(|keys| main.config.count(keys.selected)).unwrap_or(groups);
    let first = requests.first().map_or(0, |wanted| wanted.slots.len() as u64);
    let some_dense = requests.iter().find(|wanted| wanted.dense);
    for wanted in requests {
        let left = wanted.slots.len() as u64;
        if let (Some(dense), false) = (some_dense, wanted.dense) {
            let problem = format!("it keeps a gate and {} becomes dense: make every layer dense, or none", dense.layer);
            return Err(Error::PlanMisfit { what: wanted.layer.clone(), problem });
        }
        if wanted.dense {
            continue;
        }
        if let Some(top_k) = top_k.filter(|top_k| *top_k > left) {
            return Err(Error::TopK { layer: wanted.layer.clone(), left, top_k });
        }
        if groups > 1 {
            let misfit = |problem: String| Error::GroupsMisfit { layer: wanted.layer.clone(), left, problem };
            if left.checked_rem(groups) != Some(0) {
                return Err(misfit(format!("keep a multiple of {groups}, as many of each group")));
            }
            let size = left.checked_div(groups).unwrap_or(0);
            let least = kind.groups.as_ref().map_or(1, |keys| keys.least);
            if size < least {
                return Err(misfit(format!("keep at least {least} of each of the {groups} groups")));
            }
            if let Some(top_k) = top_k.filter(|top_k| *top_k > size.saturating_mul(selected)) {
                return Err(misfit(format!(
                    "a token uses {top_k} of {selected} groups of {size}: keep more, or lower top-k"
                )));
            }
        }
        if left != first && !options.uneven {
            return Err(Error::Uneven { layer: wanted.layer.clone(), left, other: first });
        }
    }
    let masks =
        request.new_rows == NewRows::Masked && requests.iter().any(|wanted| wanted.slots.iter().any(|slot| slot.new));
    let bias = main.layers.iter().all(|layer| layer.gates.iter().any(|gate| gate.kind == GateKind::Bias));
    if masks && !bias {
        let problem = format!(
            "a {} gate has no selection bias, so a new expert cannot be masked on disk: copy the rows",
            kind.name
        );
        return Err(Error::Unsupported { what: main.shown(), problem });
    }
    Ok(())
}

/// A quantised checkpoint is moved in whole tensors; what its config says of single experts must stay true.
fn check_quantised(main: &Checkpoint, options: &Options, requests: &[LayerRequest]) -> Result<()> {
    if !main.config.has("quantization_config") {
        return Ok(());
    }
    let refuse = |problem: &str| Err(Error::Unsupported { what: main.shown(), problem: problem.to_owned() });
    if main.layers.iter().any(|layer| options.layout.is_some_and(|layout| layout != layer.layout)) {
        return refuse("it is quantised, and its layout cannot be changed: convert it before it is quantised");
    }
    if requests.iter().any(|wanted| wanted.dense) {
        return refuse("it is quantised, and cannot become dense: extract before it is quantised");
    }
    let numbered = (0..10).any(|digit| main.config.mentions("quantization_config", &format!("experts.{digit}")));
    let moves = |wanted: &LayerRequest| {
        (0_u64..).zip(&wanted.slots).any(|(place, slot)| slot.copied() != Some(place))
            || wanted.slots.len() as u64 != wanted.before
    };
    if numbered && requests.iter().any(moves) {
        return refuse("its quantization_config names single experts, whose numbers would change");
    }
    Ok(())
}

fn check_names(main: &Checkpoint, tensors: &[OutTensor]) -> Result<()> {
    let mut names = BTreeSet::new();
    match tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        None => Ok(()),
        Some(tensor) => Err(Error::TensorUnknown {
            path: main.shown(),
            tensor: tensor.name.clone(),
            problem: "is there already, where surgery would put one of that name".to_owned(),
        }),
    }
}

fn count(tensors: &[OutTensor]) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::from([("kept", 0), ("renamed", 0), ("cut", 0), ("made", 0)]);
    for tensor in tensors {
        let name = match tensor.fate {
            Fate::Kept => "kept",
            Fate::Renamed => "renamed",
            Fate::Cut => "cut",
            Fate::Made => "made",
        };
        let sum: &mut u64 = counts.entry(name).or_default();
        *sum = sum.saturating_add(1);
    }
    counts
}

/// Tensors of the layers that changed of which no byte is in the output.
fn dropped(main: &Checkpoint, num_touched: u64, touched: &[bool], tensors: &[OutTensor]) -> u64 {
    let mut regions: Vec<(u32, u64, u64)> = Vec::new();
    for (tensor, touched) in main.tensors.iter().zip(touched) {
        if *touched {
            let region = tensor.region;
            regions.push((region.shard, region.offset, region.offset.saturating_add(region.len)));
        }
    }
    regions.sort_unstable();
    let mut used = BTreeSet::new();
    for piece in tensors.iter().flat_map(|tensor| &tensor.pieces) {
        let sources: Vec<_> = match piece {
            Piece::Copy(region) => vec![*region],
            Piece::Make(made) => made.sources.iter().map(|(region, _)| *region).collect(),
        };
        for region in sources {
            let after = regions.partition_point(|(shard, begin, _)| (*shard, *begin) <= (region.shard, region.offset));
            let place = after.checked_sub(1).filter(|place| {
                regions.get(*place).is_some_and(|(shard, _, end)| *shard == region.shard && region.offset < *end)
            });
            used.extend(place);
        }
    }
    num_touched.saturating_sub(used.len() as u64)
}

/// A shard of the output for each shard of the sources, in order; those without a tensor are left out.
pub(super) fn draw(sources: &[&Checkpoint], drawn: Drawn) -> Drawn {
    let mut homes: BTreeMap<u32, Vec<OutTensor>> = BTreeMap::new();
    for tensor in drawn.tensors {
        let (shard, _) = tensor.home();
        homes.entry(shard).or_default().push(tensor);
    }
    // Of an expert without a source the home is no shard: the last one takes it.
    if let Some(fresh) = homes.remove(&u32::MAX) {
        match homes.last_entry() {
            Some(mut last) => last.get_mut().extend(fresh),
            None => drop(homes.insert(0, fresh)),
        }
    }
    let shards: Vec<_> = sources.iter().flat_map(|source| source.shards.iter()).collect();
    let firsts = sources.first().map_or(0, |source| source.shards.len());
    let total = homes.len();
    let same_names = total == firsts && homes.keys().enumerate().all(|(place, shard)| place == *shard as usize);
    let mut finished = Drawn { tensors: Vec::new(), shards: Vec::new() };
    for (number, (shard, mut tensors)) in (1_usize..).zip(homes) {
        let like = shards.get(shard as usize);
        let name = match like.filter(|_| same_names) {
            Some(like) => like.file.name.clone(),
            None if total == 1 => SINGLE.to_owned(),
            None => format!("model-{number:05}-of-{total:05}.safetensors"),
        };
        in_order(&mut tensors);
        let unchanged = like
            .filter(|like| like.num_tensors == tensors.len() && tensors.iter().all(|tensor| tensor.fate == Fate::Kept));
        let content = match unchanged {
            Some(_) => ShardContent::Whole(shard),
            None => ShardContent::Tensors(header(like.map(|like| &like.metadata), &tensors), tensors.clone()),
        };
        let bytes = match (&content, unchanged) {
            (ShardContent::Tensors(header, tensors), _) => shard_bytes(header, tensors),
            (ShardContent::Whole(_), unchanged) => unchanged.map_or(0, |like| like.file.bytes),
        };
        finished.shards.push(OutShard { name, bytes, content });
        finished.tensors.extend(tensors);
    }
    finished
}

pub(super) fn shard_bytes(header: &[u8], tensors: &[OutTensor]) -> u64 {
    tensors.iter().fold(header.len() as u64, |sum, tensor| sum.saturating_add(tensor.len()))
}

/// Wide dtypes first, so that every tensor begins at a multiple of its values' size; then where they were, so that what lay
/// together is moved together.
pub(super) fn in_order(tensors: &mut [OutTensor]) {
    tensors.sort_by_key(|tensor| (std::cmp::Reverse(crate::shard::bits(tensor.dtype)), tensor.home()));
}

/// A safetensors header with its length, padded to a multiple of eight.
pub(super) fn header(metadata: Option<&BTreeMap<String, String>>, tensors: &[OutTensor]) -> Vec<u8> {
    let mut text = String::from("{");
    if let Some(metadata) = metadata.filter(|metadata| !metadata.is_empty()) {
        text.push_str(&format!("\"__metadata__\":{},", json!(metadata)));
    }
    let mut begin: u64 = 0;
    for tensor in tensors {
        let end = begin.saturating_add(tensor.len());
        let name = Value::from(tensor.name.as_str());
        let shape = json!(tensor.shape);
        text.push_str(&format!(
            "{name}:{{\"dtype\":\"{}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}},",
            tensor.dtype
        ));
        begin = end;
    }
    if text.ends_with(',') {
        text.pop();
    }
    text.push('}');
    while text.len().checked_rem(8) != Some(0) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    bytes
}

fn index(main: &Checkpoint, drawn: &Drawn) -> Result<Vec<u8>> {
    let mut weight_map: BTreeMap<&str, &str> = BTreeMap::new();
    for shard in &drawn.shards {
        match &shard.content {
            ShardContent::Tensors(_, tensors) => {
                weight_map.extend(tensors.iter().map(|tensor| (tensor.name.as_str(), shard.name.as_str())));
            }
            ShardContent::Whole(number) => {
                let kept =
                    drawn.tensors.iter().filter(|tensor| tensor.fate == Fate::Kept && tensor.home().0 == *number);
                for tensor in kept {
                    weight_map.entry(&tensor.name).or_insert(&shard.name);
                }
            }
        }
    }
    let size = drawn.tensors.iter().fold(0, |sum: u64, tensor| sum.saturating_add(tensor.len()));
    let mut metadata = main.index_metadata.clone().unwrap_or_default();
    metadata.set("total_size", &Value::from(size));
    if metadata.has("total_parameters") {
        let values = drawn
            .tensors
            .iter()
            .map(|tensor| tensor.shape.iter().fold(1, |product: u64, &size| product.saturating_mul(size)));
        metadata.set("total_parameters", &Value::from(values.fold(0, |sum: u64, values| sum.saturating_add(values))));
    }
    let metadata: Value = serde_json::from_str(&metadata.to_text()).unwrap_or_default();
    let text = serde_json::to_string_pretty(&json!({ "metadata": metadata, "weight_map": weight_map }));
    let text = text.map_err(|error| Error::PlanMisfit { what: main.shown(), problem: error.to_string() })?;
    Ok(format!("{text}\n").into_bytes())
}

fn config(main: &Checkpoint, kind: &'static ModelType, request: &Request, requests: &[LayerRequest]) -> Document {
    let mut config = main.config.clone();
    let counts: Vec<u64> = requests.iter().map(|wanted| wanted.slots.len() as u64).collect();
    let most = counts.iter().copied().max().unwrap_or(0);
    for key in kind.num_experts {
        if config.has(key) || kind.always_written.contains(key) {
            config.set(key, &Value::from(most));
        }
    }
    if let Some(top_k) = request.top_k {
        let there: Vec<_> = kind.top_k.iter().filter(|key| config.has(key)).collect();
        for key in if there.is_empty() { kind.top_k.iter().take(1).collect() } else { there } {
            config.set(key, &Value::from(top_k));
        }
    }
    config.remove(UNEVEN);
    if counts.iter().any(|count| *count != most) {
        let by_layer: BTreeMap<&str, u64> = requests.iter().map(|wanted| wanted.layer.as_str()).zip(counts).collect();
        config.set(UNEVEN, &json!(by_layer));
    }
    config
}

/// The tensors that stand for nothing, of which the dense type has none.
pub(super) fn left_out(main: &Checkpoint, dense: &'static Dense) -> Vec<String> {
    let below = |block: &str| dense.leave_out.iter().map(|name| format!("{block}.{name}")).collect::<Vec<_>>();
    main.layers.iter().flat_map(|layer| below(&layer.block)).collect()
}

fn dense_config(
    main: &Checkpoint,
    kind: &'static ModelType,
    dense: Option<&'static Dense>,
    tensors: &[OutTensor],
) -> Result<Document> {
    let refuse = |problem: String| Error::Unsupported { what: main.shown(), problem };
    let dense = dense.ok_or_else(|| refuse(format!("no dense model type is known for {}", kind.name)))?;
    let mut config = main.config.clone();
    let width = main.layers.first().and_then(|layer| layer.experts.first()?.iter().find(|part| part.role == "gate"));
    let width = width.and_then(|part| part.shape.first()).copied().unwrap_or(0);
    let (_, gate) = dense.tensors.first().copied().unwrap_or_default();
    let other = tensors.iter().find(|tensor| tensor.name.ends_with(gate) && tensor.shape.first() != Some(&width));
    if let Some(other) = other {
        let problem = format!(
            "{:?} is {:?} and the experts are {width} wide: {} has one width for all",
            other.name, other.shape, dense.model_type
        );
        return Err(refuse(problem));
    }
    config.set("model_type", &Value::from(dense.model_type));
    config.set("intermediate_size", &Value::from(width));
    let (from, to) = dense.architecture;
    if let Some(Value::Array(names)) = config.get("architectures") {
        let renamed =
            |name: &Value| name.as_str().map_or_else(|| name.clone(), |name| Value::from(name.replace(from, to)));
        config.set("architectures", &names.iter().map(renamed).collect());
    }
    for key in dense.drop.iter().copied().flatten() {
        config.remove(key);
    }
    for (key, value) in dense.defaults {
        if !config.has(key) {
            config.set(key, &serde_json::from_str(value).unwrap_or_default());
        }
    }
    Ok(config)
}

fn notes(
    sources: &[&Checkpoint],
    main: &Checkpoint,
    request: &Request,
    requests: &[LayerRequest],
    drawn: &Drawn,
) -> Vec<String> {
    let mut notes = Vec::new();
    if !main.left_out.is_empty() && sources.len() == 1 {
        notes.push(format!("not carried over: {}", main.left_out.join(", ")));
    }
    if let [_, others @ ..] = sources {
        for other in others {
            let used: usize = other.layers.iter().map(|layer| layer.tensors().collect::<BTreeSet<_>>().len()).sum();
            let rest = other.tensors.len().saturating_sub(used);
            notes.push(format!(
                "of {} the experts and gates are used; {rest} other tensors are those of {}",
                other.shown(),
                main.shown()
            ));
        }
    }
    let new = requests.iter().any(|wanted| wanted.slots.iter().any(|slot| slot.new || slot.copied().is_none()));
    if new {
        notes.push(if request.new_rows == NewRows::Masked {
            "new experts have a selection bias of -1e4: the model's outputs stay, bit for bit, until the bias is raised"
                .to_owned()
        } else {
            "new experts can be chosen at once, so the model's outputs change".to_owned()
        });
    }
    let groups = main.groups();
    if groups > 1
        && requests.iter().zip(&main.layers).any(|(wanted, layer)| regroups(wanted, layer.num_experts(), groups))
    {
        notes.push(
            "experts change their groups, so tokens are routed otherwise than among the same experts before".to_owned(),
        );
    }
    let strange = main.layers.iter().flat_map(|layer| layer.experts.first()).flatten().find(|part| !is_known(part));
    if let Some(part) = strange {
        notes.push(format!(
            "experts have tensors that the table does not know, as {:?}: they move with their experts",
            part.role
        ));
    }
    if drawn.shards.iter().any(|shard| shard.bytes > 50_000_000_000) {
        notes.push("a shard has over 50 GB".to_owned());
    }
    notes
}

fn regroups(wanted: &LayerRequest, before: u64, groups: u64) -> bool {
    let after = (wanted.slots.len() as u64).checked_div(groups).unwrap_or(1);
    let size = before.checked_div(groups).unwrap_or(1);
    (0_u64..).zip(&wanted.slots).any(|(place, slot)| {
        // Of a second checkpoint the experts have the groups of that one.
        let old = slot.sources.first().and_then(|source| source.checked_rem(before)?.checked_div(size));
        old.is_some_and(|old| Some(old) != place.checked_div(after))
    })
}

fn record(
    sources: &[&Checkpoint],
    request: &Request,
    options: &Options,
    kind: &ModelType,
    requests: &[LayerRequest],
) -> Value {
    let slot = |slot: &SlotRequest| json!({"sources": slot.sources, "weights": slot.weights, "new": slot.new, "noise": slot.noise});
    let layers: Vec<Value> = requests
        .iter()
        .map(|wanted| {
            json!({
                "layer": wanted.layer,
                "before": wanted.before,
                "slots": wanted.slots.iter().map(slot).collect::<Vec<_>>(),
                "dense": wanted.dense,
            })
        })
        .collect();
    json!({
        "format_version": 1,
        "operation": options.operation,
        "model_type": kind.name,
        "sources": sources.iter().map(|source| source.path.file_name().map(|name| name.to_string_lossy().into_owned())).collect::<Vec<_>>(),
        "plan": {
            "format_version": 1,
            "layers": layers,
            "top_k": request.top_k,
            "new_rows": if request.new_rows == NewRows::Masked { "masked" } else { "copy" },
            "seed": request.seed,
        },
    })
}

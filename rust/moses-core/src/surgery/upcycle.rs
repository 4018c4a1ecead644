//! A dense checkpoint becomes a mixture: every expert a copy of the FFN (Komatsuzaki et al., arXiv 2212.05055), the gate's rows
//! drawn. Where the weights of a token's experts sum to 1 the result computes what the dense model does.

use std::borrow::Cow;

use serde_json::json;

use super::build::{Drawn, carry, counts, draw, job};
use super::job::{Fate, Job, OutTensor, Piece};
use super::layer::Joined;
use super::made::{Made, stream, value_bytes};
use super::request::{LayerRequest, NewRows, SlotRequest};
use crate::checkpoint::{Checkpoint, MoeLayer, Part};
use crate::layout::{DENSE_FFN, Layout, ModelType};
use crate::limits::MAX_EXPERTS;
use crate::{Error, Result};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Upcycle {
    /// The model type that it becomes.
    pub model_type: String,
    /// The config of the result, made by who knows what the classes read.
    pub config: String,
    /// Numbers of the blocks that become mixtures.
    pub layers: Vec<u64>,
    /// Experts of each.
    pub num_experts: u64,
    /// Noise on experts 1 and up, relative to the deviation of each matrix.
    pub noise: f64,
    /// Of the noise and the gates.
    pub seed: u64,
    /// Tensors of the class that stand for nothing here, by block: names, and shapes in which `u64::MAX` is the model's width.
    pub empty: Vec<(String, Vec<u64>)>,
}

/// Plans the work.
///
/// # Errors
/// `model_type_unknown`, `plan_misfit`, `tensor_unknown`, `surgery_unsupported`.
pub fn upcycle(main: &Checkpoint, wanted: &Upcycle) -> Result<Job> {
    let unknown = || Error::ModelType { path: main.shown(), model_type: wanted.model_type.clone() };
    let kind = ModelType::find(&wanted.model_type).ok_or_else(unknown)?;
    let names = kind.names(Layout::PerExpert).ok_or_else(unknown)?;
    let misfit = |problem: String| Error::PlanMisfit { what: main.shown(), problem };
    if wanted.num_experts == 0 || wanted.num_experts > MAX_EXPERTS || !wanted.noise.is_finite() || wanted.noise < 0.0 {
        return Err(misfit(format!("{} experts with noise {} cannot be made", wanted.num_experts, wanted.noise)));
    }
    let range = main.config.get("initializer_range").and_then(|value| value.as_f64());
    let range = range.filter(|range| range.is_finite() && *range >= 0.0).unwrap_or(0.02);
    let mut slots = vec![SlotRequest::keep(0)];
    let copy = SlotRequest { new: true, noise: wanted.noise, ..SlotRequest::keep(0) };
    slots.resize(usize::try_from(wanted.num_experts).unwrap_or(1), copy);
    let (mut tensors, mut touched) = (Vec::new(), vec![false; main.tensors.len()]);
    let mut layers = Vec::new();
    for number in &wanted.layers {
        let layer = ffn(main, &format!("model.layers.{number}"), names)?;
        for place in layer.tensors() {
            if let Some(touched) = touched.get_mut(place as usize) {
                *touched = true;
            }
        }
        let request = LayerRequest { layer: layer.block.clone(), before: 1, slots: slots.clone(), dense: false };
        let joined = Joined {
            layers: vec![(main, &layer, 0)],
            new_rows: NewRows::Copy,
            seed: wanted.seed,
            initializer_range: range,
        };
        let mut made = joined.tensors(&request, names, None)?;
        for tensor in &mut made {
            if tensor.fate == Fate::Kept {
                tensor.fate = Fate::Renamed;
            }
        }
        tensors.extend(made);
        tensors.extend(gate(&layer, names, wanted, range)?);
        layers.push(json!({
            "layer": layer.block, "before": 1, "dense": false,
            "slots": slots.iter().map(|slot| json!({
                "sources": slot.sources, "weights": slot.weights, "new": slot.new, "noise": slot.noise,
            })).collect::<Vec<_>>(),
        }));
    }
    carry(main, &touched, &mut tensors)?;
    let counts = counts(main, &touched, &tensors);
    let drawn = draw(&[main], Drawn { tensors, shards: Vec::new() });
    let record = json!({
        "format_version": 1,
        "operation": "upcycle",
        "model_type": kind.name,
        "sources": [main.path.file_name().map(|name| name.to_string_lossy().into_owned())],
        "plan": {"format_version": 1, "layers": layers, "top_k": null, "new_rows": "copy", "seed": wanted.seed},
    });
    job(&[main], main, drawn, wanted.config.clone().into_bytes(), counts, record)
}

/// The FFN of a block as a layer of one expert.
pub(super) fn ffn(main: &Checkpoint, block: &str, names: &'static crate::layout::LayoutNames) -> Result<MoeLayer> {
    let mut parts = Vec::new();
    for (role, name) in DENSE_FFN {
        let name = format!("{block}.{name}");
        let place = main.tensors.binary_search_by(|tensor| (*tensor.name).cmp(&name));
        let found = place.ok().and_then(|place| Some((u32::try_from(place).ok()?, main.tensors.get(place)?)));
        let (place, tensor) = found.ok_or_else(|| Error::PlanMisfit {
            what: main.shown(),
            problem: format!("it has no {name}, so the block cannot become a mixture"),
        })?;
        parts.push(Part {
            role: Cow::Borrowed(*role),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            region: tensor.region,
            tensor: place,
        });
    }
    let module = format!("{block}.mlp.");
    let stray = main.tensors.iter().enumerate().find(|(place, tensor)| {
        tensor.name.starts_with(&module) && !parts.iter().any(|part| part.tensor as usize == *place)
    });
    if let Some((_, tensor)) = stray {
        return Err(Error::TensorUnknown {
            path: main.shown(),
            tensor: tensor.name.to_string(),
            problem: "belongs to an FFN that is to become experts, and they have no place for it".to_owned(),
        });
    }
    Ok(MoeLayer { block: block.to_owned(), layout: Layout::PerExpert, names, experts: vec![parts], gates: Vec::new() })
}

/// The gate's rows, drawn, and the tensors of the class that stand for nothing.
fn gate(
    layer: &MoeLayer,
    names: &'static crate::layout::LayoutNames,
    wanted: &Upcycle,
    range: f64,
) -> Result<Vec<OutTensor>> {
    let like = layer.experts.first().and_then(|parts| parts.iter().find(|part| part.role == "gate"));
    let like = like.filter(|part| part.shape.len() == 2 && value_bytes(part.dtype).is_some());
    let like = like.ok_or_else(|| Error::Unsupported {
        what: layer.block.clone(),
        problem: "its FFN is quantised, or no matrix: upcycle before it is quantised".to_owned(),
    })?;
    let width = like.shape.get(1).copied().unwrap_or(0);
    let made = |name: String, shape: Vec<u64>, normal: f64| {
        let num_values = shape.iter().fold(1, |product: u64, &size| product.saturating_mul(size));
        let stream = stream(wanted.seed, &layer.block, 0, &name);
        let dtype = like.dtype;
        let made = Made { sources: Vec::new(), noise: 0.0, normal, constant: 0.0, dtype, num_values, stream };
        OutTensor { name, dtype, shape, pieces: vec![Piece::Make(made)], fate: Fate::Made }
    };
    let name = names.gates.first().map_or("", |gate| gate.name);
    let mut tensors = vec![made(format!("{}.{name}", layer.block), vec![wanted.num_experts, width], range)];
    for (name, shape) in &wanted.empty {
        let shape = shape.iter().map(|&size| if size == u64::MAX { width } else { size }).collect();
        tensors.push(made(format!("{}.{name}", layer.block), shape, 0.0));
    }
    Ok(tensors)
}

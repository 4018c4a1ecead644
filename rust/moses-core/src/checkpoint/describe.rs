//! What a checkpoint is, as a JSON document.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Checkpoint;
use crate::layout::GateKind;

impl Checkpoint {
    /// Layers, experts, gates, dtypes, bytes and shards, from headers alone.
    #[must_use]
    pub fn describe(&self) -> Value {
        let mut by_dtype: BTreeMap<&str, u64> = BTreeMap::new();
        for tensor in &self.tensors {
            let sum = by_dtype.entry(tensor.dtype).or_default();
            *sum = sum.saturating_add(tensor.region.len);
        }
        let config = |keys: &[&str]| keys.iter().find_map(|key| self.config.count(key));
        let layers: Vec<Value> = self.layers.iter().map(|layer| self.describe_layer(layer)).collect();
        json!({
            "path": self.shown(),
            "model_type": self.model_type,
            "known": self.kind.is_some(),
            "dense_type": self.kind.and_then(|kind| kind.dense(&self.config)).map(|dense| dense.model_type),
            "top_k": self.kind.and_then(|kind| config(kind.top_k)),
            "groups": self.groups(),
            "selection_bias": self.layers.first().is_some_and(|layer| layer.gates.iter().any(|gate| gate.kind == GateKind::Bias)),
            "indexed": self.indexed,
            "num_tensors": self.tensors.len(),
            "bytes": self.tensors.iter().map(|tensor| tensor.region.len).sum::<u64>(),
            "bytes_by_dtype": by_dtype,
            "superseded": {
                "tensors": self.superseded.len(),
                "bytes": self.superseded.iter().map(|(_, _, len)| len).sum::<u64>(),
            },
            "shards": self.shards.iter().map(|shard| json!({
                "name": shard.file.name, "bytes": shard.file.bytes, "tensors": shard.num_tensors,
            })).collect::<Vec<_>>(),
            "layers": layers,
            "files": self.files.iter().map(|file| &file.name).collect::<Vec<_>>(),
            "left_out": self.left_out,
        })
    }

    /// How many groups a token's experts are chosen from; 1 where routing is not by groups.
    #[must_use]
    pub fn groups(&self) -> u64 {
        let Some(groups) = self.kind.and_then(|kind| kind.groups.as_ref()) else { return 1 };
        if groups.only_if.is_some_and(|(key, value)| self.config.text(key).as_deref() != Some(value)) {
            return 1;
        }
        self.config.count(groups.count).unwrap_or(1).max(1)
    }

    fn describe_layer(&self, layer: &super::MoeLayer) -> Value {
        let parts = layer.experts.first().map_or(&[][..], Vec::as_slice);
        let gates = layer.gates.iter().filter_map(|gate| {
            let tensor = self.tensors.get(gate.tensor as usize)?;
            Some(json!({"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape}))
        });
        json!({
            "layer": layer.block,
            "layout": layer.layout.name(),
            "experts": layer.experts.len(),
            "expert_bytes": parts.iter().map(|part| part.region.len).sum::<u64>(),
            "parts": parts.iter().map(|part| json!({
                "role": part.role, "dtype": part.dtype, "shape": part.shape,
            })).collect::<Vec<_>>(),
            "gates": gates.collect::<Vec<_>>(),
        })
    }
}

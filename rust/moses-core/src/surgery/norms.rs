//! How large the weights of each expert are: a rule for what to prune that needs no data.

use std::sync::Arc;

use super::made::sum_of_squares;
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};

/// The Euclidean norm of all weights of each expert, by layer.
///
/// # Errors
/// `surgery_unsupported` where the experts are quantised; `source_changed`, `io`.
pub fn norms(checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<f64>)>> {
    let mut layers = Vec::with_capacity(checkpoint.layers.len());
    for layer in &checkpoint.layers {
        let mut open: Option<(u32, Arc<std::fs::File>)> = None;
        let mut norms = Vec::with_capacity(layer.experts.len());
        for expert in &layer.experts {
            let mut sum = 0.0;
            for part in expert {
                let file = match &open {
                    Some((shard, file)) if *shard == part.region.shard => Arc::clone(file),
                    _ => {
                        let shard = checkpoint.shards.get(part.region.shard as usize);
                        let shard = shard.ok_or_else(|| Error::SourceChanged { path: checkpoint.shown() })?;
                        Arc::new(shard.file.open()?)
                    }
                };
                open = Some((part.region.shard, Arc::clone(&file)));
                let squares = sum_of_squares(part.region, part.dtype, &|_| Ok(Arc::clone(&file)));
                sum +=
                    squares.map_err(Error::io(checkpoint.shown(), "reading"))?.ok_or_else(|| Error::Unsupported {
                        what: layer.block.clone(),
                        problem: format!(
                            "its {} is {}, whose size cannot be told: give usage instead",
                            part.role, part.dtype
                        ),
                    })?;
            }
            norms.push(sum.sqrt());
        }
        layers.push((layer.block.clone(), norms));
    }
    Ok(layers)
}

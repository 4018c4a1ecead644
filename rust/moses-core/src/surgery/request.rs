//! What is asked for: the surgery plan as Python's `SurgeryPlan.to_json` writes it.

use serde::Deserialize;

use crate::layout::Layout;
use crate::limits::{MAX_EXPERTS, MAX_PLAN_BYTES};
use crate::{Error, Result};

const FORMAT_VERSION: u64 = 1;

/// Gate rows of new experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NewRows {
    /// Those of their sources.
    Copy,
    /// Never chosen: a selection bias of -1e4.
    Masked,
}

/// One expert after surgery.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotRequest {
    /// The experts that it comes from; of several checkpoints, those of the second count on from the first's.
    pub sources: Vec<u64>,
    /// Weights of the average over them.
    pub weights: Vec<f64>,
    /// Whether it is a further expert.
    pub new: bool,
    /// Standard deviation of the noise, relative to that of each matrix.
    pub noise: f64,
}

impl SlotRequest {
    /// The expert as it is.
    #[must_use]
    pub fn keep(source: u64) -> Self {
        Self { sources: vec![source], weights: Vec::new(), new: false, noise: 0.0 }
    }

    /// The one source whose bytes it has, all of them.
    #[must_use]
    pub fn copied(&self) -> Option<u64> {
        match (self.sources.as_slice(), self.weights.as_slice()) {
            ([source], [] | [1.0]) if self.noise == 0.0 => Some(*source),
            _ => None,
        }
    }

    /// Whether it is one expert of before.
    #[must_use]
    pub fn kept(&self) -> bool {
        !self.new && self.copied().is_some()
    }
}

/// What becomes of one layer's experts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRequest {
    /// The path of its block.
    pub layer: String,
    /// Experts before.
    pub before: u64,
    /// Experts after.
    pub slots: Vec<SlotRequest>,
    /// Whether the one that is left becomes a plain FFN.
    pub dense: bool,
}

/// The plan.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    format_version: u64,
    /// The layers that change.
    pub layers: Vec<LayerRequest>,
    /// Experts a token afterwards.
    pub top_k: Option<u64>,
    /// Gate rows of new experts.
    pub new_rows: NewRows,
    /// Of noise and fresh experts.
    pub seed: u64,
}

/// How it is done.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The layout of the output; the input's where it is not given.
    pub layout: Option<Layout>,
    /// Whether layers may end with different numbers of experts, which transformers cannot load.
    pub uneven: bool,
    /// Whether the checkpoint's own folder is to change, writing only what is new.
    pub in_place: bool,
    /// What is being done, for the record.
    pub operation: String,
}

impl Request {
    /// Reads a plan.
    ///
    /// # Errors
    /// `plan_misfit`, `format_oversized`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > MAX_PLAN_BYTES {
            return Err(Error::Oversized { what: "plan", value: bytes.len() as u64, limit: MAX_PLAN_BYTES });
        }
        let wrong = |problem: String| Error::PlanMisfit { what: "the plan".to_owned(), problem };
        let request: Self = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if request.format_version != FORMAT_VERSION {
            return Err(wrong(format!("its format_version is {}, not {FORMAT_VERSION}", request.format_version)));
        }
        for layer in &request.layers {
            layer.check()?;
        }
        Ok(request)
    }
}

impl LayerRequest {
    fn check(&self) -> Result<()> {
        let wrong = |problem: String| Error::PlanMisfit { what: self.layer.clone(), problem };
        if self.slots.is_empty() || self.slots.len() as u64 > MAX_EXPERTS || self.before > MAX_EXPERTS {
            return Err(wrong(format!("{} experts would be left", self.slots.len())));
        }
        if self.dense && self.slots.len() != 1 {
            return Err(wrong(format!("{} experts cannot become one FFN", self.slots.len())));
        }
        for slot in &self.slots {
            if let Some(source) = slot.sources.iter().find(|source| **source >= self.before) {
                return Err(wrong(format!("it has experts 0 to {}, not {source}", self.before.saturating_sub(1))));
            }
            let weights = slot.weights.len();
            if (slot.sources.len() > 1 || weights > 0) && weights != slot.sources.len() {
                return Err(wrong(format!("{weights} weights for {} experts", slot.sources.len())));
            }
            if (slot.sources.is_empty() || slot.noise != 0.0) && !slot.new {
                return Err(wrong("only a new expert is fresh or has noise".to_owned()));
            }
            if !slot.noise.is_finite() || slot.noise < 0.0 || !slot.weights.iter().all(|weight| weight.is_finite()) {
                return Err(wrong("noise and weights must be finite".to_owned()));
            }
        }
        Ok(())
    }
}

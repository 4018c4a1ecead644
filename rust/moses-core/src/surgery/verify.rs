//! Whether an output is what a plan makes of its sources: expert by expert and row by row, byte against byte, whatever the
//! layouts. It shares nothing with the planner but the finding of experts.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::build;
use super::request::{LayerRequest, Request, SlotRequest};
use super::upcycle::ffn;
use crate::checkpoint::{Checkpoint, MoeLayer, Region};
use crate::layout::{Dense, Layout};
use crate::limits::MOVE_BYTES;
use crate::{Error, Result};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Tensors outside of the experts and gates that are the source's.
    pub tensors: u64,
    /// Experts that are, bit for bit, the one that they come from.
    pub experts: u64,
    /// Gate rows that are the one of their expert.
    pub rows: u64,
    /// Experts that are new or averaged, whose bytes are their own.
    pub new: u64,
    /// What is not as it must be: a tensor or layer, and how.
    pub problems: Vec<(String, String)>,
}

/// More than this helps nobody.
const MAX_PROBLEMS: usize = 100;

/// Compares `out` with what the plan makes of `sources`.
///
/// # Errors
/// `plan_misfit` where the plan is not one for the sources; `source_changed`, `io`.
pub fn compare(out: &Checkpoint, sources: &[&Checkpoint], request: &Request) -> Result<Comparison> {
    let none = || Error::PlanMisfit { what: "the plan".to_owned(), problem: "it has no checkpoint".to_owned() };
    let main = *sources.first().ok_or_else(none)?;
    let mut layers: Vec<Vec<MoeLayer>> = sources.iter().map(|source| source.layers.clone()).collect();
    // Of a dense source each FFN is the one expert that the others are copies of.
    let upcycled = sources.len() == 1 && main.kind.is_none();
    if upcycled {
        let names = out.kind.and_then(|kind| kind.names(Layout::PerExpert)).ok_or_else(none)?;
        let ffns = request.layers.iter().map(|wanted| ffn(main, &wanted.layer, names));
        layers = vec![ffns.collect::<Result<_>>()?];
    }
    let mut comparing = Comparing { out, sources, layers, files: Files::default(), found: Comparison::default() };
    let mut theirs: BTreeSet<u32> = BTreeSet::new();
    let mut ours: BTreeSet<u32> = BTreeSet::new();
    let dense = main.kind.and_then(|kind| kind.dense(&main.config));
    if let Some(dense) = dense.filter(|_| request.layers.iter().any(|wanted| wanted.dense)) {
        let places = build::left_out(main, dense).into_iter().filter_map(|name| main.place(&name));
        theirs.extend(places.filter_map(|place| u32::try_from(place).ok()));
    }
    for layer in &comparing.layers.first().cloned().unwrap_or_default() {
        theirs.extend(layer.tensors());
        let wanted = request.layers.iter().find(|wanted| wanted.layer == layer.block);
        let same: LayerRequest;
        let wanted = match wanted {
            Some(wanted) => wanted,
            None => {
                same = super::layer::identity(layer);
                &same
            }
        };
        if let (true, Some(dense)) = (wanted.dense, dense) {
            comparing.dense(layer, wanted, dense, &mut ours)?;
            continue;
        }
        match out.layers.iter().find(|found| found.block == layer.block) {
            Some(found) => {
                ours.extend(found.tensors());
                comparing.layer(found, wanted)?;
            }
            None => comparing.problem(&layer.block, "it has no experts any more"),
        }
    }
    for (place, tensor) in (0_u32..).zip(&main.tensors) {
        if theirs.contains(&place) {
            continue;
        }
        match out.tensor(&tensor.name) {
            None => comparing.problem(&tensor.name, "it is missing"),
            Some(found) if (found.dtype, &found.shape) != (tensor.dtype, &tensor.shape) => {
                comparing.problem(&tensor.name, "its shape or dtype is another");
            }
            Some(found) => {
                if comparing.same(0, tensor.region, found.region)? {
                    comparing.found.tensors = comparing.found.tensors.saturating_add(1);
                } else {
                    comparing.problem(&tensor.name, "its bytes are others");
                }
            }
        }
    }
    for (place, tensor) in (0_u32..).zip(&out.tensors) {
        let of_class = |wanted: &LayerRequest| tensor.name.starts_with(&format!("{}.mlp.", wanted.layer));
        if upcycled && request.layers.iter().any(of_class) {
            continue;
        }
        if !ours.contains(&place) && main.tensor(&tensor.name).is_none() {
            comparing.problem(&tensor.name, "it is in no source");
        }
    }
    Ok(comparing.found)
}

struct Comparing<'a> {
    out: &'a Checkpoint,
    sources: &'a [&'a Checkpoint],
    /// The layers with experts of each source.
    layers: Vec<Vec<MoeLayer>>,
    files: Files,
    found: Comparison,
}

/// The files that are open: of each checkpoint the last one used.
#[derive(Default)]
struct Files(Vec<(usize, u32, File)>);

impl Files {
    fn get(&mut self, owner: usize, checkpoint: &Checkpoint, shard: u32) -> Result<&File> {
        let there = self.0.iter().position(|(theirs, number, _)| (*theirs, *number) == (owner, shard));
        if there.is_none() {
            let file = checkpoint.shards.get(shard as usize);
            let file = file.ok_or_else(|| Error::SourceChanged { path: checkpoint.shown() })?.file.open()?;
            if self.0.len() >= 16 {
                self.0.remove(0);
            }
            self.0.push((owner, shard, file));
        }
        let there = there.or_else(|| self.0.len().checked_sub(1));
        let file = there.and_then(|place| self.0.get(place)).map(|(_, _, file)| file);
        file.ok_or_else(|| Error::SourceChanged { path: checkpoint.shown() })
    }
}

/// The output's number among the owners of files.
const OUT: usize = usize::MAX;

impl Comparing<'_> {
    fn problem(&mut self, what: &str, problem: &str) {
        if self.found.problems.len() < MAX_PROBLEMS {
            self.found.problems.push((what.to_owned(), problem.to_owned()));
        }
    }

    /// Whether a stretch of source number `owner` has the bytes of one of the output.
    fn same(&mut self, owner: usize, theirs: Region, ours: Region) -> Result<bool> {
        if theirs.len != ours.len {
            return Ok(false);
        }
        let none = || Error::SourceChanged { path: self.out.shown() };
        let source = *self.sources.get(owner).ok_or_else(none)?;
        let shown = source.shown();
        let (mut left, mut right) = (Vec::new(), Vec::new());
        let mut at: u64 = 0;
        while at < ours.len {
            let step = usize::try_from(ours.len.saturating_sub(at)).unwrap_or(MOVE_BYTES).min(MOVE_BYTES);
            left.resize(step, 0);
            right.resize(step, 0);
            let file = self.files.get(owner, source, theirs.shard)?;
            file.read_exact_at(&mut left, theirs.offset.saturating_add(at)).map_err(Error::io(&*shown, "reading"))?;
            let file = self.files.get(OUT, self.out, ours.shard)?;
            file.read_exact_at(&mut right, ours.offset.saturating_add(at)).map_err(Error::io(&*shown, "reading"))?;
            if left != right {
                return Ok(false);
            }
            at = at.saturating_add(step as u64);
        }
        Ok(true)
    }

    /// Which source an expert is of, and its number there.
    fn origin(&self, block: &str, expert: u64) -> Option<(usize, MoeLayer, usize)> {
        let mut left = expert;
        for (owner, layers) in self.layers.iter().enumerate() {
            let layer = layers.iter().find(|layer| layer.block == block)?;
            if left < layer.num_experts() {
                return Some((owner, layer.clone(), usize::try_from(left).ok()?));
            }
            left = left.saturating_sub(layer.num_experts());
        }
        None
    }

    fn layer(&mut self, found: &MoeLayer, wanted: &LayerRequest) -> Result<()> {
        if found.experts.len() != wanted.slots.len() {
            let problem = format!("it has {} experts and the plan says {}", found.experts.len(), wanted.slots.len());
            self.problem(&found.block, &problem);
            return Ok(());
        }
        for (place, slot) in wanted.slots.iter().enumerate() {
            let Some(expert) = slot.copied().filter(|_| slot.sources.len() == 1) else {
                self.found.new = self.found.new.saturating_add(1);
                continue;
            };
            self.expert(found, place, expert)?;
            self.rows(found, place, slot, expert)?;
        }
        Ok(())
    }

    fn expert(&mut self, found: &MoeLayer, place: usize, expert: u64) -> Result<()> {
        let what = format!("{} expert {place}", found.block);
        let Some((owner, layer, number)) = self.origin(&found.block, expert) else {
            self.problem(&what, &format!("no source has expert {expert}"));
            return Ok(());
        };
        let theirs = layer.experts.get(number).cloned().unwrap_or_default();
        let ours = found.experts.get(place).cloned().unwrap_or_default();
        let mut same = theirs.len() == ours.len() && !theirs.is_empty();
        for part in &theirs {
            let other = ours
                .iter()
                .find(|other| (&other.role, other.dtype, &other.shape) == (&part.role, part.dtype, &part.shape));
            same = same
                && match other {
                    Some(other) => self.same(owner, part.region, other.region)?,
                    None => false,
                };
        }
        if same {
            self.found.experts = self.found.experts.saturating_add(1);
        } else {
            self.problem(&what, &format!("it is not expert {expert} of the source, bit for bit"));
        }
        Ok(())
    }

    fn rows(&mut self, found: &MoeLayer, place: usize, slot: &SlotRequest, expert: u64) -> Result<()> {
        let what = format!("{} gate row {place}", found.block);
        let Some((owner, layer, number)) = self.origin(&found.block, expert) else { return Ok(()) };
        let source = self.sources.get(owner);
        let mut pairs = Vec::new();
        for gate in &layer.gates {
            let theirs = source.and_then(|source| source.tensors.get(gate.tensor as usize));
            let ours = found.gates.iter().find(|ours| ours.number == gate.number);
            let row = |region: Region, row_bytes: u64, number: usize| Region {
                offset: region.offset.saturating_add(row_bytes.saturating_mul(number as u64)),
                len: row_bytes,
                ..region
            };
            let ours = ours.and_then(|ours| Some((ours, self.out.tensors.get(ours.tensor as usize)?)));
            pairs.push(theirs.zip(ours).map(|(theirs, (gate_out, ours))| {
                (row(theirs.region, gate.row_bytes, number), row(ours.region, gate_out.row_bytes, place), gate.kind)
            }));
        }
        for pair in pairs {
            // The bias of a masked expert is its own.
            if slot.new && pair.is_some_and(|(_, _, kind)| kind == crate::layout::GateKind::Bias) {
                continue;
            }
            let same = match pair {
                Some((theirs, ours, _)) => self.same(owner, theirs, ours)?,
                None => false,
            };
            if same {
                self.found.rows = self.found.rows.saturating_add(1);
            } else {
                self.problem(&what, &format!("it is not the row of expert {expert} of the source"));
            }
        }
        Ok(())
    }

    fn dense(
        &mut self,
        layer: &MoeLayer,
        wanted: &LayerRequest,
        dense: &Dense,
        ours: &mut BTreeSet<u32>,
    ) -> Result<()> {
        let Some(expert) = wanted.slots.first().and_then(SlotRequest::copied) else { return Ok(()) };
        let parts = layer.experts.get(usize::try_from(expert).unwrap_or(usize::MAX)).cloned().unwrap_or_default();
        let mut same = !parts.is_empty();
        for (role, name) in dense.tensors {
            let name = format!("{}.{name}", layer.block);
            let place = self.out.tensors.binary_search_by(|tensor| (*tensor.name).cmp(&name)).ok();
            ours.extend(place.and_then(|place| u32::try_from(place).ok()));
            let found = self.out.tensor(&name).map(|tensor| tensor.region);
            let part = parts.iter().find(|part| part.role == *role);
            same = same
                && match part.zip(found) {
                    Some((part, found)) => self.same(0, part.region, found)?,
                    None => false,
                };
        }
        if same {
            self.found.experts = self.found.experts.saturating_add(1);
        } else {
            self.problem(&layer.block, &format!("its FFN is not expert {expert} of the source, bit for bit"));
        }
        Ok(())
    }
}

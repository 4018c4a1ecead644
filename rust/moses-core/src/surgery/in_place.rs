//! Which shards stay as they are when a checkpoint changes in its own folder.
//!
//! A shard stays, with what is stale in it, where all that is stale is hidden by a shard whose name sorts after it: that is
//! the one which transformers reads last. Where more than half of a shard is stale it is written anew instead.

use std::collections::{BTreeMap, BTreeSet};

use super::build::{Drawn, header, in_order, shard_bytes};
use super::job::{Fate, OutShard, OutTensor, ShardContent};
use crate::checkpoint::{Checkpoint, SINGLE};
use crate::{Error, Result};

/// New tensors are put into shards of about this size.
const SHARD_BYTES: u64 = 5_000_000_000;

pub(super) fn draw(main: &Checkpoint, drawn: Drawn) -> Result<Drawn> {
    let outputs: BTreeSet<&str> = drawn.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut kept: BTreeMap<u32, u64> = BTreeMap::new();
    for tensor in drawn.tensors.iter().filter(|tensor| tensor.fate == Fate::Kept) {
        let sum = kept.entry(tensor.home().0).or_default();
        *sum = sum.saturating_add(tensor.len());
    }
    // A name that no output has would be loaded all the same.
    let mut lost: BTreeSet<u32> = BTreeSet::new();
    lost.extend(
        main.tensors.iter().filter(|tensor| !outputs.contains(&*tensor.name)).map(|tensor| tensor.region.shard),
    );
    lost.extend(
        main.superseded.iter().filter(|(_, name, _)| !outputs.contains(name.as_str())).map(|(shard, _, _)| *shard),
    );
    let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
    let hidden = main.superseded.iter().map(|(shard, _, len)| (*shard, *len));
    for (shard, len) in hidden.chain(main.tensors.iter().map(|tensor| (tensor.region.shard, tensor.region.len))) {
        let sum = bytes.entry(shard).or_default();
        *sum = sum.saturating_add(len);
    }
    let stays = |number: u32| {
        let of = |sums: &BTreeMap<u32, u64>| sums.get(&number).copied().unwrap_or(0);
        !lost.contains(&number) && of(&kept) >= of(&bytes).saturating_sub(of(&kept))
    };
    let mut shards = Vec::new();
    let mut whole: BTreeSet<u32> = BTreeSet::new();
    let total = main.shards.len();
    for (number, shard) in (0_u32..).zip(&main.shards) {
        if stays(number) {
            // transformers reads a model.safetensors, where one is, and no index.
            let single = format!("model-00001-of-{total:05}.safetensors");
            let name = if shard.file.name == SINGLE { single } else { shard.file.name.clone() };
            whole.insert(number);
            shards.push(OutShard { name, bytes: shard.file.bytes, content: ShardContent::Whole(number) });
        }
    }
    let (staying, mut new): (Vec<OutTensor>, Vec<OutTensor>) =
        drawn.tensors.into_iter().partition(|tensor| tensor.fate == Fate::Kept && whole.contains(&tensor.home().0));
    let last = shards.iter().map(|shard| shard.name.clone()).max().unwrap_or_default();
    let metadata = main.shards.first().map(|shard| &shard.metadata);
    let mut tensors = staying;
    let taken: BTreeSet<String> = main.shards.iter().map(|shard| shard.file.name.clone()).collect();
    let mut number: u32 = 0;
    while !new.is_empty() {
        let mut size: u64 = 0;
        let count = new.iter().take_while(|tensor| {
            let fits = size == 0 || size.saturating_add(tensor.len()) <= SHARD_BYTES;
            size = size.saturating_add(tensor.len());
            fits
        });
        let count = count.count();
        let rest = new.split_off(count.min(new.len()));
        in_order(&mut new);
        let name = loop {
            number = number.saturating_add(1);
            let name = format!("model.z-moses-{number:05}.safetensors");
            if !taken.contains(&name) {
                break name;
            }
        };
        if name <= last {
            let problem = format!(
                "its shard {last:?} sorts after {name:?}, so it would hide what is new: write to another folder"
            );
            return Err(Error::Unsupported { what: main.shown(), problem });
        }
        let header = header(metadata, &new);
        let bytes = shard_bytes(&header, &new);
        tensors.extend(new.iter().cloned());
        shards.push(OutShard { name, bytes, content: ShardContent::Tensors(header, new) });
        new = rest;
    }
    Ok(Drawn { tensors, shards })
}
